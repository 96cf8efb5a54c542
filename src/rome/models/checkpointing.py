"""Activation checkpointing of a model's repeated blocks, which saves memory and costs time."""

from __future__ import annotations

import ctypes
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from rome.core.errors import UserError
from rome.experts.ffn import MixtureFFN
from rome.experts.gated import MixtureLayer, Sink
from rome.models.compiling import repeated_blocks


def checkpoint_blocks(model: nn.Module) -> int:
    """Make a model's repeated blocks store only their inputs in training mode and recompute the rest in the backward
    pass; return the number of blocks.

    Outputs and gradients stay the same: the recomputation draws the same random numbers, records no gates, and leaves
    buffers such as BatchNorm's statistics alone. In evaluation mode, and so in attacks, nothing is recomputed.

    Raises:
        UserError: the model has no repeated blocks.
    """
    blocks = repeated_blocks(model, whole=MixtureFFN)
    if not blocks:
        raise UserError(
            "activation_checkpointing recomputes the repeated blocks of a model, and this one has none: leave it out; "
            "a larger accumulate saves memory too"
        )
    for block in blocks:
        if not isinstance(block, _Checkpointed):
            block.__class__ = _checkpointed_class(type(block))  # type: ignore[arg-type]  # a class can be hashed
    return len(blocks)


class _Checkpointed(nn.Module):
    """Mixin for the class of a block. As part of the class, it also applies to copies of the model, and
    ``block.compile()`` compiles the recomputation."""

    draws = True
    """Whether the latest forward pass drew random numbers."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if not (self.training and torch.is_grad_enabled() and inputs):
            return super().__call__(*args, **kwargs)
        earlier, versions = _EarlierState(self, inputs[0]), [tensor._version for tensor in inputs]
        # random states are saved here, because torch would always read them, which fails while a CUDA graph is
        # captured. Capturing a block that draws random numbers fails; the caller then goes on without a graph
        capturing = inputs[0].is_cuda and torch.cuda.is_current_stream_capturing()
        before = None if capturing and not self.draws else _random_state(inputs[0])
        results = checkpoint(
            super().__call__,
            *args,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=lambda: (nullcontext(), earlier),
            **kwargs,
        )
        if versions != [tensor._version for tensor in inputs]:
            raise UserError(
                f"activation_checkpointing: {type(self).__name__} changes its input in place, so it cannot be "
                "recomputed; leave activation_checkpointing out, or make the block return a new tensor"
            )
        if before is not None:
            self.draws = _bytes(before) != _bytes(_random_state(inputs[0]))
            earlier.random = before if self.draws else None
        return results


@cache
def _checkpointed_class(kind: type[nn.Module]) -> type[nn.Module]:
    return type(kind.__name__, (_Checkpointed, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})


def _random_state(like: Tensor) -> Tensor:
    """State of the default random generator on a tensor's device."""
    return torch.cuda.get_rng_state(like.device) if like.is_cuda else torch.get_rng_state()


def _bytes(state: Tensor) -> bytes:
    """Content of a random state, read without a torch operation, which a recording of the model would include."""
    return ctypes.string_at(state.data_ptr(), state.numel())


def _set_random_state(like: Tensor, state: Tensor) -> None:
    torch.cuda.set_rng_state(state, like.device) if like.is_cuda else torch.set_rng_state(state)


class _EarlierState:
    """Context manager that restores a block's state at the time of its creation, and undoes this at the end."""

    def __init__(self, block: nn.Module, like: Tensor) -> None:
        self.like = like
        self.random: Tensor | None = None
        """Random state at the beginning of the block's forward pass; None if it drew nothing."""
        modules = list(block.modules())
        self.buffers = [
            (module._buffers, name, buffer.clone())
            for module in modules
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        self.sinks = [(module, module.sink) for module in modules if isinstance(module, MixtureLayer)]

    def __enter__(self) -> None:
        self.current = [buffers[name] for buffers, name, _ in self.buffers], [layer.sink for layer, _ in self.sinks]
        for buffers, name, before in self.buffers:
            buffers[name] = before.clone()
        for layer, sink in self.sinks:  # same operations as in the forward pass, but its gates are recorded already
            layer.sink = None if sink is None else Sink(detached=sink.detached)
        if self.random is not None:
            self.current_random = _random_state(self.like)
            _set_random_state(self.like, self.random)

    def __exit__(self, *error: object) -> None:
        current, sinks = self.current
        for (buffers, name, _), buffer in zip(self.buffers, current, strict=True):
            buffers[name] = buffer
        for (layer, _), sink in zip(self.sinks, sinks, strict=True):
            layer.sink = sink
        if self.random is not None:
            _set_random_state(self.like, self.current_random)
