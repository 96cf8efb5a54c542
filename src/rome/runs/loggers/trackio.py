"""The logger for Trackio, Hugging Face's tracker, which stores runs on this machine or in a Space."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from rome.runs.loggers.base import Logger, Status, Tracked, Writer


class Trackio(Logger):
    """Trackio, on this machine or in TRACKIO_SPACE_ID or TRACKIO_SERVER_URL; to view the runs, run trackio show."""

    kind = "trackio"
    package = "trackio"
    project: str = "rome"
    """Trackio project that the run belongs to."""
    group: str | None = None
    """Name of a group of runs to show together, such as those that differ only in the seed."""

    def open(self, run: Tracked) -> Writer:
        return _TrackioWriter(self, run)


class _TrackioWriter(Writer):
    def __init__(self, settings: Trackio, run: Tracked) -> None:
        import trackio

        self.trackio: Any = trackio
        self.id = run.id or run.unique_name
        self.run: Any = trackio.init(
            settings.project, self.id, group=settings.group, config=run.config, resume="allow", embed=False
        )

    def log_scalars(self, values: Mapping[str, float], step: int) -> None:
        self.run.log(dict(values), step=step)

    def log_image(self, name: str, image: np.ndarray, step: int) -> None:
        self.run.log({name: self.trackio.Image(image)}, step=step)

    def close(self, status: Status) -> None:
        self.trackio.finish()  # unlike run.finish(), this leaves nothing to do at exit
