"""Functions of tensors that are captured as CUDA graphs and replayed.

A forward and backward pass consists of hundreds of kernels, and for small images a GPU runs most of them in less time
than it takes to launch them. A CUDA graph contains all of them with their addresses, and one launch replays them with
bitwise identical results.

A graph replays only kernels: decisions made in Python and values computed on the host stay as they were at the capture.
So a captured function may depend only on the tensors passed to it, on weights that stay where they are in memory, and
on its key.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from rome.core.capturable import watched
from rome.core.capture import Capture, Captured, CapturedWithGradient, CudaCapture
from rome.core.console import say
from rome.core.device import out_of_memory
from rome.core.errors import UserError, first_line
from rome.core.randomness import cuda_in_use

LIMIT = 32
"""Maximum number of graphs: each has buffers for its inputs and results; all share one pool for intermediate values."""
AGAIN = "again"
"""Entry of a function that is to be watched once more, in place of a reason."""
FREE = 0.3
"""Share of the device's memory that graphs leave free: nothing else can use the memory that they hold."""


class Graphs:
    """The captured functions of one model on one device.

    The first call with a key and shapes runs the function normally, watching for operations that no graph can contain;
    the second call captures it, and later calls replay it. A function that cannot be captured keeps running normally,
    and one line says why.

    Args:
        whole_searches: capture whole searches, too, not only single calls of the model: worthwhile if the same search
            is made many times, as in training.
        rows: pad batches to a multiple of this many examples, so that few shapes occur; 1: no padding.
        limit: maximum number of graphs.
        capture: a substitute for CUDA graphs, for tests without a GPU.
    """

    def __init__(
        self, *, whole_searches: bool = True, rows: int = 1, limit: int = LIMIT, capture: Capture | None = None
    ) -> None:
        self.whole_searches, self.rows, self.limit = whole_searches, rows, limit
        self.capture: Capture = capture or CudaCapture()
        self.fixed: dict[Hashable, Tensor] = {}
        """Tensors computed from the weights, at the addresses where the graphs read them."""
        self.parameters: list[Tensor] = []
        self.buffers: list[Tensor] = []
        self.refresh: Callable[[], Any] = lambda: None
        """Recomputes :attr:`fixed` while the model is frozen."""
        self.ready = False
        """Whether the model is frozen."""
        self.seconds = 0.0
        """Total duration of the captures."""
        self._entries: dict[Hashable, Captured | CapturedWithGradient | str] = {}
        """By key and shapes: the graph, or the reason why there is none; empty: ready to be captured."""
        self._addresses: Hashable = None
        """Addresses of the weights that the graphs read."""
        self._state: Hashable = None
        self._running = False
        """Whether a function is being watched or captured; calls inside it run normally."""
        self._said: set[str] = set()
        self._reported = 0

    @property
    def count(self) -> int:
        """Number of graphs so far."""
        return sum(not isinstance(entry, str) for entry in self._entries.values())

    def call(
        self,
        key: Hashable,
        function: Callable[..., Any],
        *tensors: Tensor,
        changed: Iterable[Tensor] = (),
        in_place: bool = False,
    ) -> Any:
        """Return ``function(*tensors)``, replayed if possible.

        Args:
            key: identifies, with the tensors' shapes, everything that the function depends on besides the values of the
                tensors and the model's state.
            function: takes tensors on the device and returns tensors in any nesting of tuples, lists and dicts. It
                draws the same numbers from the device's default generator as without a graph.
            changed: tensors that the function modifies, such as running statistics.
            in_place: return the graph's own results, which are valid until the next call, instead of copies.
        """
        entry, results = self._entry(key, function, tensors, Captured, changed)
        if entry is None:
            return results
        results = entry(*tensors)
        return results if in_place else copies(results)

    def replays(self, key: Hashable, *tensors: Tensor) -> bool:
        """Whether a call with this key and these shapes is replayed, or may be from the third such call on."""
        entry = self._entries.get(self._place(key, tensors), "")
        return not isinstance(entry, str) or entry in ("", AGAIN)

    def captured(self, key: Hashable, *tensors: Tensor) -> Captured | None:
        """The graph of a function that was called with this key and these shapes, if there is one."""
        entry = self._entries.get(self._place(key, tensors))
        return entry if isinstance(entry, Captured) else None

    def differentiable(self, key: Hashable, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Return ``function(x)``, which must be differentiated with respect to ``x`` before the next call. Forward and
        backward are one graph each."""
        entry, answer = self._entry(("both", key), function, (x,), CapturedWithGradient, ())
        return answer if entry is None else entry(x)

    @contextmanager
    def on(self, parameters: list[Tensor], buffers: list[Tensor], state: Hashable) -> Iterator[None]:
        """Use the graphs for a model whose weights do not change inside.

        Args:
            parameters, buffers: those of the model; if their addresses have changed, the graphs are dropped.
            state: settings of the model that the captured functions depend on.
        """
        self.parameters, self.buffers = parameters, buffers
        addresses = tuple(tensor.data_ptr() for tensor in (*parameters, *buffers))
        if addresses != self._addresses:
            self.release()
        self._addresses, self._state, self.ready = addresses, state, True
        try:
            yield
        finally:
            self.ready = False

    def buffer(self, weight: Tensor, **form: Any) -> Tensor:
        """The buffer for a copy of a weight in another ``dtype`` or ``memory_format``."""
        key = (weight.data_ptr(), weight.shape, *form.items())
        if key not in self.fixed:
            self.fixed[key] = torch.empty_like(weight, **form)
        return self.fixed[key]

    def release(self) -> None:
        """Drop all graphs and free their memory."""
        self._entries.clear()
        self.fixed.clear()
        self._addresses = None

    def news(self) -> str:
        """One line on all graphs; empty if none was captured since the last call."""
        if self.count == self._reported:
            return ""
        self._reported = self.count
        held = f", {torch.cuda.memory_reserved() / 2**30:.1f} GiB reserved in all" if cuda_in_use() else ""
        return f"{self.count} CUDA graphs, captured in {self.seconds:.1f} s{held}"

    def _entry(
        self,
        key: Hashable,
        function: Callable[..., Any],
        tensors: tuple[Tensor, ...],
        kind: Any,
        changed: Iterable[Tensor],
    ) -> tuple[Any, Any]:
        """The captured function and None, or None and the function's results."""
        if self._running:
            return None, function(*tensors)
        place = self._place(key, tensors)
        entry = self._entries.get(place)
        if entry is None or entry == AGAIN:
            results, reason, waited = self._watched(function, tensors, list(changed))
            # a library may wait for the device when it is first used
            self._entries[place] = AGAIN if entry is None and waited and not reason else reason or waited
            self._say_once("" if self._entries[place] == AGAIN else reason or waited)
            return None, results
        if entry == "":
            entry = self._entries[place] = self._captured(kind, function, tensors, list(changed))
        return (None, function(*tensors)) if isinstance(entry, str) else (entry, None)

    def _place(self, key: Hashable, tensors: tuple[Tensor, ...]) -> Hashable:
        return key, self._state, _modes(tensors), tuple((t.shape, t.stride(), t.dtype) for t in tensors)

    def _watched(
        self, function: Callable[..., Any], tensors: tuple[Tensor, ...], changed: list[Tensor]
    ) -> tuple[Any, str, str]:
        """The function's results, why no graph can contain it, and where it waited for the device."""
        before = [tensor.detach().clone() for tensor in changed]
        try:
            with self._without_graphs(), watched() as watch:
                results = function(*tensors)
        except Exception as error:  # raised by the function itself, or caused by watching it
            _restore(changed, before)
            with self._without_graphs():
                return function(*tensors), first_line(error), ""
        return results, watch.reason, watch.waited

    def _captured(
        self, kind: Any, function: Callable[..., Any], tensors: tuple[Tensor, ...], changed: list[Tensor]
    ) -> Any:
        """The function as a graph, or the reason why there is none."""
        if self.count >= self.limit:
            reason = f"there are already {self.limit} graphs, for as many shapes"
            self._say_once(reason)
            return reason

        def fresh(*tensors: Tensor) -> Any:
            torch.clear_autocast_cache()  # or the graph would lack the casts of weights done in a warm-up
            return function(*tensors)

        started = time.perf_counter()
        before = [tensor.detach().clone() for tensor in changed]

        def attempt(run: Callable[..., Any]) -> Any:
            with torch.random.fork_rng(devices=cuda_in_use()):
                results = _probed(run, tensors) if kind is CapturedWithGradient else copies(run(*tensors))
            after = copies(changed)
            _restore(changed, before)
            return results, after

        def differs(entry: Callable[..., Any]) -> bool:
            usual, replayed = attempt(fresh), attempt(entry)
            # if the device sums in a different order each time, no two runs are equal
            return not _same(usual, replayed) and _same(usual, attempt(fresh))

        try:
            with self._without_graphs(), torch.random.fork_rng(devices=cuda_in_use()):
                entry = kind(self.capture, fresh, *tensors)
            _restore(changed, before)
            with self._without_graphs():
                if differs(entry):
                    raise RuntimeError("its replay gave different results from its first run")
            if _crowded():
                raise torch.OutOfMemoryError
            return entry
        except UserError:
            raise
        except Exception as error:
            reason = "not enough memory for a graph" if out_of_memory(error) else first_line(error)
            self._say_once(reason)
            return reason
        finally:
            torch.clear_autocast_cache()  # the graph's casts have no values before its replay
            _restore(changed, before)
            self.seconds += time.perf_counter() - started

    @contextmanager
    def _without_graphs(self) -> Iterator[None]:
        """Run calls inside normally."""
        self._running = True
        try:
            yield
        finally:
            self._running = False

    def _say_once(self, reason: str) -> None:
        if reason and reason not in self._said:
            self._said.add(reason)
            say(f"running without a CUDA graph, which is slower: {reason}")


def _crowded() -> bool:
    """Whether less than :data:`FREE` of the device's memory is free or could be freed."""
    if not cuda_in_use():
        return False
    free, whole = torch.cuda.mem_get_info()
    return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated() < FREE * whole


def copies(results: Any) -> Any:
    """The same nesting with copies of its tensors; a tensor that occurs twice is copied once."""
    made: dict[int, Tensor] = {}

    def copy(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) not in made:
            made[id(leaf)] = leaf.detach().clone()
        return made[id(leaf)]

    return tree_map(copy, results)


def _probed(run: Callable[[Tensor], Tensor], tensors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """A function's result, and the gradient of its sum."""
    x = tensors[0].detach().requires_grad_()
    with torch.enable_grad():
        answer = run(x)
    return answer.detach(), torch.autograd.grad(answer.sum(), x)[0]


def _restore(tensors: list[Tensor], values: list[Tensor]) -> None:
    """Copy the values back into the tensors."""
    with torch.no_grad():
        for tensor, value in zip(tensors, values, strict=True):
            tensor.copy_(value)


def _same(one: Any, other: Any) -> bool:
    """Whether all tensors are equal to the last bit; NaN equals NaN."""
    pairs = zip(tree_leaves(one), tree_leaves(other), strict=True)
    return all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs if isinstance(a, Tensor))


def _modes(tensors: tuple[Tensor, ...]) -> Hashable:
    """The global settings that decide which kernels run."""
    kind = tensors[0].device.type if tensors else "cpu"
    backends: Any = torch.backends
    return (
        torch.is_grad_enabled(),
        torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind),
        backends.cuda.matmul.fp32_precision,
        backends.cudnn.conv.fp32_precision,
    )
