"""A stand-in for CUDA graphs that runs on a CPU: it records the operations of a function and runs them again.

Like a graph it replays operations alone, on the tensors where they lay, and nothing that Python decides in between; and
like a capture it refuses what waits for results.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise RuntimeError("operation not permitted when stream is capturing")
        results = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, results))
        return results


class Replay:
    """A :class:`rome.core.graphs.Capture`; counts what it captured and how often that was replayed."""

    def __init__(self, *, fail: str = "") -> None:
        self.fail, self.captures, self.replays = fail, 0, 0

    def __call__(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        function()  # the warm-up
        if self.fail:
            raise RuntimeError(self.fail)
        with _Recorder() as recorder:
            results = function()
        self.captures += 1

        def replay() -> None:
            self.replays += 1
            with torch.no_grad(), torch.autocast("cpu", enabled=False):  # what it casts, it cast when recorded
                for func, args, kwargs, results in recorder.calls:
                    again = func(*args, **kwargs)
                    for old, new in zip(tree_leaves(results), tree_leaves(again), strict=True):
                        if isinstance(old, Tensor) and old.numel() and old.data_ptr() != new.data_ptr():
                            old.copy_(new)

        return replay, results
