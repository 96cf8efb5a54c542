"""Figure ``routing``: the routing numbers of :mod:`rome.report.routing` for each run, plotted over its layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from rome.report import gates
from rome.report.features import image_means
from rome.report.figures.base import FigureOfRuns, Options, require_experts
from rome.report.figures.style import NOTE, PAGE, legend, look_of
from rome.report.routing import routing_numbers
from rome.report.subject import Subject, short

NUMBERS = (
    ("information", "information_mean"),
    ("entropy", "entropy_mean"),
    ("usage", "usage_mean"),
    ("between", "distance_mean"),
)
"""Fields of each run's data: values of every layer, and their mean over layers."""
LAYERS = 12
"""Maximum number of layer names on an axis."""


class RoutingNumbers(FigureOfRuns):
    """Mutual information, distance between threats, entropy and load over layers, and accuracy of linear probes."""

    name = "routing"
    title = "routing in numbers: information about the threat, entropy, distances, linear probes"

    lacking = "none of these runs has experts, so there is no routing to measure"

    def measure_run(self, subject: Subject, options: Options) -> dict[str, Any]:
        require_experts(subject)
        groups = subject.attacked(options.n)
        sample = gates.read(subject.model, groups)
        numbers = routing_numbers(sample, features=image_means(subject.model, groups), seed=options.seed)
        return {"run": subject.name, **asdict(numbers)}

    def rows(self, data: dict[str, Any]) -> list[dict[str, Any]]:
        """Return a row for each run as a whole, whose layer is empty, followed by one for each layer."""
        rows = []
        for run in data["runs"]:
            for i, layer in enumerate(("", *run["layers"])):
                bits, entropy, usage, distance = (run[of][i - 1] if layer else run[mean] for of, mean in NUMBERS)
                numbers = {"information_bits": bits, "information_share": bits / (run["most_information"] or 1)}
                numbers |= {"entropy": entropy, "usage": usage, "distance": distance}
                for pair in run["distances"]:
                    numbers[f"distance {pair['a']}-{pair['b']}"] = pair["layers"][i - 1] if layer else pair["mean"]
                rows.append({"run": run["run"], "layer": layer, **numbers})
                if not layer:
                    probes = {probe: run[probe]["accuracy"] for probe in ("gates_probe", "features_probe")}
                    rows[-1] |= probes | {"chance": run["gates_probe"]["chance"]}
        return rows

    def draw(self, data: dict[str, Any]) -> Canvas:
        runs = data["runs"]
        canvas = Canvas(figsize=(PAGE, 2.9), layout="constrained")
        information, between, entropy, probes = canvas.subplots(1, 4)
        for i, run in enumerate(runs):
            known = [100 * value / (run["most_information"] or 1) for value in run["information"]]
            curves = ((information, known, False), (between, run["between"], False))
            for axes, values, hollow in (*curves, (entropy, run["entropy"], False), (entropy, run["usage"], True)):
                look = {"ls": "--", "mfc": "white"} if hollow else {}
                axes.plot(range(1, len(values) + 1), values, **look_of(i), ms=3, lw=1.2, **look)
        information.set(title="information about\nthe threat, % of maximum", ylim=(0, None))
        between.set(title="Jensen-Shannon distance\nbetween threats", ylim=(0, None))
        entropy.set(title="entropy of a gate,\nof the load (hollow)", ylim=(0, 1.04))
        layers = [short(layer) for layer in runs[0]["layers"]]
        alike = all(run["layers"] == runs[0]["layers"] for run in runs)
        shown = range(0, len(layers), -(-len(layers) // LAYERS))
        for axes in (information, between, entropy):
            axes.xaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))
            if alike:
                axes.set_xticks([i + 1 for i in shown], [layers[i] for i in shown], rotation=90, fontsize=6.5)
            else:
                axes.set_xlabel("adapted layer", **NOTE)
        _probes(probes, runs)
        legend(canvas, [Line2D([], [], **look_of(i), ms=4, label=run["run"]) for i, run in enumerate(runs)])
        return canvas


def _probes(axes: Axes, runs: Sequence[dict[str, Any]]) -> None:
    width = 0.8 / len(runs)
    for i, run in enumerate(runs):
        probes, colour = [run["gates_probe"], run["features_probe"]], look_of(i)["color"]
        heights, spreads = ([probe[key] for probe in probes] for key in ("accuracy", "spread"))
        places = np.arange(2) + (i - (len(runs) - 1) / 2) * width
        axes.bar(places, heights, 0.9 * width, color=colour, yerr=spreads, error_kw={"elinewidth": 0.9})
    for chance in {run["gates_probe"]["chance"] for run in runs}:
        axes.axhline(chance, color="#555555", lw=0.8, ls=":")
    axes.set_xticks([0, 1], ["gates", "features"])
    axes.tick_params(axis="x", length=0)
    axes.set(title="threat read\nby a linear probe", ylim=(0, 1))
    axes.set_xlabel("dotted: chance", **NOTE)
