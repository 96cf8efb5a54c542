"""How a batch is divided: by the attack that searches each example, and within that by threat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from rome.core.randomness import Stream
from rome.threats.lp import PerExample, Threat

if TYPE_CHECKING:
    from rome.attacks.base import Attack


@dataclass(frozen=True)
class Group:
    """The examples of one threat within the sorted batch of an attack."""

    threat: Threat
    rows: slice
    steps: int


class Share(NamedTuple):
    """The examples of a batch that one attack searches."""

    attack: Attack
    rows: Tensor
    """Their positions in the batch (int64, CPU), group by group."""
    groups: list[Group]
    """Slices of ``rows``, the most steps first."""
    noise: Tensor
    """The random numbers of these rows, in this order."""


def divide(attack: Attack, x: Tensor, mixture: PerExample, source: Stream) -> list[Share]:
    """Who searches what: ``attack`` all threats that bring no attack of their own, in one mixed batch; then the others.

    The random numbers of ``attack`` are drawn wherever the mixture has a threat for it, also if no example of this
    process meets one. Attacks that threats bring draw by image, so that they move nobody else's numbers.

    Args:
        x: the whole batch (B, C, H, W).

    Raises:
        UserError: an attack cannot search inside its threat.
    """
    searches: list[tuple[Attack, bool, list[tuple[Threat, Tensor]]]] = []
    for number, threat in enumerate(mixture.threats):
        searcher, inside = threat.searched_by(attack)
        own = inside is not threat
        known = next((members for other, its, members in searches if (other, its) == (searcher, own)), None)
        if known is None:
            searches.append((searcher, own, known := []))
        known.append((inside, (mixture.labels == number).nonzero().flatten()))
    shares = []
    for searcher, own, members in sorted(searches, key=lambda search: search[1]):
        noise = x if own else searcher.noise(x, source)
        # the groups that finish first stand last, so that they leave as a slice
        members = sorted((part for part in members if len(part[1])), key=lambda part: -searcher.steps_for(part[0]))
        if not members:
            continue
        rows, groups = torch.cat([where for _, where in members]), list[Group]()
        for member, where in members:
            start = groups[-1].rows.stop if groups else 0
            groups.append(Group(member, slice(start, start + len(where)), searcher.steps_for(member)))
        if len(groups) > 1 or len(rows) < len(x):
            noise = noise[rows.to(x.device, non_blocking=True)]
        shares.append(Share(searcher, rows, groups, searcher.noise_by_image(noise, source) if own else noise))
    return shares
