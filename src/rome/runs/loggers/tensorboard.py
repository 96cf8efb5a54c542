"""The logger for TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from rome.runs.loggers.base import Logger, Status, Tracked, Writer

FOLDER = "tensorboard"


class TensorBoard(Logger):
    """TensorBoard event files in the run's folder; to view them, run tensorboard --logdir runs."""

    kind = "tensorboard"

    def open(self, run: Tracked) -> Writer:
        return _TensorBoardWriter(run)


class _TensorBoardWriter(Writer):
    def __init__(self, run: Tracked) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge_step = None if run.after is None else run.after + 1
        self.board: Any = SummaryWriter(str(run.folder / FOLDER), purge_step=purge_step)

    def log_scalars(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self.board.add_scalar(name, value, step)

    def log_image(self, name: str, image: np.ndarray, step: int) -> None:
        self.board.add_image(name, image, step, dataformats="HWC")

    def close(self, status: Status) -> None:
        self.board.close()
