"""Where the jobs of one command run: a file each, found by its ``kind``."""

from rome.runs.launchers.base import Handle, Job, Launcher, chosen_launcher, require_done
from rome.runs.launchers.local import Local
