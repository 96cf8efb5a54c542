"""Checks before an evaluation starts: refuse models and data whose numbers would be wrong."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import partial
from typing import get_args

import torch
from torch import Tensor, nn

from rome.attacks.suites import SearchPrecision
from rome.core.errors import UserError
from rome.core.trial import (
    REPEATABLE,
    Model,
    buffers_unchanged,
    check_batch_independence,
    check_labels,
    checked_logits,
    outside_box,
    unusable,
)
from rome.data.base import Pixels


def check_data(x: Tensor | Pixels, y: Tensor) -> None:
    """Check that images are float32 (n, C, H, W) in [0, 1] and labels int64 (n,) from 0, with n > 0.

    Raises:
        UserError: they are not.
    """
    values = x.values if isinstance(x, Pixels) else x
    if not isinstance(values, Tensor) or values.ndim != 4 or x.dtype != torch.float32:
        raise UserError(f"images must be a float32 tensor (n, C, H, W) in [0, 1], not {_describe(x)}")
    if not isinstance(y, Tensor) or y.shape != x.shape[:1] or y.dtype != torch.int64:
        raise UserError(f"labels must be an int64 tensor ({len(x)},) for {len(x)} images, not {_describe(y)}")
    if len(x) == 0:
        raise UserError("there are no images to evaluate on")
    if not (values.min().item() >= 0 and values.max().item() <= (x.levels if isinstance(x, Pixels) else 1)):  # or NaN
        raise UserError(outside_box(x[:]))
    check_labels(y)


def check_search_precision(precision: str, device: torch.device) -> None:
    """Check that attacks can search in this precision on the device.

    Raises:
        UserError: there is no such precision, or the device has no TF32.
    """
    if precision not in (known := get_args(SearchPrecision)):
        raise UserError(f"search_precision must be one of {', '.join(known)}, not {precision!r}")
    if precision == "tf32" and device.type != "cuda":
        raise UserError(
            f"search_precision: tf32 needs a CUDA device, and this evaluation is on {device.type}; "
            "use search_precision: fp32 (--search-precision fp32)"
        )


def check_mode(model: Model) -> None:
    """Check that no module is in training mode and that gradients can pass through the weights.

    For a function, the modules that it refers to are checked.

    Raises:
        UserError: a module is in training mode, or has weights that gradients cannot pass through.
    """
    for network in _networks(model):
        training = [name or type(module).__name__ for name, module in network.named_modules() if module.training]
        if training:
            some = ", ".join(training[:3]) + (", ..." if len(training) > 3 else "")
            inside = "" if network is model else f"{type(network).__name__} inside "
            raise UserError(
                f"{inside}the model is in training mode ({len(training)} modules: {some}), so dropout or batch "
                f"statistics would change its answers: call {'its ' if inside else 'model.'}eval() first"
            )
        if reason := unusable([*network.parameters(), *network.buffers()]):
            raise UserError(f"the model {reason}")


def _networks(model: object) -> Iterator[nn.Module]:
    """Yield the modules in a model: the model itself or, for a function, those found in its globals and closure."""
    if isinstance(model, nn.Module):
        yield model
    elif isinstance(model, partial):
        for part in (model.func, *model.args, *model.keywords.values()):
            yield from _networks(part)
    elif inspect.ismethod(model):
        yield from _networks(model.__self__)
    elif inspect.isfunction(model):
        known = inspect.getclosurevars(model)
        yield from (
            value for value in (*known.nonlocals.values(), *known.globals.values()) if isinstance(value, nn.Module)
        )


def device_of(model: Model, x: Tensor | Pixels, wanted: str | torch.device | None) -> torch.device:
    """The device to run on: the model's, or for a model without tensors the one wanted, or that of the images.

    Raises:
        UserError: the model is not on the device ``wanted``.
    """
    tensors = [*model.parameters(), *model.buffers()] if isinstance(model, nn.Module) else []
    found = tensors[0].device if tensors else None
    if wanted is None:
        return found or x.device
    wanted = torch.device(wanted)
    if found is not None and (wanted.type != found.type or wanted.index not in (None, found.index)):
        raise UserError(f"device={str(wanted)!r} was given but the model is on {found}: call model.to({str(wanted)!r})")
    return found or wanted


def check_outputs(model: Model, x: Tensor, labels: Tensor, *, last: int = 0, repeats: int = 5) -> int:
    """Check the outputs for one batch (B, C, H, W): finite, repeatable logits, each independent of the other images.

    Args:
        labels: the labels of all examples, which must be among the classes.
        last: size of a smaller last batch; 0 if there is none.
        repeats: how often the same batch is evaluated.

    Returns:
        The number of classes.

    Raises:
        UserError: the outputs do not satisfy this.
    """
    answers = [checked_logits(model, x)]
    with buffers_unchanged(model):
        answers += [checked_logits(model, x) for _ in range(repeats - 1)]
        answers = [answer.float() for answer in answers]
        logits = answers[0]
        refuse_not_finite(int((~logits.isfinite()).any(dim=1).sum()), len(logits))
        check_labels(labels, logits.shape[1])
        if bool(((logits >= 0) & (logits <= 1)).all()) and bool(((logits.sum(1) - 1).abs() < 1e-4).all()):
            raise UserError(
                "the model's outputs are probabilities (all in [0, 1], rows sum to 1), which hides gradients from "
                "attacks: return the logits, without softmax"
            )
        scaled = [nn.functional.normalize(answer, dim=1) for answer in answers]
        apart = max((other - scaled[0]).norm(dim=1).max().item() for other in scaled)
        if not apart <= REPEATABLE:
            raise UserError(
                f"the model's outputs for the same images differ from call to call (by {apart:.2g}; rounding explains "
                f"at most {REPEATABLE:g}): these attacks cannot evaluate a randomised model; "
                "make its forward deterministic"
            )
        check_batch_independence(model, x, sizes=(last,))
    return logits.shape[1]


def check_gradient(model: Model, x: Tensor) -> None:
    """Check that the logits have gradients with respect to the images (B, C, H, W).

    Raises:
        UserError: they have none, or the backward pass fails.
    """
    checked_logits(model, x, gradient=True)


def refuse_not_finite(bad: int, images: int) -> None:
    """Refuse a model whose logits are not finite for some clean images.

    Raises:
        UserError: ``bad`` is not 0.
    """
    if bad:
        raise UserError(
            f"the model's logits are not finite for {bad} of {images} clean images: check its weights and precision"
        )


def _describe(value: object) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
