"""Writing figures: numbers first (JSON and CSV), then the picture in every format."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import style

from rome.core import trust
from rome.core.errors import UserError, did_you_mean
from rome.core.files import csv_text, make_folder, replace_file
from rome.report.figures.base import Options, PaperFigure, registered
from rome.report.subject import Subject, open_subjects

FORMATS = ("pdf", "png", "svg")


@trust.opens_files
def write_figures(
    runs: Sequence[Path | Subject],
    out: Path,
    *,
    only: Sequence[str] = (),
    formats: Sequence[str] = ("pdf", "png"),
    options: Options | None = None,
    device: str | None = None,
    trust_code: bool = False,
) -> list[Path]:
    """Make figures of these runs in ``out``: NAME.json and NAME.csv with the data, NAME.FORMAT with the picture.

    Args:
        runs: their folders, or subjects: :func:`rome.report.subject.open_subjects`, and models that no run made
            (:func:`rome.report.subject.open_given`, :class:`rome.report.subject.GivenModel`).
        device: of runs that are named by their folders.
        trust_code: let files run the code that they name (:mod:`rome.core.trust`).

    A figure that the runs do not have the data for is left out with a line that says why; if ``only`` names it, that
    is an error.

    Returns:
        The pictures.

    Raises:
        UserError: unknown names or formats, no runs, or none of the figures could be made.
    """
    known = registered()
    for name in only:
        if name not in known:
            raise UserError(f"there is no figure {name!r}.{did_you_mean(name, known)}")
    for form in formats:
        if form not in FORMATS:
            raise UserError(f"there is no format {form!r}; there are {', '.join(FORMATS)}")
    if not formats:
        raise UserError(f"name at least one format: {', '.join(FORMATS)}")
    if not runs:
        raise UserError("name at least one run's folder, or a model and its data: --model NAME --data DATA")
    folders = [run for run in runs if not isinstance(run, Subject)]
    subjects = open_subjects(folders, device) if folders else []
    subjects += [run for run in runs if isinstance(run, Subject)]
    make_folder(out)
    written: list[Path] = []
    missing: list[str] = []
    for name in only or known:
        figure = known[name]()
        try:
            data = figure.measure(subjects, options or Options())
        except UserError as error:
            if only:
                raise UserError(f"{name}: {error}") from error
            missing.append(f"{name}: {error}")
            print(f"no {missing[-1]}", file=sys.stderr, flush=True)
            continue
        for run, reason in data.get("left_out", {}).items():
            print(f"{name}: {run} left out: {reason}", file=sys.stderr, flush=True)
        written.extend(_write(figure, data, out, formats))
        print(f"{name}: {figure.title}", file=sys.stderr, flush=True)
    if not written:
        raise UserError("none of the figures could be made: " + "; ".join(missing))
    return written


def _write(figure: PaperFigure, data: dict[str, Any], out: Path, formats: Sequence[str]) -> list[Path]:
    replace_file(out / f"{figure.name}.json", json.dumps(data, indent=1).encode())
    replace_file(out / f"{figure.name}.csv", csv_text(figure.rows(data)).encode())
    pictures = []
    with style.context(Path(__file__).parent / "paper.mplstyle"):
        canvas = figure.draw(data)
        for form in formats:
            picture = io.BytesIO()
            dates: Any = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}.get(form)
            canvas.savefig(picture, format=form, bbox_inches="tight", metadata=dates)
            pictures.append(out / f"{figure.name}.{form}")
            replace_file(pictures[-1], picture.getvalue())
    return pictures
