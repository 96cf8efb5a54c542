"""Backend of the page: test images, uploads, and queries to one run or two."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Sequence
from pathlib import Path

from rome.core.errors import UserError
from rome.core.randomness import Stream, stream
from rome.report.explore.explorer import Answer, Explorer
from rome.report.explore.uploads import Shown, read_upload


class Desk:
    """Handlers of the page's events: the same image and the same query for all runs.

    Args:
        explorers: one run, or two on the same data.
    """

    def __init__(self, explorers: Sequence[Explorer]) -> None:
        self.explorers = list(explorers)
        self.balls = dict(ChainMap(*(explorer.balls for explorer in explorers)))
        """The Lp balls of both runs, by name; if both have one, its budget is the first run's."""
        self.others = dict(ChainMap(*(explorer.others for explorer in explorers)))
        """The threats of both runs that bring their own attack, by name, likewise."""
        self.classes = explorers[0].classes
        self.tests = len(explorers[0].subject.split)
        self.layers = list(dict.fromkeys(layer for explorer in explorers for layer in explorer.layers))
        self.chance: Stream = stream(0, "explore")

    def test(self, number: float | None) -> Shown:
        """Return a test image by its number.

        Raises:
            UserError: there is no image of that number.
        """
        number = number or 0
        if not 0 <= number < self.tests:
            raise UserError(f"there is no test image {number:g}; choose from 0 to {self.tests - 1}")
        n = int(number)
        image, label = self.explorers[0].test_image(n)
        return Shown(image, f"Test image {n} of 0 to {self.tests - 1}; its label is {self.classes[label]}.", label)

    def random(self) -> int:
        """Draw the number of a test image."""
        return int(self.chance.number() * self.tests)

    def upload(self, path: str | Path) -> Shown:
        """Read an image file as the models see it.

        Raises:
            UserError: the file is not an image, or not one that can be used.
        """
        read = read_upload(path, self.explorers[0].shape)
        return read._replace(
            description=f"{read.description} Its label is unknown, so attacks are against the model's prediction."
        )

    def look(self, shown: Shown, threat: str, eps: float | str, steps: float | None, layer: str | None) -> list[Answer]:
        """Attack each run separately, without transferring perturbations, and return the answers.

        Raises:
            UserError: an invalid radius or number of steps.
        """
        question = self.others.get(threat, threat), eps, steps or 0, layer
        return [each.look(shown.image, *question, label=shown.label) for each in self.explorers]
