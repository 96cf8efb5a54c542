"""Leaderboard entries in RobustBench's format (Croce et al. 2021, github.com/RobustBench/robustbench, ``model_info``).

Files ``model_info/<dataset>/<threat>/<Name>.json`` with RobustBench's keys and number format (percent as text). Added
are facts that the format lacks: the union over the Lp balls, every threat's accuracy, and the name of a file with the
examples that stayed correct, ``model_info/<dataset>/<Name>.npz``.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rome.attacks.suites.base import LP, AutoAttackSuite
from rome.attacks.suites.unseen import CORRUPTIONS, CorruptionsSuite
from rome.core.errors import UserError
from rome.core.files import replace_file
from rome.data.resized import Resized
from rome.evaluation.evaluate import Case, Report
from rome.report.evaluated import Evaluated
from rome.threats import LpBall

MASKING = ("black-box-beats-white-box", "zero-input-gradients", "more-steps", "unbounded-attack")
"""The checks whose warnings mark an evaluation as potentially unreliable on a leaderboard."""


def write_entries(runs: Sequence[Evaluated], out: Path) -> list[Path]:
    """Write an entry for each run and each threat evaluated with the standard AutoAttack, and one for the common
    corruptions if all were run.

    Returns:
        The JSON files. ``link``, ``authors`` and ``venue`` are left empty, to be filled in by hand, and so is
        ``additional_data`` (null) if it is unknown.

    Raises:
        UserError: a run has no such evaluation, or the files of two runs would have the same name.
    """
    if len({_name(run.name) for run in runs}) < len(runs):
        raise UserError(f"entries of {' and '.join(run.name for run in runs)} would have the same name; rename a run")
    files: list[Path] = []
    for run in runs:
        entries = entries_of(run)
        if not entries:
            raise UserError(
                f"RobustBench's entries need AutoAttack's standard version, but {run.folder} is of suite "
                f"{run.report.suite!r}: run `{run.command} --suite autoattack` first"
            )
        root, name = out / "model_info" / _dataset(run), _name(run.name)
        buffer = io.BytesIO()
        np.savez(buffer, **run.report.arrays())  # type: ignore[arg-type]  # numpy's stub takes allow_pickle for a key
        replace_file(root / f"{name}.npz", buffer.getvalue())
        for threat, entry in entries.items():
            files.append(root / threat / f"{name}.json")
            replace_file(files[-1], (json.dumps(entry, indent=2, ensure_ascii=False) + "\n").encode())
    return files


def entries_of(run: Evaluated) -> dict[str, dict[str, Any]]:
    """Return threat -> entry of one run, for Lp balls under the standard AutoAttack and for ``corruptions``."""
    report, balls = run.report, _standard_balls(run)
    if not balls:
        return {}

    def entry(eps: str | None, accuracy: str, share: float, column: str | list[str]) -> dict[str, Any]:
        return {
            "link": "",
            "name": run.about or run.name,
            "authors": "",
            "additional_data": _additional_data(run),
            "number_forward_passes": 1,  # per prediction
            "dataset": _dataset(run),
            "venue": "",
            "architecture": run.architecture,
            "eps": eps,
            "reported": None,
            accuracy: percent(share),
            "clean_acc": percent(report.clean),
            "unreliable": any(check["check"] in MASKING for check in report.warnings),
            "union": percent(report.union_of(balls)),
            "union_threats": list(balls),
            "threats": {
                name: {"eps": ball.radius, "acc": percent(report.robust[name])} for name, ball in balls.items()
            },
            "n_examples": report.n,
            "seed": report.settings["seed"],
            "search_precision": report.search_precision,
            "mask_file": f"../{_name(run.name)}.npz",
            "mask_column": column,
        }

    entries: dict[str, dict[str, Any]] = {
        ball.norm: entry(ball.radius, "autoattack_acc", report.robust[name], name) for name, ball in balls.items()
    }
    changed = report.members.get(CORRUPTIONS, ())
    if len(changed) == len(CorruptionsSuite().types) * 5 and not math.isnan(report.groups[CORRUPTIONS]):
        entries["corruptions"] = entry(None, "corruptions_acc", report.groups[CORRUPTIONS], list(changed))
    return entries


def percent(share: float) -> str:
    """Format a share in percent: ``85.34`` for 0.85341."""
    return f"{100 * share:.2f}"


def _standard_balls(run: Evaluated) -> dict[str, LpBall]:
    """Return case -> Lp ball for balls attacked by the standard AutoAttack; only the first of each norm counts."""
    found: dict[str, LpBall] = {}
    for name in run.report.members.get(LP, ()):
        threat = run.threats.get(name)
        if isinstance(threat, LpBall) and threat.norm not in {ball.norm for ball in found.values()}:
            found[name] = threat
    return {name: ball for name, ball in found.items() if _is_standard(run.attacks[name], run.report)}


def _is_standard(case: Case, report: Report) -> bool:
    (standard,) = AutoAttackSuite().cases({case.name: case.threat}, report.settings["classes"])
    attacks, wanted = ([attack.dump() for attack in each.attacks] for each in (case, standard))
    return not case.note and attacks == wanted


def _additional_data(run: Evaluated) -> bool | None:
    """Whether the model was trained on additional data, which it was if it started from timm's weights. None, to be
    filled in by hand, if its weights came from a file or its training is unknown."""
    if run.config is None or run.config.model.weights is not None:
        return None
    return run.config.model.pretrained


def _dataset(run: Evaluated) -> str:
    data = run.data
    if data is None:
        raise UserError(
            f"RobustBench's entries name the data, but {run.folder} does not: evaluate with `rome evaluate --model` "
            "and --data, or pass provenance={'data': {'kind': 'cifar10', 'path': PATH}} to rome.evaluate"
        )
    if not isinstance(data, Resized) or not data.path:
        return data.kind
    path = Path(data.path)
    folder = path.parent if path.suffix == ".parquet" else path
    return "imagenet" if run.report.settings["classes"] == 1000 else _name(folder.name.lower())


def _name(text: str) -> str:
    """Turn text into a file name."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", text).strip("_.") or "model"
