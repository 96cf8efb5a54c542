"""Explore runs one image at a time: what an attack changes in the picture, the prediction and the gates."""

from rome.report.explore.explorer import Answer, Explorer, PatchMap, open_explorers
from rome.report.explore.uploads import Shown, read_upload

__all__ = ["Answer", "Explorer", "PatchMap", "Shown", "open_explorers", "read_upload"]
