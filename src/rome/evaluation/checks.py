"""What is refused before an evaluation starts, because its numbers would be wrong."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rome.attacks.base import Model
from rome.errors import UserError

RANDOM_TOLERANCE = 1e-4
"""How far two outputs for one image may differ, each scaled to length 1 (AutoAttack's tolerance)."""


def check_data(x: Tensor, y: Tensor) -> None:
    """Images float32 (n, C, H, W) in [0, 1], labels int64 (n,) from 0, n > 0.

    Raises:
        UserError: they are not.
    """
    if not isinstance(x, Tensor) or x.ndim != 4 or x.dtype != torch.float32:
        raise UserError(f"images must be a float32 tensor (n, C, H, W) in [0, 1], not {_describe(x)}")
    if not isinstance(y, Tensor) or y.shape != x.shape[:1] or y.dtype != torch.int64:
        raise UserError(f"labels must be an int64 tensor ({len(x)},) for {len(x)} images, not {_describe(y)}")
    if len(x) == 0:
        raise UserError("there are no images to evaluate on")
    low, high = x.min().item(), x.max().item()
    if not (low >= 0 and high <= 1):  # also refuses NaN
        raise UserError(
            f"images must lie in [0, 1], these lie in [{low:.3g}, {high:.3g}]: divide by 255 if they are bytes, "
            "and put the normalisation inside the model (rome.create_model does)"
        )
    if int(y.min()) < 0:
        raise UserError(f"labels must count from 0, the smallest here is {int(y.min())}")


def check_mode(model: Model) -> None:
    """No module in training mode.

    Raises:
        UserError: some are.
    """
    if isinstance(model, nn.Module):
        training = [name or type(module).__name__ for name, module in model.named_modules() if module.training]
        if training:
            some = ", ".join(training[:3]) + (", ..." if len(training) > 3 else "")
            raise UserError(
                f"the model is in training mode ({len(training)} modules: {some}), so dropout or batch statistics "
                "would change its answers: call model.eval() first"
            )


def device_of(model: Model, x: Tensor, asked: str | torch.device | None) -> torch.device:
    """Where to run: on the model's device.

    Raises:
        UserError: another device was asked for.
    """
    tensors = [*model.parameters(), *model.buffers()] if isinstance(model, nn.Module) else []
    found = tensors[0].device if tensors else None
    if asked is None:
        return found or x.device
    wanted = torch.device(asked)
    if found is not None and (wanted.type != found.type or wanted.index not in (None, found.index)):
        raise UserError(f"device={str(wanted)!r} was given but the model is on {found}: call model.to({str(wanted)!r})")
    return found or wanted


def check_outputs(model: Model, x: Tensor, labels: Tensor, *, repeats: int = 5) -> int:
    """The model's answers to one batch (B, C, H, W) are logits, finite and repeatable; returns the number of classes.

    Args:
        labels: of all examples, to see that they fit the classes.
        repeats: how often the model is asked.

    Raises:
        UserError: they are not.
    """
    answers = [_logits(model, x) for _ in range(repeats)]
    logits = answers[0]
    classes = logits.shape[1]
    if int(labels.max()) >= classes:
        raise UserError(
            f"the largest label is {int(labels.max())} but the model has {classes} classes (labels 0 to {classes - 1})"
        )
    if bool(((logits >= 0) & (logits <= 1)).all()) and bool(((logits.sum(1) - 1).abs() < 1e-4).all()):
        raise UserError(
            "the model's outputs are probabilities (all in [0, 1], rows sum to 1), which hides gradients from attacks: "
            "return the logits, without softmax"
        )
    scaled = [nn.functional.normalize(answer, dim=1) for answer in answers]
    apart = max((other - scaled[0]).norm(dim=1).max().item() for other in scaled)
    if apart > RANDOM_TOLERANCE:
        raise UserError(
            f"the model answers differently when asked again (outputs {apart:.2g} apart, at most {RANDOM_TOLERANCE:g} "
            "is rounding): a randomised model cannot be judged by these attacks; make its forward deterministic"
        )
    return classes


def _logits(model: Model, x: Tensor) -> Tensor:
    logits = model(x)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(x) or logits.shape[1] < 2:
        raise UserError(f"the model must return logits ({len(x)}, classes >= 2), not {_describe(logits)}")
    logits = logits.float()
    check_finite(logits)
    return logits


def check_finite(logits: Tensor) -> None:
    """Raises:
    UserError: some logits of clean images are not finite.
    """
    bad = int((~logits.isfinite()).any(dim=1).sum())
    if bad:
        raise UserError(
            f"the model's logits are not finite for {bad} of {len(logits)} clean images: "
            "check its weights and its precision"
        )


def _describe(value: object) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
