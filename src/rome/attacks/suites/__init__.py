"""Suites choose the attacks for each threat: AutoAttack, APGD, PGD, unseen threats, corruptions, and lists of these."""

from rome.attacks.suites.base import BATCH_SIZE, Case, SaveImages, SearchPrecision, Suite, name_threats
from rome.attacks.suites.composed import SuiteChoice, as_suite

__all__ = [
    "BATCH_SIZE",
    "Case",
    "SaveImages",
    "SearchPrecision",
    "Suite",
    "SuiteChoice",
    "as_suite",
    "name_threats",
]
