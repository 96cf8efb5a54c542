"""rome: image classifiers that are robust to several perturbations at once.

Robust Mixture of Low-Rank Experts (RoME, ECCV 2026) and the methods it builds on, under one protocol. The command line
is ``rome``; the Python API is listed in ``__init__.pyi`` and imported on first use, so that ``rome --help`` does not
wait for torch.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
