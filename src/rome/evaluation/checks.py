"""Checks before an evaluation starts, which refuse data and models that would give wrong numbers."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from rome.core.errors import UserError
from rome.core.trial import REPEATABLE, Model, ask, check_company, check_labels, outside_box, steady, unusable
from rome.data.base import Pixels


def check_data(x: Tensor | Pixels, y: Tensor) -> None:
    """Check that images are float32 (n, C, H, W) in [0, 1], and labels int64 (n,) from 0, with n > 0.

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


def check_mode(model: Model) -> None:
    """Check that no module is in training mode, and that gradients can flow through the weights; if the model is a
    function, check the modules that it refers to.

    Raises:
        UserError: a module is in training mode, or its weights are unusable.
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
    """Yield the modules that a model consists of, as far as they can be found: itself, or those a function refers
    to."""
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
    """Return the device to run on, which is the model's.

    Raises:
        UserError: the model is not on the ``wanted`` device.
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
    """Check that the model's outputs for a batch (B, C, H, W) are finite, repeatable logits and do not depend on the
    other images of the batch; return the number of classes.

    Args:
        labels: labels of all examples, which must fit the classes.
        last: size of the last batch, if it differs; else 0.
        repeats: how often the same batch is evaluated.

    Raises:
        UserError: they are not.
    """
    answers = [ask(model, x)]
    with steady(model):
        answers += [ask(model, x) for _ in range(repeats - 1)]
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
                f"the model answers the same images differently the second time (outputs {apart:.2g} "
                f"apart, at most {REPEATABLE:g} is rounding): a randomised model cannot be judged by these attacks; "
                "make its forward deterministic"
            )
        check_company(model, x, sizes=(last,))
    return logits.shape[1]


def check_gradient(model: Model, x: Tensor) -> None:
    """Check that the logits of images (B, C, H, W) have gradients with respect to the images.

    Raises:
        UserError: they have none, or the backward pass fails.
    """
    ask(model, x, gradient=True)


def refuse_not_finite(bad: int, images: int) -> None:
    """Raise UserError if the logits of any (``bad`` > 0) of so many clean images are not finite."""
    if bad:
        raise UserError(
            f"the model's logits are not finite for {bad} of {images} clean images: check its weights and its precision"
        )


def _describe(value: object) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
