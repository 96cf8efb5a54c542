"""Launchers, which run the jobs of a command: one file each, selected by ``kind``."""

from rome.runs.launchers.base import Handle, Job, Launcher, chosen_launcher, require_done
from rome.runs.launchers.local import Local
