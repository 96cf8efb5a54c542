"""Methods: they turn a batch and some threats into a loss."""

from rome.methods.base import Method, Outcome, Setting
from rome.methods.mixing import Average, Maximum, Random
from rome.methods.pat import PAT, VR

__all__ = ["PAT", "VR", "Average", "Maximum", "Method", "Outcome", "Random", "Setting"]
