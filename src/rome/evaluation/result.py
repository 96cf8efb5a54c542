"""The result of an evaluation: one boolean matrix, and the accuracies computed from it."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Collection, Iterable, Mapping
from dataclasses import field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError
from pydantic.dataclasses import dataclass

from rome.attacks.corruptions.attack import Corruption
from rome.attacks.corruptions.severities import constants_for
from rome.attacks.suites.base import LP, suite_label
from rome.core.component import mistakes
from rome.core.errors import Incomplete, UserError, did_you_mean, first_line
from rome.evaluation.statistics import wilson, wilson_mean
from rome.evaluation.store import MATRIX, RESULT, SETTINGS, read_json
from rome.threats import LpBall

CLEAN, AVERAGE, UNION = "clean", "average", "union"
_ACCURACIES = (CLEAN, "robust", AVERAGE, UNION, "groups", "unions")
"""Entries of ``result.json`` that are computed from the matrix, as shares."""
_STORED = ("warnings", "failed", "pending", "after", "seconds", "checks", "date", "reused")
"""Entries of ``result.json`` that are neither settings nor computed from the matrix."""


@dataclass(frozen=True, eq=False, config={"arbitrary_types_allowed": True})
class Report:
    """Result of an evaluation. Accuracies are derived from ``correct``, as shares in [0, 1].

    There are two kinds of columns. Under an *attack*, an example that is misclassified without an attack counts as
    wrong; ``average`` and ``union`` are over these columns. A fixed change of the images (a case with ``on_all``, such
    as a corruption) may turn a wrong prediction into a correct one, and counts only in its group's mean. A case that
    failed or has not been run has no column, and every average or union that includes it is NaN.
    """

    correct: np.ndarray
    """bool (n, 1 + cases): example i is classified correctly under case j; column 0 is clean."""
    cases: tuple[str, ...]
    """The columns' names; the first is ``clean``."""
    labels: np.ndarray
    """int64 (n,): the true classes."""
    indices: np.ndarray
    """int64 (n,): position of each example in the data that was evaluated."""
    settings: dict[str, Any] = field(default_factory=dict)
    """The settings that determine the result, and its provenance."""
    warnings: list[dict[str, Any]] = field(default_factory=list)
    """Each has the ``check`` that raised it, ``case``, ``attack``, number of ``examples``, and a ``message``."""
    failed: dict[str, str] = field(default_factory=dict)
    """Case -> error message."""
    pending: tuple[str, ...] = ()
    """Cases of the suite that have not been run yet."""
    after: dict[str, dict[str, float]] = field(default_factory=dict)
    """Case -> attack -> accuracy after the case's attacks up to this one."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Case -> time its attacks took, summed over the processes."""
    checks: list[dict[str, Any]] = field(default_factory=list)
    """Results of the checks for masked gradients (:func:`rome.evaluation.masking.run_checks`)."""
    date: str = ""
    """When the evaluation was finished."""
    reused: dict[str, Any] = field(default_factory=dict)
    """Work reused from earlier calls; empty if there is none.

    Either ``result``, the date of a finished result that is returned as it is; or ``batches``, the number reused ``of``
    all, with their ``cases`` and the dates of the ``first`` and the ``last``.
    """

    def __post_init__(self) -> None:
        rows, columns = self.correct.shape
        if self.correct.dtype != np.bool_ or columns != len(self.cases) or not rows or self.cases[:1] != (CLEAN,):
            raise ValueError(f"expected a boolean matrix with columns {self.cases}, clean first, and at least one row")
        attacks = np.array([name in self.attacks for name in self.cases])
        object.__setattr__(self, "correct", self.correct & (self.correct[:, :1] | ~attacks))

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
    def attacks(self) -> tuple[str, ...]:
        """The cases that are attacks, including those without a column."""
        return tuple(name for name, case in self._planned.items() if not case.get("on_all", False))

    @property
    def chance(self) -> float:
        """Accuracy of guessing a class; 0 if the number of classes is unknown."""
        classes = self.settings.get("classes", 0)
        return 1 / classes if classes else 0.0

    @property
    def chance_remark(self) -> str:
        """Remark that the model is no better than guessing; empty if it is better.

        It compares the lower end of the clean accuracy's interval, and then the union, with :attr:`chance`.
        """
        clean, chance = self.interval(CLEAN)[0], self.chance
        for value, least, when in ((self.clean, clean, "without an"), (self.union, self.union, "under every")):
            if least <= chance > 0:
                classes = f"{self.settings['classes']} classes ({chance:.1%})"
                return f"{value:.1%} correct {when} attack is no better than guessing among {classes}"
        return ""

    @property
    def average(self) -> float:
        """Mean accuracy over the attacks; NaN if one is missing."""
        return self._mean(self.attacks)

    @property
    def union(self) -> float:
        """Share of the examples that are correct without an attack and under every attack; NaN if one is missing."""
        return self.union_of(self.attacks) if self._complete(self.attacks) else math.nan

    @property
    def groups(self) -> dict[str, float]:
        """Group -> mean accuracy over its cases; NaN if one is missing."""
        return {group: self._mean(names) for group, names in self.members.items()}

    @property
    def members(self) -> dict[str, tuple[str, ...]]:
        """Group -> its cases, including those without a column."""
        found: dict[str, tuple[str, ...]] = {}
        for name, case in self._planned.items():
            if group := case.get("group", LP if case.get("threat", {}).get("kind") == LpBall.kind else ""):
                found[group] = (*found.get(group, ()), name)
        return found

    @property
    def unions(self) -> dict[str, float]:
        """Group of several attacks -> their union; NaN if one is missing."""
        return {
            group: self.union_of(names) if self._complete(names) else math.nan
            for group, names in self.members.items()
            if len(names) > 1 and set(names) <= set(self.attacks)
        }

    @property
    def corruptions(self) -> tuple[str, ...]:
        """Sources of the corrupted images, one phrase each; empty without corruptions."""
        height, width = self.settings.get("data", {}).get("shape", (0, 0))[-2:]
        shown = [self._planned[name].get("attacks", [{}])[0] for name in self.cases[1:]]
        made = [attack for attack in shown if attack.get("kind") == Corruption.kind]
        return tuple(dict.fromkeys(_source(attack, max(height, width)) for attack in made))

    @property
    def suite(self) -> str:
        """Short name of the suite, such as ``apgd`` or ``apgd+unseen``."""
        return suite_label(self.settings.get("suite", {}))

    @property
    def search_precision(self) -> str:
        """Precision in which attacks in Lp balls computed products, ``fp32`` or ``tf32``; verdicts are in fp32."""
        return str(self.settings.get("search_precision", "fp32"))

    @property
    def reuse(self) -> str:
        """:attr:`reused` in words; empty if nothing was reused."""
        if "result" in self.reused:
            return f"this is the result of {self.reused['result']}; no attack was run again"
        if not self.reused:
            return ""
        dates = " to ".join(dict.fromkeys((self.reused["first"], self.reused["last"])))
        count = f"{self.reused['batches']} of {self.reused['of']} batches"
        return f"{count} are from an earlier call ({dates}): {', '.join(self.reused['cases'])}"

    def require_complete(self) -> None:
        """Check that no case failed.

        Raises:
            Incomplete: some failed.
        """
        if self.failed:
            raise Incomplete(
                f"{len(self.failed)} of {len(self._planned)} cases failed: {', '.join(self.failed)}; the same command "
                "tries them again, and the others are kept"
            )

    def all_correct(self, cases: Iterable[str] | None = None) -> np.ndarray:
        """Which examples are correct without an attack and under all of these cases (None: every attack), bool (n,).

        Raises:
            UserError: one of them is not in the report.
        """
        columns = [0]
        for case in self.attacks if cases is None else cases:
            if case not in self.cases:
                missing = f"it failed: {self.failed[case]}" if case in self.failed else "it has not been run"
                known = case in self.failed or case in self.pending
                hint = f" ({missing})." if known else f".{did_you_mean(case, (*self.cases, UNION))}"
                raise UserError(f"no case {case!r} in this report{hint}")
            columns.append(self.cases.index(case))
        return np.asarray(self.correct[:, columns].all(axis=1))

    def union_of(self, cases: Iterable[str]) -> float:
        """Union over these cases: the share of examples correct without an attack and under each of them.

        Raises:
            UserError: one of them is not in the report.
        """
        return float(self.all_correct(cases).mean())

    def interval(self, name: str) -> tuple[float, float]:
        """95% interval of an accuracy: ``clean``, a case, ``average`` or ``union``; NaN if the accuracy is NaN.

        It is Wilson's score interval (:func:`rome.evaluation.statistics.wilson`), and accounts for the choice of the
        examples, not of the training seed.

        Raises:
            UserError: there is no such column.
        """
        if name in (AVERAGE, UNION):
            interval = self.union_interval if name == UNION else self.mean_interval
            return interval(self.attacks) if self._complete(self.attacks) else (math.nan, math.nan)
        self.all_correct((name,))  # raises for an unknown name
        return wilson(int(self.correct[:, self.cases.index(name)].sum()), self.n)

    def union_interval(self, cases: Iterable[str]) -> tuple[float, float]:
        """95% interval of :meth:`union_of`.

        Raises:
            UserError: one of the cases is not in the report.
        """
        return wilson(int(self.all_correct(cases).sum()), self.n)

    def mean_interval(self, cases: Iterable[str]) -> tuple[float, float]:
        """95% interval of the mean accuracy over these cases, which share their examples
        (:func:`rome.evaluation.statistics.wilson_mean`)."""
        return wilson_mean(self.correct[:, [self.cases.index(case) for case in cases]].mean(axis=1))

    @cached_property
    def _planned(self) -> dict[str, Mapping[str, Any]]:
        """Cases, including those without a column, in the suite's order -> their descriptions.

        A description is that of :meth:`rome.attacks.suites.base.Case.dump`; empty if unknown.
        """
        described = {case["name"]: case for case in self.settings.get("cases", ())}
        known = (*self.cases[1:], *self.failed, *self.pending)
        order = [*(name for name in described if name in known), *known]
        return {name: described.get(name, {}) for name in order}

    def _complete(self, names: Collection[str]) -> bool:
        return bool(names) and set(names) <= set(self.cases)

    def _mean(self, names: Collection[str]) -> float:
        robust = self.robust
        return float(np.mean([robust[name] for name in names])) if self._complete(names) else math.nan

    def to_json(self) -> dict[str, Any]:
        """Everything but the matrix, as plain data; NaN becomes None."""
        names = (*self.cases, *(() if math.isnan(self.union) else (AVERAGE, UNION)))
        return {
            "n": self.n,
            **{name: _without_nan(getattr(self, name)) for name in _ACCURACIES},
            "corruptions": list(self.corruptions),
            "intervals": {name: list(self.interval(name)) for name in names},
            **{name: getattr(self, name) for name in _STORED},
            "pending": list(self.pending),
            "settings": self.settings,
        }

    def arrays(self) -> dict[str, np.ndarray]:
        """The matrix, its columns, labels and indices, as ``matrix.npz`` stores them."""
        return {
            "correct": self.correct,
            "cases": np.array(self.cases),
            "labels": self.labels,
            "indices": self.indices,
        }

    @staticmethod
    def load(directory: str | Path) -> Report:
        """Load the finished evaluation in a folder.

        Raises:
            UserError: there is none, or it is damaged.
        """
        folder = Path(directory)
        result, settings = read_json(folder / RESULT), read_json(folder / SETTINGS)
        try:
            with (folder / MATRIX).open("rb") as file, np.load(file, allow_pickle=False) as matrix:
                return Report(
                    correct=matrix["correct"],
                    cases=tuple(map(str, matrix["cases"])),
                    labels=matrix["labels"],
                    indices=matrix["indices"],
                    settings=settings,
                    **{name: result[name] for name in _STORED},
                )
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            reason = first_line(error)
            if isinstance(error, ValidationError):
                place, message = next(iter(mistakes(error).items()))
                reason = f"{'.'.join(map(str, place))}: {message}"
            raise UserError(
                f"the evaluation in {folder} is damaged ({reason}): remove {RESULT} and evaluate again; "
                "finished batches are kept"
            ) from None


def _source(corruption: Mapping[str, Any], side: int) -> str:
    """Source of the images of a dumped :class:`rome.attacks.Corruption`, for images of this side."""
    if corruption.get("path") is not None:
        return f"corrupted images read from CIFAR-10-C in {corruption['path']}"
    name = {"cifar10-c": "CIFAR-10-C", "imagenet-c": "ImageNet-C"}[corruption.get("constants") or constants_for(side)]
    return f"corrupted images made here with the severities of {name}, not its images"


def _without_nan(value: Any) -> Any:
    """Replace NaN by None in a number, or in each value of a mapping."""
    if isinstance(value, dict):
        return {name: _without_nan(each) for name, each in value.items()}
    return None if math.isnan(value) else value
