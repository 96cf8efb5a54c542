"""Answers as HTML: pictures, predictions, gates. No script, no file beside it; colours are the page's variables."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape

import matplotlib
import numpy as np
from PIL import Image
from torch import Tensor

from rome.report.charts import limits
from rome.report.examples import picture
from rome.report.explore.explorer import Answer, PatchMap
from rome.report.subject import short
from rome.threats import LpBall

SHOWN_CLASSES = 5
SMOOTH = 96
"""Pixels; images at least this high are shown smooth, smaller ones with visible pixels."""
COLOURS = "viridis"


def attacks(answers: Sequence[Answer]) -> str:
    """A card for each run: image, attacked image, magnified perturbation (alike for all), confidences."""
    moved = [answer for answer in answers if not answer.perturbed.equal(answer.image)]
    factor = min((answer.factor for answer in moved), default=1.0)
    return _cards(answers, [_attack(answer, factor) for answer in answers])


def experts(answers: Sequence[Answer]) -> str:
    """A card for each run: the chosen expert over the image, natural and attacked, and the gates of every layer."""
    maps = [answer.map for answer in answers if answer.map is not None]
    values = [part.numpy().ravel() for each in maps for part in (each.natural, each.attacked)]
    span = limits(np.concatenate(values)) if values else (0.0, 1.0)
    return _cards(answers, [_experts(answer, span) for answer in answers])


def error(message: str) -> str:
    """What went wrong, in place of an answer or beside it."""
    return f'<p class="message bad" role="alert">{escape(message)}</p>'


def note(message: str) -> str:
    """A sentence about the image."""
    return f'<p class="message">{escape(message)}</p>'


def number(value: float) -> str:
    """Three digits, as few characters as that takes."""
    return f"{value:.3g}"


def _cards(answers: Sequence[Answer], bodies: Sequence[str]) -> str:
    cards = "".join(
        f'<section class="card" style="--dot: var(--run-{i})"><h3><i></i>{escape(answer.run)}</h3>{body}</section>'
        for i, (answer, body) in enumerate(zip(answers, bodies, strict=True))
    )
    return f'<div class="cards of-{len(bodies)}">{cards}</div>'


def _attack(answer: Answer, factor: float) -> str:
    natural, attacked = int(answer.natural.argmax()), int(answer.attacked.argmax())
    names = answer.classes
    verdict = f"sees {_seen(names, natural, answer.label)}"
    if answer.threat is None:
        facts, delta = "Nothing is attacked.", "no perturbation"
    else:
        verdict += f", attacked {_seen(names, attacked, answer.label)}"
        facts = f"{_attacker(answer)}, against {escape(names[answer.label])}."
        delta = f"perturbation, {number(factor)} times"
    took = f"{answer.seconds:.2f}" if answer.seconds >= 0.01 else "under 0.01"
    shots = [
        (picture(answer.image), "natural", "natural"),
        (picture(answer.perturbed), "attacked", "attacked"),
        (picture(answer.magnified(factor)), delta, "delta"),
    ]
    figures = "".join(_figure(answer, uri, caption, kind) for uri, caption, kind in shots)
    return (
        f'<p class="verdict">{verdict}</p><div class="shots">{figures}</div>{_confidences(answer)}'
        f'<p class="facts">{facts} Answered in {took} s.</p>'
    )


def _attacker(answer: Answer) -> str:
    """What attacked, how far it went and in how many steps."""
    if isinstance(answer.threat, LpBall):
        went = f"{answer.threat.norm} size {number(answer.size)} of at most {number(answer.threat.eps)}"
        kind, steps = "APGD", answer.steps
    else:
        assert answer.threat is not None
        went = f"largest change of a pixel {number(answer.size)}"
        kind, steps = answer.threat.attack.kind, answer.threat.attack.steps_for(answer.threat.place)
    return f"{went}; {escape(kind)}, {steps} step{'s' if steps > 1 else ''}"


def _seen(names: Sequence[str], predicted: int, label: int) -> str:
    return f'<b class="{"good" if predicted == label else "bad"}">{escape(names[predicted])}</b>'


def _figure(answer: Answer, uri: str, caption: str, kind: str, over: str = "") -> str:
    shape = "smooth" if answer.image.shape[1] >= SMOOTH else "pixels"
    image = f'<img class="{shape} {kind}" src="{uri}" alt="{caption}">'
    return f'<figure><div class="frame">{image}{over}</div><figcaption>{caption}</figcaption></figure>'


def _confidences(answer: Answer) -> str:
    """The classes that matter in either image, the most confident first, with two bars each."""
    strongest = answer.natural.maximum(answer.attacked)
    chosen = strongest.argsort(descending=True, stable=True)[:SHOWN_CLASSES].tolist()
    chosen.sort(key=lambda row: -float(answer.natural[row]))
    rows = []
    for row in chosen:
        name = escape(answer.classes[row])
        bars = _bar(float(answer.natural[row]), "natural"), _bar(float(answer.attacked[row]), "attacked")
        rows.append(f'<tr><th scope="row" title="{name}">{name}</th><td>{bars[0]}</td><td>{bars[1]}</td></tr>')
    head = '<tr><th scope="col">confidence</th><th scope="col">natural</th><th scope="col">attacked</th></tr>'
    return f'<table class="confidences"><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table>'


def _bar(share: float, kind: str) -> str:
    return f'<div class="bar {kind}"><span style="width: {100 * share:.1f}%"></span><em>{100 * share:.1f}%</em></div>'


def _experts(answer: Answer, span: tuple[float, float]) -> str:
    found = answer.map
    if found is None:
        body = f'<p class="empty">{escape(answer.missing)}</p>'
        return body + (_gates(answer, None) if answer.gates else "")
    below = [
        _figure(answer, _gray(image), f"{kind}, mean {number(float(part.mean()))}", kind, _overlay(part, span))
        for kind, image, part in (
            ("natural", answer.image, found.natural),
            ("attacked", answer.perturbed, found.attacked),
        )
    ]
    stops = ", ".join(matplotlib.colors.to_hex(matplotlib.colormaps[COLOURS](i / 8)) for i in range(9))
    scale = (
        f'<div class="scale"><span>{span[0]:.2f}</span><div style="background: linear-gradient(90deg, {stops})"></div>'
        f"<span>{span[1]:.2f}</span></div>"
    )
    note = f'<p class="facts">{escape(found.note)}</p>' if found.note else ""
    h, w = found.natural.shape
    patches = "one weight for the image" if h * w == 1 else f"{h} x {w} patches"
    what = f"Weight of expert {found.expert + 1} in <code>{escape(short(found.layer))}</code>, {patches}"
    return (
        f'<h4>{what}</h4><div class="shots two">{"".join(below)}</div>{scale}{note}'
        f"<h4>Gates of every layer, mean over tokens</h4>{_gates(answer, found)}"
    )


def _overlay(part: Tensor, span: tuple[float, float]) -> str:
    """A map as a picture to lay over the image, one pixel a patch."""
    relative = ((part.numpy() - span[0]) / (span[1] - span[0])).clip(0, 1)
    pixels = (matplotlib.colormaps[COLOURS](relative)[..., :3] * 255).round().astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    uri = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return f'<img class="map" src="{uri}" alt="weights from {part.min():.2f} to {part.max():.2f}">'


def _gray(image: Tensor) -> str:
    return picture(image.mean(dim=0, keepdim=True))


def _gates(answer: Answer, found: PatchMap | None) -> str:
    """A small chart for each layer: a pair of bars for each expert, natural and attacked."""
    tallest = max(float(weights.max()) for weights in answer.gates.values())
    charts = []
    for layer, weights in answer.gates.items():
        pairs = "".join(
            f'<div class="pair{" chosen" if found and (layer, k) == (found.layer, found.expert) else ""}" '
            f'title="expert {k + 1}: {natural:.3f} natural, {attacked:.3f} attacked">'
            f'<span class="natural" style="height: {100 * natural / tallest:.1f}%"></span>'
            f'<span class="attacked" style="height: {100 * attacked / tallest:.1f}%"></span><em>{k + 1}</em></div>'
            for k, (natural, attacked) in enumerate(weights.T.tolist())
        )
        chosen = " chosen" if found and layer == found.layer else ""
        name = escape(short(layer))
        charts.append(f'<div class="gate{chosen}"><b title="{name}">{name}</b><div class="pairs">{pairs}</div></div>')
    legend = (
        '<p class="legend"><span><i class="natural"></i>natural</span><span><i class="attacked"></i>attacked</span>'
        f"<span>full height: {tallest:.2f}</span></p>"
    )
    return f'{legend}<div class="gates">{"".join(charts)}</div>'
