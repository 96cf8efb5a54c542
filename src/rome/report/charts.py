"""Charts as inline SVG that takes its colours and typeface from the page, so that it follows light and dark.

Matplotlib draws with stand-in colours; each becomes a CSS variable: ``--ink``, ``--muted``, ``--line``,
``--run-0`` ... and ``--threat-0`` ...
"""

from __future__ import annotations

import hashlib
import html
import io
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context, style, ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rome.evaluation.evaluate import Report
from rome.report.columns import columns_of

SERIES = 6
"""Colours before they repeat."""
_VARIABLES = ["ink", "muted", "line", *(f"run-{i}" for i in range(SERIES)), *(f"threat-{i}" for i in range(SERIES))]
_STAND_IN = {name: f"#0a0b{i:02x}" for i, name in enumerate(_VARIABLES)}
_MARKERS = "osD^vP"
_NO_SERIES = {"event", "update", "epoch", "accuracy", "lr", "images_per_second", "seconds", "loss"}
"""Entries of an epoch event that are no part of the loss."""


def accuracies(rows: Sequence[tuple[str, Report]], unions: Sequence[Sequence[str]] = ()) -> str:
    """Every accuracy of every run as a dot with its 95% interval, where it has one."""
    columns = [column for column in columns_of([report for _, report in rows], unions) if column.has_interval]
    size, offset = (4.9, 0.6 + len(columns) * max(0.42, 0.24 * len(rows))), min(0.2, 0.7 / len(rows))
    with _chart(size) as (figure, axes):
        for i, (_, report) in enumerate(rows):
            cells = [column.cell(report) for column in columns]
            values = np.array([cell.value for cell in cells])
            ends = np.array([cell.interval or (math.nan, math.nan) for cell in cells]).T
            places = np.arange(len(columns)) + (i - (len(rows) - 1) / 2) * offset
            errors, colour = 100 * np.maximum([values - ends[0], ends[1] - values], 0), _colour("run", i)
            marker = _MARKERS[i % len(_MARKERS)]
            axes.errorbar(100 * values, places, xerr=errors, fmt=marker, ms=6, color=colour, elinewidth=1.8)
        axes.set_yticks(range(len(columns)), [column.title for column in columns])
        axes.set(xlim=(0, 100), ylim=(len(columns) - 0.5, -0.5), xlabel="examples classified right, %")
        axes.tick_params(axis="y", length=0, labelsize=11.5, labelcolor=_STAND_IN["ink"])
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x")
        axes.set_axisbelow(True)
        return _svg(figure, "Accuracy of every run with its 95% interval; the numbers are in the table")


def histories(logs: Mapping[str, Sequence[Mapping[str, Any]]], *, natural: int) -> list[str]:
    """One chart of each quantity over epochs: loss, its parts, and training accuracy under each threat.

    Args:
        logs: run -> its epoch events.
        natural: shade this many first epochs, which trained on unperturbed images.
    """
    runs = [[(event["epoch"], _quantities(event)) for event in events] for events in logs.values()]
    quantities = dict.fromkeys(quantity for points in runs for _, values in points for quantity in values)
    last = max((epoch for points in runs for epoch, _ in points), default=1)
    charts = []
    for quantity in quantities:
        percent = quantity.startswith("accuracy")
        with _chart((3.4, 2.3)) as (figure, axes):
            if natural:
                axes.axvspan(0.5, natural + 0.5, color=_STAND_IN["line"], alpha=0.35, lw=0)
            for i, points in enumerate(runs):
                curve = np.array([(epoch, values[quantity]) for epoch, values in points if quantity in values])
                if len(curve):
                    marker = _MARKERS[i % len(_MARKERS)] if len(curve) < 30 else None
                    scale = 100 if percent else 1
                    axes.plot(curve[:, 0], scale * curve[:, 1], marker=marker, ms=3.5, color=_colour("run", i))
            axes.set(xlabel="epoch", xlim=(0.5 - 0.03 * last, last + 0.5 + 0.03 * last))  # alike in all charts
            if percent:
                axes.set_ylim(0, 100)
                axes.yaxis.set_major_locator(ticker.MultipleLocator(25))
            axes.xaxis.set_major_locator(ticker.MaxNLocator(5, integer=True))
            axes.set_title(f"{quantity}, %" if percent else quantity.replace("_", " "), loc="left")
            axes.grid(axis="y")
            charts.append(_svg(figure, f"{quantity} over epochs"))
    return charts


def densities(samples: Mapping[str, np.ndarray], title: str, limits: tuple[float, float]) -> str:
    """Densities of one expert's gate weight, a curve for each group (name -> values (n,))."""
    with _chart((2.9, 1.9)) as (figure, axes):
        draw_densities(axes, samples, limits, [{"color": _colour("threat", i), "lw": 1.6} for i in range(len(samples))])
        axes.xaxis.set_major_locator(ticker.MaxNLocator(4))
        axes.set_title(title, loc="left")
        return _svg(figure, f"{title}: density of the gate weight under {', '.join(samples)}")


def draw_densities(
    axes: Axes, samples: Mapping[str, np.ndarray], limits: tuple[float, float], looks: Sequence[dict[str, Any]]
) -> None:
    """Kernel densities of groups, the first of them filled, so that the others can be seen against it.

    Args:
        looks: of each group's line.
    """
    grid = np.linspace(*limits, 240)
    for i, (values, look) in enumerate(zip(samples.values(), looks, strict=True)):
        curve = kernel_density(values, grid, least=(limits[1] - limits[0]) / 100)
        axes.plot(grid, curve, **look)
        if i == 0:
            axes.fill_between(grid, curve, color=look["color"], alpha=0.25, lw=0)
    axes.set(xlim=limits, ylim=(0, None), yticks=[])
    axes.spines["left"].set_visible(False)


def themed(draw: Callable[[], Figure], label: str) -> str:
    """A figure of the paper in its own size, its text and axes in the page's colours."""
    with _styled(), rc_context({"font.size": 9, "axes.labelsize": 9, "lines.linewidth": 1.4}):
        return _svg(draw(), label).replace('style="max-width:', 'style="width:', 1)


def kernel_density(values: np.ndarray, grid: np.ndarray, *, least: float) -> np.ndarray:
    """Density on [0, 1] of ``values`` (n,) at ``grid`` (m,): Gaussian kernels, reflected at 0 and 1.

    Silverman's bandwidth 1.06 s n^(-1/5), but at least ``least``.
    """
    width = max(1.06 * float(values.std()) * len(values) ** -0.2, least)
    mirrored = np.stack([values, -values, 2 - values])
    kernels = np.exp(-0.5 * ((grid[:, None, None] - mirrored) / width) ** 2)
    return np.asarray(kernels.sum(axis=1).mean(axis=1) / (width * math.sqrt(2 * math.pi)))


def limits(values: np.ndarray, *, least: float = 0.2) -> tuple[float, float]:
    """A range inside [0, 1] that shows all weights, at least ``least`` wide so that noise does not look like much."""
    low, high = float(values.min()), float(values.max())
    pad = max(0.08 * (high - low), (least - (high - low)) / 2)
    low, high = low - pad, high + pad
    return max(0.0, min(low, 1 - least)), min(1.0, max(high, least))


def _quantities(event: Mapping[str, Any]) -> dict[str, float]:
    """The curves of an epoch event; without the loss where it is no more than the one part beside it."""
    parts = {key: value for key, value in event.items() if key not in _NO_SERIES and isinstance(value, (int, float))}
    loss = {"loss, all parts": event["loss"]} if "loss" in event and set(parts) != {"cross_entropy"} else {}
    accuracy = {
        "accuracy without attack" if name == "clean" else f"accuracy under {name}": value
        for name, value in event.get("accuracy", {}).items()
    }
    return {**parts, **loss, **accuracy}


def _colour(family: str, i: int) -> str:
    return _STAND_IN[f"{family}-{i % SERIES}"]


def _styled() -> Any:
    return style.context(Path(__file__).parent / "page.mplstyle")


@contextmanager
def _chart(size: tuple[float, float]) -> Iterator[tuple[Figure, Axes]]:
    with _styled():
        figure = Figure(figsize=size, layout="constrained")
        yield figure, figure.subplots()


def _svg(figure: Figure, label: str) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text[text.index("<svg") :])
    used = set(re.findall(r"(?:url\(|xlink:href=\")#([^)\"]+)", text))
    mark = hashlib.sha256((label + text).encode()).hexdigest()[:8]  # ids are the page's, where charts have equal ones
    text = re.sub(r' id="([^"]+)"', lambda m: f' id="{mark}-{m[1]}"' if m[1] in used else "", text)
    text = re.sub(r"(url\(|xlink:href=\")#", rf"\1#{mark}-", text)
    for name, colour in _STAND_IN.items():
        text = text.replace(colour, f"var(--{name})")
    width, height = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text).groups()  # type: ignore[union-attr]
    start = f'<svg role="img" aria-label="{html.escape(label)}" viewBox="0 0 {width} {height}" '
    start += f'style="max-width: {width}pt" xmlns="http://www.w3.org/2000/svg" '
    return start + 'xmlns:xlink="http://www.w3.org/1999/xlink"' + text[text.index(">") :].strip()
