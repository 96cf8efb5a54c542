"""Detection of operations that no CUDA graph can contain, in a run before the capture."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rome.core.randomness import cuda_in_use


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Dispatch mode that records why no graph can contain the operations run inside it: the first such operation."""

    WAITS = (
        "_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive",
        "bincount",
    )  # fmt: skip

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.reason = ""
        self.waited = ""
        """Where torch itself reports a wait for the device; empty if nowhere."""
        self.devices: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        if not self.reason:
            self.reason = self._why(func._schema.name.partition("::")[2], [args, kwargs or {}], results)
        return results

    def _why(self, name: str, arguments: list[Any], results: Any) -> str:
        leaves = tree_leaves(arguments)
        indices = tree_leaves(arguments[0][1]) if name in ("index", "index_put", "index_put_") else []
        masked = any(isinstance(each, Tensor) and each.dtype in (torch.bool, torch.uint8) for each in indices)
        if name in self.WAITS or masked:
            return f"it waits for the device{_where()}"
        if any(isinstance(leaf, torch.Generator) for leaf in leaves):
            return f"it draws numbers from a generator of its own{_where()}"
        self.devices |= {t.device.type for t in [*leaves, *tree_leaves(results)] if isinstance(t, Tensor) and t.ndim}
        return f"it computes on {' and '.join(sorted(self.devices))}{_where()}" if len(self.devices) > 1 else ""


def _where() -> str:
    """The source line being run: the innermost one outside torch and this file; empty inside torch's backward."""
    packages = (__file__, str(Path(torch.__file__).parent))
    for frame in reversed(traceback.extract_stack()):
        if not frame.filename.startswith(packages):
            return f": {frame.line} ({Path(frame.filename).name}:{frame.lineno})"
    return ""


@contextmanager
def watched() -> Iterator[Watch]:
    """Watch the operations run inside; on CUDA, torch itself reports which of them wait for the device."""
    if not cuda_in_use():
        with Watch() as watch:
            yield watch
        return
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as seen, Watch() as watch:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield watch
        finally:
            torch.cuda.set_sync_debug_mode(before)
    for each in seen:
        if "called a synchronizing CUDA operation" in str(each.message):
            watch.waited = watch.waited or f"it waits for the device ({Path(each.filename).name}:{each.lineno})"
        elif "Synchronization debug mode is a prototype" not in str(each.message):
            warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)
