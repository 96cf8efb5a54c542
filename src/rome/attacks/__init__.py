"""Attacks: they search inside a threat for images that raise the model's loss.

May import models and what stands below.
"""

from rome.attacks.base import Attack, AttackResult
from rome.attacks.corruptions.attack import Corruption
from rome.attacks.lp.apgd import APGD
from rome.attacks.lp.autoattack import APGDCE, APGDT, FABT, Square
from rome.attacks.lp.gma import GMA
from rome.attacks.lp.pgd import PGD
from rome.attacks.lp.sparsefool import SparseFool
from rome.attacks.perceptual.fast_lpa import FastLPA
from rome.attacks.perceptual.ppgd_lpa import LPA, PPGD
from rome.attacks.threat import AttackThreat
from rome.attacks.transforms.elastic import Elastic
from rome.attacks.transforms.fog import Fog
from rome.attacks.transforms.gabor import Gabor
from rome.attacks.transforms.jpeg import JPEG
from rome.attacks.transforms.patch import Patch
from rome.attacks.transforms.recolor import ReColorAdv
from rome.attacks.transforms.snow import Snow
from rome.attacks.transforms.stadv import StAdv

__all__ = [
    "APGD",
    "APGDCE",
    "APGDT",
    "FABT",
    "GMA",
    "JPEG",
    "LPA",
    "PGD",
    "PPGD",
    "Attack",
    "AttackResult",
    "AttackThreat",
    "Corruption",
    "Elastic",
    "FastLPA",
    "Fog",
    "Gabor",
    "Patch",
    "ReColorAdv",
    "Snow",
    "SparseFool",
    "Square",
    "StAdv",
]
