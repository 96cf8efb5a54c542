"""The contract of every attack.

An attack is a value: settings, no state. :meth:`Attack.run` checks, freezes the model, sorts the batch so that the
examples of a threat are one slice, lets the subclass search, and checks what came back. The subclass writes only the
search, on slices of one tensor: one forward and one input-gradient backward per step serve the whole batch, whatever
mixture of threats it holds.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable
from functools import partial
from typing import Annotated, Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from rome.attacks.checks import check_batch, check_results
from rome.attacks.engine import Model, Search, searched
from rome.core.component import Component, Number
from rome.core.errors import UserError
from rome.core.randomness import Stream, stream
from rome.core.trial import IN_PLACE, THE_MODEL
from rome.threats import LpBall, PerExample, Threat

Steps = Annotated[int, Field(ge=0)]
StepSize = Annotated[Number, Field(ge=0)]


class AttackResult(NamedTuple):
    """What an attack found for each example of a batch."""

    images: Tensor
    """(B, C, H, W): what a method trains on (PGD: the last iterate; APGD: the one with the highest loss)."""
    adversarial: Tensor
    """(B, C, H, W): misclassified wherever ``robust`` is False; otherwise ``images``."""
    robust: Tensor
    """bool (B,): nothing the attack answers for was misclassified (PGD: its last iterate; APGD: every iterate)."""
    loss: Tensor
    """(B,): cross-entropy at ``images``; NaN where an attack of another loss did not compute it."""


NOT_EVALUATED = torch.empty(0)
"""Stands for the loss of images that a search did not look at."""


class Group(NamedTuple):
    """The examples of one threat within the sorted batch of an attack."""

    threat: Any
    """A threat that the attack accepts (:meth:`Attack.accepted`)."""
    rows: slice
    steps: int


class Attack(Component):
    """Searches inside a threat for images that raise the model's loss."""

    default_kind = "pgd"
    searches: ClassVar[tuple[type[Threat], str]] = (LpBall, "searches inside Lp balls")
    """The kind of threats that it accepts, and what a message says where it is another; there ``{kind}`` is its own."""
    channels: ClassVar[tuple[int, ...]] = ()
    """How many channels an image may have; empty: any number."""
    draws_by_image: ClassVar[bool] = False
    """Whether an example's random numbers depend on the image and the seed alone, not on its place in the batch."""
    full_precision: ClassVar[bool] = False
    """Whether it computes in the model's own precision under autocast too: finite differences drown in bfloat16."""
    starts_at_random: ClassVar[bool] = True
    """Whether it draws random numbers at all."""
    differentiates: ClassVar[bool] = True
    """Whether it needs gradients of the model."""
    untrained: ClassVar[str] = ""
    """Why it makes no threat to train on (:class:`rome.attacks.AttackThreat`); empty where it does."""

    def __call__(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        threat: Threat | PerExample,
        *,
        generator: torch.Generator | Stream | None = None,
    ) -> Tensor:
        """Adversarial images for ``x``: (B, C, H, W), same dtype and device, inside threat and box.

        Args:
            model: logits from images in [0, 1]. Its train/eval flags, ``requires_grad``, BatchNorm statistics and the
                global random state are as before afterwards.
            x: images (B, C, H, W), floating point, in [0, 1].
            y: labels (B,), int64.
            threat: one threat for all, or one for each example. Examples of a threat that brings its own attack are
                searched by that one, the others together by this.
            generator: random numbers for the start. None uses seed 0 at every call: right for a repeatable
                evaluation; a training loop passes its own.

        Raises:
            UserError: shapes, dtypes or ranges that cannot be right, or a threat this attack does not know.
        """
        return self.run(model, x, y, threat, generator=generator, verdict=False).images

    def run(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        threat: Threat | PerExample,
        *,
        generator: torch.Generator | Stream | None = None,
        verdict: bool = True,
    ) -> AttackResult:
        """Like calling the attack, with all it found (see :class:`AttackResult`).

        ``verdict=False`` spares a forward pass if the search did not see its own result: ``robust`` and ``loss`` may
        then be missing (all True, NaN).
        """
        check_batch(x, y, threat)
        if generator is None:
            generator = stream(0, "attack")
        source = generator if isinstance(generator, Stream) else Stream(generator)
        if not isinstance(threat, PerExample):
            threat = PerExample((threat,), torch.zeros(len(x), dtype=torch.int64))
        with torch.inference_mode(False):  # gradients are needed, whatever the caller is doing
            x, y = ((each.clone() if each.is_inference() else each).detach() for each in (x, y))
            return self._run(model, x, y, split_by_attack(self, x, threat, source), verdict)

    def _run(self, model: Model, x: Tensor, y: Tensor, shares: list[Share], verdict: bool) -> AttackResult:
        if not shares:
            return AttackResult(x.clone(), x.clone(), torch.ones_like(y, dtype=torch.bool), y.to(x.dtype))
        for share in shares:
            if reason := share.attack.unsuited(x.shape[1]):
                raise UserError(f"{share.attack.kind} {reason}")
        order = torch.cat([share.rows for share in shares])
        mixed = len(shares) > 1 or len(shares[0].groups) > 1
        if mixed:
            sort = order.to(x.device, non_blocking=True)
            x, y = x[sort], y[sort]
        sizes = [len(share.rows) for share in shares]
        lower = torch.is_autocast_enabled(x.device.type) and not any(share.attack.full_precision for share in shares)
        x = x.contiguous()
        before = x._version
        searches = [
            Search(share.key(verdict), partial(_search, model, share, verdict), (own, labels, share.noise))
            for share, own, labels in zip(shares, torch.split(x, sizes), torch.split(y, sizes), strict=True)
        ]
        with torch.autocast(x.device.type, enabled=lower):
            gradient = any(share.attack.differentiates for share in shares)
            parts = searched(model, searches, x, y, gradient=gradient)
        if x._version != before:
            raise UserError(f"{THE_MODEL} {IN_PLACE}")
        found = parts[0][0]
        if len(parts) > 1:
            found = AttackResult(*map(torch.cat, zip(*(part for part, _ in parts), strict=True)))
        check_results(x, y, found[:2], torch.cat([allowed for _, allowed in parts]))
        if not mixed:
            return found
        unsort = torch.argsort(order).to(x.device, non_blocking=True)
        return AttackResult(*(part[unsort] for part in found))

    @property
    def replayable(self) -> bool:
        """Whether its search may be replayed as a whole, because it never waits for a result."""
        return True

    def unsuited(self, channels: int) -> str:
        """Why this attack has no meaning on images of so many channels; empty where it has."""
        if not self.channels or channels in self.channels:
            return ""
        return f"needs images of {' or '.join(map(str, self.channels))} channels, not {channels}"

    def noise(self, x: Tensor, source: Stream, *, by_image: bool = False) -> Tensor:
        """The random numbers of a batch, if the search needs some: by image (:meth:`Stream.by_image`), or all in one
        draw."""
        if not self.uses_noise:
            return x
        if by_image or self.draws_by_image:
            return source.by_image(x, self.noise_shape(x.shape[1:]))
        return source.uniform(x.shape, x.device)

    def noise_shape(self, image: torch.Size) -> tuple[int, ...]:
        """Shape of the random numbers of one example, for attacks that draw by image."""
        return tuple(image)

    @property
    def uses_noise(self) -> bool:
        """Whether the search starts at random; if not, nothing is drawn. A setting ``random_start`` decides."""
        return bool(getattr(self, "random_start", self.starts_at_random))

    def accepted(self, threat: Threat) -> Any:
        """The threat.

        Raises:
            UserError: this attack cannot search inside it.
        """
        kind, described = self.searches
        if not isinstance(threat, kind):
            raise UserError(f"{self.kind} {described.format(kind=self.kind)}, not {type(threat).__name__}")
        return threat

    def steps_for(self, threat: Threat) -> int:
        """Number of steps under this threat: the setting ``steps``.

        Raises:
            UserError: this attack cannot search inside that threat.
        """
        self.accepted(threat)
        return int(getattr(self, "steps", 0))

    @abstractmethod
    def search(self, model: Model, x: Tensor, y: Tensor, groups: list[Group], noise: Tensor) -> AttackResult:
        """The attack itself, on a sorted batch, without gradient tracking and with the model frozen.

        Args:
            groups: contiguous slices that cover the batch, the most steps first.
            noise: U[0, 1) of the shape of ``x``, or ``(B, *noise_shape)`` if drawn by image, for random starts.

        Returns:
            What it found; ``loss=NOT_EVALUATED`` if it did not look at its result.
        """


class Share(NamedTuple):
    """The examples of a batch that one attack searches."""

    attack: Attack
    rows: Tensor
    """Their positions in the batch (int64, CPU), group by group."""
    groups: list[Group]
    """Slices of ``rows``, the most steps first."""
    noise: Tensor
    """The random numbers of these rows, in this order."""

    def key(self, verdict: bool) -> Hashable:
        """What its search depends on beside model and tensors; None where it waits for results."""
        if not self.attack.replayable:
            return None
        groups = tuple((repr(group.threat), group.rows.start, group.rows.stop, group.steps) for group in self.groups)
        return repr(self.attack), groups, verdict


def split_by_attack(attack: Attack, x: Tensor, mixture: PerExample, source: Stream) -> list[Share]:
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
        shares.append(Share(searcher, rows, groups, searcher.noise(noise, source, by_image=True) if own else noise))
    return shares


def _search(
    model: Model, share: Share, verdict: bool, x: Tensor, y: Tensor, noise: Tensor
) -> tuple[AttackResult, Tensor]:
    """What an attack found for its share of a batch, and which of it is allowed: bool (b,)."""
    found = share.attack.search(model, x, y, share.groups, noise)
    if found.loss is NOT_EVALUATED:
        found = found._replace(loss=torch.full_like(y, torch.nan, dtype=torch.float32))
        if verdict:
            logits = model(found.images).float()
            loss = F.cross_entropy(logits, y, reduction="none")
            found = AttackResult(found.images, found.images, logits.argmax(1) == y, loss)
    allowed = torch.ones_like(found.robust)
    for result in (found.images,) if found.adversarial is found.images else (found.images, found.adversarial):
        inside = [group.threat.contains(result[group.rows], x[group.rows]) for group in share.groups]
        allowed = allowed & torch.cat(inside)
    return found, allowed
