"""Attacks search inside a threat for images that raise the model's loss.

This package may import models and the packages below it.
"""

from rome.attacks.base import Attack as Attack
from rome.attacks.base import AttackResult as AttackResult
from rome.attacks.corruptions.attack import Corruption as Corruption
from rome.attacks.lp.apgd import APGD as APGD
from rome.attacks.lp.autoattack import APGDCE as APGDCE
from rome.attacks.lp.autoattack import APGDT as APGDT
from rome.attacks.lp.autoattack import FABT as FABT
from rome.attacks.lp.autoattack import Square as Square
from rome.attacks.lp.gma import GMA as GMA
from rome.attacks.lp.pgd import PGD as PGD
from rome.attacks.lp.sparsefool import SparseFool as SparseFool
from rome.attacks.perceptual.fast_lpa import FastLPA as FastLPA
from rome.attacks.perceptual.ppgd_lpa import LPA as LPA
from rome.attacks.perceptual.ppgd_lpa import PPGD as PPGD
from rome.attacks.threat import AttackThreat as AttackThreat
from rome.attacks.transforms.elastic import Elastic as Elastic
from rome.attacks.transforms.fog import Fog as Fog
from rome.attacks.transforms.gabor import Gabor as Gabor
from rome.attacks.transforms.jpeg import JPEG as JPEG
from rome.attacks.transforms.patch import Patch as Patch
from rome.attacks.transforms.recolor import ReColorAdv as ReColorAdv
from rome.attacks.transforms.snow import Snow as Snow
from rome.attacks.transforms.stadv import StAdv as StAdv
