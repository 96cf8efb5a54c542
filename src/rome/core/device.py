"""Devices, memory layout and numerical precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from rome.core.errors import UserError

_NO_MEMORY = (
    "defaultcpuallocator",  # torch on a CPU: "can't allocate memory", "not enough memory"
    "out of memory",  # CUDA, MPS
    "cublas_status_alloc_failed",
    "cudnn_status_alloc_failed",
)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error reports that there was not enough memory."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _NO_MEMORY)


def pick_device(name: str) -> torch.device:
    """The device that a config or an option names; ``auto`` is CUDA if available, then MPS, then the CPU.

    Raises:
        UserError: the device is unknown, or this machine has none.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, usable in available.items() if usable)
    if name not in available:
        raise UserError(f"unknown device {name!r}; valid: auto, {', '.join(available)}")
    if not available[name]:
        raise UserError(f"device: {name}, but torch sees no {name.upper()} device; use auto or cpu")
    return torch.device(name)


def placed(model: nn.Module, device: torch.device) -> nn.Module:
    """Move a model to the device, on a CPU with its convolutions' weights in channels-last order if that is faster
    (:func:`channels_last_pays`). This changes neither values nor saved files."""
    model = model.to(device)
    return model.to(memory_format=torch.channels_last) if channels_last_pays(model, device) else model


def channels_last_pays(model: nn.Module, device: torch.device) -> bool:
    """Whether a model is faster with its convolutions in channels-last order: on a CPU (benchmarks/layout.py).

    Models with a strided 1x1 convolution of fewer than 8 input channels are excluded: in this order, its backward in
    oneDNN writes out of bounds (torch 2.15, 2 to 6 channels), and the process crashes or its values are corrupted.
    """
    return device.type == "cpu" and not any(
        isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) != layer.stride and layer.in_channels < 8
        for layer in model.modules()
    )


@contextmanager
def numerics(precision: str) -> Iterator[None]:
    """:func:`float32_products`, and enough recompilations for the variants of a compiled model (training, attack,
    shrinking batches)."""
    import torch._dynamo

    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, 32)
    try:
        with float32_products(precision):
            yield
    finally:
        torch._dynamo.config.recompile_limit = limit


@contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """Compute products and convolutions of float32 tensors in TF32 on CUDA if the precision is ``tf32``, and in strict
    float32 otherwise, although torch convolves in TF32 by default. CPUs always use strict float32, and so do GPUs
    without TF32 (before Ampere, compute capability 8.0), whatever is set. The earlier settings are restored."""
    backends: Any = torch.backends
    on_cpu, on_cuda = (backends.mkldnn.matmul, backends.mkldnn.conv), (backends.cudnn.conv, backends.cudnn.rnn)
    every = (*on_cpu, *on_cuda, backends.cuda.matmul)
    before = [each.fp32_precision for each in every]

    def set_older(matmul: str, convolutions: bool) -> None:
        """Settings that also change those above. Libraries read both, and torch fails where they contradict."""
        torch.set_float32_matmul_precision(matmul)
        backends.cudnn.allow_tf32 = convolutions

    for each in every:
        each.fp32_precision = "ieee"
    matmul = torch.get_float32_matmul_precision()
    try:
        convolutions = backends.cudnn.allow_tf32
    except RuntimeError:  # true, which contradicts "ieee"
        convolutions = True
    try:
        set_older("high" if precision == "tf32" else "highest", precision == "tf32")
        for each in on_cpu if precision == "tf32" else every:
            each.fp32_precision = "ieee"
        yield
    finally:
        set_older(matmul, convolutions)
        for each, old in zip(every, before, strict=True):
            each.fp32_precision = old
