"""rome: image classifiers that are robust to several perturbations at once.

Robust Mixture of Low-Rank Experts (RoME, ECCV 2026) and the methods it builds on, under one protocol. The command line
is ``rome``; these are the names for Python. They are imported when first used, so that ``rome --help`` need not wait
for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rome.attacks import APGD, PGD, Attack, AttackThreat, FastLPA
    from rome.core.errors import UserError
    from rome.evaluation.evaluate import Report, evaluate
    from rome.experts import Diversification, DualScale, LowRank, add_experts, record_gates
    from rome.methods import Method
    from rome.models import create_model, load_experts, load_model, save_experts, save_model
    from rome.runs.config import Config, load
    from rome.threats.lp import CIFAR10, DIGITS, IMAGENET, LpBall, Perceptual, PerExample, Threat
    from rome.training.loop import train

__version__ = "0.1.0"

__all__ = [
    "APGD",
    "CIFAR10",
    "DIGITS",
    "IMAGENET",
    "PGD",
    "Attack",
    "AttackThreat",
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

_HOMES = {
    "attacks": ("APGD", "PGD", "Attack", "AttackThreat", "FastLPA"),
    "runs.config": ("Config", "load"),
    "core.errors": ("UserError",),
    "evaluation.evaluate": ("Report", "evaluate"),
    "experts": ("Diversification", "DualScale", "LowRank", "add_experts", "record_gates"),
    "methods": ("Method",),
    "models": ("create_model", "load_experts", "load_model", "save_experts", "save_model"),
    "threats.lp": ("CIFAR10", "DIGITS", "IMAGENET", "LpBall", "Perceptual", "PerExample", "Threat"),
    "training.loop": ("train",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
