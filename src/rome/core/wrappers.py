"""Models inside what wraps them: ``torch.compile``, DataParallel, Fabric, AveragedModel."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel


def wrapped(module: object) -> str | None:
    """The name of the module inside a wrapper (``torch.compile``, DataParallel, Fabric, AveragedModel), else None."""
    if not isinstance(module, nn.Module):
        return None
    inner = next((name for name in ("_orig_mod", "_forward_module") if name in module._modules), None)
    parallel = isinstance(module, (DataParallel, DistributedDataParallel, AveragedModel))
    return "module" if inner is None and parallel else inner


M = TypeVar("M")


def unwrapped(model: M) -> M:
    """The model inside all wrappers around it; what is no module stays as it is."""
    while (name := wrapped(model)) is not None:
        model = getattr(model, name)
    return model


def bare_name(model: nn.Module, name: str) -> str:
    """A name within a model without the parts that are wrappers'."""
    module: object = model
    kept = []
    for part in name.split("."):
        if part != wrapped(module):
            kept.append(part)
        module = getattr(module, part, None)
    return ".".join(kept)


def bare_state(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a model's state (not copied), named as if nothing in it or around it were wrapped."""
    inner = unwrapped(model)
    return {bare_name(inner, name): value for name, value in inner.state_dict().items() if isinstance(value, Tensor)}
