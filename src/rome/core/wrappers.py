"""Models inside wrappers: ``torch.compile``, DataParallel, Fabric, AveragedModel."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel


def wrapped(module: object) -> str | None:
    """The attribute of a wrapper (``torch.compile``, DataParallel, Fabric, AveragedModel) that holds the model inside
    it; None if ``module`` is not a wrapper."""
    if not isinstance(module, nn.Module):
        return None
    inner = next((name for name in ("_orig_mod", "_forward_module") if name in module._modules), None)
    parallel = isinstance(module, (DataParallel, DistributedDataParallel, AveragedModel))
    return "module" if inner is None and parallel else inner


M = TypeVar("M")


def unwrapped(model: M) -> M:
    """The model inside all wrappers around it; anything that is not a module is returned unchanged."""
    while (name := wrapped(model)) is not None:
        model = getattr(model, name)
    return model


def bare_name(model: nn.Module, name: str) -> str:
    """The name of a module or tensor inside a model, without the parts that wrappers add."""
    module: object = model
    kept = []
    for part in name.split("."):
        if part != wrapped(module):
            kept.append(part)
        module = getattr(module, part, None)
    return ".".join(kept)


def bare_state(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a model's state (not copied), named as if neither the model nor anything in it were wrapped."""
    inner = unwrapped(model)
    return {bare_name(inner, name): value for name, value in inner.state_dict().items() if isinstance(value, Tensor)}
