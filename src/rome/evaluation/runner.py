"""An evaluation under way: clean examples, then case after case, each attack on those that are still correct."""

from __future__ import annotations

import sys
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rome.attacks.engine import Model
from rome.attacks.lp.autoattack import Square
from rome.attacks.suites.base import Case
from rome.core.device import out_of_memory
from rome.core.distributed import Team
from rome.core.errors import Interrupted
from rome.core.files import now
from rome.evaluation.batch import Examples, attack_batch, summed, told, warning
from rome.evaluation.checks import check_finite
from rome.evaluation.memory import Halving, free
from rome.evaluation.progress import ProgressCallback
from rome.evaluation.result import CLEAN, Report
from rome.evaluation.store import BatchResult, StorageError, Store

SQUARE_MARGIN = 0.002
"""A black-box attack that lowers the accuracy by more than this after the white-box ones (AutoAttack's threshold)."""


@dataclass
class CaseRunner:
    """Runs the cases and fills a report."""

    model: Model
    examples: Examples
    cases: list[Case]
    batch_size: int
    seed: int
    store: Store
    networks: dict[str, str]
    """Case -> SHA-256 of the file whose network measures for it. A batch that another one measured is done again."""
    save_images: bool
    watch: ProgressCallback
    halving: Halving
    team: Team
    verbose: bool
    """Whether what is worth a line is said on standard error."""
    warnings: list[dict[str, Any]] = field(default_factory=list)
    after: dict[str, dict[str, float]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    said: bool = False
    """Whether it was said that memory did not suffice."""
    dates: dict[str, list[str]] = field(default_factory=dict)
    """Column -> when its batches were run, for each batch of it that an earlier call ran; empty for one run now."""

    def report(self, settings: dict[str, Any], wanted: Collection[str]) -> Report:
        """All cases that are wanted or on disk; the others are pending.

        Raises:
            StorageError: a finished batch cannot be kept.
            Exception: whatever the first case raised, if none of them ended well.
        """
        clean = self.clean()
        columns, names, errors, pending = [clean], [CLEAN], dict[str, Exception](), list[str]()
        for case in self.cases:
            try:
                column = self.case(case, clean, run=case.name in wanted)
            except (Interrupted, StorageError):  # there is no sense in going on
                raise
            except Exception as error:  # the other cases go on; this one is reported and tried again next time
                if out_of_memory(error):
                    free(error)
                errors[case.name] = error
                if self.verbose:  # now, not after hours of other cases
                    print(f"{case.name}: failed: {told(error)}", file=sys.stderr)
                continue
            if column is None:
                pending.append(case.name)
            else:
                columns.append(column)
                names.append(case.name)
        if errors and len(names) == 1:
            raise next(iter(errors.values()))
        return Report(
            correct=np.stack(columns, axis=1),
            cases=tuple(names),
            labels=self.examples.y.cpu().numpy(),
            indices=np.arange(len(clean)),
            settings=settings,
            warnings=self.warnings,
            failed={name: told(error) for name, error in errors.items()},
            pending=tuple(pending),
            after=self.after,
            seconds=self.seconds,
            date=now(),
            reused=self.reused,
        )

    @property
    def reused(self) -> dict[str, Any]:
        """As in a report."""
        taken = {name: list(filter(None, dates)) for name, dates in self.dates.items()}
        dates = sorted(date for some in taken.values() for date in some)
        if not dates:
            return {}
        cases = [name for name, some in taken.items() if some]
        count = {"batches": len(dates), "of": sum(map(len, self.dates.values()))}
        return {**count, "cases": cases, "first": dates[0], "last": dates[-1]}

    def clean(self) -> np.ndarray:
        """Which examples are classified correctly: bool (n,)."""
        everything = np.arange(len(self.examples.x))
        done = self.team.first(lambda: self.store.read(CLEAN, everything))
        if done is None:
            parts = self.parts(everything)

            def right(part: np.ndarray) -> np.ndarray:
                return np.concatenate([some for _, some in self.halving.run(CLEAN, part, self._right)])

            def work() -> dict[int, np.ndarray]:
                return {index: right(parts[index]) for index in range(self.team.rank, len(parts), self.team.world)}

            verdicts = {index: some for share in self.team.together(work) for index, some in share.items()}
            unit = done = BatchResult(everything, np.concatenate([verdicts[index] for index in range(len(parts))]))
            self.team.first(lambda: self.store.write(CLEAN, unit))
        self.dates[CLEAN] = [done.facts.get("date", "")]
        return done.correct

    def _right(self, part: np.ndarray) -> np.ndarray:
        x, y = self.examples.batch(part)
        logits = self.model(x).float()
        check_finite(logits)
        return (logits.argmax(1) == y).cpu().numpy()

    def case(self, case: Case, clean: np.ndarray, *, run: bool) -> np.ndarray | None:
        """Which examples are still correct after all attacks of a case: bool (n,).

        Without ``run``: None unless every batch of the case is on disk.
        """
        robust = np.ones_like(clean) if case.on_all else clean.copy()
        after: dict[str, float] = {}
        found = [warning("fewer-attacks", case, None, 0, case.note)] if case.note else []
        seconds, done, dates = 0.0, 0, list[str]()
        for stage, attack in enumerate(case.attacks):
            before = robust.mean()
            parts = self.parts(np.flatnonzero(robust))
            units = self.stage(case, stage, parts, robust, run, done)
            if units is None:
                return None
            pieces: list[int] = []
            for part, unit in zip(parts, units, strict=True):
                robust[part] = unit.correct
                seconds += unit.facts["seconds"]
                found += unit.facts["warnings"]
                pieces += unit.facts.get("pieces", [])
                dates.append(unit.facts.get("date", ""))
            if pieces:
                found.append(self._halved(case, stage, pieces))
            done += len(parts)
            name = attack.kind if attack.kind not in after else f"{attack.kind}-{stage}"
            after[name] = float(robust.mean())
            if attack.kind == Square.kind and stage > 0 and before - robust.mean() > SQUARE_MARGIN:
                message = (
                    f"Square, which sees no gradients, lowered the accuracy by {100 * (before - robust.mean()):.1f} "
                    "points after the white-box attacks: gradients may be masked, the true robustness lower"
                )
                found.append(warning("black-box-beats-white-box", case, attack, int(robust.sum()), message))
        if run:
            self.watch(case.name, done, done, float(robust.mean()))
        self.after[case.name], self.seconds[case.name], self.dates[case.name] = after, round(seconds, 3), dates
        self.warnings += summed(found)
        return robust

    def stage(
        self, case: Case, stage: int, parts: list[np.ndarray], robust: np.ndarray, run: bool, done: int
    ) -> list[BatchResult] | None:
        """One attack on all batches, each process on its share of them; the images stay with the process."""
        robust = robust.copy()

        def work() -> dict[int, BatchResult | None]:
            units: dict[int, BatchResult | None] = {}
            for index in range(self.team.rank, len(parts), self.team.world):
                part = parts[index]
                unit = self.unit(case, stage, index, part, run=run)
                units[index] = unit and BatchResult(unit.indices, unit.correct, None, unit.facts)
                if unit is None:
                    break
                robust[part] = unit.correct
                if run:
                    over = min(index - self.team.rank + self.team.world, len(parts))  # the others are about as far
                    later = (len(case.attacks) - stage - 1) * -(-int(robust.sum()) // self.batch_size)
                    total = done + len(parts) + later
                    if done + over < total:  # the last call of a case is the case's own
                        self.watch(case.name, done + over, total, float(robust.mean()))
            return units

        units = {index: unit for share in self.team.together(work) for index, unit in share.items()}
        found = [unit for index in range(len(parts)) if (unit := units.get(index)) is not None]
        return found if len(found) == len(parts) else None

    def unit(self, case: Case, stage: int, index: int, part: np.ndarray, *, run: bool) -> BatchResult | None:
        """One attack on one batch, from disk if it is there."""
        key = f"{case.name}/{stage}-{case.attacks[stage].kind}-{index:05d}"
        keep = self.save_images and not case.on_all  # a fixed change can be made again
        unit, network = self.store.read(key, part), self.networks.get(case.name)
        if unit is not None and network and unit.facts.get("network", network) != network:
            unit = None
        if unit is not None and (unit.images is not None or not keep):
            return unit
        if not run:
            return None
        unit = attack_batch(
            self.model,
            self.examples,
            case,
            stage,
            part,
            seed=self.seed,
            keep_images=keep and self.store.directory is not None,
            halving=self.halving,
        )
        if network:
            unit.facts["network"] = network
        self.store.write(key, unit)
        return unit

    def _halved(self, case: Case, stage: int, pieces: list[int]) -> dict[str, Any]:
        message = (
            f"memory did not suffice for {self.batch_size} examples at a time: run in batches of at most "
            f"{max(pieces)}, whose random starts are others"
        )
        if self.verbose and not self.said:
            print(f"{case.name}: {message}", file=sys.stderr)
            self.said = True
        return warning("out-of-memory", case, case.attacks[stage], sum(pieces), message)

    def parts(self, indices: np.ndarray) -> list[np.ndarray]:
        return [indices[i : i + self.batch_size] for i in range(0, len(indices), self.batch_size)]
