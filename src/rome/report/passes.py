"""Number of forward and backward passes in training and evaluation, and hours of training if a rate was measured."""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from rome.attacks import Attack
from rome.core.randomness import unchanged_states
from rome.experts import LowRank
from rome.experts.base import Layerwise
from rome.models import create_model
from rome.report.cost import macs, updates
from rome.report.memory import architecture
from rome.runs.config import Config, load
from rome.runs.experiments import files, path_of
from rome.threats import Threat

SIDE = 32
"""Side in pixels of the images on which passes are counted; the number of passes does not depend on it."""
FEW = 10
"""Number of attack steps with which passes are counted."""
RATES = {"base": (211, 250), "small": (99, 138), "tiny": (39, 62)}
"""TFLOP/s of attack steps (forward and input gradient) in bf16 as CUDA graphs on one NVIDIA H200 for ViTs with 65
tokens: least and largest over batches of 64 and 192, with and without low-rank experts (docs/results.md)."""

RATES_ARE_FOR = (
    "seconds on one H200: at the rates measured in bf16 for attack steps of ViTs at 32 pixels with patches of 4, not "
    "counting the time between steps; nothing was measured for other models, for fp32 or for evaluations"
)


@dataclass
class Passes:
    """Numbers of passes per image."""

    forward: float = 0
    backward: float = 0
    """Backward passes for the image's gradient alone, as in attacks: as much arithmetic as a forward pass."""
    whole: float = 0
    """Backward passes for the gradients of the weights as well, as in training: twice as much."""

    @property
    def work(self) -> float:
        """Arithmetic of all passes, in units of a forward pass."""
        return self.forward + self.backward + 2 * self.whole

    def add(self, other: Passes, times: float = 1) -> None:
        for name in ("forward", "backward", "whole"):
            setattr(self, name, getattr(self, name) + times * getattr(other, name))


@contextmanager
def _count_passes(model: nn.Module) -> Iterator[Passes]:
    """Count the passes of a model inside the context, summed over images."""
    total = Passes()

    def forward(module: nn.Module, inputs: tuple[Tensor, ...], answer: Tensor) -> None:
        images, training = len(inputs[0]), module.training
        total.forward += images

        def backward(_: Tensor) -> None:
            total.add(Passes(whole=1) if training else Passes(backward=1), images)

        if answer.requires_grad:
            answer.register_hook(backward)  # type: ignore[no-untyped-call]

    with model.register_forward_hook(forward):
        yield total


def of_update(config: Config) -> Passes | None:
    """Count the passes per example of an update, including its attack, averaged over the stages of the method. They are
    counted on a small transformer in place of the model; None if the method does not run on it."""
    try:
        batch = 2 * len(config.method.training_threats(config.threats, config.attack))
        same = {"accumulate": 1, "device": "cpu", "precision": "fp32", "attack_batch_size": None}
        few = config.model_copy(update={"batch_size": batch, "activation_checkpointing": False, **same})
        args: dict[str, Any] = {"embed_dim": 16, "depth": 2, "num_heads": 2}
        model: nn.Module = create_model("vit_tiny_patch16_224", num_classes=10, img_size=SIDE, patch_size=8, **args)
        if isinstance(config.experts, Layerwise):
            model = LowRank(experts=config.experts.experts, rank=1, gate=config.experts.gate).inject(model)
        elif config.experts is not None:
            model = config.experts.inject(model)
        found = Passes()
        for work, share in updates(few, model, (3, SIDE, SIDE), 10, torch.device("cpu")):
            with _count_passes(model) as seen:
                work()
            found.add(seen, share / batch)
    except Exception:  # a user's own method, attack or experts that need a different model
        return None
    if config.activation_checkpointing:
        found.forward += found.whole
    return found


def of_evaluation(config: Config, classes: int) -> Passes | None:
    """Count the passes for an image that withstands every attack of the evaluation's suite. No image takes more, and
    one that is misclassified from the start takes a single pass. None if an attack needs a network that is not here."""
    found = Passes(forward=1)
    try:
        threats = {threat.name: threat for threat in config.threats}
        for case in config.evaluation.suite.cases(threats, classes):
            for attack in case.attacks:
                found.add(_of_attack(attack.model_dump_json(), case.threat.model_dump_json(), classes))
    except Exception:  # missing files, or a user's own attacks that need a different model
        return None
    return found


class _Certain(nn.Module):
    """A classifier that always answers class 0, with a gradient too small to change that."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.weight = 1e-4 * torch.rand(3 * SIDE * SIDE, classes)
        self.lead = 5 * torch.eye(classes)[0]

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight + self.lead


@functools.cache
def _of_attack(attack: str, threat: str, classes: int) -> Passes:
    """Count the passes of one attack; attack and threat are JSON. Few steps are run and the count is extrapolated,
    since all steps take the same number of passes."""
    searcher = TypeAdapter(Attack).validate_json(attack)
    space = TypeAdapter(Threat).validate_json(threat)
    name = next((each for each in ("iterations", "queries", "steps") if hasattr(searcher, each)), "")
    steps = getattr(searcher, name, 0)
    if not isinstance(steps, int) or steps <= 2 * FEW:
        return _run(searcher, space, classes)
    total, twice = (_run(searcher.model_copy(update={name: n}), space, classes) for n in (FEW, 2 * FEW))
    twice.add(total, -1)
    total.add(twice, (steps - FEW) / FEW)
    return total


def _run(attack: Attack, threat: Threat, classes: int) -> Passes:
    with unchanged_states(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pyautoattack's
        torch.manual_seed(0)
        model = _Certain(classes).eval()
        with _count_passes(model) as seen:
            attack(model, torch.rand(1, 3, SIDE, SIDE), torch.zeros(1, dtype=torch.int64), threat)
    return seen


def hours(config: Config, operations: float) -> tuple[float, float] | None:
    """Estimate the least and most hours that this many floating-point operations of training take on one H200, from
    measured :data:`RATES`; None for models and precisions without measurements."""
    size = re.match(r"(?:vit|deit)_(base|small|tiny)_patch\d+_", config.model.name)
    tokens = (config.model.img_size or 0) / (config.model.patch_size or 1) == 8
    if size is None or not tokens or config.precision != "bf16" or config.model.args:
        return None
    if config.experts is not None and config.experts.kind != "low-rank":
        return None
    low, high = RATES[size[1]]
    return operations / (high * 1e12 * 3600), operations / (low * 1e12 * 3600)


def priced(pattern: str = "*") -> Iterator[tuple[str, ...]]:
    """Yield the cost of each experiment that matches a pattern: path, parameters, arithmetic of an update, seconds of
    an update if a rate was measured, and arithmetic of the whole evaluation. Neither data nor weights are needed."""
    for file in files(pattern):
        config = load(file)
        sorts_tokens = getattr(config.experts, "top", None) is not None  # which needs their values
        with torch.device("cpu" if sorts_tokens else "meta"):
            model, shape, classes = architecture(config)
        each, size = 2 * macs(model.eval(), shape), sum(parameter.numel() for parameter in model.parameters())
        update, evaluation, images = of_update(config), of_evaluation(config, classes), config.evaluation.n
        operations = None if update is None else each * update.work * config.batch_size
        known = None if operations is None else hours(config, operations)
        yield (
            path_of(file),
            f"{size / 1e6:.4g} M",
            "not counted" if operations is None else _flop(operations),
            "" if known is None else f"{known[0] * 3600:.2g}\N{EN DASH}{known[1] * 3600:.2g} s",
            "not counted"
            if evaluation is None
            else _flop(each * evaluation.work * (images or 1)) + ("" if images else " per image"),
        )


def _flop(operations: float) -> str:
    """Format a number of operations: ``43.2 TFLOP``."""
    units = (("E", 1e18), ("P", 1e15), ("T", 1e12))
    unit, size = next(((unit, size) for unit, size in units if operations >= size), ("G", 1e9))
    return f"{operations / size:.3g} {unit}FLOP"
