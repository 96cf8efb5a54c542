"""The paper's figures, for any runs: ``rome figures``."""

from rome.analysis.figures import densities, outputs, routing, separability  # noqa: F401  # each registers its figures
from rome.analysis.figures.base import Options, PaperFigure, registered
from rome.analysis.figures.files import write_figures

__all__ = ["Options", "PaperFigure", "registered", "write_figures"]
