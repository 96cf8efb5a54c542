"""Attacks: they search inside a threat for images that raise the model's loss."""

from rome.attacks.apgd import APGD
from rome.attacks.autoattack import APGDCE, APGDT, FABT, Square
from rome.attacks.base import Attack, Found
from rome.attacks.misrouting import GMA
from rome.attacks.patch import Patch
from rome.attacks.pgd import PGD
from rome.attacks.recolor import ReColorAdv
from rome.attacks.sparsefool import SparseFool
from rome.attacks.stadv import StAdv

__all__ = [
    "APGD",
    "APGDCE",
    "APGDT",
    "FABT",
    "GMA",
    "PGD",
    "Attack",
    "Found",
    "Patch",
    "ReColorAdv",
    "SparseFool",
    "Square",
    "StAdv",
]
