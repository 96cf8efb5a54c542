"""BatchNorm computed by the convolution in front of it, as long as a frozen model is attacked on a CPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rome.core.trial import REPEATABLE, Model
from rome.experts.conv import MixtureConv2d


class Fold(NamedTuple):
    """A convolution, and the normalisation that alone reads what it computes."""

    convolution: nn.Conv2d
    norm: nn.BatchNorm2d


def foldable(model: Model, x: Tensor) -> list[Fold]:
    """What :func:`folded` can fold in a model in evaluation mode on a CPU.

    In a forward pass of x (B, C, H, W) modules say which convolution hands its output to which BatchNorm, and torch's
    operations whether anything else reads it. Modules with hooks, modules that are called twice and compiled ones stay
    as they are. If the folded model answers differently to x, by more than rounding, the list is empty.
    """
    if not isinstance(model, nn.Module) or x.device.type != "cpu":
        return []
    modules = list(model.modules())
    if any(module._compiled_call_impl is not None for module in modules):
        return []
    convolutions = [module for module in modules if type(module) in (nn.Conv2d, MixtureConv2d) and not _hooked(module)]
    norms = [module for module in modules if isinstance(module, nn.BatchNorm2d) and _fixed(module)]
    if not convolutions or not norms:
        return []
    written: dict[int, nn.Conv2d] = {}
    calls: Counter[nn.Module] = Counter()
    pairs: list[tuple[Tensor, Fold]] = []

    def computed(module: Any, _: Any, output: Tensor) -> None:
        calls[module] += 1
        written[id(output)] = module
        uses.of[id(output)] = 0
        uses.seen.append(output)

    def read(module: Any, arguments: tuple[Tensor]) -> None:
        calls[module] += 1
        if (convolution := written.get(id(arguments[0]))) is not None:
            pairs.append((arguments[0], Fold(convolution, module)))

    with _Uses() as uses, torch.no_grad(), ExitStack() as stack:
        for convolution in convolutions:
            stack.callback(convolution.register_forward_hook(computed).remove)
        for norm in norms:
            stack.callback(norm.register_forward_pre_hook(read).remove)
        answer = model(x)
        found = [fold for output, fold in pairs if uses.of[id(output)] == 1 == max(calls[part] for part in fold)]
    with folded(found), torch.no_grad():
        difference = (model(x) - answer).abs().max()
    return found if bool(difference <= REPEATABLE * answer.abs().max()) else []


@contextmanager
def folded(folds: list[Fold]) -> Iterator[None]:
    """Inside, these convolutions, and the experts beside them, have the weights and biases with which they compute the
    normalisation too, which hands on what it reads: the same function, rounded otherwise, for fewer passes through
    memory. Afterwards every tensor is in its place again."""
    before = [dict(convolution._parameters) for convolution, _ in folds]
    try:
        for convolution, norm in folds:
            convolution._parameters.update(_joint(convolution, norm))
            norm.__dict__["forward"] = _rest(norm)
        yield
    finally:
        for (convolution, norm), parameters in zip(folds, before, strict=True):
            convolution._parameters.update(parameters)
            norm.__dict__.pop("forward", None)


def _joint(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> dict[str, nn.Parameter]:
    """The parameters of both as one convolution."""
    statistics: Any = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
    weight, bias = fuse_conv_bn_weights(convolution.weight, convolution.bias, *statistics)
    found: dict[str, Any] = {"weight": weight, "bias": bias}
    if isinstance(convolution, MixtureConv2d):  # B_k, seen as a matrix with a row for each output
        rows = convolution.B.view(convolution.out_channels, -1, 1, 1)
        scaled, _ = fuse_conv_bn_weights(rows, None, *statistics)
        found["B"] = nn.Parameter(scaled.view_as(convolution.B))
    return {name: parameter.requires_grad_(False) for name, parameter in found.items()}


def _rest(norm: nn.BatchNorm2d) -> Callable[[Tensor], Tensor]:
    """What a normalisation does after it has normalised."""
    return (lambda x: norm.act(norm.drop(x))) if isinstance(norm, BatchNormAct2d) else (lambda x: x)


def _fixed(module: nn.BatchNorm2d) -> bool:
    """Whether it normalises by statistics that do not change, and is called as its class says."""
    known = type(module) in (nn.BatchNorm2d, BatchNormAct2d) and not _hooked(module)
    return known and module.running_mean is not None and not module.training


def _hooked(module: nn.Module) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in module.__dict__


class _Uses(TorchDispatchMode):
    """How many operations read each of the tensors in ``of``, by their ids, while they live in ``seen``."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.of: dict[int, int] = {}
        self.seen: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if id(leaf) in self.of:
                self.of[id(leaf)] += 1
        return func(*args, **(kwargs or {}))
