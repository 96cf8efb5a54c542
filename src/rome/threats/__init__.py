"""Which perturbations are allowed: Lp balls, perceptual distances, and what an attack bounds by itself.

Imports nothing of rome but core.
"""

from rome.threats.base import AnyImage, PerExample, Threat
from rome.threats.lp import CIFAR10, DIGITS, IMAGENET, NAMED_BUDGETS, Budgets, LpBall, Unperturbed, budgets
from rome.threats.perceptual import Perceptual

__all__ = [
    "CIFAR10",
    "DIGITS",
    "IMAGENET",
    "NAMED_BUDGETS",
    "AnyImage",
    "Budgets",
    "LpBall",
    "PerExample",
    "Perceptual",
    "Threat",
    "Unperturbed",
    "budgets",
]
