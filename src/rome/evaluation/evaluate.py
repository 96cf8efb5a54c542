"""Evaluate a model: run the cases of a suite and return one boolean matrix (examples x cases).

Clean accuracy, average and union are computed from the matrix. Every case runs its attacks in order, each on the
examples that are still correct, in full batches: the order, batches and seeds of AutoAttack's
``run_standard_evaluation``, with its per-call checks done once. One attack on one batch is a unit of work that can be
repeated by itself, since its random numbers depend on the seed alone. So units can be shared among processes, and as
each finished unit is on disk, an evaluation that was killed continues where it stopped.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from rome.attacks.engine import Model, frozen, graphed
from rome.attacks.perceptual.features import network_hash
from rome.attacks.suites import (
    BATCH_SIZE,
    Case,
    SaveImages,
    SearchPrecision,
    Suite,
    SuiteChoice,
    as_suite,
    name_threats,
)
from rome.core import trust
from rome.core.console import say
from rome.core.device import float32_products
from rome.core.distributed import ALONE, Team
from rome.core.errors import UserError, did_you_mean
from rome.core.graphs import Graphs
from rome.core.randomness import unchanged_states
from rome.data.base import Pixels
from rome.evaluation.batch import Examples
from rome.evaluation.checks import (
    check_data,
    check_gradient,
    check_mode,
    check_outputs,
    check_search_precision,
    device_of,
)
from rome.evaluation.identity import (
    CHANGING,
    changed_names,
    code_of,
    facts_without_tensors,
    hash_data,
    hash_model,
    identity,
    versions,
    without_changing,
)
from rome.evaluation.masking import as_warnings, run_checks, worth_checking
from rome.evaluation.memory import Halving
from rome.evaluation.progress import ProgressCallback, watching
from rome.evaluation.result import CLEAN, UNION, Report
from rome.evaluation.runner import CaseRunner
from rome.evaluation.store import Store, example_images, fingerprint, finished
from rome.threats import CIFAR10, Threat

__all__ = ["Case", "Report", "Suite", "SuiteChoice", "evaluate", "example_images", "hash_model"]

AUTO = "auto"


@trust.opens_files
def evaluate(
    model: Model,
    x: Tensor | Pixels,
    y: Tensor,
    *,
    threats: Threat | Iterable[Threat] | Mapping[str, Threat] = CIFAR10,
    suite: str | Suite | Iterable[str | Suite] = "apgd",
    cases: Iterable[str] | None = None,
    batch_size: int | Literal["auto"] = BATCH_SIZE,
    seed: int = 0,
    device: str | torch.device | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    provenance: Mapping[str, Any] | None = None,
    save_images: SaveImages = "fooled",
    search_precision: SearchPrecision = "fp32",
    checks: bool | None = None,
    team: Team = ALONE,
    progress: ProgressCallback | bool = False,
    trust_code: bool = False,
) -> Report:
    """Attack the model under every threat and report which examples stay correct.

    Runs in float32 without autocast and, unless ``search_precision`` is ``tf32``, TF32. Every adversarial image is
    checked before it counts: it must be finite and inside its threat (else it is projected back), and is classified
    again in float32. The model's flags and the global random states are restored afterwards.

    Args:
        model: maps images in [0, 1] to logits (B, classes); in evaluation mode, deterministic, normalisation inside.
        x: images, float32 (n, C, H, W) in [0, 1], or the decoded bytes (:class:`rome.data.base.Pixels`), which take a
            quarter of the memory; they may be on the CPU.
        y: labels, int64 (n,).
        threats: one, several, or a mapping from column names to threats; without it, columns have the threats' own
            names (``L1``, ``L2``, ``Linf``).
        suite: ``apgd`` (E-AT's and RAMP's protocol), ``autoattack`` (all four attacks), ``lp`` (a quick look),
            ``unseen``, ``corruptions``, ``all``, several of these, or a suite of your own.
        cases: run only these columns of the suite now; the others are ``pending`` in the result, unless ``out`` holds
            them already. A later call runs them.
        batch_size: examples per batch. ``auto`` starts at 250 and halves a batch as often as memory requires; the
            result has a warning then.
        seed: seeds the attacks' random starts; the result depends on it, not on how often the run was interrupted.
        device: the device that the model is on; None for the one found in the model.
        out: folder for the result and every finished batch. An evaluation continues from the batches in it, and a
            finished result is returned at once. ``Report.reused`` and a line on standard error say what was reused.
            If ``out`` holds an evaluation of a function that is no module, or of an object that cannot be told apart
            from others of its kind, the call is refused unless ``overwrite`` is set.
        overwrite: delete the evaluation in ``out`` first.
        provenance: JSON data to keep with the result: config, checkpoint, data set.
        save_images: which adversarial images are kept in ``out``: ``none``, those of the examples that an attack
            ``fooled``, or ``all`` that it attacked; never those of fixed changes, which can be made again. For an Lp
            ball, an image is rounded to whole grey levels and kept in 8 bits where that stays inside the ball and does
            not change whether it is classified correctly; otherwise it is kept in float32.
        search_precision: with ``tf32``, attacks in Lp balls, and nothing else, compute products and convolutions in
            TF32, for which NVIDIA GPUs have faster units since Ampere; older ones compute in fp32 all the same. An
            image that fools the model only in TF32 is attacked once more in fp32.
            Other attacks check their bounds, such as a perceptual distance, themselves, and stay in fp32.
        checks: look for signs of masked gradients (:mod:`rome.evaluation.masking`). None does so for at least 100
            examples if the checks cost less than a tenth of the suite. True also adds the checks to a finished result
            that lacks them.
        team: the processes that share the work (:func:`rome.core.distributed.launched`); each calls this function
            with the same arguments and gets the same report, equal to that of a single process.
        progress: True shows a bar on a terminal, and one line per case elsewhere; or a function
            (:data:`rome.evaluation.progress.ProgressCallback`). Only the first process shows progress.
        trust_code: let the file of a network that measures perceptual distances run the code that it names
            (:mod:`rome.core.trust`).

    Raises:
        UserError: the model or the data would make the numbers wrong (training mode, probabilities, random outputs,
            outputs that depend on the other images of a batch, inputs outside [0, 1] ...); the device has no TF32 for
            the search; ``out`` holds an evaluation with other settings, of another model or with other code
            (:mod:`rome.evaluation.identity`); or the disk is full.
        Interrupted: another process of the team ended.
        Exception: the first failed case's error, if every case failed. If only some failed, they are in
            ``Report.failed`` and the next call tries them again.
    """
    suite, named = as_suite(suite), name_threats(threats)
    size = BATCH_SIZE if batch_size == AUTO else batch_size
    if not isinstance(size, int) or size < 1 or not 0 <= seed < 2**63:
        raise UserError(f"batch_size must be at least 1 (or 'auto') and seed from 0 to 2^63 - 1: {batch_size}, {seed}")
    if save_images not in get_args(SaveImages):
        raise UserError(f"save_images must be one of {', '.join(get_args(SaveImages))}, not {save_images!r}")
    check_data(x, y)
    check_mode(model)
    device = device_of(model, x, device)
    check_search_precision(search_precision, device)
    examples, halving = Examples(x, y, device), Halving(allowed=batch_size == AUTO)
    store = Store(Path(out) if out is not None else None)
    verbose = bool(progress) and team.is_main

    facts = identity(model)
    settings: dict[str, Any] = {
        "suite": suite.dump(),
        "threats": {name: threat.dump() for name, threat in named.items()},
        "n": len(x),
        "batch_size": size,
        "seed": seed,
        "search_precision": search_precision,
        "device": device.type,
        "data": {"shape": list(x.shape), "sha256": hash_data(x, y)},
        "versions": versions(),
        "save_images": save_images,
        "provenance": dict(provenance or {}),
        "environment": {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor(),
            "python": platform.python_version(),
        },
    }
    # batches shrink as examples are fooled; padded to a multiple of a quarter of a full batch, they have few shapes
    graphs = Graphs(whole_searches=False, rows=-(-size // 4)) if device.type == "cuda" else None
    with _undisturbed(model, device, graphs):
        stored, done = team.first(lambda: (None, None) if overwrite else (store.settings(), store.result()))
        changing = set(stored["model"].get(CHANGING, ())) if stored else set()
        settings["model"] = without_changing(facts, changing)
        known = stored and finished(done) and stored["model"] == settings["model"] and facts["sha256"]
        if stored and known:  # no forward pass is needed
            classes = int(stored["classes"])
        else:
            first, last = np.arange(min(size, len(x))), len(x) % size
            answers = team.together(
                lambda: halving.run(
                    f"{CLEAN}/",  # the name of the clean column's work
                    first,
                    lambda part: check_outputs(model, examples.batch(part)[0], y, last=last),
                )
            )
            classes = answers[0][0][1]
            settings["model"] = without_changing(facts, changing | changed_names(facts, facts_without_tensors(model)))
        planned, left_out = _applicable(suite.cases(named, classes), x.shape[1])
        if not known and any(attack.needs_gradients for case in planned if not case.on_all for attack in case.attacks):
            team.together(lambda: check_gradient(model, examples.batch(np.arange(min(2, len(x))))[0]))
        for name, reason in left_out.items() if verbose else ():
            say(f"{name}: left out: it {reason}")
        wanted = _cases_to_run(cases, [case.name for case in planned])
        settings |= {"classes": classes, "cases": [case.dump() for case in planned], "left_out": left_out}
        settings["code"], settings["unknown"] = code_of((suite, named, planned))
        settings["networks"] = {case.name: digest for case in planned if (digest := network_hash(case.threat))}
        store.fingerprint = team.agreed(
            fingerprint(settings),
            "the processes were given different models, data or settings, so they cannot share an evaluation: "
            "build the model from the same file or seed in each",
        )
        settings, done = team.first(lambda: (store.open(settings, overwrite=overwrite), store.result()))
        folder = store.directory
        report = team.first(lambda: Report.load(folder)) if folder is not None and finished(done) else None
        reused = None if report is None else {"result": report.date}
        if report is None or (checks and not report.checks):
            with watching(progress if team.is_main else False) as watch:
                run = CaseRunner(model, examples, planned, settings, store, watch, halving, team, verbose)
                report = report or run.report(wanted)
                if worth_checking(planned, len(x)) if checks is None else checks:
                    earlier = done["checks"] if done else []
                    clean = report.correct[:, 0]
                    report.checks.extend(
                        earlier or team.first(lambda: run_checks(model, examples, planned, clean, size, halving))
                    )
                    report.warnings.extend(as_warnings(report.checks))
                team.first(functools.partial(store.finish, report.arrays(), report.to_json()))
    report = report if reused is None else replace(report, reused=reused)
    if report.reuse and team.is_main:
        say(f"reused: {report.reuse}")
    return report


def _applicable(cases: list[Case], channels: int) -> tuple[list[Case], dict[str, str]]:
    """Split the cases by whether all their attacks suit images with this many channels.

    Returns:
        The suitable cases, and the names of the others with the reasons.

    Raises:
        UserError: no case is suitable.
    """
    reasons = {
        case.name: next(filter(None, (each.unsupported_reason(channels) for each in case.attacks)), "")
        for case in cases
    }
    kept = [case for case in cases if not reasons[case.name]]
    left_out = {name: reason for name, reason in reasons.items() if reason}
    if left_out and not kept:
        raise UserError("; ".join(f"{name} {reason}" for name, reason in left_out.items()))
    return kept, left_out


def _cases_to_run(chosen: Iterable[str] | None, names: list[str]) -> frozenset[str]:
    """Names of the suite's cases to run now.

    Raises:
        UserError: the suite has no such column, or two columns have the same name.
    """
    if len(set(names)) < len(names) or {CLEAN, UNION} & set(names):
        raise UserError(f"cases need distinct names other than 'clean' and 'union', not {names}")
    wanted = frozenset(names if chosen is None else [chosen] if isinstance(chosen, str) else chosen)
    for name in sorted(wanted - set(names)):
        raise UserError(f"the suite has no case {name!r}.{did_you_mean(name, names)}")
    if not wanted:
        raise UserError("no case was named: name at least one, or leave cases out to run all of them")
    return wanted


@contextmanager
def _undisturbed(model: Model, device: torch.device, graphs: Graphs | None) -> Iterator[None]:
    """Compute in strict float32 without gradients; restore the model's flags and global random states afterwards."""
    with (
        unchanged_states(), torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False),
        float32_products("fp32"), graphed(model, graphs), frozen(model),
    ):  # fmt: skip
        yield
