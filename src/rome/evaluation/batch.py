"""What an attack returned for a batch: checked again, with warnings."""

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
    """What an attack of an ``on_all`` case may offer: images that depend on an example's number, such as those of
    CIFAR-10-C, which are read from a file."""

    def images(self, x: Tensor, y: Tensor, numbers: Tensor, source: Stream) -> Tensor:
        """The changed images, like ``x`` (B, C, H, W); ``numbers`` int64 (B,) are the examples' places in the data."""


class Examples(NamedTuple):
    """All images and labels, and where to compute."""

    x: Tensor | Pixels
    y: Tensor
    device: torch.device

    def batch(self, part: np.ndarray) -> tuple[Tensor, Tensor]:
        """The images and labels of some examples, on the device."""
        rows = torch.from_numpy(part)
        x, y = self.x[rows.to(self.x.device)], self.y[rows.to(self.y.device)]
        return x.to(self.device).contiguous(), y.to(self.device)


def recheck(
    model: Model, x: Tensor, y: Tensor, found: Tensor, case: Case, attack: Attack
) -> tuple[Tensor, Tensor, list[dict[str, Any]]]:
    """What an attack returned, made valid, classified anew, with what was wrong with it.

    Outside its threat an image is projected back; not finite, or not to be projected, it is replaced by the original.

    Returns:
        Images (b, C, H, W), which of them are classified correctly (b,), and warnings.
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
        "left-threat": (outside, "they lay outside their threat: projected back and classified anew"),
        "broken-image": (broken, "they were not finite or could not be projected: replaced by the clean images"),
        NOT_FINITE: (unclear, "the logits of their adversarial images are not finite: counted as wrong"),
    }
    counts = {check: (int(which.sum()), message) for check, (which, message) in doubts.items()}
    return found, correct, [warning(check, case.name, attack, n, text) for check, (n, text) in counts.items() if n]


def in_whole_levels(model: Model, x: Tensor, y: Tensor, images: Tensor, correct: Tensor, threat: LpBall) -> Tensor:
    """Adversarial images (b, C, H, W), each rounded to whole grey levels k/255 where it then is inside its threat and
    classified as before, that is ``correct`` or not (b,)."""
    rounded = (images * 255).round() / 255
    same = threat.contains(rounded, x) & ((model(rounded).argmax(1) == y) == correct)
    return torch.where(same.view(-1, 1, 1, 1), rounded, images)


def warning(check: str, case: str | None, attack: Attack | None, examples: int, message: str) -> dict[str, Any]:
    """An entry of :attr:`rome.evaluation.result.Report.warnings`."""
    kind = attack.kind if attack else None
    return {"check": check, "case": case, "attack": kind, "examples": examples, "message": message}


def summed(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One warning for each check of each attack, its examples added up over the batches."""
    merged: dict[tuple[str, str | None], dict[str, Any]] = {}
    for each in found:
        first = merged.setdefault((each["check"], each["attack"]), {**each, "examples": 0})
        first["examples"] += each["examples"]
    return list(merged.values())


def format_error(error: Exception) -> str:
    """An error as a result keeps it."""
    if isinstance(error, UserError):
        return str(error)  # written to be read as it is
    kind = getattr(error, "kind", type(error).__name__)
    advice = "; try a smaller batch_size, or batch_size='auto'" if out_of_memory(error) else ""
    return f"{kind}: {error}{advice}"
