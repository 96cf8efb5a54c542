"""The two operations of :mod:`rome.experts.fused`: gates from scores and codes times gates, and their gradient.

Each is one kernel on CUDA (:mod:`rome.experts._kernels`), plain torch elsewhere.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor


def split(read: Tensor, experts: int, local: bool, global_: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return views of the codes (..., K, r) and of the local and global scores (..., K); empty if there are none."""
    sizes = [experts * local, experts * global_]
    codes, local_scores, global_scores = read.split_with_sizes([read.shape[-1] - sum(sizes), *sizes], dim=-1)
    return codes.view(*codes.shape[:-1], experts, codes.shape[-1] // experts), local_scores, global_scores


def gate_dtype(read: Tensor) -> torch.dtype:
    """Return the dtype that gates are computed in: float32 or wider."""
    return torch.promote_types(read.dtype, torch.float32)


def beta_of(logit: Tensor | None, beta: float, dtype: torch.dtype) -> Tensor | float:
    """Return beta, the weight of the global gate."""
    return beta if logit is None else logit.to(dtype).sigmoid()


def softmax(scores: Tensor) -> Tensor:
    """Softmax over the last dimension by operations on the whole tensor.

    The dimension is short, and torch's softmax, which works row by row, takes four times as long on a CPU.
    """
    e = (scores - scores.amax(dim=-1, keepdim=True)).exp_()
    return e.div_(e.sum(dim=-1, keepdim=True))


def mixed_gates(u: Tensor, v: Tensor, beta: Tensor | float) -> Tensor:
    """Return g (B, T, K), or (B, 1, K) if there is no u."""
    if not v.numel():
        return u
    return torch.lerp(u, v.unsqueeze(1), beta) if u.numel() else v.unsqueeze(1)


def mix(
    read: Tensor,
    local_bias: Tensor | None,
    global_bias: Tensor | None,
    logit: Tensor | None,
    experts: int,
    beta: float,
    first: int,
    last: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes times gates, and the gates.

    Args:
        read: (B, T, K r + K per bias): codes, local scores, global scores.
        local_bias, global_bias: b, b' (K,); None if the gate has no such part.
        logit: a scalar whose sigmoid is beta; None to use ``beta``.
        first, last: range of the tokens that v averages over, without ``last``.

    Returns:
        m (B, T, K r) in the dtype of ``read``; u (B, T, K) and v (B, K) in float32 or wider, empty if absent.
    """
    read, dtype = read.contiguous(), gate_dtype(read)
    codes, local, global_ = split(read, experts, local_bias is not None, global_bias is not None)
    u = v = read.new_empty(0, dtype=dtype)
    if local_bias is not None:
        u = softmax(local + local_bias.to(dtype))
    if global_bias is not None:
        v = (global_[:, first:last].mean(dim=1, dtype=dtype) + global_bias.to(dtype)).softmax(dim=-1)
    g = mixed_gates(u, v, beta_of(logit, beta, dtype))
    mixed = read.new_empty(codes.shape)
    torch.mul(codes, (g if scale == 1 else g * scale).unsqueeze(-1), out=mixed)
    return mixed.flatten(-2), u, v


def mix_backward(
    d_mixed: Tensor,
    read: Tensor,
    u: Tensor,
    v: Tensor,
    logit: Tensor | None,
    d_u: Tensor | None,
    d_v: Tensor | None,
    beta: float,
    first: int,
    last: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of :func:`mix`.

    Returns:
        The gradient of ``read``, and each image's contribution to those of b, b' and the logit, concatenated:
        (B, 2 K + 1).
    """
    dtype, experts = gate_dtype(read), (u if u.numel() else v).shape[-1]
    parts = u.numel() > 0, v.numel() > 0
    read = read.contiguous()
    d_read, shares = torch.empty_like(read), read.new_zeros(len(read), 2 * experts + 1, dtype=dtype)
    codes, _, _ = split(read, experts, *parts)
    d_codes, d_local, d_global = split(d_read, experts, *parts)
    d_mixed, beta_ = d_mixed.view(codes.shape), beta_of(logit, beta, dtype)
    g = mixed_gates(u, v, beta_)
    # if it is precise enough, the result's memory first holds the summands: allocating costs more than multiplying
    products = torch.mul(d_mixed, codes, out=d_codes) if d_read.dtype == dtype else d_mixed.to(dtype) * codes
    d_g = products.sum(dim=-1) if scale == 1 else products.sum(dim=-1) * scale
    torch.mul(d_mixed, (g if scale == 1 else g * scale).unsqueeze(-1), out=d_codes)
    if u.numel():
        d = d_g * (1 - beta_) if v.numel() else d_g
        d = torch._softmax_backward_data(d if d_u is None else d + d_u, u, -1, dtype)
        d_local.copy_(d)
        shares[:, :experts] = d.sum(dim=1)
    if v.numel():
        d = d_g.sum(dim=1)
        if u.numel():
            d = d * beta_
        d = torch._softmax_backward_data(d if d_v is None else d + d_v, v, -1, dtype)
        if last - first < d_global.shape[1]:
            d_global.zero_()
        d_global[:, first:last] = (d / (last - first)).unsqueeze(1)
        shares[:, experts:-1] = d
    if logit is not None:
        shares[:, -1] = (d_g * (v.unsqueeze(1) - u)).sum(dim=(1, 2)) * (beta_ * (1 - beta_))
    return d_read, shares


@cache
def _kernels() -> Any:
    """Return the module of CUDA kernels; None if Triton is not installed."""
    if find_spec("triton") is None:
        return None
    from rome.experts import _kernels as kernels  # imported late, because it imports Triton

    return kernels


def _on_cuda(name: str, fallback: Any, empty: Any) -> Any:
    def run(*args: Any) -> Any:
        if args[0].dtype not in (torch.float32, torch.bfloat16, torch.float16) or not args[0].numel() or not _kernels():
            return fallback(*args)
        results = empty(*args)
        getattr(_kernels(), name)(*results, *args)
        return results

    return run


def _empty_mix(read: Tensor, local_bias: Any, global_bias: Any, logit: Any, experts: int, *_: Any) -> Any:
    (images, tokens, width), dtype = read.shape, gate_dtype(read)
    local, global_ = local_bias is not None, global_bias is not None
    return (
        read.new_empty(images, tokens, width - experts * (local + global_)),
        read.new_empty((images, tokens, experts) if local else 0, dtype=dtype),
        read.new_empty((images, experts) if global_ else 0, dtype=dtype),
    )


def _empty_backward(d_mixed: Tensor, read: Tensor, u: Tensor, v: Tensor, *_: Any) -> Any:
    experts = (u if u.ndim == 3 else v).shape[-1]
    return read.new_empty(read.shape), read.new_empty(len(read), 2 * experts + 1, dtype=gate_dtype(read))


def _define(name: str, schema: str, function: Any, empty: Any) -> Any:
    torch.library.define(f"rome::{name}", schema)
    torch.library.impl(f"rome::{name}", "default", func=function)
    torch.library.impl(f"rome::{name}", "cuda", func=_on_cuda(name, function, empty))
    torch.library.register_fake(f"rome::{name}", empty)
    return getattr(torch.ops.rome, name).default


MIX = _define(
    "mix",
    "(Tensor read, Tensor? local_bias, Tensor? global_bias, Tensor? logit, int experts, float beta, SymInt first, "
    "SymInt last, float scale) -> (Tensor, Tensor, Tensor)",
    mix,
    _empty_mix,
)
MIX_BACKWARD = _define(
    "mix_backward",
    "(Tensor d_mixed, Tensor read, Tensor u, Tensor v, Tensor? logit, Tensor? d_u, Tensor? d_v, float beta, "
    "SymInt first, SymInt last, float scale) -> (Tensor, Tensor)",
    mix_backward,
    _empty_backward,
)
