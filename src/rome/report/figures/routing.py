"""``routing``: the numbers of :mod:`rome.report.routing` for each run, and their course over layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from rome.core.errors import UserError
from rome.experts import expert_layers
from rome.report import gates
from rome.report.features import image_means
from rome.report.figures.base import Options, PaperFigure
from rome.report.figures.style import MARKERS, NOTE, PAGE, RUNS, legend
from rome.report.routing import routing_numbers
from rome.report.subject import Subject


class RoutingNumbers(PaperFigure):
    """Mutual information, distance between threats, entropy and load over layers, and what linear probes read."""

    name = "routing"
    title = "routing in numbers: information about the threat, entropy, distances, linear probes"

    def measure(self, subjects: Sequence[Subject], options: Options) -> dict[str, Any]:
        runs, left_out = [], {}
        for subject in subjects:
            if not expert_layers(subject.model):
                left_out[subject.name] = "it has no experts"
                continue
            groups = subject.attacked(options.n)
            sample = gates.read(subject.model, groups)
            numbers = routing_numbers(sample, features=image_means(subject.model, groups), seed=options.seed)
            runs.append({"run": subject.name, **numbers.dump()})
        if not runs:
            raise UserError("none of these runs has experts, so there is no routing to measure")
        return {"runs": runs, "left_out": left_out}

    def rows(self, data: dict[str, Any]) -> list[dict[str, Any]]:
        """A line for each layer, and one for the run as a whole whose layer is empty."""
        found = []
        for run in data["runs"]:
            pairs = {f"distance {pair['a']}-{pair['b']}": pair for pair in run["distances"]}
            found.append(
                {
                    "run": run["run"],
                    "layer": "",
                    "information_bits": run["information_mean"],
                    "information_share": run["information_share"],
                    "entropy": run["entropy_mean"],
                    "usage": run["usage_mean"],
                    "distance": run["distance_mean"],
                    **{name: pair["mean"] for name, pair in pairs.items()},
                    "gates_probe": run["gates_probe"]["accuracy"],
                    "features_probe": run["features_probe"]["accuracy"],
                    "chance": run["gates_probe"]["chance"],
                }
            )
            for i, layer in enumerate(run["layers"]):
                found.append(
                    {
                        "run": run["run"],
                        "layer": layer,
                        "information_bits": run["information"][i],
                        "information_share": run["information"][i] / (run["most_information"] or 1),
                        "entropy": run["entropy"][i],
                        "usage": run["usage"][i],
                        "distance": run["between"][i],
                        **{name: pair["layers"][i] for name, pair in pairs.items()},
                    }
                )
        return found

    def draw(self, data: dict[str, Any]) -> Canvas:
        runs = data["runs"]
        canvas = Canvas(figsize=(PAGE, 2.35), layout="constrained")
        information, between, entropy, probes = canvas.subplots(1, 4)
        for i, run in enumerate(runs):
            _line(information, i, [100 * value / (run["most_information"] or 1) for value in run["information"]])
            _line(between, i, run["between"])
            _line(entropy, i, run["entropy"])
            _line(entropy, i, run["usage"], hollow=True)
        information.set_title("information about\nthe threat, % of most")
        between.set_title("Jensen-Shannon distance\nbetween threats")
        for axes in (information, between):
            axes.set_ylim(bottom=0)
        entropy.set_title("entropy of a gate,\nof the load (hollow)")
        entropy.set_ylim(0, 1.04)
        for axes in (information, between, entropy):
            axes.xaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))
            axes.set_xlabel("adapted layer", **NOTE)
        _probes(probes, runs)
        marks = [(run["run"], _colour(i), MARKERS[i % len(MARKERS)]) for i, run in enumerate(runs)]
        legend(canvas, [Line2D([], [], color=colour, marker=mark, ms=4, label=name) for name, colour, mark in marks])
        return canvas


def _line(axes: Axes, i: int, values: Sequence[float], *, hollow: bool = False) -> None:
    axes.plot(
        range(1, len(values) + 1),
        values,
        color=_colour(i),
        marker=MARKERS[i % len(MARKERS)],
        ms=3,
        lw=1.2,
        ls="--" if hollow else "-",
        mfc="white" if hollow else _colour(i),
    )


def _probes(axes: Axes, runs: Sequence[dict[str, Any]]) -> None:
    width = 0.8 / len(runs)
    for i, run in enumerate(runs):
        for place, name in enumerate(("gates_probe", "features_probe")):
            probe = run[name]
            x = place + (i - (len(runs) - 1) / 2) * width
            axes.bar(
                x, probe["accuracy"], 0.9 * width, color=_colour(i), yerr=probe["spread"], error_kw={"elinewidth": 0.9}
            )
    for chance in {run["gates_probe"]["chance"] for run in runs}:
        axes.axhline(chance, color="#555555", lw=0.8, ls=":")
    axes.set_xticks([0, 1], ["gates", "features"])
    axes.tick_params(axis="x", length=0)
    axes.set_ylim(0, 1)
    axes.set_title("threat read\nby a linear probe")
    axes.set_xlabel("dotted: chance", **NOTE)


def _colour(i: int) -> str:
    return RUNS[i % len(RUNS)]
