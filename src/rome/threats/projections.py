"""Geometry of Lp balls for each row of tensors (B, D): exact Euclidean projections, and directions of steepest ascent.

Nothing here waits for the device: the number of operations does not depend on the values.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def project_linf(delta: Tensor, eps: float) -> Tensor:
    """Nearest point with max_i |delta_i| <= eps. (B, D) -> (B, D)."""
    return torch.clamp(delta, -eps, eps)


def project_l2(delta: Tensor, eps: float) -> Tensor:
    """Nearest point with ||delta||_2 <= eps: rows that are too long are rescaled. (B, D) -> (B, D)."""
    length = torch.linalg.vector_norm(delta, dim=1, keepdim=True)
    return delta * (eps / length.clamp(min=1e-30)).clamp(max=1.0)


def project_l1(delta: Tensor, eps: float, lower: Tensor | None = None, upper: Tensor | None = None) -> Tensor:
    """Nearest point with ||delta||_1 <= eps and lower <= delta <= upper. (B, D) -> (B, D).

    The solution is sign(y_i) min(max(|y_i| - t, 0), b_i), where b_i is the room the box leaves in the direction of
    y_i and t = 0 if that is already inside the ball, otherwise the root of a decreasing piecewise linear function of t
    (Croce and Hein, "Mind the box", ICML 2021, prop. 2.1). Its 2D breakpoints are sorted, its value at all of them is
    one cumulative sum, and the root is on the last piece that starts above eps. Sums are computed in float64.

    Args:
        delta: the point to project.
        eps: radius, >= 0.
        lower, upper: (B, D) bounds with lower <= 0 <= upper; None for no box.
    """
    size = delta.abs()
    wide = torch.float32 if delta.device.type == "mps" else torch.float64
    if lower is None or upper is None:
        room = size
        breaks, order = size.sort(dim=1)
        turns = -torch.ones_like(size)
        at_zero = size.shape[1]
    else:
        room = torch.minimum(torch.where(delta > 0, upper, -lower).clamp_(min=0), size)
        # a breakpoint is a difference: in float32 its error would be |y| 6e-8, which is large if the room is small
        breaks, order = torch.cat([size.to(wide) - room, size.to(wide)], dim=1).sort(dim=1)
        turns = torch.where(order < size.shape[1], 1.0, -1.0)  # a term starts to shrink, or reaches 0
        at_zero = 0
    shrinking = at_zero + turns.cumsum(dim=1)  # number of terms that shrink right of each breakpoint; exact
    breaks = breaks.to(wide)
    total = room.sum(dim=1, keepdim=True, dtype=wide)
    width = breaks.diff(dim=1, prepend=torch.zeros_like(breaks[:, :1]))
    before = torch.cat([torch.full_like(shrinking[:, :1], at_zero), shrinking[:, :-1]], dim=1)
    value = total - (width * before).cumsum(dim=1)
    last = (value > eps).sum(dim=1, keepdim=True) - 1  # the last breakpoint whose value is still above eps
    piece = last.clamp(min=0)
    start, above = breaks.gather(1, piece), value.gather(1, piece) - eps
    t = start + above / shrinking.gather(1, piece).clamp(min=1)
    if at_zero:  # without a box the first piece starts at 0, left of every breakpoint
        t = torch.where(last < 0, (total - eps) / at_zero, t)
    t = torch.where(total <= eps, 0, t)
    left = torch.minimum((size - t).clamp_(min=0).to(size.dtype), room)
    left = left * (eps / left.sum(dim=1, keepdim=True).clamp(min=1e-30)).clamp(max=1.0)
    return left.copysign(delta)


def signs(gradient: Tensor) -> Tensor:
    """The sign of a gradient, NaN where it is NaN: torch returns 0 there, and an attack would stop moving unnoticed."""
    return torch.where(gradient.isnan(), gradient, gradient.sign())


def unit(gradient: Tensor) -> Tensor:
    """Each example's gradient (B, ...) scaled to L2 length 1, however small its values are; zeros stay zeros."""
    flat = gradient.flatten(1)
    tiny = torch.finfo(flat.dtype).tiny
    flat = flat / flat.abs().amax(dim=1, keepdim=True).clamp(min=tiny)  # or its squares could underflow
    return (flat / torch.linalg.vector_norm(flat, dim=1, keepdim=True).clamp(min=tiny)).view_as(gradient)


def inward(gradient: Tensor, point: Tensor) -> Tensor:
    """The gradient (B, D) without the coordinates where ``point`` is at a bound of the box and would leave it."""
    leaves = ((point <= 0) & (gradient < 0)) | ((point >= 1) & (gradient > 0))
    return gradient.masked_fill(leaves, 0)


def top_signs(gradient: Tensor, percentile: float) -> Tensor:
    """Signs of the coordinates at or above a percentile of |gradient|, scaled to L1 length 1; (B, D) -> (B, D).

    The percentile is numpy's (linear interpolation), so 99 leaves 31 of 3,072 coordinates. A zero gradient gives zero,
    one with NaN only NaN.
    """
    size = gradient.abs()
    dimensions = size.shape[1]
    count = dimensions - math.ceil((dimensions - 1) * percentile / 100)
    threshold = size.topk(count, dim=1).values[:, -1:]
    direction = signs(gradient) * (size >= threshold)
    return direction / direction.abs().sum(dim=1, keepdim=True).clamp(min=1)
