"""Loggers, which record the numbers of a run: one file for each, selected by ``kind``."""

from rome.runs.loggers.base import Logger, Loggers, Tracked, Tracking, Writer, tracking
from rome.runs.loggers.tensorboard import TensorBoard
