"""How well features tell threats apart: silhouettes (Rousseeuw 1987) and t-SNE (van der Maaten and Hinton 2008).

The paper gives a silhouette per threat (Fig. 5: .611 for Linf in global features) and leaves open of which vectors.
Threats perturb the same images, and what an image shows moves features far more than a perturbation does: of the
features as they are, every threat's silhouette is about 0 (within .03 on our digits, at any token and layer), so the
paper's cannot be of those. What a threat itself does is the difference from the same image's natural features. Figures
5 and A4 draw both. Whether the paper scored the vectors or their t-SNE picture it does not say either; the data has all
of it. A silhouette of differences compares their lengths too: a threat that moves features little is a tight cluster
within a loose one, whose own silhouette is negative.
"""

from __future__ import annotations

import numpy as np
from sklearn.manifold import TSNE
from sklearn.metrics import silhouette_samples
from threadpoolctl import threadpool_limits

from rome.core.randomness import derive_seed

PERPLEXITY = 30


def difference(features: np.ndarray) -> np.ndarray:
    """Features (1 + P, n, ..., D), natural first, less the natural ones of the same image: (P, n, ..., D)."""
    return np.asarray(features[1:] - features[:1])


def silhouettes(features: np.ndarray) -> np.ndarray:
    """Mean silhouette of each of G >= 2 groups of n vectors, (G, n, D) -> (G,), in -1 .. 1.

    (b - a) / max(a, b) of each vector, a the mean distance to the others of its group, b the smallest mean distance to
    another group: near 1 for tight groups far from each other, 0 where groups overlap.
    """
    groups, n = features.shape[:2]
    labels = np.repeat(np.arange(groups), n)
    every = silhouette_samples(features.reshape(groups * n, -1).astype(np.float64), labels)
    return np.asarray(every.reshape(groups, n).mean(axis=1))


def embed(features: np.ndarray, *, seed: int) -> np.ndarray:
    """t-SNE of all groups together, (G, n, D) -> (G, n, 2): perplexity 30 (less for few points), PCA start.

    The same numbers give the same picture; the seed draws what PCA leaves to chance.
    """
    points = features.reshape(-1, features.shape[-1]).astype(np.float64)
    spread = points.std()
    if spread == 0:  # all alike, where t-SNE would divide by 0
        return np.zeros((*features.shape[:2], 2))
    points = np.pad((points - points.mean(axis=0)) / spread, ((0, 0), (0, max(0, 2 - points.shape[1]))))
    perplexity = min(PERPLEXITY, (len(points) - 1) / 3)
    chance = derive_seed(seed, "t-sne") % 2**32
    tsne = TSNE(perplexity=perplexity, init="pca", learning_rate="auto", random_state=chance)
    with threadpool_limits(1, "openmp"):  # waiting threads cost 100 times the work where other programs run
        found = tsne.fit_transform(points)
    return np.asarray(found.reshape(*features.shape[:2], 2), dtype=np.float64)
