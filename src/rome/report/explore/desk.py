"""What the page calls: test images and uploads, and one question to one run or two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from rome.core.randomness import Stream, stream
from rome.report.explore.explorer import Answer, Explorer
from rome.report.explore.uploads import read_upload


@dataclass(frozen=True, eq=False)
class Shown:
    """The image in hand."""

    image: Tensor
    """(C, H, W) in [0, 1]."""
    label: int | None
    """None where it is unknown."""
    said: str
    """Where it comes from and what is attacked."""


class Desk:
    """What the page's events call: one image and one question for all runs.

    Args:
        explorers: one run or two that see the same images.
    """

    def __init__(self, explorers: Sequence[Explorer]) -> None:
        self.explorers = list(explorers)
        self.balls = {name: ball for explorer in reversed(explorers) for name, ball in explorer.balls.items()}
        """The Lp balls of either run; where both have one, the budget is the first run's."""
        self.others = {name: threat for explorer in reversed(explorers) for name, threat in explorer.others.items()}
        """Their threats that bring an attack, likewise."""
        self.tests = len(explorers[0].subject.split)
        self.layers = list(dict.fromkeys(layer for explorer in explorers for layer in explorer.layers))
        self.chance: Stream = stream(0, "explore")

    def test(self, number: float | None) -> Shown:
        """That test image; numbers beyond an end mean the other one."""
        n = int(number or 0) % self.tests
        image, label = self.explorers[0].test_image(n)
        name = self.explorers[0].classes[label]
        return Shown(image, label, f"Test image {n} of 0 to {self.tests - 1}; its label, {name}, is attacked.")

    def random(self) -> int:
        """The number of some test image."""
        return int(self.chance.number() * self.tests)

    def upload(self, path: str | Path) -> Shown:
        """An image file, as the models read it.

        Raises:
            UserError: no image, or none that can be used.
        """
        read = read_upload(path, self.explorers[0].shape)
        said = f"{read.said} Its label is unknown: what the model itself sees is attacked."
        return Shown(read.image, None, said)

    def look(
        self, shown: Shown, threat: str, eps: float | str, steps: float, layer: str | None, expert: int | None
    ) -> list[Answer]:
        """Each run's answer to the question, attacked on itself.

        Raises:
            UserError: a radius that is none.
        """
        chosen, asked = expert or 0, self.others.get(threat, threat)
        return [
            each.look(shown.image, asked, eps, int(steps), layer, chosen, label=shown.label) for each in self.explorers
        ]

    def experts(self, layer: str | None) -> list[tuple[str, int]]:
        """Choices of an expert in that layer."""
        most = max((each.experts(layer or "") for each in self.explorers), default=0)
        return [(f"expert {k + 1}", k) for k in range(most)]
