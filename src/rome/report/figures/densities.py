"""Figures 3, A1 and A2: how much weight each expert gets under each threat, one row for each run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from rome.core.errors import UserError
from rome.experts import expert_layers
from rome.report import gates
from rome.report.charts import kernel_density, limits
from rome.report.figures.base import Options, PaperFigure
from rome.report.figures.style import NOTE, PAGE, Look, legend, looks, side
from rome.report.subject import Subject, short

SHOWN = 8
"""Experts in a row; of more, those whose mean weight differs most between groups are drawn. The data has all."""
POINTS = 240


class GateDensities(PaperFigure):
    """Kernel densities over images of each expert's gate weight in the last adapted layer, averaged over tokens.

    One curve for natural images and for each threat. The paper averages over all tokens; so do we, the class token
    among them. Gates are recorded as the softmax gives them: those of feed-forward experts before the best are chosen.
    Kernels are Gaussian and reflected at 0 and 1, where weights end. Runs without experts are left out.
    """

    name = "fig3"
    title = "densities of gate weights per expert and threat"

    def measure(self, subjects: Sequence[Subject], options: Options) -> dict[str, Any]:
        runs, left_out = [], {}
        for subject in subjects:
            layers = expert_layers(subject.model)
            if not layers:
                left_out[subject.name] = "it has no experts"
                continue
            layer = options.pick(layers)
            sample = gates.join([gates.read(subject.model, part) for part in subject.attacked_parts(options.n)])
            weights = sample.weights[:, sample.layers.index(layer)].astype(np.float64).round(6)
            runs.append(
                {
                    "run": subject.name,
                    "layer": layer,
                    "weights": {name: weights[i].tolist() for i, name in enumerate(sample.groups)},
                }
            )
        if not runs:
            raise UserError("none of these runs has experts, so there are no gates to show")
        return {"runs": runs, "left_out": left_out}

    def rows(self, data: dict[str, Any]) -> list[dict[str, Any]]:
        return [
            {"run": run["run"], "layer": run["layer"], "threat": name, "image": image, "expert": k + 1, "weight": value}
            for run in data["runs"]
            for name, images in run["weights"].items()
            for image, values in enumerate(images)
            for k, value in enumerate(values)
        ]

    def draw(self, data: dict[str, Any]) -> Canvas:
        runs = [(run, _differing(run)) for run in data["runs"]]
        names = list(dict.fromkeys(name for run, _ in runs for name in run["weights"]))
        canvas = Canvas(figsize=(PAGE, 0.3 + 1.5 * len(runs)), layout="constrained")
        every = looks(names)
        for part, (run, experts) in zip(canvas.subfigures(len(runs), 1, squeeze=False).flatten(), runs, strict=True):
            values = {name: np.array(images) for name, images in run["weights"].items()}
            span = limits(np.stack([weights[:, experts] for weights in values.values()]))
            row = part.subplots(1, len(experts), squeeze=False)[0]
            for axes, k in zip(row, experts, strict=True):
                _panel(axes, {name: weights[:, k] for name, weights in values.items()}, every, span)
                axes.set_title(f"expert {k + 1}")
                axes.tick_params(labelsize=9 if len(experts) <= 5 else 7)
            part.supylabel(side(run["run"]), fontsize=8.5)
            part.supxlabel(f"gate weight in {short(run['layer'])}", **NOTE)
        lines = [Line2D([], [], color=look.colour, ls=look.line, lw=1.6, label=look.label) for look in every.values()]
        legend(canvas, lines)
        return canvas


class LoadBalancedDensities(GateDensities):
    """The same of feed-forward experts with several coefficients of the load balancing loss, beside RoME."""

    name = "figA1"
    title = "densities of gate weights, for runs with several load balancing coefficients"


class BalancedAndRome(GateDensities):
    """The same of low-rank experts with load balancing, beside RoME."""

    name = "figA2"
    title = "densities of gate weights, for low-rank experts with load balancing and RoME"


def _panel(axes: Axes, values: dict[str, np.ndarray], every: dict[str, Look], span: tuple[float, float]) -> None:
    places = np.linspace(*span, POINTS)
    for i, (name, weights) in enumerate(values.items()):
        curve = kernel_density(weights, places, least=(span[1] - span[0]) / 100)
        axes.plot(places, curve, color=every[name].colour, ls=every[name].line, lw=1.2)
        if i == 0:
            axes.fill_between(places, curve, color=every[name].colour, alpha=0.3, lw=0)
    axes.set_xlim(*span)
    axes.set_ylim(bottom=0)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(2, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))  # short: panels stand close to each other


def _differing(run: dict[str, Any]) -> list[int]:
    """The experts to draw."""
    means = np.array([np.mean(images, axis=0) for images in run["weights"].values()])
    spread = means.max(axis=0) - means.min(axis=0)
    return sorted(sorted(range(len(spread)), key=lambda k: -spread[k])[:SHOWN])
