"""A stand-in for CUDA graphs that runs on a CPU: it records the operations of a function and runs them again.

Like a graph it replays operations alone, on the tensors where they lay, and nothing that Python decides in between; and
like a capture it refuses what waits for results.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only


class _Recorder(TorchDispatchMode):
    """Holds aliases of all tensors, so that nothing of autograd stays alive through it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.made: set[int] = set()
        """The memory that operations made."""
        self.read: dict[int, Tensor] = {}
        """What was read from outside, by its memory."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise RuntimeError("operation not permitted when stream is capturing")
        results = func(*args, **(kwargs or {}))
        call = tree_map_only(Tensor, Tensor.detach, (func, args, kwargs or {}, results))
        if func is not torch.ops.aten.lift_fresh.default:  # makes a tensor of Python's numbers
            for tensor in tree_leaves(call[1:3]):
                if isinstance(tensor, Tensor) and tensor.ndim and (memory := memory_of(tensor)) not in self.made:
                    self.read.setdefault(memory, tensor)
        self.made |= {memory_of(leaf) for leaf in tree_leaves(call[3]) if isinstance(leaf, Tensor)} - self.read.keys()
        self.calls.append(call)
        return results

    def outside(self) -> list[tuple[Tensor, int]]:
        """What was read from outside, and how many tensors of the recording lie in its memory."""
        leaves = {id(leaf): leaf for leaf in tree_leaves(self.calls) if isinstance(leaf, Tensor)}
        owners = Counter(map(memory_of, leaves.values()))
        return [(tensor, owners[memory]) for memory, tensor in self.read.items()]


def memory_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class Replay:
    """A :class:`rome.core.graphs.Capture`; counts what it captured and how often that was replayed.

    A graph holds no memory but its own. So a replay that reads memory which nobody else holds any more fails.
    """

    def __init__(self, *, fail: str = "") -> None:
        self.fail, self.captures, self.replays = fail, 0, 0

    def __call__(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        function()  # the warm-up
        if self.fail:
            raise RuntimeError(self.fail)
        with _Recorder() as recorder:
            results = function()
        self.captures += 1
        outside = recorder.outside()

        def replay() -> None:
            self.replays += 1
            for tensor, own in outside:
                storage = tensor.untyped_storage()  # one more owner
                held = torch._C._storage_Use_Count(storage._cdata) > own + 1
                assert held, f"a graph reads memory that is free: {tuple(tensor.shape)}"
            with torch.no_grad(), torch.autocast("cpu", enabled=False):  # what it casts, it cast when recorded
                for func, args, kwargs, results in recorder.calls:
                    again = func(*args, **kwargs)
                    for old, new in zip(tree_leaves(results), tree_leaves(again), strict=True):
                        if isinstance(old, Tensor) and old.numel() and old.data_ptr() != new.data_ptr():
                            old.copy_(new)

        return replay, results
