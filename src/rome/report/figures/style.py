"""Style shared by all figures: widths of a paper's columns, and the look of each threat and run.

Threats have the colours of Paul Tol's high-contrast and bright sets, with a darker yellow and cyan so that lines are
visible on white; runs have those of Okabe and Ito, which people with any kind of colour vision can tell apart. Markers
and line styles repeat the distinction.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D

from rome.report.subject import NATURAL

COLUMN, PAGE = 3.25, 6.75
"""Widths of one column and of the page, in inches."""
RUNS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Colours of runs (Okabe and Ito), none of which is the colour of a threat."""
MARKERS = "osD^vPX"
"""Markers of runs."""
NOTE: dict[str, Any] = {"fontsize": 7.5, "color": "#555555"}
"""Text properties of explanatory notes."""
TURNS = 8
"""Number of turns in which :func:`scatter` draws the points of each group."""


class Look(NamedTuple):
    """Label and style of a threat in figures."""

    label: str
    colour: str
    marker: str
    line: str | tuple[int, tuple[float, ...]]


_KNOWN = {
    NATURAL: Look("natural", "#8c8c8c", "o", "-"),
    "L1": Look(r"$\ell_1$", "#B07D00", "^", "-"),
    "L2": Look(r"$\ell_2$", "#BB5566", "s", (0, (4, 1.3))),
    "Linf": Look(r"$\ell_\infty$", "#004488", "D", (0, (4, 1.2, 1, 1.2))),
}
_OTHERS = [("#228833", "v", (0, (1, 1))), ("#AA3377", "P", (0, (6, 2))), ("#2B9EC4", "X", (0, (2, 2)))]
THREATS = [*(look.colour for look in _KNOWN.values()), *(colour for colour, *_ in _OTHERS)]
"""Colours of clean images and of threats."""


def styles_of(names: Sequence[str]) -> dict[str, Look]:
    """Return the look of each threat: fixed for clean images and Lp balls, by order of appearance for all others."""
    others = [name for name in dict.fromkeys(names) if name not in _KNOWN]
    looks = _KNOWN | {name: Look(plain(name), *_OTHERS[i % len(_OTHERS)]) for i, name in enumerate(others)}
    return {name: looks[name] for name in names}


def look_of(i: int) -> dict[str, Any]:
    """Return colour and marker of the i-th run."""
    return {"color": RUNS[i % len(RUNS)], "marker": MARKERS[i % len(MARKERS)]}


def legend(canvas: Canvas, handles: Sequence[Line2D]) -> None:
    """Add one legend above all panels, with as many rows as its labels need."""
    sizes = [2 if str(each.get_label()).startswith("$") else len(str(each.get_label())) for each in handles]
    width = 15 * canvas.get_figwidth()  # in characters
    fits = sum(sizes) + 5 * len(sizes) <= width
    canvas.legend(
        handles=handles,
        loc="outside upper center",
        ncols=len(handles) if fits else max(1, int(width // (max(sizes) + 5))),
        frameon=False,
        handlelength=1.8 if handles[0].get_linestyle() != "None" else 0.8,
        handletextpad=0.5,
        columnspacing=1.6,
    )


def limits(values: np.ndarray, *, least: float = 0.2) -> tuple[float, float]:
    """Return a range in [0, 1] that contains all weights and is at least ``least`` wide, so as not to magnify noise."""
    low, high = float(values.min()), float(values.max())
    pad = max(0.08 * (high - low), (least - (high - low)) / 2)
    low, high = low - pad, high + pad
    return max(0.0, min(low, 1 - least)), min(1.0, max(high, least))


def bare(axes: Axes) -> None:
    """Remove ticks and numbers from axes without meaning, such as those of t-SNE; keep a thin frame."""
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set(visible=True, color="#bbbbbb", linewidth=0.6)


def scatter(axes: Axes, groups: dict[str, list[list[float]]]) -> None:
    """Draw the points of each group, name -> [[x, y], ...], in turns so that no group hides another."""
    styles, longest = styles_of(list(groups)), max(map(len, groups.values()), default=0)
    size = 10 if longest <= 128 else 6
    for start in range(min(TURNS, longest)):
        for name, points in groups.items():
            look = styles[name]
            x, y = np.array(points[start::TURNS]).reshape(-1, 2).T
            axes.scatter(x, y, s=size, c=look.colour, marker=look.marker, linewidths=0, alpha=0.8)
    axes.margins(0.06)
    axes.set_box_aspect(1)
    bare(axes)


def dots(names: Sequence[str]) -> list[Line2D]:
    """Return the legend entries for :func:`scatter`."""
    return [
        Line2D([], [], color=look.colour, marker=look.marker, ms=4.5, ls="", label=look.label)
        for look in styles_of(names).values()
    ]


def side(name: str, *more: str) -> str:
    """Return a run's name, wrapped to fit beside a row of panels, followed by further lines."""
    return "\n".join([*map(plain, textwrap.wrap(name, 20)), *more])


def plain(text: str) -> str:
    """Escape dollar signs, so that text is not read as a formula."""
    return text.replace("$", r"\$")


def signed(value: float) -> str:
    """Format with two decimals and a typographic minus sign; zero has no sign."""
    return f"{round(value, 2) + 0.0:.2f}".replace("-", "\N{MINUS SIGN}")
