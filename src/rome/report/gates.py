"""Where a model's gates send natural images and each threat's (the idea of the paper's Fig. 3), in numbers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from rome.attacks import Attack
from rome.core.errors import UserError
from rome.experts import record_gates
from rome.report.subject import AT_A_TIME, NATURAL, attack_all
from rome.threats import Threat

NEARLY_IDENTICAL, SIMILAR = 0.02, 0.1
"""Distances between mean gates below which routing is called nearly identical, or similar."""


@dataclass(frozen=True, eq=False)
class GateSample:
    """Gates of one model on the same n images, natural and under each threat: G groups, L layers, K experts."""

    groups: tuple[str, ...]
    """Names; the first is ``natural``."""
    layers: tuple[str, ...]
    weights: np.ndarray
    """(G, L, n, K): gate weights g, averaged over tokens."""
    local: np.ndarray
    """(G, L, n, K): local gates u, averaged over tokens; the mixed gates where there are none."""
    whole: np.ndarray
    """(G, L, n, K): global gates v; the mixed gates averaged over tokens where there are none."""
    entropy: np.ndarray
    """(G, L, n): entropy of g at each token, averaged over tokens, divided by log K: 1 is all experts alike."""

    @property
    def n(self) -> int:
        return int(self.weights.shape[2])

    @property
    def experts(self) -> int:
        return int(self.weights.shape[3])


_ARRAYS = ("weights", "local", "whole", "entropy")


class Pair(NamedTuple):
    """How far apart two groups are routed. ``final`` is the last layer, ``mean`` the mean over layers."""

    a: str
    b: str
    local_final: float
    local_mean: float
    whole_final: float
    whole_mean: float
    top_differs: float
    """Share of the images whose expert with the largest token-averaged weight differs, in the last layer."""


def collect(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threats: Mapping[str, Threat],
    *,
    attack: Attack | None = None,
    batch_size: int = AT_A_TIME,
) -> GateSample:
    """Attack the images under every threat and record the gates of all of them.

    Args:
        model: with experts, in evaluation mode.
        x, y: images (n, C, H, W) in [0, 1] and labels (n,), on the model's device.
        threats: by the names to use.
        attack: APGD with 15 steps if not given; threats that bring an attack are searched by that one.
        batch_size: images at a time; each is attacked under all threats at once.
    """
    attacked = attack_all(model, x, y, threats, attack=attack, batch_size=batch_size)
    return read(model, {NATURAL: x, **attacked}, batch_size=batch_size)


def read(model: nn.Module, groups: Mapping[str, Tensor], *, batch_size: int = AT_A_TIME) -> GateSample:
    """Record the gates of groups of images: name -> (n, C, H, W), the same n images in each.

    Raises:
        UserError: no experts, or layers with different numbers of them.
    """
    layers: tuple[str, ...] = ()
    parts: list[list[tuple[np.ndarray, ...]]] = []
    for images in groups.values():
        parts.append([])
        for batch in torch.split(images, batch_size):
            with torch.no_grad(), record_gates(model) as recorder:
                model(batch)
            gates = recorder.gates
            layers = tuple(gates)
            counts = {each.weights.shape[-1] for each in gates.values()}
            if len(counts) > 1:
                raise UserError(
                    f"layers have {' and '.join(map(str, sorted(counts)))} experts, so their gates do not compare"
                )
            mixed = [each.weights.mean(dim=1) for each in gates.values()]
            parts[-1].append(
                (
                    _stack(mixed),
                    _stack([_or(each.local, each.weights).mean(dim=1) for each in gates.values()]),
                    _stack([_or(each.global_, mean) for each, mean in zip(gates.values(), mixed, strict=True)]),
                    _stack([relative_entropy(each.weights).mean(dim=1) for each in gates.values()]),
                )
            )
    joined = [np.stack([np.concatenate([piece[i] for piece in part], axis=1) for part in parts]) for i in range(4)]
    return GateSample(tuple(groups), layers, *joined)


def join(parts: Sequence[GateSample]) -> GateSample:
    """The gates of one model on images that were read in parts, one part after the other."""
    arrays = [np.concatenate([getattr(part, name) for part in parts], axis=2) for name in _ARRAYS]
    return GateSample(parts[0].groups, parts[0].layers, *arrays)


def relative_entropy(weights: Tensor) -> Tensor:
    """-sum_k g_k log g_k / log K over the last dimension: 0 for one expert alone, 1 for all alike (and for K = 1)."""
    if weights.shape[-1] == 1:
        return torch.ones_like(weights[..., 0])
    return torch.special.entr(weights.float()).sum(dim=-1) / math.log(weights.shape[-1])


def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Euclidean distance between the mean gates of two groups, (L, n, K) each -> (L,). At most sqrt(2)."""
    return np.asarray(np.linalg.norm(a.mean(axis=1) - b.mean(axis=1), axis=-1))


def top_differs(a: np.ndarray, b: np.ndarray) -> float:
    """Share of the images whose largest gate is another one in ``b`` than in ``a``, (n, K) each."""
    return float((a.argmax(axis=-1) != b.argmax(axis=-1)).mean())


def pairs(sample: GateSample) -> list[Pair]:
    """Every two groups."""
    found = []
    for i, j in itertools.combinations(range(len(sample.groups)), 2):
        local, whole = distances(sample.local[i], sample.local[j]), distances(sample.whole[i], sample.whole[j])
        found.append(
            Pair(
                sample.groups[i],
                sample.groups[j],
                float(local[-1]),
                float(local.mean()),
                float(whole[-1]),
                float(whole.mean()),
                top_differs(sample.weights[i, -1], sample.weights[j, -1]),
            )
        )
    return found


def summary(sample: GateSample) -> str:
    """What the numbers show, in words that follow from them."""
    every = pairs(sample)
    among = [pair for pair in every if NATURAL not in pair[:2]]
    count = len(sample.layers)
    layers = f"averaged over {count} adapted layers" if count > 1 else "in the one layer that has gates"
    text = []
    if among:
        local, whole = max(pair.local_mean for pair in among), max(pair.whole_mean for pair in among)
        text.append(
            f"The mean gates of {_joined(sample.groups[1:])} lie at most {local:.3f} (local) and {whole:.3f} (global) "
            f"apart, {layers}, where 1.414 would be entirely different experts: "
            f"the threats are routed {_called(max(local, whole))}."
        )
        differs = max(pair.top_differs for pair in among)
        text.append(
            f"Between two threats the top expert of the last layer changes for at most {differs:.1%} of images."
        )
    natural = [pair for pair in every if NATURAL in pair[:2]]
    if natural:
        apart = max(max(pair.local_mean, pair.whole_mean) for pair in natural)
        text.append(f"Natural images are at most {apart:.3f} away from a threat's, so {_called(apart)} routed.")
    if sample.experts > 1:
        entropy, largest = sample.entropy.mean(), sample.weights.mean(axis=(0, 2)).max(axis=-1).mean()
        spread = "nearly evenly" if entropy > 0.95 else "mostly to one expert" if largest > 0.8 else "unevenly"
        text.append(
            f"Gate entropy is {entropy:.2f} of its maximum and the busiest expert of a layer gets {largest:.0%} on "
            f"average (an equal share is {1 / sample.experts:.0%}): weight is spread {spread}."
        )
    return " ".join(text)


def _called(distance: float) -> str:
    if distance < NEARLY_IDENTICAL:
        return "nearly identically"
    return "similarly" if distance < SIMILAR else "differently"


def _joined(names: tuple[str, ...]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _or(part: Tensor | None, instead: Tensor) -> Tensor:
    return instead if part is None else part


def _stack(parts: list[Tensor]) -> np.ndarray:
    return torch.stack(parts).float().cpu().numpy()
