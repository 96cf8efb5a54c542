"""Named random streams that do not depend on how the work is split.

Every draw is made for the global batch and each process keeps its own rows, so two processes see the numbers that one
process with the same global batch sees. A seed and a name determine a stream, so checkpoints need not store it.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


def derive_seed(seed: int, *names: object) -> int:
    """A 63-bit seed for a named purpose, the same on every machine."""
    text = ":".join(map(str, (seed, *names)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


@dataclass(frozen=True)
class Stream:
    """A source of random numbers shared by ``world`` processes; this process has number ``rank``."""

    generator: torch.Generator
    rank: int = 0
    world: int = 1

    def uniform(self, shape: torch.Size | tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
        """Numbers from U[0, 1) of this shape, whose first dimension is the number of this process's examples."""
        rows = shape[0]
        draw = torch.rand((rows * self.world, *shape[1:]), generator=self.generator, device=self.generator.device)
        return draw[self.rank * rows : (self.rank + 1) * rows].to(device, non_blocking=True)

    def by_image(self, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Numbers from U[0, 1) of shape (B, *shape) that depend only on this stream's seed and on the image itself, not
        on the other images of the batch or on their order. Equal images get equal numbers."""
        seed = self.generator.initial_seed()
        seeds = [derive_seed(seed, hashlib.sha256(image.numpy().tobytes()).hexdigest()) for image in x.detach().cpu()]
        draws = [torch.rand(shape, generator=torch.Generator().manual_seed(own)) for own in seeds]
        return torch.stack(draws).to(x.device, non_blocking=True) if draws else x.new_empty((0, *shape))

    def number(self) -> float:
        """A number from U[0, 1), the same in every process."""
        return float(torch.rand((), generator=self.generator, device=self.generator.device, dtype=torch.float64))

    def permutation(self, n: int) -> Tensor:
        """A random order of 0..n-1, the same in every process; int64 (n,) on the CPU."""
        return torch.randperm(n, generator=self.generator, device=self.generator.device).cpu()


def stream(seed: int, name: str, *, rank: int = 0, world: int = 1, device: torch.device | str = "cpu") -> Stream:
    """Return a new stream for a named purpose."""
    return Stream(torch.Generator(device=device).manual_seed(derive_seed(seed, name)), rank, world)


def cuda_in_use() -> list[int]:
    """Indices of the GPUs whose random state a global seed would change; empty until this process uses CUDA."""
    started = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return list(range(torch.cuda.device_count())) if started else []


@contextmanager
def unchanged_states() -> Iterator[None]:
    """Restore all global random states (torch, numpy and Python) afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=cuda_in_use()):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
