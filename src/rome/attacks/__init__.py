"""Attacks: they search inside a threat for images that raise the model's loss."""

from rome.attacks.apgd import APGD
from rome.attacks.autoattack import APGDCE, APGDT, FABT, Square
from rome.attacks.base import Attack, Found
from rome.attacks.lpa import FastLPA
from rome.attacks.perceptual import LPA, PPGD
from rome.attacks.pgd import PGD

__all__ = ["APGD", "APGDCE", "APGDT", "FABT", "LPA", "PGD", "PPGD", "Attack", "FastLPA", "Found", "Square"]
