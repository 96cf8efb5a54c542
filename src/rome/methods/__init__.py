"""Training methods, which turn a batch and some threats into a loss.

May import attacks and the packages below it.
"""

from rome.methods.base import Method, MinMaxMethod, Outcome, PlannedMethod, TrainContext
from rome.methods.eat import EAT
from rome.methods.mixing import Average, Maximum, Random
from rome.methods.more import MORE
from rome.methods.msd import MSD
from rome.methods.pat import PAT, VR
from rome.methods.ramp import RAMP
