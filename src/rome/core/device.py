"""Where to compute."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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
    """Whether an error says that memory did not suffice."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _NO_MEMORY)


def pick_device(name: str) -> torch.device:
    """The device a config or an option names; ``auto`` is CUDA, then MPS, then the CPU.

    Raises:
        UserError: unknown, or not in this machine.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, usable in there.items() if usable)
    if name not in there:
        raise UserError(f"unknown device {name!r}; valid: auto, {', '.join(there)}")
    if not there[name]:
        raise UserError(f"device {name}, but torch sees none here; use auto or cpu")
    return torch.device(name)


def placed(model: nn.Module, device: torch.device) -> nn.Module:
    """A model, moved to where it is to work; on a CPU with the weights of its convolutions in the order that is faster
    there (:func:`channels_last_pays`). No value changes, and nothing that is saved."""
    model = model.to(device)
    return model.to(memory_format=torch.channels_last) if channels_last_pays(model, device) else model


def channels_last_pays(model: nn.Module, device: torch.device) -> bool:
    """Whether a model is faster with its convolutions in the order channels last: on a CPU (benchmarks/layout.py).

    Not where a 1x1 convolution with a stride reads fewer than 8 channels: in this order oneDNN's backward writes beyond
    its memory there (torch 2.15, 2 to 6 channels), and the process dies or computes with what it overwrote.
    """
    return device.type == "cpu" and not any(
        isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) != layer.stride and layer.in_channels < 8
        for layer in model.modules()
    )


@contextmanager
def numerics(precision: str) -> Iterator[None]:
    """TF32 with ``tf32`` and nowhere else, although torch convolves in it by default, and room for the variants of a
    compiled model (training, attack, batches that shrink)."""
    import torch._dynamo

    before, limit = torch.get_float32_matmul_precision(), torch._dynamo.config.recompile_limit
    convolutions = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch._dynamo.config.recompile_limit = max(limit, 32)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        torch.backends.cudnn.allow_tf32 = convolutions
        torch._dynamo.config.recompile_limit = limit
