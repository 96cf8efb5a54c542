"""Arguments of the experts' fused operations, and a check of their kernels that runs in Triton's interpreter."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from rome.experts.operations import mix, mix_backward

KINDS = ("local", "whole", "both", "learned")


def arguments(
    images: int, tokens: int, experts: int, rank: int, kind: str, dtype: torch.dtype, seed: int = 0
) -> Iterator[tuple[Any, ...]]:
    """Arguments of both operations, of a gate of that kind, one of :data:`KINDS`."""
    g = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    local, whole = kind != "whole", kind != "local"
    width = experts * (rank + local + whole)
    read = random(tokens, images, width + 1).transpose(0, 1)[..., 1:].to(dtype)  # not contiguous
    biases = random(experts) if local else None, random(experts) if whole else None
    logit, beta = (torch.tensor(0.3) if kind == "learned" else None), {"local": 0.0, "whole": 1.0}.get(kind, 0.7)
    for first, last, scale in ((tokens > 1, tokens, 0.5), (0, 1, 1.0)):
        yield (read, *biases, logit, experts, beta, int(first), last, scale)
        _, u, v = mix(read, *biases, logit, experts, beta, int(first), last, scale)
        d_mixed = random(images, tokens, experts * rank).to(dtype)
        d_gates = random(experts, tokens, images).permute(2, 1, 0) if local else None, random(*v.shape)
        for d_u, d_v in ((None, None), (d_gates[0], d_gates[1] if whole else None)):
            yield (d_mixed, read, u, v, logit, d_u, d_v, beta, int(first), last, scale)


def check_kernels() -> None:
    """In Triton's interpreter: the kernels for CUDA beside the plain operations."""
    from rome.experts import _kernels as kernels

    kernels.FORWARD, kernels.BACKWARD, kernels.POOL = 128, 256, 4  # several blocks of tokens, the last of them short
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 2**-7}
    every = [((2, 7, 3, 5), kind, torch.float32) for kind in KINDS]
    every += itertools.product([(2, 1, 1, 1), (1, 18, 4, 16)], ["learned"], tolerance)
    for shape, kind, dtype in every:
        for given in arguments(*shape, kind, dtype):
            forward = len(given) == 9
            theirs = (mix if forward else mix_backward)(*given)
            ours = [torch.empty_like(each) for each in theirs]
            (kernels.mix if forward else kernels.mix_backward)(*ours, *given)
            for one, other in zip(ours, theirs, strict=True):
                assert (one.shape, one.dtype) == (other.shape, other.dtype)
                if one.numel():
                    limit = tolerance[one.dtype] * max(other.float().abs().max().item(), 1)
                    assert (one.float() - other.float()).abs().max() <= limit, (shape, kind, dtype)
    print("kernels agree")
