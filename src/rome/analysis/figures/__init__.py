"""The paper's figures, for any runs: ``rome figures``."""

from rome.analysis.figures import densities, outputs, routing, separability  # noqa: F401  # each registers its figures
from rome.analysis.figures.base import Options, PaperFigure, registered
from rome.analysis.figures.files import write_figures
from rome.analysis.figures.regions import RegionMaps
from rome.analysis.figures.sensitivity import Sensitivity
from rome.analysis.figures.training import TrainingTime

__all__ = ["Options", "PaperFigure", "RegionMaps", "Sensitivity", "TrainingTime", "registered", "write_figures"]
