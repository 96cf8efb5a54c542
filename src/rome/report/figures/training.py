"""Fig. 8: robustness against training time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D

from rome.core.errors import UserError
from rome.report.figures.base import Options, PaperFigure
from rome.report.figures.style import COLUMN, look_of, plain
from rome.report.subject import Subject, trained

HELD_OUT, TRAINING = "union, held-out images", "mean over threats, training images"


class TrainingTime(PaperFigure):
    """One curve per run: union robustness on held-out training images against seconds of training.

    The points are the run's validations (config key ``validation``; the time spent on them is not counted). A run
    without validations has a dashed curve of what its log has: training accuracy under the training attack, averaged
    over threats. That is a different and higher quantity, because the attack is weaker, no union is taken and the
    images are trained on. Times are comparable only between runs on the same machine.

    ``reached`` in the data: the time at which each validated run first reached the best union of the first validated
    run without experts.
    """

    name = "fig8"
    title = "training time against robustness"

    def measure(self, subjects: Sequence[Subject], options: Options) -> dict[str, Any]:
        runs, left_out = trained(subjects)
        curves = [(subject, _curve(subject)) for subject in runs]
        validated = [subject for subject, curve in curves if curve["quantity"] == HELD_OUT]
        for subject in validated[1:]:
            if _held_out(subject) != _held_out(validated[0]):
                reason = f"its validation has different data, threats or settings from that of {validated[0].name}"
                left_out[subject.name] = reason
        kept = [curve for subject, curve in curves if subject.name not in left_out]
        without = [curve["name"] for curve in kept if not curve["points"]]
        if without:
            raise UserError(f"the log of {', '.join(without)} has no finished epoch, so there is nothing to plot")
        return {"runs": kept, "reached": _reached(kept), "left_out": left_out}

    def rows(self, data: dict[str, Any]) -> list[dict[str, Any]]:
        return [
            {"run": run["name"], "quantity": run["quantity"], **{k: v for k, v in point.items() if k != "robust"}}
            | {f"robust_{name}": value for name, value in point.get("robust", {}).items()}
            for run in data["runs"]
            for point in run["points"]
        ]

    def draw(self, data: dict[str, Any]) -> Canvas:
        runs, reached = data["runs"], data["reached"]
        longest = max(point["seconds"] for run in runs for point in run["points"])
        unit, scale = ("h", 3600) if longest > 3 * 3600 else ("min", 60) if longest > 300 else ("s", 1)
        quantities = {run["quantity"] for run in runs}
        canvas = Canvas(figsize=(COLUMN, 2.4 + 0.15 * len(runs)), layout="constrained")
        axes = canvas.subplots()
        curves: list[Line2D] = []  # given to the legend, which otherwise omits labels that begin with "_"
        for i, run in enumerate(runs):
            x = [point["seconds"] / scale for point in run["points"]]
            y = [100 * point["value"] for point in run["points"]]
            fallback = run["quantity"] == TRAINING
            label = plain(run["name"]) + (" (dashed: training accuracy)" if fallback else "")
            look = look_of(i) | ({"marker": ""} if len(x) > 40 else {})
            curves += axes.plot(x, y, **look, ms=3, lw=1.4, ls="--" if fallback else "-", label=label)
        if reached:
            label = f"best union of {plain(reached['of'])}"
            curves.append(axes.axhline(100 * reached["union"], color="gray", lw=0.7, ls=":", label=label))
        axes.set(xlabel=f"training time ({unit})", ylabel="robust accuracy (%)", xlim=(0, None), ylim=(0, None))
        axes.set_title(quantities.pop() if len(quantities) == 1 else "robustness", loc="left", fontsize=8)
        axes.grid(axis="y", lw=0.4, alpha=0.5)
        canvas.legend(handles=curves, loc="outside lower center", frameon=False, fontsize=7.5, handlelength=2.2)
        return canvas


def _curve(subject: Subject) -> dict[str, Any]:
    log = subject.run.log() if subject.run else []
    curve = {"name": subject.name, "experts": subject.config.experts is not None}
    points = [
        {"value": line["union"], **{key: line[key] for key in ("seconds", "epoch", "clean", "robust")}}
        for line in log
        if line["event"] == "validation"
    ]
    if points:
        return {**curve, "quantity": HELD_OUT, "points": points}
    epochs = [line for line in log if line["event"] == "epoch" and line.get("accuracy") and "seconds" in line]
    points = [
        {"value": sum(robust.values()) / len(robust), "seconds": line["seconds"], "epoch": line["epoch"]}
        | {"robust": robust}
        for line in epochs
        if "clean" not in (robust := line["accuracy"])  # natural epochs measure no robustness
    ]
    return {**curve, "quantity": TRAINING, "points": points}


def _held_out(subject: Subject) -> tuple[Any, ...]:
    """Settings that must be equal for two unions on held-out examples to be comparable."""
    config = subject.config
    return config.validation, config.threats, config.data.kind


def _reached(curves: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Best union of the first validated run without experts (else of the first), and the time each run reached it."""
    validated = [curve for curve in curves if curve["quantity"] == HELD_OUT]
    if len(validated) < 2:
        return {}
    base = next((curve for curve in validated if not curve["experts"]), validated[0])
    union = max(point["value"] for point in base["points"])
    times = {
        curve["name"]: next((point["seconds"] for point in curve["points"] if point["value"] >= union), None)
        for curve in validated
    }
    return {"of": base["name"], "union": union, "seconds": times}
