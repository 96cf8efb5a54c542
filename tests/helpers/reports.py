"""Reports of evaluations that nobody ran."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from helpers.tiny_runs import tiny
from rome.attacks.suites.base import AutoAttackSuite, Case
from rome.evaluation.result import Report
from rome.report.evaluated import Evaluated
from rome.runs.folder import Run
from rome.threats import CIFAR10

LP = AutoAttackSuite().cases({threat.name: threat for threat in CIFAR10}, 10)


def report(cases: list[Case], columns: list[list[int]], **more: Any) -> Report:
    """A report with these columns, clean first; ``more`` may name cases that are missing."""
    matrix = np.array(columns, dtype=bool).T
    absent = {*more.get("failed", {}), *more.get("pending", ())}
    names = tuple(case.name for case in cases if case.name not in absent)
    settings = {
        "suite": {"kind": "several", "suites": [{"kind": "autoattack"}, {"kind": "unseen"}]},
        "model": {},
        "cases": [case.dump() for case in cases],
        "classes": 10,
        "seed": 0,
        "n": len(matrix),
    }
    labels = np.zeros(len(matrix), np.int64)
    return Report(matrix, ("clean", *names), labels, np.arange(len(matrix)), settings, **more)


def evaluated(found: Report, folder: Path, name: str = "My run:é", **changes: Any) -> Evaluated:
    return Evaluated(name=name, run=Run(folder), config=tiny(name=name, **changes), folder=folder, report=found)
