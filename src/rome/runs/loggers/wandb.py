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
    """Weights & Biases; WANDB_MODE=offline writes into the run's folder, and wandb sync sends it later."""

    kind = "wandb"
    package = "wandb"
    project: str = "rome"
    """What runs are collected in."""
    group: str | None = None
    """Shown together: the seeds of one setting, say."""
    tags: Names = ()
    """Words to find the run by."""

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
            settings=wandb.Settings(console="off"),  # it would record the progress bar
        )
        # Steps of wandb's own cannot go back, and so could not show again what a kill undid.
        self.run.define_metric(AXIS)
        self.run.define_metric("*", step_metric=AXIS)

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        self.run.log({AXIS: step, **values})

    def picture(self, name: str, image: np.ndarray, step: int) -> None:
        self.run.log({AXIS: step, name: self.wandb.Image(image)})

    def close(self, status: Status) -> None:
        self.run.finish(exit_code=0 if status == "finished" else 1)
