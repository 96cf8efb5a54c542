"""A model opened to be looked at, of a run or given: its test images, and what each threat makes of them."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from rome.attacks import APGD, Attack
from rome.core import trust
from rome.core.device import pick_device
from rome.core.errors import UserError
from rome.data.base import Split
from rome.data.memory import TensorSplit
from rome.evaluation.given import Given
from rome.experts import Routing, set_routing
from rome.models import load_model
from rome.models.exported import Named
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
    """A finished run. Model, data and attacked images are loaded or made when first asked for, once each.

    Args:
        run: its folder, with ``model.safetensors``.
        name: what pictures call it.
        device: of the model and the images.
        routing: gate weights in place of the learned ones, of the given seed; see :func:`rome.experts.set_routing`.

    Raises:
        UserError: the folder holds no finished run.
    """

    def __init__(
        self, run: Run, name: str, device: torch.device, *, routing: Routing = "learned", seed: int = 0
    ) -> None:
        self.run, self.name, self.device = run, name, device
        self.routing: Routing = routing
        self.seed = seed
        self.config: Config = run.config
        self._trusted = trust.allowed()
        if not run.finished:
            raise UserError(f"{run.folder} holds no finished model (model.safetensors); train it to its end first")
        self._attacked: dict[int, dict[str, Tensor]] = {}

    @cached_property
    def model(self) -> nn.Module:
        """The classifier, in evaluation mode."""
        model = load_model(self.run.model_file, trust_code=self._trusted)
        return set_routing(model, self.routing, seed=self.seed).to(self.device)

    @cached_property
    def split(self) -> Split:
        """The test examples.

        Raises:
            UserError: they are not where the run's config says.
        """
        try:
            return self.config.data.open("test")
        except UserError as error:
            raise UserError(
                f"{error} (if it lies elsewhere now, correct data.path in {self.run.config_file})"
            ) from None

    @property
    def threats(self) -> Mapping[str, Threat]:
        """What the run was trained on, by name."""
        return MappingProxyType({threat.name: threat for threat in self.config.threats})

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


class GivenModel(Subject):
    """A classifier that no run made, to be looked at as runs are, but for what asks about its training or evaluation.

    Args:
        model: images (B, C, H, W) in [0, 1] to logits, of any architecture; its mode becomes evaluation.
        name: what pictures call it.
        x: images (n, C, H, W) in [0, 1], on the model's device.
        y: their labels, int64 (n,).
        threats: by name.
    """

    def __init__(self, model: nn.Module, name: str, x: Tensor, y: Tensor, threats: Mapping[str, Threat]) -> None:
        self.name, self.device, self.model, self.split = name, x.device, model.eval(), TensorSplit(x, y)
        self._threats, self._attacked = dict(threats), {}

    @property
    def threats(self) -> Mapping[str, Threat]:
        return MappingProxyType(self._threats)

    def __getattr__(self, name: str) -> Any:
        if name in ("run", "config"):
            raise UserError(f"{self.name} {WITHOUT_RUN}")
        raise AttributeError(name)


class NamedModel(GivenModel):
    """A given model that a name or a file stands for; it and its data are opened when first asked for.

    Args:
        given: how it is named.
        name: what pictures call it.
        device: of the model and the images.
    """

    def __init__(self, given: Given, name: str, device: torch.device) -> None:
        self.given, self.name, self.device = given, name, device
        self._attacked = {}

    @cached_property
    def built(self) -> Named:
        """The classifier, in evaluation mode, and what there is to say of it.

        Raises:
            UserError: it cannot be built.
        """
        return self.given.build(self.split, self.device, batch_size=AT_A_TIME)

    @cached_property
    def model(self) -> nn.Module:
        return self.built.model

    @cached_property
    def split(self) -> Split:
        """The test examples."""
        return self.given.source().open("test")

    @property
    def threats(self) -> Mapping[str, Threat]:
        return MappingProxyType(self.given.threats())


def open_given(given: Given, device: str | None = None) -> NamedModel:
    """That model under its own name, built at once, so that what is wrong with it is told before anything is made.

    Raises:
        UserError: no such model, data or device, or they do not fit each other.
    """
    subject = NamedModel(given, given.name, pick_device(device or "auto"))
    for remark in subject.built.remarks:
        print(remark, file=sys.stderr)
    return subject


def trained(subjects: Sequence[Subject]) -> tuple[list[Subject], dict[str, str]]:
    """The runs among them, and why the others are left out where a figure is of training.

    Raises:
        UserError: there is no run.
    """
    given = {subject.name: subject for subject in subjects if isinstance(subject, GivenModel)}
    runs = [subject for subject in subjects if not isinstance(subject, GivenModel)]
    if not runs:
        raise UserError("; ".join(f"{name} {WITHOUT_RUN}" for name in given))
    return runs, dict.fromkeys(given, f"it {WITHOUT_RUN}")


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
