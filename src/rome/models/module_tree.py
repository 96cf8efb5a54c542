"""Submodules, tensors and other attributes of a torch module, whatever wraps it."""

from __future__ import annotations

import hashlib
import io
import re
import zipfile
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rome.core.wrappers import bare_name, unwrapped
from rome.experts.state import BESIDE

_INTERNAL = frozenset(vars(nn.Module())) | {"_compiled_call_impl", "_compile_kwargs", "_is_torch_compile", BESIDE}
"""Attributes that every module has (tensors, submodules, mode, hooks), or that do not affect outputs."""
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def walk(model: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield names and modules without wrappers, shared modules repeatedly. TorchScript modules are not entered."""
    model = unwrapped(model)
    yield path, model
    if not isinstance(model, torch.jit.ScriptModule) and not getattr(model, "identified_by_state", False):
        for name, child in model._modules.items():
            if child is not None:
                yield from walk(child, f"{path}.{name}" if path else name)


def layer_counts(model: nn.Module) -> dict[str, int]:
    """Number of modules of each class, among modules without submodules."""
    leaves = (module for _, module in walk(model) if not module._modules)
    return dict(sorted(Counter(type(module).__qualname__ for module in leaves).items()))


def tensors(model: nn.Module) -> dict[str, Any]:
    """Parameters, all buffers (also those that a checkpoint leaves out) and extra state, under their names in the
    unwrapped model."""
    inner = unwrapped(model)
    entries = {**dict(inner.named_buffers()), **inner.state_dict()}
    return dict(sorted((bare_name(inner, name), value) for name, value in entries.items()))


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Content of a tensor in row-major order."""
    dense = tensor.detach().cpu() if tensor.layout is torch.strided else tensor.detach().cpu().to_dense()
    flat = dense.resolve_conj().resolve_neg().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]  # an array is a buffer


def attributes(module: nn.Module) -> Iterator[tuple[str, object]]:
    """Yield names and values of a module's attributes other than tensors and submodules."""
    if isinstance(module, torch.jit.ScriptModule):
        yield "script", _script(module)
        return
    for name in _HOOKS:
        if hooks := getattr(module, name):
            yield name, list(hooks.values())
    graph = isinstance(module, torch.fx.GraphModule)
    if graph:
        yield "code", module.code
    for name, value in vars(module).items():
        if name not in _INTERNAL and (not graph or isinstance(value, Tensor)):
            yield name, value


def _script(module: Any) -> str:
    """Hash of the code and attributes of a scripted or traced module, without the class numbers of this process."""
    buffer = io.BytesIO()
    torch.jit.save(module, buffer)
    with zipfile.ZipFile(buffer) as archive:
        kept = [name for name in archive.namelist() if name.endswith((".py", "data.pkl", "constants.pkl"))]
        parts = [re.sub(rb"\.?___torch_mangle_\d+", b"", archive.read(name)).hex() for name in kept]
    return hashlib.sha256(" ".join(sorted(parts)).encode()).hexdigest()
