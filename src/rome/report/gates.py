"""Where a model's gates send natural images and each threat's (the idea of the paper's Fig. 3), in numbers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from rome.attacks import Attack
from rome.attacks.suites import as_named
from rome.core.errors import UserError
from rome.experts import record_gates
from rome.report.subject import NATURAL, attack_all, over_groups
from rome.report.templating import sentences
from rome.threats import Threat

NEARLY_IDENTICAL, SIMILAR = 0.02, 0.1
"""Distances between mean gates below which routing is called nearly identical, or similar."""


class GateSample(NamedTuple):
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
    """(G, L, n): entropy of g at each token, averaged over tokens, divided by log K: 1 is a uniform gate."""

    @property
    def n(self) -> int:
        return int(self.weights.shape[2])

    @property
    def experts(self) -> int:
        return int(self.weights.shape[3])


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
    threats: Iterable[Threat] | Mapping[str, Threat],
    attack: Attack | None = None,
) -> GateSample:
    """Attack the images under every threat and record the gates of all of them.

    Args:
        model: with experts, in evaluation mode.
        x, y: images (n, C, H, W) in [0, 1] and labels (n,), on the model's device.
        threats: as they are named, or by other names.
        attack: APGD with 15 steps if not given; threats that bring an attack are searched by that one.
    """
    return read(model, {NATURAL: x, **attack_all(model, x, y, as_named(threats), attack)})


def read(model: nn.Module, groups: Mapping[str, Tensor]) -> GateSample:
    """Record the gates of groups of images: name -> (n, C, H, W), the same n images in each.

    Raises:
        UserError: no experts, or layers with different numbers of them.
    """
    layers: tuple[str, ...] = ()

    def of_batch(images: Tensor) -> list[Tensor]:
        """:class:`GateSample`'s arrays, (B, L, ...) each."""
        nonlocal layers
        with torch.no_grad(), record_gates(model) as recorder:
            model(images)
        layers, gates = tuple(recorder.gates), list(recorder.gates.values())
        counts = sorted({each.weights.shape[-1] for each in gates})
        if len(counts) > 1:
            raise UserError(f"layers have {' and '.join(map(str, counts))} experts, so their gates do not compare")
        mixed = [each.weights.mean(dim=1) for each in gates]
        local = [(each.weights if each.local is None else each.local).mean(dim=1) for each in gates]
        whole = [mean if each.global_ is None else each.global_ for each, mean in zip(gates, mixed, strict=True)]
        entropy = [relative_entropy(each.weights).mean(dim=1) for each in gates]
        return [torch.stack(parts, dim=1) for parts in (mixed, local, whole, entropy)]

    arrays = [np.ascontiguousarray(each.swapaxes(1, 2)) for each in over_groups(groups, of_batch)]
    return GateSample(tuple(groups), layers, *arrays)


def join(parts: Sequence[GateSample]) -> GateSample:
    """The gates of one model on images that were read in parts, one part after the other."""
    arrays = [np.concatenate(each, axis=2) for each in zip(*(part[2:] for part in parts), strict=True)]
    return GateSample(parts[0].groups, parts[0].layers, *arrays)


def distinct_experts(means: np.ndarray, most: int) -> list[int]:
    """Up to ``most`` experts whose mean weights differ most between groups, (G, K), in their own order."""
    spread = means.max(axis=0) - means.min(axis=0)
    return sorted(sorted(range(len(spread)), key=lambda k: -spread[k])[:most])


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
        differs = top_differs(sample.weights[i, -1], sample.weights[j, -1])
        local, whole = distances(sample.local[i], sample.local[j]), distances(sample.whole[i], sample.whole[j])
        numbers = map(float, (local[-1], local.mean(), whole[-1], whole.mean(), differs))
        found.append(Pair(sample.groups[i], sample.groups[j], *numbers))
    return found


def summary(sample: GateSample) -> list[str]:
    """What the numbers show, in words that follow from them: first the verdict, then the numbers it rests on."""
    return sentences(
        "gates.txt",
        sample=sample,
        pairs=pairs(sample),
        called=_called,
        entropy=sample.entropy.mean(),
        largest=sample.weights.mean(axis=(0, 2)).max(axis=-1).mean(),
    )


def _called(distance: float) -> str:
    if distance < NEARLY_IDENTICAL:
        return "nearly identically"
    return "similarly" if distance < SIMILAR else "differently"
