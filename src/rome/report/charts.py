"""Charts as inline SVG that takes its colours and typeface from the page, so that it follows light and dark.

Matplotlib draws with stand-in colours; each becomes a CSS variable: ``--ink``, ``--muted``, ``--line``,
``--run-0`` ... and ``--threat-0`` ...
"""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rome.evaluation.evaluate import Report
from rome.report.columns import Column, columns_of

SERIES = 6
"""Colours before they repeat."""
_VARIABLES = ["ink", "muted", "line", *(f"run-{i}" for i in range(SERIES)), *(f"threat-{i}" for i in range(SERIES))]
_STAND_IN = {name: f"#0a0b{i:02x}" for i, name in enumerate(_VARIABLES)}
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "rome",
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.labelsize": 11,
    "xtick.labelsize": 10.5,
    "ytick.labelsize": 10.5,
    "axes.edgecolor": _STAND_IN["line"],
    "axes.labelcolor": _STAND_IN["muted"],
    "axes.titlecolor": _STAND_IN["ink"],
    "text.color": _STAND_IN["ink"],
    "xtick.color": _STAND_IN["line"],
    "ytick.color": _STAND_IN["line"],
    "xtick.labelcolor": _STAND_IN["muted"],
    "ytick.labelcolor": _STAND_IN["muted"],
    "grid.color": _STAND_IN["line"],
    "grid.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.8,
}
_MARKERS = "osD^vP"


def accuracies(rows: Sequence[tuple[str, Report]], unions: Sequence[Sequence[str]] = ()) -> str:
    """Every accuracy of every run as a dot with its 95% interval, where it has one."""
    columns = [column for column in columns_of([report for _, report in rows], unions) if column.interval is not None]
    names = [column.title for column in columns]
    offset = min(0.2, 0.7 / len(rows))
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4.9, 0.6 + len(names) * max(0.42, 0.24 * len(rows))), layout="constrained")
        axes: Axes = figure.subplots()
        for i, (_, report) in enumerate(rows):
            values = [100 * column.value(report) for column in columns]
            spans = [_span(column, report) for column in columns]
            low = [value - 100 * span[0] for value, span in zip(values, spans, strict=True)]
            high = [100 * span[1] - value for value, span in zip(values, spans, strict=True)]
            places = [place + (i - (len(rows) - 1) / 2) * offset for place in range(len(names))]
            marker, colour = _MARKERS[i % len(_MARKERS)], _colour("run", i)
            errors = np.maximum([low, high], 0)
            axes.errorbar(values, places, xerr=errors, fmt=marker, ms=6, color=colour, ecolor=colour, elinewidth=1.8)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlim(0, 100)
        axes.set_xlabel("examples classified right, %")
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
    lines = {name: [_quantities(event) for event in events] for name, events in logs.items()}
    quantities = dict.fromkeys(key for events in lines.values() for event in events for key in event)
    return [_history(quantity, {name: (logs[name], lines[name]) for name in logs}, natural) for quantity in quantities]


def densities(samples: Mapping[str, np.ndarray], title: str, limits: tuple[float, float]) -> str:
    """Gaussian kernel densities of one expert's gate weight, a curve for each group (name -> values (n,)).

    The first group is filled, so that the others can be seen against it.
    """
    grid = np.linspace(*limits, 240)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(2.9, 1.9), layout="constrained")
        axes: Axes = figure.subplots()
        for i, values in enumerate(samples.values()):
            curve = kernel_density(values, grid, least=(limits[1] - limits[0]) / 100)
            colour = _colour("threat", i)
            axes.plot(grid, curve, color=colour, lw=1.6)
            if i == 0:
                axes.fill_between(grid, curve, color=colour, alpha=0.18, lw=0)
        axes.set_xlim(*limits)
        axes.set_ylim(bottom=0)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4))
        axes.set_title(title, loc="left")
        return _svg(figure, f"{title}: density of the gate weight under {', '.join(samples)}")


def themed(draw: Callable[[], Figure], label: str) -> str:
    """A figure of the paper in its own size, its text and axes in the page's colours."""
    with matplotlib.rc_context({**_STYLE, "font.size": 9, "axes.labelsize": 9, "lines.linewidth": 1.4}):
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


def _history(quantity: str, runs: Mapping[str, Any], natural: int) -> str:
    percent = quantity.startswith("accuracy")
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(3.4, 2.3), layout="constrained")
        axes: Axes = figure.subplots()
        if natural:
            axes.axvspan(0.5, natural + 0.5, color=_STAND_IN["line"], alpha=0.35, lw=0)
        for i, (events, lines) in enumerate(runs.values()):
            points = [(e["epoch"], line[quantity]) for e, line in zip(events, lines, strict=True) if quantity in line]
            if points:
                epochs, values = zip(*points, strict=True)
                marker = _MARKERS[i % len(_MARKERS)] if len(points) < 30 else None
                scaled = [100 * value if percent else value for value in values]
                axes.plot(epochs, scaled, marker=marker, ms=3.5, color=_colour("run", i))
        last = max((event["epoch"] for events, _ in runs.values() for event in events), default=1)
        axes.set_xlim(0.5 - 0.03 * last, last + 0.5 + 0.03 * last)  # alike in all charts
        if percent:
            axes.set_ylim(0, 100)
            axes.yaxis.set_major_locator(matplotlib.ticker.MultipleLocator(25))
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5, integer=True))
        axes.set_title(f"{quantity}, %" if percent else quantity.replace("_", " "), loc="left")
        axes.set_xlabel("epoch")
        axes.grid(axis="y")
        return _svg(figure, f"{quantity} over epochs")


def _quantities(event: Mapping[str, Any]) -> dict[str, float]:
    """The curves of an epoch event; the sum is left out where its parts are there and it is no more than they."""
    known = {"event", "update", "epoch", "accuracy", "lr", "images_per_second", "seconds", "loss"}
    parts = {key: value for key, value in event.items() if key not in known and isinstance(value, (int, float))}
    loss = {"loss, all parts": event["loss"]} if "loss" in event and set(parts) != {"cross_entropy"} else {}
    accuracy = {
        f"accuracy under {name}" if name != "clean" else "accuracy without attack": value
        for name, value in event.get("accuracy", {}).items()
    }
    return {**parts, **loss, **accuracy}


def _span(column: Column, report: Report) -> tuple[float, float]:
    known = column.interval is not None and not math.isnan(column.value(report))
    return column.interval(report) if known and column.interval is not None else (math.nan, math.nan)


def _colour(family: str, i: int) -> str:
    return _STAND_IN[f"{family}-{i % SERIES}"]


def _svg(figure: Figure, label: str) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->|<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    used = set(re.findall(r"(?:url\(|xlink:href=\")#([^)\"]+)", text))
    mark = hashlib.sha256((label + text).encode()).hexdigest()[:8]
    text = re.sub(r' id="([^"]+)"', lambda m: f' id="{mark}-{m[1]}"' if m[1] in used else "", text)
    text = re.sub(r"(url\(|xlink:href=\")#", rf"\1#{mark}-", text)
    for name, colour in _STAND_IN.items():
        text = text.replace(colour, f"var(--{name})")
    width, height = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text).groups()  # type: ignore[union-attr]
    safe = label.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    start = f'<svg role="img" aria-label="{safe}" viewBox="0 0 {width} {height}" style="max-width: {width}pt" '
    keep = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return start + keep + text[text.index(">") :].strip()
