"""Answers as HTML: pictures, predictions, gates (the macros of ``answers.html``)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from html import escape
from typing import Any

import matplotlib
import numpy as np
from torch import Tensor

from rome.report.examples import picture, png
from rome.report.explore.explorer import Answer
from rome.report.figures.style import limits
from rome.report.subject import short
from rome.report.templating import TEMPLATES

SHOWN_CLASSES = 5
COLOURS = matplotlib.colormaps["viridis"]


def attacks(answers: Sequence[Answer]) -> str:
    """A card for each run: image, attacked image, magnified perturbation (alike for all), confidences."""
    moved = [answer for answer in answers if not answer.perturbed.equal(answer.image)]
    factor = min((answer.factor for answer in moved), default=1.0)
    return str(_ANSWERS.cards(answers, partial(_ANSWERS.attack, factor=factor)))


def experts(answers: Sequence[Answer]) -> str:
    """A card for each run: the chosen expert over the image, natural and attacked, and the gates of every layer."""
    maps = [answer.map for answer in answers if answer.map is not None]
    values = [part.numpy().ravel() for each in maps for part in (each.natural, each.attacked)]
    span = limits(np.concatenate(values)) if values else (0.0, 1.0)
    stops = ", ".join(matplotlib.colors.to_hex(COLOURS(i / 8)) for i in range(9))
    return str(_ANSWERS.cards(answers, partial(_ANSWERS.experts, span=span, stops=stops)))


def note(message: str) -> str:
    """A sentence about the image."""
    return f'<p class="message">{escape(message)}</p>'


def error(message: str) -> str:
    """What went wrong, in place of an answer or beside it."""
    return f'<p class="message bad" role="alert">{escape(message)}</p>'


def number(value: float) -> str:
    """Three digits, as few characters as that takes."""
    return f"{value:.3g}"


def _strongest(answer: Answer) -> list[int]:
    """The classes that matter in either image, the most confident first."""
    strongest = answer.natural.maximum(answer.attacked)
    chosen = strongest.argsort(descending=True, stable=True)[:SHOWN_CLASSES].tolist()
    return sorted(chosen, key=lambda row: -float(answer.natural[row]))


def _coloured(part: Tensor, span: tuple[float, float]) -> str:
    """A map (h, w) as a picture to lay over the image, one pixel a patch."""
    relative = ((part.numpy() - span[0]) / (span[1] - span[0])).clip(0, 1)
    return png((COLOURS(relative)[..., :3] * 255).round().astype(np.uint8))


TEMPLATES.filters |= {
    "picture": picture,
    "coloured": _coloured,
    "number": number,
    "short": short,
    "strongest": _strongest,
}
_ANSWERS: Any = TEMPLATES.get_template("answers.html").module
