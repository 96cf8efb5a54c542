"""The contract of every attack, and the one engine beneath them.

An attack is a value: settings, no state. :meth:`Attack.__call__` checks, freezes the model, sorts the batch so that
the examples of a threat are one slice, lets the subclass search, and checks what came back. The subclass writes only
the search, on slices of one tensor: one forward and one input-gradient backward per step serve the whole batch,
whatever mixture of threats it holds.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rome.attacks.sharing import Group as Group
from rome.attacks.sharing import Share, divide
from rome.component import Component
from rome.device import out_of_memory
from rome.errors import UserError
from rome.experts.fused import joined
from rome.experts.gated import Gated
from rome.randomness import Stream, stream
from rome.threats import PerExample, Threat
from rome.trial import IN_PLACE, THE_MODEL, ask, check_labels, evaluating, outside_box, unusable
from rome.trial import Model as Model


class Found(NamedTuple):
    """What an attack found for each example of a batch."""

    images: Tensor
    """(B, C, H, W): what a method trains on (PGD: the last iterate; APGD: the one with the highest loss)."""
    adversarial: Tensor
    """(B, C, H, W): misclassified wherever ``robust`` is False; otherwise ``images``."""
    robust: Tensor
    """bool (B,): nothing the attack answers for was misclassified (PGD: its last iterate; APGD: every iterate)."""
    loss: Tensor
    """(B,): cross-entropy at ``images``; NaN where an attack of another loss did not compute it."""


UNSEEN = torch.empty(0)
"""Stands for the loss of images that a search did not look at."""


def log_odds(logits: Tensor, y: Tensor) -> Tensor:
    """log of the odds against each label, log sum_{j != y} exp(z_j) - z_y, in float32 at least: (B,).

    The cross-entropy is its softplus, so both rise in the same direction. But where a model is confident the
    cross-entropy and its gradient vanish in float32, from a lead of 17 of the label's logit on in parts, from 104 on
    altogether, and an attack on it would stand still.
    """
    logits = at_least_float32(logits)
    others = logits.scatter(1, y.unsqueeze(1), -torch.inf)
    return others.logsumexp(dim=1) - logits.gather(1, y.unsqueeze(1)).squeeze(1)


def loss_and_gradient(model: Model, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`log_odds` per example (B,), correctness (B,) and input gradient (B, C, H, W), in one forward and backward.

    They are summed, so that an example's gradient does not depend on its batch mates.
    """
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        logits = model(x)
        loss = log_odds(logits, y)
        (gradient,) = torch.autograd.grad(loss.sum(), x)
    return loss.detach(), logits.detach().argmax(1) == y, gradient


def signs(gradient: Tensor) -> Tensor:
    """The sign of a gradient, NaN where it is NaN: torch gives 0 there, and an attack would stand still unnoticed."""
    return torch.where(gradient.isnan(), gradient, gradient.sign())


def unit(gradient: Tensor) -> Tensor:
    """Each example's gradient (B, ...) at L2 length 1, however small its numbers are; one of zeros stays."""
    flat = gradient.flatten(1)
    tiny = torch.finfo(flat.dtype).tiny
    flat = flat / flat.abs().amax(dim=1, keepdim=True).clamp(min=tiny)  # or its squares could be zero
    return (flat / torch.linalg.vector_norm(flat, dim=1, keepdim=True).clamp(min=tiny)).view_as(gradient)


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """max_{j != y} z_j - z_y of each example: (B,), positive where it is misclassified."""
    others = logits.scatter(1, y.unsqueeze(1), -torch.inf)
    return others.amax(dim=1) - logits.gather(1, y.unsqueeze(1)).squeeze(1)


def at_least_float32(logits: Tensor) -> Tensor:
    """Logits of autocast in float32, others as they are."""
    return logits if logits.dtype == torch.float64 else logits.float()


@contextmanager
def frozen(model: Model) -> Iterator[None]:
    """Evaluation mode and no parameter gradients inside; every flag and weight as it was afterwards.

    BatchNorm statistics do not move, dropout is off, and the backward computes input gradients only. Under autocast the
    weights of matrix products are cast once instead of at every step: autocast's own cache skips frozen weights. The
    results are the same to the last bit. The casts stand in the parameters' places and leave these untouched: another
    type of data inside one would cut DistributedDataParallel's hooks off, which hang on its gradient's accumulator.
    """
    if not isinstance(model, nn.Module):
        yield
        return
    if reason := unusable([*model.parameters(), *model.buffers()]):
        raise UserError(f"{THE_MODEL} {reason}")
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    replaced: list[tuple[nn.Module, str, nn.Parameter]] = []
    with evaluating(model):
        try:
            for parameter in wanted:
                parameter.requires_grad_(False)
            for module, name, reduced in _autocast_weights(model):
                own = module.get_parameter(name)
                replaced.append((module, name, own))
                module._parameters[name] = nn.Parameter(own.detach().to(reduced), requires_grad=False)
            with joined(model):
                yield
        finally:
            for module, name, parameter in replaced:
                module._parameters[name] = parameter
            for parameter in wanted:
                parameter.requires_grad_(True)


def _autocast_weights(model: nn.Module) -> Iterator[tuple[nn.Module, str, torch.dtype]]:
    """The float32 weights that autocast, if it is on, casts before every product: module, name, and to what."""
    first = next(model.parameters(), None)
    if first is None or not torch.is_autocast_enabled(first.device.type):
        return
    reduced = torch.get_autocast_dtype(first.device.type)
    products = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    for module in model.modules():
        # with the experts' A and B, which belong to a Linear; other subclasses may change their weight before using it,
        # as the hooks of weight_norm and spectral_norm do
        plain = type(module) in products and not module._forward_pre_hooks
        if plain or (isinstance(module, Gated) and isinstance(module, products)):
            for name, parameter in list(module.named_parameters(recurse=False)):
                if parameter.ndim > 1 and parameter.dtype == torch.float32:
                    yield module, name, reduced


class Attack(Component):
    """Searches inside a threat for images that raise the model's loss."""

    default_kind = "pgd"
    draws_by_image: ClassVar[bool] = False
    """Whether an example's random numbers depend on the image and the seed alone, not on its place in the batch."""
    full_precision: ClassVar[bool] = False
    """Whether it computes in the model's own precision under autocast too: finite differences drown in bfloat16."""
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
                evaluation; give your own in a training loop.

        Raises:
            UserError: shapes, dtypes or ranges that cannot be right, or a threat this attack does not know.
        """
        return self.run(model, x, y, threat, generator=generator, verdict=False).images

    def unsuited(self, channels: int) -> str:
        """Why this attack has no meaning on images of so many channels; empty where it has."""
        return ""

    def run(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        threat: Threat | PerExample,
        *,
        generator: torch.Generator | Stream | None = None,
        verdict: bool = True,
    ) -> Found:
        """Like calling the attack, with all it found (see :class:`Found`).

        ``verdict=False`` spares a forward pass if the search did not see its own result: ``robust`` and ``loss`` may
        then be missing (all True, NaN).
        """
        check_batch(x, y, threat)
        if generator is None:
            generator = stream(0, "attack")
        source = generator if isinstance(generator, Stream) else Stream(generator)
        with torch.inference_mode(False):  # gradients are needed, whatever the caller is doing
            x, y = (each.clone() if each.is_inference() else each for each in (x, y))
            return self._run(model, x.detach(), y.detach(), threat, source, verdict)

    def _run(
        self, model: Model, x: Tensor, y: Tensor, threat: Threat | PerExample, source: Stream, verdict: bool
    ) -> Found:
        if not isinstance(threat, PerExample):
            threat = PerExample((threat,), torch.zeros(len(x), dtype=torch.int64))
        shares = divide(self, x, threat, source)
        if not shares:
            return Found(x.clone(), x.clone(), torch.ones_like(y, dtype=torch.bool), torch.zeros_like(x[:, 0, 0, 0]))
        order = torch.cat([share.rows for share in shares])
        mixed = len(shares) > 1 or len(shares[0].groups) > 1
        if mixed:
            sort = order.to(x.device, non_blocking=True)
            x, y = x[sort], y[sort]
        sizes = [len(share.rows) for share in shares]
        lower = torch.is_autocast_enabled(x.device.type) and not any(share.attack.full_precision for share in shares)
        x = x.contiguous()
        before = x._version
        with torch.autocast(x.device.type, enabled=lower), frozen(model), torch.no_grad():
            gradient = any(share.attack.differentiates for share in shares)
            with explained(model, x, y, gradient=gradient):
                parts = [
                    _search(model, own, labels, share, verdict)
                    for share, own, labels in zip(shares, torch.split(x, sizes), torch.split(y, sizes), strict=True)
                ]
        if x._version != before:
            raise UserError(f"{THE_MODEL} {IN_PLACE}")
        found = parts[0][0]
        if len(parts) > 1:
            found = Found(*map(torch.cat, zip(*(part for part, _ in parts), strict=True)))
        check_results(x, y, found[:2], torch.cat([allowed for _, allowed in parts]))
        if not mixed:
            return found
        unsort = torch.argsort(order).to(x.device, non_blocking=True)
        return Found(*(part[unsort] for part in found))

    def noise(self, x: Tensor, source: Stream) -> Tensor:
        """The random numbers of a batch, all of it, if the search needs some."""
        if self.draws_by_image:
            return self.noise_by_image(x, source)
        return source.uniform(x.shape, x.device) if self.uses_noise else x

    def noise_by_image(self, x: Tensor, source: Stream) -> Tensor:
        """Random numbers that depend on the seed and each image alone (:meth:`Stream.by_image`)."""
        return source.by_image(x, self.noise_shape(x.shape[1:])) if self.uses_noise else x

    def noise_shape(self, image: torch.Size) -> tuple[int, ...]:
        """Shape of the random numbers of one example, for attacks that draw by image."""
        return tuple(image)

    @property
    def uses_noise(self) -> bool:
        """Whether the search starts at random; if not, nothing is drawn."""
        return True

    @abstractmethod
    def steps_for(self, threat: Threat) -> int:
        """Number of steps under this threat.

        Raises:
            UserError: this attack cannot search inside that threat.
        """

    def passes_for(self, threat: Threat) -> float:
        """Forward passes of the model that an example under this threat costs, a backward counted as one; NaN where
        that is not known."""
        return 2 * self.steps_for(threat)

    @abstractmethod
    def search(self, model: Model, x: Tensor, y: Tensor, groups: list[Group], noise: Tensor) -> Found:
        """The attack itself, on a sorted batch, without gradient tracking and with the model frozen.

        Args:
            groups: contiguous slices that cover the batch, the most steps first.
            noise: U[0, 1) of the shape of ``x``, or (B, *noise_shape) if drawn by image, for random starts.

        Returns:
            What it found; ``loss=UNSEEN`` if it did not look at its result.
        """


def _search(model: Model, x: Tensor, y: Tensor, share: Share, verdict: bool) -> tuple[Found, Tensor]:
    """What an attack found for its share of a batch, and which of it is allowed: bool (b,)."""
    found = share.attack.search(model, x, y, share.groups, share.noise)
    if found.loss is UNSEEN:
        unknown = torch.full_like(y, torch.nan, dtype=torch.float32)
        found = _verdict(model, found.images, y) if verdict else found._replace(loss=unknown)
    allowed = torch.ones_like(found.robust)
    for result in (found.images,) if found.adversarial is found.images else (found.images, found.adversarial):
        inside = [group.threat.contains(result[group.rows], x[group.rows]) for group in share.groups]
        allowed = allowed & torch.cat(inside)
    return found, allowed


@contextmanager
def explained(model: Model, x: Tensor, y: Tensor, *, gradient: bool = True) -> Iterator[None]:
    """Where the search inside breaks off, see whether the model or the labels are why.

    Raises:
        UserError: they are, and what to do.
    """
    try:
        yield
    except (UserError, FloatingPointError, AssertionError):
        raise
    except Exception as error:
        if not out_of_memory(error):
            for images in (x[:2], x[:1]):
                try:
                    check_labels(y, ask(model, images, gradient=gradient).shape[1])
                except UserError as reason:
                    raise reason from error
        raise


def _verdict(model: Model, images: Tensor, y: Tensor) -> Found:
    logits = model(images).float()
    return Found(images, images, logits.argmax(1) == y, F.cross_entropy(logits, y, reduction="none"))


def check_batch(x: Tensor, y: Tensor, threat: Threat | PerExample) -> None:
    """Shapes, dtypes and devices of a batch and its threats.

    Raises:
        UserError: they cannot be right.
    """
    for what, value in (("images", x), ("labels", y)):
        if not isinstance(value, Tensor):
            raise UserError(f"{what} must be a torch tensor, not {type(value).__name__}: torch.as_tensor({what})")
    if x.ndim != 4 or x.dtype not in (torch.float32, torch.float64):
        raise UserError(f"images must be float32 (B, C, H, W) in [0, 1], not {x.dtype} {tuple(x.shape)}")
    if y.shape != x.shape[:1] or y.dtype != torch.int64:
        raise UserError(f"labels of {len(x)} images must be int64 ({len(x)},), not {y.dtype} {tuple(y.shape)}")
    if y.device != x.device:
        raise UserError(f"images are on {x.device} and labels on {y.device}: move one of them")
    if isinstance(threat, PerExample) and threat.labels.shape != y.shape:
        raise UserError(f"{len(x)} images need {len(x)} threat labels, not {tuple(threat.labels.shape)}")
    if isinstance(threat, PerExample) and (wrong := set(threat.labels.tolist()) - set(range(len(threat.threats)))):
        raise UserError(f"threat labels must lie in 0..{len(threat.threats) - 1}, not {sorted(wrong)}")
    if not isinstance(threat, (Threat, PerExample)):
        raise UserError(f"the threat must be a Threat such as LpBall(norm='Linf', eps=8/255), not {threat!r}")


def check_results(x: Tensor, y: Tensor, results: tuple[Tensor, ...], allowed: Tensor) -> None:
    """One wait for the device per attack: input in the box, results inside their threats and finite, labels from 0
    (-100 has no loss in torch).

    Args:
        x: the originals (B, C, H, W).
        y: their labels (B,).
        results: what the attack made of them, each (B, C, H, W).
        allowed: bool (B,): whose results are all inside their threat.
    """
    inside = (x >= 0) & (x <= 1)
    if bool(allowed.all() & inside.all() & (y >= 0).all()):
        return
    check_labels(y)
    if not bool(inside.all()):
        raise UserError(outside_box(x))
    bad = int((~allowed).sum())
    if not all(bool(part.isfinite().all()) for part in results):
        raise FloatingPointError(
            f"the attack produced non-finite images for {bad} of {len(x)} examples: "
            "the gradients of the model are not finite there"
        )
    raise AssertionError(f"the attack left its threat on {bad} of {len(x)} examples: a bug in the attack")


def check_bound(kind: str, inside: Tensor, measured: Tensor) -> None:
    """Refuse results outside of a bound that an attack keeps itself.

    Args:
        inside: bool (B,), whose result is allowed.
        measured: (B, ...), what that was told from.

    Raises:
        FloatingPointError: it is not finite, as the model's gradients were not.
        AssertionError: it is, and a result is outside: a bug in the attack.
    """
    if bool(inside.all()):
        return
    if not bool(measured.isfinite().all()):
        raise FloatingPointError(f"{kind} met gradients of the model that are not finite")
    raise AssertionError(f"{kind} left its bound on {int((~inside).sum())} of {len(inside)} examples: a bug")
