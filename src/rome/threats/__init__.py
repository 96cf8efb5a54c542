"""Threats, the sets of allowed perturbations: Lp balls, perceptual distances, and sets bounded by the attack itself.

Imports nothing from rome except core.
"""

from rome.threats.base import AnyImage as AnyImage
from rome.threats.base import PerExample as PerExample
from rome.threats.base import Threat as Threat
from rome.threats.lp import CIFAR10 as CIFAR10
from rome.threats.lp import DIGITS as DIGITS
from rome.threats.lp import IMAGENET as IMAGENET
from rome.threats.lp import NAMED_BUDGETS as NAMED_BUDGETS
from rome.threats.lp import Budgets as Budgets
from rome.threats.lp import LpBall as LpBall
from rome.threats.lp import Unperturbed as Unperturbed
from rome.threats.lp import budgets as budgets
from rome.threats.lp import labelled as labelled
from rome.threats.perceptual import Perceptual as Perceptual
