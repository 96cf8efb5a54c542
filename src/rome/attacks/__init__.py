"""Attacks: they search inside a threat for images that raise the model's loss."""

from rome.attacks.apgd import APGD
from rome.attacks.autoattack import APGDCE, APGDT, FABT, Square
from rome.attacks.base import Attack, Found
from rome.attacks.corruption import Corruption
from rome.attacks.elastic import Elastic
from rome.attacks.fog import Fog
from rome.attacks.gabor import Gabor
from rome.attacks.jpeg import JPEG
from rome.attacks.lpa import FastLPA
from rome.attacks.misrouting import GMA
from rome.attacks.patch import Patch
from rome.attacks.perceptual import LPA, PPGD
from rome.attacks.pgd import PGD
from rome.attacks.recolor import ReColorAdv
from rome.attacks.snow import Snow
from rome.attacks.sparsefool import SparseFool
from rome.attacks.stadv import StAdv
from rome.attacks.threat import AttackThreat

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
    "AttackThreat",
    "Corruption",
    "Elastic",
    "FastLPA",
    "Fog",
    "Found",
    "Gabor",
    "Patch",
    "ReColorAdv",
    "Snow",
    "SparseFool",
    "Square",
    "StAdv",
]
