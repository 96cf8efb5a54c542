"""The contract of the paper's figures: measure first, write the numbers, then draw them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from matplotlib.figure import Figure as Canvas

from rome.core.errors import UserError
from rome.report.subject import Subject


@dataclass(frozen=True)
class Options:
    """What a person may choose about figures."""

    n: int = 256
    """Test images, each natural and under every threat."""
    seed: int = 0
    """Of t-SNE's start and of the split of linear probes."""
    layer: str | None = None
    """Part of the name of the layer that is looked at; the last one if not given."""
    image: int = 0
    """Number of the test image, for figures of one image."""

    def pick(self, names: Iterable[str]) -> str:
        """The last of these layers whose name holds ``layer``; the last of all if none was asked for.

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


def registered() -> dict[str, type[PaperFigure]]:
    """Every figure by name, in the paper's order: 1, 3, 5 ... A1, A2 ..., then what the paper has not."""
    found: dict[str, type[PaperFigure]] = {}
    waiting = list(PaperFigure.__subclasses__())
    while waiting:
        kind = waiting.pop()
        waiting.extend(kind.__subclasses__())
        if "name" in vars(kind):
            found[kind.name] = kind
    return dict(sorted(found.items(), key=lambda item: _place(item[0])))


def _place(name: str) -> tuple[bool, bool, int, str]:
    number = name.removeprefix("fig")
    digits = number.lstrip("A")
    return not name.startswith("fig"), number.startswith("A"), int(digits) if digits.isdigit() else 0, name
