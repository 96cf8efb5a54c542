"""One run, one image, one attack: what the model makes of it, as numbers."""

from __future__ import annotations

import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from rome.attacks import APGD, AttackThreat
from rome.core import trust
from rome.core.errors import UserError, did_you_mean
from rome.experts import expert_layers, record_gates
from rome.experts.token_maps import grid_of
from rome.report.subject import NATURAL, Subject, open_subjects, short
from rome.threats import LpBall, Threat

STEPS, MOST_STEPS = 15, 100
KEPT = 16
"""Attacked images in the cache, so that another layer costs no attack."""


@dataclass(frozen=True, eq=False)
class PatchMap:
    """The weight of every expert of one layer at every patch, h x w of them."""

    layer: str
    natural: Tensor
    """(K, h, w), of the image as it is; (K, 1, 1) where the gate does not tell patches apart."""
    attacked: Tensor
    """(K, h, w), under attack."""
    note: str
    """A sentence where the map is uniform; empty otherwise."""


@dataclass(frozen=True, eq=False)
class Answer:
    """What one run makes of one image under one attack. Tensors are on the CPU."""

    run: str
    classes: tuple[str, ...]
    image: Tensor
    """(C, H, W) in [0, 1], as it is."""
    perturbed: Tensor
    """(C, H, W) in [0, 1]; ``image`` itself where nothing was attacked."""
    threat: LpBall | AttackThreat | None
    """A ball with the radius that was used; None: natural."""
    size: float
    """Of the perturbation, in the threat's own measure."""
    steps: int
    label: int
    """The class that was attacked: the true one, or the model's own prediction where it is unknown."""
    natural: Tensor
    """(classes,): confidences for ``image``."""
    attacked: Tensor
    """(classes,): confidences for ``perturbed``."""
    tokens: Mapping[str, Tensor]
    """Layer -> (2, T, K): gate weights of tokens, natural and attacked; empty for a model without experts."""
    map: PatchMap | None = None
    missing: str = ""
    """Why there is no map; empty where there is one."""
    seconds: float = 0.0
    """From question to answer."""

    @property
    def gates(self) -> dict[str, Tensor]:
        """Layer -> (2, K): gate weights averaged over tokens."""
        return {name: weights.mean(dim=1) for name, weights in self.tokens.items()}

    @property
    def largest(self) -> float:
        """The largest change of any pixel."""
        return float((self.perturbed - self.image).abs().max())

    @property
    def tallest(self) -> float:
        """The largest gate weight."""
        return max(float(weights.max()) for weights in self.gates.values())


class Explorer:
    """Answers questions about one run; may be called from several threads, and serves one at a time.

    Args:
        subject: the run.
    """

    def __init__(self, subject: Subject) -> None:
        self.subject, self.name = subject, subject.name
        self.shape, self.classes = subject.split.shape, subject.split.classes
        self.layers = tuple(expert_layers(subject.model))
        self.balls = {name: threat for name, threat in subject.threats.items() if isinstance(threat, LpBall)}
        """The Lp balls it was trained on, by name."""
        self.others = {name: threat for name, threat in subject.threats.items() if isinstance(threat, AttackThreat)}
        """The threats it was trained on that bring their own attack, by name."""
        self._trusted = trust.allowed()
        self._seen: OrderedDict[tuple[object, ...], Answer] = OrderedDict()
        self._lock = threading.Lock()

    def test_image(self, number: int) -> tuple[Tensor, int]:
        """Image (C, H, W) and label of that test example, numbered from 0.

        Raises:
            UserError: there is none of that number.
        """
        ((x, y),) = self.subject.split.batches([torch.tensor([number])])
        return x[0], int(y[0])

    def predict(self, image: Tensor) -> int:
        """The class of an image (C, H, W)."""
        with self._lock, torch.no_grad():
            return int(self.subject.model(image[None].to(self.subject.device)).argmax())

    def look(
        self,
        image: Tensor,
        threat: str | AttackThreat = NATURAL,
        eps: float | str | None = None,
        steps: int = STEPS,
        layer: str | None = None,
        *,
        label: int | None = None,
    ) -> Answer:
        """Attack an image with APGD, or the threat's own attack, and read predictions and gates, natural and attacked.

        The attack is cached: the same question about another layer is answered at once.

        Args:
            image: (C, H, W) in [0, 1].
            threat: ``natural``, a norm (L1, L2, Linf), or a threat that brings its attack or the name of the run's.
            eps: radius in the threat's own units, a number or text such as ``8/255``; the run's budget if not given.
            steps: of APGD, 1..100.
            layer: for the map; the last if not given.
            label: the true class; None attacks the model's own prediction.

        Raises:
            UserError: a shape, radius, number of steps or threat that cannot be right.
        """
        started = time.perf_counter()
        if tuple(image.shape) != self.shape:
            raise UserError(f"{self.name} reads images {self.shape}, not {tuple(image.shape)}")
        if not 1 <= steps <= MOST_STEPS:
            raise UserError(f"steps must be 1 to {MOST_STEPS}, not {steps}")
        if isinstance(threat, str) and threat in self.others:
            threat = self.others[threat]
        ball = ball_of(threat, eps, self.balls) if isinstance(threat, str) else threat
        if label is None:
            label = self.predict(image)
        key = (hashlib.sha256(image.numpy().tobytes()).digest(), label, repr(ball), steps if ball else 0)
        with trust.trusting(self._trusted), self._lock:  # a page asks from threads of its own
            if key not in self._seen:
                self._seen[key] = self._attack(image, label, ball, steps)
            self._seen.move_to_end(key)
            if len(self._seen) > KEPT:
                self._seen.popitem(last=False)
            found = self._seen[key]
        chosen, missing = self._map(found, layer)
        return replace(found, steps=steps, map=chosen, missing=missing, seconds=time.perf_counter() - started)

    def _attack(self, image: Tensor, label: int, ball: LpBall | AttackThreat | None, steps: int) -> Answer:
        model, x = self.subject.model, image[None].to(self.subject.device)
        moved = x if ball is None else self._worst(x, torch.tensor([label], device=x.device), ball, steps)
        with torch.no_grad(), record_gates(model) if self.layers else nullcontext() as recorder:
            natural, attacked = model(torch.cat([x, moved])).float().softmax(dim=1).cpu()
        gates = {} if recorder is None else recorder.gates
        tokens = {name: each.weights.float().cpu() for name, each in gates.items()}
        perturbed, size = moved[0].cpu(), 0.0 if ball is None else float(ball.size(moved, x))
        return Answer(self.name, self.classes, image, perturbed, ball, size, steps, label, natural, attacked, tokens)

    def _worst(self, x: Tensor, y: Tensor, ball: Threat, steps: int) -> Tensor:
        """Where the loss is highest; if the model is right there and wrong elsewhere on the way, a place there."""
        found = APGD(steps=steps).run(self.subject.model, x, y, ball)
        with torch.no_grad():
            right = bool(self.subject.model(found.images).argmax(dim=1) == y)
        return found.adversarial if right else found.images

    def _map(self, found: Answer, layer: str | None) -> tuple[PatchMap | None, str]:
        if not self.layers:
            return None, "This run has no experts, so no gates."
        layer = layer or self.layers[-1]
        if layer not in self.layers:
            return None, f"This run has no experts in {short(layer)}."
        _, height, width = self.shape
        grid, note = on_grid(self.subject.model, layer, found.tokens[layer], (height, width))
        return PatchMap(layer, grid[0].movedim(-1, 0), grid[1].movedim(-1, 0), note), ""


def on_grid(model: nn.Module, name: str, weights: Tensor, size: tuple[int, int]) -> tuple[Tensor, str]:
    """The weights of a layer's tokens as a map over the image, and a sentence where they do not differ by place.

    Args:
        name: of the layer, as :func:`rome.experts.record_gates` calls it.
        weights: (..., T, K), as recorded.
        size: (H, W) of the image.

    Returns:
        (..., h, w, K) for a grid of h x w patches (:func:`rome.experts.token_maps.grid_of`); (..., 1, 1, K) where the
        tokens have no place in the image.
    """
    tokens = weights.shape[-2]
    try:
        grid = grid_of(model, name, tokens, size)
    except UserError:
        why = f"Its {tokens} tokens form no grid over the image; this is their mean."
        whole = weights.mean(dim=-2)[..., None, None, :]
        return whole, "This gate decides once for the whole image." if tokens == 1 else why
    patches = weights[..., grid.order, :]
    note = "" if bool((patches != patches[..., :1, :]).any()) else "This gate gives every patch the same weights."
    return patches.reshape(*patches.shape[:-2], grid.rows, grid.columns, patches.shape[-1]), note


def ball_of(threat: str, eps: float | str | None, budgets: Mapping[str, LpBall]) -> LpBall | None:
    """The ball that a name and a radius mean; None for ``natural`` and for radius 0.

    Raises:
        UserError: no such threat, or no radius.
    """
    if threat == NATURAL:
        return None
    if threat not in budgets and (eps is None or threat.lower() not in ("l1", "l2", "linf")):
        raise UserError(f"unknown threat {threat!r}.{did_you_mean(threat, [NATURAL, *budgets])}")
    try:
        ball = LpBall.model_validate({"norm": threat, "eps": budgets[threat].eps if eps is None else eps})
    except ValidationError:
        raise UserError(f"ε is {eps!r}; write a number from 0 up, such as 0.03 or 8/255") from None
    return ball if ball.eps > 0 else None


@trust.opens_files
def open_explorers(folders: Sequence[Path], device: str | None = None, *, trust_code: bool = False) -> list[Explorer]:
    """The runs in these folders, for the same images. ``trust_code`` lets them run the code that they name
    (:mod:`rome.core.trust`), also later.

    Raises:
        UserError: more than two, one that holds no finished run, or runs on different data.
    """
    if len(folders) > 2:
        raise UserError(f"explore shows one run or two side by side, not {len(folders)}")
    explorers = [Explorer(subject) for subject in open_subjects(folders, device)]
    first = explorers[0]
    for other in explorers[1:]:
        if (other.shape, other.classes) != (first.shape, first.classes):
            raise UserError(
                f"{first.name} and {other.name} do not see the same images: {first.shape} in {len(first.classes)} "
                f"classes against {other.shape} in {len(other.classes)}; choose runs on the same data"
            )
    return explorers
