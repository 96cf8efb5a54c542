"""Pictures of a few test images and of what each threat did to them."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rome.attacks import APGD
from rome.core.errors import UserError
from rome.evaluation.evaluate import example_images
from rome.report.evaluated import Evaluated
from rome.report.subject import Subject
from rome.threats import LpBall, Perceptual

PICTURED = 6
"""Maximum number of cases with pictures; more would not fit beside each other."""
LOOKED_AT = 64
"""Number of a case's saved adversarial images to choose from."""
SMALLEST = 96
"""Minimum side in pixels; smaller images are enlarged by an integer factor."""


def pick(runs: Sequence[Evaluated], k: int) -> list[int]:
    """Choose up to ``k`` examples of different classes that every run classifies correctly when clean: first those that
    the most attacks break in some runs but not in others, then those broken most often.

    Examples are left out if an attack broke them whose image was not saved.
    """
    reports = [run.report for run in runs]
    usable = np.logical_and.reduce([report.correct[:, 0] for report in reports])
    broken, differing = np.zeros((2, len(usable)), dtype=int)
    for case in pictured(runs):
        fooled = np.array([report.correct[:, 0] & ~report.all_correct((case,)) for report in reports])
        broken += fooled.sum(axis=0)
        differing += fooled.any(axis=0) & ~fooled.all(axis=0)
        for run, own in zip(runs, fooled, strict=True):
            saved = _saved(run, case)
            if saved is not None:
                usable &= ~own | np.isin(np.arange(len(own)), list(saved))
    order = sorted(np.flatnonzero(usable).tolist(), key=lambda row: (-differing[row], -broken[row]))
    if differing[order].astype(bool).sum() >= k:
        order = [row for row in order if differing[row]]
    labels = reports[0].labels[order]
    firsts = sorted(np.unique(labels, return_index=True)[1].tolist())
    distinct = [order[i] for i in firsts]
    return [*distinct, *(row for row in order if row not in distinct)][:k]


def adversarial(
    run: Evaluated, subject: Subject, x: Tensor, y: Tensor, rows: Sequence[int], cases: Sequence[str]
) -> dict[str, Tensor]:
    """Return adversarial images of these examples: case -> (k, C, H, W). They are those saved by the evaluation; where
    no attack broke the model, they come from APGD, or for threats other than Lp balls from the case's own attack."""
    model, device = subject.model, subject.device
    chosen = torch.tensor(rows)
    found = {}
    for case in cases:
        saved, threat = _saved(run, case) or {}, run.threats[case]
        attack = APGD(steps=15) if isinstance(threat, LpBall) else run.attacks[case].attacks[0]
        images = attack.run(model, x[chosen].to(device), y[chosen].to(device), threat).adversarial.cpu()
        for place, row in enumerate(rows):
            if row in saved:
                images[place] = saved[row]
        found[case] = images
    return found


def pictured(runs: Sequence[Evaluated]) -> list[str]:
    """Choose the cases shown in pictures: the first few that every run has, since cases may have failed or not run."""
    shared = set[str].intersection(*(set(run.attacks) for run in runs))
    return [case for case in runs[0].attacks if case in shared][:PICTURED]


def describe(
    opened: Sequence[tuple[Evaluated, Subject]], x: Tensor, y: Tensor, rows: Sequence[int], cases: Sequence[str]
) -> dict[str, Any]:
    """Collect pictures and predictions of these examples under these cases.

    Returns:
        ``scale``: case -> largest change of any pixel, drawn in full colour; ``gray``: whether images do not have three
        channels; ``examples``: each with ``number``, ``label``, ``image`` and ``rows``, one for each ``run``, whose
        ``shots``, one for each case, have ``threat``, ``image``, ``perturbation`` (magnified), ``prediction``,
        ``fooled`` and the perturbation's ``size`` in the threat's own norm (None if only a network can measure it).
        Images are data URIs.
    """
    clean, labels = x[rows], y[rows].tolist()
    classes = opened[0][1].split.classes
    shown: list[dict[str, Any]] = [
        {"number": row, "label": classes[label], "image": picture(image), "rows": []}
        for row, label, image in zip(rows, labels, clean, strict=True)
    ]
    found = [adversarial(run, subject, x, y, rows, cases) for run, subject in opened]
    scale = {case: max(float((images[case] - clean).abs().max()) for images in found) or 1.0 for case in cases}
    for (run, subject), images in zip(opened, found, strict=True):
        for example in shown:
            example["rows"].append({"run": run, "shots": []})
        for case, batch in images.items():
            with torch.no_grad():
                predicted = subject.model(batch.to(subject.device)).argmax(1).tolist()
            threat = run.threats[case]
            sizes = [None] * len(rows) if isinstance(threat, Perceptual) else threat.size(batch, clean).tolist()
            every = zip(shown, predicted, labels, sizes, batch, clean, strict=True)
            for example, seen, label, size, image, before in every:
                shot = {"threat": case, "prediction": classes[seen], "fooled": seen != label, "size": size}
                shot |= {"image": picture(image), "perturbation": diverging(image - before, scale[case])}
                example["rows"][-1]["shots"].append(shot)
    return {"scale": scale, "gray": x.shape[1] != 3, "examples": shown}


def picture(image: Tensor) -> str:
    """Encode an image (C, H, W) in [0, 1] as a PNG data URI. One channel is gray; unless there are one or three
    channels, their mean is shown."""
    return png((image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy(), least=SMALLEST)


def diverging(delta: Tensor, scale: float) -> str:
    """Encode a perturbation (C, H, W) as a PNG data URI.

    One channel: blue darkens, red brightens, white is no change. Colour: gray is no change, and each channel deviates
    from it.
    """
    relative = 0.5 + 0.4 * (delta / scale).clamp(-1, 1)  # without the near-black ends
    if len(relative) == 3:
        return picture(relative)
    colours = matplotlib.colormaps["RdBu_r"](relative.mean(dim=0).numpy())
    return png((colours[..., :3] * 255).round().astype(np.uint8), least=SMALLEST)


def png(pixels: np.ndarray, *, least: int = 1) -> str:
    """Encode pixels, uint8 (H, W, C), as a data URI, enlarged by an integer factor so that no side is shorter than
    ``least``."""
    if pixels.shape[2] not in (1, 3):
        pixels = pixels.mean(axis=2, keepdims=True).astype(np.uint8)
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    factor = -(-least // min(image.size))
    image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _saved(run: Evaluated, case: str) -> dict[int, Tensor] | None:
    """Load example -> adversarial image for the first examples that fooled the model; None if no images were saved."""
    try:
        rows, images = example_images(run.folder, case, LOOKED_AT)
    except UserError:
        return None
    return dict(zip(rows.tolist(), images, strict=True))
