"""The tiny ViT of :mod:`helpers.tiny_runs`, computed in float64 from float32 images to float32 logits.

Sums over other batches round differently, and an attack's signs carry that from 1e-8 to anything. In float64 the
gradients of one process and of several agree before they are rounded, so that what follows from them can be compared.
"""

from __future__ import annotations

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor


class ExactViT(VisionTransformer):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.double()).float()


def build(num_classes: int) -> ExactViT:
    torch.manual_seed(0)
    sizes = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 16, "depth": 2, "num_heads": 2}
    return ExactViT(num_classes=num_classes, **sizes).double()
