"""Routing in comparable numbers: do the gates know the threat, and are the experts used unequally?

All numbers are of attacked images; clean images appear only in distances, whose pairs are named. Means are over images
(and before that over tokens), with the same images under every threat.
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
    """How well a linear classifier recognises the threat, on images it was not fitted to."""

    accuracy: float
    """Mean over folds, in 0..1."""
    spread: float
    """Standard deviation over folds."""
    chance: float
    """Accuracy of guessing: 1 / number of threats."""


@dataclass(frozen=True)
class Distance:
    """Distance between the mean gates of two groups."""

    a: str
    b: str
    layers: tuple[float, ...]
    """Jensen-Shannon distance in each layer, in 0..1."""
    mean: float
    """Mean over layers."""


@dataclass(frozen=True)
class Routing:
    """Routing of one model under P threats with K experts in L layers. Tuples of floats have an entry for each
    layer."""

    threats: tuple[str, ...]
    layers: tuple[str, ...]
    experts: int
    images: int
    information: tuple[float, ...]
    """Mutual information I(threat; expert) in bits, for equally frequent threats and the mean gate under each: 0 if all
    threats are routed alike, at most :attr:`most_information`."""
    most_information: float
    """log2 min(P, K)."""
    information_mean: float
    """Mean of :attr:`information` over layers, in bits."""
    information_share: float
    """:attr:`information_mean` divided by :attr:`most_information`, in 0..1."""
    entropy: tuple[float, ...]
    """Entropy of the gate at a token, divided by log K: 0 for a single expert, 1 for equal weights."""
    entropy_mean: float
    usage: tuple[float, ...]
    """Entropy of the gate averaged over all images and threats, divided by log K: 0 for collapse onto one expert, 1 for
    an equal load. Never less than :attr:`entropy`."""
    usage_mean: float
    distances: tuple[Distance, ...]
    """Distances between every two groups, including clean images."""
    between: tuple[float, ...]
    """Mean distance between two threats."""
    distance_mean: float
    """Mean of :attr:`between` over layers."""
    gates_probe: Probe
    """Probe on the gates of all layers, local (mean over tokens) and global."""
    features_probe: Probe | None
    """Probe on features, for comparison: how much about the threat could be known."""


def routing_numbers(sample: GateSample, *, features: np.ndarray | None = None, seed: int = 0) -> Routing:
    """Compute the numbers for a sample of gates (:func:`rome.report.gates.collect`).

    Args:
        features: features (G, n, D) of the sample's groups for :attr:`Routing.features_probe`, such as
            :func:`rome.report.features.image_means`.
        seed: seed of the probes' folds.

    Raises:
        UserError: there are fewer than two threats, or fewer than two images.
    """
    chosen = [i for i, name in enumerate(sample.groups) if name != NATURAL]
    threats = tuple(sample.groups[i] for i in chosen)
    if len(threats) < 2:
        raise UserError(
            f"routing is compared between threats, but this run has {len(threats)}; choose one with two or more"
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
    read = np.concatenate([sample.local[chosen], sample.global_[chosen]], axis=-1)  # (P, L, n, 2K)
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
    """Measure how accurately a logistic regression tells which of P groups a vector, (P, n, D), belongs to.

    Five-fold cross-validation over images: all versions of an image are in one fold, so that recognising the image does
    not help. Inputs are standardised by the statistics of the images that the regression is fitted to.

    Raises:
        UserError: there are fewer than two images.
    """
    groups, n = inputs.shape[:2]
    if n < 2:
        raise UserError(f"a probe is tested on other images than it is fitted to, and there is only {n}; increase n")
    fold = np.empty(n, dtype=int)
    fold[stream(seed, "probe").permutation(n).numpy()] = np.arange(n) % min(FOLDS, n)
    model = make_pipeline(StandardScaler(), LogisticRegression(C=INVERSE_PENALTY, max_iter=2000))
    every = inputs.reshape(groups * n, -1).astype(np.float64)
    found = cross_val_score(model, every, np.repeat(np.arange(groups), n), cv=PredefinedSplit(np.tile(fold, groups)))
    return Probe(float(found.mean()), float(found.std()), 1 / groups)


def _bits(p: np.ndarray) -> np.ndarray:
    """Entropy in bits over the last dimension."""
    return np.asarray(-(p * np.log2(np.where(p > 0, p, 1))).sum(axis=-1))
