"""A model opened for inspection, from a run or from anywhere else, with its test images, clean and attacked."""

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
from rome.attacks.suites import name_threats
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
"""Steps of APGD, the attack behind pictures and routing numbers."""
BATCH_SIZE = 64
MAX_CACHED = 1024
"""Up to this many attacked images are cached; a larger number is attacked anew each time."""


class Subject:
    """A model with its test images and threats. Model, data and attacked images are loaded or made on first use.

    Args:
        name: name shown in pictures.
        device: device of the model and the images.
        threats: threats, or a mapping from the names shown in pictures to threats.
        model: function that builds the classifier.
        split: function that opens the test examples.
        run: the run that trained the model, if any.
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
        self.threats = name_threats(threats)
        self._model, self._split = model, split
        self._attacked: dict[int, dict[str, Tensor]] = {}

    @classmethod
    def of_model(
        cls, model: nn.Module, name: str, x: Tensor, y: Tensor, threats: Iterable[Threat] | Mapping[str, Threat]
    ) -> Subject:
        """Wrap a classifier in memory, for figures that need neither its training nor its evaluation.

        Args:
            model: classifier of any architecture, from images (B, C, H, W) in [0, 1] to logits; put into evaluation
                mode.
            name: name shown in pictures.
            x: images (n, C, H, W) in [0, 1], on the model's device.
            y: their labels, int64 (n,).
            threats: threats, or a mapping from the names shown in pictures to threats.
        """
        model = model.eval()
        return cls(name, x.device, threats, lambda: model, lambda: TensorSplit(x, y))

    @property
    def config(self) -> Config:
        """The run's config."""
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
        """Return the first ``n`` test images (n, C, H, W) in [0, 1] and their labels (n,); all if there are fewer."""
        x, y = self.split.first(min(n, len(self.split)))
        return x.to(self.device), y.to(self.device)

    def attacked(self, n: int) -> Mapping[str, Tensor]:
        """Return the first ``n`` images, clean (``natural``) and attacked under each threat: name -> (n, C, H, W).

        The attack is APGD with 15 steps on this very model, or the one that the threat brings.
        """
        if n not in self._attacked:
            parts = list(self._attack(n))
            self._attacked[n] = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return self._attacked[n]

    def attacked_parts(self, n: int) -> Iterable[Mapping[str, Tensor]]:
        """Return the images of :meth:`attacked` in consecutive parts; more than :data:`KEPT` are not cached."""
        return [self.attacked(n)] if n <= MAX_CACHED else self._attack(n)

    def _attack(self, n: int) -> Iterator[dict[str, Tensor]]:
        for numbers in torch.split(torch.arange(min(n, len(self.split))), BATCH_SIZE):
            ((x, y),) = self.split.batches([numbers], device=self.device)
            yield {NATURAL: x, **attack_all(self.model, x, y, self.threats)}


def subject_of_run(
    run: Run, name: str, device: torch.device, *, routing: Routing = "learned", seed: int = 0
) -> Subject:
    """Open a finished run, with its gates replaced by :func:`rome.experts.set_routing`.

    Raises:
        UserError: the folder contains no finished run.
    """
    config, trusted = run.config, trust.allowed()
    if not run.finished:
        raise UserError(f"{run.folder} holds no finished model (model.safetensors); finish its training first")

    def model() -> nn.Module:
        return set_routing(load_model(run.model_file, trust_code=trusted), routing, seed=seed).to(device)

    def split() -> Split:
        try:
            return config.data.open("test")
        except UserError as error:
            raise UserError(f"{error} (if the data has moved, correct data.path in {run.config_file})") from None

    return Subject(name, device, config.threats, model, split, run)


def subject_of_model(config: Config, name: str, device: torch.device) -> Subject:
    """Open the model of a config that belongs to no run (:func:`rome.evaluation.named.named_config`)."""
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
    """Open such a model under its config's name and build it at once, so that mistakes are reported before any work.

    Raises:
        UserError: there is no such model, data or device, or they do not fit each other.
    """
    subject = subject_of_model(config, config.name, pick_device(device or "auto"))
    _ = subject.model
    return subject


def open_subjects(folders: Sequence[Path], device: str | None = None) -> list[Subject]:
    """Open the runs in these folders, under names that tell them apart.

    Raises:
        UserError: no folder is given, one contains no finished run, or there is no such device.
    """
    folders = distinct(folders)
    runs, where = [Run(folder) for folder in folders], pick_device(device or "auto")
    names = names_of([run.config.name for run in runs], folders)
    return [subject_of_run(run, name, where) for run, name in zip(runs, names, strict=True)]


def trained(subjects: Sequence[Subject]) -> tuple[list[Subject], dict[str, str]]:
    """Return the subjects that are runs, and for each other one the reason why a figure about training leaves it out.

    Raises:
        UserError: none of them is a run.
    """
    reason = "is a model without a run: it has no log, no config and no evaluation"
    runs = [subject for subject in subjects if subject.run is not None]
    others = [subject.name for subject in subjects if subject.run is None]
    if not runs:
        raise UserError("; ".join(f"{name} {reason}" for name in others))
    return runs, dict.fromkeys(others, f"it {reason}")


def distinct(folders: Sequence[str | Path]) -> list[Path]:
    """Return the folders without duplicates, each folder of runs and evaluations replaced by those inside it.

    Raises:
        UserError: no folder is given.
    """
    if not folders:
        raise UserError("name at least one run's folder")
    places = [place for folder in folders for place in _inside(Path(folder)) or [Path(folder)]]
    return list({place.resolve(): place for place in places}.values())


def _inside(folder: Path) -> list[Path]:
    """Return the folder itself if it is a run or an evaluation, otherwise all runs and evaluations inside it."""
    if any((folder / name).is_file() for name in (Run(folder).config_file.name, SETTINGS)):
        return [folder]
    below = sorted(each for each in folder.iterdir() if each.is_dir()) if folder.is_dir() else ()
    return [place for each in below for place in _inside(each)]


def names_of(own: Sequence[str], folders: Sequence[Path]) -> list[str]:
    """Choose names for the contents of these folders, distinct if possible.

    Their own names, or a folder's name where there is none; if two of these are equal, the folders' names; if two of
    those are equal as well, the folders' paths.
    """
    last = [folder.resolve().name for folder in folders]
    choices = [[a or b for a, b in zip(own, last, strict=True)], last, [str(folder) for folder in folders]]
    return next((names for names in choices if len(set(names)) == len(names)), choices[-1])


def short(layer: str) -> str:
    """Shorten a layer's name by the prefix that all have (``blocks.11.attn.proj``); MORE adapts the whole model."""
    return "the whole model" if layer == "backbone" else layer.removeprefix("backbone.")


def attack_all(
    model: nn.Module, x: Tensor, y: Tensor, threats: Mapping[str, Threat], attack: Attack | None = None
) -> dict[str, Tensor]:
    """Attack every image under every threat: name -> (n, C, H, W). All threats of a batch are attacked together.

    Args:
        attack: APGD with 15 steps by default; threats that bring their own attack are searched by that one.
    """
    attack, parts = attack or APGD(steps=STEPS), []
    for images, labels in zip(torch.split(x, BATCH_SIZE), torch.split(y, BATCH_SIZE), strict=True):
        mixture = PerExample.repeated(threats.values(), len(images))
        found = attack(model, images.repeat(len(threats), 1, 1, 1), labels.repeat(len(threats)), mixture)
        parts.append(found.view(len(threats), len(images), *found.shape[1:]))
    return dict(zip(threats, torch.cat(parts, dim=1), strict=True))


def over_groups(groups: Mapping[str, Tensor], read: Callable[[Tensor], Sequence[Tensor]]) -> list[np.ndarray]:
    """Apply ``read`` to every batch of every group's images and join its results, (B, ...) each, to arrays
    (G, n, ...) float32 for G groups of n images."""
    found = []
    for images in groups.values():
        batches = [read(batch) for batch in torch.split(images, BATCH_SIZE)]
        found.append([torch.cat(parts).float().cpu().numpy() for parts in zip(*batches, strict=True)])
    return [np.stack(each) for each in zip(*found, strict=True)]
