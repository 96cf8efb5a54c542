"""Where the numbers of trainings and evaluations can be followed: a file each, found by its ``kind``."""

from rome.runs.loggers.base import Logger, Loggers, Tracked, Tracking, Writer, tracking
from rome.runs.loggers.tensorboard import TensorBoard
