"""The logger for Weights & Biases."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any
from uuid import uuid4

import numpy as np

from rome.core.component import Names
from rome.runs.loggers.base import Logger, Status, Tracked, Writer

AXIS = "updates"


class Wandb(Logger):
    """Weights & Biases; WANDB_MODE=offline writes to the run's folder, to upload later with wandb sync."""

    kind = "wandb"
    package = "wandb"
    project: str = "rome"
    """Weights & Biases project that the run belongs to."""
    group: str | None = None
    """Name of a group of runs to show together, such as those that differ only in the seed."""
    tags: Names = ()
    """Tags to find the run by."""

    def open(self, run: Tracked) -> Writer:
        return _WandbWriter(self, run)


class _WandbWriter(Writer):
    def __init__(self, settings: Wandb, run: Tracked) -> None:
        import wandb

        self.wandb: Any = wandb
        self.id = run.id or uuid4().hex[:8]
        self.run: Any = wandb.init(
            project=settings.project,
            group=settings.group,
            tags=settings.tags or None,
            name=run.name,
            id=self.id,
            resume="allow",
            config=run.config,
            dir=None if "WANDB_DIR" in os.environ else run.folder,
            settings=wandb.Settings(console="off"),  # do not record the progress bar
        )
        # wandb's own steps cannot decrease, so the updates that a killed run repeats could not be logged with them.
        self.run.define_metric(AXIS)
        self.run.define_metric("*", step_metric=AXIS)

    def log_scalars(self, values: Mapping[str, float], step: int) -> None:
        self.run.log({AXIS: step, **values})

    def log_image(self, name: str, image: np.ndarray, step: int) -> None:
        self.run.log({AXIS: step, name: self.wandb.Image(image)})

    def close(self, status: Status) -> None:
        self.run.finish(exit_code=0 if status == "finished" else 1)
