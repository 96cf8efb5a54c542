"""Evaluation: cases in, one boolean matrix (examples x cases) out; clean, average and union follow from it.

Every case runs its attacks in order, each on the examples that are still correct, in full batches: the order, the
batches and the seeds of AutoAttack's ``run_standard_evaluation``, with its per-call checks done once. Each attack on
each batch is a unit of work of its own, repeatable by itself: its random numbers depend on the seed alone. A finished
unit is on disk, so an evaluation that was killed goes on where it was.
"""

from __future__ import annotations

import platform
import random
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rome.attacks.autoattack import AttackWarning, Square, collected, cuda_in_use
from rome.attacks.base import Attack, Model, frozen
from rome.errors import UserError
from rome.evaluation.checks import check_data, check_finite, check_mode, check_outputs, device_of
from rome.evaluation.progress import Clock, Watcher, watching
from rome.evaluation.report import CLEAN, UNION, Report
from rome.evaluation.store import Store, Unit, example_images, hash_data, hash_model, versions
from rome.evaluation.suites import Case, Suite, as_named, as_suite
from rome.threats import CIFAR10, Threat

__all__ = ["Case", "Report", "Suite", "evaluate", "example_images", "hash_model"]

SQUARE_MARGIN = 0.002
"""A black-box attack that lowers the accuracy by more than this after the white-box ones (AutoAttack's threshold)."""


def evaluate(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    threats: Threat | Iterable[Threat] | Mapping[str, Threat] = CIFAR10,
    suite: str | Suite = "apgd",
    batch_size: int = 250,
    seed: int = 0,
    device: str | torch.device | None = None,
    out: str | Path | None = None,
    resume: bool = True,
    overwrite: bool = False,
    provenance: Mapping[str, Any] | None = None,
    save_images: bool = True,
    progress: Watcher | bool = False,
) -> Report:
    """Attack the model under every threat and report which examples stay correct.

    Runs in float32 without autocast and TF32. Every adversarial image is checked again before it counts: finite,
    inside its threat (else projected back), and classified anew. The model's flags and the global random states are
    as before afterwards.

    Args:
        model: logits (B, classes) from images in [0, 1], in evaluation mode, deterministic, normalisation inside.
        x: images, float32 (n, C, H, W) in [0, 1]; they may lie on the CPU.
        y: labels, int64 (n,).
        threats: one, several, or a mapping from column names; their own names (``L1``, ``L2``, ``Linf``) otherwise.
        suite: ``apgd`` (E-AT's and RAMP's protocol), ``autoattack`` (all four attacks), or a suite of your own.
        batch_size: examples at a time.
        seed: of the attacks' random starts; the result depends on it, not on how often the run was interrupted.
        device: where the model is; None asks it.
        out: folder to keep the result and every finished batch in.
        resume: go on with what ``out`` holds; a finished result is returned at once.
        overwrite: throw away what ``out`` holds.
        provenance: JSON data to keep with the result: config, checkpoint, data set.
        save_images: keep the adversarial images in ``out`` (float32, only of fooled examples).
        progress: True shows a bar on a terminal and one line a case elsewhere; or a function (see
            :data:`rome.evaluation.progress.Watcher`).

    Raises:
        UserError: what was given would make the numbers wrong (training mode, probabilities, random outputs, inputs
            outside [0, 1] ...), or ``out`` holds an evaluation with other settings.
        Exception: whatever the first attack raised, if every case failed. If only some did, they are in
            ``Report.failed`` and are tried again by the next call.
    """
    suite, named = as_suite(suite), as_named(threats)
    if batch_size < 1 or seed < 0:
        raise UserError(f"batch_size must be at least 1 and seed at least 0, not {batch_size} and {seed}")
    check_data(x, y)
    check_mode(model)
    where = device_of(model, x, device)
    store = Store(Path(out) if out is not None else None)

    settings: dict[str, Any] = {
        "suite": suite.dump(),
        "threats": {name: threat.dump() for name, threat in named.items()},
        "n": len(x),
        "batch_size": batch_size,
        "seed": seed,
        "device": where.type,
        "model": {"type": getattr(model, "_orig_mod", model).__class__.__name__, "sha256": hash_model(model)},
        "data": {"shape": list(x.shape), "sha256": hash_data(x, y)},
        "versions": versions(),
    }
    with _undisturbed(model, where):
        classes = _known_classes(store, settings) if not overwrite else None
        if classes is None:
            classes = check_outputs(model, x[:batch_size].to(where), y)
        cases = suite.cases(named, classes)
        names = [CLEAN, *(case.name for case in cases)]
        if len(set(names)) < len(names) or UNION in names:
            raise UserError(f"cases need different names, none of them 'clean' or 'union'; these are {names[1:]}")
        settings |= {"classes": classes, "cases": [case.dump() for case in cases]}
        settings |= {"save_images": save_images, "provenance": dict(provenance or {})}
        settings["environment"] = {
            "device": torch.cuda.get_device_name(where) if where.type == "cuda" else platform.processor(),
            "python": platform.python_version(),
        }
        settings = store.open(settings, resume=resume, overwrite=overwrite)
        if store.finished and store.directory:
            return Report.load(store.directory)
        with watching(progress) as watch:
            run = _Run(model, x, y, where, cases, batch_size, seed, store, settings["save_images"], watch)
            report = run.report(settings)
    store.finish(report.arrays(), report.to_json())
    return report


def _known_classes(store: Store, settings: dict[str, Any]) -> int | None:
    """The number of classes as stored, if the model is the one that was stored: then no forward is needed."""
    stored = store.stored_settings()
    if not stored or not store.finished or stored["model"] != settings["model"] or not settings["model"]["sha256"]:
        return None
    return int(stored["classes"])


@dataclass
class _Run:
    """One evaluation under way."""

    model: Model
    x: Tensor
    y: Tensor
    device: torch.device
    cases: list[Case]
    batch_size: int
    seed: int
    store: Store
    save_images: bool
    watch: Watcher
    warnings: list[dict[str, Any]] = field(default_factory=list)
    after: dict[str, dict[str, float]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def report(self, settings: dict[str, Any]) -> Report:
        clean = self.clean()
        clock = Clock(self.cases, self.batch_size)
        columns, names, errors = [clean], [CLEAN], {}
        for number, case in enumerate(self.cases):
            try:
                columns.append(self.case(number, clean, clock))
                names.append(case.name)
            except Exception as error:  # the other cases go on; this one is reported and tried again next time
                errors[case.name] = error
                if isinstance(error, torch.OutOfMemoryError):
                    error.__traceback__ = None  # its frames hold the tensors that filled the memory
                    torch.cuda.empty_cache()
        if errors and len(names) == 1:
            raise next(iter(errors.values()))
        return Report(
            correct=np.stack(columns, axis=1),
            cases=tuple(names),
            labels=self.y.cpu().numpy(),
            indices=np.arange(len(self.x)),
            settings=settings,
            warnings=self.warnings,
            failed={name: _told(error) for name, error in errors.items()},
            after=self.after,
            seconds=self.seconds,
        )

    def clean(self) -> np.ndarray:
        """Which examples are classified correctly: bool (n,)."""
        everything = np.arange(len(self.x))
        done = self.store.read(CLEAN, everything)
        if done is None:
            correct = []
            for part in self.parts(everything):
                x, y = self.batch(part)
                logits = self.model(x).float()
                check_finite(logits)
                correct.append((logits.argmax(1) == y).cpu().numpy())
            done = Unit(everything, np.concatenate(correct))
            self.store.write(CLEAN, done)
        return done.correct

    def case(self, number: int, clean: np.ndarray, clock: Clock) -> np.ndarray:
        """Which examples are still correct after all attacks of a case: bool (n,)."""
        case, robust = self.cases[number], clean.copy()
        after: dict[str, float] = {}
        found: list[dict[str, Any]] = []
        if case.note:
            found.append(_warning("fewer-attacks", case, None, 0, case.note))
        seconds, done = 0.0, 0
        for stage, attack in enumerate(case.attacks):
            before = robust.mean()
            parts = self.parts(np.flatnonzero(robust))
            waiting = int(robust.sum())
            for index, part in enumerate(parts):
                unit, fresh = self.unit(case, stage, index, part)
                robust[part] = unit.correct
                seconds += unit.facts["seconds"]
                found += unit.facts["warnings"]
                if fresh:
                    clock.spent(case, attack, len(part), unit.facts["seconds"])
                waiting, done = waiting - len(part), done + 1
                later = len(case.attacks) - stage - 1
                total = done + len(parts) - index - 1 + later * clock.batches(int(robust.sum()))
                left = clock.left(number, stage, waiting, int(robust.sum()), int(clean.sum()))
                self.watch(case.name, done, total, float(robust.mean()), left)
            name = attack.kind if attack.kind not in after else f"{attack.kind}-{stage}"
            after[name] = float(robust.mean())
            if attack.kind == Square.kind and stage > 0 and before - robust.mean() > SQUARE_MARGIN:
                message = (
                    f"Square, which sees no gradients, lowered the accuracy by {100 * (before - robust.mean()):.1f} "
                    "points after the white-box attacks: gradients may be masked, the true robustness lower"
                )
                found.append(_warning("black-box-beats-white-box", case, attack, int(robust.sum()), message))
        if not done:
            self.watch(case.name, 0, 0, float(robust.mean()), None)
        self.after[case.name], self.seconds[case.name] = after, round(seconds, 3)
        self.warnings += _summed(found)
        return robust

    def unit(self, case: Case, stage: int, index: int, part: np.ndarray) -> tuple[Unit, bool]:
        """One attack on one batch, from disk if it is there; and whether it was run now."""
        attack = case.attacks[stage]
        key = f"{case.name}/{stage}-{attack.kind}-{index:05d}"
        unit = self.store.read(key, part)
        if unit is not None and (unit.images is not None or not self.save_images):
            return unit, False
        start = time.perf_counter()
        x, y = self.batch(part)
        noticed: list[AttackWarning] = []
        with collected(noticed):
            generator = torch.Generator().manual_seed(self.seed)
            found = attack.run(self.model, x, y, case.threat, generator=generator).adversarial
        images, correct, doubts = _recheck(self.model, x, y, found, case.threat)
        doubts += [(notice.check, notice.examples, notice.message) for notice in noticed]
        right = correct.cpu().numpy()
        facts = {
            "seconds": time.perf_counter() - start,
            "warnings": [_warning(check, case, attack, examples, message) for check, examples, message in doubts],
        }
        unit = Unit(part, right, images[~correct].cpu() if self.save_images and self.store.directory else None, facts)
        self.store.write(key, unit)
        return unit, True

    def parts(self, indices: np.ndarray) -> list[np.ndarray]:
        return [indices[i : i + self.batch_size] for i in range(0, len(indices), self.batch_size)]

    def batch(self, part: np.ndarray) -> tuple[Tensor, Tensor]:
        rows = torch.from_numpy(part)
        x, y = self.x[rows.to(self.x.device)], self.y[rows.to(self.y.device)]
        return x.to(self.device).contiguous(), y.to(self.device)


def _recheck(
    model: Model, x: Tensor, y: Tensor, found: Tensor, threat: Threat
) -> tuple[Tensor, Tensor, list[tuple[str, int, str]]]:
    """What an attack returned, made valid, classified anew, with what was wrong with it.

    Outside its threat an image is projected back; not finite, or not to be projected, it is replaced by the original.
    """
    if found.shape != x.shape:
        raise RuntimeError(f"the attack returned images {tuple(found.shape)} for {tuple(x.shape)}")
    found = found.detach().to(x)
    broken = ~found.isfinite().flatten(1).all(dim=1)
    found = torch.where(broken.view(-1, 1, 1, 1), x, found)
    outside = ~threat.contains(found, x)
    if bool(outside.any()):
        found[outside] = threat.project(found[outside], x[outside])
        broken |= ~threat.contains(found, x)
        found = torch.where(broken.view(-1, 1, 1, 1), x, found)
    logits = model(found).float()
    unclear = ~logits.isfinite().all(dim=1)
    correct = (logits.argmax(1) == y) & ~unclear
    doubts = [
        ("left-threat", outside, "they lay outside their threat: projected back and classified anew"),
        ("broken-image", broken, "they were not finite or could not be projected: replaced by the clean images"),
        ("non-finite-logits", unclear, "the logits of their adversarial images are not finite: counted as wrong"),
    ]
    counts = [(check, int(which.sum()), text) for check, which, text in doubts]
    return found, correct, [doubt for doubt in counts if doubt[1]]


def _warning(check: str, case: Case, attack: Attack | None, examples: int, message: str) -> dict[str, Any]:
    kind = attack.kind if attack else None
    return {"check": check, "case": case.name, "attack": kind, "examples": examples, "message": message}


def _told(error: Exception) -> str:
    advice = "; try a smaller batch_size" if isinstance(error, torch.OutOfMemoryError) else ""
    return f"{type(error).__name__}: {error}{advice}"


def _summed(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One warning for each check of each attack, its examples added up over the batches."""
    merged: dict[tuple[str, str | None], dict[str, Any]] = {}
    for warning in found:
        key = (warning["check"], warning["attack"])
        if key in merged:
            merged[key]["examples"] += warning["examples"]
        else:
            merged[key] = dict(warning)
    return list(merged.values())


@contextmanager
def _undisturbed(model: Model, device: torch.device) -> Iterator[None]:
    """Strict float32, no graph, no autocast; the model's flags and all global random states as before afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    matmul: Any = torch.backends.cuda.matmul
    conv: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    precisions = matmul.fp32_precision, conv.fp32_precision
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=cuda_in_use()))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(frozen(model))
        try:
            matmul.fp32_precision = conv.fp32_precision = "ieee"
            yield
        finally:
            matmul.fp32_precision, conv.fp32_precision = precisions
            random.setstate(python)
            np.random.set_state(numpy)
