"""Checks and corrections of the adversarial images that an attack returned for a batch, with warnings."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from rome.attacks.base import Attack
from rome.attacks.engine import Model
from rome.attacks.suites.base import Case
from rome.core.device import out_of_memory
from rome.core.errors import UserError
from rome.core.randomness import Stream
from rome.data.base import Pixels
from rome.threats import LpBall

NOT_FINITE = "non-finite-logits"


@runtime_checkable
class FixedChange(Protocol):
    """Optional interface of attacks in ``on_all`` cases whose images depend on an example's index, such as those of
    CIFAR-10-C, which are read from a file."""

    def images(self, x: Tensor, y: Tensor, numbers: Tensor, source: Stream) -> Tensor:
        """Return the changed images, shaped like ``x`` (B, C, H, W).

        Args:
            x: the clean images.
            y: labels, int64 (B,).
            numbers: indices of the examples in the data, int64 (B,).
            source: random numbers.
        """


class Examples(NamedTuple):
    """All images and labels, and the device to compute on."""

    x: Tensor | Pixels
    y: Tensor
    device: torch.device

    def batch(self, part: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return the images and labels of the examples with indices ``part``, on the device."""
        rows = torch.from_numpy(part)
        x, y = self.x[rows.to(self.x.device)], self.y[rows.to(self.y.device)]
        return x.to(self.device).contiguous(), y.to(self.device)


def recheck(
    model: Model, x: Tensor, y: Tensor, found: Tensor, case: Case, attack: Attack
) -> tuple[Tensor, Tensor, list[dict[str, Any]]]:
    """Make the images that an attack returned valid, and classify them again.

    An image outside its threat is projected back; one that is not finite or cannot be projected is replaced by the
    clean image.

    Args:
        x: the clean images (b, C, H, W).
        found: the images that the attack returned, shaped like ``x``.

    Returns:
        The valid images, bool (b,) which of them are classified correctly, and warnings.
    """
    if found.shape != x.shape:
        raise RuntimeError(f"the attack returned images {tuple(found.shape)} for {tuple(x.shape)}")
    threat, found = case.threat, found.detach().to(x)
    broken = ~found.isfinite().flatten(1).all(dim=1)
    found = torch.where(broken.view(-1, 1, 1, 1), x, found)
    outside = ~threat.contains(found, x)
    if bool(outside.any()):
        found[outside] = threat.project(found[outside], x[outside])
        broken |= ~threat.contains(found, x)
        found = torch.where(broken.view(-1, 1, 1, 1), x, found)
    logits = model(found).float()
    unclear = ~logits.isfinite().all(dim=1)
    correct = (logits.argmax(1) == y) & ~unclear
    doubts = {
        "left-threat": (outside, "they were outside their threat: projected back and classified again"),
        "broken-image": (broken, "they were not finite or could not be projected: replaced by the clean images"),
        NOT_FINITE: (unclear, "the logits of their adversarial images are not finite: counted as wrong"),
    }
    counts = {check: (int(which.sum()), message) for check, (which, message) in doubts.items()}
    return found, correct, [warning(check, case.name, attack, n, text) for check, (n, text) in counts.items() if n]


def in_whole_levels(model: Model, x: Tensor, y: Tensor, images: Tensor, correct: Tensor, threat: LpBall) -> Tensor:
    """Round adversarial images (b, C, H, W) to whole grey levels k/255, except those that would leave their threat or
    change whether they are classified correctly (``correct``, (b,))."""
    rounded = (images * 255).round() / 255
    same = threat.contains(rounded, x) & ((model(rounded).argmax(1) == y) == correct)
    return torch.where(same.view(-1, 1, 1, 1), rounded, images)


def warning(check: str, case: str | None, attack: Attack | None, examples: int, message: str) -> dict[str, Any]:
    """Return an entry for :attr:`rome.evaluation.result.Report.warnings`."""
    kind = attack.kind if attack else None
    return {"check": check, "case": case, "attack": kind, "examples": examples, "message": message}


def summed(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Merge the warnings of all batches into one for each check and attack, with the total number of examples."""
    merged: dict[tuple[str, str | None], dict[str, Any]] = {}
    for each in found:
        first = merged.setdefault((each["check"], each["attack"]), {**each, "examples": 0})
        first["examples"] += each["examples"]
    return list(merged.values())


def format_error(error: Exception) -> str:
    """Return the message that a result stores for an exception."""
    if isinstance(error, UserError):
        return str(error)  # its message is complete
    kind = getattr(error, "kind", type(error).__name__)
    advice = "; try a smaller batch_size, or batch_size='auto'" if out_of_memory(error) else ""
    return f"{kind}: {error}{advice}"
