"""What the figures share: widths of a paper's columns, and one look for each threat in all of them.

Threats have the colours of Paul Tol's high-contrast and bright sets, the yellow and the cyan darker, so that a line of
them shows on white; runs those of Okabe and Ito, which people with any kind of colour vision tell apart; markers and
line styles say the same again.
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
"""Widths in inches of one column and of both."""
RUNS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Colours of runs, where a figure compares them: Okabe and Ito's, none of which means a threat."""
MARKERS = "osD^vPX"
"""Of runs."""
NOTE: dict[str, Any] = {"fontsize": 7.5, "color": "#555555"}
"""Text that explains, smaller than what it explains."""
TURNS = 8


class Look(NamedTuple):
    """How a threat is drawn, and its name in text."""

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
"""Colours of natural images and threats."""


def looks(names: Sequence[str]) -> dict[str, Look]:
    """How to draw these threats: the Lp balls always alike, others by their place among the others."""
    others = [name for name in dict.fromkeys(names) if name not in _KNOWN]
    looks = {name: Look(plain(name), *_OTHERS[i % len(_OTHERS)]) for i, name in enumerate(others)}
    return {name: _KNOWN.get(name) or looks[name] for name in names}


def look_of(i: int) -> dict[str, Any]:
    """Colour and marker of the i-th run."""
    return {"color": RUNS[i % len(RUNS)], "marker": MARKERS[i % len(MARKERS)]}


def legend(canvas: Canvas, handles: Sequence[Line2D]) -> None:
    """One legend for all panels, above them, on as many lines as its names need."""
    sizes = [2 if str(each.get_label()).startswith("$") else len(str(each.get_label())) for each in handles]
    room = 15 * canvas.get_figwidth()  # characters
    fits = sum(sizes) + 5 * len(sizes) <= room
    canvas.legend(
        handles=handles,
        loc="outside upper center",
        ncols=len(handles) if fits else max(1, int(room // (max(sizes) + 5))),
        frameon=False,
        handlelength=1.8 if handles[0].get_linestyle() != "None" else 0.8,
        handletextpad=0.5,
        columnspacing=1.6,
    )


def limits(values: np.ndarray, *, least: float = 0.2) -> tuple[float, float]:
    """A range inside [0, 1] that shows all weights, at least ``least`` wide so that noise does not look like much."""
    low, high = float(values.min()), float(values.max())
    pad = max(0.08 * (high - low), (least - (high - low)) / 2)
    low, high = low - pad, high + pad
    return max(0.0, min(low, 1 - least)), min(1.0, max(high, least))


def bare(axes: Axes) -> None:
    """Neither ticks nor numbers: for pictures whose axes mean nothing, as t-SNE's. The frame stays, thin."""
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set(visible=True, color="#bbbbbb", linewidth=0.6)


def scatter(axes: Axes, groups: dict[str, list[list[float]]]) -> None:
    """Points of each group, name -> [[x, y], ...], drawn in turns so that no group hides another."""
    every, longest = looks(list(groups)), max(map(len, groups.values()), default=0)
    size = 10 if longest <= 128 else 6
    for start in range(min(TURNS, longest)):
        for name, points in groups.items():
            look = every[name]
            x, y = np.array(points[start::TURNS]).reshape(-1, 2).T
            axes.scatter(x, y, s=size, c=look.colour, marker=look.marker, linewidths=0, alpha=0.8)
    axes.margins(0.06)
    axes.set_box_aspect(1)
    bare(axes)


def dots(names: Sequence[str]) -> list[Line2D]:
    """Legend entries for :func:`scatter`."""
    return [
        Line2D([], [], color=look.colour, marker=look.marker, ms=4.5, ls="", label=look.label)
        for look in looks(names).values()
    ]


def side(name: str, *more: str) -> str:
    """A run's name as it fits beside a row of panels."""
    return "\n".join([*map(plain, textwrap.wrap(name, 20)), *more])


def plain(text: str) -> str:
    """Text in which dollars are no formula."""
    return text.replace("$", r"\$")


def signed(value: float) -> str:
    """Two digits, with a minus sign that is one, and none before zero."""
    return f"{round(value, 2) + 0.0:.2f}".replace("-", "\N{MINUS SIGN}")
