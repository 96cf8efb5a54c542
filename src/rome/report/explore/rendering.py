"""Render answers as HTML: pictures, predictions and gates (macros of ``answers.html``)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from html import escape
from typing import Any

import matplotlib
import numpy as np
import torch
from torch import Tensor

from rome.report.examples import diverging, picture, png
from rome.report.explore.explorer import Answer
from rome.report.figures.style import THREATS, limits, styles_of
from rome.report.subject import NATURAL, short
from rome.report.templating import TEMPLATES

SHOWN_CLASSES = 5
COLOURS = matplotlib.colormaps["viridis"]


def attacks(answers: Sequence[Answer]) -> str:
    """Render a card per run: image, attacked image, perturbation (one scale for all runs), confidences (one order)."""
    scale = max(answer.largest for answer in answers)
    stops = _stops("RdBu_r", 0.1, 0.9) if len(answers[0].image) != 3 else ""
    body = partial(_ANSWERS.attack, scale=scale, stops=stops, order=_likeliest(answers))
    return str(_ANSWERS.cards(answers, body, _threat(answers)))


def experts(answers: Sequence[Answer]) -> str:
    """Render a card per run: a map of every expert of the chosen layer, clean and attacked, and the gates of every
    layer."""
    maps = [answer.map for answer in answers if answer.map is not None]
    values = [weights.numpy().ravel() for each in maps for weights in (each.natural, each.attacked)]
    span = limits(np.concatenate(values)) if values else (0.0, 1.0)
    body = partial(_ANSWERS.experts, span=span, stops=_stops(COLOURS.name, 0, 1))
    return str(_ANSWERS.cards(answers, body, _threat(answers)))


def note(message: str) -> str:
    """Render a note about the image."""
    return f'<p class="message">{escape(message)}</p>'


def error(message: str) -> str:
    """Render an error message."""
    return f'<p class="message bad" role="alert">{escape(message)}</p>'


def number(value: float) -> str:
    """Format with three significant digits, without trailing zeros."""
    return f"{value:.3g}"


def _likeliest(answers: Sequence[Answer]) -> list[int]:
    """Return the true class and the classes with the highest confidence in any run and image, ordered by the first
    run's confidence for the clean image."""
    highest = torch.stack([each for answer in answers for each in (answer.natural, answer.attacked)]).amax(dim=0)
    highest[answers[0].label] += 1  # the true class is always among them
    chosen = highest.argsort(descending=True, stable=True)[:SHOWN_CLASSES].tolist()
    return sorted(chosen, key=lambda row: -float(answers[0].natural[row]))


def _threat(answers: Sequence[Answer]) -> int:
    """Return the index of the attack's colour among the page's threat colours."""
    threat = answers[0].threat
    name = NATURAL if threat is None else getattr(threat, "norm", threat.kind)
    return THREATS.index(styles_of([name])[name].colour)


def _stops(name: str, low: float, high: float) -> str:
    """Return the stops of a CSS gradient for part of a colour map."""
    colours = matplotlib.colormaps[name](np.linspace(low, high, 9))
    return ", ".join(map(matplotlib.colors.to_hex, colours))


def _coloured(weights: Tensor, span: tuple[float, float]) -> str:
    """Return a map (h, w) as a picture with one pixel per patch."""
    relative = ((weights.numpy() - span[0]) / (span[1] - span[0])).clip(0, 1)
    return png((COLOURS(relative)[..., :3] * 255).round().astype(np.uint8))


TEMPLATES.filters |= {
    "picture": picture,
    "coloured": _coloured,
    "number": number,
    "short": short,
    "diverging": diverging,
}
_ANSWERS: Any = TEMPLATES.get_template("answers.html").module
