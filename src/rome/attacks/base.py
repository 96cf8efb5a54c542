"""The contract of every attack.

An attack is a value: it has settings and no state. :meth:`Attack.run` checks the input, freezes the model, sorts the
batch so that the examples of each threat form one slice, calls the subclass's search, and checks the results. A
subclass implements only the search, on slices of one tensor: each step takes one forward and one input-gradient
backward for the whole batch, whatever mixture of threats it holds.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable
from typing import Annotated, Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from rome.attacks.checks import check_batch
from rome.attacks.engine import Model, Plan, Search
from rome.core.component import Component, Number
from rome.core.errors import UserError
from rome.core.randomness import Stream, stream
from rome.core.trial import IN_PLACE, THE_MODEL
from rome.threats import LpBall, PerExample, Threat

Steps = Annotated[int, Field(ge=0)]
StepSize = Annotated[Number, Field(ge=0)]


class AttackResult(NamedTuple):
    """The result of an attack for each example of a batch."""

    images: Tensor
    """(B, C, H, W): images to train on (PGD: the last iterate; APGD: the iterate with the highest loss)."""
    adversarial: Tensor
    """(B, C, H, W): misclassified wherever ``robust`` is False; otherwise ``images``."""
    robust: Tensor
    """bool (B,): whether every image that the attack checked is classified correctly (PGD checks its last iterate, APGD
    every iterate)."""
    loss: Tensor
    """(B,): cross-entropy at ``images``; NaN if the attack uses a different loss and did not compute it."""


NOT_EVALUATED = torch.empty(0)
"""Placeholder for the loss of a search that did not evaluate its final images."""


class Group(NamedTuple):
    """The examples of one threat within the sorted batch of an attack."""

    threat: Any
    """A threat that the attack accepts (:meth:`Attack.accepted`)."""
    rows: slice
    steps: int


class Attack(Component):
    """A search inside a threat for images that raise the model's loss."""

    default_kind = "pgd"
    accepts: ClassVar[tuple[type[Threat], str]] = (LpBall, "searches inside Lp balls")
    """The class of threats that the attack accepts, and the requirement to state when it is given any other; ``{kind}``
    in this text is replaced by the attack's kind."""
    channels: ClassVar[tuple[int, ...]] = ()
    """The numbers of channels that images may have; empty: any."""
    draws_by_image: ClassVar[bool] = False
    """Whether an example's random numbers depend only on its image and the seed, not on its position in the batch."""
    full_precision: ClassVar[bool] = False
    """Whether autocast is switched off during the attack: finite differences would be lost in bfloat16's rounding."""
    starts_at_random: ClassVar[bool] = True
    """Whether the attack draws random numbers at all."""
    needs_gradients: ClassVar[bool] = True
    """Whether the attack needs gradients of the model."""
    not_for_training: ClassVar[str] = ""
    """Why the attack cannot define a threat to train on (:class:`rome.attacks.AttackThreat`); empty if it can."""

    def __call__(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        threat: Threat | PerExample,
        *,
        generator: torch.Generator | Stream | None = None,
    ) -> Tensor:
        """Return adversarial images for ``x``: (B, C, H, W), same dtype and device, inside the threat and [0, 1].

        Args:
            model: maps images in [0, 1] to logits. Its train/eval flags, ``requires_grad`` and BatchNorm statistics
                are left unchanged, and so is the global random state.
            x: images (B, C, H, W), float32 or float64, in [0, 1].
            y: labels (B,), int64.
            threat: one threat for all examples, or one for each. Examples whose threat brings its own attack are
                searched by that attack, all others together by this one.
            generator: source of random numbers for the start. None uses seed 0 at every call, which makes evaluations
                repeatable; a training loop passes its own.

        Raises:
            UserError: a shape, dtype or range is invalid, or the attack does not support the threat.
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
        """Like calling the attack, but return the complete :class:`AttackResult`.

        ``verdict=False`` saves a forward pass if the search did not evaluate its final images: ``robust`` and ``loss``
        may then be uninformative (all True, NaN).
        """
        return self.plan(model, x, y, threat, generator=generator, verdict=verdict).run()

    def plan(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        threat: Threat | PerExample,
        *,
        generator: torch.Generator | Stream | None = None,
        verdict: bool = True,
    ) -> Plan:
        """Draw the random numbers for :meth:`run`, with the same arguments, without searching yet."""
        check_batch(x, y, threat)
        if not isinstance(generator, Stream):
            generator = stream(0, "attack") if generator is None else Stream(generator)
        if not isinstance(threat, PerExample):
            threat = PerExample((threat,), torch.zeros(len(x), dtype=torch.int64))
        with torch.inference_mode(False):
            x, y = ((each.clone() if each.is_inference() else each).detach() for each in (x, y))
            shares = split_by_attack(self, x, threat, generator)
            for share in shares:
                if reason := share.attack.unsupported_reason(x.shape[1]):
                    raise UserError(f"{share.attack.kind} {reason}")
            return Plan(
                model,
                x,
                y,
                _search(model, shares, x, y, verdict),
                autocast=not any(share.attack.full_precision for share in shares),
                gradient=any(share.attack.needs_gradients for share in shares),
            )

    @property
    def replayable(self) -> bool:
        """Whether the whole search may be replayed as a CUDA graph, because it never waits for a result."""
        return True

    def unsupported_reason(self, channels: int) -> str:
        """Return why the attack is undefined for images with this many channels; empty if it is defined."""
        if not self.channels or channels in self.channels:
            return ""
        return f"needs images of {' or '.join(map(str, self.channels))} channels, not {channels}"

    def noise(self, x: Tensor, source: Stream, *, by_image: bool = False) -> Tensor:
        """Draw the random numbers of a batch, for each image separately (:meth:`Stream.by_image`) or all at once;
        return ``x`` itself if the search needs none."""
        if not self.uses_noise:
            return x
        if by_image or self.draws_by_image:
            return source.by_image(x, self.noise_shape(x.shape[1:]))
        return source.uniform(x.shape, x.device)

    def noise_shape(self, image: torch.Size) -> tuple[int, ...]:
        """Shape of the random numbers for one example, in attacks that draw by image."""
        return tuple(image)

    @property
    def uses_noise(self) -> bool:
        """Whether to draw random numbers: the setting ``random_start`` if there is one, else ``starts_at_random``."""
        return bool(getattr(self, "random_start", self.starts_at_random))

    def accepted(self, threat: Threat) -> Any:
        """Return the threat if this attack can search inside it.

        Raises:
            UserError: it cannot.
        """
        kind, described = self.accepts
        if not isinstance(threat, kind):
            raise UserError(f"{self.kind} {described.format(kind=self.kind)}, not {type(threat).__name__}")
        return threat

    def steps_for(self, threat: Threat) -> int:
        """Number of steps under this threat: the setting ``steps``.

        Raises:
            UserError: the attack cannot search inside this threat.
        """
        self.accepted(threat)
        return int(getattr(self, "steps", 0))

    @abstractmethod
    def search(self, model: Model, x: Tensor, y: Tensor, groups: list[Group], noise: Tensor) -> AttackResult:
        """Run the attack itself on a sorted batch, with gradient tracking off and the model frozen.

        Args:
            groups: contiguous slices that cover the batch, those with the most steps first.
            noise: U[0, 1) for random starts, shaped like ``x``, or ``(B, *noise_shape)`` if drawn by image.

        Returns:
            The images found, with ``loss=NOT_EVALUATED`` if the search did not evaluate them.
        """


class Share(NamedTuple):
    """The examples of a batch that one attack searches."""

    attack: Attack
    rows: Tensor
    """Positions of the examples in the batch (int64, CPU), group by group."""
    groups: list[Group]
    """Slices of ``rows``, those with the most steps first."""
    noise: Tensor
    """Random numbers of these examples, in the same order."""

    def key(self, verdict: bool) -> Hashable:
        """Everything that the search depends on besides the model and tensors; None if it waits for results."""
        if not self.attack.replayable:
            return None
        groups = tuple((repr(group.threat), group.rows.start, group.rows.stop, group.steps) for group in self.groups)
        return repr(self.attack), groups, verdict


def split_by_attack(attack: Attack, x: Tensor, mixture: PerExample, source: Stream) -> list[Share]:
    """Split a batch by the attack that searches each example: first ``attack``, for all threats without an attack of
    their own, then the attacks that threats bring.

    The random numbers of ``attack`` are drawn whenever the mixture contains a threat for it, even if no example of this
    process has such a threat. Attacks brought by threats draw by image and so leave the numbers of others unchanged.

    Args:
        x: the whole batch (B, C, H, W).

    Raises:
        UserError: an attack cannot search inside its threat.
    """
    searches: list[tuple[Attack, bool, list[tuple[Threat, Tensor]]]] = []
    for number, threat in enumerate(mixture.threats):
        searcher, inside = threat.resolve_attack(attack)
        brought = inside is not threat
        known = next((members for *key, members in searches if key == [searcher, brought]), None)
        if known is None:
            searches.append((searcher, brought, known := []))
        known.append((inside, (mixture.labels == number).nonzero().flatten()))
    shares = []
    for searcher, brought, members in sorted(searches, key=lambda search: search[1]):
        noise = x if brought else searcher.noise(x, source)
        # groups that finish first come last, so that the active examples always form one leading slice
        members = sorted((part for part in members if len(part[1])), key=lambda part: -searcher.steps_for(part[0]))
        if not members:
            continue
        rows, groups = torch.cat([where for _, where in members]), list[Group]()
        for member, where in members:
            start = groups[-1].rows.stop if groups else 0
            groups.append(Group(member, slice(start, start + len(where)), searcher.steps_for(member)))
        if len(groups) > 1 or len(rows) < len(x):
            noise = noise[rows.to(x.device, non_blocking=True)]
        if brought:
            noise = searcher.noise(noise, source, by_image=True)
        shares.append(Share(searcher, rows, groups, noise))
    return shares


def _search(model: Model, shares: list[Share], x: Tensor, y: Tensor, verdict: bool) -> Search:
    """The search of a batch by several attacks, each on its share of the examples."""
    order = torch.cat([share.rows for share in shares]) if shares else torch.zeros(0, dtype=torch.int64)
    mixed = len(shares) > 1 or any(len(share.groups) > 1 for share in shares)
    sorting = tuple(rows.to(x.device, non_blocking=True) for rows in (order, torch.argsort(order))) if mixed else ()
    sizes = [len(share.rows) for share in shares]

    def search(x: Tensor, y: Tensor, *more: Tensor) -> tuple[AttackResult, Tensor]:
        noises, sorting = more[: len(sizes)], more[len(sizes) :]
        if not sizes:
            return AttackResult(x.clone(), x.clone(), torch.ones_like(y, dtype=torch.bool), y.to(x.dtype)), y >= 0
        if sorting:
            x, y = x[sorting[0]], y[sorting[0]]
        x = x.contiguous()
        before = x._version
        parts = [
            _search_share(model, share, verdict, *each)
            for share, *each in zip(shares, torch.split(x, sizes), torch.split(y, sizes), noises, strict=True)
        ]
        if x._version != before:
            raise UserError(f"{THE_MODEL} {IN_PLACE}")
        (found, allowed), *others = parts
        if others:
            found = AttackResult(*map(torch.cat, zip(*(part for part, _ in parts), strict=True)))
            allowed = torch.cat([each for _, each in parts])
        if not sorting:
            return found, allowed
        unsorted = {id(part): part[sorting[1]] for part in found}  # images are often adversarial, too
        return AttackResult(*(unsorted[id(part)] for part in found)), allowed[sorting[1]]

    keys = tuple(share.key(verdict) for share in shares)
    return Search(None if None in keys else keys, search, (x, y, *(share.noise for share in shares), *sorting))


def _search_share(
    model: Model, share: Share, verdict: bool, x: Tensor, y: Tensor, noise: Tensor
) -> tuple[AttackResult, Tensor]:
    """Run an attack on its share of a batch; also return which of its results the threats allow: bool (b,)."""
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
