"""The AlexNet for CIFAR whose features bound perceptual attacks (Laidlaw et al. 2021, arXiv:2006.12655)."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from rome.models.backbones.common import IMAGENET_STATISTICS, Backbone

FEATURE_LAYERS = ("features.1", "features.4", "features.7", "features.9", "features.11")
"""Names of the five ReLUs whose outputs are phi(x) in that paper's distance (docs/decisions/perceptual.md)."""


def alexnet_cifar(*, num_classes: int = 10, in_chans: int = 3) -> Backbone:
    """AlexNet for 32x32 images, the usual network of perceptual distances on CIFAR-10; 23,272,266 parameters.

    Five 3x3 convolutions with ReLU, pooled after the first, second and fifth (maps of 16, 8, 4, 4, 4 pixels, and 2x2 at
    the end), then three linear layers. The names and sizes of the weights (``features.0``, ``classifier.6``) are those
    of ``CifarAlexNet`` in perceptual-advex (``perceptual_advex/models.py``), whose checkpoint can be loaded.
    """
    features = nn.Sequential(  # ReLUs are not in place, so that tensors kept by hooks do not change
        nn.Conv2d(in_chans, 64, 3, stride=2, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(64, 192, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
    )  # fmt: skip
    classifier = nn.Sequential(
        nn.Dropout(), nn.Linear(256 * 2 * 2, 4096), nn.ReLU(),
        nn.Dropout(), nn.Linear(4096, 4096), nn.ReLU(),
        nn.Linear(4096, num_classes),
    )  # fmt: skip
    parts = OrderedDict(features=features, flatten=nn.Flatten(), classifier=classifier)
    network = Backbone(parts, IMAGENET_STATISTICS)
    network.feature_layers = FEATURE_LAYERS
    return network
