"""The paper's figures, for any runs: ``rome figures``."""

from rome.report.figures import densities, outputs, routing, separability  # each registers its figures
from rome.report.figures.base import Options, PaperFigure, registered
from rome.report.figures.files import write_figures
from rome.report.figures.regions import RegionMaps
from rome.report.figures.sensitivity import Sensitivity
from rome.report.figures.training import TrainingTime

__all__ = ["Options", "PaperFigure", "RegionMaps", "Sensitivity", "TrainingTime", "registered", "write_figures"]
