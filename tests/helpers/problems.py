"""What many tests share: images, problems and noise of their own, and ways to look at a model or to list cases."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from rome.core.randomness import Stream

RADII = {"L1": 1.5, "L2": 0.6, "Linf": 0.1}


class Digits(NamedTuple):
    """scikit-learn's 8x8 digits in [0, 1]: images (N, 1, 8, 8) and labels (N,)."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


class Problem(NamedTuple):
    """A nonlinear float64 classifier, images with some pixels at a bound, and its own predictions as labels."""

    model: nn.Module
    x: Tensor
    y: Tensor

    def __call__(self, n: int) -> tuple[nn.Module, Tensor, Tensor]:
        return self.model, self.x[:n], self.y[:n]


class FixedNoise(Stream):
    """A stream whose draws are rows of a given tensor, so that a run on some rows sees the noise of a run on all."""

    def __init__(self, noise: Tensor) -> None:
        super().__init__(torch.Generator())
        object.__setattr__(self, "noise", noise)

    def uniform(self, shape: torch.Size | tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
        assert tuple(shape) == tuple(self.noise.shape)
        return self.noise.to(device)


def rest_slow(values: Iterable[Any], quick: int) -> list[Any]:
    """Values of a parametrized test (of a mapping its values, with its keys as ids): the first few as they are, the
    others marked slow, where they are further combinations of what the first ones cover."""
    items = list(values.items()) if isinstance(values, Mapping) else [(None, value) for value in values]
    slow = [pytest.mark.slow]
    return [
        pytest.param(*(value if type(value) is tuple else (value,)), id=name, marks=slow if i >= quick else ())
        for i, (name, value) in enumerate(items)
    ]


@contextmanager
def case(*values: object) -> Iterator[None]:
    """For a test that goes through many values: an error names those it met."""
    try:
        yield
    except BaseException as error:
        error.add_note(f"with {', '.join(map(str, values))}")
        raise


class Calls(NamedTuple):
    """What a model was asked: one batch of images per forward, one batch size per backward."""

    forwards: list[Tensor]
    backwards: list[int]


@contextmanager
def recorded(model: nn.Module) -> Iterator[Calls]:
    """Record the forwards of a module and the backwards through its output."""
    calls = Calls([], [])

    def seen(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        calls.forwards.append(args[0].detach().clone())
        if out.requires_grad:
            out.register_hook(lambda g: calls.backwards.append(len(g)))

    handle = model.register_forward_hook(seen)
    try:
        yield calls
    finally:
        handle.remove()
