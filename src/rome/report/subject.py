"""A model opened to be looked at: its test images, and what each threat makes of them."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor, nn

from rome.attacks import APGD, Attack
from rome.core import trust
from rome.core.device import pick_device
from rome.core.errors import UserError
from rome.data.base import Split
from rome.data.memory import TensorSplit
from rome.evaluation.run import Opened, open_target
from rome.experts import Routing, set_routing
from rome.runs.config import Config
from rome.runs.folder import Run
from rome.threats import PerExample, Threat

NATURAL = "natural"
STEPS = 15
"""Of APGD, the attack that pictures and routing numbers are made with."""
AT_A_TIME = 64
KEPT = 1024
"""Images whose attacked versions are kept for the next picture; of more, they are made again."""
WITHOUT_RUN = "is a model without a run: it has no log, no config and no evaluation"


def short(layer: str) -> str:
    """A layer's name without what all names begin with: ``blocks.11.attn.proj``; MORE's is the whole model."""
    return "the whole model" if layer == "backbone" else layer.removeprefix("backbone.")


class Subject:
    """A model to be looked at. Model, data and attacked images are loaded or made when first needed, once each.

    Args:
        source: a finished run, or the config of a model that no run made (:func:`rome.evaluation.named.named_config`).
        name: what pictures call it.
        device: of the model and the images.
        routing: gate weights in place of the learned ones, of the given seed; see :func:`rome.experts.set_routing`.

    Raises:
        UserError: the run is not finished.
    """

    def __init__(
        self, source: Run | Config, name: str, device: torch.device, *, routing: Routing = "learned", seed: int = 0
    ) -> None:
        self.source: Run | Config | None = source
        self.name, self.device = name, device
        self.routing: Routing = routing
        self.seed = seed
        self._trusted = trust.allowed()
        if isinstance(source, Run) and not source.finished:
            raise UserError(f"{source.folder} holds no finished model (model.safetensors); train it to its end first")
        self._attacked: dict[int, dict[str, Tensor]] = {}

    @classmethod
    def of_model(cls, model: nn.Module, name: str, x: Tensor, y: Tensor, threats: Mapping[str, Threat]) -> Subject:
        """A classifier that is there already, of any architecture; its mode becomes evaluation.

        Args:
            model: images (B, C, H, W) in [0, 1] to logits.
            name: what pictures call it.
            x: images (n, C, H, W) in [0, 1], on the model's device.
            y: their labels, int64 (n,).
            threats: by name.
        """
        subject = cls.__new__(cls)
        subject.source, subject.name, subject.device, subject._attacked = None, name, x.device, {}
        subject.__dict__.update(model=model.eval(), split=TensorSplit(x, y), threats=MappingProxyType(dict(threats)))
        return subject

    @property
    def run(self) -> Run:
        """Raise UserError where no run made the model."""
        if not isinstance(self.source, Run):
            raise UserError(f"{self.name} {WITHOUT_RUN}")
        return self.source

    @property
    def config(self) -> Config:
        """The run's."""
        return self.run.config

    @cached_property
    def _opened(self) -> Opened:
        """The model and the test examples, those of a run where its config says."""
        source = self.source if isinstance(self.source, Config) else self.run.model_file
        with trust.trusting(self._trusted):
            return open_target(source)

    @cached_property
    def model(self) -> nn.Module:
        """The classifier, in evaluation mode."""
        return set_routing(self._opened.model, self.routing, seed=self.seed).to(self.device)

    @cached_property
    def split(self) -> Split:
        """The test examples."""
        return self._opened.split

    @cached_property
    def threats(self) -> Mapping[str, Threat]:
        """What the run was trained on, or the model is to be attacked under, by name."""
        config = self.source if isinstance(self.source, Config) else self.config
        return MappingProxyType({threat.name: threat for threat in config.threats})

    def images(self, n: int) -> tuple[Tensor, Tensor]:
        """The first ``n`` test images (n, C, H, W) in [0, 1] and their labels (n,), fewer where the set is smaller."""
        x, y = self.split.first(min(n, len(self.split)))
        return x.to(self.device), y.to(self.device)

    def attacked(self, n: int) -> Mapping[str, Tensor]:
        """Those images as they are (``natural``) and under each threat: name -> (n, C, H, W).

        The attack is APGD with 15 steps on this very model, or the threat's own.
        """
        if n not in self._attacked:
            parts = list(self._attack(n))
            self._attacked[n] = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return MappingProxyType(self._attacked[n])

    def attacked_parts(self, n: int) -> Iterator[Mapping[str, Tensor]]:
        """The same in parts that follow each other; of more than :data:`KEPT` images none is kept."""
        if n <= KEPT or n in self._attacked:
            yield self.attacked(n)
        else:
            yield from self._attack(n)

    def _attack(self, n: int) -> Iterator[dict[str, Tensor]]:
        for numbers in torch.split(torch.arange(min(n, len(self.split))), AT_A_TIME):
            ((x, y),) = self.split.batches([numbers], device=self.device)
            yield {NATURAL: x, **attack_all(self.model, x, y, self.threats)}


def open_named(config: Config, device: str | None = None) -> Subject:
    """The model of a config that no run made, built at once, so that mistakes end before anything is made.

    Raises:
        UserError: no such model, data or device, or they do not fit each other.
    """
    subject = Subject(config, config.name, pick_device(device or "auto"))
    for remark in subject._opened.remarks:
        print(remark, file=sys.stderr)
    return subject


def trained(subjects: Sequence[Subject]) -> tuple[list[Subject], dict[str, str]]:
    """The runs among them, and why the others are left out where a figure is of training.

    Raises:
        UserError: there is no run.
    """
    runs = [subject for subject in subjects if isinstance(subject.source, Run)]
    others = [subject.name for subject in subjects if not isinstance(subject.source, Run)]
    if not runs:
        raise UserError("; ".join(f"{name} {WITHOUT_RUN}" for name in others))
    return runs, dict.fromkeys(others, f"it {WITHOUT_RUN}")


def open_subjects(folders: Sequence[Path], device: str | None = None) -> list[Subject]:
    """The runs in these folders, with names that tell them apart.

    Raises:
        UserError: no folder, one that holds no finished run, or no such device.
    """
    folders = list({Path(folder).resolve(): Path(folder) for folder in folders}.values())
    if not folders:
        raise UserError("name at least one run's folder")
    runs = [Run(folder) for folder in folders]
    where = pick_device(device or "auto")
    names = names_of([run.config.name for run in runs], folders)
    return [Subject(run, name, where) for run, name in zip(runs, names, strict=True)]


def names_of(own: Sequence[str], folders: Sequence[Path]) -> list[str]:
    """What pictures and tables call what lies in these folders, so that names tell them apart.

    Their own names, with the folder's where there is none; where two are equal, the folders' names, or their paths.
    """
    last = [folder.resolve().name for folder in folders]
    choices = [
        [name or folder for name, folder in zip(own, last, strict=True)],
        last,
        [str(folder) for folder in folders],
    ]
    return next((names for names in choices if len(set(names)) == len(names)), choices[-1])


def attack_all(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threats: Mapping[str, Threat],
    *,
    attack: Attack | None = None,
    batch_size: int = AT_A_TIME,
) -> dict[str, Tensor]:
    """Every image under every threat: name -> (n, C, H, W); all threats of a batch are attacked together.

    Args:
        attack: APGD with 15 steps if not given; threats that bring an attack are searched by that one.
    """
    attack = attack or APGD(steps=STEPS)
    parts: list[Tensor] = []
    for images, labels in zip(torch.split(x, batch_size), torch.split(y, batch_size), strict=True):
        mixture = PerExample.repeated(threats.values(), len(images))
        found = attack(model, images.repeat(len(threats), 1, 1, 1), labels.repeat(len(threats)), mixture)
        parts.append(found.view(len(threats), len(images), *found.shape[1:]))
    return dict(zip(threats, torch.cat(parts, dim=1), strict=True))
