"""Charts as inline SVG that take their colours and typeface from the page, so that they follow its light or dark theme.

Matplotlib draws with stand-in colours (for runs and threats, those of the figures), each of which is then replaced by a
CSS variable of the page: ``--ink``, ``--muted``, ``--line``, ``--run-0`` ... and ``--threat-0`` ...
"""

from __future__ import annotations

import hashlib
import html
import io
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from markupsafe import Markup
from matplotlib import rc_context, style, ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rome.report.figures.style import NOTE, RUNS, THREATS

SERIES = 6
"""Number of colours before they repeat."""
_STAND_IN = {name: f"#0a0b{i:02x}" for i, name in enumerate(("ink", "muted", "line"))}
_STAND_IN |= {f"run-{i}": colour.lower() for i, colour in enumerate(RUNS[:SERIES])}
_STAND_IN |= {f"threat-{i}": colour.lower() for i, colour in enumerate(THREATS)}
_MARKERS = "osD^vP"
_NO_SERIES = {"event", "update", "epoch", "accuracy", "lr", "images_per_second", "seconds", "loss"}
"""Entries of an epoch event that are not parts of the loss."""


def histories(logs: Mapping[str, Sequence[Mapping[str, Any]]], *, natural: int) -> list[Markup]:
    """Draw one chart over epochs for each quantity: the loss, its parts, and training accuracy under each threat.

    Args:
        logs: run -> its events.
        natural: number of initial epochs that trained on clean images; they are shaded.
    """
    quantities: dict[str, dict[int, list[tuple[int, float]]]] = defaultdict(lambda: defaultdict(list))
    for i, events in enumerate(logs.values()):
        for event in events:
            for quantity, value in _quantities(event).items() if event.get("event", "epoch") == "epoch" else ():
                quantities[quantity][i].append((event["epoch"], value))
    last = max((x for curves in quantities.values() for points in curves.values() for x, _ in points), default=1)
    charts = []
    for quantity, curves in quantities.items():
        with _chart((3.4, 2.3)) as (figure, axes):
            if natural:
                axes.axvspan(0.5, natural + 0.5, color=_STAND_IN["line"], alpha=0.35, lw=0)
            for i, points in curves.items():
                marker = _MARKERS[i % SERIES] if len(points) < 30 else None
                axes.plot(*zip(*points, strict=True), marker=marker, ms=3.5, color=_colour(i))
            axes.set(xlabel="epoch", xlim=(0.5 - 0.03 * last, last + 0.5 + 0.03 * last))  # the same in all charts
            if quantity.endswith("%"):
                axes.set(ylim=(0, 100), yticks=range(0, 101, 25))
            axes.xaxis.set_major_locator(ticker.MaxNLocator(5, integer=True))
            axes.set_title(quantity, loc="left")
            axes.grid(axis="y")
            charts.append(_svg(figure, f"{quantity} over epochs"))
    return charts


def accuracy_over_radii(
    norm: str, curves: Sequence[tuple[Sequence[float], Sequence[float], Sequence[tuple[float, float]]]]
) -> Markup:
    """Draw accuracy over the radii of one norm: a curve with its 95% band for each model.

    Args:
        curves: for each model, the radii, the accuracies (shares) and their intervals.
    """
    with _chart((3.4, 2.5)) as (figure, axes):
        for i, (radii, shares, intervals) in enumerate(curves):
            axes.plot(radii, [100 * share for share in shares], marker=_MARKERS[i % SERIES], ms=3.5, color=_colour(i))
            low, high = zip(*([100 * end for end in each] for each in intervals), strict=True)
            axes.fill_between(radii, low, high, color=_colour(i), alpha=0.15, lw=0)
        axes.set(xlabel=f"radius in {norm}", ylim=(0, 100), yticks=range(0, 101, 25), xlim=(0, max(curves[0][0])))
        axes.xaxis.set_major_locator(ticker.MaxNLocator(5))
        axes.set_title("accuracy, %", loc="left")
        axes.grid(axis="y")
        return _svg(figure, f"accuracy over the radius in {norm}")


def themed(draw: Callable[[], Figure], label: str) -> Markup:
    """Draw a figure of the paper at its own size, with text and axes in the page's colours."""
    with _styled(), rc_context({"font.size": 9, "axes.labelsize": 9, "lines.linewidth": 1.4}):
        return _svg(draw(), label).replace('style="max-width:', 'style="width:', 1)


def _quantities(event: Mapping[str, Any]) -> dict[str, float]:
    """Return the quantities of an epoch event; the loss is left out if cross-entropy is its only part."""
    parts = {
        key.replace("_", " "): value
        for key, value in event.items()
        if key not in _NO_SERIES and isinstance(value, (int, float))
    }
    loss = {"loss, all parts": event["loss"]} if "loss" in event and set(parts) != {"cross entropy"} else {}
    accuracy = {
        f"accuracy {'without attack' if name == 'clean' else f'under {name}'}, %": 100 * value
        for name, value in event.get("accuracy", {}).items()
    }
    return parts | loss | accuracy


def _colour(i: int) -> str:
    """Stand-in colour of the i-th run."""
    return _STAND_IN[f"run-{i % SERIES}"]


def _styled() -> Any:
    return style.context(Path(__file__).parent / "page.mplstyle")


@contextmanager
def _chart(size: tuple[float, float]) -> Iterator[tuple[Figure, Axes]]:
    with _styled():
        figure = Figure(figsize=size, layout="constrained")
        yield figure, figure.subplots()


def _svg(figure: Figure, label: str) -> Markup:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text[text.index("<svg") :])
    used = set(re.findall(r"(?:url\(|xlink:href=\")#([^)\"]+)", text))
    mark = hashlib.sha256((label + text).encode()).hexdigest()[:8]  # all charts share one page, so ids must differ
    text = re.sub(r' id="([^"]+)"', lambda m: f' id="{mark}-{m[1]}"' if m[1] in used else "", text)
    text = re.sub(r"(url\(|xlink:href=\")#", rf"\1#{mark}-", text)
    for name, colour in (*_STAND_IN.items(), ("muted", NOTE["color"])):
        text = text.replace(colour, f"var(--{name})")
    width, height = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text).groups()  # type: ignore[union-attr]
    start = f'<svg role="img" aria-label="{html.escape(label)}" viewBox="0 0 {width} {height}" '
    start += f'style="max-width: {width}pt" xmlns="http://www.w3.org/2000/svg" '
    return Markup(start + 'xmlns:xlink="http://www.w3.org/1999/xlink"' + text[text.index(">") :].strip())
