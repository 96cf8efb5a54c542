"""What an evaluation found: one boolean matrix, and everything that follows from it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rome.errors import UserError, did_you_mean
from rome.evaluation.store import MATRIX, RESULT, SETTINGS, read_json

CLEAN, UNION = "clean", "union"
_Z95 = 1.959963984540054
"""Normal quantile of a two-sided 95% interval."""


@dataclass(frozen=True, eq=False)
class Report:
    """Accuracies derived from ``correct``; all are shares in [0, 1].

    An example that is wrong without an attack is wrong in every column. Where a case failed, it has no column, and
    ``average`` and ``union`` are NaN.
    """

    correct: np.ndarray
    """bool (n, 1 + cases): example i is classified correctly under case j; column 0 is clean."""
    cases: tuple[str, ...]
    """The columns' names; the first is ``clean``."""
    labels: np.ndarray
    """int64 (n,): the true classes."""
    indices: np.ndarray
    """int64 (n,): position of each example in the data given."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What determines the result, and its provenance."""
    warnings: list[dict[str, Any]] = field(default_factory=list)
    """Each with the ``check`` that raised it, ``case``, ``attack``, how many ``examples``, and a ``message``."""
    failed: dict[str, str] = field(default_factory=dict)
    """Case -> what went wrong."""
    after: dict[str, dict[str, float]] = field(default_factory=dict)
    """Case -> attack -> accuracy once that attack, too, has run."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Case -> time its attacks took, over all the processes that worked on it."""

    def __post_init__(self) -> None:
        rows, columns = self.correct.shape
        if self.correct.dtype != np.bool_ or columns != len(self.cases) or not rows or self.cases[:1] != (CLEAN,):
            raise ValueError(f"expected a boolean matrix with columns {self.cases}, clean first, and at least one row")
        object.__setattr__(self, "correct", self.correct & self.correct[:, :1])

    @property
    def n(self) -> int:
        """Number of examples."""
        return len(self.correct)

    @property
    def clean(self) -> float:
        """Accuracy without an attack."""
        return float(self.correct[:, 0].mean())

    @property
    def robust(self) -> dict[str, float]:
        """Accuracy under each case."""
        return {name: float(self.correct[:, 1 + i].mean()) for i, name in enumerate(self.cases[1:])}

    @property
    def average(self) -> float:
        """Mean of the robust accuracies."""
        return math.nan if self.failed else float(np.mean(list(self.robust.values())))

    @property
    def union(self) -> float:
        """Share of the examples that are correct without an attack and under every case."""
        return math.nan if self.failed else self.union_of(self.cases)

    def union_of(self, cases: Iterable[str]) -> float:
        """The union over some of the cases.

        Raises:
            UserError: one of them is not in the report.
        """
        return float(np.mean([self._all(cases)]))

    def interval(self, name: str) -> tuple[float, float]:
        """95% interval of an accuracy: ``clean``, a case or ``union``.

        Wilson's score interval for k correct of n: (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n) with
        p = k/n, z = 1.96. It covers the choice of the examples, not of the training seed.

        Raises:
            UserError: no such column.
        """
        if name == UNION and self.failed:
            return math.nan, math.nan
        return wilson(int(self._all(self.cases if name == UNION else (name,)).sum()), self.n)

    def _all(self, cases: Iterable[str]) -> np.ndarray:
        columns = [0]
        for case in cases:
            if case not in self.cases:
                raise UserError(f"no case {case!r} in this report.{did_you_mean(case, (*self.cases, UNION))}")
            columns.append(self.cases.index(case))
        return np.asarray(self.correct[:, columns].all(axis=1))

    def to_json(self) -> dict[str, Any]:
        """Everything but the matrix, as plain data; what is unavailable is None."""
        names = (*self.cases, *(() if self.failed else (UNION,)))
        return {
            "n": self.n,
            "clean": self.clean,
            "robust": self.robust,
            "average": None if self.failed else self.average,
            "union": None if self.failed else self.union,
            "intervals": {name: list(self.interval(name)) for name in names},
            "after": self.after,
            "warnings": self.warnings,
            "failed": self.failed,
            "seconds": self.seconds,
            "settings": self.settings,
        }

    def arrays(self) -> dict[str, np.ndarray]:
        """The matrix with its names, as ``matrix.npz`` holds it."""
        return {
            "correct": self.correct,
            "cases": np.array(self.cases),
            "labels": self.labels,
            "indices": self.indices,
        }

    @staticmethod
    def load(directory: str | Path) -> Report:
        """The finished evaluation in a folder.

        Raises:
            UserError: there is none.
        """
        folder = Path(directory)
        result, settings = read_json(folder / RESULT), read_json(folder / SETTINGS)
        try:
            with np.load(folder / MATRIX, allow_pickle=False) as matrix:
                return Report(
                    correct=matrix["correct"],
                    cases=tuple(map(str, matrix["cases"])),
                    labels=matrix["labels"],
                    indices=matrix["indices"],
                    settings=settings,
                    **{name: result[name] for name in ("warnings", "failed", "after", "seconds")},
                )
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"the evaluation in {folder} is damaged ({error}): remove {RESULT} and evaluate again; "
                "finished batches are kept"
            ) from None


def wilson(correct: int, n: int) -> tuple[float, float]:
    """95% score interval of a share (see :meth:`Report.interval`)."""
    share, z2 = correct / n, _Z95**2
    middle = share + z2 / (2 * n)
    half = _Z95 * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    scale = 1 + z2 / n
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)
