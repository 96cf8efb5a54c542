"""Fig. A3: sensitivity of union robustness to settings, from the runs of a sweep."""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from rome.attacks.suites.base import LP
from rome.core.errors import UserError, some
from rome.report.compared import config_differences, gather
from rome.report.figures.base import Options, PaperFigure
from rome.report.figures.style import COLUMN, PAGE, look_of, plain
from rome.report.subject import Subject, trained

PAPER: dict[str, tuple[str, float]] = {
    "experts.experts": ("number of experts $K$", 4),
    "experts.rank": ("rank $r$", 16),
    "experts.regularizer.weight": (r"loss weight $\lambda$", 0.1),
    "experts.gate.s": ("$s$", 4),
    "experts.gate.b": ("$b$", 2),
}
"""Keys that the paper varies -> their axis label in the paper, and the value that the paper chose."""


class Sensitivity(PaperFigure):
    """One panel per numeric config key that the runs vary: union robustness against its values, all else equal.

    If the suite attacks more than Lp balls, the union is taken over the balls only. Runs that differ only in the seed
    are one point: mean and sample standard deviation. If a grid varies several keys, a key has one curve for every
    combination of the others; if each run changes one key of a common base, as in the paper, every panel has one curve
    and the base is a point of each.
    """

    name = "figA3"
    title = "sensitivity of union robustness to settings"

    def measure(self, subjects: Sequence[Subject], options: Options) -> dict[str, Any]:
        swept, left_out = trained(subjects)
        runs = gather([subject.run.folder for subject in swept if subject.run])
        every = config_differences([run.config for run in runs if run.config is not None])
        differences = {key: every[key] for key in every if key != "seed" and not key.startswith("evaluation.")}
        order, unions = [*PAPER, *differences], [run.report.unions.get(LP, run.report.union) for run in runs]
        panels = [{"key": k, "curves": _curves(k, differences, unions)} for k in sorted(differences, key=order.index)]
        panels = [panel for panel in panels if panel["curves"]]
        if not panels:
            keys = some(list(differences), 4) if differences else "no setting (except perhaps the seed)"
            raise UserError(
                f"these runs differ in {keys}, and no two of them in a single number, so there is no curve; make runs "
                "that do, for example: rome sweep CONFIG experts.rank=4,8,16"
            )
        evaluation = f"{runs[0].report.suite}, {runs[0].report.n} examples"
        return {"evaluation": evaluation, "panels": panels, "left_out": left_out}

    def rows(self, data: dict[str, Any]) -> list[dict[str, Any]]:
        return [
            {
                "key": panel["key"],
                "value": point["value"],
                "others": json.dumps(curve["others"]),
                "runs": len(point["unions"]),
                "union": point["mean"],
                "deviation": point["deviation"],
            }
            for panel in data["panels"]
            for curve in panel["curves"]
            for point in curve["points"]
        ]

    def draw(self, data: dict[str, Any]) -> Canvas:
        panels = data["panels"]
        columns = min(len(panels), 3)
        lines = -(-len(panels) // columns)
        size = (COLUMN, 2.3) if columns == 1 else (PAGE, 2.1 * lines)
        canvas = Canvas(figsize=size, layout="constrained")
        axes = canvas.subplots(lines, columns, sharey=True, squeeze=False)
        for i, (axis, panel) in enumerate(zip(axes.flat, panels, strict=False)):
            _panel(axis, panel)
            axis.set_title(f"({chr(ord('a') + i)})", loc="left", fontsize=8)
            if i % columns == 0:
                axis.set_ylabel("union robustness (%)")
        for axis in list(axes.flat)[len(panels) :]:
            axis.set_visible(False)
        return canvas


def _curves(key: str, differences: dict[str, list[Any]], unions: Sequence[float]) -> list[dict[str, Any]]:
    """Group the runs by all keys but ``key``, and return the groups in which it has at least two values."""
    groups: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for i, union in enumerate(unions):
        value = differences[key][i]
        if isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(union):
            others = {name: values[i] for name, values in differences.items() if name != key}
            groups[json.dumps(others)][value].append(union)

    def point(value: float, unions: list[float]) -> dict[str, Any]:
        deviation = statistics.stdev(unions) if len(unions) > 1 else None
        return {"value": value, "unions": unions, "mean": statistics.fmean(unions), "deviation": deviation}

    return [
        {"others": json.loads(others), "points": [point(*each) for each in sorted(points.items())]}
        for others, points in groups.items()
        if len(points) > 1
    ]


def _panel(axis: Axes, panel: dict[str, Any]) -> None:
    curves = panel["curves"]
    first = curves[0]["others"]
    differing = [name for name in first if any(curve["others"][name] != first[name] for curve in curves)]
    values = sorted({point["value"] for curve in curves for point in curve["points"]})
    for i, curve in enumerate(curves):
        points, look = curve["points"], look_of(i)
        label = plain(", ".join(f"{name.rpartition('.')[2]} {curve['others'][name]}" for name in differing))
        x, y = [point["value"] for point in points], [100 * point["mean"] for point in points]
        spread = [100 * (point["deviation"] or 0) for point in points]
        axis.errorbar(x, y, yerr=spread, **look, ms=3.5, lw=1.3, elinewidth=0.8, capsize=2, label=label)
        for point in points:
            if len(point["unions"]) > 1:
                single = [100 * union for union in point["unions"]]
                axis.plot([point["value"]] * len(single), single, ".", color=look["color"], ms=2.5, alpha=0.5)
    title, chosen = PAPER.get(panel["key"], (panel["key"], None))
    if chosen is not None and values[0] <= chosen <= values[-1]:
        axis.axvline(chosen, color="gray", lw=0.7, ls=":")
    if values[0] > 0 and values[-1] / values[0] >= 8:
        axis.set_xscale("log")
    axis.set_xticks(values, [f"{value:g}" for value in values], minor=False)
    axis.set_xticks([], minor=True)
    axis.set_xlabel(title)
    axis.grid(axis="y", lw=0.4, alpha=0.5)
    if differing:
        axis.legend(frameon=False, fontsize=7)
