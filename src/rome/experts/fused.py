"""Low-rank experts beside a Linear layer as few operations: what they cost is their arithmetic.

Written with autograd's operations, the gates of one layer are some forty small ones in a forward and backward, and on a
GPU each is a kernel that takes longer to launch than to run. Here a layer is its plain product, one thin product for
codes and scores, one operation that makes gates of scores and multiplies codes by them (``rome::mix``), and one product
that adds the experts; backward one thin product, ``rome::mix_backward``, and one product that adds to the input's
gradient. Both operations are one kernel each on CUDA (:mod:`rome.experts.kernels`) and plain torch elsewhere.

With codes c (T, K, r) and scores s, s' (T, K) of an image:

    u = softmax_k(s + b),  v = softmax_k(mean_t s' + b'),  g = (1 - beta) u + beta v,  m = scale g c

and backward, from dm and from what a loss on the gates gives to u and v:

    dc = scale g dm,  dg = scale sum_r dm c,  du += (1 - beta) dg,  dv += beta sum_t dg,
    ds = u (du - sum_k u du),  ds' = v (dv - sum_k v dv) / n  at the n tokens that v averages over, 0 elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rome.experts.gated import Gated
from rome.experts.gates import Closed, DualScaleGate, GateModule, Gates, GlobalGate, LocalGate

# -- the two operations ------------------------------------------------------------------------------------------------


class Scores(NamedTuple):
    """How a row of the thin product is divided."""

    experts: int
    codes: int
    """K r: the columns before the scores."""
    rank: int
    local: bool
    whole: bool

    @classmethod
    def of(cls, read: Tensor, experts: int, local: bool, whole: bool) -> Scores:
        codes = read.shape[-1] - experts * (local + whole)
        return cls(experts, codes, codes // experts, local, whole)

    def split(self, read: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes (..., K, r) and the two kinds of scores (..., K) as views; empty where there are none."""
        codes, local, whole = read.split_with_sizes(
            [self.codes, self.experts * self.local, self.experts * self.whole], dim=-1
        )
        return codes.view(*codes.shape[:-1], self.experts, self.rank), local, whole


def wide(read: Tensor) -> torch.dtype:
    """What gates are computed in: float32 at least."""
    return torch.promote_types(read.dtype, torch.float32)


def share(logit: Tensor | None, beta: float, dtype: torch.dtype) -> Tensor | float:
    """The share of the global gate."""
    return beta if logit is None else logit.to(dtype).sigmoid()


def softmax(scores: Tensor) -> Tensor:
    """Over the last dimension, by operations that do not begin anew at every row: it is short, and torch's own softmax
    takes four times as long on a CPU."""
    e = (scores - scores.amax(dim=-1, keepdim=True)).exp_()
    return e.div_(e.sum(dim=-1, keepdim=True))


def mixed_gates(u: Tensor, v: Tensor, beta: Tensor | float) -> Tensor:
    """g (B, T, K), or (B, 1, K) where there is no u."""
    if not v.numel():
        return u
    return torch.lerp(u, v.unsqueeze(1), beta) if u.numel() else v.unsqueeze(1)


def mix(
    read: Tensor,
    local_bias: Tensor | None,
    whole_bias: Tensor | None,
    logit: Tensor | None,
    experts: int,
    beta: float,
    first: int,
    last: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes times gates.

    Args:
        read: (B, T, K r + K per bias): codes, local scores, scores of the image.
        local_bias, whole_bias: b, b' (K,); None where the gate has no such part.
        logit: a scalar whose sigmoid is beta; None for ``beta``.
        first, last: the tokens that v averages over.

    Returns:
        m (B, T, K r) in the type of ``read``; u (B, T, K) and v (B, K) in float32 at least, empty where absent.
    """
    columns, dtype = Scores.of(read, experts, local_bias is not None, whole_bias is not None), wide(read)
    read = read.contiguous()
    codes, local, whole = columns.split(read)
    u = v = read.new_empty(0, dtype=dtype)
    if local_bias is not None:
        u = softmax(local + local_bias.to(dtype))
    if whole_bias is not None:
        v = (whole[:, first:last].mean(dim=1, dtype=dtype) + whole_bias.to(dtype)).softmax(dim=-1)
    g = mixed_gates(u, v, share(logit, beta, dtype))
    mixed = read.new_empty(*read.shape[:-1], columns.codes)
    torch.mul(codes, (g if scale == 1 else g * scale).unsqueeze(-1), out=mixed.view(codes.shape))
    return mixed, u, v


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
    """The gradient of :func:`mix`.

    Returns:
        that of ``read``; and each image's share of those of b, b' and the logit, one beside the other, (B, 2 K + 1).
    """
    dtype, experts = wide(read), (u if u.numel() else v).shape[-1]
    columns = Scores.of(read, experts, u.numel() > 0, v.numel() > 0)
    read = read.contiguous()
    d_read, shares = torch.empty_like(read), read.new_zeros(len(read), 2 * experts + 1, dtype=dtype)
    codes, _, _ = columns.split(read)
    d_codes, d_local, d_whole = columns.split(d_read)
    d_mixed, beta_ = d_mixed.view(codes.shape), share(logit, beta, dtype)
    g = mixed_gates(u, v, beta_)
    # the result's place first holds what is summed, where that is precise enough: a new one costs more than the product
    each = torch.mul(d_mixed, codes, out=d_codes) if d_read.dtype == dtype else d_mixed.to(dtype) * codes
    d_g = each.sum(dim=-1) if scale == 1 else each.sum(dim=-1) * scale
    torch.mul(d_mixed, (g if scale == 1 else g * scale).unsqueeze(-1), out=d_codes)
    if columns.local:
        d = d_g * (1 - beta_) if columns.whole else d_g
        d = torch._softmax_backward_data(d if d_u is None else d + d_u, u, -1, dtype)
        d_local.copy_(d)
        shares[:, :experts] = d.sum(dim=1)
    if columns.whole:
        d = d_g.sum(dim=1)
        if columns.local:
            d = d * beta_
        d = torch._softmax_backward_data(d if d_v is None else d + d_v, v, -1, dtype)
        if last - first < d_whole.shape[1]:
            d_whole.zero_()
        d_whole[:, first:last] = (d / (last - first)).unsqueeze(1)
        shares[:, experts:-1] = d
    if logit is not None:
        shares[:, -1] = (d_g * (v.unsqueeze(1) - u)).sum(dim=(1, 2)) * (beta_ * (1 - beta_))
    return d_read, shares


@cache
def _kernels() -> Any:
    """The kernels for CUDA; None where Triton is not installed."""
    if find_spec("triton") is None:
        return None
    from rome.experts import kernels  # late: it imports Triton

    return kernels


def _on_cuda(name: str, otherwise: Any) -> Any:
    def run(*args: Any) -> Any:
        read = args[0]
        fits = read.dtype in (torch.float32, torch.bfloat16, torch.float16) and read.numel() > 0
        return getattr(_kernels(), name)(*args) if fits and _kernels() else otherwise(*args)

    return run


def _empty_mix(read: Tensor, local_bias: Any, whole_bias: Any, logit: Any, experts: int, *_: Any) -> Any:
    columns = Scores.of(read, experts, local_bias is not None, whole_bias is not None)
    dtype, (images, tokens) = wide(read), read.shape[:2]
    return (
        read.new_empty(images, tokens, columns.codes),
        read.new_empty((images, tokens, experts) if columns.local else 0, dtype=dtype),
        read.new_empty((images, experts) if columns.whole else 0, dtype=dtype),
    )


def _empty_backward(d_mixed: Tensor, read: Tensor, u: Tensor, v: Tensor, *_: Any) -> Any:
    experts = (u if u.ndim == 3 else v).shape[-1]
    return read.new_empty(read.shape), read.new_empty(len(read), 2 * experts + 1, dtype=wide(read))


def _define(name: str, schema: str, function: Any, empty: Any) -> Any:
    torch.library.define(f"rome::{name}", schema)
    torch.library.impl(f"rome::{name}", "default", func=function)
    torch.library.impl(f"rome::{name}", "cuda", func=_on_cuda(name, function))
    torch.library.register_fake(f"rome::{name}", empty)
    return getattr(torch.ops.rome, name).default


MIX = _define(
    "mix",
    "(Tensor read, Tensor? local_bias, Tensor? whole_bias, Tensor? logit, int experts, float beta, SymInt first, "
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


# -- a layer -----------------------------------------------------------------------------------------------------------


class _Layer(torch.autograd.Function):
    """The output of a layer; with ``recorded``, u and v too."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stacked: Tensor,
        B: Tensor,
        local_bias: Tensor | None,
        whole_bias: Tensor | None,
        logit: Tensor | None,
        shape: tuple[int, int],
        settings: tuple[int, float, int, int, float],
        recorded: bool,
    ) -> Any:
        output = F.linear(input, weight, bias)
        read = F.linear(input.reshape(*shape, input.shape[-1]), stacked)
        mixed, u, v = MIX(read, local_bias, whole_bias, logit, *settings)
        flat = output.reshape(-1, output.shape[-1])
        output = flat.addmm_(mixed.view(-1, mixed.shape[-1]), B.t()).view(output.shape)
        ctx.save_for_backward(input, weight, stacked, B, read, mixed if ctx.needs_input_grad[4] else None, u, v, logit)
        ctx.settings = settings
        return (output, u, v) if recorded else output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output: Tensor, d_u: Tensor | None = None, d_v: Tensor | None = None) -> Any:
        input, weight, stacked, B, read, mixed, u, v, logit = ctx.saved_tensors
        experts, *settings = ctx.settings
        needs = ctx.needs_input_grad
        h, d_flat = input.reshape(-1, input.shape[-1]), d_output.reshape(-1, d_output.shape[-1])
        d: list[Tensor | None] = [None] * len(needs)
        d_mixed = (d_flat @ B).view(*read.shape[:-1], B.shape[1])
        d_read, shares = MIX_BACKWARD(d_mixed, read, u, v, logit, d_u, d_v, *settings)
        d_read = d_read.view(-1, read.shape[-1])
        if needs[0]:
            d[0] = (d_flat @ weight).addmm_(d_read, stacked).view(input.shape)
        if needs[1]:
            d[1] = d_flat.t() @ h
        if needs[2]:
            d[2] = d_flat.sum(dim=0)
        if needs[3]:
            d[3] = d_read.t() @ h
        if needs[4]:
            d[4] = d_flat.t() @ mixed.view(-1, B.shape[1])
        if any(needs[5:8]):
            parts = shares.sum(dim=0).split([experts, experts, 1])
            d[5:8] = [part if wanted else None for part, wanted in zip(parts, needs[5:8], strict=True)]
            d[7] = None if d[7] is None else d[7].view(())
        return tuple(d)


GATES = (DualScaleGate, LocalGate, GlobalGate)


def closed_form(layer: Gated) -> Closed | None:
    """What the operations above need to know of a layer's gate; None where they do not compute what the layer does.

    They do not for gates of another class or with hooks, for padding among the tokens, other routing than the learned
    one, and in programs of torch.export and torch.jit.trace, which shall run without this package.
    """
    gate: GateModule = layer.gate
    if type(gate) not in GATES or gate._forward_hooks or gate._forward_pre_hooks or gate._backward_hooks:
        return None
    if layer.fixed_weights is not None or layer.inverted or becomes_a_program():
        return None
    return gate.closed()


def mixture(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stacked: Tensor,
    B: Tensor,
    gate: Closed,
    *,
    windows: int = 1,
    scale: float = 1,
    recorded: bool = False,
) -> tuple[Tensor, Gates | None]:
    """W h + B m of every token h of an input (B windows, ..., d_in), in the precision of autocast.

    Args:
        stacked: the A_k, the rows of the local and of the global gate, one above the other: (K r + R, d_in).
        B: (d_out, K r).
        recorded: give the gates too.

    Returns:
        (B windows, ..., d_out) and the gates, or None.
    """
    input, weight, bias, stacked, B = _as_autocast(input, weight, bias, stacked, B)
    tokens = math.prod(input.shape[1:-1]) * windows
    parts = [part for part in (gate.local_bias, gate.whole_bias) if part is not None]
    found = _Layer.apply(
        input,
        weight,
        bias,
        stacked,
        B,
        gate.local_bias,
        gate.whole_bias,
        gate.logit,
        (input.shape[0] // windows, tokens),
        (len(parts[0]), gate.beta, gate.first, tokens if gate.last is None else gate.last, scale),
        recorded,
    )
    if not recorded:
        return found, None
    output, u, v = found
    weights = mixed_gates(u, v, share(gate.logit, gate.beta, v.dtype)).expand(-1, tokens, -1)
    return output, Gates(weights, None if gate.local_bias is None else u, None if gate.whole_bias is None else v)


def _as_autocast(*tensors: Any) -> Any:
    """Tensors as a matrix product under autocast, where it is on, would take them."""
    kind = tensors[0].device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return tensors
    reduced = torch.get_autocast_dtype(kind)
    return tuple(x if x is None or x.dtype == torch.float64 else x.to(reduced) for x in tensors)


def becomes_a_program() -> bool:
    """Inside torch.jit.trace and torch.export, whose fixed programs cannot sort tokens by expert."""
    return bool(torch.jit.is_tracing() or torch.compiler.is_exporting())  # type: ignore[attr-defined, no-untyped-call]


@contextmanager
def joined(model: nn.Module) -> Iterator[None]:
    """Inside, no weight changes and none is trained: what layers join of their weights is joined once, not at each
    forward."""
    layers = [layer for layer in model.modules() if isinstance(layer, Gated)]
    before = [layer.stacked for layer in layers]
    try:
        with torch.no_grad():
            for layer in layers:
                layer.stacked = layer.stack()
        yield
    finally:
        for layer, old in zip(layers, before, strict=True):
            layer.stacked = old
