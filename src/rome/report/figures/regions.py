"""Fig. 7: where each expert is active on an image whose regions are under different threats."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.patheffects import withStroke
from torch import Tensor, nn

from rome.attacks import APGD
from rome.core.errors import UserError
from rome.experts import Gates, record_gates
from rome.experts.token_maps import grid_of
from rome.report.figures.base import FigureOfRuns, Options, flatten_data, require_experts
from rome.report.figures.style import PAGE, limits, side, styles_of
from rome.report.gates import distinct_experts
from rome.report.subject import NATURAL, STEPS, Subject, short
from rome.threats import LpBall, PerExample

SHOWN = 6
"""Maximum number of experts drawn; more would not be readable side by side."""
Box = tuple[int, int, int, int]
"""First row, row after the last, first column, column after the last, in pixels."""


class RegionMaps(FigureOfRuns):
    """Gate weights over one image whose regions are clean or each under one Lp ball; one row per run.

    Each region is attacked separately: the model sees the perturbation only there, so APGD changes nothing elsewhere
    and spends its whole search inside. A region cut out of an attack on the whole image could contain almost none of
    the perturbation, because L1 perturbations are sparse. The budget is scaled by the region's share a of the area to
    a eps in L1, sqrt(a) eps in L2 and eps in Linf, which makes the perturbation as dense as those the run was trained
    on. The attacked regions are then joined into one image.

    Regions differ in content as well as in threat. The data therefore has the numbers twice: for the arrangement that
    is drawn, and as means over all arrangements, in which every threat is applied to every region in turn, so that
    differences come from the threats alone.
    """

    name = "fig7"
    title = "expert activations over one image whose regions are under different threats"

    lacking = "none of these runs weights its experts differently across the image"

    def measure(self, subjects: Sequence[Subject], options: Options) -> dict[str, Any]:
        return {"image": options.image, "steps": STEPS, **super().measure(subjects, options)}

    def measure_run(self, subject: Subject, options: Options) -> dict[str, Any]:
        name = options.pick(require_experts(subject))
        if options.image >= len(subject.split):
            raise UserError(f"there is no test image {options.image}; choose from 0 to {len(subject.split) - 1}")
        ((x, y),) = subject.split.batches([torch.tensor([options.image])], device=subject.device)
        threats = {label: threat for label, threat in subject.threats.items() if isinstance(threat, LpBall)}
        if not threats:
            raise UserError("it was not trained on any Lp ball, and only these can be attacked within a region")
        labels = [NATURAL, *threats]
        height, width = x.shape[2:]
        parts = boxes(len(labels), height, width)
        gates = _recorded(subject.model, x, name)  # before the costly attacks: checks that there is a map at all
        if gates.local is None and bool((gates.weights == gates.weights[:, :1]).all()):
            raise UserError(f"layer {name} weights its experts for the whole image at once, so there is no map to draw")
        grid = grid_of(subject.model, name, gates.weights.shape[1], (height, width))
        places = _places(parts, grid.rows, grid.columns, height, width)
        if set(places.ravel().tolist()) != set(range(len(parts))):
            raise UserError(f"its map of {grid.rows}x{grid.columns} is too coarse for {len(parts)} regions")

        def as_maps(weights: Tensor) -> np.ndarray:
            return np.asarray(grid.spread(weights).cpu().double())

        attacked = [{NATURAL: x, **attacked_within(subject.model, x, y, threats, box)} for box in parts]
        turns = range(len(labels))
        images = x.repeat(len(labels), 1, 1, 1)
        for turn, (i, (top, bottom, left, right)) in itertools.product(turns, enumerate(parts)):
            where = (..., slice(top, bottom), slice(left, right))
            images[turn][where] = attacked[i][labels[(i + turn) % len(labels)]][0][where]
        maps = as_maps(_recorded(subject.model, images, name).weights)  # (turns, K, rows, columns)
        clean = as_maps(gates.weights)[0]
        by_region = np.stack([maps[:, :, places == i].mean(axis=-1) for i in turns], axis=1)
        by_threat = [np.mean([by_region[turn, (k - turn) % len(parts)] for turn in turns], axis=0) for k in turns]
        regions = [
            {"name": labels[i], "box": list(parts[i]), "gates": _rounded(by_region[0, i])}
            | {"gates_unperturbed": _rounded(clean[:, places == i].mean(axis=-1))}
            | {"gates_all_arrangements": _rounded(by_threat[i])}
            for i in turns
        ]
        apart = [
            {"a": labels[i], "b": labels[j], "distance": _apart(by_region[0, i], by_region[0, j])}
            | {"distance_all_arrangements": _apart(by_threat[i], by_threat[j])}
            for i, j in itertools.combinations(turns, 2)
        ]
        return {
            "name": subject.name,
            "layer": name,
            "regions": regions,
            "apart": apart,
            "places": [[labels[i] for i in line] for line in places.tolist()],
            "maps": _rounded(maps[0]),
            "pixels": (images[0].clamp(0, 1) * 255).round().int().permute(1, 2, 0).tolist(),
            "perturbation": _rounded(np.asarray((images[:1] - x)[0].mean(dim=0).cpu().double())),
        }

    def rows(self, data: dict[str, Any]) -> list[dict[str, Any]]:
        return [
            {"run": run["name"], "layer": run["layer"], "expert": expert + 1, "row": row, "column": column}
            | {"region": run["places"][row][column], "gate": value}
            for run in data["runs"]
            for expert, row, column, value in flatten_data(run["maps"], 3)
        ]

    def draw(self, data: dict[str, Any]) -> Canvas:
        runs = data["runs"]
        means = [np.array([region["gates"] for region in run["regions"]]) for run in runs]
        shown = [distinct_experts(each, SHOWN) for each in means]
        columns = max(map(len, shown))
        maps = [[run["maps"][k] for k in own] for run, own in zip(runs, shown, strict=True)]
        low, high = limits(np.concatenate([np.ravel(own) for own in maps]))
        canvas = Canvas(figsize=(PAGE, 0.35 + 1.2 * len(runs) * min(1.0, 5 / (columns + 1))), layout="constrained")
        axes = canvas.subplots(len(runs), columns + 1, squeeze=False)
        for line, run, experts, own in zip(axes, runs, shown, maps, strict=True):
            _image(line[0], run)
            for axis in line[1 + len(experts) :]:
                axis.set_visible(False)
            for axis, expert, weights in zip(line[1:], experts, own, strict=False):
                height, width = np.shape(run["pixels"])[:2]
                scale = axis.imshow(weights, cmap="viridis", vmin=low, vmax=high, extent=(0, width, height, 0))
                _regions(axis, run, "white", f"expert {expert + 1}")
        bar = canvas.colorbar(scale, ax=axes.ravel().tolist(), shrink=0.8, aspect=12 * len(runs), pad=0.015)
        bar.set_label("gate weight", fontsize=8)
        bar.ax.tick_params(labelsize=7, length=2)
        bar.outline.set_visible(False)
        return canvas


def boxes(count: int, height: int, width: int) -> list[Box]:
    """Divide the image into ``count`` parts: quadrants for four, vertical stripes for any other number."""
    if count == 4:
        middle, centre = height // 2, width // 2
        return [
            (top, bottom, left, right)
            for top, bottom in ((0, middle), (middle, height))
            for left, right in ((0, centre), (centre, width))
        ]
    edges = [round(i * width / count) for i in range(count + 1)]
    return [(0, height, left, right) for left, right in itertools.pairwise(edges)]


def attacked_within(
    model: nn.Module, x: Tensor, y: Tensor, threats: Mapping[str, LpBall], box: Box
) -> dict[str, Tensor]:
    """Attack one image (1, C, H, W) with label (1,) under each threat, inside a box only: name -> (1, C, H, W)."""
    top, bottom, left, right = box
    mask = torch.zeros_like(x, dtype=torch.bool)
    mask[..., top:bottom, left:right] = True
    area = (bottom - top) * (right - left) / (x.shape[2] * x.shape[3])
    share = {"L1": area, "L2": math.sqrt(area), "Linf": 1.0}
    scaled = [threat.model_copy(update={"eps": threat.eps * share[threat.norm]}) for threat in threats.values()]
    mixture = PerExample.repeated(scaled, 1)
    x_adv = APGD(steps=STEPS)(_Within(model, x, mask), x.repeat(len(scaled), 1, 1, 1), y.repeat(len(scaled)), mixture)
    return dict(zip(threats, torch.split(torch.where(mask, x_adv, x), 1), strict=True))


class _Within(nn.Module):
    """The model on inputs whose pixels outside a mask are replaced by those of ``x``: gradients are zero there."""

    def __init__(self, model: nn.Module, x: Tensor, mask: Tensor) -> None:
        super().__init__()
        self.model, self.x, self.mask = model, x, mask

    def forward(self, z: Tensor) -> Tensor:
        return self.model(torch.where(self.mask, z, self.x))


def _recorded(model: nn.Module, images: Tensor, layer: str) -> Gates:
    with torch.no_grad(), record_gates(model) as recorder:
        model(images)
    return recorder.gates[layer]


def _places(parts: Sequence[Box], rows: int, columns: int, height: int, width: int) -> np.ndarray:
    """Index of the region that contains the centre of each cell of the map: int (rows, columns)."""
    down, across = (np.arange(rows) + 0.5) * height / rows, (np.arange(columns) + 0.5) * width / columns
    regions = np.full((rows, columns), -1)
    for i, (top, bottom, left, right) in enumerate(parts):
        regions[np.ix_((top <= down) & (down < bottom), (left <= across) & (across < right))] = i
    return regions


def _rounded(values: np.ndarray) -> Any:
    return np.round(values, 5).tolist()


def _apart(a: np.ndarray, b: np.ndarray) -> float:
    return round(float(np.linalg.norm(a - b)), 6)


def _image(axis: Axes, run: dict[str, Any]) -> None:
    """Draw the perturbation over a faint image, each region on its own scale, with the regions' names."""
    pixels, delta = np.array(run["pixels"]) / 255, np.array(run["perturbation"])
    for region in run["regions"]:
        top, bottom, left, right = region["box"]
        part = delta[top:bottom, left:right]
        part /= max(float(np.abs(part).max()), 1e-12)
    gray = 0.55 + 0.35 * pixels.mean(axis=2, keepdims=True)
    strength = np.abs(delta)[..., None]
    picture = (1 - strength) * gray + strength * colormaps["RdBu_r"](0.5 + 0.38 * delta)[..., :3]
    axis.imshow(picture, extent=(0, delta.shape[1], delta.shape[0], 0), interpolation="nearest")
    _regions(axis, run, "black", "perturbation")
    axis.set_ylabel(side(run["name"], short(run["layer"])), fontsize=8)
    styles = styles_of([region["name"] for region in run["regions"]])
    outline = [withStroke(linewidth=2, foreground="white")]
    for region in run["regions"]:
        top, bottom, left, right = region["box"]
        centre, label = ((left + right) / 2, (top + bottom) / 2), styles[region["name"]].label
        axis.text(*centre, label, ha="center", va="center", fontsize=7.5, color="black", path_effects=outline)


def _regions(axis: Axes, run: dict[str, Any], colour: str, title: str) -> None:
    """Draw the regions' borders and a title, without ticks and frame."""
    for region in run["regions"]:
        top, bottom, left, right = region["box"]
        axis.plot([left, right, right, left, left], [top, top, bottom, bottom, top], color=colour, lw=0.8)
    height, width = np.shape(run["perturbation"])
    axis.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
    axis.spines[:].set_visible(False)
    axis.set_title(title, fontsize=8, pad=3)
