"""The four attacks of AutoAttack's standard version, each an :class:`Attack` of its own.

Croce and Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free attacks"
(ICML 2020), "Mind the box: l1-APGD" (ICML 2021), "Minimally distorted adversarial examples" (FAB, ICML 2020);
Andriushchenko et al., "Square Attack" (ECCV 2020). The searches are those of ``pyautoattack``, configured as its
version ``standard``, the only one that applies the settings for L1: larger radii first, 5 restarts, 5 targets.

Only their surroundings differ: nothing is logged, ``sys.settrace`` and the global random state are left alone, inputs
may be non-contiguous, the number of targets is limited by the number of classes, and a warning that the package would
log becomes an :class:`AttackWarning`. Two of the package's helpers are replaced by faster ones with the same results:
the projection onto an L1 ball, which waited for the device 13 times or more, and Square's windows, which were computed
for every query.
"""

from __future__ import annotations

import re
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from types import FunctionType, MethodType
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pyautoattack import AutoAttack
from pydantic import Field
from torch import Tensor

from rome.attacks.base import Attack, AttackResult, Group
from rome.attacks.engine import Model, Plan, Search, logits_of
from rome.core.errors import UserError
from rome.core.randomness import Stream, cuda_in_use
from rome.threats import LpBall, Threat

MIN_CLASSES_DLR = 4
"""Fewest classes for the targeted DLR loss: it divides by z_(1) - (z_(3) + z_(4)) / 2 and so needs four logits."""


class AttackWarning(UserWarning):
    """A sign that an attack may overestimate robustness. ``check`` names the symptom, seen on ``examples`` examples."""

    def __init__(self, check: str, message: str, examples: int) -> None:
        super().__init__(f"{examples} examples: {message}")
        self.check, self.message, self.examples = check, message, examples


class AutoAttackPart(Attack):
    """One attack of AutoAttack's standard version.

    The generator's initial seed determines all random numbers, so that ``torch.Generator().manual_seed(0)`` gives the
    results of ``AutoAttack(seed=0)`` on the same batch. Images must be float32. An image that is outside the ball
    because of rounding is projected back.
    """

    not_for_training: ClassVar[str] = "is made for evaluation; pgd and apgd search the same balls in training"
    starts_at_random: ClassVar[bool] = False
    """pyautoattack draws its own random numbers."""

    def plan(self, *args: Any, generator: torch.Generator | Stream | None = None, **named: Any) -> Plan:
        own = generator.generator if isinstance(generator, Stream) else generator
        plan = super().plan(*args, generator=own, **named)
        seed = 0 if own is None else own.initial_seed()

        def seeded(*tensors: Tensor) -> tuple[Any, Tensor]:
            with torch.random.fork_rng(devices=cuda_in_use()):
                torch.manual_seed(seed)
                return plan.search.function(*tensors)

        return replace(plan, search=Search(None, seeded, plan.search.tensors))

    def steps_for(self, threat: Threat) -> int:
        self.accepted(threat)
        return int(getattr(self, "iterations", 0) or getattr(self, "queries", 0))

    @abstractmethod
    def searcher(self, suite: AutoAttack, classes: int) -> Any:
        """The package's attack object, configured for this many classes. Its ``perturb(x, y)`` returns images,
        unchanged where the attack failed."""

    def search(self, model: Model, x: Tensor, y: Tensor, groups: list[Group], noise: Tensor) -> AttackResult:
        if x.dtype != torch.float32:
            raise UserError(f"{self.kind} works on float32 images, not {x.dtype}: give x.float()")
        logits = logits_of(model, x)
        robust = logits.argmax(1) == y
        images = x.clone()
        zeros, counting = _ZeroGradientCounter(), _NaNCounter(model)
        for threat, rows, _ in groups:
            if threat.eps == 0:
                continue
            settings = {"norm": threat.norm, "eps": threat.eps, "seed": torch.initial_seed(), "device": x.device}
            suite = AutoAttack(counting, **settings, version="custom", attacks=[])
            suite.verbose = False  # otherwise the next line, which the constructor runs too, would write to the log
            suite._set_version("standard")
            suite.apgd.logger = suite.apgd_targeted.logger = zeros
            for own, names in (
                (suite.apgd, ("attack_single_run", "decr_eps_pgd")),
                (suite.apgd_targeted, ("attack_single_run", "decr_eps_pgd")),
                (suite.square, ("attack_single_run",)),
            ):
                for name in names:
                    setattr(own, name, with_globals(getattr(own, name), L1_projection=l1_projection))
            suite.square.eta_rectangles = cache(suite.square.eta_rectangles)
            found = self.searcher(suite, logits.shape[1]).perturb(x[rows], y[rows])
            fooled = (found != x[rows]).flatten(1).any(dim=1)
            outside = ~threat.contains(found, x[rows])
            robust[rows] &= ~fooled
            if bool(outside.any()):  # because of rounding: pyautoattack projects in float32
                found[outside] = threat.project(found[outside], x[rows][outside])
                robust[rows] = torch.where(outside, counting(found).argmax(1) == y[rows], robust[rows])
            images[rows] = found
        if zeros.most:
            message = "their gradient was zero, so a gradient-based attack cannot move them; gradients may be masked"
            warnings.warn(AttackWarning("zero-gradients", message, zeros.most), stacklevel=2)
        if broken := int(counting.most):
            message = "their gradient was NaN, which counts as zero here, so the attack could not move them properly"
            warnings.warn(AttackWarning("nan-gradients", message, broken), stacklevel=2)
        return AttackResult(images, images, robust, torch.full_like(y, torch.nan, dtype=torch.float32))


class APGDCE(AutoAttackPart):
    """Auto-PGD on the cross-entropy, with random starts."""

    kind = "apgd-ce"
    iterations: int = Field(default=100, ge=5)
    """AutoAttack uses 100."""
    restarts: int | None = Field(default=None, ge=1)
    """None: as in AutoAttack, 5 in L1, otherwise 1."""

    def searcher(self, suite: AutoAttack, classes: int) -> Any:
        set_iterations(suite.apgd, self.iterations)
        suite.apgd.n_restarts = self.restarts or suite.apgd.n_restarts
        suite.apgd.loss = "ce"
        return suite.apgd


class APGDT(AutoAttackPart):
    """Auto-PGD on the targeted DLR loss, towards the most likely wrong classes in turn."""

    kind = "apgd-t"
    iterations: int = Field(default=100, ge=5)
    """For each target class; AutoAttack uses 100."""
    targets: int | None = Field(default=None, ge=1)
    """Number of target classes, at most the model's classes minus 1; None: as in AutoAttack, 5 in L1, otherwise 9."""

    def searcher(self, suite: AutoAttack, classes: int) -> Any:
        if classes < MIN_CLASSES_DLR:
            raise UserError(
                f"{self.kind} needs at least {MIN_CLASSES_DLR} classes for its loss, and this model has {classes}: "
                "use fab-t instead (the suites do)"
            )
        set_iterations(suite.apgd_targeted, self.iterations)
        suite.apgd_targeted.n_target_classes = min(self.targets or suite.apgd_targeted.n_target_classes, classes - 1)
        return suite.apgd_targeted


class FABT(AutoAttackPart):
    """FAB: the smallest perturbation across the linearised boundaries to the most likely wrong classes in turn."""

    kind = "fab-t"
    iterations: int = Field(default=100, ge=1)
    """For each target class; AutoAttack uses 100."""
    targets: int | None = Field(default=None, ge=1)
    """Number of target classes, at most the model's classes minus 1; None: as in AutoAttack, 9."""

    def searcher(self, suite: AutoAttack, classes: int) -> Any:
        suite.fab.targeted = True
        suite.fab.n_iter = self.iterations
        suite.fab.n_target_classes = min(self.targets or suite.fab.n_target_classes, classes - 1)
        suite.fab.get_diff_logits_grads_batch_targeted = partial(_differences, suite.fab.predict)
        return suite.fab


class Square(AutoAttackPart):
    """Square Attack: random search with square patches, without gradients."""

    kind = "square"
    needs_gradients: ClassVar[bool] = False
    queries: int = Field(default=5000, ge=1)
    """Forward passes for each image; AutoAttack uses 5000."""

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
                "pyautoattack): use a different size (model.img_size, --img-size) or the suite apgd"
            )
        return super().search(model, x, y, groups, noise)


def l1_projection(x: Tensor, y: Tensor, eps: float) -> Tensor:
    """The step from a perturbation of images onto the L1 ball inside the box (Croce and Hein 2021, Prop. 2.1).

    Equals ``pyautoattack.autopgd_base.L1_projection`` to the last bit where sums over sorted numbers are sequential, as
    on a CPU. That function searches for the active breakpoint by bisection on the host; here it is counted.

    Args:
        x: images (B, ...) in [0, 1].
        y: their perturbations, of the same shape.
        eps: radius of the ball.

    Returns:
        d, such that y + d has an L1 norm of at most eps and x + y + d is in [0, 1].
    """
    shape, x, y = x.shape, x.float().flatten(1), y.float().flatten(1)
    size = y.abs()
    # how much each coordinate must shrink at least, for the box; it can shrink by its size
    least = -torch.minimum(1 - x - y, x + y).clamp_(max=0)
    breakpoints, order = torch.cat([least, size], dim=1).sort(dim=1)
    following = F.pad(breakpoints[:, 1:], (0, 1))
    shrinking = (2 * (order < y.shape[1]).float() - 1).cumsum_(dim=1)
    start, budget = least.sum(dim=1, keepdim=True), eps - size.sum(dim=1, keepdim=True)
    shrunk = start + ((following - breakpoints) * shrinking).cumsum_(dim=1)
    at = (shrunk[:, 1:-1] + budget < 0).sum(dim=1, keepdim=True)
    amount = (-shrunk.gather(1, at) - budget) / shrinking.gather(1, at + 1) + following.gather(1, at)
    shrink = torch.where(start + budget < 0, torch.minimum(torch.maximum(least, amount), size), least)
    return (y.sign() * -shrink).view(shape)


def with_globals(method: Any, **names: Any) -> MethodType:
    """A bound method of an object in which these global names have other values."""
    function = method.__func__
    changed = FunctionType(
        function.__code__, {**function.__globals__, **names}, function.__name__, function.__defaults__
    )
    return MethodType(changed, method.__self__)


def standard_runs(kind: str, threat: LpBall) -> int:
    """Number of restarts of APGD-CE or target classes of APGD-T and FAB-T in AutoAttack's standard version."""
    if threat.norm == "L1" and kind != FABT.kind:
        return 5
    return 1 if kind == APGDCE.kind else 9


def _differences(model: Model, images: Tensor, labels: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return z_target - z_label (B, 1) and its input gradient (B, 1, C, H, W) without computing any other gradient.

    FAB's own function calls ``backward``, which reaches the parameters of models that cannot be frozen.
    """
    each = torch.arange(len(images), device=images.device)
    leaf = images.detach().clone().requires_grad_()
    with torch.enable_grad():
        logits = model(leaf)
        apart = logits[each, targets] - logits[each, labels]
        (gradient,) = torch.autograd.grad(apart.sum(), leaf)
    return apart.detach().unsqueeze(1), gradient.unsqueeze(1)


def set_iterations(apgd: Any, iterations: int) -> None:
    """Set the number of iterations and the values that APGD's constructor derives from it; AutoAttack passes 100."""
    apgd.n_iter = apgd.n_iter_orig = iterations
    apgd.n_iter_2 = max(int(0.22 * iterations), 1)
    apgd.n_iter_min = max(int(0.06 * iterations), 1)
    apgd.size_decr = max(int(0.03 * iterations), 1)


class _ZeroGradientCounter:
    """Stand-in for pyautoattack's logger; records the largest number of points reported to have zero gradient."""

    most = 0

    def warning(self, message: str) -> None:
        count = re.search(r"(\d+) points with zero gradient", message)
        self.most = max(self.most, int(count[1]) if count else 1)


class _NaNCounter:
    """The model; also records the largest number of examples in a batch with a NaN input gradient, on their device."""

    def __init__(self, model: Model) -> None:
        self.model, self.most = model, torch.zeros((), dtype=torch.int64)

    def __call__(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            x.register_hook(self._count)  # type: ignore[no-untyped-call]
        return logits_of(self.model, x).to(x.dtype)  # pyautoattack needs losses and gradients of one dtype

    def _count(self, gradient: Tensor) -> None:
        broken = gradient.isnan().flatten(1).any(dim=1).sum()
        self.most = torch.maximum(self.most.to(broken.device), broken)


@contextmanager
def collected(into: list[AttackWarning]) -> Iterator[None]:
    """Append every :class:`AttackWarning` raised inside the context to a list; leave all other warnings alone."""
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
