"""Functions of tensors that are captured as CUDA graphs and replayed.

A forward and backward are hundreds of kernels, and for small images a GPU runs most of them in less time than it takes
to launch them. A CUDA graph holds all of them with their addresses, and one launch replays them, to the same bits.

A graph replays kernels alone: what Python decides and whatever the host computes stays as it was at the capture. So a
function that is captured depends on nothing but the tensors it gets, on weights that stay where they are in memory, and
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
from rome.core.capture import Both, Capture, Captured, CudaCapture
from rome.core.console import say
from rome.core.device import out_of_memory
from rome.core.errors import UserError, first_line
from rome.core.randomness import cuda_in_use

LIMIT = 32
"""Graphs at most: each holds buffers of its inputs and results, and all share one pool for what is between."""
AGAIN = "again"
"""In place of a reason: to be watched once more."""
FREE = 0.3
"""Share of the device's memory that graphs leave free: what they hold is not there for anything else."""


class Graphs:
    """The captured functions of one model on one device.

    A function runs as it is when its key and shapes are met for the first time, watched for what no graph can hold; the
    second time it is captured, and from then on replayed. What cannot be captured goes on as it is, and one line says
    why.

    Args:
        whole: also capture whole searches, and not only a single call of the model: worth it where the same search is
            made again and again, as in training.
        rows: batches are padded to a multiple of this many examples, so that few shapes occur; 1: they are not.
        capture: for tests without a GPU.
    """

    def __init__(
        self, *, whole: bool = True, rows: int = 1, limit: int = LIMIT, capture: Capture | None = None
    ) -> None:
        self.whole, self.rows, self.limit = whole, rows, limit
        self.capture: Capture = capture or CudaCapture()
        self.fixed: dict[Hashable, Tensor] = {}
        """Tensors computed of the weights, which lie where the graphs read them."""
        self.parameters: list[Tensor] = []
        self.buffers: list[Tensor] = []
        self.refresh: Callable[[], Any] = lambda: None
        """Fills :attr:`fixed` anew, where the model is frozen."""
        self.ready = False
        """Whether the model is frozen."""
        self.seconds = 0.0
        """Time that captures took."""
        self._entries: dict[Hashable, Captured | Both | str] = {}
        """By key and shapes: the graph, or why there is none; empty: there can be one."""
        self._addresses: Hashable = None
        """Where the weights lie that the graphs read."""
        self._state: Hashable = None
        self._inside = False
        self._said: set[str] = set()
        self._reported = 0

    @property
    def count(self) -> int:
        """Graphs so far."""
        return sum(not isinstance(entry, str) for entry in self._entries.values())

    def call(
        self,
        key: Hashable,
        function: Callable[..., Any],
        *tensors: Tensor,
        changed: Iterable[Tensor] = (),
        in_place: bool = False,
    ) -> Any:
        """``function(*tensors)``, replayed if it can be.

        Args:
            key: with the tensors' shapes, whatever the function depends on beside the tensors and the model's state.
            function: of tensors on the device; gives tensors in any nesting of tuples, lists and dicts. Numbers from
                the device's default generator are drawn as without a graph.
            changed: tensors that the function changes, such as running statistics.
            in_place: give the graph's own results, which last until the next call, instead of copies.
        """
        entry, results = self._entry(key, function, tensors, Captured, list(changed))
        if entry is None:
            return results
        results = entry(*tensors)
        return results if in_place else copies(results)

    def captured(self, key: Hashable, *tensors: Tensor) -> Captured | None:
        """The graph of a function that was called so, if there is one."""
        entry = self._entries.get(self._place(key, tensors))
        return entry if isinstance(entry, Captured) else None

    def differentiable(self, key: Hashable, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """``function(x)``, to be differentiated with respect to ``x`` before the next call: forward and backward are a
        graph each."""
        entry, answer = self._entry(("both", key), function, (x,), Both, [])
        return answer if entry is None else entry(x)

    @contextmanager
    def on(self, parameters: list[Tensor], buffers: list[Tensor], state: Hashable) -> Iterator[None]:
        """Inside, no weight of the model changes.

        Args:
            parameters, buffers: the model's; the graphs are gone if these lie elsewhere than where they read them.
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
        """Where the copy of a weight in another ``dtype`` or ``memory_format`` lies."""
        key = (weight.data_ptr(), weight.shape, *form.items())
        if key not in self.fixed:
            self.fixed[key] = torch.empty_like(weight, **form)
        return self.fixed[key]

    def release(self) -> None:
        """Drop all graphs and their memory."""
        self._entries.clear()
        self.fixed.clear()
        self._addresses = None

    def news(self) -> str:
        """One line on the graphs captured since the last call; empty if there are none."""
        if self.count == self._reported:
            return ""
        self._reported = self.count
        held = f", {torch.cuda.memory_reserved() / 2**30:.1f} GiB reserved in all" if cuda_in_use() else ""
        return f"{self.count} CUDA graphs, captured in {self.seconds:.1f} s{held}"

    def _entry(
        self, key: Hashable, function: Callable[..., Any], tensors: tuple[Tensor, ...], kind: Any, changed: list[Tensor]
    ) -> tuple[Any, Any]:
        """What replays the function, or None and its results."""
        if self._inside:
            return None, function(*tensors)
        place = self._place(key, tensors)
        entry = self._entries.get(place)
        if entry is None or entry == AGAIN:
            results, reason, waited = self._watched(function, tensors, changed)
            # a library may wait when it is used for the first time
            self._entries[place] = AGAIN if entry is None and waited and not reason else reason or waited
            self._say_once("" if self._entries[place] == AGAIN else reason or waited)
            return None, results
        if entry == "":
            entry = self._entries[place] = self._captured(kind, function, tensors, changed)
        return (None, function(*tensors)) if isinstance(entry, str) else (entry, None)

    def _place(self, key: Hashable, tensors: tuple[Tensor, ...]) -> Hashable:
        return key, self._state, _modes(tensors), tuple((t.shape, t.stride(), t.dtype) for t in tensors)

    def _watched(
        self, function: Callable[..., Any], tensors: tuple[Tensor, ...], changed: list[Tensor]
    ) -> tuple[Any, str, str]:
        """The function's results, why no graph can hold it, and where it waited."""
        before = [tensor.detach().clone() for tensor in changed]
        try:
            with self._alone(), watched() as watch:
                results = function(*tensors)
        except Exception as error:  # of the function itself, or of being watched
            _restore(changed, before)
            with self._alone():
                return function(*tensors), first_line(error), ""
        return results, watch.reason, watch.waited

    def _captured(
        self, kind: Any, function: Callable[..., Any], tensors: tuple[Tensor, ...], changed: list[Tensor]
    ) -> Any:
        """The function as a graph, or why there is none."""
        if self.count >= self.limit:
            reason = f"there are {self.limit} graphs already, of as many shapes"
            self._say_once(reason)
            return reason

        def fresh(*tensors: Tensor) -> Any:
            torch.clear_autocast_cache()  # weights that were cast in a warm-up would not be cast in the graph
            return function(*tensors)

        started = time.perf_counter()
        before = [tensor.detach().clone() for tensor in changed]

        def tried(run: Callable[..., Any]) -> Any:
            with torch.random.fork_rng(devices=cuda_in_use()):
                results = _probed(run, tensors) if kind is Both else copies(run(*tensors))
            _restore(changed, before)
            return results

        try:
            with self._alone(), torch.random.fork_rng(devices=cuda_in_use()):
                entry = kind(self.capture, fresh, *tensors)
            _restore(changed, before)
            with self._alone():
                usual, replayed = tried(fresh), tried(entry)
                # where the device itself sums in another order each time, no two runs are the same
                if not _same(usual, replayed) and _same(usual, tried(fresh)):
                    raise RuntimeError("its replay gave other results than its first run")
            if _crowded():
                raise torch.OutOfMemoryError
            return entry
        except UserError:
            raise
        except Exception as error:
            reason = "memory does not suffice for a graph" if out_of_memory(error) else first_line(error)
            self._say_once(reason)
            return reason
        finally:
            torch.clear_autocast_cache()  # what the graph casts has no values before its replay
            _restore(changed, before)
            self.seconds += time.perf_counter() - started

    @contextmanager
    def _alone(self) -> Iterator[None]:
        self._inside = True
        try:
            yield
        finally:
            self._inside = False

    def _say_once(self, reason: str) -> None:
        if reason and reason not in self._said:
            self._said.add(reason)
            say(f"without a CUDA graph, which takes longer: {reason}")


def _crowded() -> bool:
    """Whether less than :data:`FREE` of the device's memory is free, or could be."""
    if not cuda_in_use():
        return False
    free, whole = torch.cuda.mem_get_info()
    return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated() < FREE * whole


def copies(results: Any) -> Any:
    """The same nesting with copies of its tensors; what was one tensor is one copy."""
    made: dict[int, Tensor] = {}

    def copy(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) not in made:
            made[id(leaf)] = leaf.detach().clone()
        return made[id(leaf)]

    return tree_map(copy, results)


def _probed(run: Callable[[Tensor], Tensor], tensors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """A function's answer, and the gradient of its sum."""
    x = tensors[0].detach().requires_grad_()
    with torch.enable_grad():
        answer = run(x)
    return answer.detach(), torch.autograd.grad(answer.sum(), x)[0]


def _restore(tensors: list[Tensor], values: list[Tensor]) -> None:
    with torch.no_grad():
        for tensor, value in zip(tensors, values, strict=True):
            tensor.copy_(value)


def _same(one: Any, other: Any) -> bool:
    """Equal to the last bit, tensor by tensor; NaN equals NaN."""
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
