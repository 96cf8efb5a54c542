"""What attacks need of a model: loss, input gradient and verdict, with the model frozen."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from rome.attacks.checks import explained
from rome.core.device import channels_last_pays
from rome.core.errors import UserError
from rome.core.graphs import Graphs, copies
from rome.core.trial import THE_MODEL, evaluating, unusable
from rome.core.trial import Model as Model
from rome.experts.fused import joined
from rome.experts.gated import MixtureLayer

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
    at_once = _AT_ONCE.get(model, len(x)) if isinstance(model, nn.Module) else len(x)

    def step(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if len(x) > at_once:
            parts = zip(*map(step, torch.split(x, at_once), torch.split(y, at_once)), strict=True)
            loss, correct, gradient = map(torch.cat, parts)
            return loss, correct, gradient
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


_AT_ONCE: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


def differentiate_in_parts(model: nn.Module, at_once: int) -> None:
    """From now on :func:`loss_and_gradient` of this model takes that many images at once: less memory, and the same
    numbers."""
    _AT_ONCE[model] = at_once


def logits_of(model: Model, x: Tensor) -> Tensor:
    """The model's logits (B, classes), to be differentiated with respect to ``x`` before its next call."""
    if (graphs := graphs_of(model)) is None:
        return model(x)
    call = graphs.differentiable if x.requires_grad and torch.is_grad_enabled() else graphs.call
    answer: Tensor = call("logits", model, padded(x, graphs.rows))
    return answer[: len(x)]


class _Attached(NamedTuple):
    """The graphs of a model, and where it holds its tensors: to walk through its modules takes long."""

    graphs: Graphs
    parameters: list[dict[str, Any]]
    buffers: list[dict[str, Any]]
    layers: list[MixtureLayer]


_GRAPHS: WeakKeyDictionary[nn.Module, _Attached] = WeakKeyDictionary()


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
    modules = list(model.modules())
    _GRAPHS[model] = _Attached(
        graphs,
        [module._parameters for module in modules],
        [module._buffers for module in modules],
        [module for module in modules if isinstance(module, MixtureLayer)],
    )
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
    attached = _GRAPHS.get(model) if isinstance(model, nn.Module) else None
    return attached.graphs if attached is not None and attached.graphs.ready else None


def padded(x: Tensor, rows: int) -> Tensor:
    """A batch with rows of zeros added to the next multiple of ``rows``."""
    missing = -len(x) % rows
    return torch.cat([x, x.new_zeros(missing, *x.shape[1:])]) if missing else x


@contextmanager
def graphs_on(model: nn.Module) -> Iterator[Graphs | None]:
    """The graphs of a model whose weights do not change inside, made ready for it; None if it has none, inside another
    such context, and where gates are recorded, since a graph that is replayed records nothing."""
    attached = _GRAPHS.get(model)
    if attached is None or attached.graphs.ready or any(layer.sink is not None for layer in attached.layers):
        yield None
        return
    parameters, buffers = (
        list(dict.fromkeys(tensor for one in held for tensor in one.values() if tensor is not None))
        for held in (attached.parameters, attached.buffers)
    )
    with attached.graphs.on(parameters, buffers, tuple(layer.graph_state for layer in attached.layers)):
        yield attached.graphs


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
                faster = [weight.to(**form) for weight, form in zip(own, forms, strict=True)]
            else:
                faster = [graphs.buffer(weight, **form) for weight, form in zip(own, forms, strict=True)]
                _anew(faster, own)
            for (module, name, _), weight in zip(weights, faster, strict=True):
                module._parameters[name] = nn.Parameter(weight, requires_grad=False)
            layers = [module for module in model.modules() if isinstance(module, MixtureLayer)]
            with joined(layers, None if graphs is None else graphs.fixed) as join:
                if graphs is not None:
                    graphs.refresh = partial(_anew, faster, own, join)
                yield
        finally:
            for module, name, parameter in replaced:
                module._parameters[name] = parameter
            for parameter in wanted:
                parameter.requires_grad_(True)


def _anew(copies: list[Tensor], weights: list[Tensor], join: Callable[[], None] = lambda: None) -> None:
    """Make anew what is made of weights."""
    if copies:
        torch._foreach_copy_(copies, weights)
    join()


class Search(NamedTuple):
    """A search of a batch, as a function of tensors."""

    key: Hashable
    """With the tensors' shapes, whatever it depends on beside them and the model. None: no graph can hold it, because
    it waits for results."""
    function: Callable[..., Any]
    tensors: tuple[Tensor, ...]


def searched(model: Model, searches: list[Search], x: Tensor, y: Tensor, *, gradient: bool = True) -> list[Any]:
    """What searches with a frozen model find in images x (B, C, H, W) with labels y (B,).

    Where graphs hold all of them, these are all that runs: whatever is made of weights is made inside of them.

    Raises:
        UserError: a search broke off because of the model or the labels (:func:`explained`).
    """
    with torch.no_grad():
        attached = _GRAPHS.get(model) if isinstance(model, nn.Module) else None
        if isinstance(model, nn.Module) and attached is not None and attached.graphs.whole and attached.graphs.count:
            with graphs_on(model) as graphs:
                found = [graphs.captured(search.key, *search.tensors) for search in searches] if graphs else []
                if (entries := [entry for entry in found if entry]) and len(entries) == len(searches):
                    return [copies(entry(*search.tensors)) for entry, search in zip(entries, searches, strict=True)]
        with frozen(model), explained(model, x, y, gradient=gradient):
            graphs = graphs_of(model)
            if graphs is None or not graphs.whole:
                return [search.function(*search.tensors) for search in searches]
            return [
                search.function(*search.tensors)
                if search.key is None
                else graphs.call(search.key, _with_weights_anew(graphs, search.function), *search.tensors)
                for search in searches
            ]


def _with_weights_anew(graphs: Graphs, function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*tensors: Tensor) -> Any:
        graphs.refresh()
        return function(*tensors)

    return run


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
