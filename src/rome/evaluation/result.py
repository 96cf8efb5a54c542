"""The result of an evaluation: one boolean matrix, and the numbers derived from it."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Collection, Iterable, Mapping
from dataclasses import field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ValidationError
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
_STORED = ("warnings", "failed", "pending", "after", "seconds", "checks", "date", "reused")
"""Fields read back from ``result.json``; all others are derived from the matrix or are settings."""


class _StoredCase(BaseModel):
    name: str


class _StoredSettings(BaseModel):
    """Types of the entries of ``settings.json`` that are read later; all are optional."""

    suite: dict[str, Any] = {}
    threats: dict[str, Any] = {}
    model: dict[str, Any] = {}
    data: dict[str, Any] = {}
    versions: dict[str, Any] = {}
    environment: dict[str, Any] = {}
    cases: list[_StoredCase] = []
    n: int = 0
    seed: int = 0
    batch_size: int = 0
    classes: int = 0


@dataclass(frozen=True, eq=False, config={"arbitrary_types_allowed": True})
class Report:
    """Result of an evaluation: the matrix ``correct`` and the accuracies derived from it, all shares in [0, 1].

    Columns are of two kinds. Under an *attack*, an example that is misclassified when clean counts as misclassified;
    ``average`` and ``union`` are over the attacks. A fixed change of the images (a case with ``on_all``, such as a
    corruption) may turn a wrong answer into a right one, and only counts in the mean of its group. A case that failed
    or has not been run has no column, and every average or union that would include it is NaN.
    """

    correct: np.ndarray
    """bool (n, 1 + cases): example i is classified correctly under case j; column 0 is clean."""
    cases: tuple[str, ...]
    """The columns' names; the first is ``clean``."""
    labels: np.ndarray
    """int64 (n,): the true classes."""
    indices: np.ndarray
    """int64 (n,): index of each example in the data that was passed."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings that determine the result, and its provenance."""
    warnings: list[dict[str, Any]] = field(default_factory=list)
    """Warnings, each with its ``check``, ``case``, ``attack``, number of ``examples``, and a ``message``."""
    failed: dict[str, str] = field(default_factory=dict)
    """Cases that failed -> error message."""
    pending: tuple[str, ...] = ()
    """Cases of the suite that have not been run yet."""
    after: dict[str, dict[str, float]] = field(default_factory=dict)
    """Case -> attack -> accuracy after this attack and those before it."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Case -> seconds that its attacks took, summed over all processes."""
    checks: list[dict[str, Any]] = field(default_factory=list)
    """Results of the checks for masked gradients (:func:`rome.evaluation.masking.run_checks`)."""
    date: str = ""
    """Date and time at which the evaluation finished."""
    reused: dict[str, Any] = field(default_factory=dict)
    """Work of earlier calls that this call did not repeat; empty if there was none. Either ``result``, the date of a
    finished result that was returned as it is; or how many ``batches`` ``of`` all were reused, in which ``cases``, and
    the dates of the ``first`` and ``last`` of them."""

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
        """Accuracy on clean images."""
        return float(self.correct[:, 0].mean())

    @property
    def robust(self) -> dict[str, float]:
        """Case -> accuracy, for all cases but ``clean``."""
        return {name: float(self.correct[:, 1 + i].mean()) for i, name in enumerate(self.cases[1:])}

    @property
    def attacks(self) -> tuple[str, ...]:
        """Names of the cases that are attacks, including those that failed or are pending."""
        return tuple(name for name, case in self._planned.items() if not case.get("on_all", False))

    @property
    def chance(self) -> float:
        """Accuracy of guessing among the classes; 0 if their number is unknown."""
        classes = self.settings.get("classes", 0)
        return 1 / classes if classes else 0.0

    @property
    def guesses(self) -> str:
        """A sentence if the model is no better than guessing on clean images (by the lower end of the interval), or
        else under the union of all attacks; empty if it is better."""
        clean, chance = self.interval(CLEAN)[0], self.chance
        for value, least, when in ((self.clean, clean, "without an"), (self.union, self.union, "under every")):
            if least <= chance > 0:
                classes = f"{self.settings['classes']} classes ({chance:.1%})"
                return f"{value:.1%} right {when} attack is no better than guessing among {classes}"
        return ""

    @property
    def average(self) -> float:
        """Mean accuracy over the attacks; NaN if one of them is missing."""
        return self._mean(self.attacks)

    @property
    def union(self) -> float:
        """Share of examples classified correctly both when clean and under every attack; NaN if an attack is
        missing."""
        return self.union_of(self.attacks) if self._complete(self.attacks) else math.nan

    @property
    def groups(self) -> dict[str, float]:
        """Group -> mean accuracy over its cases; NaN if one of them is missing."""
        return {group: self._mean(names) for group, names in self.members.items()}

    @property
    def members(self) -> dict[str, tuple[str, ...]]:
        """Group -> names of its cases, including those that failed or are pending."""
        found: dict[str, tuple[str, ...]] = {}
        for name, case in self._planned.items():
            if group := case.get("group", LP if case.get("threat", {}).get("kind") == LpBall.kind else ""):
                found[group] = (*found.get(group, ()), name)
        return found

    @property
    def unions(self) -> dict[str, float]:
        """Group of several attacks -> accuracy under their union; NaN if one of them is missing."""
        return {
            group: self.union_of(names) if self._complete(names) else math.nan
            for group, names in self.members.items()
            if len(names) > 1 and set(names) <= set(self.attacks)
        }

    @property
    def corruptions(self) -> tuple[str, ...]:
        """Sentences that say where the corrupted images came from; empty without corruptions."""
        height, width = self.settings.get("data", {}).get("shape", (0, 0))[-2:]
        shown = [self._planned[name].get("attacks", [{}])[0] for name in self.cases[1:]]
        made = [attack for attack in shown if attack.get("kind") == Corruption.kind]
        return tuple(dict.fromkeys(_image_source(attack, max(height, width)) for attack in made))

    @property
    def suite(self) -> str:
        """Short name of the suite, such as ``apgd`` or ``apgd+unseen``."""
        return suite_label(self.settings.get("suite", {}))

    @property
    def reuse(self) -> str:
        """:attr:`reused` in words; empty if this call ran everything."""
        if "result" in self.reused:
            return f"this is the result of {self.reused['result']}; no attack was run now"
        if not self.reused:
            return ""
        dates = " to ".join(dict.fromkeys((self.reused["first"], self.reused["last"])))
        count = f"{self.reused['batches']} of {self.reused['of']} batches"
        return f"{count} come from earlier calls ({dates}): {', '.join(self.reused['cases'])}"

    def require_complete(self) -> None:
        """Raise :class:`rome.core.errors.Incomplete` if any case failed."""
        if self.failed:
            raise Incomplete(
                f"{len(self.failed)} of {len(self._planned)} cases failed: {', '.join(self.failed)}; the same command "
                "tries them again, and the others are kept"
            )

    def right(self, cases: Iterable[str] | None = None) -> np.ndarray:
        """Return bool (n,): examples classified correctly when clean and under all of ``cases``; None: every attack.

        Raises:
            UserError: one of the cases is not in the report.
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
        """Return the accuracy under the union of some cases: the share of examples classified correctly when clean and
        under each of them.

        Raises:
            UserError: one of the cases is not in the report.
        """
        return float(self.right(cases).mean())

    def interval(self, name: str) -> tuple[float, float]:
        """Return the 95% interval of an accuracy: ``clean``, a case, ``average`` or ``union``; NaN if the accuracy is.

        It is Wilson's score interval (:func:`rome.evaluation.statistics.wilson`), which covers the random choice of the
        examples but not that of the training seed.

        Raises:
            UserError: no such case in the report.
        """
        if name in (AVERAGE, UNION):
            of = self.union_interval if name == UNION else self.mean_interval
            return of(self.attacks) if self._complete(self.attacks) else (math.nan, math.nan)
        self.right((name,))  # raises if it is not there
        return wilson(int(self.correct[:, self.cases.index(name)].sum()), self.n)

    def union_interval(self, cases: Iterable[str]) -> tuple[float, float]:
        """Return the 95% interval of :meth:`union_of`.

        Raises:
            UserError: one of the cases is not in the report.
        """
        return wilson(int(self.right(cases).sum()), self.n)

    def mean_interval(self, cases: Iterable[str]) -> tuple[float, float]:
        """Return the 95% interval of the mean accuracy over some cases, which share their examples
        (:func:`rome.evaluation.statistics.wilson_mean`)."""
        return wilson_mean(self.correct[:, [self.cases.index(case) for case in cases]].mean(axis=1))

    @cached_property
    def _planned(self) -> dict[str, Mapping[str, Any]]:
        """All cases in the order of the suite, including those that failed or are pending, each with its description
        (:meth:`rome.attacks.suites.base.Case.dump`), which is empty if unknown."""
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
        """Return everything but the matrix as plain data; numbers that are NaN become None."""
        names = (*self.cases, *(() if math.isnan(self.union) else (AVERAGE, UNION)))
        numbers = {
            "clean": self.clean,
            "robust": self.robust,
            "average": self.average,
            "union": self.union,
            "groups": self.groups,
            "unions": self.unions,
        }
        return {
            "n": self.n,
            **{name: _nan_to_none(value) for name, value in numbers.items()},
            "corruptions": list(self.corruptions),
            "intervals": {name: list(self.interval(name)) for name in names},
            **{name: getattr(self, name) for name in _STORED},
            "pending": list(self.pending),
            "settings": self.settings,
        }

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the matrix with its names, as stored in ``matrix.npz``."""
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
            _StoredSettings.model_validate(settings)
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
            said = first_line(error)
            if isinstance(error, ValidationError):
                place, message = next(iter(mistakes(error).items()))
                said = f"{'.'.join(map(str, place))}: {message}"
            raise UserError(
                f"the evaluation in {folder} is damaged ({said}): remove {RESULT} and evaluate again; "
                "finished batches are kept"
            ) from None


def _image_source(corruption: Mapping[str, Any], side: int) -> str:
    """Say where the images of a dumped :class:`rome.attacks.Corruption` come from, for clean images of this side."""
    if corruption.get("path") is not None:
        return f"corrupted images read from CIFAR-10-C in {corruption['path']}"
    whose = {"cifar10-c": "CIFAR-10-C", "imagenet-c": "ImageNet-C"}[corruption.get("constants") or constants_for(side)]
    return f"corrupted images made here with the severities of {whose}, not its images"


def _nan_to_none(value: Any) -> Any:
    """Replace NaN by None, in a number or in a mapping of numbers."""
    if isinstance(value, dict):
        return {name: _nan_to_none(each) for name, each in value.items()}
    return None if math.isnan(value) else value
