"""Experts: low-rank updates beside existing layers, the gates that mix them, the loss that pulls threats apart."""

from rome.experts.diversity import Diversification, Regularizer
from rome.experts.gating import DualScale, Gate, Gates
from rome.experts.inject import Experts, LowRank, add_experts
from rome.experts.mixture import MixtureLinear
from rome.experts.recording import GateRecorder, expert_layers, record_gates

__all__ = [
    "Diversification",
    "DualScale",
    "Experts",
    "Gate",
    "GateRecorder",
    "Gates",
    "LowRank",
    "MixtureLinear",
    "Regularizer",
    "add_experts",
    "expert_layers",
    "record_gates",
]
