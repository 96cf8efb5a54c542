"""A device that is not the CPU, on a machine that has none: what a GPU refuses, it refuses.

A :class:`Pretend` says that it lies on the device ``meta`` and holds its numbers on the CPU, where every operation is
computed. One that would mix it with a CPU tensor raises :class:`WrongDevice`, as CUDA would, but for what CUDA allows:
tensors without dimensions, copies, indices on the CPU. Inside :class:`Device` tensors that are made for ``meta``, or
moved there, are such ones. It cannot show what only CUDA has: autocast, its random numbers, streams.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

from rome.core.capturable import Watch

DEVICE = torch.device("meta")
aten = torch.ops.aten
MAY_MIX = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
ASKED = {aten._local_scalar_dense.default, aten.equal.default}
"""Give Python's numbers."""
WAITED: list[str] = []
"""The operations for which the host waited for numbers of the device."""


class WrongDevice(RuntimeError):  # noqa: N818
    """A tensor of the device met one of the CPU."""


class Pretend(Tensor):
    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Pretend:
        return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
            requires_grad=held.requires_grad,
        )

    def __init__(self, held: Tensor) -> None:
        self.held = held

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})

    def new_tensor(self, data: Any, dtype: torch.dtype | None = None, device: Any = None) -> Tensor:
        return Pretend(torch.tensor(data, dtype=dtype or self.dtype))

    def tolist(self) -> Any:
        return self.held.tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("can't convert a tensor of the device to numpy; use Tensor.cpu() first")

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Pretend({self.held})"


class Device(TorchDispatchMode):
    """Inside, the device is there."""

    def __enter__(self) -> Any:
        self.patch = pytest.MonkeyPatch()
        enabled, autocast = torch.is_autocast_enabled, torch.autocast

        def cast(kind: str, *args: Any, **settings: Any) -> Any:
            return nullcontext() if kind == "meta" else autocast(kind, *args, **settings)

        self.patch.setattr(torch, "is_autocast_enabled", lambda *kind: kind != ("meta",) and enabled(*kind))
        self.patch.setattr(torch, "autocast", cast)
        return super().__enter__()

    def __exit__(self, *error: Any) -> Any:
        self.patch.undo()
        return super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})


def computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    ours = [tensor for tensor in tensors if isinstance(tensor, Pretend)]
    others = [tuple(tensor.shape) for tensor in tensors if not isinstance(tensor, Pretend) and tensor.ndim]
    copies = func is aten.copy_.default
    if ours and others and not copies and (func not in MAY_MIX or not isinstance(args[0], Pretend)):
        raise WrongDevice(f"{func}: a tensor of the device, and of the CPU {others}")
    asked = kwargs.get("device")
    there = asked is not None and torch.device(asked) == DEVICE
    changed = {"device": torch.device("cpu")} if there else {}
    changed |= {"pin_memory": False} if kwargs.get("pin_memory") else {}

    def opened(value: Any) -> Any:
        return value.held if isinstance(value, Pretend) else value

    found = func(*tree_map(opened, args), **tree_map(opened, kwargs | changed))
    name = func._schema.name.partition("::")[2]
    index = tree_leaves(args[1]) if name in ("index", "index_put", "index_put_") else []
    masked = any(isinstance(each, Pretend) and each.dtype == torch.bool for each in index)
    leaves = asked is not None and not there
    if ours and (name in Watch.WAITS or masked or leaves):
        WAITED.append(name)
    if copies:
        return args[0]
    if func in ASKED or not (ours or there) or (asked is not None and not there):
        return found
    if func is aten._conj.default:
        return Pretend(found.resolve_conj())  # the wrapper cannot carry the mark of a conjugate view
    closed = tree_map(lambda value: Pretend(value) if isinstance(value, Tensor) else value, found)
    return return_and_correct_aliasing(func, args, kwargs, closed)


def moved(module: nn.Module) -> nn.Module:
    """The module with its parameters and buffers on the device, in place."""
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None:
                held = Pretend(value.detach().clone())
                part._parameters[name] = nn.Parameter(held, requires_grad=value.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = Pretend(buffer.clone())
    return module
