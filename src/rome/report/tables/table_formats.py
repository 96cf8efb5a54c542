"""A filled table as text, Markdown, LaTeX or HTML."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import combinations, groupby
from typing import Any, Literal

from jinja2 import Environment, PackageLoader, select_autoescape

from rome.report.columns import markdown, suite_text
from rome.report.compared import other_network
from rome.report.tables.lines import Cell, Line
from rome.report.tables.paper_rows import COST, UNITS

Format = Literal["text", "markdown", "latex", "html"]
DASH = "\N{EN DASH}"
PM = "\N{PLUS-MINUS SIGN}"
_BOLD = {"text": ("*", ""), "markdown": ("**", "**"), "latex": (r"\textbf{", "}"), "html": ("<b>", "</b>")}
Body = list[tuple[str, list[list[str]]]]
"""Sections: name and rows of cells."""
HEADS = {
    "parameters_M": "params (M)",
    "added_parameters_M": "added params (M)",
    "seconds_per_update": "s/update",
    "latency_ms": "latency (ms/img)",
    "latency_one_ms": "of one image (ms)",
}
_TEMPLATES = {"markdown": "table.md", "latex": "table.tex", "html": "table.html"}
_MATH = {"L0": r"$\ell_0$", "L1": r"$\ell_1$", "L2": r"$\ell_2$", "Linf": r"$\ell_\infty$"}


def render(title: str, lines: Sequence[Line], form: Format, *, about: str = "") -> str:
    """The table: for each column our number (mean, deviation over runs) with the paper's beside it.

    The best of ours is bold, missing numbers are dashes, and the last column is the difference in union to another row
    with its interval, which the note names. Costs have their ratios to the first row behind them.

    Args:
        about: what the numbers are, for the caption.
    """
    columns = list(lines[0].cells)
    compared = dict.fromkeys(line.against for line in lines if line.gain is not None)
    plain = any(line.config is not None and line.config.experts is None for line in lines)
    change = "" if not compared else "gain in union" if plain else "union less RoME's"
    head = ["", *(HEADS.get(column, column) for column in columns), *([change] if change else [])]
    sections = [(name, list(group)) for name, group in groupby(lines, key=lambda line: line.section)]
    body = [(name, [_row(line, columns, form, bool(change)) for line in group]) for name, group in sections]
    note = f"percent right, ours (mean {PM} standard deviation over runs) / paper"
    if columns == list(COST):
        note = "ours / paper, in brackets the ratio to RANDOM"
    if change:
        base = "the same method without experts" if plain else " and ".join(compared)
        count = sum(line.gain is not None for line in lines)
        joint = f"intervals that hold together with 95% for all {count} differences"
        note += f"; {change}: difference to {base}, in brackets {'its 95% interval' if count == 1 else joint}"
    evaluated = sources(lines)
    note += f"; runs: {evaluated}" if evaluated else f"; {about}" if about else ""
    if any(_differ(group) for _, group in sections):
        note += "; rows evaluated differently, so compare with care"
    if form == "text":
        return _text(title, head, body, note)
    return _PAGES.get_template(_TEMPLATES[form]).render(title=title, head=head, body=body, note=note)


def sources(lines: Sequence[Line]) -> str:
    """What the runs of a table are: data, model, examples and suite of each kind of evaluation."""
    found: dict[str, None] = {}
    for report in (report for line in lines for report in (*line.reports, *line.others)):
        provenance = report.settings.get("provenance") or {}
        config = provenance.get("config") or provenance  # of a model without a run the two of them alone
        data = config.get("data", {}).get("kind", "unknown data")
        model = config.get("model", {}).get("name", "unknown model")
        suite = suite_text(report.settings.get("suite", {}))
        found[f"{model} on {data}, {report.n} examples, suite {suite}"] = None
    return "; ".join(found)


def _differ(lines: Sequence[Line]) -> bool:
    """Whether the runs of a section were evaluated by different suites, under different threats, on different numbers
    of examples, or with different networks that measure."""
    reports = [report for line in lines for report in line.reports]
    shown = {(str(report.settings.get("suite")), str(report.settings.get("threats")), report.n) for report in reports}
    every = [*reports, *(report for line in lines for report in line.others)]
    return len(shown) > 1 or any(other_network(a, b) for a, b in combinations(every, 2))


def _row(line: Line, columns: Sequence[str], form: Format, change: bool) -> list[str]:
    cells = [_cell(line.cells[column], form, percent=column not in UNITS) for column in columns]
    return [line.label, *cells, *([_gain(line)] if change else [])]


def _cell(cell: Cell, form: Format, *, percent: bool) -> str:
    def number(value: float) -> str:
        return f"{100 * value:.1f}" if percent else f"{value:.4g}"

    def ratio(value: float) -> str:
        return "" if math.isnan(value) else f" ({value:.2f}x)"

    ours, paper = DASH, DASH if math.isnan(cell.paper) else number(cell.paper)
    if cell.values:
        spread = "" if math.isnan(cell.deviation) else f" {PM} {number(cell.deviation)}"
        before, after = _BOLD[form] if cell.best else ("", "")
        ours = f"{before}{number(cell.mean)}{spread}{after}"
    return f"{ours}{ratio(cell.ratio)} / {paper}{ratio(cell.paper_ratio)}"


def _gain(line: Line) -> str:
    if line.gain is None:
        return ""
    value, low, high = (100 * number for number in line.gain)
    return f"{value:+.1f}" if math.isnan(low) else f"{value:+.1f} ({low:+.1f} to {high:+.1f})"


def _text(title: str, head: list[str], body: Body, note: str) -> str:
    rows = [head, *(row for _, section in body for row in section)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]

    def join(row: list[str]) -> str:
        label, *cells = row
        padded = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        return "  ".join([label.ljust(widths[0]), *padded]).rstrip()

    lines = [title, join(head)]
    for name, section in body:
        lines += ["", name, *map(join, section)]
    return "\n".join([*lines, "", f"{note}; * is the best of ours", ""])


def _escape(text: str) -> str:
    """A cell for LaTeX, which may hold commands of ours."""
    safe: dict[str, Any] = {letter: f"\\{letter}" for letter in "%&_#$"} | {PM: r"$\pm$", DASH: "--"}
    safe |= {"^": r"\^{}", "~": r"\~{}", "<": "$<$", ">": "$>$"}
    return re.sub(r"(?<![\w-])-(?=\d)", "$-$", text.translate(str.maketrans(safe)))


def _plain(text: str) -> str:
    """Text for LaTeX that holds no commands of ours."""
    own = {"\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "|": r"\textbar{}"}
    return "".join(own.get(part) or _escape(part) for part in re.split(r"([\\{}|])", text))


def _latex_row(row: list[str]) -> str:
    label, *cells = row
    return " & ".join([_plain(label), *(_MATH.get(cell) or _escape(cell) for cell in cells)]) + r" \\"


_PAGES = Environment(
    loader=PackageLoader("rome.report", "templates"),
    autoescape=select_autoescape(),
    trim_blocks=True,
    keep_trailing_newline=True,
)
_PAGES.filters |= {"md": markdown, "tex": _plain, "row": _latex_row}
