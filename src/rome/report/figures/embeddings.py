"""Figures 1, 5, 6 and A4: t-SNE of features of clean images and under each threat, and how well they separate threats.

The data is a list of panels for each run: ``layer``, ``part`` (with or without experts), ``space`` (the features
themselves, or their difference from those of the clean image), ``place`` (a token, or the mean over tokens), the mean
``silhouettes`` of each group (for single tokens with the standard deviation over them), and, if the panel is drawn, the
``points`` and their silhouettes (``embedding``).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import groupby
from operator import itemgetter
from typing import Any, ClassVar, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from rome.core.errors import UserError
from rome.experts import expert_layers
from rome.report import features
from rome.report.figures.base import FigureOfRuns, Options, flatten_data
from rome.report.figures.style import COLUMN, NOTE, PAGE, dots, legend, scatter, side, signed, styles_of
from rome.report.separability import difference, embed, silhouettes
from rome.report.subject import NATURAL, Subject, short

BACKBONE, EXPERTS, OUTPUT = "backbone", "experts", "backbone + experts"
INSTEAD = {BACKBONE: "first expert of ", OUTPUT: "experts of "}
"""Prefixes of the layer's name where the experts replace a layer instead of adding to it."""
FEATURES, DIFFERENCE = "features", "difference"
SPACES = {FEATURES: "", DIFFERENCE: "\ndifference from natural"}
"""What is scored and drawn (what the paper names, and what separates threats) -> the end of the panels' titles."""
POSITIONS = 64
"""Maximum number of tokens, evenly spaced, whose silhouettes are computed: all of a ViT's on CIFAR-10."""
LOCAL = "local"
"""``place`` of the silhouettes of single tokens."""
Panel = dict[str, Any]


class Shown(NamedTuple):
    """Title, note and drawing function of a panel."""

    title: str
    note: str
    draw: Callable[[Axes], None]


class Embeddings(FigureOfRuns):
    """Base class of the four figures."""

    sizes: tuple[float, float, float]
    """Width of the picture, its height apart from the rows, and the height of a row, in inches."""

    @abstractmethod
    def lines(self, run: dict[str, Any]) -> list[tuple[str, list[Shown]]]:
        """Return a run's rows of panels, each with its label."""

    def rows(self, data: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the scores, followed by the points of the pictures."""
        scores, points = [], []
        for run, panel in ((each, panel) for each in data["runs"] for panel in each["panels"]):
            where = {"run": run["run"], **{key: panel[key] for key in ("layer", "part", "space", "place")}}
            for what, threat, score in flatten_data(
                {key: panel.get(key, {}) for key in ("silhouettes", "embedding")}, 2
            ):
                mean, spread = score if isinstance(score, list) else (score, None)
                scores.append({**where, "what": what, "threat": threat, "mean": mean, "spread": spread})
            for threat, image, (x, y) in flatten_data(panel.get("points", {}), 2):
                at = {"image": image, "label": run["labels"][image], "x": x, "y": y}
                points.append({**where, "what": "point", "threat": threat, **at})
        return scores + points

    def draw(self, data: dict[str, Any]) -> Canvas:
        lines = [line for run in data["runs"] for line in self.lines(run)]
        if len(lines[0][1]) == 1:  # one panel per run: side by side in a single row
            lines = [("", [panel._replace(title=label) for label, (panel,) in lines])]
        width, around, height = self.sizes
        canvas = Canvas(figsize=(width, around + height * len(lines)), layout="constrained")
        grid = canvas.subplots(len(lines), len(lines[0][1]), squeeze=False)
        titles_above: list[str] = []
        for row, (label, panels) in zip(grid, lines, strict=True):
            row[0].set_ylabel(label, fontsize=8.5)
            titles = [shown.title for shown in panels]
            for axes, shown in zip(row, panels, strict=True):
                shown.draw(axes)
                axes.set_xlabel(shown.note, **NOTE)
                axes.set_title(shown.title if titles != titles_above else "")
            titles_above = titles
        bars = [axes for axes in canvas.axes if axes.containers]
        for axes in bars[1:]:  # one scale for all bars
            axes.sharey(bars[0])
            axes.autoscale(axis="y")
        legend(canvas, dots([name for run in data["runs"] for panel in run["panels"] for name in panel["silhouettes"]]))
        return canvas


class LayerOutputs(Embeddings):
    """Base class: features of clean images and of the same images under each threat, at the last adapted layer.

    Features are averaged over patch tokens; the mean silhouette over clean images and threats is printed below the
    picture. The data also has the silhouettes of the picture itself and of the differences from the clean image's
    features. The paper states neither which tokens nor how many images it used. The backbone is W h + b, the experts'
    part sum_k g_k B_k A_k h. Feed-forward experts and MORE have no backbone, so the first expert takes its place and
    their whole output counts as the experts'. A run without experts shows the output of its last block.
    """

    parts: tuple[str, ...]
    """The parts that are measured and drawn: ``backbone``, ``experts``, ``backbone + experts``."""
    lacking = "none of these runs has features to show"

    def measure_run(self, subject: Subject, options: Options) -> dict[str, Any]:
        groups, layers = subject.attacked(options.n), expert_layers(subject.model)
        layer = options.pick(layers or features.block_layers(subject.model))
        if layers:
            outputs = features.parts(subject.model, groups, layer)
            vectors = {BACKBONE: outputs.backbone, EXPERTS: outputs.experts, OUTPUT: outputs.output}
            vectors = {part: vectors[part] for part in self.parts}
        else:
            vectors = {BACKBONE: features.at(features.collect(subject.model, groups, layer), "global")}
        panels, names = [], list(groups)
        for part, values in vectors.items():
            where = {"layer": layer, "part": part, "place": "global"}
            panels.append(_panel(names, values, options.seed, where | {"space": FEATURES}))
            if len(names) > 2:
                panels.append(_panel(names[1:], difference(values), None, where | {"space": DIFFERENCE}))
        adds = not layers or layers[layer].additive
        return {"run": subject.name, "adds": adds, "labels": subject.images(options.n)[1].tolist(), "panels": panels}

    def lines(self, run: dict[str, Any]) -> list[tuple[str, list[Shown]]]:
        drawn, shown = {panel["part"]: panel for panel in run["panels"] if "points" in panel}, []
        for part in self.parts:
            panel = drawn.get(part)
            if panel is None and len(self.parts) == 1:
                panel = drawn[BACKBONE]
            if panel is None:
                shown.append(Shown(part, "no experts", partial(scatter, groups={})))
                continue
            score = float(np.mean(list(panel["silhouettes"].values())))
            prefix = "no experts: "
            if panel["part"] == part:
                prefix = "" if run["adds"] else INSTEAD.get(part, "")
            note = f"{prefix}{short(panel['layer'])}\nsilhouette {signed(score)}"
            shown.append(Shown(part, note, partial(scatter, groups=panel["points"])))
        return [(side(run["run"]), shown)]


class ExpertOutputs(LayerOutputs):
    """Outputs of the experts, one panel per run."""

    name = "fig1"
    title = "t-SNE of expert outputs per threat"
    parts = (EXPERTS,)
    sizes = (PAGE, 0.6, 1.85)


class BackboneAndExperts(LayerOutputs):
    """Backbone features without and with the experts' output, two panels per run."""

    name = "fig6"
    title = "t-SNE of backbone features and of backbone + experts per threat"
    parts = (BACKBONE, OUTPUT)
    sizes = (COLUMN, 0.6, 1.85)


class Separability(Embeddings):
    """Base class: silhouettes of the threats at every token and for the mean over tokens, and t-SNE at some of them.

    Both are computed for the features themselves and for their differences from the same image's clean features, most
    likely what the paper scored (:mod:`rome.report.separability`); each has its own row of panels. The data also has
    the silhouettes of the drawn embeddings. Local scores are mean and standard deviation over tokens, as in the paper.
    Layers are the blocks of a ViT or the stages of a CNN or Swin; runs need no experts.
    """

    every_layer: bool
    """True: data of all blocks, pictures of the first and the last. False: both of the layer ``Options.layer`` only."""
    titles: ClassVar[Mapping[str, str]]
    """Title of each column: some of :data:`rome.report.features.PLACES`, and ``local``, bars of the silhouettes."""
    lacking = "separability needs a run with two or more threats"

    def measure_run(self, subject: Subject, options: Options) -> dict[str, Any]:
        groups = subject.attacked(options.n)
        threats = [name for name in groups if name != NATURAL]
        if len(threats) < 2:
            raise UserError("it has fewer than two threats")
        blocks = features.block_layers(subject.model)
        layers, panels = blocks if self.every_layer else (options.pick(blocks),), []
        for layer in layers:
            outputs = features.collect(subject.model, groups, layer)
            count = outputs.shape[2]
            positions = np.unique(np.linspace(0, count - 1, min(POSITIONS, count)).round().astype(int))
            for space, values in ((FEATURES, outputs[1:]), (DIFFERENCE, difference(outputs))):
                where = {"layer": layer, "part": OUTPUT, "space": space}
                local = np.stack([silhouettes(values[:, :, t]) for t in positions])  # (T', P)
                scores = np.stack([local.mean(axis=0), local.std(axis=0)], axis=1)
                panels.append({**where, "place": LOCAL, "silhouettes": _named(threats, scores, 6), "tokens": count})
                for place in features.PLACES:
                    drawn = place in self.titles and layer in (layers[0], layers[-1])
                    seed = options.seed if drawn else None
                    panels.append(_panel(threats, features.at(values, place), seed, where | {"place": place}))
        return {"run": subject.name, "labels": subject.images(options.n)[1].tolist(), "panels": panels}

    def lines(self, run: dict[str, Any]) -> list[tuple[str, list[Shown]]]:
        lines = []
        for (layer, space), group in groupby(run["panels"], key=itemgetter("layer", "space")):
            panels, shown = {panel["place"]: panel for panel in group}, []
            for place, title in self.titles.items():
                panel, title = panels[place], title + SPACES[space]
                if place == LOCAL:
                    draw = partial(_bars, local=panel["silhouettes"], whole=panels["global"]["silhouettes"])
                    shown.append(Shown(title, "filled: local, mean ± s.d. over tokens\nhatched: global", draw))
                elif "points" in panel:
                    scores = [signed(float(np.mean(list(panel[of].values())))) for of in ("silhouettes", "embedding")]
                    note = "silhouette {}\nin the picture {}".format(*scores)
                    shown.append(Shown(title, note, partial(scatter, groups=panel["points"])))
            if shown:
                lines.append((side(run["run"], short(layer)), shown))
        return lines


class LocalAndGlobal(Separability):
    """One layer (``Options.layer`` or the last): t-SNE at the middle token and of the mean over tokens, silhouettes."""

    name = "fig5"
    title = "separability of threats in local and global features, and in their differences from the natural image's"
    every_layer = False
    titles: ClassVar[Mapping[str, str]] = {
        "middle": "local: middle token",
        "global": "global: mean over tokens",
        LOCAL: "silhouette",
    }
    sizes = (PAGE, 0.55, 2.25)


class OverLayers(Separability):
    """First and last block: t-SNE at the first, middle and last token and of the mean; the data has every block."""

    name = "figA4"
    title = (
        "separability of threats in the first and last layer, at three tokens and globally, in features and in their "
        "differences from the natural image's"
    )
    every_layer = True
    titles: ClassVar[Mapping[str, str]] = {place: f"{place} token" for place in features.PLACES[:-1]} | {
        "global": "global"
    }
    sizes = (PAGE, 0.35, 2.2)


def _panel(names: Sequence[str], values: np.ndarray, seed: int | None, where: Mapping[str, str]) -> Panel:
    """Silhouettes of features (G, n, D) and, with a seed, their t-SNE points and the silhouettes of these."""
    panel: Panel = {**where, "silhouettes": _named(names, silhouettes(values), 6)}
    if seed is not None:
        points = embed(values, seed=seed)
        panel |= {"embedding": _named(names, silhouettes(points), 6), "points": _named(names, points, 4)}
    return panel


def _named(names: Sequence[str], values: np.ndarray, digits: int) -> dict[str, Any]:
    return dict(zip(names, values.round(digits).tolist(), strict=True))


def _bars(axes: Axes, local: Mapping[str, tuple[float, float]], whole: Mapping[str, float]) -> None:
    """Draw the local silhouettes with standard deviations over tokens, and the global ones, hatched, beside them."""
    styles = styles_of(list(local))
    for i, (threat, (mean, spread)) in enumerate(local.items()):
        axes.bar(i - 0.2, mean, 0.36, color=styles[threat].colour, yerr=spread, error_kw={"elinewidth": 0.9})
        axes.bar(i + 0.2, whole[threat], 0.36, color="white", edgecolor=styles[threat].colour, hatch="/////")
    axes.axhline(0, color="#555555", lw=0.7)
    axes.set_xticks(range(len(styles)), [look.label for look in styles.values()])
    axes.tick_params(axis="x", length=0)
