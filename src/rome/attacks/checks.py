"""Checks of the inputs and results of attacks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from rome.core.device import out_of_memory
from rome.core.errors import UserError
from rome.core.trial import Model, check_labels, checked_logits, outside_box
from rome.threats import PerExample, Threat


@contextmanager
def explain_failure(model: Model, x: Tensor, y: Tensor, *, gradient: bool = True) -> Iterator[None]:
    """If the search inside the context fails, find out whether the model or the labels are the cause.

    Raises:
        UserError: they are; the message says what to do.
    """
    try:
        yield
    except (UserError, FloatingPointError, AssertionError):
        raise
    except Exception as error:
        if not out_of_memory(error):
            for images in (x[:2], x[:1]):
                try:
                    check_labels(y, checked_logits(model, images, gradient=gradient).shape[1])
                except UserError as reason:
                    raise reason from error
        raise


def check_batch(x: Tensor, y: Tensor, threat: Threat | PerExample) -> None:
    """Check the shapes, dtypes and devices of a batch and its threats.

    Raises:
        UserError: one of them is invalid.
    """
    for what, value in (("images", x), ("labels", y)):
        if not isinstance(value, Tensor):
            raise UserError(f"{what} must be a torch tensor, not {type(value).__name__}: use torch.as_tensor({what})")
    if x.ndim != 4 or x.dtype not in (torch.float32, torch.float64):
        raise UserError(f"images must be float32 (B, C, H, W) in [0, 1], not {x.dtype} {tuple(x.shape)}")
    if y.shape != x.shape[:1] or y.dtype != torch.int64:
        raise UserError(f"labels of {len(x)} images must be int64 ({len(x)},), not {y.dtype} {tuple(y.shape)}")
    if y.device != x.device:
        raise UserError(f"images are on {x.device} and labels on {y.device}: move one of them")
    if isinstance(threat, PerExample) and threat.labels.shape != y.shape:
        raise UserError(f"{len(x)} images need {len(x)} threat labels, not {tuple(threat.labels.shape)}")
    if isinstance(threat, PerExample) and (wrong := set(threat.labels.tolist()) - set(range(len(threat.threats)))):
        raise UserError(f"threat labels must be in 0..{len(threat.threats) - 1}, not {sorted(wrong)}")
    if not isinstance(threat, (Threat, PerExample)):
        raise UserError(f"the threat must be a Threat such as LpBall(norm='Linf', eps=8/255), not {threat!r}")


def check_results(x: Tensor, y: Tensor, results: tuple[Tensor, ...], allowed: Tensor) -> None:
    """Check that inputs are in [0, 1], results finite and inside their threats, and labels at least 0 (torch ignores
    label -100 in its loss). Waits for the device once, or not at all inside :func:`deferred_checks`.

    Args:
        x: the original images (B, C, H, W).
        y: their labels (B,).
        results: the attack's images, each (B, C, H, W).
        allowed: bool (B,): whether all results for an example are inside its threat.
    """
    inside = ((x >= 0) & (x <= 1)).all()
    passed = allowed.all() & inside & (y >= 0).all()

    def settle() -> None:
        if bool(passed):
            return
        check_labels(y)
        if not bool(inside):
            raise UserError(outside_box(x))
        bad = int((~allowed).sum())
        if not all(bool(part.isfinite().all()) for part in results):
            raise FloatingPointError(
                f"the attack produced non-finite images for {bad} of {len(x)} examples: "
                "the gradients of the model are not finite there"
            )
        raise AssertionError(f"the attack left its threat on {bad} of {len(x)} examples: a bug in the attack")

    if (later := _LATER.get()) is None:
        settle()
    else:
        later.append(settle)


_LATER: ContextVar[list[Callable[[], None]] | None] = ContextVar("later", default=None)


@contextmanager
def deferred_checks() -> Iterator[Callable[[], None]]:
    """Postpone the checks of attacks inside the context, so that the work after an attack is queued on the device
    without waiting.

    Yields a function that runs the checks postponed since its last call and raises the first error they find. An
    exception raised inside the context propagates only if the postponed checks, which belong to earlier work, find
    nothing.
    """
    pending: list[Callable[[], None]] = []

    def settle() -> None:
        checks, pending[:] = list(pending), []
        for check in checks:
            check()

    before = _LATER.set(pending)
    try:
        yield settle
    except Exception:
        settle()
        raise
    finally:
        _LATER.reset(before)


def check_bound(kind: str, inside: Tensor, measured: Tensor) -> None:
    """Refuse results outside a bound that an attack enforces itself.

    Args:
        inside: bool (B,), whether each result is allowed.
        measured: (B, ...), the values that ``inside`` was computed from.

    Raises:
        FloatingPointError: a value is not finite, because the model's gradients were not.
        AssertionError: all values are finite and a result is outside: a bug in the attack.
    """
    if bool(inside.all()):
        return
    if not bool(measured.isfinite().all()):
        raise FloatingPointError(f"{kind}: the gradients of the model are not finite")
    raise AssertionError(f"{kind} left its bound on {int((~inside).sum())} of {len(inside)} examples: a bug")
