"""Checks of a model on a few images: whatever would give wrong results or a traceback of torch becomes a one-line
error."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rome.core.device import numerics, out_of_memory
from rome.core.errors import Interrupted, UserError, some
from rome.core.randomness import unchanged_states

Model = Callable[[Tensor], Tensor]
"""Images (B, C, H, W) in [0, 1] to logits (B, classes)."""

THE_MODEL = "the model"
REPEATABLE = 1e-4
"""How far the logits of two passes over one image may differ, relative to their norm (AutoAttack's tolerance)."""
COMPANY = 16
"""Number of images on which to check whether an image's logits depend on the other images."""
UNITS = 16
"""How far logits may differ in batches of other shapes, in units of the machine epsilon of the model's coarsest
precision: there, sums are computed in a different order. In float32 that is far below :data:`REPEATABLE`."""
ROUNDED = 1e-3
"""Images that leave [0, 1] by no more than this were probably rounded, as in resizing, and not normalised."""
IN_PLACE = "changes its input images by an in-place operation (such as x -= mean): write x = x - mean"
NO_GRADIENT = (
    "has no gradient with respect to its images, so it cannot be attacked: its forward leaves torch's graph (detach, "
    "no_grad, inference_mode, numpy, argmax)"
)

_MEANINGS = {
    "leaf Variable that requires grad is being used in an in-place operation": IN_PLACE,
    "use_reentrant": "checkpoints its activations reentrantly, which gives images no gradient: use "
    "torch.utils.checkpoint.checkpoint(..., use_reentrant=False), or switch checkpointing off",
    "does not require grad": NO_GRADIENT,
}
"""Parts of torch's messages, and what they mean for the model."""


def checked_logits(model: Model, x: Tensor, *, name: str = THE_MODEL, hint: str = "", gradient: bool = False) -> Tensor:
    """Return the model's logits (B, classes) for images (B, C, H, W), detached, in the precision of its output.

    Args:
        name: the model's name, for messages.
        hint: what to try if the model does not take such images.
        gradient: also check that the logits have a gradient with respect to the images.

    Raises:
        UserError: the forward or backward pass fails or changes the images, or the output is not logits.
    """
    images = x.detach().clone().requires_grad_(gradient)
    with torch.set_grad_enabled(gradient):
        try:
            answer = model(images)
            if not _same(images.detach(), x.detach()):
                raise UserError(f"{name} {IN_PLACE}")
            logits = _as_logits(answer, len(x), name)
            if gradient and torch.autograd.grad(logits.sum(), images, allow_unused=True)[0] is None:
                raise UserError(f"{name} {NO_GRADIENT}")
        except Exception as error:
            raise failure(error, model, x, name, hint) from error
    return logits.detach()


def _as_logits(answer: Any, images: int, name: str) -> Tensor:
    wanted = f"{name} must return logits ({images}, classes >= 2)"
    if not isinstance(answer, Tensor):
        part = ".logits" if hasattr(answer, "logits") else "[0]"
        if isinstance(answer, dict):
            part = f"[{next((key for key in ('logits', 'out') if key in answer), next(iter(answer), 'logits'))!r}]"
        kind = type(answer).__name__
        raise UserError(
            f"{wanted}, not a {kind}: wrap it so that it returns the logits alone, such as a forward that returns "
            f"self.model(x){part}"
        )
    form = f"{answer.dtype} {tuple(answer.shape)}"
    if images == 1 and answer.ndim < 2:
        raise UserError(
            f"{name} returns {form} for one image: an operation such as squeeze() drops the batch dimension; give it "
            "the dimensions to drop, squeeze(-1), or use flatten(1)"
        )
    if answer.ndim != 2 or len(answer) != images or answer.shape[1] < 2 or not answer.is_floating_point():
        raise UserError(f"{wanted}, not {form}")
    return answer


def failure(error: Exception, model: Model, x: Tensor, name: str = THE_MODEL, hint: str = "") -> Exception:
    """An error that says what to do about an exception in the model's forward or backward pass; the exception itself if
    its message says so already."""
    if isinstance(error, (UserError, Interrupted)) or out_of_memory(error):
        return error
    text = str(error)
    for part, problem in _MEANINGS.items():
        if part in text:
            return UserError(f"{name} {problem}")
    tensors = [*model.parameters(), *model.buffers()] if isinstance(model, nn.Module) else []
    if not _without_values(x) and (reason := unusable(tensors)):
        return UserError(f"{name} {reason}")
    if other := next((tensor for tensor in tensors if tensor.device != x.device), None):
        return UserError(f"{name} has weights on {other.device}, but its images are on {x.device}: move one of them")
    odd = next((tensor.dtype for tensor in tensors if tensor.is_floating_point() and tensor.dtype != x.dtype), None)
    if odd is not None and "type" in text.lower():
        own, theirs = (str(dtype).removeprefix("torch.") for dtype in (odd, x.dtype))
        return UserError(
            f"{name} has {own} weights, but its images are {theirs}: call "
            f"model.{'double' if x.dtype == torch.float64 else 'float'}(), or cast inside its forward"
        )
    count, form = len(x), "x".join(map(str, x.shape[1:]))
    hints = [hint] if hint else []
    if "device-side assert" in text:
        hints = ["a label that is not below the number of classes causes this"]
    if "more than 1 value per channel" in text:
        hints = ["a BatchNorm uses the statistics of the batch: call .eval(), and give it running statistics"]
    reason = "; ".join([last_line(error), *hints])
    return UserError(f"{name} does not take {count} image{'s' * (count > 1)} of {form}: {reason}")


def unusable(tensors: Iterable[Tensor]) -> str:
    """Why a model with these weights cannot be attacked at all; empty if it can."""
    for tensor in tensors:
        if is_lazy(tensor):
            return "has lazy layers without weights yet: call it once on a few images"
        if _without_values(tensor):
            return "is on the meta device, where weights have no values: build it on another device and load them"
        if tensor.is_inference():
            return (
                "was made inside torch.inference_mode(), so nothing can be differentiated through its weights: build "
                "it outside, or use copy.deepcopy(model) outside"
            )
    return ""


def _without_values(tensor: Tensor) -> bool:
    """Whether a tensor is on the meta device and is not a wrapper whose values are elsewhere."""
    return tensor.device.type == "meta" and type(tensor) in (Tensor, nn.Parameter)


def last_line(error: Exception) -> str:
    """The last line of torch's message, which contains the reason, cut to 200 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:200]


def check_labels(labels: Tensor, classes: int | None = None) -> None:
    """Check that labels (n,) count from 0 and, if the number of classes is given, are below it.

    Raises:
        UserError: they do not, or are not.
    """
    low, high = int(labels.min()), int(labels.max())
    if low < 0:
        raise UserError(f"labels must count from 0, but the smallest is {low}")
    if classes is not None and high >= classes:
        raise UserError(f"the largest label is {high} but the model has {classes} classes (labels 0 to {classes - 1})")


def outside_box(x: Tensor) -> str:
    """The error message for images that are not in [0, 1]."""
    if broken := int(x.isnan().flatten(1).any(dim=1).sum()):
        return f"images must be in [0, 1], but {broken} of {len(x)} contain NaN"
    low, high = x.min().item(), x.max().item()
    advice = "divide by 255 if they are bytes, and put the normalisation inside the model (rome.create_model does)"
    if low > -ROUNDED and high < 1 + ROUNDED:
        advice = "if rounding caused this, use x.clamp(0, 1)"
    return f"images must be in [0, 1], but these are in [{low:.9g}, {high:.9g}]: {advice}"


def check_batch_independence(model: Model, x: Tensor, *, name: str = THE_MODEL, sizes: Iterable[int] = ()) -> None:
    """Check that an image's logits depend neither on the other images of its batch nor on its position or batch size.

    Two kinds of changes are tried: other images in a batch of the same shape, where a model that treats images
    independently computes exactly the same numbers; and batches of another size or order, where sums may be rounded
    differently.

    Args:
        x: images (B, C, H, W), of which the first 16 are compared.
        sizes: further batch sizes that the model will be used with, such as that of the last batch.

    Raises:
        UserError: an image's logits depend on its batch.
    """
    images = x[:COMPANY]
    if len(images) < 2:
        return
    usual, other = checked_logits(model, images, name=name), 1 - images
    odd = torch.arange(len(images), device=x.device) % 2 == 1
    for kept in (odd, ~odd):
        mixed = checked_logits(model, torch.where(kept.view(-1, 1, 1, 1), images, other), name=name)
        _check_equal(model, images, usual[kept], mixed[kept], name)
    _check_equal(model, images, usual, checked_logits(model, images.flip(0), name=name).flip(0), name)
    for size in sorted({1, 2, len(x), *sizes}):
        if 0 < size <= len(x) and size != len(images):
            together = checked_logits(model, x[:size], name=name)
            _check_equal(model, images, usual[:size], together[: len(images)], name)


def _check_equal(model: Model, x: Tensor, usual: Tensor, now: Tensor, name: str) -> None:
    """Check that two outputs (B, classes) for the same images are equal up to rounding, relative to the logits' norm.
    An offset common to all logits of an image, which softmax ignores, adds only to the rounding that is allowed.

    Raises:
        UserError: they are not equal.
    """
    one, two = usual.float(), now.float()
    size = one.norm(dim=1).median().clamp_min(torch.finfo(torch.float32).tiny)
    spread = (one - one.mean(dim=1, keepdim=True)).norm(dim=1).median()
    apart = ((one - two).norm(dim=1).max() / size).item() if one.shape == two.shape else float("inf")
    allowed = REPEATABLE * (spread / size).item() + UNITS * torch.finfo(torch.float32).eps
    if apart <= allowed or apart <= (allowed := allowed + UNITS * _coarsest(model, x)):
        return
    raise UserError(
        f"{name} gives an image different logits in different batches: with other images, in another order or in a "
        f"batch of another size, they change by {apart:.2g} of their size, while rounding explains {allowed:.2g}. "
        "Something works across the batch, such as BatchNorm without running statistics, or in training mode inside a "
        "function or an exported file; make the logits of each image depend on that image alone"
    )


def check_attackable(model: Model, x: Tensor, *, name: str = THE_MODEL, hint: str = "") -> int:
    """Check that the model gives logits with gradients for batches of up to B images (B, C, H, W), and that an image's
    logits do not depend on the other images. Returns the number of classes.

    Raises:
        UserError: one of these does not hold.
    """
    with (
        numerics("fp32"),
        buffers_unchanged(model, name),
    ):  # TF32, torch's default for convolutions, rounds too coarsely
        for count in range(len(x), 0, -1):
            classes = checked_logits(model, x[:count], name=name, hint=hint, gradient=True).shape[1]
        check_batch_independence(model, x, name=name)
    return classes


class _Precisions(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Dispatch mode that records the largest machine epsilon of all floating-point results inside."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.coarsest = torch.finfo(torch.float32).eps

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for result in tree_leaves(results):
            if isinstance(result, Tensor) and result.is_floating_point():
                self.coarsest = max(self.coarsest, torch.finfo(result.dtype).eps)
        return results


def _coarsest(model: Model, x: Tensor) -> float:
    """The machine epsilon of the coarsest precision in which the model computes."""
    seen = _Precisions()
    with torch.no_grad(), seen, suppress(Exception):  # operations that the mode cannot follow are ignored
        model(x.clone())
    return seen.coarsest


@contextmanager
def _buffers_restored(model: Model) -> Iterator[list[str]]:
    """Restore the model's buffers afterwards; the list then contains the names of those that had changed."""
    module = model if isinstance(model, nn.Module) else nn.Module()
    before = {name: buffer.detach().clone() for name, buffer in module.named_buffers()}
    changed: list[str] = []
    try:
        yield changed
    finally:
        now = dict(module.named_buffers())
        changed += [name for name, old in before.items() if name in now and not _same(now[name], old)]
        with torch.no_grad():
            for name in changed:
                if now[name].shape == before[name].shape:
                    now[name].copy_(before[name])


@contextmanager
def buffers_unchanged(model: Model, name: str = THE_MODEL) -> Iterator[None]:
    """Check that no forward pass inside changes the model's buffers; those that changed are restored.

    Raises:
        UserError: a buffer changed.
    """
    with _buffers_restored(model) as changed:
        yield
    if changed:
        raise UserError(
            f"{name} changes its own buffers in evaluation mode ({some(changed)}), so its logits depend on earlier "
            "calls: change them in training mode only"
        )


def _same(one: Tensor, two: Tensor) -> bool:
    """Whether two tensors are equal to the last bit; NaN equals NaN, and tensors on the meta device count as equal."""
    if _without_values(one) or _without_values(two):
        return True
    if one.shape != two.shape or one.dtype != two.dtype:
        return False
    one, two = (each if each.layout is torch.strided else each.to_dense() for each in (one, two))
    return bool(((one == two) | ((one != one) & (two != two))).all())


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, and every module's own mode restored afterwards. Modules that override ``train`` have it
    called: the layers of the official LoRA code merge their update into the weight in evaluation mode, and must take it
    out again for training, or it would not learn."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            if module.training != training and type(module).train is not nn.Module.train:
                module.train(training)
        for module, training in modes:
            module.training = training


@contextmanager
def without_side_effects(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; modes, buffers and random states are restored afterwards."""
    with _buffers_restored(model), evaluating(model), torch.no_grad(), unchanged_states():
        yield
