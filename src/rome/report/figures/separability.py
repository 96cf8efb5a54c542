"""Figures 5 and A4: how well local and global features tell the threats apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from rome.core.errors import UserError
from rome.report import features
from rome.report.figures.base import FigureOfRuns, Options, leaves
from rome.report.figures.style import NOTE, PAGE, dots, legend, looks, scatter, side, signed
from rome.report.separability import difference, embed, silhouettes
from rome.report.subject import NATURAL, Subject, short

FEATURES, DIFFERENCE = "features", "difference"
SPACES = {FEATURES: "features as they are", DIFFERENCE: "less the natural image's"}
"""What is scored and drawn: what the paper says, and what tells threats apart; how a row of panels is called."""
POSITIONS = 64
"""Tokens at most whose silhouettes are taken, evenly spaced: all of a ViT's on CIFAR-10."""


class Separability(FigureOfRuns):
    """Base: silhouettes of the threats at every token and of the mean over tokens, and t-SNE at some of them.

    Of the features as they are, and of their difference from the same image's natural features, most likely what the
    paper scored (:mod:`rome.report.separability`); each has a row of panels that says which. The data has the
    silhouettes of the drawn embeddings too. Local scores are mean and standard deviation over tokens, as the paper's.
    Layers are blocks of a ViT and stages of a CNN or Swin; runs need no experts.
    """

    every_layer: bool
    """Whether the data has all blocks and the picture the first and the last, or both that of ``layer`` alone."""
    places: tuple[str, ...]
    """Which of :data:`rome.report.features.PLACES` are drawn."""
    titles: tuple[str, ...]
    """Of their panels; a last one more is that of the silhouettes."""
    room: tuple[float, float]
    """Height of the picture in inches: around the rows, and of a row."""
    lacking = "separating takes a run with two or more threats"

    def measure_run(self, subject: Subject, options: Options) -> dict[str, Any]:
        groups = subject.attacked(options.n)
        threats = [name for name in groups if name != NATURAL]
        if len(threats) < 2:
            raise UserError(f"it has {len(threats)} threat")
        blocks = features.block_layers(subject.model)
        layers, found = blocks if self.every_layer else (options.pick(blocks),), []
        for layer in layers:
            given = features.collect(subject.model, groups, layer)
            places = self.places if layer in (layers[0], layers[-1]) else ()
            found.append({"layer": layer, **_measure(given, threats, places, options.seed)})
        return {"run": subject.name, "threats": threats, "layers": found}

    def rows(self, data: dict[str, Any]) -> list[dict[str, Any]]:
        """Scores first: of every layer, place, space and threat. Then the points of the pictures."""
        scores, points = [], []
        for run in data["runs"]:
            for layer in run["layers"]:
                where = {"run": run["run"], "layer": layer["layer"]}
                for space, place, threat, score in leaves(layer["silhouettes"], 3):
                    mean, spread = score if isinstance(score, list) else (score, None)
                    at = {"what": "silhouette", "space": space, "place": place, "threat": threat}
                    scores.append({**where, **at, "mean": mean, "spread": spread})
                for space, place, threat, image, (x, y) in leaves(layer["points"], 4):
                    at = {"what": "point", "space": space, "place": place, "threat": threat}
                    points.append({**where, **at, "image": image, "x": x, "y": y})
        return scores + points

    def draw(self, data: dict[str, Any]) -> Canvas:
        lines = [(run, layer, space) for run in data["runs"] for layer in run["layers"] for space in layer["points"]]
        canvas = Canvas(figsize=(PAGE, self.room[0] + self.room[1] * len(lines)), layout="constrained")
        grid = canvas.subplots(len(lines), len(self.titles), squeeze=False)
        for row, (run, layer, space) in zip(grid, lines, strict=True):
            for axes, place in zip(row, self.places, strict=False):
                _cloud(axes, layer, space, place)
            row[0].set_ylabel(side(run["run"], short(layer["layer"]), SPACES[space]), fontsize=8.5)
            if len(row) > len(self.places):
                _bars(row[-1], run["threats"], layer["silhouettes"][space])
                row[-1].sharey(grid[0, -1])
        for axes, title in zip(grid[0], self.titles, strict=True):
            axes.set_title(title)
        if len(self.titles) > len(self.places):
            grid[-1, -1].set_xlabel("filled: local, mean ± s.d. over tokens\nhatched: global", **NOTE)
        legend(canvas, dots([name for run in data["runs"] for name in run["threats"]]))
        return canvas


class LocalAndGlobal(Separability):
    """One layer, the last or that of ``layer``: t-SNE at the middle token and of the mean, and silhouettes."""

    name = "fig5"
    title = "separability of threats in local and global features, as they are and less the natural image's"
    every_layer = False
    places = ("middle", "global")
    titles = ("local: middle token", "global: mean over tokens", "silhouette")
    room = (0.55, 2.15)


class OverLayers(Separability):
    """First and last block, at the first, middle and last token and of the mean; the data has every block's scores."""

    name = "figA4"
    title = (
        "separability of threats in the first and last layer, at three tokens and globally, in features as they are "
        "and less the natural image's"
    )
    every_layer = True
    places = features.PLACES
    titles = ("first token", "middle token", "last token", "global")
    room = (0.35, 1.85)


def _measure(given: np.ndarray, threats: list[str], places: Sequence[str], seed: int) -> dict[str, Any]:
    """Silhouettes and points of one layer's features (1 + P, n, T, D)."""
    spaces = {FEATURES: given[1:], DIFFERENCE: difference(given)}
    chosen = np.unique(np.linspace(0, given.shape[2] - 1, min(POSITIONS, given.shape[2])).round().astype(int))
    scores: dict[str, Any] = {}
    points: dict[str, Any] = {}
    for space, values in spaces.items():
        local = np.stack([silhouettes(values[:, :, t]) for t in chosen])  # (T', P)
        pairs = np.stack([local.mean(axis=0), local.std(axis=0)], axis=1).round(6).tolist()
        scores[space] = {"local": dict(zip(threats, pairs, strict=True))}
        for place in features.PLACES:
            one = silhouettes(features.at(values, place)).round(6).tolist()
            scores[space][place] = dict(zip(threats, one, strict=True))
        for place in places:
            found = embed(features.at(values, place), seed=seed)
            one = silhouettes(found).round(6).tolist()
            scores.setdefault(f"embedding of {space}", {})[place] = dict(zip(threats, one, strict=True))
            points.setdefault(space, {})[place] = dict(zip(threats, found.round(4).tolist(), strict=True))
    return {"tokens": int(given.shape[2]), "silhouettes": scores, "points": points}


def _cloud(axes: Axes, layer: dict[str, Any], space: str, place: str) -> None:
    scatter(axes, layer["points"][space][place])
    score, picture = (
        signed(float(np.mean(list(layer["silhouettes"][of][place].values()))))
        for of in (space, f"embedding of {space}")
    )
    axes.set_xlabel(f"silhouette {score}\nin the picture {picture}", **NOTE)


def _bars(axes: Axes, threats: list[str], scores: dict[str, Any]) -> None:
    """Local silhouettes with their spread over tokens, and global ones hatched beside them."""
    every = looks(threats)
    for i, threat in enumerate(threats):
        mean, spread = scores["local"][threat]
        axes.bar(i - 0.2, mean, 0.36, color=every[threat].colour, yerr=spread, error_kw={"elinewidth": 0.9})
        axes.bar(i + 0.2, scores["global"][threat], 0.36, color="white", edgecolor=every[threat].colour, hatch="/////")
    axes.axhline(0, color="#555555", lw=0.7)
    axes.set_xticks(range(len(threats)), [every[threat].label for threat in threats])
    axes.tick_params(axis="x", length=0)
