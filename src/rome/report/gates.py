"""Which experts a model's gates choose for clean images and under each threat, in numbers (cf. the paper's Fig. 3)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from rome.attacks import Attack
from rome.attacks.suites import name_threats
from rome.core.errors import UserError
from rome.experts import record_gates
from rome.report.subject import NATURAL, attack_all, over_groups
from rome.report.templating import sentences
from rome.threats import Threat

NEARLY_IDENTICAL, SIMILAR = 0.02, 0.1
"""Thresholds on the distance between mean gates below which routing is called nearly identical, and similar."""


class GateSample(NamedTuple):
    """Gates of one model on the same n images, clean and under each threat: G groups, L layers, K experts."""

    groups: tuple[str, ...]
    """Names of the groups; the first is ``natural``, the clean images."""
    layers: tuple[str, ...]
    weights: np.ndarray
    """(G, L, n, K): gate weights g, averaged over tokens."""
    local: np.ndarray
    """(G, L, n, K): local gates u, averaged over tokens; g if the layer has none."""
    global_: np.ndarray
    """(G, L, n, K): global gates v; g averaged over tokens if the layer has none."""
    entropy: np.ndarray
    """(G, L, n): entropy of g at each token, averaged over tokens and divided by log K; 1 for a uniform gate."""

    @property
    def n(self) -> int:
        return int(self.weights.shape[2])

    @property
    def experts(self) -> int:
        return int(self.weights.shape[3])


class Pair(NamedTuple):
    """Distances between the mean gates of two groups: ``final`` in the last layer, ``mean`` averaged over layers."""

    a: str
    b: str
    local_final: float
    local_mean: float
    whole_final: float
    whole_mean: float
    top_differs: float
    """Share of the images whose top expert, by token-averaged weight in the last layer, differs."""


def collect(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threats: Iterable[Threat] | Mapping[str, Threat],
    attack: Attack | None = None,
) -> GateSample:
    """Attack the images under every threat and record the gates on clean and attacked images.

    Args:
        model: model with experts, in evaluation mode.
        x, y: images (n, C, H, W) in [0, 1] and labels (n,), on the model's device.
        threats: threats, or a mapping from the names of their groups to threats.
        attack: APGD with 15 steps by default; threats that bring their own attack are searched by that one.
    """
    return read(model, {NATURAL: x, **attack_all(model, x, y, name_threats(threats), attack)})


def read(model: nn.Module, groups: Mapping[str, Tensor]) -> GateSample:
    """Record the gates on groups of images: name -> (n, C, H, W), the same n images in each.

    Raises:
        UserError: the model has no experts, or its layers have different numbers of experts.
    """
    layers: tuple[str, ...] = ()

    def of_batch(images: Tensor) -> list[Tensor]:
        """Arrays of a :class:`GateSample` for one batch, (B, L, ...) each."""
        nonlocal layers
        with torch.no_grad(), record_gates(model) as recorder:
            model(images)
        layers, gates = tuple(recorder.gates), list(recorder.gates.values())
        counts = sorted({each.weights.shape[-1] for each in gates})
        if len(counts) > 1:
            raise UserError(f"layers have {' and '.join(map(str, counts))} experts, so their gates cannot be compared")
        mixed = [each.weights.mean(dim=1) for each in gates]
        local = [(each.weights if each.local is None else each.local).mean(dim=1) for each in gates]
        global_ = [mean if each.global_ is None else each.global_ for each, mean in zip(gates, mixed, strict=True)]
        entropy = [relative_entropy(each.weights).mean(dim=1) for each in gates]
        return [torch.stack(parts, dim=1) for parts in (mixed, local, global_, entropy)]

    arrays = [np.ascontiguousarray(each.swapaxes(1, 2)) for each in over_groups(groups, of_batch)]
    return GateSample(tuple(groups), layers, *arrays)


def join(parts: Sequence[GateSample]) -> GateSample:
    """Concatenate the gates of one model on consecutive parts of the images."""
    arrays = [np.concatenate(each, axis=2) for each in zip(*(part[2:] for part in parts), strict=True)]
    return GateSample(parts[0].groups, parts[0].layers, *arrays)


def distinct_experts(means: np.ndarray, most: int) -> list[int]:
    """Indices of the ``most`` experts whose mean weights, (G, K), differ most between groups, in ascending order."""
    spread = means.max(axis=0) - means.min(axis=0)
    return sorted(sorted(range(len(spread)), key=lambda k: -spread[k])[:most])


def relative_entropy(weights: Tensor) -> Tensor:
    """-sum_k g_k log g_k / log K over the last dimension: 0 for a single expert, 1 for equal weights (and if K = 1)."""
    if weights.shape[-1] == 1:
        return torch.ones_like(weights[..., 0])
    return torch.special.entr(weights.float()).sum(dim=-1) / math.log(weights.shape[-1])


def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Euclidean distance between the mean gates of two groups, (L, n, K) each -> (L,); at most sqrt(2)."""
    return np.asarray(np.linalg.norm(a.mean(axis=1) - b.mean(axis=1), axis=-1))


def top_differs(a: np.ndarray, b: np.ndarray) -> float:
    """Share of the images whose largest gate in ``b`` is not the one in ``a``, (n, K) each."""
    return float((a.argmax(axis=-1) != b.argmax(axis=-1)).mean())


def pairs(sample: GateSample) -> list[Pair]:
    """Compare every two groups."""
    found = []
    for i, j in itertools.combinations(range(len(sample.groups)), 2):
        differs = top_differs(sample.weights[i, -1], sample.weights[j, -1])
        local, global_ = distances(sample.local[i], sample.local[j]), distances(sample.global_[i], sample.global_[j])
        numbers = map(float, (local[-1], local.mean(), global_[-1], global_.mean(), differs))
        found.append(Pair(sample.groups[i], sample.groups[j], *numbers))
    return found


def summary(sample: GateSample) -> list[str]:
    """Describe the gates in sentences derived from the numbers: first the verdict, then the numbers behind it."""
    return sentences(
        "gates.txt",
        sample=sample,
        pairs=pairs(sample),
        called=_how_similar,
        entropy=sample.entropy.mean(),
        largest=sample.weights.mean(axis=(0, 2)).max(axis=-1).mean(),
    )


def _how_similar(distance: float) -> str:
    """Adverb for a distance between mean gates."""
    if distance < NEARLY_IDENTICAL:
        return "nearly identically"
    return "similarly" if distance < SIMILAR else "differently"
