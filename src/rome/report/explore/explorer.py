"""One run's predictions and gates for one image under one attack."""

from __future__ import annotations

import hashlib
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
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
"""Number of attacked images in the cache, so that showing another layer needs no new attack."""


@dataclass(frozen=True, eq=False)
class PatchMap:
    """Weight of every expert of one layer at each of h x w patches."""

    layer: str
    natural: Tensor
    """(K, h, w), for the clean image; (K, 1, 1) if the gate weights belong to no place in the image."""
    attacked: Tensor
    """(K, h, w), for the attacked image."""
    note: str
    """Why the map is uniform; empty if it is not."""


@dataclass(frozen=True, eq=False)
class Answer:
    """One run's predictions and gates for one image, clean and attacked. Tensors are on the CPU."""

    run: str
    classes: tuple[str, ...]
    image: Tensor
    """(C, H, W) in [0, 1], the clean image."""
    perturbed: Tensor
    """(C, H, W) in [0, 1]; ``image`` itself without an attack."""
    threat: LpBall | AttackThreat | None
    """The threat; a ball has the radius that was used. None without an attack."""
    size: float
    """Size of the perturbation in the threat's own units."""
    steps: int
    label: int
    """The class the attack is against: the true one, or the model's own prediction if that is unknown."""
    natural: Tensor
    """(classes,): confidences for ``image``."""
    attacked: Tensor
    """(classes,): confidences for ``perturbed``."""
    tokens: Mapping[str, Tensor]
    """Layer -> (2, T, K): gate weights of the tokens, clean and attacked; empty for a model without experts."""
    map: PatchMap | None = None
    missing: str = ""
    """Why there is no map; empty if there is one."""
    seconds: float = 0.0
    """Time that the answer took."""

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
    """Attacks images on one run and reads its predictions and gates; safe to call from several threads.

    Args:
        subject: the run.
    """

    def __init__(self, subject: Subject) -> None:
        self.subject, self.name = subject, subject.name
        self.shape, self.classes = subject.split.shape, subject.split.classes
        self.layers = tuple(expert_layers(subject.model))
        self.balls = {name: threat for name, threat in subject.threats.items() if isinstance(threat, LpBall)}
        """Lp balls the run was trained on, by name."""
        self.others = {name: threat for name, threat in subject.threats.items() if isinstance(threat, AttackThreat)}
        """Threats with an attack of their own that the run was trained on, by name."""
        self._trusted = trust.allowed()
        self._cache: OrderedDict[tuple[object, ...], Answer] = OrderedDict()
        self._lock = threading.Lock()

    def test_image(self, number: int) -> tuple[Tensor, int]:
        """Return image (C, H, W) and label of a test example, numbered from 0.

        Raises:
            UserError: there is no example of that number.
        """
        ((x, y),) = self.subject.split.batches([torch.tensor([number])])
        return x[0], int(y[0])

    def predict(self, image: Tensor) -> int:
        """Return the predicted class of an image (C, H, W)."""
        with self._lock, torch.no_grad():
            return int(self.subject.model(image[None].to(self.subject.device)).argmax())

    def look(
        self,
        image: Tensor,
        threat: str | AttackThreat = NATURAL,
        eps: float | str | None = None,
        steps: float = STEPS,
        layer: str | None = None,
        *,
        label: int | None = None,
    ) -> Answer:
        """Attack an image with APGD or the threat's own attack; return predictions and gates, clean and attacked.

        Attacks are cached, so another layer of the same attacked image is returned at once.

        Args:
            image: (C, H, W) in [0, 1].
            threat: ``natural`` for no attack, a norm (L1, L2, Linf), or a threat with its own attack, itself or by its
                name in the run.
            eps: radius in the threat's own units, a number or text such as ``8/255``; the run's budget if not given.
            steps: steps of APGD, 1 to 100.
            layer: layer of the map; the last one if not given.
            label: the true class; None attacks the model's own prediction.

        Raises:
            UserError: an invalid image shape, radius, number of steps or threat.
        """
        started = time.perf_counter()
        if tuple(image.shape) != self.shape:
            raise UserError(f"{self.name} reads images {self.shape}, not {tuple(image.shape)}")
        if not 1 <= steps <= MOST_STEPS:
            raise UserError(f"steps must be 1 to {MOST_STEPS}, not {steps}")
        if isinstance(threat, str) and threat in self.others:
            threat = self.others[threat]
        steps = int(steps)
        ball = ball_of(threat, eps, self.balls, math.prod(self.shape)) if isinstance(threat, str) else threat
        if label is None:
            label = self.predict(image)
        key = (hashlib.sha256(image.numpy().tobytes()).digest(), label, repr(ball), steps if ball else 0)
        with trust.trusting(self._trusted), self._lock:  # the page calls from other threads
            if key not in self._cache:
                self._cache[key] = self._attack(image, label, ball, steps)
            self._cache.move_to_end(key)
            if len(self._cache) > KEPT:
                self._cache.popitem(last=False)
            answer = self._cache[key]
        patch_map, missing = self._map(answer, layer)
        return replace(answer, steps=steps, map=patch_map, missing=missing, seconds=time.perf_counter() - started)

    def _attack(self, image: Tensor, label: int, ball: LpBall | AttackThreat | None, steps: int) -> Answer:
        model, x = self.subject.model, image[None].to(self.subject.device)
        x_adv = x if ball is None else self._worst(x, torch.tensor([label], device=x.device), ball, steps)
        with torch.no_grad(), record_gates(model) if self.layers else nullcontext() as recorder:
            natural, attacked = model(torch.cat([x, x_adv])).float().softmax(dim=1).cpu()
        gates = {} if recorder is None else recorder.gates
        tokens = {name: each.weights.float().cpu() for name, each in gates.items()}
        perturbed, size = x_adv[0].cpu(), 0.0 if ball is None else float(ball.size(x_adv, x))
        return Answer(self.name, self.classes, image, perturbed, ball, size, steps, label, natural, attacked, tokens)

    def _worst(self, x: Tensor, y: Tensor, ball: Threat, steps: int) -> Tensor:
        """Return the image of highest loss; if the model is right on it, any misclassified image found on the way."""
        found = APGD(steps=steps).run(self.subject.model, x, y, ball)
        with torch.no_grad():
            right = bool(self.subject.model(found.images).argmax(dim=1) == y)
        return found.adversarial if right else found.images

    def _map(self, answer: Answer, layer: str | None) -> tuple[PatchMap | None, str]:
        if not self.layers:
            return None, "This run has no experts, so no gates."
        layer = layer or self.layers[-1]
        if layer not in self.layers:
            return None, f"This run has no experts in {short(layer)}."
        _, height, width = self.shape
        grid, note = on_grid(self.subject.model, layer, answer.tokens[layer], (height, width))
        return PatchMap(layer, grid[0].movedim(-1, 0), grid[1].movedim(-1, 0), note), ""


def on_grid(model: nn.Module, name: str, weights: Tensor, size: tuple[int, int]) -> tuple[Tensor, str]:
    """Arrange the gate weights of a layer's tokens as a map over the image.

    Args:
        name: name of the layer in :func:`rome.experts.record_gates`.
        weights: (..., T, K), as recorded.
        size: (H, W) of the image.

    Returns:
        The map, (..., h, w, K) for a grid of h x w patches (:func:`rome.experts.token_maps.grid_of`) or
        (..., 1, 1, K) if the tokens have no place in the image; and a sentence that explains a uniform map, else empty.
    """
    tokens = weights.shape[-2]
    try:
        grid = grid_of(model, name, tokens, size)
    except UserError:
        note = f"Its {tokens} tokens form no grid over the image; this is their mean."
        mean = weights.mean(dim=-2)[..., None, None, :]
        return mean, "This gate decides once for the whole image." if tokens == 1 else note
    patches = weights[..., grid.order, :]
    note = "" if bool((patches != patches[..., :1, :]).any()) else "This gate gives every patch the same weights."
    return patches.reshape(*patches.shape[:-2], grid.rows, grid.columns, patches.shape[-1]), note


def ball_of(
    threat: str, eps: float | str | None, budgets: Mapping[str, LpBall], values: float = math.inf
) -> LpBall | None:
    """Return the ball of this name and radius; None for ``natural`` and for radius 0.

    Args:
        values: number of values of an image, C*H*W. The radius may be at most the distance that it allows between two
            images in [0, 1].

    Raises:
        UserError: an unknown threat, or an invalid radius.
    """
    if threat == NATURAL:
        return None
    budget = budgets.get(threat)
    if budget is None and (eps is None or threat.lower() not in ("l1", "l2", "linf")):
        raise UserError(f"unknown threat {threat!r}.{did_you_mean(threat, [NATURAL, *budgets])}")
    norm = threat if budget is None else budget.norm
    most = {"l1": values, "l2": math.sqrt(values), "linf": 1.0}[norm.lower()]
    try:
        ball = LpBall.model_validate({"norm": norm, "eps": budget.eps if budget is not None and eps is None else eps})
        if ball.eps > most:
            raise ValueError
    except ValueError:
        limit = f" and at most {most:g}" if math.isfinite(most) else ""
        raise UserError(f"ε must be a non-negative number such as 0.03 or 8/255{limit}, not {eps!r}") from None
    return ball if ball.eps > 0 else None


@trust.opens_files
def open_explorers(folders: Sequence[Path], device: str | None = None, *, trust_code: bool = False) -> list[Explorer]:
    """Open the runs in these folders, which must be on the same data. ``trust_code`` lets them run the code that they
    name (:mod:`rome.core.trust`), now and later.

    Raises:
        UserError: more than two folders, one without a finished run, or runs on different data.
    """
    if len(folders) > 2:
        raise UserError(f"explore shows one run or two side by side, not {len(folders)}")
    explorers = [Explorer(subject) for subject in open_subjects(folders, device)]
    first = explorers[0]
    for other in explorers[1:]:
        if (other.shape, other.classes) != (first.shape, first.classes):
            raise UserError(
                f"{first.name} and {other.name} read different images: {first.shape} in {len(first.classes)} classes "
                f"and {other.shape} in {len(other.classes)}; choose runs on the same data"
            )
    return explorers
