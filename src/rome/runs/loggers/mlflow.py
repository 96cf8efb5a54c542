"""The logger for MLflow. It uses only MLflow's client, so the active run of a program that calls rome is unaffected."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from rome.core.files import flatten
from rome.runs.loggers.base import Logger, Status, Tracked, Writer

SECONDS = 5
"""Minimum time between two writes, each of which is a request or a database transaction."""
MOST = 1000
"""Maximum number of values in a request (MLflow's limit)."""
STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


class MLflow(Logger):
    """MLflow, in the store or on the server of MLFLOW_TRACKING_URI, or else in a database in the current directory."""

    kind = "mlflow"
    package = "mlflow"
    experiment: str = "rome"
    """MLflow experiment that the run belongs to."""

    def open(self, run: Tracked) -> Writer:
        return _MLflowWriter(self, run)


class _MLflowWriter(Writer):
    def __init__(self, settings: MLflow, run: Tracked) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self.client, self.metric = MlflowClient(), Metric
        self.waiting: list[Any] = []
        self.written = time.monotonic()
        if run.id:
            self.id = run.id
            self.client.update_run(self.id, status="RUNNING")
            return
        experiment = self.client.get_experiment_by_name(settings.experiment)
        number = experiment.experiment_id if experiment else self.client.create_experiment(settings.experiment)
        self.id = self.client.create_run(number, run_name=run.name).info.run_id
        parameters = [
            Param(key, value if isinstance(value, str) else json.dumps(value))
            for key, value in flatten(run.config).items()
        ]
        for first in range(0, len(parameters), 100):
            self.client.log_batch(self.id, params=parameters[first : first + 100])

    def log_scalars(self, values: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        self.waiting += [self.metric(name, value, now, step) for name, value in values.items()]
        if time.monotonic() - self.written > SECONDS or len(self.waiting) > MOST:
            self._write()

    def _write(self) -> None:
        for first in range(0, len(self.waiting), MOST):
            self.client.log_batch(self.id, metrics=self.waiting[first : first + MOST])
        self.waiting, self.written = [], time.monotonic()

    def log_image(self, name: str, image: np.ndarray, step: int) -> None:
        self.client.log_image(self.id, image, artifact_file=f"{name}.png")

    def close(self, status: Status) -> None:
        self._write()
        self.client.set_terminated(self.id, STATUS[status])
