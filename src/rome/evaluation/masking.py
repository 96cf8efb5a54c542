"""Checks for masked gradients, with which gradient-based attacks fail although adversarial images exist.

The signs are those of Athalye et al., "Obfuscated gradients give a false sense of security" (ICML 2018, section 3.1)
and Carlini et al., "On evaluating adversarial robustness" (2019): black-box attacks beat white-box ones (seen while
Square runs), more iterations do not help, and an unbounded attack does not reach 0%. Each check reports its
measurements and whether it was raised; neither outcome is a proof.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rome.attacks.engine import Model, loss_and_gradient
from rome.attacks.lp.apgd import APGD
from rome.attacks.lp.autoattack import APGDCE
from rome.attacks.suites.base import Case
from rome.evaluation.batch import Examples, warning
from rome.evaluation.memory import Halving
from rome.evaluation.statistics import mcnemar
from rome.threats import LpBall

FEWEST = 100
"""Least number of examples with which the checks are made by default."""
SAMPLE, SHARE = 64, 16
"""The checks use up to 64 correctly classified examples, but at most a 16th of all examples. They need 131 gradients
for each of them, and APGD at least 100 for every example, so the checks cost less than a tenth of APGD."""
STEPS = (10, 100)
GRADIENTS = 131 / SHARE
"""Most gradients that the checks need, per example of the evaluation."""
WIDE, WIDE_STEPS = LpBall(norm="Linf", eps=1), 20
"""A ball that contains the whole box [0, 1] around every image, and the iterations of the attack in it."""
ZERO_SHARE = 0.05
LEFT = 0.01
P = 0.05


def worth_checking(cases: Sequence[Case], n: int) -> bool:
    """Whether the checks are made by default: with enough examples, for suites with APGD-CE (as published results use),
    and for others whose gradients cost ten times as much as the checks'."""
    tried = [case.threat.searched_by(attack) for case in cases if not case.on_all for attack in case.attacks]
    if any(isinstance(attack, APGDCE) for attack, _ in tried):
        return n >= FEWEST
    return n >= FEWEST and sum(a.steps_for(threat) for a, threat in tried if a.differentiates) >= 10 * GRADIENTS


def run_checks(
    model: Model,
    examples: Examples,
    cases: Sequence[Case],
    clean: np.ndarray,
    batch_size: int = SAMPLE,
    halving: Halving | None = None,
) -> list[dict[str, Any]]:
    """Run the checks on a frozen model.

    Args:
        cases: the evaluation's cases; the Lp ball of one of them is used.
        clean: bool (n,): examples classified correctly when clean.
        batch_size: examples per batch.

    Returns:
        For each check its name (``check``), the number of ``examples`` used, the measured ``values``, whether it was
        ``raised``, and a ``message``.
    """
    part = np.flatnonzero(clean)[: min(SAMPLE, max(len(clean) // SHARE, 1))]
    if not len(part):
        return []
    halving = halving or Halving(allowed=False)
    parts = [part[i : i + batch_size] for i in range(0, len(part), batch_size)]

    def every(measure: Callable[[Tensor, Tensor], Tensor]) -> np.ndarray:
        def work(some: np.ndarray) -> np.ndarray:
            return measure(*examples.batch(some)).cpu().numpy()

        return np.concatenate([measured for some in parts for _, measured in halving.run("checks", some, work)])

    def robust(threat: LpBall, steps: int) -> np.ndarray:
        return every(lambda x, y: _robust(model, x, y, threat, steps))

    def found(check: str, values: dict[str, float], raised: bool, message: str) -> dict[str, Any]:
        return {"check": check, "examples": len(part), "values": values, "raised": raised, "message": message}

    def counted(share: float) -> str:
        return f"{round(share * len(part))} of {len(part)}"

    zero = float(every(lambda x, y: _unusable_gradient(_cross_entropy_gradient(model, x, y))).mean())
    message = f"the input gradient of the loss is exactly zero or not finite for {counted(zero)}"
    checks = [found("zero-input-gradients", {"share": zero}, zero > ZERO_SHARE, message)]
    ball = _main_ball(cases)
    if ball is not None:
        few, many = (robust(ball, steps) for steps in STEPS)
        only_many, only_few = int((many & ~few).sum()), int((few & ~many).sum())
        p = mcnemar(only_many, only_few)
        values = {str(STEPS[0]): float(few.mean()), str(STEPS[1]): float(many.mean()), "p": p}
        message = (
            f"APGD under {ball.name} leaves {counted(few.mean())} right with {STEPS[0]} iterations "
            f"and {counted(many.mean())} with {STEPS[1]}"
        )
        checks.append(found("more-steps", values, only_many > only_few and p < P, message))
    left = float(robust(WIDE, WIDE_STEPS).mean())
    message = (
        f"APGD that may change the image at will (Linf, eps 1, {WIDE_STEPS} iterations) leaves {counted(left)} right"
    )
    checks.append(found("unbounded-attack", {"share": left}, left > LEFT, message))
    return checks


def _robust(model: Model, x: Tensor, y: Tensor, threat: LpBall, steps: int) -> Tensor:
    """Return bool (B,): examples still classified correctly under APGD, including those with non-finite gradients."""
    try:
        return APGD(steps=steps).run(model, x, y, threat).robust
    except FloatingPointError:
        if len(x) == 1:
            return torch.ones_like(y, dtype=torch.bool)
        return torch.cat([_robust(model, x[i : i + 1], y[i : i + 1], threat, steps) for i in range(len(x))])


def _cross_entropy_gradient(model: Model, x: Tensor, y: Tensor) -> Tensor:
    """Gradient of the cross-entropy as attacks see it in float32, where it vanishes for very confident models."""
    odds, _, gradient = loss_and_gradient(model, x, y)
    return gradient * odds.sigmoid().view(-1, 1, 1, 1)


def _unusable_gradient(gradient: Tensor) -> Tensor:
    """Return bool (B,): examples whose gradient is all zero or somewhere not finite."""
    flat = gradient.flatten(1)
    return (flat == 0).all(dim=1) | ~flat.isfinite().all(dim=1)


def as_warnings(checks: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the raised checks as entries of :attr:`rome.evaluation.result.Report.warnings`."""
    advice = "gradients may be masked, the true robustness lower"
    return [
        warning(check["check"], None, None, check["examples"], f"{check['message']}: {advice}")
        for check in checks
        if check["raised"]
    ]


def _main_ball(cases: Sequence[Case]) -> LpBall | None:
    """The Linf ball among the cases' threats if there is one, otherwise the first Lp ball; None without Lp balls."""
    balls = [case.threat for case in cases if isinstance(case.threat, LpBall) and case.threat.eps > 0]
    return next((ball for ball in balls if ball.norm == "Linf"), balls[0] if balls else None)
