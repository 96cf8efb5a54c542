"""The interface of the paper's figures: measure first, write the numbers, then draw them."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from matplotlib.figure import Figure as Canvas

from rome.core.errors import UserError
from rome.experts import Gated, expert_layers
from rome.report.subject import Subject


@dataclass(frozen=True)
class Options:
    """What the figures of one call have in common."""

    n: int = 256
    """Test images, each natural and under every threat."""
    seed: int = 0
    """Of t-SNE's start and of the split of linear probes."""
    layer: str | None = None
    """Part of the name of the layer to show; None takes the last."""
    image: int = 0
    """Number of the test image, for figures of one image."""

    def pick(self, names: Iterable[str]) -> str:
        """The last of these layers whose name holds ``layer``.

        Raises:
            UserError: no name holds it.
        """
        names = list(names)
        found = [name for name in names if self.layer is None or self.layer in name]
        if not found:
            raise UserError(f"no layer's name holds {self.layer!r}; there are {', '.join(names)}")
        return found[-1]


class PaperFigure(ABC):
    """One figure of the paper, for any runs. A subclass with a ``name`` is its registration.

    What :meth:`measure` returns is all that :meth:`draw` sees, so that a picture can be drawn again from its file.
    """

    name: ClassVar[str]
    """``fig3``, ``figA3``: what ``--only`` calls it and its files are called."""
    title: ClassVar[str]
    """What it shows, in a line."""

    @abstractmethod
    def measure(self, subjects: Sequence[Subject], options: Options) -> dict[str, Any]:
        """The figure's data, of plain values that JSON can hold.

        Raises:
            UserError: these runs do not have what the figure shows.
        """

    @abstractmethod
    def rows(self, data: dict[str, Any]) -> list[dict[str, Any]]:
        """The same as rows of a table, one per point or curve value, for the CSV file."""

    @abstractmethod
    def draw(self, data: dict[str, Any]) -> Canvas:
        """The picture, from what :meth:`measure` returned."""


class FigureOfRuns(PaperFigure):
    """Base: what is measured of each run by itself; those without it are left out."""

    @abstractmethod
    def measure_run(self, subject: Subject, options: Options) -> dict[str, Any]:
        """One run's part of the data, beginning with its name.

        Raises:
            UserError: this run does not have what the figure shows.
        """

    lacking: ClassVar[str]
    """Why there is no figure where every run is left out."""

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


def require_experts(subject: Subject) -> dict[str, Gated]:
    """The layers with experts, by name.

    Raises:
        UserError: there are none.
    """
    layers = expert_layers(subject.model)
    if not layers:
        raise UserError("it has no experts")
    return layers


def leaves(nested: Any, depth: int) -> Iterator[tuple[Any, ...]]:
    """The keys and numbers that lead to each value ``depth`` levels inside mappings and lists, then the value."""
    if depth == 0:
        yield (nested,)
        return
    for key, value in nested.items() if isinstance(nested, dict) else enumerate(nested):
        for leaf in leaves(value, depth - 1):
            yield key, *leaf


def registered() -> dict[str, type[PaperFigure]]:
    """Every figure by name, in the paper's order: 1, 3, 5 ... A1, A2 ..., then what the paper has not."""

    def below(kind: type[PaperFigure]) -> Iterator[type[PaperFigure]]:
        for figure in kind.__subclasses__():
            yield figure
            yield from below(figure)

    def place(name: str) -> tuple[bool, bool, int, str]:
        found = re.fullmatch(r"fig(A?)(\d+)", name)
        return (found is None, bool(found and found[1]), int(found[2]) if found else 0, name)

    found = {figure.name: figure for figure in below(PaperFigure) if "name" in vars(figure)}  # type: ignore[type-abstract]
    return {name: found[name] for name in sorted(found, key=place)}
