"""How well features separate threats: silhouettes (Rousseeuw 1987) and t-SNE (van der Maaten and Hinton 2008).

The paper gives a silhouette per threat (Fig. 5: .611 for Linf in global features) without saying of which vectors.
Threats perturb the same images, and features vary far more with the content of an image than with a perturbation: for
the features themselves, every threat's silhouette is about 0 (within .03 on our digits, at any token and layer), so the
paper's values cannot be of those. The effect of a threat itself is the difference from the same image's clean features.
Figures 5 and A4 draw both. The paper does not say either whether it scored the vectors or their t-SNE picture; the data
of our figures has both. Silhouettes of differences also compare lengths: a threat that moves features little is a tight
cluster within a loose one, whose own silhouette is negative.
"""

from __future__ import annotations

import numpy as np
from sklearn.manifold import TSNE
from sklearn.metrics import silhouette_samples
from threadpoolctl import threadpool_limits

from rome.core.randomness import derive_seed

PERPLEXITY = 30


def difference(features: np.ndarray) -> np.ndarray:
    """Subtract from attacked features the clean ones of the same image: (1 + P, n, ..., D), clean first ->
    (P, n, ..., D)."""
    return np.asarray(features[1:] - features[:1])


def silhouettes(features: np.ndarray) -> np.ndarray:
    """Mean silhouette of each of G >= 2 groups of n vectors, (G, n, D) -> (G,), in -1..1.

    The silhouette of a vector is (b - a) / max(a, b), where a is its mean distance to the others of its group and b the
    smallest mean distance to another group: near 1 for tight groups far from each other, 0 if groups overlap.
    """
    groups, n = features.shape[:2]
    labels = np.repeat(np.arange(groups), n)
    every = silhouette_samples(features.reshape(groups * n, -1).astype(np.float64), labels)
    return np.asarray(every.reshape(groups, n).mean(axis=1))


def embed(features: np.ndarray, *, seed: int) -> np.ndarray:
    """Embed all groups together by t-SNE, (G, n, D) -> (G, n, 2), with perplexity 30 (less for few points) and
    initialised by PCA.

    The result is deterministic; the seed determines the remaining randomness of t-SNE.
    """
    points = features.reshape(-1, features.shape[-1]).astype(np.float64)
    spread = points.std()
    if spread == 0:  # all points are equal, and t-SNE would divide by 0
        return np.zeros((*features.shape[:2], 2))
    points = np.pad((points - points.mean(axis=0)) / spread, ((0, 0), (0, max(0, 2 - points.shape[1]))))
    perplexity = min(PERPLEXITY, (len(points) - 1) / 3)
    chance = derive_seed(seed, "t-sne") % 2**32
    tsne = TSNE(perplexity=perplexity, init="pca", learning_rate="auto", random_state=chance)
    with threadpool_limits(1, "openmp"):  # waiting threads cost 100 times the work if other programs are running
        found = tsne.fit_transform(points)
    return np.asarray(found.reshape(*features.shape[:2], 2), dtype=np.float64)
