"""Gates, which weight the experts of an adapted layer (paper 4.3, Eq. 3-5; the variants of its Table 4).

A gate has two parts so that the layer reads its input only once: ``rows`` are weights that the layer stacks under its
own, so that one matrix product yields expert codes and gate scores, and ``forward`` turns the scores into gate weights.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from rome.core.component import Component, Number


class Gates(NamedTuple):
    """Gate weights of one layer for a batch of B images with T tokens and K experts; they sum to 1 over K."""

    weights: Tensor
    """g, (B, T, K): the weights of the experts (Eq. 5)."""
    local: Tensor | None
    """u, (B, T, K): computed from each token (Eq. 3); None if the gate has no local part."""
    global_: Tensor | None
    """v, (B, K): computed from the image (Eq. 4); None if the gate has no global part."""

    def first(self, n: int) -> Gates:
        """Return the gates of the first n images."""
        local, global_ = (None if part is None else part[:n] for part in (self.local, self.global_))
        return Gates(self.weights[:n], local, global_)


@dataclass(frozen=True)
class Layout:
    """How the rows of a layer's input make up images."""

    windows: int = 1
    """Rows of the batch dimension per image: the windows of windowed attention."""
    real: tuple[int, ...] = ()
    """Positions of tokens that are not padding, among those of all windows of an image; empty if none is padding."""
    prefix: int = 0
    """Number of class and register tokens before the patches."""


PLAIN = Layout()
"""One batch row per image, no padding, no class token."""


class Gate(Component):
    """Settings of a gate, from which one module is built for each adapted layer."""

    default_kind = "dual-scale"
    has_global: ClassVar[bool] = True
    """Whether the gate has a global part, computed from the whole image."""

    @property
    def needs_class_token(self) -> bool:
        """Whether the gate reads a class token."""
        return getattr(self, "pool", None) == "cls"

    @abstractmethod
    def build(self, in_features: int, experts: int, *, block: int, blocks: int, layout: Layout = PLAIN) -> GateModule:
        """Return the gate of a layer in block number ``block`` of 1..``blocks``."""


class GateModule(nn.Module):
    """Base of the modules that are built from a :class:`Gate`."""

    @abstractmethod
    def rows(self) -> Tensor:
        """Return the weights (R, d_in) whose products with the input are the scores."""

    @abstractmethod
    def forward(self, scores: Tensor) -> Gates:
        """Return the gate weights for scores (B, T, R) of whole images."""


class DualScale(Gate):
    """Local and global gates mixed by a coefficient that favours the global one in early blocks (Eq. 3-5).

    beta(l) = sigmoid(s (1 - l/L) - b) with l = 1..L counted in adapted blocks: .841 to .119 for s=4, b=2, L=12.
    """

    kind = "dual-scale"
    s: Number = 4.0
    """How steeply beta decreases with depth."""
    b: Number = 2.0
    """Lowers beta in all layers."""
    coefficient: Literal["adaptive", "inverted", "learned"] = "adaptive"
    """beta(l) itself, 1 - beta(l), or a parameter of each layer initialised to beta(l) (Table 4)."""
    pool: Literal["mean", "patches", "cls"] = "mean"
    """Input of the global gate: the mean over all tokens, the mean over the patches alone, or the class token."""

    def logit(self, block: int, blocks: int) -> float:
        """Return the logit of beta(l)."""
        logit = self.s * (1 - block / blocks) - self.b
        return -logit if self.coefficient == "inverted" else logit

    def beta(self, block: int, blocks: int) -> float:
        """Return beta(l), the weight of the global gate in this block; its initial value if it is learned."""
        return 1 / (1 + math.exp(-self.logit(block, blocks)))

    def build(self, in_features: int, experts: int, *, block: int, blocks: int, layout: Layout = PLAIN) -> GateModule:
        logit = nn.Parameter(torch.tensor(self.logit(block, blocks))) if self.coefficient == "learned" else None
        pool, beta = Pool(self.pool, layout), self.beta(block, blocks)
        return SoftmaxGate(in_features, experts, local=True, pool=pool, beta=beta, logit=logit)


class Local(Gate):
    """The local gate alone (Eq. 3; Table 4 "local only"): the gate of a conventional mixture of experts."""

    kind = "local"
    has_global = False

    def build(self, in_features: int, experts: int, *, block: int, blocks: int, layout: Layout = PLAIN) -> GateModule:
        return SoftmaxGate(in_features, experts, local=True)


class Global(Gate):
    """The global gate alone (Eq. 4; Table 4 "global only")."""

    kind = "global"
    pool: Literal["mean", "patches", "cls"] = "mean"
    """As in :class:`DualScale`."""

    def build(self, in_features: int, experts: int, *, block: int, blocks: int, layout: Layout = PLAIN) -> GateModule:
        return SoftmaxGate(in_features, experts, local=False, pool=Pool(self.pool, layout))


class Uniform(Gate):
    """No learned gate: every expert weighs 1/K (Table 4 "no gating")."""

    kind = "uniform"
    has_global = False

    def build(self, in_features: int, experts: int, *, block: int, blocks: int, layout: Layout = PLAIN) -> GateModule:
        return UniformGate(in_features, experts)


class Pool(nn.Module):
    """Pooling of token scores (B, T, R) into image scores (B, R)."""

    real: Tensor | None

    def __init__(self, which: str, layout: Layout) -> None:
        super().__init__()
        self.which, self.first = which, layout.prefix if which == "patches" else 0
        self.register_buffer("real", positions(layout), persistent=False)

    @property
    def span(self) -> tuple[int, int | None] | None:
        """First and end of the range of pooled tokens (end None for all the rest); None if they are not contiguous."""
        if self.which == "cls":
            return 0, 1
        return (self.first, None) if self.real is None else None

    def forward(self, scores: Tensor) -> Tensor:
        return scores[:, 0] if self.which == "cls" else select(scores, self.real)[:, self.first :].mean(dim=1)


def positions(layout: Layout) -> Tensor | None:
    """Return the positions of the tokens that are not padding, int64; None if no token is padding."""
    return torch.tensor(layout.real) if layout.real else None


def select(values: Tensor, real: Tensor | None) -> Tensor:
    """Return values (B, T, ...) of the tokens ``real`` alone, from :func:`positions`."""
    return values if real is None else values.index_select(1, real)


class SoftmaxGate(GateModule):
    """g_i = (1 - beta) u_i + beta v, where u_i = softmax(local(h_i)), v = softmax(global(mean_i h_i)); or one of them.

    ``local`` and ``global_`` are Linear(d_in, K) with bias, or None. The mean, over the tokens selected by ``pool``, is
    taken after the product, which is equivalent because the product is linear. beta is a constant, or the sigmoid of
    the parameter ``logit``.
    """

    def __init__(
        self,
        in_features: int,
        experts: int,
        *,
        local: bool,
        pool: Pool | None = None,
        beta: float = 0.0,
        logit: nn.Parameter | None = None,
    ) -> None:
        super().__init__()
        self.local = nn.Linear(in_features, experts) if local else None
        self.global_ = None if pool is None else nn.Linear(in_features, experts)
        self.pool, self.fixed_beta, self.logit = pool, beta, logit

    @property
    def beta(self) -> float | Tensor:
        """Weight of the global gate, 0..1, if the gate has both parts."""
        return self.fixed_beta if self.logit is None else self.logit.sigmoid()

    def rows(self) -> Tensor:
        return torch.cat([part.weight for part in (self.local, self.global_) if part is not None])

    def forward(self, scores: Tensor) -> Gates:
        u = v = None
        if self.local is not None:
            u = (scores[..., : self.local.out_features] + self.local.bias).softmax(dim=-1)
        if self.global_ is not None and self.pool is not None:
            v = (self.pool(scores[..., -self.global_.out_features :]) + self.global_.bias).softmax(dim=-1)
        if u is not None and v is not None:
            return Gates((1 - self.beta) * u + self.beta * v.unsqueeze(1), u, v)
        weights = u if v is None else v.unsqueeze(1).expand(-1, scores.shape[1], -1)
        assert weights is not None
        return Gates(weights, u, v)

    def extra_repr(self) -> str:
        if self.local is None or self.global_ is None:
            return ""
        return f"beta={torch.as_tensor(self.beta).item():.3f}" + (", learned" if self.logit is not None else "")


class UniformGate(GateModule):
    """g_i = 1/K."""

    nothing: Tensor

    def __init__(self, in_features: int, experts: int) -> None:
        super().__init__()
        self.experts = experts
        self.register_buffer("nothing", torch.empty(0, in_features), persistent=False)

    def rows(self) -> Tensor:
        return self.nothing

    def forward(self, scores: Tensor) -> Gates:
        shape = (*scores.shape[:-1], self.experts)
        return Gates(scores.new_full(shape, 1 / self.experts), None, None)
