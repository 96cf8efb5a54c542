"""The operations of :mod:`rome.experts.operations` on CUDA: one Triton kernel each, with one pass over memory.

They compute in float32. Their arguments are the tensors to fill, followed by the arguments of the operation of the same
name.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

FORWARD, BACKWARD, POOL = 2048, 8192, 64
"""Entries of the codes that one program of the forward or backward kernel holds at once; tokens averaged at once."""


@triton.jit  # type: ignore[untyped-decorator]
def _beta_of(beta, logit, LEARNED: tl.constexpr):  # type: ignore[no-untyped-def]
    """beta, the weight of the global gate."""
    if LEARNED:
        return 1 / (1 + tl.exp(-tl.load(logit).to(tl.float32)))
    else:
        return beta


@triton.jit  # type: ignore[untyped-decorator]
def _mix(  # type: ignore[no-untyped-def]
    read, local_bias, global_bias, logit, mixed, u, v, tokens, first, last, beta, scale,
    K: tl.constexpr, R: tl.constexpr, LOCAL: tl.constexpr, GLOBAL: tl.constexpr, LEARNED: tl.constexpr,
    WIDE_K: tl.constexpr, WIDE_R: tl.constexpr, BLOCK: tl.constexpr, POOL: tl.constexpr,
):  # fmt: skip
    """One program per image and block of tokens. Each program computes its image's v, which reads only T K scores."""
    WIDTH: tl.constexpr = K * R + K * LOCAL + K * GLOBAL
    image, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    k = tl.arange(0, WIDE_K)
    r = tl.arange(0, WIDE_R)
    real = k < K
    read += image * tokens * WIDTH
    t = part * BLOCK + tl.arange(0, BLOCK)
    here = (t < tokens)[:, None] & real[None, :]
    place = t[:, None, None] * WIDTH + k[None, :, None] * R + r[None, None, :]
    inside = here[:, :, None] & (r < R)[None, None, :]
    codes = tl.load(read + place, mask=inside, other=0.0).to(tl.float32)
    g = tl.zeros((BLOCK, WIDE_K), tl.float32)
    if LOCAL:
        scores = tl.load(read + t[:, None] * WIDTH + K * R + k[None, :], mask=here, other=0.0).to(tl.float32)
        scores += tl.load(local_bias + k, mask=real, other=0.0).to(tl.float32)[None, :]
        scores = tl.where(real[None, :], scores, -float("inf"))
        e = tl.exp(scores - tl.max(scores, axis=1)[:, None])
        g = e / tl.sum(e, axis=1)[:, None]
        tl.store(u + (image * tokens + t)[:, None] * K + k[None, :], g, mask=here)
    if GLOBAL:
        total = tl.zeros((WIDE_K,), tl.float32)
        for start in range(first, last, POOL):
            s = start + tl.arange(0, POOL)
            seen = tl.load(
                read + s[:, None] * WIDTH + K * R + K * LOCAL + k[None, :],
                mask=(s < last)[:, None] & real[None, :],
                other=0.0,
            )
            total += tl.sum(seen.to(tl.float32), axis=0)
        pooled = total / (last - first) + tl.load(global_bias + k, mask=real, other=0.0).to(tl.float32)
        pooled = tl.where(real, pooled, -float("inf"))
        f = tl.exp(pooled - tl.max(pooled, axis=0))
        f = f / tl.sum(f, axis=0)
        if part == 0:
            tl.store(v + image * K + k, f, mask=real)
        if LOCAL:
            share = _beta_of(beta, logit, LEARNED)
            g = (1 - share) * g + share * f[None, :]
        else:
            g += f[None, :]
    out = (image * tokens + t)[:, None, None] * (K * R) + k[None, :, None] * R + r[None, None, :]
    tl.store(mixed + out, (codes * (g * scale)[:, :, None]).to(mixed.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _mix_backward(  # type: ignore[no-untyped-def]
    d_mixed, read, u, v, logit, d_u, d_v, d_read, shares, tokens, first, last, beta, scale,
    K: tl.constexpr, R: tl.constexpr, LOCAL: tl.constexpr, GLOBAL: tl.constexpr, LEARNED: tl.constexpr,
    FROM_U: tl.constexpr, FROM_V: tl.constexpr,
    WIDE_K: tl.constexpr, WIDE_R: tl.constexpr, BLOCK: tl.constexpr, POOL: tl.constexpr,
):  # fmt: skip
    """One program per image, because the gradient of v is a sum over the image's tokens."""
    WIDTH: tl.constexpr = K * R + K * LOCAL + K * GLOBAL
    image = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, WIDE_K)
    r = tl.arange(0, WIDE_R)
    real = k < K
    read += image * tokens * WIDTH
    d_read += image * tokens * WIDTH
    d_mixed += image * tokens * (K * R)
    share = _beta_of(beta, logit, LEARNED)
    total = tl.zeros((WIDE_K,), tl.float32)
    bias = tl.zeros((WIDE_K,), tl.float32)
    along = tl.zeros((WIDE_K,), tl.float32)
    f = tl.zeros((WIDE_K,), tl.float32)
    if GLOBAL:
        f = tl.load(v + image * K + k, mask=real, other=0.0)
    for start in range(0, tokens, BLOCK):
        t = start + tl.arange(0, BLOCK)
        here = (t < tokens)[:, None] & real[None, :]
        inside = here[:, :, None] & (r < R)[None, None, :]
        column = k[None, :, None] * R + r[None, None, :]
        d = tl.load(d_mixed + t[:, None, None] * (K * R) + column, mask=inside, other=0.0).to(tl.float32)
        codes = tl.load(read + t[:, None, None] * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
        gates = (image * tokens + t)[:, None] * K + k[None, :]
        g = tl.zeros((BLOCK, WIDE_K), tl.float32)
        if LOCAL:
            g = tl.load(u + gates, mask=here, other=0.0)
        d_g = tl.sum(d * codes, axis=2) * scale
        if LEARNED:
            along += tl.sum(d_g * (f[None, :] - g), axis=0)
        if LOCAL:
            d_gate = d_g
            if GLOBAL:
                d_gate = (1 - share) * d_g
            if FROM_U:
                d_gate += tl.load(d_u + gates, mask=here, other=0.0)
            d_score = g * (d_gate - tl.sum(g * d_gate, axis=1)[:, None])
            bias += tl.sum(d_score, axis=0)
            where = d_read + t[:, None] * WIDTH + K * R + k[None, :]
            tl.store(where, d_score.to(d_read.dtype.element_ty), mask=here)
        if GLOBAL:
            total += tl.sum(d_g, axis=0)
            if LOCAL:
                g = (1 - share) * g + share * f[None, :]
            else:
                g += f[None, :]
        d_code = (d * (g * scale)[:, :, None]).to(d_read.dtype.element_ty)
        tl.store(d_read + t[:, None, None] * WIDTH + column, d_code, mask=inside)
    row = shares + image * (2 * K + 1)
    tl.store(row + k, bias, mask=real)
    if GLOBAL:
        d_global = total
        if LOCAL:
            d_global = share * total
        if FROM_V:
            d_global += tl.load(d_v + image * K + k, mask=real, other=0.0)
        d_pooled = f * (d_global - tl.sum(f * d_global, axis=0))
        tl.store(row + K + k, d_pooled, mask=real)
        d_each = d_pooled / (last - first)
        for start in range(0, tokens, POOL):
            s = start + tl.arange(0, POOL)
            value = tl.where(((s >= first) & (s < last))[:, None], d_each[None, :], 0.0)
            where = d_read + s[:, None] * WIDTH + K * R + K * LOCAL + k[None, :]
            tl.store(where, value.to(d_read.dtype.element_ty), mask=(s < tokens)[:, None] & real[None, :])
    else:
        tl.store(row + K + k, bias * 0, mask=real)
    step = tl.sum(along, axis=0)
    if LEARNED:
        step *= share * (1 - share)
    tl.store(row + 2 * K, step)


def mix(  # type: ignore[no-untyped-def]
    mixed, u, v, read, local_bias, global_bias, logit, experts, beta, first, last, scale
) -> None:  # fmt: skip
    """Fill the first three arguments."""
    local, global_ = local_bias is not None, global_bias is not None
    images, tokens, codes = mixed.shape
    tiles = _tiles(experts, codes // experts, tokens, FORWARD)
    with torch.cuda.device_of(read):  # type: ignore[no-untyped-call]
        _mix[(images, triton.cdiv(tokens, tiles["BLOCK"]))](
            read.contiguous(), local_bias, global_bias, logit, mixed, u, v, tokens, first, last, float(beta),
            float(scale), K=experts, R=codes // experts, LOCAL=local, GLOBAL=global_,
            LEARNED=logit is not None and local and global_, **tiles, num_warps=4,
        )  # fmt: skip


def mix_backward(  # type: ignore[no-untyped-def]
    d_read, shares, d_mixed, read, u, v, logit, d_u, d_v, beta, first, last, scale
) -> None:  # fmt: skip
    """Fill the first two arguments."""
    local, global_ = u.numel() > 0, v.numel() > 0
    experts, (images, tokens, codes) = (u if local else v).shape[-1], d_mixed.shape
    d_u, d_v = (d.contiguous() if d is not None and part else None for d, part in ((d_u, local), (d_v, global_)))
    with torch.cuda.device_of(read):  # type: ignore[no-untyped-call]
        _mix_backward[(images,)](
            d_mixed.contiguous(), read.contiguous(), u.contiguous(), v.contiguous(), logit, d_u, d_v,
            d_read, shares, tokens, first, last, float(beta), float(scale),
            K=experts, R=codes // experts, LOCAL=local, GLOBAL=global_,
            LEARNED=logit is not None and local and global_, FROM_U=d_u is not None, FROM_V=d_v is not None,
            **_tiles(experts, codes // experts, tokens, BACKWARD), num_warps=8,
        )  # fmt: skip


def _tiles(experts: int, rank: int, tokens: int, entries: int) -> dict[str, Any]:
    """Tile sizes of a program, each a power of two."""
    wide_k, wide_r = triton.next_power_of_2(experts), triton.next_power_of_2(rank)
    block = max(min(triton.next_power_of_2(tokens), entries // (wide_k * wide_r)), 1)
    return {"WIDE_K": wide_k, "WIDE_R": wide_r, "BLOCK": block, "POOL": POOL}
