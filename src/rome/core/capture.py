"""Capturing a function, and replaying it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

WARM_UPS = 3
"""Runs before the capture, in which libraries create their handles and compilers compile."""


class Capture(Protocol):
    """A way to capture a function without arguments."""

    def __call__(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Return a function that replays it, and its results, which each replay overwrites."""


class CudaCapture:
    """Capture into CUDA graphs that share a memory pool: results are valid until another of them is replayed."""

    def __init__(self) -> None:
        self.pool: Any = None

    def __call__(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            results = function()
        self.pool = graph.pool()
        return graph.replay, results


class Captured:
    """A captured function, to be replayed on other tensors of the same shapes."""

    def __init__(self, capture: Capture, function: Callable[..., Any], *tensors: Tensor) -> None:
        self.inputs = [tensor.detach().clone() for tensor in tensors]
        self.replay, self.results = capture(lambda: function(*self.inputs))

    def __call__(self, *tensors: Tensor) -> Any:
        """Return the graph's own results, not copies: they are valid until the next replay of any graph."""
        for own, new in zip(self.inputs, tensors, strict=True):
            own.copy_(new)
        self.replay()
        return self.results


class CapturedWithGradient:
    """A captured function of one tensor, together with its captured gradient."""

    def __init__(self, capture: Capture, function: Callable[[Tensor], Tensor], x: Tensor) -> None:
        self.x = x.detach().clone().requires_grad_()
        with torch.enable_grad():
            self.forward, self.answer = capture(lambda: function(self.x))
        self.d_answer = torch.ones_like(self.answer)
        self.backward, (self.d_x,) = capture(
            lambda: torch.autograd.grad(self.answer, self.x, self.d_answer, retain_graph=True)
        )

    def __call__(self, x: Tensor) -> Any:
        return Replay.apply(x, self)


class Replay(torch.autograd.Function):
    """Autograd function that replays the captured forward and backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, both: CapturedWithGradient) -> Tensor:
        ctx.both = both
        both.x.copy_(x)
        both.forward()
        return both.answer.detach().clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_answer: Tensor) -> Any:
        ctx.both.d_answer.copy_(d_answer)
        ctx.both.backward()
        return ctx.both.d_x.clone(), None
