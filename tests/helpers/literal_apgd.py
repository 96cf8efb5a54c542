"""APGD as its description reads, to compare with."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


def checkpoints(n: int) -> list[int]:
    """The iterations (from 1) after which APGD in L2 and Linf looks at its progress."""
    period, at = max(int(0.22 * n), 1), []
    while (at[-1] if at else 0) + period <= n:
        at.append((at[-1] if at else 0) + period)
        period = max(period - max(int(0.03 * n), 1), max(int(0.06 * n), 1))
    return at


TIE = 1e-9
"""Relative gap of two float64 numbers below which rounding may decide which is larger."""


def literal_apgd(
    model: nn.Module, x: np.ndarray, y: int, norm: str, eps: float, n: int
) -> tuple[np.ndarray, float, bool, np.ndarray, bool]:
    """APGD for training on one example, written from its description with loops and no regard for speed; in L1 with
    the three changes that :class:`rome.attacks.lp.apgd._Sparse` names.

    Returns the best image, its loss, whether every iterate was classified correctly, the last that was not, and whether
    all this is clear: no comparison of losses, and in Linf no sign of a gradient, hung on rounding.
    """

    def look(point: np.ndarray) -> tuple[float, bool, np.ndarray]:
        image = torch.tensor(point)[None].requires_grad_()
        logits = model(image)
        loss = F.cross_entropy(logits, torch.tensor([y]))
        (gradient,) = torch.autograd.grad(loss, image)
        return loss.item(), logits.argmax().item() == y, gradient[0].numpy()

    def project(point: np.ndarray) -> np.ndarray:
        delta = point - x
        if norm == "Linf":
            delta = np.clip(delta, -eps, eps)
        elif norm == "L2":
            delta = delta * min(1, eps / max(np.linalg.norm(delta), 1e-300))
        else:
            size, room = np.abs(delta), np.where(delta > 0, 1 - x, x)
            kept = np.minimum(size, room)
            if kept.sum() > eps:
                low, high = 0.0, size.max()
                for _ in range(200):
                    t = (low + high) / 2
                    kept = np.minimum(np.maximum(size - t, 0), room)
                    low, high = (t, high) if kept.sum() > eps else (low, t)
                kept = np.minimum(np.maximum(size - high, 0), room)
            delta = np.sign(delta) * kept
        return np.clip(x + delta, 0, 1)

    d = x.size
    loss, correct, gradient = look(x)
    losses, point, previous, clear = [loss], x, x, True
    best, best_loss, best_gradient, robust, wrong = x, loss, gradient, correct, x
    eta, moving, count_before = (eps if norm == "L1" else 2 * eps), math.ceil(0.05 * d), d
    halved_before, best_before, checked = True, loss, 0
    for i in range(1, n + 1):
        if norm == "L1":
            stuck = (point == x) & (((x == 0) & (gradient < 0)) | ((x == 1) & (gradient > 0)))
            gradient = np.where(stuck, 0, gradient)
            threshold = np.sort(np.abs(gradient).ravel())[d - moving]
            signs = np.sign(gradient) * (np.abs(gradient) >= threshold)
            new = project(point + eta * signs / (np.abs(signs).sum() + 1e-10))
        else:
            direction = np.sign(gradient) if norm == "Linf" else gradient / np.linalg.norm(gradient)
            z, a = project(point + eta * direction), (0.75 if i > 1 else 1.0)
            new = project(point + a * (z - point) + (1 - a) * (point - previous))
        if norm == "Linf":
            clear &= bool(np.abs(gradient).min() > TIE * np.abs(gradient).max())
        previous, point = point, new
        loss, correct, gradient = look(point)
        clear &= all(loss == other or abs(loss - other) > TIE * abs(loss) for other in (losses[-1], best_loss))
        losses.append(loss)
        if loss > best_loss:
            best, best_loss, best_gradient = point, loss, gradient
        if not correct:
            robust, wrong = False, point
        restart = False
        if norm == "L1" and i % max(int(0.04 * n), 1) == 0:
            count = int((np.abs(best - x) > 1e-6 * eps).sum())
            restart = count / count_before < 0.95 if count_before else False
            moving = max(min(math.ceil(count / 1.5), count - 1), 1)
            eta, count_before = (eps if restart else max(eta / 1.5, eps / 10)), count
        elif norm != "L1" and i in checkpoints(n):
            window = range(checked + 1, i + 1)
            # the first loss after the start counts as a rise: the published code compares it with a zero
            rises = sum(losses[t] > (losses[t - 1] if t > 1 else 0.0) for t in window)
            restart = rises <= 0.75 * len(window) or (not halved_before and best_before >= best_loss)
            eta = eta / 2 if restart else eta
            halved_before, best_before, checked = restart, best_loss, i
        if restart:
            point, gradient = best, best_gradient
    return best, best_loss, robust, best if robust else wrong, clear


def project_l1(delta: np.ndarray, eps: float) -> np.ndarray:
    """Duchi et al. 2008 on one vector: the right theta, see :func:`foolbox_pgd`."""
    size = np.abs(delta)
    if size.sum() <= eps:
        return delta
    falling = -np.sort(-size)
    theta = (falling.cumsum() - eps) / np.arange(1, len(size) + 1)
    return np.sign(delta) * np.maximum(size - theta[np.nonzero(falling > theta)[0][-1]], 0)
