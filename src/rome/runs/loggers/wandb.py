"""Weights & Biases."""

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
    """Weights & Biases; with WANDB_MODE=offline it writes to the run's folder, for a later upload by wandb sync."""

    kind = "wandb"
    package = "wandb"
    project: str = "rome"
    """Name of the project that runs are added to."""
    group: str | None = None
    """Name of a group of runs shown together, such as the seeds of one setting."""
    tags: Names = ()
    """Tags of the run, to filter by."""

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
            settings=wandb.Settings(console="off"),  # which would record the progress bar
        )
        # wandb's own steps cannot go back, so they could not log again the updates that a kill undid.
        self.run.define_metric(AXIS)
        self.run.define_metric("*", step_metric=AXIS)

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        self.run.log({AXIS: step, **values})

    def picture(self, name: str, image: np.ndarray, step: int) -> None:
        self.run.log({AXIS: step, name: self.wandb.Image(image)})

    def close(self, status: Status) -> None:
        self.run.finish(exit_code=0 if status == "finished" else 1)
