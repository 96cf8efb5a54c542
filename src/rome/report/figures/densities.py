"""Figures 3, A1 and A2: weight of each expert under each threat, one row per run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from rome.core.errors import UserError
from rome.experts import Experts, FeedForward, LoadBalancing, LowRank
from rome.report import gates
from rome.report.figures.base import FigureOfRuns, Options, flatten_data, require_experts
from rome.report.figures.style import NOTE, PAGE, legend, limits, side, styles_of
from rome.report.subject import NATURAL, Subject, short

SHOWN = 8
"""Maximum number of experts drawn per run: those whose mean weight differs most between groups. The data has all."""


class GateDensities(FigureOfRuns):
    """Kernel densities over images of each expert's gate weight in the last adapted layer, averaged over tokens.

    One curve for clean images and one for each threat. As in the paper, the average is over all tokens, including the
    class token. Gates are recorded as the softmax outputs them: for feed-forward experts, before the top-k selection.
    Kernels are Gaussian and reflected at 0 and 1, the limits of a weight. Runs without experts are left out.
    """

    name = "fig3"
    title = "densities of gate weights per expert and threat"
    lacking = "none of these runs has experts, so there are no gates to show"

    def measure_run(self, subject: Subject, options: Options) -> dict[str, Any]:
        layer = options.pick(require_experts(subject))
        sample = gates.join([gates.read(subject.model, part) for part in subject.attacked_parts(options.n)])
        return self.of_sample(subject.name, sample, layer)

    @staticmethod
    def of_sample(run: str, sample: gates.GateSample, layer: str) -> dict[str, Any]:
        """Return one run's part of the data."""
        weights = sample.weights[:, sample.layers.index(layer)].astype(np.float64).round(6)
        return {"run": run, "layer": layer, "weights": dict(zip(sample.groups, weights.tolist(), strict=True))}

    def rows(self, data: dict[str, Any]) -> list[dict[str, Any]]:
        return [
            {"run": run["run"], "layer": run["layer"], "threat": name, "image": image, "expert": k + 1, "weight": value}
            for run in data["runs"]
            for name, image, k, value in flatten_data(run["weights"], 3)
        ]

    def draw(self, data: dict[str, Any]) -> Canvas:
        runs = data["runs"]
        canvas = Canvas(figsize=(PAGE, 0.3 + 1.5 * len(runs)), layout="constrained")
        styles = styles_of([name for run in runs for name in run["weights"]])
        for row, run in zip(canvas.subfigures(len(runs), 1, squeeze=False).flatten(), runs, strict=True):
            values = {name: np.array(images) for name, images in run["weights"].items()}
            experts = gates.distinct_experts(np.array([images.mean(axis=0) for images in values.values()]), SHOWN)
            span = limits(np.stack([weights[:, experts] for weights in values.values()]))
            grid = np.linspace(*span, 240)
            for axes, k in zip(row.subplots(1, len(experts), squeeze=False)[0], experts, strict=True):
                for name, weights in values.items():
                    curve = kernel_density(weights[:, k], grid, least=(span[1] - span[0]) / 100)
                    axes.plot(grid, curve, color=styles[name].colour, ls=styles[name].line, lw=1.2)
                    if name == NATURAL:  # filled, so that the others can be seen against it
                        axes.fill_between(grid, curve, color=styles[name].colour, alpha=0.25, lw=0)
                axes.set(xlim=span, ylim=(0, None), yticks=[])
                axes.spines["left"].set_visible(False)
                axes.xaxis.set_major_locator(MaxNLocator(2, steps=[1, 2, 5, 10]))
                axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))  # short, because panels are close together
                axes.set_title(f"expert {k + 1}")
                axes.tick_params(labelsize=9 if len(experts) <= 5 else 7)
            row.supylabel(side(run["run"]), fontsize=8.5)
            row.supxlabel(f"gate weight in {short(run['layer'])}", **NOTE)
        lines = [Line2D([], [], color=look.colour, ls=look.line, lw=1.6, label=look.label) for look in styles.values()]
        legend(canvas, lines)
        return canvas


class LoadBalancedDensities(GateDensities):
    """:class:`GateDensities` of feed-forward experts with several coefficients of the load-balancing loss, and RoME."""

    name = "figA1"
    title = "densities of gate weights, for feed-forward experts with load balancing and RoME"
    experts: ClassVar[type[Experts]] = FeedForward

    def measure(self, subjects: Sequence[Subject], options: Options) -> dict[str, Any]:
        if not any(
            isinstance(each := subject.config.experts, self.experts) and isinstance(each.regularizer, LoadBalancing)
            for subject in subjects
            if subject.run
        ):
            raise UserError(
                f"none of these runs trained {self.experts.kind} experts with a load-balancing loss, which this figure "
                "compares; fig3 shows the same for any runs"
            )
        return super().measure(subjects, options)


class BalancedAndRome(LoadBalancedDensities):
    """:class:`GateDensities` of low-rank experts with load balancing, and RoME."""

    name = "figA2"
    title = "densities of gate weights, for low-rank experts with load balancing and RoME"
    experts = LowRank


def kernel_density(values: np.ndarray, grid: np.ndarray, *, least: float) -> np.ndarray:
    """Estimate the density on [0, 1] of ``values`` (n,) at ``grid`` (m,) with Gaussian kernels reflected at 0 and 1.

    The bandwidth is Silverman's, 1.06 s n^(-1/5), but at least ``least``.
    """
    width = max(1.06 * float(values.std()) * len(values) ** -0.2, least)
    mirrored = np.stack([values, -values, 2 - values])
    kernels = np.exp(-0.5 * ((grid[:, None, None] - mirrored) / width) ** 2)
    return np.asarray(kernels.sum(axis=1).mean(axis=1) / (width * math.sqrt(2 * math.pi)))
