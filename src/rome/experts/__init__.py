"""Experts: low-rank updates beside existing layers, the gates that mix them, and losses on the gates.

Imports only from ``rome.core``.
"""

from rome.experts.adapter import AdapterLinear, Adapters
from rome.experts.balance import Classification, Importance, LoadBalancing
from rome.experts.base import Experts
from rome.experts.conv import MixtureConv2d
from rome.experts.ffn import FeedForward, MixtureFFN
from rome.experts.gate_override import Routing, set_routing
from rome.experts.gated import MixtureLayer, Recorded
from rome.experts.gates import DualScale, Gate, Gates, Global, Layout, Local, Uniform
from rome.experts.low_rank import LowRank, MixtureLinear, add_experts
from rome.experts.more import ModelMixture, Networks
from rome.experts.placement import block_numbers, find_layers, layout_of
from rome.experts.recording import GateRecorder, expert_layers, record_gates
from rome.experts.regularizers import Diversification, Regularizer
