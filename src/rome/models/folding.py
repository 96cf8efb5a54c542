"""Folding BatchNorm into the preceding convolution while a frozen model is attacked on a CPU."""

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
    """A convolution, and the normalisation that is the only reader of its output."""

    convolution: nn.Conv2d
    norm: nn.BatchNorm2d


def foldable(model: Model, x: Tensor) -> list[Fold]:
    """Find what :func:`folded` can fold in a model in evaluation mode on a CPU.

    A forward pass of x (B, C, H, W) shows which convolution's output goes into which BatchNorm, and whether any other
    operation reads it. Modules that have hooks or are called twice are left out, and a model with compiled modules is
    left as it is. If folding changes the model's output for x by more than rounding, the list is empty.
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
    sources: dict[int, nn.Conv2d] = {}
    calls: Counter[nn.Module] = Counter()
    pairs: list[tuple[Tensor, Fold]] = []

    def record_output(module: Any, _: Any, output: Tensor) -> None:
        calls[module] += 1
        sources[id(output)] = module
        reads.count[id(output)] = 0
        reads.alive.append(output)

    def record_input(module: Any, arguments: tuple[Tensor]) -> None:
        calls[module] += 1
        if (convolution := sources.get(id(arguments[0]))) is not None:
            pairs.append((arguments[0], Fold(convolution, module)))

    with _CountReads() as reads, torch.no_grad(), ExitStack() as stack:
        for convolution in convolutions:
            stack.callback(convolution.register_forward_hook(record_output).remove)
        for norm in norms:
            stack.callback(norm.register_forward_pre_hook(record_input).remove)
        answer = model(x)
        found = [fold for output, fold in pairs if reads.count[id(output)] == 1 == max(calls[part] for part in fold)]
    with folded(found), torch.no_grad():
        difference = (model(x) - answer).abs().max()
    return found if bool(difference <= REPEATABLE * answer.abs().max()) else []


@contextmanager
def folded(folds: list[Fold]) -> Iterator[None]:
    """Fold normalisations into their convolutions and the experts beside these while the context is open.

    The convolutions get weights and biases that include the normalisation, which then passes its input on. The model
    computes the same function up to rounding, with fewer passes through memory. On exit every parameter is restored.
    """
    before = [dict(convolution._parameters) for convolution, _ in folds]
    try:
        for convolution, norm in folds:
            convolution._parameters.update(_folded_parameters(convolution, norm))
            norm.__dict__["forward"] = _after_normalizing(norm)
        yield
    finally:
        for (convolution, norm), parameters in zip(folds, before, strict=True):
            convolution._parameters.update(parameters)
            norm.__dict__.pop("forward", None)


def _folded_parameters(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> dict[str, nn.Parameter]:
    """Parameters with which the convolution also computes the normalisation."""
    statistics: Any = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
    weight, bias = fuse_conv_bn_weights(convolution.weight, convolution.bias, *statistics)
    found: dict[str, Any] = {"weight": weight, "bias": bias}
    if isinstance(convolution, MixtureConv2d):  # B_k as a matrix with one row for each output channel
        rows = convolution.B.view(convolution.out_channels, -1, 1, 1)
        scaled, _ = fuse_conv_bn_weights(rows, None, *statistics)
        found["B"] = nn.Parameter(scaled.view_as(convolution.B))
    return {name: parameter.requires_grad_(False) for name, parameter in found.items()}


def _after_normalizing(norm: nn.BatchNorm2d) -> Callable[[Tensor], Tensor]:
    """What a normalisation module computes after normalising: timm's dropout and activation, or nothing."""
    return (lambda x: norm.act(norm.drop(x))) if isinstance(norm, BatchNormAct2d) else (lambda x: x)


def _fixed(module: nn.BatchNorm2d) -> bool:
    """Whether a module normalises by fixed statistics, and is called without hooks."""
    plain = type(module) in (nn.BatchNorm2d, BatchNormAct2d) and not _hooked(module)
    return plain and module.running_mean is not None and not module.training


def _hooked(module: nn.Module) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in module.__dict__


class _CountReads(TorchDispatchMode):
    """Counts the operations that read each tensor in ``count``, by id; ``alive`` keeps the tensors' ids unique."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count: dict[int, int] = {}
        self.alive: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if id(leaf) in self.count:
                self.count[id(leaf)] += 1
        return func(*args, **(kwargs or {}))
