"""Experts: low-rank updates beside existing layers, the gates that mix them, the losses that shape the gates."""

from rome.experts.balance import Classification, Importance, LoadBalancing
from rome.experts.conv import MixtureConv2d
from rome.experts.diversity import Diversification, Regularizer
from rome.experts.ffn import MixtureFFN
from rome.experts.gated import Gated, Recorded
from rome.experts.gating import DualScale, Gate, Gates, Global, Layout, Local, Uniform
from rome.experts.inject import Adapters, Experts, FeedForward, LowRank, add_experts
from rome.experts.layers import block_numbers, find_layers, layout_of
from rome.experts.mixture import AdapterLinear, MixtureLinear
from rome.experts.more import ModelMixture, Networks
from rome.experts.recording import GateRecorder, expert_layers, record_gates
from rome.experts.routing import Routing, set_routing

__all__ = [
    "AdapterLinear",
    "Adapters",
    "Classification",
    "Diversification",
    "DualScale",
    "Experts",
    "FeedForward",
    "Gate",
    "GateRecorder",
    "Gated",
    "Gates",
    "Global",
    "Importance",
    "Layout",
    "LoadBalancing",
    "Local",
    "LowRank",
    "MixtureConv2d",
    "MixtureFFN",
    "MixtureLinear",
    "ModelMixture",
    "Networks",
    "Recorded",
    "Regularizer",
    "Routing",
    "Uniform",
    "add_experts",
    "block_numbers",
    "expert_layers",
    "find_layers",
    "layout_of",
    "record_gates",
    "set_routing",
]
