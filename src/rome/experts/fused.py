"""Low-rank experts beside a Linear layer in a few operations, so that they cost no more than their arithmetic.

Written with autograd's operations, the gates of one layer take about forty small operations in a forward and backward
pass, and on a GPU each is a kernel that takes longer to launch than to run. Here the forward pass is the layer's own
product, one thin product for codes and scores, one operation that turns scores into gates and multiplies the codes by
them (``rome::mix``), and one product that adds the experts. The backward pass adds one thin product,
``rome::mix_backward``, and one product that adds to the input's gradient. The two operations are in
:mod:`rome.experts.operations`.

With codes c (T, K, r) and scores s, s' (T, K) of an image:

    u = softmax_k(s + b),  v = softmax_k(mean_t s' + b'),  g = (1 - beta) u + beta v,  m = scale g c

and backward, from dm and from the gradients du and dv of a loss on the gates:

    dc = scale g dm,  dg = scale sum_r dm c,  du += (1 - beta) dg,  dv += beta sum_t dg,
    ds = u (du - sum_k u du),  ds' = v (dv - sum_k v dv) / n  at the n tokens that v averages over, 0 elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from rome.experts.gated import LEARNED, MixtureLayer
from rome.experts.gates import GateModule, Gates, SoftmaxGate
from rome.experts.operations import MIX, MIX_BACKWARD, beta_of, mixed_gates

AUTOCAST = frozenset(kind for kind in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(kind))
"""Types of devices that have autocast, determined here because torch 2.11 cannot compile the call."""


class _Layer(torch.autograd.Function):
    """The output of a layer and, with ``recorded``, u and v."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stacked: Tensor,
        B: Tensor,
        local_bias: Tensor | None,
        global_bias: Tensor | None,
        logit: Tensor | None,
        shape: tuple[int, int],
        settings: tuple[int, float, int, int, float],
        recorded: bool,
    ) -> Any:
        output = F.linear(input, weight, bias)
        read = F.linear(input.reshape(*shape, input.shape[-1]), stacked)
        mixed, u, v = MIX(read, local_bias, global_bias, logit, *settings)
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


def closed_form(layer: MixtureLayer) -> SoftmaxGate | None:
    """Return a layer's gate, or None if the operations above do not compute what the layer does.

    They do not for gates of another class or with hooks, for padding among the tokens, for routing other than the
    learned one, and under torch.export and torch.jit.trace, whose programs must run without this package.
    """
    gate: GateModule = layer.gate
    if type(gate) is not SoftmaxGate or gate._forward_hooks or gate._forward_pre_hooks or gate._backward_hooks:
        return None
    if layer.routing != LEARNED or is_exporting():
        return None
    return gate if gate.pool is None or gate.pool.span is not None else None


def mixture(layer: Any, input: Tensor, stacked: Tensor, gate: SoftmaxGate) -> tuple[Tensor, Gates | None]:
    """Return W h + B m for every token h of an input (B windows, ..., d_in), in the precision of autocast.

    Args:
        layer: a :class:`rome.experts.MixtureLinear`.
        stacked: the A_k above the rows of the local and of the global gate: (K r + R, d_in).

    Returns:
        (B windows, ..., d_out), and the gates if they are recorded, else None.
    """
    input, weight, bias, stacked, B = _as_autocast(input, layer.weight, layer.bias, stacked, layer.B)
    windows, recorded = layer.layout.windows, layer.sink is not None
    tokens = math.prod(input.shape[1:-1]) * windows
    local_bias, global_bias = (None if part is None else part.bias for part in (gate.local, gate.global_))
    first, last = (gate.pool and gate.pool.span) or (0, None)
    result = _Layer.apply(
        input,
        weight,
        bias,
        stacked,
        B,
        local_bias,
        global_bias,
        gate.logit,
        (input.shape[0] // windows, tokens),
        (layer.experts, gate.fixed_beta, first, tokens if last is None else last, layer.scale),
        recorded,
    )
    if not recorded:
        return result, None
    output, u, v = result
    weights = mixed_gates(u, v, beta_of(gate.logit, gate.fixed_beta, v.dtype)).expand(-1, tokens, -1)
    return output, Gates(weights, None if local_bias is None else u, None if global_bias is None else v)


def _as_autocast(*tensors: Any) -> Any:
    """Cast tensors as autocast would for a matrix product, if it is on."""
    kind = tensors[0].device.type
    if kind not in AUTOCAST or not torch.is_autocast_enabled(kind):
        return tensors
    reduced = torch.get_autocast_dtype(kind)
    return tuple(x if x is None or x.dtype == torch.float64 else x.to(reduced) for x in tensors)


def is_exporting() -> bool:
    """Whether torch.jit.trace or torch.export is running, whose fixed programs cannot sort tokens by expert."""
    # not torch.compiler.is_exporting(): while torch 2.11 compiles, that is true
    return bool(torch.jit.is_tracing() or torch.compiler._is_exporting_flag)  # type: ignore[no-untyped-call]


@contextmanager
def stacked_weights(
    layers: Iterable[MixtureLayer], fixed: dict[Any, Tensor] | None = None
) -> Iterator[Callable[[], None]]:
    """Stack the weights of layers once instead of in each forward pass; inside, no weight may change or be trained.

    Stacks made by an outer context are kept, because a graph may read them.

    Args:
        fixed: tensors to reuse for the stacks, by layer and precision; missing ones are added. None: new tensors.

    Yields:
        A function that stacks the weights again, for when they have changed.
    """
    mine = [layer for layer in layers if layer.stacked is None]

    def join() -> None:
        with torch.no_grad():
            for layer in mine:
                stacked = layer.stack()
                if stacked is not None and fixed is not None:
                    own = fixed.setdefault((layer, stacked.dtype), stacked)
                    stacked = own if own is stacked else own.copy_(stacked)
                layer.stacked = stacked

    try:
        join()
        yield join
    finally:
        for layer in mine:
            layer.stacked = None
