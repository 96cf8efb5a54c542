"""Render a filled table as text, Markdown, LaTeX or HTML: one template each, with shared cells and note."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import combinations, groupby
from typing import Any, Literal

from rome.report.columns import DASH, protocol
from rome.report.compared import other_network
from rome.report.tables.lines import Cell, Line
from rome.report.tables.paper_rows import COST, UNITS
from rome.report.templating import TEMPLATES, filled

Format = Literal["text", "markdown", "latex", "html"]
PM = "\N{PLUS-MINUS SIGN}"
_FORMS = {
    "text": ("table.txt", "*", ""),
    "markdown": ("table.md", "**", "**"),
    "latex": ("table.tex", r"\textbf{", "}"),
    "html": ("table.html", "<b>", "</b>"),
}
"""Template, and the markup before and after the best of our numbers."""
HEADS = {
    "parameters_M": "params (M)",
    "added_parameters_M": "added params (M)",
    "seconds_per_update": "s/update",
    "latency_ms": "latency (ms/img)",
    "latency_one_ms": "of one image (ms)",
}
_MATH = {"L0": r"$\ell_0$", "L1": r"$\ell_1$", "L2": r"$\ell_2$", "Linf": r"$\ell_\infty$"}


def render(title: str, lines: Sequence[Line], form: Format, *, about: str = "") -> str:
    """Render a table: in each cell our number (mean and standard deviation over runs) with the paper's beside it.

    The best of our numbers is bold and missing numbers are dashes. The last column is the difference in union from
    another row, named in the note, with its interval. Costs are followed by their ratio to the first row.

    Args:
        about: description of the numbers for the note below the table.
    """
    columns, gains = list(lines[0].cells), [line for line in lines if line.gain is not None]
    plain = any(line.config is not None and line.config.experts is None for line in lines)
    change = ("gain in union" if plain else "union less RoME's") if gains else ""
    sections = [(name, list(group)) for name, group in groupby(lines, key=lambda line: line.section)]
    note = filled(
        "table_note.txt",
        costs=tuple(columns) == COST,
        change=change,
        base="the same method without experts"
        if plain
        else " and ".join(dict.fromkeys(each.against for each in gains)),
        gains=len(gains),
        runs=sources(lines),
        about=about,
        weak=[line.label for line in lines if line.at_chance],
        differ=any(_differ(group) for _, group in sections),
    )
    template, *bold = _FORMS[form]
    return filled(
        template,
        title=title,
        note=note.strip(),
        head=["", *(HEADS.get(column, column) for column in columns), *filter(None, [change])],
        body=[(name, [_row(line, bold, gain=bool(change)) for line in group]) for name, group in sections],
    )


def sources(lines: Sequence[Line]) -> str:
    """Describe the evaluations behind a table: model, data, number of examples and suite of each kind."""
    descriptions: dict[str, None] = {}
    for report in (report for line in lines for report in (*line.reports, *line.others)):
        provenance = report.settings.get("provenance") or {}
        config = provenance.get("config") or provenance  # without a run: model and data at the top level
        data = config.get("data", {}).get("kind", "unknown data")
        model = config.get("model", {}).get("name", "unknown model")
        descriptions[f"{model} on {data}, {report.n} examples, suite {protocol(report)}"] = None
    return "; ".join(descriptions)


def _differ(lines: Sequence[Line]) -> bool:
    """Whether the runs of a section were evaluated by different suites, in different precisions, under different
    threats, on different numbers of examples, or with perceptual distances of different networks."""
    reports = [report for line in lines for report in line.reports]
    settings = ("suite", "search_precision", "threats")
    shown = {(*(str(report.settings.get(name)) for name in settings), report.n) for report in reports}
    every = [*reports, *(report for line in lines for report in line.others)]
    return len(shown) > 1 or any(other_network(a, b) for a, b in combinations(every, 2))


def _row(line: Line, bold: Sequence[str], *, gain: bool) -> list[str]:
    cells = [line.label, *(_cell(cell, bold, percent=column not in UNITS) for column, cell in line.cells.items())]
    if line.gain is not None:
        value, low, high = (100 * number for number in line.gain)
        cells.append(f"{value:+.1f}" if math.isnan(low) else f"{value:+.1f} ({low:+.1f} to {high:+.1f})")
    elif gain:
        cells.append("")
    return cells


def _cell(cell: Cell, bold: Sequence[str], *, percent: bool) -> str:
    def number(value: float) -> str:
        shown = f"{100 * value:.1f}" if percent else f"{value:.4g}"
        return DASH if math.isnan(value) else shown

    def ratio(value: float) -> str:
        return "" if math.isnan(value) else f" ({value:.2f}x)"

    spread = "" if math.isnan(cell.deviation) else f" {PM} {number(cell.deviation)}"
    before, after = bold if cell.best else ("", "")
    ours = f"{before}{number(cell.mean)}{spread}{after}"
    papers = "" if math.isnan(cell.paper) else f" / {number(cell.paper)}{ratio(cell.paper_ratio)}"
    return f"{ours}{ratio(cell.ratio)}{papers}"


def _aligned(row: list[str], rows: Sequence[list[str]]) -> str:
    """Return a row of text with each cell as wide as its column in ``rows``; the first is left-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    label, *cells = row
    padded = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
    return "  ".join([label.ljust(widths[0]), *padded]).rstrip()


def _escape(text: str) -> str:
    """Escape a cell for LaTeX, keeping the commands that rome put in."""
    safe: dict[str, Any] = {letter: f"\\{letter}" for letter in "%&_#$"} | {PM: r"$\pm$", DASH: "--"}
    safe |= {"^": r"\^{}", "~": r"\~{}", "<": "$<$", ">": "$>$"}
    return re.sub(r"(?<![\w-])-(?=\d)", "$-$", text.translate(str.maketrans(safe)))


def _plain(text: str) -> str:
    """Escape text that contains no LaTeX commands."""
    own = {"\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "|": r"\textbar{}"}
    return "".join(own.get(part) or _escape(part) for part in re.split(r"([\\{}|])", text))


def _latex_row(row: list[str]) -> str:
    label, *cells = row
    return " & ".join([_plain(label), *(_MATH.get(cell) or _escape(cell) for cell in cells)]) + r" \\"


TEMPLATES.filters |= {"tex": _plain, "row": _latex_row, "aligned": _aligned}
