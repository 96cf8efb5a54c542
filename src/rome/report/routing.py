"""Routing in numbers that can be compared without looking: do the gates know the threat, and do experts differ in use?

All of them are of the threats alone; natural images appear only in the distances, which name their pairs. Means are
over images (and before that over tokens), with the same images under every threat.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import PredefinedSplit, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from rome.core.errors import UserError
from rome.core.randomness import stream
from rome.report.gates import GateSample
from rome.report.subject import NATURAL

FOLDS = 5
INVERSE_PENALTY = 1.0
"""C of the logistic regression, on standardised inputs."""


@dataclass(frozen=True)
class Probe:
    """How well a linear classifier reads the threat, on images it was not fitted to."""

    accuracy: float
    """Mean over folds, in 0..1."""
    spread: float
    """Standard deviation over folds."""
    chance: float
    """Accuracy of guessing: 1 / number of threats."""


@dataclass(frozen=True)
class Distance:
    """How far apart two groups are routed in each layer."""

    a: str
    b: str
    layers: tuple[float, ...]
    """Jensen-Shannon distance of their mean gates, in 0..1."""
    mean: float
    """Over layers."""


@dataclass(frozen=True)
class Routing:
    """Routing of one model under P threats with K experts in L layers. Tuples have an entry for each layer."""

    threats: tuple[str, ...]
    layers: tuple[str, ...]
    experts: int
    images: int
    information: tuple[float, ...]
    """I(threat; expert) in bits of p(threat) times the mean gate under it: 0 where threats are routed alike, at most
    :attr:`most_information`."""
    most_information: float
    """log2 min(P, K)."""
    information_mean: float
    """Over layers, in bits."""
    information_share: float
    """That, of :attr:`most_information`: 0..1."""
    entropy: tuple[float, ...]
    """Of the gate at a token, divided by log K: 0 is one expert alone, 1 is all alike."""
    entropy_mean: float
    usage: tuple[float, ...]
    """Entropy of the gate averaged over all images and threats, divided by log K: 0 is collapse onto one expert, 1 an
    equal load. Never less than :attr:`entropy`."""
    usage_mean: float
    distances: tuple[Distance, ...]
    """Every two groups, natural images among them."""
    between: tuple[float, ...]
    """Mean distance between two threats."""
    distance_mean: float
    """That, over layers."""
    gates_probe: Probe
    """Reads the threat from the gates of all layers: local (mean over tokens) and global."""
    features_probe: Probe | None
    """The same from features, for comparison: what there would be to read."""


def routing_numbers(sample: GateSample, *, features: np.ndarray | None = None, seed: int = 0) -> Routing:
    """The numbers of a sample of gates (:func:`rome.report.gates.collect`).

    Args:
        features: (G, n, D) of the sample's groups, for :attr:`Routing.features_probe`; such as
            :func:`rome.report.features.image_means`.
        seed: of the probes' folds.

    Raises:
        UserError: fewer than two threats, or fewer than two images.
    """
    chosen = [i for i, name in enumerate(sample.groups) if name != NATURAL]
    threats = tuple(sample.groups[i] for i in chosen)
    if len(threats) < 2:
        raise UserError(
            f"routing is compared between threats, and there is {len(threats)}; take a run with two or more"
        )
    means = sample.weights.mean(axis=2, dtype=np.float64)  # (G, L, K)
    information = [mutual_information(means[chosen, layer]) for layer in range(len(sample.layers))]
    entropy = sample.entropy[chosen].mean(axis=(0, 2))
    most = math.log2(min(len(threats), sample.experts))
    load = _bits(means[chosen].mean(axis=0))
    usage = load / math.log2(sample.experts) if sample.experts > 1 else np.ones_like(load)
    distances = []
    for i, j in itertools.combinations(range(len(sample.groups)), 2):
        layers = [jensen_shannon(one, two) for one, two in zip(means[i], means[j], strict=True)]
        distances.append(Distance(sample.groups[i], sample.groups[j], tuple(layers), float(np.mean(layers))))
    between = np.mean([each.layers for each in distances if NATURAL not in (each.a, each.b)], axis=0)
    read = np.concatenate([sample.local[chosen], sample.whole[chosen]], axis=-1)  # (P, L, n, 2K)
    read = read.transpose(0, 2, 1, 3).reshape(len(chosen), sample.n, -1)
    return Routing(
        threats=threats,
        layers=sample.layers,
        experts=sample.experts,
        images=sample.n,
        information=tuple(information),
        most_information=most,
        information_mean=float(np.mean(information)),
        information_share=float(np.mean(information)) / most if most else 0.0,
        entropy=tuple(entropy.tolist()),
        entropy_mean=float(entropy.mean()),
        usage=tuple(usage.tolist()),
        usage_mean=float(usage.mean()),
        distances=tuple(distances),
        between=tuple(between.tolist()),
        distance_mean=float(between.mean()),
        gates_probe=linear_probe(read, seed=seed),
        features_probe=None if features is None else linear_probe(features[chosen], seed=seed),
    )


def mutual_information(means: np.ndarray) -> float:
    """I(threat; expert) in bits for equally frequent threats, from their mean gates (P, K).

    H(mean over threats) - mean over threats of H: the Jensen-Shannon divergence of the P mean gates. In 0 .. log2 P.
    """
    return max(0.0, float(_bits(means.mean(axis=0)) - _bits(means).mean()))


def jensen_shannon(a: np.ndarray, b: np.ndarray) -> float:
    """Jensen-Shannon distance of two distributions (K,): the root of the divergence in bits, a metric in 0..1."""
    return math.sqrt(min(1.0, mutual_information(np.stack([a, b]))))


def linear_probe(inputs: np.ndarray, *, seed: int = 0) -> Probe:
    """Accuracy of a logistic regression that reads which of P groups a vector belongs to, (P, n, D).

    Five folds over images: all versions of an image are in one fold, so that knowing
    the image does not help. Inputs are standardised by the fitted images' statistics.

    Raises:
        UserError: fewer than two images.
    """
    groups, n = inputs.shape[:2]
    if n < 2:
        raise UserError(f"a probe is tested on other images than it is fitted to, and there is {n}; take more (n)")
    fold = np.empty(n, dtype=int)
    fold[stream(seed, "probe").permutation(n).numpy()] = np.arange(n) % min(FOLDS, n)
    model = make_pipeline(StandardScaler(), LogisticRegression(C=INVERSE_PENALTY, max_iter=2000))
    every = inputs.reshape(groups * n, -1).astype(np.float64)
    found = cross_val_score(model, every, np.repeat(np.arange(groups), n), cv=PredefinedSplit(np.tile(fold, groups)))
    return Probe(float(found.mean()), float(found.std()), 1 / groups)


def _bits(p: np.ndarray) -> np.ndarray:
    """Entropy in bits over the last dimension."""
    return np.asarray(-(p * np.log2(np.where(p > 0, p, 1))).sum(axis=-1))
