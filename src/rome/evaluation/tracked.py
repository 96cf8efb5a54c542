"""Log an evaluation's accuracies and pictures with the loggers of the evaluated run (:mod:`rome.runs.loggers`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rome.core.console import say
from rome.core.errors import UserError
from rome.data.base import Pixels
from rome.evaluation.result import Report
from rome.evaluation.store import example_images
from rome.runs.config import Config
from rome.runs.loggers import Logger, tracking

PICTURED = 8
"""Most examples in a picture."""
SIDE = 64
"""Side of an image in a picture, in pixels; smaller images are enlarged by a whole factor up to it."""


def chosen_loggers(config: Config, names: Sequence[str] | None) -> tuple[Logger, ...]:
    """The loggers of these kinds, or with None those of the config whose packages are installed.

    A config may be somebody else's, so a logger of it that cannot be used is skipped with a remark.

    Raises:
        UserError: no such kind, or the package of one of the ``names`` is not installed.
    """
    if names is not None:
        try:
            loggers = tuple(Logger.of_kind(name)() for name in dict.fromkeys(names))
        except ValueError as error:  # pydantic's
            raise UserError(f"--loggers: {error}") from None
        for logger in loggers:
            logger.check()
        return loggers
    usable = []
    for logger in config.loggers:
        try:
            logger.check()
            usable.append(logger)
        except UserError as error:
            say(f"{error}; the evaluation continues without it")
    return tuple(usable)


def track(
    loggers: Sequence[Logger],
    folder: Path,
    config: Config,
    report: Report,
    x: Tensor | Pixels,
    images: Path,
    label: str,
    step: int,
) -> None:
    """Log the accuracies and pictures of an evaluation. Mistakes are only reported, as the evaluation is finished.

    Args:
        folder: the run's folder.
        x: the images that were attacked, (n, C, H, W) in [0, 1].
        images: the evaluation's folder, which holds the adversarial images.
        label: prefix of the logged names, such as ``evaluation/apgd-1000``.
        step: number of updates that the model was trained for.
    """
    found = {"clean": report.clean, **report.robust, "average": report.average, "union": report.union}
    found |= {f"group/{group}": value for group, value in report.groups.items()}
    try:
        with tracking(loggers, folder, config.name, config.dump()) as tracked:
            tracked.log_scalars(
                {f"{label}/{name}": value for name, value in found.items() if not math.isnan(value)}, step
            )
            for case in report.attacks if tracked.writers else ():
                if case in report.cases and (drawn := picture(x, images, case)) is not None:
                    tracked.log_image(f"{label}/{case}", drawn, step)
    except UserError as error:
        say(f"loggers: {error}; this evaluation is stored but not logged")


def picture(x: Tensor | Pixels, images: Path, case: str) -> np.ndarray | None:
    """Draw a row of clean images, one of adversarial images, and one of their differences: uint8 (H, W, 3).

    Each difference is centred on grey and scaled to its own largest value. None if no images were kept or no example
    was fooled.
    """
    from torchvision.utils import make_grid

    try:
        numbers, adversarial = example_images(images, case, PICTURED)
    except UserError:
        return None
    if not len(numbers):
        return None
    original = x[torch.from_numpy(numbers)].cpu()
    difference = adversarial - original
    largest = difference.abs().amax(dim=(1, 2, 3), keepdim=True).clamp(min=1e-12)
    rows = torch.cat([original, adversarial, 0.5 + difference / largest / 2])
    rows = rows.repeat_interleave(factor := max(SIDE // x.shape[-1], 1), 2).repeat_interleave(factor, 3)
    grid: Any = make_grid(rows, nrow=len(numbers), padding=2, pad_value=1.0)
    return np.asarray((grid.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())
