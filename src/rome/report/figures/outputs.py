"""Figures 1 and 6: t-SNE of what a layer's backbone and its experts give under each threat."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from rome.experts import expert_layers
from rome.report import features
from rome.report.figures.base import FigureOfRuns, Options, leaves
from rome.report.figures.style import COLUMN, NOTE, PAGE, bare, dots, legend, scatter, side, signed
from rome.report.separability import difference, embed, silhouettes
from rome.report.subject import Subject, short

BACKBONE, EXPERTS, OUTPUT = "backbone", "experts", "backbone + experts"
INSTEAD = {BACKBONE: "first expert of ", OUTPUT: "experts of "}
"""What is seen where experts stand in the place of a layer."""
ACROSS = 4
"""Panels in a row of figure 1."""


class LayerOutputs(FigureOfRuns):
    """Base: features of natural images and of the same images under each threat, at the last adapted layer.

    Averaged over patch tokens, as they are, with the mean silhouette of natural images and threats beside the picture;
    the data has those of the picture itself and of the difference from the natural image's features too.
    The paper says neither which tokens nor how many images. The backbone is W h + b, the experts' part
    sum_k g_k B_k A_k h; feed-forward experts and MORE have no backbone, so the first expert stands there and
    their whole output counts as the experts'. A run without experts shows the output of its last block.
    """

    parts: tuple[str, ...]
    """Which of the above are measured."""
    lacking = "none of these runs has features to show"

    def measure_run(self, subject: Subject, options: Options) -> dict[str, Any]:
        groups, layers = subject.attacked(options.n), expert_layers(subject.model)
        if layers:
            layer = options.pick(layers)
            given = features.parts(subject.model, groups, layer)
            found = {BACKBONE: given.backbone, EXPERTS: given.experts, OUTPUT: given.output}
            found = {part: found[part] for part in self.parts}
        else:
            layer = options.pick(features.block_layers(subject.model))
            found = {BACKBONE: features.at(features.collect(subject.model, groups, layer), "global")}
        return {
            "run": subject.name,
            "layer": layer,
            "adds": bool(layers) and layers[layer].additive,
            "labels": subject.images(options.n)[1].tolist(),
            "parts": {part: _picture(list(groups), values, options.seed) for part, values in found.items()},
        }

    def rows(self, data: dict[str, Any]) -> list[dict[str, Any]]:
        scores, points = [], []
        for run in data["runs"]:
            for part, picture in run["parts"].items():
                where = {"run": run["run"], "layer": run["layer"], "part": part}
                scores += [
                    {**where, "what": "silhouette", "space": space, "threat": threat, "value": value}
                    for space, threat, value in leaves(picture["silhouettes"], 2)
                ]
                points += [
                    {**where, "what": "point", "threat": threat, "image": i, "label": run["labels"][i], "x": x, "y": y}
                    for threat, i, (x, y) in leaves(picture["points"], 2)
                ]
        return scores + points


class ExpertOutputs(LayerOutputs):
    """What the experts give, one panel for each run."""

    name = "fig1"
    title = "t-SNE of expert outputs per threat"
    parts = (EXPERTS,)

    def draw(self, data: dict[str, Any]) -> Canvas:
        runs = data["runs"]
        columns = min(ACROSS, len(runs))
        lines = -(-len(runs) // columns)
        width = COLUMN if columns <= 2 else PAGE
        canvas = Canvas(figsize=(width, 0.4 + lines * (width / columns + 0.4)), layout="constrained")
        grid = canvas.subplots(lines, columns, squeeze=False).flatten()
        for axes, run in zip(grid, runs, strict=False):
            ((part, picture),) = run["parts"].items()
            _panel(axes, picture, ("" if part == EXPERTS else "no experts: ") + short(run["layer"]))
            axes.set_title(side(run["run"]))
        for axes in grid[len(runs) :]:
            axes.set_axis_off()
        legend(canvas, _dots(runs))
        return canvas


class BackboneAndExperts(LayerOutputs):
    """Backbone features, and the same with what the experts add: two panels for each run."""

    name = "fig6"
    title = "t-SNE of backbone features and of backbone + experts per threat"
    parts = (BACKBONE, OUTPUT)

    def draw(self, data: dict[str, Any]) -> Canvas:
        runs = data["runs"]
        canvas = Canvas(figsize=(COLUMN, 0.6 + 1.85 * len(runs)), layout="constrained")
        grid = canvas.subplots(len(runs), len(self.parts), squeeze=False)
        for row, run in zip(grid, runs, strict=True):
            for axes, part in zip(row, self.parts, strict=True):
                if part in run["parts"]:
                    instead = "" if run["adds"] or len(run["parts"]) == 1 else INSTEAD[part]
                    _panel(axes, run["parts"][part], instead + short(run["layer"]))
                else:
                    bare(axes)
                    axes.set_box_aspect(1)
                    axes.text(0.5, 0.5, "no experts", ha="center", va="center", transform=axes.transAxes, **NOTE)
            row[0].set_ylabel(side(run["run"]), fontsize=8.5)
        for axes, part in zip(grid[0], self.parts, strict=True):
            axes.set_title(part)
        legend(canvas, _dots(runs))
        return canvas


def _picture(names: list[str], values: np.ndarray, seed: int) -> dict[str, Any]:
    """Points and silhouettes of features (G, n, D), natural first."""
    points = embed(values, seed=seed)
    scores = {"features": silhouettes(values), "embedding": silhouettes(points)}
    named = {space: dict(zip(names, each.round(6).tolist(), strict=True)) for space, each in scores.items()}
    if len(names) > 2:
        apart = silhouettes(difference(values)).round(6).tolist()
        named["difference"] = dict(zip(names[1:], apart, strict=True))
    return {"points": dict(zip(names, points.round(4).tolist(), strict=True)), "silhouettes": named}


def _panel(axes: Axes, picture: dict[str, Any], what: str) -> None:
    scatter(axes, picture["points"])
    score = float(np.mean(list(picture["silhouettes"]["features"].values())))
    axes.set_xlabel(f"{what}\nsilhouette {signed(score)}", **NOTE)


def _dots(runs: list[dict[str, Any]]) -> list[Any]:
    return dots([name for run in runs for part in run["parts"].values() for name in part["points"]])
