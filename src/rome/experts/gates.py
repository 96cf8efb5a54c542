"""How an adapted layer weighs its experts (paper 4.3, Eq. 3-5; the variants of its Table 4).

A gate is split in two so that the layer can read its input once: ``rows`` are weights the layer stacks under its own
(one matrix product gives expert codes and gate scores together), and ``forward`` turns the scores into weights.
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
    """g, (B, T, K): what multiplies the experts (Eq. 5)."""
    local: Tensor | None
    """u, (B, T, K): from each token (Eq. 3); None where the gate has no local part."""
    global_: Tensor | None
    """v, (B, K): from the image (Eq. 4); None where the gate has no global part."""

    def first(self, n: int) -> Gates:
        """Those of the first n images."""
        local, global_ = (None if part is None else part[:n] for part in (self.local, self.global_))
        return Gates(self.weights[:n], local, global_)


@dataclass(frozen=True)
class Layout:
    """How the rows that a layer sees make up an image."""

    windows: int = 1
    """Rows of the batch dimension for each image: the windows of windowed attention."""
    real: tuple[int, ...] = ()
    """Positions, among the tokens of all windows, that hold the image and no padding; empty where all do."""
    prefix: int = 0
    """Class (and register) tokens that stand before the patches."""


PLAIN = Layout()
"""One row of the batch an image, all tokens real, no class token."""


class Gate(Component):
    """Settings of a gate; builds one module for each adapted layer."""

    default_kind = "dual-scale"
    has_global: ClassVar[bool] = True
    """Whether it has a part for the whole image."""

    @property
    def needs_class_token(self) -> bool:
        """Whether it reads a class token."""
        return getattr(self, "pool", None) == "cls"

    @abstractmethod
    def build(self, in_features: int, experts: int, *, block: int, blocks: int, layout: Layout = PLAIN) -> GateModule:
        """The gate of a layer in block number ``block`` of 1..``blocks``."""


class GateModule(nn.Module):
    """Base of the modules that gates build."""

    @abstractmethod
    def rows(self) -> Tensor:
        """(R, d_in): weights whose products with the input are the scores."""

    @abstractmethod
    def forward(self, scores: Tensor) -> Gates:
        """Scores (B, T, R) of whole images to gate weights."""


class DualScale(Gate):
    """Local and global gate, mixed by a coefficient that favours the global one in early blocks (Eq. 3-5).

    beta(l) = sigmoid(s (1 - l/L) - b) with l = 1..L counted in adapted blocks: .841 to .119 for s=4, b=2, L=12.
    """

    kind = "dual-scale"
    s: Number = 4.0
    """How steeply beta falls with depth."""
    b: Number = 2.0
    """Shifts beta down in all layers."""
    coefficient: Literal["adaptive", "inverted", "learned"] = "adaptive"
    """beta(l) as it stands, 1 - beta(l), or a parameter of each layer that starts at beta(l) (Table 4)."""
    pool: Literal["mean", "patches", "cls"] = "mean"
    """What the global gate reads: the mean over all tokens, over all but the class token, or the class token alone."""

    def logit(self, block: int, blocks: int) -> float:
        """What the sigmoid turns into beta(l)."""
        logit = self.s * (1 - block / blocks) - self.b
        return -logit if self.coefficient == "inverted" else logit

    def beta(self, block: int, blocks: int) -> float:
        """The share of the global gate in that block; where it is learned, at the start."""
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
    """Scores of the tokens (B, T, R) to the score of the image (B, R)."""

    real: Tensor | None

    def __init__(self, which: str, layout: Layout) -> None:
        super().__init__()
        self.which, self.first = which, layout.prefix if which == "patches" else 0
        self.register_buffer("real", positions(layout), persistent=False)

    @property
    def span(self) -> tuple[int, int | None] | None:
        """The first token read and the one behind the last (None for the end); None where they are not in a row."""
        if self.which == "cls":
            return 0, 1
        return (self.first, None) if self.real is None else None

    def forward(self, scores: Tensor) -> Tensor:
        return scores[:, 0] if self.which == "cls" else select(scores, self.real)[:, self.first :].mean(dim=1)


def positions(layout: Layout) -> Tensor | None:
    """The positions of the real tokens as an index, int64; None where all are."""
    return torch.tensor(layout.real) if layout.real else None


def select(values: Tensor, real: Tensor | None) -> Tensor:
    """(B, T, ...) at the real tokens."""
    return values if real is None else values.index_select(1, real)


class SoftmaxGate(GateModule):
    """g_i = (1 - beta) u_i + beta v, where u_i = softmax(local(h_i)), v = softmax(global(mean_i h_i)); or one of both.

    ``local`` and ``global_`` are Linear(d_in, K) with bias, or None. The mean over all T tokens, the class token among
    them, is taken after the product, which is the same because the product is linear. beta is a constant, or the
    sigmoid of a parameter ``logit``.
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
        """The share of the global gate where there are both, 0..1."""
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
