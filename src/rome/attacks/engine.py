"""What attacks need of a model: loss, input gradient and verdict, with the model frozen; and checks of their inputs and
results."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from rome.core.device import channels_last_pays, out_of_memory
from rome.core.errors import UserError
from rome.core.graphs import Graphs
from rome.core.trial import THE_MODEL, ask, check_labels, evaluating, outside_box, unusable
from rome.core.trial import Model as Model
from rome.experts.fused import joined
from rome.experts.gated import MixtureLayer
from rome.threats import PerExample, Threat

LAST = torch.channels_last


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

    def step(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            logits = model(x)
            loss = log_odds(logits, y)
            (gradient,) = torch.autograd.grad(loss.sum(), x)
        return loss.detach(), logits.detach().argmax(1) == y, gradient

    if (graphs := graphs_of(model)) is None:
        return step(x, y)
    found = graphs.call("loss and gradient", step, padded(x, graphs.rows), padded(y, graphs.rows))
    loss, correct, gradient = (part[: len(x)] for part in found)
    return loss, correct, gradient


def logits_of(model: Model, x: Tensor) -> Tensor:
    """The model's logits (B, classes), to be differentiated with respect to ``x`` before its next call."""
    if (graphs := graphs_of(model)) is None:
        return model(x)
    call = graphs.differentiable if x.requires_grad and torch.is_grad_enabled() else graphs.call
    answer: Tensor = call("logits", model, padded(x, graphs.rows))
    return answer[: len(x)]


_GRAPHS: WeakKeyDictionary[nn.Module, Graphs] = WeakKeyDictionary()


@contextmanager
def graphed(model: Model, graphs: Graphs | None) -> Iterator[None]:
    """Inside, attacks on this module use these graphs (None: none), which are released afterwards.

    Functions, programs of TorchScript and models on several devices are called as they are.
    """
    apart = (nn.DataParallel, torch.jit.ScriptModule)
    if graphs is None or not isinstance(model, nn.Module) or any(isinstance(each, apart) for each in model.modules()):
        yield
        return
    before = _GRAPHS.get(model)
    _GRAPHS[model] = graphs
    try:
        yield
    finally:
        if before is None:
            del _GRAPHS[model]
        else:
            _GRAPHS[model] = before
        graphs.release()


def graphs_of(model: Model) -> Graphs | None:
    """The graphs that calls of a model use whose weights do not change; None where it is called as it is."""
    graphs = _GRAPHS.get(model) if isinstance(model, nn.Module) else None
    return graphs if graphs is not None and graphs.ready else None


def padded(x: Tensor, rows: int) -> Tensor:
    """A batch with rows of zeros added to the next multiple of ``rows``."""
    missing = -len(x) % rows
    return torch.cat([x, x.new_zeros(missing, *x.shape[1:])]) if missing else x


@contextmanager
def graphs_on(model: nn.Module) -> Iterator[Graphs | None]:
    """The graphs of a model whose weights do not change inside, made ready for it; None if it has none, inside another
    such context, and where gates are recorded, since a graph that is replayed records nothing."""
    graphs = _GRAPHS.get(model)
    if graphs is None or graphs.ready:
        yield None
        return
    layers = [module for module in model.modules() if isinstance(module, MixtureLayer)]
    if any(layer.sink is not None for layer in layers):
        yield None
        return
    tensors = [*model.parameters(), *model.buffers()]
    with graphs.on(tuple(tensor.data_ptr() for tensor in tensors), tuple(layer.graph_state for layer in layers)):
        yield graphs


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
    weights of matrix products are cast once instead of at every step, with results that are the same to the last bit:
    autocast's own cache skips frozen weights. On a CPU the weights of convolutions are put in the order channels last.
    Such copies stand in the parameters' places and leave these untouched: another type of data inside one would cut
    DistributedDataParallel's hooks off, which hang on its gradient's accumulator. Where the model has graphs, what is
    computed of weights lies where these read it.
    """
    if not isinstance(model, nn.Module):
        yield
        return
    if reason := unusable([*model.parameters(), *model.buffers()]):
        raise UserError(f"{THE_MODEL} {reason}")
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    replaced: list[tuple[nn.Module, str, nn.Parameter]] = []
    with evaluating(model), graphs_on(model) as graphs:
        try:
            for parameter in wanted:
                parameter.requires_grad_(False)
            weights = list(_weights_to_copy(model))
            replaced = [(module, name, module.get_parameter(name)) for module, name, _ in weights]
            own = [parameter.detach() for _, _, parameter in replaced]
            forms = [form for _, _, form in weights]
            if graphs is None:
                copies = [weight.to(**form) for weight, form in zip(own, forms, strict=True)]
            else:
                copies = [graphs.buffer(weight, **form) for weight, form in zip(own, forms, strict=True)]
                if copies:
                    torch._foreach_copy_(copies, own)
            for (module, name, _), copy in zip(weights, copies, strict=True):
                module._parameters[name] = nn.Parameter(copy, requires_grad=False)
            layers = [module for module in model.modules() if isinstance(module, MixtureLayer)]
            with joined(layers, None if graphs is None else graphs.fixed):
                yield
        finally:
            for module, name, parameter in replaced:
                module._parameters[name] = parameter
            for parameter in wanted:
                parameter.requires_grad_(True)


def _weights_to_copy(model: nn.Module) -> Iterator[tuple[nn.Module, str, dict[str, Any]]]:
    """The float32 weights of products that are faster in another form: module, name, and ``dtype`` where autocast casts
    them before every product, ``memory_format`` for convolutions on a CPU."""
    first = next(model.parameters(), None)
    if first is None:
        return
    kind, last = first.device.type, channels_last_pays(model, first.device)
    cast = {"dtype": torch.get_autocast_dtype(kind)} if torch.is_autocast_enabled(kind) else {}
    products = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    for module in model.modules():
        # with the experts' A and B, which belong to a Linear; other subclasses may change their weight before using it,
        # as the hooks of weight_norm and spectral_norm do
        plain = type(module) in products and not module._forward_pre_hooks
        if plain or (isinstance(module, MixtureLayer) and isinstance(module, products)):
            for name, parameter in list(module.named_parameters(recurse=False)):
                if parameter.ndim > 1 and parameter.dtype == torch.float32:
                    reorder = last and parameter.ndim == 4 and not parameter.is_contiguous(memory_format=LAST)
                    if form := {**cast, **({"memory_format": LAST} if reorder else {})}:
                        yield module, name, form


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
    """One wait for the device per attack, none inside :func:`checked_later`: input in the box, results inside their
    threats and finite, labels from 0 (-100 has no loss in torch).

    Args:
        x: the originals (B, C, H, W).
        y: their labels (B,).
        results: what the attack made of them, each (B, C, H, W).
        allowed: bool (B,): whose results are all inside their threat.
    """
    inside = ((x >= 0) & (x <= 1)).all()
    passed = allowed.all() & inside & (y >= 0).all()

    def settle() -> None:
        if bool(passed):
            return
        check_labels(y)
        if not bool(inside):
            raise UserError(outside_box(x))
        bad = int((~allowed).sum())
        if not all(bool(part.isfinite().all()) for part in results):
            raise FloatingPointError(
                f"the attack produced non-finite images for {bad} of {len(x)} examples: "
                "the gradients of the model are not finite there"
            )
        raise AssertionError(f"the attack left its threat on {bad} of {len(x)} examples: a bug in the attack")

    if (later := _LATER.get()) is None:
        settle()
    else:
        later.append(settle)


_LATER: ContextVar[list[Callable[[], None]] | None] = ContextVar("later", default=None)


@contextmanager
def checked_later() -> Iterator[Callable[[], None]]:
    """Inside, no attack waits for its checks, so that what comes after it is queued on the device meanwhile.

    Gives the function that makes the checks since its last call, and raises what they find. What breaks off inside is
    raised only if they find nothing: they come before it.
    """
    pending: list[Callable[[], None]] = []

    def settle() -> None:
        checks, pending[:] = list(pending), []
        for check in checks:
            check()

    before = _LATER.set(pending)
    try:
        yield settle
    except Exception:
        settle()
        raise
    finally:
        _LATER.reset(before)


def check_bound(kind: str, inside: Tensor, measured: Tensor) -> None:
    """Refuse results outside of a bound that an attack checks itself.

    Args:
        inside: bool (B,), whose result is allowed.
        measured: (B, ...), what that was decided from.

    Raises:
        FloatingPointError: it is not finite, as the model's gradients were not.
        AssertionError: it is, and a result is outside: a bug in the attack.
    """
    if bool(inside.all()):
        return
    if not bool(measured.isfinite().all()):
        raise FloatingPointError(f"{kind} met gradients of the model that are not finite")
    raise AssertionError(f"{kind} left its bound on {int((~inside).sum())} of {len(inside)} examples: a bug")
