"""Fig. 7: where on an image each expert is active, with every region of the image under another threat."""

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
from rome.experts import expert_layers, record_gates
from rome.experts.token_maps import grid_of
from rome.report.charts import limits
from rome.report.figures.base import Options, PaperFigure
from rome.report.figures.style import looks, side
from rome.report.subject import NATURAL, STEPS, Subject, short
from rome.threats import LpBall, PerExample

SHOWN = 6
"""Experts; more would not be readable side by side."""
Box = tuple[int, int, int, int]
"""First row, row after the last, first column, column after the last; in pixels."""


class RegionMaps(PaperFigure):
    """Gate weights over one image whose regions are natural or under one Lp ball each; a row for every run. What the
    regions show differs too, not their threats alone: the file with the data has means over all arrangements.

    Each region is attacked by itself: the model sees the perturbation only there, so that APGD moves nothing elsewhere
    and the whole search is spent inside. A region cut out of an attack on the whole image could hold next to nothing of
    it, as L1 perturbations are sparse. The budget is the share that belongs to the region's part a of the area, a eps
    in L1, sqrt(a) eps in L2, eps in Linf: as dense as what the run was trained on. The regions are then one image.

    So the numbers are given twice: in the pictured arrangement, and over all arrangements, in which every threat visits
    every region in turn, where differences come from the threats alone.
    """

    name = "fig7"
    title = "expert activations over one image whose regions are under different threats"

    def measure(self, subjects: Sequence[Subject], options: Options) -> dict[str, Any]:
        found, left_out = [], {}
        for subject in subjects:
            try:
                found.append(_of_run(subject, options))
            except UserError as error:
                left_out[subject.name] = str(error)
        if not found:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
            raise UserError(f"no run weighs experts differently over the image ({reasons})")
        return {"image": options.image, "steps": STEPS, "runs": found, "left_out": left_out}

    def rows(self, data: dict[str, Any]) -> list[dict[str, Any]]:
        return [
            {
                "run": run["name"],
                "layer": run["layer"],
                "expert": expert + 1,
                "row": row,
                "column": column,
                "region": run["places"][row][column],
                "gate": value,
            }
            for run in data["runs"]
            for expert, grid in enumerate(run["maps"])
            for row, line in enumerate(grid)
            for column, value in enumerate(line)
        ]

    def draw(self, data: dict[str, Any]) -> Canvas:
        runs = data["runs"]
        shown = [_most_varied(run) for run in runs]
        columns = max(map(len, shown))
        low, high = limits(
            np.concatenate([np.ravel(run["maps"][k]) for run, own in zip(runs, shown, strict=True) for k in own])
        )
        canvas = Canvas(figsize=(6.75, 0.35 + 1.2 * len(runs) * min(1.0, 5 / (columns + 1))), layout="constrained")
        axes = canvas.subplots(len(runs), columns + 1, squeeze=False)
        for line, run, experts in zip(axes, runs, shown, strict=True):
            _image(line[0], run)
            for axis in line[1 + len(experts) :]:
                axis.set_visible(False)
            for axis, expert in zip(line[1:], experts, strict=False):
                height, width = np.shape(run["pixels"])[:2]
                scale = axis.imshow(
                    run["maps"][expert], cmap="viridis", vmin=low, vmax=high, extent=(0, width, height, 0)
                )
                _borders(axis, run, "white")
                _bare(axis)
                axis.set_title(f"expert {expert + 1}", fontsize=8, pad=3)
        bar = canvas.colorbar(scale, ax=axes.ravel().tolist(), shrink=0.8, aspect=12 * len(runs), pad=0.015)
        bar.set_label("gate weight", fontsize=8)
        bar.ax.tick_params(labelsize=7, length=2)
        bar.outline.set_visible(False)
        return canvas


def boxes(count: int, height: int, width: int) -> list[Box]:
    """The image in parts: quadrants for four, upright stripes for any other number."""
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
    """One image (1, C, H, W) with label (1,) under each threat inside a box alone: name -> (1, C, H, W)."""
    top, bottom, left, right = box
    mask = torch.zeros_like(x, dtype=torch.bool)
    mask[..., top:bottom, left:right] = True
    area = (bottom - top) * (right - left) / (x.shape[2] * x.shape[3])
    share = {"L1": area, "L2": math.sqrt(area), "Linf": 1.0}
    scaled = [threat.model_copy(update={"eps": threat.eps * share[threat.norm]}) for threat in threats.values()]
    mixture = PerExample.repeated(scaled, 1)
    found = APGD(steps=STEPS)(_Within(model, x, mask), x.repeat(len(scaled), 1, 1, 1), y.repeat(len(scaled)), mixture)
    return dict(zip(threats, torch.split(torch.where(mask, found, x), 1), strict=True))


class _Within(nn.Module):
    """The model of images that equal one image outside a mask: gradients are zero there."""

    def __init__(self, model: nn.Module, x: Tensor, mask: Tensor) -> None:
        super().__init__()
        self.model, self.x, self.mask = model, x, mask

    def forward(self, z: Tensor) -> Tensor:
        return self.model(torch.where(self.mask, z, self.x))


def _of_run(subject: Subject, options: Options) -> dict[str, Any]:
    layers = expert_layers(subject.model)
    if not layers:
        raise UserError("it has no experts")
    name = options.pick(layers)
    if options.image >= len(subject.split):
        raise UserError(f"there is no test image {options.image}: there are {len(subject.split)}, numbered from 0")
    ((x, y),) = subject.split.batches([torch.tensor([options.image])], device=subject.device)
    threats = {label: threat for label, threat in subject.threats.items() if isinstance(threat, LpBall)}
    if not threats:
        raise UserError("it was trained on no Lp ball, and only these are attacked within a region")
    labels = [NATURAL, *threats]
    parts = boxes(len(labels), x.shape[2], x.shape[3])
    with torch.no_grad(), record_gates(subject.model) as recorder:  # before the attacks: is there a map at all?
        subject.model(x)
    gates = recorder.gates[name]
    if gates.local is None and bool((gates.weights == gates.weights[:, :1]).all()):
        raise UserError(f"layer {name} weighs its experts for the image as a whole: there is no map of them")
    grid = grid_of(subject.model, name, gates.weights.shape[1], (x.shape[2], x.shape[3]))
    places = _places(parts, grid.rows, grid.columns, x.shape[2], x.shape[3])
    if set(places.ravel().tolist()) != set(range(len(parts))):
        raise UserError(f"its map of {grid.rows}x{grid.columns} is too coarse for {len(parts)} regions")

    attacked = [{NATURAL: x, **attacked_within(subject.model, x, y, threats, box)} for box in parts]
    images = []
    for turn in range(len(labels)):
        image = x.clone()
        for i, (top, bottom, left, right) in enumerate(parts):
            carried = attacked[i][labels[(i + turn) % len(labels)]]
            image[..., top:bottom, left:right] = carried[..., top:bottom, left:right]
        images.append(image)
    with torch.no_grad(), record_gates(subject.model) as recorder:
        subject.model(torch.cat(images))
    maps = grid.spread(recorder.gates[name].weights).cpu().double().numpy()  # (turns, K, rows, columns)
    natural = grid.spread(gates.weights).cpu().double().numpy()[0]
    by_region = np.stack([maps[:, :, places == i].mean(axis=-1) for i in range(len(parts))], axis=1)
    by_threat = [
        np.mean([by_region[turn, (k - turn) % len(parts)] for turn in range(len(parts))], axis=0)
        for k in range(len(parts))
    ]
    return {
        "name": subject.name,
        "layer": name,
        "regions": [
            {
                "name": label,
                "box": list(box),
                "gates": _rounded(by_region[0, i]),
                "gates_unperturbed": _rounded(natural[:, places == i].mean(axis=-1)),
                "gates_all_arrangements": _rounded(by_threat[i]),
            }
            for i, (label, box) in enumerate(zip(labels, parts, strict=True))
        ],
        "apart": [
            {
                "a": labels[i],
                "b": labels[j],
                "distance": round(float(np.linalg.norm(by_region[0, i] - by_region[0, j])), 6),
                "distance_all_arrangements": round(float(np.linalg.norm(by_threat[i] - by_threat[j])), 6),
            }
            for i, j in itertools.combinations(range(len(labels)), 2)
        ],
        "places": [[labels[i] for i in line] for line in places.tolist()],
        "maps": _rounded(maps[0]),
        "pixels": (images[0][0].clamp(0, 1) * 255).round().int().permute(1, 2, 0).tolist(),
        "perturbation": _rounded((images[0] - x)[0].mean(dim=0).cpu().double().numpy()),
    }


def _places(parts: Sequence[Box], rows: int, columns: int, height: int, width: int) -> np.ndarray:
    """int (rows, columns): the region in which the centre of each place of the map lies."""
    found = np.full((rows, columns), -1)
    for row, column in itertools.product(range(rows), range(columns)):
        down, across = (row + 0.5) * height / rows, (column + 0.5) * width / columns
        for i, (top, bottom, left, right) in enumerate(parts):
            if top <= down < bottom and left <= across < right:
                found[row, column] = i
    return found


def _rounded(values: np.ndarray) -> Any:
    return np.round(values, 5).tolist()


def _most_varied(run: dict[str, Any]) -> list[int]:
    """The experts whose mean gates differ most between regions, in their order."""
    means = np.array([region["gates"] for region in run["regions"]])
    spread = means.max(axis=0) - means.min(axis=0)
    return sorted(sorted(range(len(spread)), key=lambda k: -spread[k])[:SHOWN])


def _image(axis: Axes, run: dict[str, Any]) -> None:
    """The perturbation over a faint image, each region by its own scale, with the regions' names."""
    pixels, delta = np.array(run["pixels"]) / 255, np.array(run["perturbation"])
    for region in run["regions"]:
        top, bottom, left, right = region["box"]
        part = delta[top:bottom, left:right]
        part /= max(float(np.abs(part).max()), 1e-12)
    gray = 0.55 + 0.35 * pixels.mean(axis=2, keepdims=True)
    strength = np.abs(delta)[..., None]
    picture = (1 - strength) * gray + strength * colormaps["RdBu_r"](0.5 + 0.38 * delta)[..., :3]
    axis.imshow(picture, extent=(0, delta.shape[1], delta.shape[0], 0), interpolation="nearest")
    _borders(axis, run, "black")
    _bare(axis)
    axis.set_title("perturbation", fontsize=8, pad=3)
    axis.set_ylabel(side(run["name"], short(run["layer"])), fontsize=8)
    every = looks([region["name"] for region in run["regions"]])
    for region in run["regions"]:
        top, bottom, left, right = region["box"]
        axis.text(
            (left + right) / 2,
            (top + bottom) / 2,
            every[region["name"]].label,
            ha="center",
            va="center",
            fontsize=7.5,
            color="black",
            path_effects=[withStroke(linewidth=2, foreground="white")],
        )


def _borders(axis: Axes, run: dict[str, Any], colour: str) -> None:
    for region in run["regions"]:
        top, bottom, left, right = region["box"]
        axis.plot([left, right, right, left, left], [top, top, bottom, bottom, top], color=colour, lw=0.8)
    height, width = np.shape(run["perturbation"])
    axis.set_xlim(0, width)
    axis.set_ylim(height, 0)


def _bare(axis: Axes) -> None:
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_visible(False)
