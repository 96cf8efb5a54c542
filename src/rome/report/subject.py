"""A model opened to be looked at, of a run or of any origin: its test images, and what each threat makes of them."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from rome.attacks import APGD, Attack
from rome.attacks.suites import as_named
from rome.core import trust
from rome.core.device import pick_device
from rome.core.errors import UserError
from rome.data.base import Split
from rome.data.memory import TensorSplit
from rome.evaluation.run import Opened, open_target
from rome.evaluation.store import SETTINGS
from rome.experts import Routing, set_routing
from rome.models import load_model
from rome.runs.config import Config
from rome.runs.folder import Run
from rome.threats import PerExample, Threat

NATURAL = "natural"
STEPS = 15
"""Of APGD, the attack that pictures and routing numbers are made with."""
AT_A_TIME = 64
KEPT = 1024
"""Attacked images are cached up to this number; of more, they are made again."""


class Subject:
    """A model with its test images and threats. Model, data and attacked images are loaded or made on first use.

    Args:
        name: in pictures.
        device: of the model and the images.
        threats: several, or a mapping from the names they are drawn under.
        model: builds the classifier.
        split: opens the test examples.
        run: the run that trained the model, if one did.
    """

    def __init__(
        self,
        name: str,
        device: torch.device,
        threats: Iterable[Threat] | Mapping[str, Threat],
        model: Callable[[], nn.Module],
        split: Callable[[], Split],
        run: Run | None = None,
    ) -> None:
        self.name, self.device, self.run = name, device, run
        self.threats = as_named(threats)
        self._model, self._split = model, split
        self._attacked: dict[int, dict[str, Tensor]] = {}

    @classmethod
    def of_model(
        cls, model: nn.Module, name: str, x: Tensor, y: Tensor, threats: Iterable[Threat] | Mapping[str, Threat]
    ) -> Subject:
        """A classifier in memory, for the figures that need neither its training nor its evaluation.

        Args:
            model: images (B, C, H, W) in [0, 1] to logits, of any architecture; its mode becomes evaluation.
            name: in pictures.
            x: images (n, C, H, W) in [0, 1], on the model's device.
            y: their labels, int64 (n,).
            threats: several, or a mapping from the names they are drawn under.
        """
        model = model.eval()
        return cls(name, x.device, threats, lambda: model, lambda: TensorSplit(x, y))

    @property
    def config(self) -> Config:
        """Of the run."""
        assert self.run is not None
        return self.run.config

    @cached_property
    def model(self) -> nn.Module:
        """The classifier, in evaluation mode."""
        return self._model()

    @cached_property
    def split(self) -> Split:
        """The test examples."""
        return self._split()

    def images(self, n: int) -> tuple[Tensor, Tensor]:
        """The first ``n`` test images (n, C, H, W) in [0, 1] and their labels (n,), fewer where the set is smaller."""
        x, y = self.split.first(min(n, len(self.split)))
        return x.to(self.device), y.to(self.device)

    def attacked(self, n: int) -> Mapping[str, Tensor]:
        """The first images as they are (``natural``) and under each threat: name -> (n, C, H, W).

        The attack is APGD with 15 steps on this very model, or the threat's own.
        """
        if n not in self._attacked:
            parts = list(self._attack(n))
            self._attacked[n] = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return self._attacked[n]

    def attacked_parts(self, n: int) -> Iterable[Mapping[str, Tensor]]:
        """The same in consecutive parts, without caching if they are more than :data:`KEPT`."""
        return [self.attacked(n)] if n <= KEPT else self._attack(n)

    def _attack(self, n: int) -> Iterator[dict[str, Tensor]]:
        for numbers in torch.split(torch.arange(min(n, len(self.split))), AT_A_TIME):
            ((x, y),) = self.split.batches([numbers], device=self.device)
            yield {NATURAL: x, **attack_all(self.model, x, y, self.threats)}


def subject_of_run(
    run: Run, name: str, device: torch.device, *, routing: Routing = "learned", seed: int = 0
) -> Subject:
    """A finished run, its gates replaced as :func:`rome.experts.set_routing` does.

    Raises:
        UserError: the folder holds no finished run.
    """
    config, trusted = run.config, trust.allowed()
    if not run.finished:
        raise UserError(f"{run.folder} holds no finished model (model.safetensors); train it to its end first")

    def model() -> nn.Module:
        return set_routing(load_model(run.model_file, trust_code=trusted), routing, seed=seed).to(device)

    def split() -> Split:
        try:
            return config.data.open("test")
        except UserError as error:
            raise UserError(f"{error} (if it lies elsewhere now, correct data.path in {run.config_file})") from None

    return Subject(name, device, config.threats, model, split, run)


def subject_of_model(config: Config, name: str, device: torch.device) -> Subject:
    """The model of a config that no run made (:func:`rome.evaluation.named.named_config`)."""
    trusted = trust.allowed()

    @functools.cache
    def opened() -> Opened:
        with trust.trusting(trusted):
            found = open_target(config)
        for remark in found.remarks:
            print(remark, file=sys.stderr)
        return found

    return Subject(name, device, config.threats, lambda: opened().model.to(device), lambda: opened().split)


def open_named(config: Config, device: str | None = None) -> Subject:
    """That model under its own name, built at once, so that a mistake is reported before anything is made.

    Raises:
        UserError: no such model, data or device, or they do not fit each other.
    """
    subject = subject_of_model(config, config.name, pick_device(device or "auto"))
    _ = subject.model
    return subject


def open_subjects(folders: Sequence[Path], device: str | None = None) -> list[Subject]:
    """The runs in these folders, with names that tell them apart.

    Raises:
        UserError: no folder, one that holds no finished run, or no such device.
    """
    folders = distinct(folders)
    runs, where = [Run(folder) for folder in folders], pick_device(device or "auto")
    names = names_of([run.config.name for run in runs], folders)
    return [subject_of_run(run, name, where) for run, name in zip(runs, names, strict=True)]


def trained(subjects: Sequence[Subject]) -> tuple[list[Subject], dict[str, str]]:
    """The runs among them, and why the others are left out of a figure of training.

    Raises:
        UserError: there is no run.
    """
    reason = "is a model without a run: it has no log, no config and no evaluation"
    runs = [subject for subject in subjects if subject.run is not None]
    others = [subject.name for subject in subjects if subject.run is None]
    if not runs:
        raise UserError("; ".join(f"{name} {reason}" for name in others))
    return runs, dict.fromkeys(others, f"it {reason}")


def distinct(folders: Sequence[str | Path]) -> list[Path]:
    """These folders, each once; for a folder of runs and evaluations those inside.

    Raises:
        UserError: there is none.
    """
    if not folders:
        raise UserError("name at least one run's folder")
    places = [place for folder in folders for place in _inside(Path(folder)) or [Path(folder)]]
    return list({place.resolve(): place for place in places}.values())


def _inside(folder: Path) -> list[Path]:
    """The folder if it is that of a run or of an evaluation, else all such folders inside."""
    if any((folder / name).is_file() for name in (Run(folder).config_file.name, SETTINGS)):
        return [folder]
    below = sorted(each for each in folder.iterdir() if each.is_dir()) if folder.is_dir() else ()
    return [place for each in below for place in _inside(each)]


def names_of(own: Sequence[str], folders: Sequence[Path]) -> list[str]:
    """Names for what lies in these folders, distinct if possible.

    Their own names, with the folder's where there is none; where two are equal, the folders' names, or their paths.
    """
    last = [folder.resolve().name for folder in folders]
    choices = [[a or b for a, b in zip(own, last, strict=True)], last, [str(folder) for folder in folders]]
    return next((names for names in choices if len(set(names)) == len(names)), choices[-1])


def short(layer: str) -> str:
    """A layer's name without the prefix of all: ``blocks.11.attn.proj``; MORE's is the whole model."""
    return "the whole model" if layer == "backbone" else layer.removeprefix("backbone.")


def attack_all(
    model: nn.Module, x: Tensor, y: Tensor, threats: Mapping[str, Threat], attack: Attack | None = None
) -> dict[str, Tensor]:
    """Every image under every threat: name -> (n, C, H, W); all threats of a batch are attacked together.

    Args:
        attack: APGD with 15 steps by default; threats that bring an attack are searched by that one.
    """
    attack, parts = attack or APGD(steps=STEPS), []
    for images, labels in zip(torch.split(x, AT_A_TIME), torch.split(y, AT_A_TIME), strict=True):
        mixture = PerExample.repeated(threats.values(), len(images))
        found = attack(model, images.repeat(len(threats), 1, 1, 1), labels.repeat(len(threats)), mixture)
        parts.append(found.view(len(threats), len(images), *found.shape[1:]))
    return dict(zip(threats, torch.cat(parts, dim=1), strict=True))


def over_groups(groups: Mapping[str, Tensor], read: Callable[[Tensor], Sequence[Tensor]]) -> list[np.ndarray]:
    """What ``read`` says of every batch of images, (B, ...) each, put together: (G, n, ...) float32 for G groups of n
    images."""
    found = []
    for images in groups.values():
        batches = [read(batch) for batch in torch.split(images, AT_A_TIME)]
        found.append([torch.cat(parts).float().cpu().numpy() for parts in zip(*batches, strict=True)])
    return [np.stack(each) for each in zip(*found, strict=True)]
