"""The four attacks of AutoAttack's standard version, each an :class:`Attack` of its own.

Croce and Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free attacks"
(ICML 2020), "Mind the box: l1-APGD" (ICML 2021), "Minimally distorted adversarial examples" (FAB, ICML 2020);
Andriushchenko et al., "Square Attack" (ECCV 2020). The searches are those of ``pyautoattack``. Built as its version
``standard``, which alone sets what is special to L1: larger radii first, 5 restarts, 5 targets.

What differs is around them: nothing is logged, ``sys.settrace`` and the global random state are left alone, inputs may
be non-contiguous, the number of targets is cut to the classes there are, and what the package would log as a warning
is a :class:`AttackWarning`.
"""

from __future__ import annotations

import re
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
from pyautoattack import AutoAttack
from pydantic import Field
from torch import Tensor

from rome.attacks.base import Attack, AttackResult, Group
from rome.attacks.engine import Model, logits_of
from rome.core.errors import UserError
from rome.core.randomness import Stream, cuda_in_use
from rome.threats import LpBall, Threat

MIN_CLASSES_DLR = 4
"""The targeted DLR loss divides by z_(1) - (z_(3) + z_(4)) / 2: it needs four logits."""


class AttackWarning(UserWarning):
    """A sign that an attack's verdict may be too kind. ``check`` names what was seen, on how many ``examples``."""

    def __init__(self, check: str, message: str, examples: int) -> None:
        super().__init__(f"{examples} examples: {message}")
        self.check, self.message, self.examples = check, message, examples


class AutoAttackPart(Attack):
    """One attack of AutoAttack's standard version.

    The random numbers come from the generator's initial seed, so that ``torch.Generator().manual_seed(0)`` gives what
    ``AutoAttack(seed=0)`` finds on the same batch. Images must be float32. An image that rounding carried out of the
    ball is projected back.
    """

    untrained: ClassVar[str] = "is made for evaluation; pgd and apgd search the same balls in training"
    starts_at_random: ClassVar[bool] = False
    """The random numbers are drawn by pyautoattack."""

    def run(self, *args: Any, generator: torch.Generator | Stream | None = None, **named: Any) -> AttackResult:
        own = generator.generator if isinstance(generator, Stream) else generator
        with torch.random.fork_rng(devices=cuda_in_use()):
            torch.manual_seed(0 if own is None else own.initial_seed())
            return super().run(*args, generator=own, **named)

    def steps_for(self, threat: Threat) -> int:
        self.accepted(threat)
        return int(getattr(self, "iterations", 0) or getattr(self, "queries", 0))

    @abstractmethod
    def searcher(self, suite: AutoAttack, classes: int) -> Any:
        """The package's attack object, set up for this many classes; its ``perturb(x, y)`` returns images, those it
        could not fool unchanged."""

    def search(self, model: Model, x: Tensor, y: Tensor, groups: list[Group], noise: Tensor) -> AttackResult:
        if x.dtype != torch.float32:
            raise UserError(f"{self.kind} works on float32 images, not {x.dtype}: give x.float()")
        logits = logits_of(model, x)
        robust = logits.argmax(1) == y
        images = x.clone()
        seen, watched = _ZeroGradients(), _Watched(model)
        for threat, rows, _ in groups:
            if threat.eps == 0:
                continue
            settings = {"norm": threat.norm, "eps": threat.eps, "seed": torch.initial_seed(), "device": x.device}
            suite = AutoAttack(watched, **settings, version="custom", attacks=[])
            suite.verbose = False  # or the next line, which the constructor would else call, writes to the log
            suite._set_version("standard")
            suite.apgd.logger = suite.apgd_targeted.logger = seen
            found = self.searcher(suite, logits.shape[1]).perturb(x[rows], y[rows])
            fooled = (found != x[rows]).flatten(1).any(dim=1)
            outside = ~threat.contains(found, x[rows])
            robust[rows] &= ~fooled
            if bool(outside.any()):  # by rounding: pyautoattack projects in float32
                found[outside] = threat.project(found[outside], x[rows][outside])
                robust[rows] = torch.where(outside, watched(found).argmax(1) == y[rows], robust[rows])
            images[rows] = found
        if seen.most:
            message = "their gradient was zero, so a gradient-based attack cannot move them; gradients may be masked"
            warnings.warn(AttackWarning("zero-gradients", message, seen.most), stacklevel=2)
        if broken := int(watched.most):
            message = "their gradient was NaN, which counts as zero here, so the attack did not move them as it should"
            warnings.warn(AttackWarning("nan-gradients", message, broken), stacklevel=2)
        return AttackResult(images, images, robust, torch.full_like(y, torch.nan, dtype=torch.float32))


class APGDCE(AutoAttackPart):
    """Auto-PGD on the cross-entropy, with random starts."""

    kind = "apgd-ce"
    iterations: int = Field(default=100, ge=5)
    """AutoAttack's is 100."""
    restarts: int | None = Field(default=None, ge=1)
    """None is AutoAttack's: 1, in L1 5."""

    def searcher(self, suite: AutoAttack, classes: int) -> Any:
        set_iterations(suite.apgd, self.iterations)
        suite.apgd.n_restarts = self.restarts or suite.apgd.n_restarts
        suite.apgd.loss = "ce"
        return suite.apgd


class APGDT(AutoAttackPart):
    """Auto-PGD on the targeted DLR loss, towards one likely class after the other."""

    kind = "apgd-t"
    iterations: int = Field(default=100, ge=5)
    """For each target; AutoAttack's is 100."""
    targets: int | None = Field(default=None, ge=1)
    """At most one less than the model's classes; None is AutoAttack's: 9, in L1 5."""

    def searcher(self, suite: AutoAttack, classes: int) -> Any:
        if classes < MIN_CLASSES_DLR:
            raise UserError(
                f"{self.kind} needs at least {MIN_CLASSES_DLR} classes for its loss, this model has {classes}: "
                "use fab-t instead (the suites do)"
            )
        set_iterations(suite.apgd_targeted, self.iterations)
        suite.apgd_targeted.n_target_classes = min(self.targets or suite.apgd_targeted.n_target_classes, classes - 1)
        return suite.apgd_targeted


class FABT(AutoAttackPart):
    """FAB, the smallest perturbation across the linearised boundary to one likely class after the other."""

    kind = "fab-t"
    iterations: int = Field(default=100, ge=1)
    """For each target; AutoAttack's is 100."""
    targets: int | None = Field(default=None, ge=1)
    """At most one less than the model's classes; None is AutoAttack's 9."""

    def searcher(self, suite: AutoAttack, classes: int) -> Any:
        suite.fab.targeted = True
        suite.fab.n_iter = self.iterations
        suite.fab.n_target_classes = min(self.targets or suite.fab.n_target_classes, classes - 1)
        suite.fab.get_diff_logits_grads_batch_targeted = partial(_differences, suite.fab.predict)
        return suite.fab


class Square(AutoAttackPart):
    """Square Attack: random search with square patches, without gradients."""

    kind = "square"
    differentiates: ClassVar[bool] = False
    queries: int = Field(default=5000, ge=1)
    """Forward passes for each image; AutoAttack's is 5000."""

    def searcher(self, suite: AutoAttack, classes: int) -> Any:
        suite.square.n_queries = self.queries
        return suite.square

    def search(self, model: Model, x: Tensor, y: Tensor, groups: list[Group], noise: Tensor) -> AttackResult:
        height, width = x.shape[2:]
        side = height // 5
        first = (height - 5 * side) // 2
        fits = side > 0 and all(first + size // side * side <= size or side == 1 for size in (height, width))
        if not fits and any(group.threat.norm != "Linf" for group in groups):
            raise UserError(
                f"Square's first windows in L1 and L2 do not fit into images of {height}x{width} (a defect of "
                "pyautoattack): give another size (model.img_size, --img-size), or take the suite apgd"
            )
        return super().search(model, x, y, groups, noise)


def standard_runs(kind: str, threat: LpBall) -> int:
    """Restarts of APGD-CE, and target classes of APGD-T and FAB-T, in AutoAttack's standard version."""
    if threat.norm == "L1" and kind != FABT.kind:
        return 5
    return 1 if kind == APGDCE.kind else 9


def _differences(model: Model, images: Tensor, labels: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """z_target - z_label (B, 1) and its input gradient (B, 1, C, H, W), and no gradient to anything else: FAB's own
    calls ``backward``, which reaches the parameters of models that cannot be frozen."""
    each = torch.arange(len(images), device=images.device)
    leaf = images.detach().clone().requires_grad_()
    with torch.enable_grad():
        logits = model(leaf)
        apart = logits[each, targets] - logits[each, labels]
        (gradient,) = torch.autograd.grad(apart.sum(), leaf)
    return apart.detach().unsqueeze(1), gradient.unsqueeze(1)


def set_iterations(apgd: Any, iterations: int) -> None:
    """What APGD's constructor derives from the number of iterations, which AutoAttack's constructor fixes at 100."""
    apgd.n_iter = apgd.n_iter_orig = iterations
    apgd.n_iter_2 = max(int(0.22 * iterations), 1)
    apgd.n_iter_min = max(int(0.06 * iterations), 1)
    apgd.size_decr = max(int(0.03 * iterations), 1)


class _ZeroGradients:
    """Stands where pyautoattack expects a logger; records the largest number of points it found without gradient."""

    most = 0

    def warning(self, message: str) -> None:
        count = re.search(r"(\d+) points with zero gradient", message)
        self.most = max(self.most, int(count[1]) if count else 1)


class _Watched:
    """The model; records the largest number of examples of a batch whose input gradient was NaN, on their device."""

    def __init__(self, model: Model) -> None:
        self.model, self.most = model, torch.zeros((), dtype=torch.int64)

    def __call__(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            x.register_hook(self._count)  # type: ignore[no-untyped-call]
        return logits_of(self.model, x).to(x.dtype)  # pyautoattack stores losses and gradients in one type

    def _count(self, gradient: Tensor) -> None:
        broken = gradient.isnan().flatten(1).any(dim=1).sum()
        self.most = torch.maximum(self.most.to(broken.device), broken)


@contextmanager
def collected(into: list[AttackWarning]) -> Iterator[None]:
    """Inside, every :class:`AttackWarning` goes to the list; all other warnings go where they would have gone."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", AttackWarning)
        show: Callable[..., None] = warnings.showwarning

        def sort(message: Warning | str, *details: Any, **named: Any) -> None:
            if isinstance(message, AttackWarning):
                into.append(message)
            else:
                show(message, *details, **named)

        warnings.showwarning = sort
        yield
