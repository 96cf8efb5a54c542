"""Counted arithmetic of models, and the peak of the hardware, for the benchmarks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import common
from rome.report.cost import flop_counter


class Flops(NamedTuple):
    """Floating-point operations of matrix products and convolutions for one image, two per MAC."""

    forward: int
    gradient: int
    """Forward and backward to the input only."""
    training: int
    """Forward and backward to all parameters; the first layer needs no input gradient."""


def count_flops(model: nn.Module, shape: tuple[int, int, int] = (3, 32, 32)) -> Flops:
    """Count FLOPs with torch on the meta device, independent of the hardware; attention counts as two plain products.

    Recomputation, as in the backward of fused attention, does not count. Call this before compiling the model.
    """
    twin = copy.deepcopy(model).to("meta")
    x, y = torch.empty(1, *shape, device="meta"), torch.empty(1, dtype=torch.int64, device="meta")

    def counted(work: Callable[[], object]) -> int:
        mode = flop_counter()
        with sdpa_kernel(SDPBackend.MATH), mode:
            work()
        return int(mode.get_total_flops())

    def forward() -> None:
        with torch.no_grad():
            twin(x)

    def both(x: Tensor) -> None:  # the counter's module tracker does not support autograd.grad to a leaf
        F.cross_entropy(twin(x), y).backward()

    with common.frozen_parameters(twin):
        totals = counted(forward), counted(lambda: both(x.clone().requires_grad_()))
    twin.train()
    return Flops(*totals, counted(lambda: both(x)))


_PEAKS: dict[str, tuple[float, float, float]] = {
    # dense, without sparsity, in TFLOP/s: fp32 (no tensor cores), tf32, bf16. NVIDIA's data sheets; first match wins.
    "H200 NVL": (60.0, 417.5, 835.5),
    "H200": (66.9, 494.7, 989.4),
    "H100 PCIe": (51.2, 378.0, 756.0),
    "H100 NVL": (60.0, 417.5, 835.5),
    "H100": (66.9, 494.7, 989.4),
    "A100": (19.5, 156.0, 312.0),
}


class Peak(NamedTuple):
    """Peak FLOP/s of the hardware, and where the number comes from."""

    flops: float
    source: str


def peak_flops(device: torch.device, precision: str, *, size: int | None = None) -> Peak:
    """Peak of a known GPU from its data sheet, otherwise the best of ten square matrix products of that precision."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for known, peaks in _PEAKS.items():
            if known in name:
                return Peak(1e12 * dict(zip(("fp32", "tf32", "bf16"), peaks, strict=True))[precision], "data sheet")
    return Peak(matmul_flops(device, precision, size=size), "measured matrix product")


def matmul_flops(device: torch.device, precision: str, *, size: int | None = None) -> float:
    """FLOP/s of a large square matrix product, the best of ten: the peak that is reached in practice."""
    size = size or (8192 if device.type == "cuda" else 2048)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    common.cast(device, precision)  # sets the precision of fp32 products
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    times = common.interleave({"product": lambda: a @ b}, device, rounds=10, warmup=3, shortest=0.02)["product"]
    return 2 * size**3 / min(times)
