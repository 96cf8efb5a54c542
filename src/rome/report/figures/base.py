"""Interface of the paper's figures, and the code that writes them: first the numbers (JSON, CSV), then the pictures."""

from __future__ import annotations

import io
import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any, ClassVar

from matplotlib import style
from matplotlib.figure import Figure as Canvas

from rome.core import trust
from rome.core.errors import UserError, did_you_mean
from rome.core.files import csv_text, make_folder, replace_file
from rome.experts import MixtureLayer, expert_layers
from rome.report.subject import Subject, open_subjects

FORMATS = ("pdf", "png", "svg")
ORDER = ("fig1", "fig3", "fig5", "fig6", "fig7", "fig8", "figA1", "figA2", "figA3", "figA4")
"""Names of the paper's figures, in its order."""


@dataclass(frozen=True)
class Options:
    """Options shared by all figures of one call."""

    n: int = 256
    """Number of test images; each is shown clean and under every threat."""
    seed: int = 0
    """Seed of t-SNE's initialisation and of the linear probes' train/test split."""
    layer: str | None = None
    """Part of the name of the layer to show; None takes the last layer."""
    image: int = 0
    """Index of the test image, for figures of a single image."""

    def pick(self, names: Iterable[str]) -> str:
        """Return the last of these layers whose name contains ``layer``.

        Raises:
            UserError: no name contains it.
        """
        names = list(names)
        matching = [name for name in names if self.layer is None or self.layer in name]
        if not matching:
            raise UserError(f"no layer's name contains {self.layer!r}; the layers are {', '.join(names)}")
        return matching[-1]


class PaperFigure(ABC):
    """One figure of the paper, for any runs. Defining a subclass with a ``name`` registers it.

    :meth:`draw` sees only what :meth:`measure` returned, so a picture can be redrawn from its JSON file.
    """

    name: ClassVar[str]
    """Name for ``--only`` and of the figure's files, such as ``fig3`` or ``figA3``."""
    title: ClassVar[str]
    """One-line description of what the figure shows."""

    @abstractmethod
    def measure(self, subjects: Sequence[Subject], options: Options) -> dict[str, Any]:
        """Return the figure's data as plain values that JSON can hold.

        Raises:
            UserError: these runs do not have the data that the figure shows.
        """

    @abstractmethod
    def rows(self, data: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the same data as rows of the CSV file, one per point or curve value."""

    @abstractmethod
    def draw(self, data: dict[str, Any]) -> Canvas:
        """Draw the picture from the data that :meth:`measure` returned."""


class FigureOfRuns(PaperFigure):
    """Base class of figures that are measured run by run; runs without the data are left out."""

    @abstractmethod
    def measure_run(self, subject: Subject, options: Options) -> dict[str, Any]:
        """Return one run's part of the data, beginning with the run's name.

        Raises:
            UserError: this run does not have the data that the figure shows.
        """

    lacking: ClassVar[str]
    """Error message if every run is left out."""

    def measure(self, subjects: Sequence[Subject], options: Options) -> dict[str, Any]:
        runs, left_out = [], {}
        for subject in subjects:
            try:
                runs.append(self.measure_run(subject, options))
            except UserError as error:
                left_out[subject.name] = str(error)
        if not runs:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
            raise UserError(f"{self.lacking} ({reasons})")
        return {"runs": runs, "left_out": left_out}


def require_experts(subject: Subject) -> dict[str, MixtureLayer]:
    """Return the model's layers with experts, by name.

    Raises:
        UserError: the model has none.
    """
    layers = expert_layers(subject.model)
    if not layers:
        raise UserError("it has no experts")
    return layers


def flatten_data(nested: Any, depth: int) -> Iterator[tuple[Any, ...]]:
    """Yield each value ``depth`` levels inside mappings and lists, preceded by the keys and indices of its path."""
    if depth == 0:
        yield (nested,)
        return
    for key, value in nested.items() if isinstance(nested, dict) else enumerate(nested):
        for leaf in flatten_data(value, depth - 1):
            yield key, *leaf


def registered() -> dict[str, type[PaperFigure]]:
    """Return every figure by name: the paper's in its order, then all others. Imports all files of this folder first,
    because importing a figure registers it."""
    for module in iter_modules([str(Path(__file__).parent)]):
        import_module(f"{__package__}.{module.name}")

    def subclasses(kind: type[PaperFigure]) -> Iterator[type[PaperFigure]]:
        for figure in kind.__subclasses__():
            yield figure
            yield from subclasses(figure)

    figures = {each.name: each for each in subclasses(PaperFigure) if "name" in vars(each)}  # type: ignore[type-abstract]
    return {name: figures[name] for name in (*ORDER, *sorted(figures.keys() - set(ORDER)))}


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
    """Write figures of these runs to ``out``: NAME.json and NAME.csv with the data, NAME.FORMAT with the picture.

    A figure for which the runs have no data is skipped, and a line on standard error gives the reason; if ``only``
    names it, that is an error.

    Args:
        runs: folders of runs, or subjects: runs opened by :func:`rome.report.subject.open_subjects`, or models without
            a run (:func:`rome.report.subject.open_named`, :meth:`rome.report.subject.Subject.of_model`).
        out: folder for the figures; created if missing.
        only: names of the figures to make; all by default.
        formats: any of ``pdf``, ``png`` and ``svg``.
        device: device for the runs given as folders.
        trust_code: let files run the code that they name (:mod:`rome.core.trust`).

    Returns:
        Paths of the pictures.

    Raises:
        UserError: unknown names or formats, no runs, or none of the figures could be made.
    """
    known = registered()
    for name in only:
        if name not in known:
            raise UserError(f"there is no figure {name!r}.{did_you_mean(name, known)}")
    if not formats or set(formats) - set(FORMATS):
        raise UserError(f"formats must be among {', '.join(FORMATS)}, not {', '.join(formats) or 'none'}")
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
            missing.append(f"{name}: {error}")
            if only:
                raise UserError(missing[-1]) from error
            print(f"skipped {missing[-1]}", file=sys.stderr, flush=True)
            continue
        left_out = (f"{name}: {run} left out: {reason}" for run, reason in data.get("left_out", {}).items())
        for line in (*left_out, f"{name}: {figure.title}"):
            print(line, file=sys.stderr, flush=True)
        written.extend(_write(figure, data, out, formats))
    if not written:
        raise UserError("none of the figures could be made: " + "; ".join(missing))
    return written


def _write(figure: PaperFigure, data: dict[str, Any], out: Path, formats: Sequence[str]) -> list[Path]:
    replace_file(out / f"{figure.name}.json", json.dumps(data, indent=1).encode())
    replace_file(out / f"{figure.name}.csv", csv_text(figure.rows(data)).encode())
    pictures = []
    with style.context(Path(__file__).parent / "paper.mplstyle"):
        canvas = figure.draw(data)
        for suffix in formats:
            picture = io.BytesIO()
            undated: Any = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}.get(suffix)
            canvas.savefig(picture, format=suffix, bbox_inches="tight", metadata=undated)
            pictures.append(out / f"{figure.name}.{suffix}")
            replace_file(pictures[-1], picture.getvalue())
    return pictures
