"""Named random streams: the same draw however the work is split."""

from __future__ import annotations

import torch

from rome.core.randomness import stream


def images(n: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


def test_draws_by_image_follow_the_image_wherever_it_stands() -> None:
    x = images(6)
    whole = stream(1, "attack").by_image(x, (2, 5))
    order = torch.tensor([4, 0, 5, 2])
    assert torch.equal(stream(1, "attack").by_image(x[order], (2, 5)), whole[order])
    assert whole.shape == (6, 2, 5)
    assert bool(((whole >= 0) & (whole < 1)).all())


def test_draws_by_image_differ_between_images_and_seeds_and_not_between_calls() -> None:
    x = images(4)
    source = stream(1, "attack")
    first = source.by_image(x, (8,))
    assert torch.equal(source.by_image(x, (8,)), first)
    assert len({tuple(row.tolist()) for row in first}) == 4
    assert not torch.equal(stream(2, "attack").by_image(x, (8,)), first)
    assert torch.equal(source.by_image(x[[0, 0]], (8,)), first[[0, 0]])


def test_no_images_need_no_numbers() -> None:
    assert stream(0, "attack").by_image(images(0), (3, 2)).shape == (0, 3, 2)
