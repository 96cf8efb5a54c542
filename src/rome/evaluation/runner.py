"""Run an evaluation: the clean images, then case after case, each attack on the examples that are still correct."""

from __future__ import annotations

import sys
import time
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rome.attacks.base import NOT_EVALUATED, Attack, AttackResult, Group
from rome.attacks.engine import Model
from rome.attacks.lp.autoattack import AttackWarning, Square, collected
from rome.attacks.suites.base import Case, SaveImages
from rome.core.device import float32_products, out_of_memory
from rome.core.distributed import Team
from rome.core.errors import Interrupted
from rome.core.files import now
from rome.core.randomness import Stream
from rome.evaluation.batch import (
    NOT_FINITE,
    Examples,
    FixedChange,
    format_error,
    in_whole_levels,
    merge_warnings,
    recheck,
    warning,
)
from rome.evaluation.checks import refuse_not_finite
from rome.evaluation.memory import Halving, free
from rome.evaluation.progress import ProgressCallback
from rome.evaluation.result import CLEAN, Report
from rome.evaluation.store import BatchResult, StorageError, Store
from rome.models.folding import Fold, foldable, folded
from rome.threats import AnyImage, LpBall

SQUARE_MARGIN = 0.002
"""Largest drop in accuracy by Square after the white-box attacks that raises no warning (AutoAttack's threshold)."""


class Unchanged(Attack):
    """Leaves the images as they are. It has no kind, so that no config can name it."""

    accepts = (AnyImage, "leaves images as they are")

    def search(self, model: Model, x: Tensor, y: Tensor, groups: list[Group], noise: Tensor) -> AttackResult:
        return AttackResult(x, x, torch.ones_like(y, dtype=torch.bool), NOT_EVALUATED)


CLEAN_CASE = Case(name=CLEAN, threat=AnyImage(), attacks=(Unchanged.model_construct(),), on_all=True)
"""The case of the first column: the clean images."""


class Column(NamedTuple):
    """Result of a case; its fields become those of a :class:`rome.evaluation.result.Report`."""

    correct: np.ndarray
    """bool (n,): the examples that are correct after the case."""
    after: dict[str, float]
    seconds: float
    warnings: list[dict[str, Any]]
    dates: list[str]
    """For each of its batches the date it was run; an empty string for one that is run now."""


@dataclass
class CaseRunner:
    """Runs the cases and fills a report."""

    model: Model
    examples: Examples
    cases: list[Case]
    settings: dict[str, Any]
    """The evaluation's settings, of which these are used: ``batch_size``, ``seed``, ``save_images``,
    ``search_precision`` and ``networks``.

    ``networks`` maps a case to the SHA-256 of the network file that measures its perceptual distances; a batch measured
    by a different network is run again.
    """
    store: Store
    watch: ProgressCallback
    halving: Halving
    team: Team
    verbose: bool
    """Whether to print the error of a failing case at once."""

    def report(self, wanted: Collection[str]) -> Report:
        """Run the cases that are wanted, and report on them and on those on disk; the others are pending.

        Raises:
            StorageError: a finished batch cannot be stored.
            Exception: the first failed case's error, if no case succeeded.
        """
        clean = self.column(CLEAN_CASE, np.ones(len(self.examples.x), dtype=bool), run=True)
        assert clean is not None
        bad = sum(each["examples"] for each in clean.warnings if each["check"] == NOT_FINITE)
        refuse_not_finite(bad, len(clean.correct))
        columns, errors, pending = {CLEAN: clean}, dict[str, Exception](), list[str]()
        for case in self.cases:
            start = np.ones_like(clean.correct) if case.on_all else clean.correct
            try:
                column = self.column(case, start, run=case.name in wanted)
            except (Interrupted, StorageError):  # the other cases could not be run or stored either
                raise
            except Exception as error:  # run the other cases; this one is reported, and the next call tries it again
                if out_of_memory(error):
                    free(error)
                errors[case.name] = error
                if self.verbose:  # now, not after hours of other cases
                    print(f"{case.name}: failed: {format_error(error)}", file=sys.stderr)
                continue
            if column is None:
                pending.append(case.name)
            else:
                columns[case.name] = column
        if errors and len(columns) == 1:
            raise next(iter(errors.values()))
        attacked = {name: column for name, column in columns.items() if name != CLEAN}
        return Report(
            correct=np.stack([column.correct for column in columns.values()], axis=1),
            cases=tuple(columns),
            labels=self.examples.y.cpu().numpy(),
            indices=np.arange(len(clean.correct)),
            settings=self.settings,
            warnings=[each for column in attacked.values() for each in column.warnings],
            failed={name: format_error(error) for name, error in errors.items()},
            pending=tuple(pending),
            after={name: column.after for name, column in attacked.items()},
            seconds={name: round(column.seconds, 3) for name, column in attacked.items()},
            date=now(),
            reused=_reused(columns),
        )

    def column(self, case: Case, correct: np.ndarray, *, run: bool) -> Column | None:
        """Run all attacks of a case on the examples that are ``correct``, bool (n,), before it.

        Without ``run``, only read it from disk; None unless every batch is there.
        """
        correct = correct.copy()
        after: dict[str, float] = {}
        found = [warning("fewer-attacks", case.name, None, 0, case.note)] if case.note else []
        seconds, dates = 0.0, list[str]()
        for stage, attack in enumerate(case.attacks):
            before = correct.mean()
            units = self.stage(case, stage, correct, run=run, done=len(dates))
            if units is None:
                return None
            for unit in units:
                correct[unit.indices] = unit.correct
                seconds += unit.facts["seconds"]
                found += unit.facts["warnings"]
                dates.append(unit.facts.get("date", ""))
            name = attack.kind if attack.kind not in after else f"{attack.kind}-{stage}"
            after[name] = float(correct.mean())
            if attack.kind == Square.kind and stage > 0 and before - correct.mean() > SQUARE_MARGIN:
                message = (
                    f"Square, which sees no gradients, lowered the accuracy by {100 * (before - correct.mean()):.1f} "
                    "points after the white-box attacks: gradients may be masked, and the true robustness lower"
                )
                found.append(warning("black-box-beats-white-box", case.name, attack, int(correct.sum()), message))
        if run and case is not CLEAN_CASE:
            self.watch(case.name, len(dates), len(dates), float(correct.mean()))
        return Column(correct, after, seconds, merge_warnings(found), dates)

    def stage(self, case: Case, stage: int, correct: np.ndarray, *, run: bool, done: int) -> list[BatchResult] | None:
        """Run one attack on all batches of the ``correct`` examples, (n,), each process on its share of the batches.

        None as for :meth:`column`; ``done`` is the number of the case's batches in earlier stages.
        """
        remaining, indices, size = correct.copy(), np.flatnonzero(correct), self.settings["batch_size"]
        parts = [indices[i : i + size] for i in range(0, len(indices), size)]

        def work() -> dict[int, BatchResult]:
            units: dict[int, BatchResult] = {}
            for index in range(self.team.rank, len(parts), self.team.world):
                unit = self.unit(case, stage, index, parts[index], run=run)
                if unit is None:
                    break
                units[index] = replace(unit, images=None)  # they are not sent to the other processes
                remaining[parts[index]] = unit.correct
                # the other processes are about as far as this one
                finished = done + min(index - self.team.rank + self.team.world, len(parts))
                later = (len(case.attacks) - stage - 1) * -(-int(remaining.sum()) // size)
                total = done + len(parts) + later
                if run and case is not CLEAN_CASE and finished < total:  # column() makes a case's last call
                    self.watch(case.name, finished, total, float(remaining.mean()))
            return units

        units = {index: unit for share in self.team.together(work) for index, unit in share.items()}
        return [units[index] for index in range(len(parts))] if len(units) == len(parts) else None

    def unit(self, case: Case, stage: int, index: int, part: np.ndarray, *, run: bool) -> BatchResult | None:
        """Run one attack on one batch, or read it from disk; None without ``run`` if it is not there."""
        key = f"{case.name}/{stage}-{case.attacks[stage].kind or case.name}-{index:05d}"
        keep: SaveImages = "none" if case.on_all else self.settings["save_images"]  # a fixed change can be made again
        unit, network = self.store.read(key, part), self.settings["networks"].get(case.name)
        if unit is not None and network and unit.facts.get("network", network) != network:
            unit = None
        if unit is not None and (unit.images is not None or keep == "none"):
            return unit
        if not run:
            return None
        unit = self.attack(case, stage, part, keep="none" if self.store.directory is None else keep)
        if network:
            unit.facts["network"] = network
        self.store.write(key, unit)
        return unit

    @cached_property
    def folds(self) -> list[Fold]:
        """BatchNorms that the convolutions before them compute during attacks; images are rechecked without folding."""
        few = min(2, len(self.examples.x), self.settings["batch_size"])  # a batch size that the model is known to take
        return foldable(self.model, self.examples.batch(np.arange(few))[0])

    def attack(self, case: Case, stage: int, part: np.ndarray, *, keep: SaveImages) -> BatchResult:
        """Run a case's attack number ``stage`` on the examples ``part`` (b,).

        The random numbers depend on the seed alone. The adversarial images are rechecked (:func:`recheck`) before they
        count.
        """
        attack = case.attacks[stage]
        # attacks outside Lp balls check their own bounds
        precision = self.settings["search_precision"] if isinstance(case.threat, LpBall) else "fp32"
        start = time.perf_counter()
        noticed: list[AttackWarning] = []

        def work(piece: np.ndarray) -> tuple[np.ndarray, Tensor, list[dict[str, Any]]]:
            x, y = self.examples.batch(piece)
            if case.on_all and isinstance(attack, FixedChange):
                source = Stream(torch.Generator().manual_seed(self.settings["seed"]))
                changed = attack.images(x, y, torch.from_numpy(piece), source)
                images, correct, warnings = recheck(self.model, x, y, changed, case, attack)
            else:
                images, correct, warnings = self._attack_batch(case, attack, x, y, precision)
            if keep != "none" and isinstance(case.threat, LpBall):
                images = in_whole_levels(self.model, x, y, images, correct, case.threat)
            kept = {"none": NOT_EVALUATED, "fooled": images[~correct], "all": images}[keep]
            return correct.cpu().numpy(), kept.cpu(), warnings

        with collected(noticed):
            pieces = self.halving.run(f"{case.name}/{attack.kind}", part, work)
        correct, images, found = zip(*(found for _, found in pieces), strict=True)
        warnings = [each for some in found for each in some]
        warnings += [warning(each.check, case.name, attack, each.examples, each.message) for each in noticed]
        if len(pieces) > 1:
            message = (
                f"there was not enough memory for {self.settings['batch_size']} examples at a time: run in batches of "
                f"at most {max(len(piece) for piece, _ in pieces)}, whose random starts differ"
            )
            warnings.append(warning("out-of-memory", case.name, attack, len(part), message))
        facts = {"seconds": time.perf_counter() - start, "warnings": warnings}
        return BatchResult(part, np.concatenate(correct), torch.cat(images) if keep != "none" else None, facts)

    def _attack_batch(
        self, case: Case, attack: Attack, x: Tensor, y: Tensor, precision: str
    ) -> tuple[Tensor, Tensor, list[dict[str, Any]]]:
        """Attack a batch in this precision and recheck the images in float32. An example that only the attack considers
        fooled, because of its precision, is attacked once more in float32: it might not have been searched at all."""
        generator = torch.Generator().manual_seed(self.settings["seed"])
        with folded(self.folds), float32_products(precision):
            found = attack.run(self.model, x, y, case.threat, generator=generator)
        images, correct, warnings = recheck(self.model, x, y, found.adversarial, case, attack)
        doubtful = correct & ~found.robust
        if precision != "fp32" and bool(doubtful.any()):
            again = self._attack_batch(case, attack, x[doubtful], y[doubtful], "fp32")
            images[doubtful], correct[doubtful] = again[:2]
            warnings += again[2]
        return images, correct, warnings


def _reused(columns: dict[str, Column]) -> dict[str, Any]:
    """Build :attr:`rome.evaluation.result.Report.reused`."""
    taken = {name: list(filter(None, column.dates)) for name, column in columns.items()}
    dates = sorted(date for some in taken.values() for date in some)
    if not dates:
        return {}
    count = {"batches": len(dates), "of": sum(len(column.dates) for column in columns.values())}
    return {**count, "cases": [name for name, some in taken.items() if some], "first": dates[0], "last": dates[-1]}
