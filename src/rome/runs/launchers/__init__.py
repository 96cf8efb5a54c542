"""Launchers, which decide where the jobs of a command run: one file for each, selected by ``kind``."""

from rome.runs.launchers.base import Handle, Job, Launcher, chosen_launcher, require_done
from rome.runs.launchers.local import Local
