"""rome: image classifiers that are robust to several perturbations at once.

Robust Mixture of Low-Rank Experts (RoME, ECCV 2026) and the methods it builds on, under one protocol. The command line
is ``rome``; these are the names for Python.
"""

from rome.attacks import APGD, PGD, Attack, FastLPA
from rome.config import Config, load
from rome.errors import UserError
from rome.evaluate import Report, evaluate
from rome.experts import Diversification, DualScale, LowRank, add_experts, record_gates
from rome.methods import Method
from rome.models import create_model, load_experts, load_model, save_experts, save_model
from rome.threats import CIFAR10, DIGITS, IMAGENET, LpBall, Perceptual, PerExample, Threat
from rome.train import train

__version__ = "0.1.0"

__all__ = [
    "APGD",
    "CIFAR10",
    "DIGITS",
    "IMAGENET",
    "PGD",
    "Attack",
    "Config",
    "Diversification",
    "DualScale",
    "FastLPA",
    "LowRank",
    "LpBall",
    "Method",
    "PerExample",
    "Perceptual",
    "Report",
    "Threat",
    "UserError",
    "__version__",
    "add_experts",
    "create_model",
    "evaluate",
    "load",
    "load_experts",
    "load_model",
    "record_gates",
    "save_experts",
    "save_model",
    "train",
]
