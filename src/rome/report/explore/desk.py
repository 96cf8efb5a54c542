"""What the page calls: test images and uploads, and one question to one run or two."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Sequence
from pathlib import Path

from rome.core.errors import UserError
from rome.core.randomness import Stream, stream
from rome.report.explore.explorer import Answer, Explorer
from rome.report.explore.uploads import Shown, read_upload


class Desk:
    """What the page's events call: one image and one question for all runs.

    Args:
        explorers: one run or two that see the same images.
    """

    def __init__(self, explorers: Sequence[Explorer]) -> None:
        self.explorers = list(explorers)
        self.balls = dict(ChainMap(*(explorer.balls for explorer in explorers)))
        """The Lp balls of either run; where both have one, the budget is the first run's."""
        self.others = dict(ChainMap(*(explorer.others for explorer in explorers)))
        """Their threats that bring an attack, likewise."""
        self.classes = explorers[0].classes
        self.tests = len(explorers[0].subject.split)
        self.layers = list(dict.fromkeys(layer for explorer in explorers for layer in explorer.layers))
        self.chance: Stream = stream(0, "explore")

    def test(self, number: float | None) -> Shown:
        """That test image.

        Raises:
            UserError: there is none of that number.
        """
        n = int(number or 0)
        if not 0 <= n < self.tests:
            raise UserError(f"there is no test image {n}: they are numbered from 0 to {self.tests - 1}")
        image, label = self.explorers[0].test_image(n)
        return Shown(image, f"Test image {n} of 0 to {self.tests - 1}; its label is {self.classes[label]}.", label)

    def random(self) -> int:
        """The number of some test image."""
        return int(self.chance.number() * self.tests)

    def upload(self, path: str | Path) -> Shown:
        """An image file, as the models read it.

        Raises:
            UserError: no image, or none that can be used.
        """
        read = read_upload(path, self.explorers[0].shape)
        return read._replace(said=f"{read.said} Its label is unknown: attacks are against what the model itself sees.")

    def look(self, shown: Shown, threat: str, eps: float | str, steps: float | None, layer: str | None) -> list[Answer]:
        """Each run's answer to the question, attacked on itself.

        Raises:
            UserError: a radius or a number of steps that is none.
        """
        question = self.others.get(threat, threat), eps, int(steps or 0), layer
        return [each.look(shown.image, *question, label=shown.label) for each in self.explorers]
