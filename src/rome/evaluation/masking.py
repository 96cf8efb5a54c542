"""Checks for signs of masked gradients, which make gradient-based attacks fail although adversarial images exist.

The signs are from Athalye et al., "Obfuscated gradients give a false sense of security" (ICML 2018, section 3.1) and
Carlini et al., "On evaluating adversarial robustness" (2019): black-box attacks beat white-box ones (checked while
Square runs, in :mod:`rome.evaluation.runner`), more iterations do not help, and an unbounded attack does not reach 0%.
Zero gradients are looked for, too. A check records what it measured and whether it was raised; it proves nothing in
either direction.
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
"""Fewest examples of an evaluation for which the checks run by default."""
SAMPLE, SHARE = 64, 16
"""The checks use at most 64 of the correctly classified examples, and at most a 16th of all examples. They cost 131
gradients for each example used, and APGD at least 100 for each of all examples: less than a tenth of APGD's cost."""
STEPS = (10, 100)
GRADIENTS = 131 / SHARE
"""Gradients that the checks cost per example of the evaluation."""
WIDE, WIDE_STEPS = LpBall(norm="Linf", eps=1), 20
"""A ball that contains the whole box [0, 1] around every image."""
ZERO_SHARE = 0.05
LEFT = 0.01
P = 0.05


def worth_checking(cases: Sequence[Case], n: int) -> bool:
    """Whether the checks run by default.

    They do with at least :data:`FEWEST` examples, if the suite runs AutoAttack's APGD-CE, with which results are
    published, or if its own gradients cost at least ten times as much as the checks.
    """
    tried = [case.threat.resolve_attack(attack) for case in cases if not case.on_all for attack in case.attacks]
    published = any(isinstance(attack, APGDCE) for attack, _ in tried)
    gradients = sum(attack.steps_for(threat) for attack, threat in tried if attack.needs_gradients)
    return n >= FEWEST and (published or gradients >= 10 * GRADIENTS)


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
        cases: the evaluation's cases; the ball of one of them is used.
        clean: bool (n,), which examples are classified correctly.
        batch_size: examples per batch.

    Returns:
        For each check its name under ``check``, the number of ``examples`` used, the measured ``values`` (shares, and
        a p-value), whether it was ``raised``, and a ``message``.
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

    zero = float(every(lambda x, y: _useless(_cross_entropy_gradient(model, x, y))).mean())
    message = f"the input gradient of the loss is exactly zero or not finite for {counted(zero)}"
    checks = [found("zero-input-gradients", {"share": zero}, zero > ZERO_SHARE, message)]
    ball = _ball(cases)
    if ball is not None:
        few, many = (robust(ball, steps) for steps in STEPS)
        only_many, only_few = int((many & ~few).sum()), int((few & ~many).sum())
        p = mcnemar(only_many, only_few)
        values = {str(STEPS[0]): float(few.mean()), str(STEPS[1]): float(many.mean()), "p": p}
        message = (
            f"APGD under {ball.name} leaves {counted(few.mean())} correct with {STEPS[0]} iterations "
            f"and {counted(many.mean())} with {STEPS[1]}"
        )
        checks.append(found("more-steps", values, only_many > only_few and p < P, message))
    left = float(robust(WIDE, WIDE_STEPS).mean())
    message = f"unbounded APGD (Linf, eps 1, {WIDE_STEPS} iterations) leaves {counted(left)} examples correct"
    checks.append(found("unbounded-attack", {"share": left}, left > LEFT, message))
    return checks


def _robust(model: Model, x: Tensor, y: Tensor, threat: LpBall, steps: int) -> Tensor:
    """Which examples stay correct under APGD, bool (B,); those with gradients that are not finite count as correct."""
    try:
        return APGD(steps=steps).run(model, x, y, threat).robust
    except FloatingPointError:
        if len(x) == 1:
            return torch.ones_like(y, dtype=torch.bool)
        return torch.cat([_robust(model, x[i : i + 1], y[i : i + 1], threat, steps) for i in range(len(x))])


def _cross_entropy_gradient(model: Model, x: Tensor, y: Tensor) -> Tensor:
    """The gradient that attacks on the cross-entropy get in float32, which is also zero for very confident outputs."""
    odds, _, gradient = loss_and_gradient(model, x, y)
    return gradient * odds.sigmoid().view(-1, 1, 1, 1)


def _useless(gradient: Tensor) -> Tensor:
    """Which gradients are of no use to an attack, being zero everywhere or not finite somewhere: bool (B,)."""
    flat = gradient.flatten(1)
    return (flat == 0).all(dim=1) | ~flat.isfinite().all(dim=1)


def as_warnings(checks: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The checks that were raised, as entries of :attr:`rome.evaluation.result.Report.warnings`."""
    advice = "gradients may be masked, and the true robustness lower"
    return [
        warning(check["check"], None, None, check["examples"], f"{check['message']}: {advice}")
        for check in checks
        if check["raised"]
    ]


def _ball(cases: Sequence[Case]) -> LpBall | None:
    """The first Linf ball of the cases, otherwise their first Lp ball; None if they have no ball."""
    balls = [case.threat for case in cases if isinstance(case.threat, LpBall) and case.threat.eps > 0]
    return next((ball for ball in balls if ball.norm == "Linf"), balls[0] if balls else None)
