"""What attacks need from a model: loss, input gradient and correctness, computed while the model is frozen."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from rome.attacks.checks import check_results, explain_failure
from rome.core.device import channels_last_pays
from rome.core.errors import UserError
from rome.core.graphs import Graphs, copies
from rome.core.trial import THE_MODEL, evaluating, unusable
from rome.core.trial import Model as Model
from rome.experts.fused import stacked_weights
from rome.experts.gated import MixtureLayer

LAST = torch.channels_last


def log_odds(logits: Tensor, y: Tensor) -> Tensor:
    """Log odds against each label, log sum_{j != y} exp(z_j) - z_y, in float32 or wider: (B,).

    The cross-entropy is the softplus of the log odds, so both rise in the same direction. But where a model is
    confident, the cross-entropy and its gradient vanish in float32 (partly once the label's logit leads by 17, entirely
    from 104 on), and an attack on the cross-entropy would make no progress.
    """
    logits = at_least_float32(logits)
    others = logits.scatter(1, y.unsqueeze(1), -torch.inf)
    return others.logsumexp(dim=1) - logits.gather(1, y.unsqueeze(1)).squeeze(1)


def loss_and_gradient(model: Model, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return :func:`log_odds` (B,), correctness (B,) and input gradient (B, C, H, W) from one forward and backward.

    The losses are summed, not averaged, so that an example's gradient does not depend on the size of the batch.
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


def set_gradient_batch_size(model: nn.Module, at_once: int) -> None:
    """Make :func:`loss_and_gradient` process this model's batches in parts of ``at_once`` images from now on: it needs
    less memory and gives the same numbers."""
    _AT_ONCE[model] = at_once


def logits_of(model: Model, x: Tensor) -> Tensor:
    """The model's logits (B, classes); their gradient with respect to ``x`` must be taken before the next call."""
    if (graphs := graphs_of(model)) is None:
        return model(x)
    call = graphs.differentiable if x.requires_grad and torch.is_grad_enabled() else graphs.call
    answer: Tensor = call("logits", model, padded(x, graphs.rows))
    return answer[: len(x)]


class _Attached(NamedTuple):
    """The graphs of a model and the places of its tensors, stored because traversing its modules takes long."""

    graphs: Graphs
    parameters: list[dict[str, Any]]
    buffers: list[dict[str, Any]]
    layers: list[MixtureLayer]


_GRAPHS: WeakKeyDictionary[nn.Module, _Attached] = WeakKeyDictionary()


@contextmanager
def graphed(model: Model, graphs: Graphs | None) -> Iterator[None]:
    """Let attacks on this model use these CUDA graphs inside the context (None: no graphs); release them afterwards.

    Plain functions, TorchScript programs and models on several devices are called without graphs.
    """
    plain = (nn.DataParallel, torch.jit.ScriptModule)
    if graphs is None or not isinstance(model, nn.Module) or any(isinstance(each, plain) for each in model.modules()):
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
    """The graphs that calls of a model use while its weights do not change; None if it is called without graphs."""
    attached = _GRAPHS.get(model) if isinstance(model, nn.Module) else None
    return attached.graphs if attached is not None and attached.graphs.ready else None


def padded(x: Tensor, rows: int) -> Tensor:
    """Pad a batch with rows of zeros to the next multiple of ``rows``."""
    missing = -len(x) % rows
    return torch.cat([x, x.new_zeros(missing, *x.shape[1:])]) if missing else x


@contextmanager
def graphs_ready(model: nn.Module) -> Iterator[Graphs | None]:
    """Make the graphs of a model ready for use while its weights do not change.

    Yields None if the model has no graphs, if they are already in use, or while gates are recorded, since a replayed
    graph records nothing.
    """
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
    """Margin max_{j != y} z_j - z_y of each example: (B,), positive where it is misclassified."""
    others = logits.scatter(1, y.unsqueeze(1), -torch.inf)
    return others.amax(dim=1) - logits.gather(1, y.unsqueeze(1)).squeeze(1)


def at_least_float32(logits: Tensor) -> Tensor:
    """Convert half-precision logits to float32; return all others unchanged."""
    return logits if logits.dtype == torch.float64 else logits.float()


@contextmanager
def frozen(model: Model) -> Iterator[None]:
    """Put the model in evaluation mode without parameter gradients; restore every flag and weight afterwards.

    BatchNorm statistics do not move, dropout is off, and the backward computes input gradients only. Under autocast the
    weights of matrix products are cast once instead of at every step, with bitwise identical results: autocast's own
    cache skips frozen weights. On a CPU the weights of convolutions are stored channels last. These copies temporarily
    replace the parameters instead of changing their data: a parameter with data of a different dtype would lose
    DistributedDataParallel's hooks, which are attached to its gradient accumulator. If the model has graphs, everything
    computed from weights is in the buffers that the graphs read.
    """
    if not isinstance(model, nn.Module):
        yield
        return
    if reason := unusable([*model.parameters(), *model.buffers()]):
        raise UserError(f"{THE_MODEL} {reason}")
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    replaced: list[tuple[nn.Module, str, nn.Parameter, dict[str, Any]]] = []
    with evaluating(model), graphs_ready(model) as graphs:
        try:
            for parameter in wanted:
                parameter.requires_grad_(False)
            replaced = list(_weights_to_copy(model))
            own = [parameter.detach() for _, _, parameter, _ in replaced]
            copy: Callable[..., Tensor] = Tensor.to if graphs is None else graphs.buffer
            faster = [copy(weight, **form) for weight, (*_, form) in zip(own, replaced, strict=True)]
            if graphs is not None:
                _recompute(faster, own)
            for (module, name, *_), weight in zip(replaced, faster, strict=True):
                module._parameters[name] = nn.Parameter(weight, requires_grad=False)
            layers = [module for module in model.modules() if isinstance(module, MixtureLayer)]
            with stacked_weights(layers, None if graphs is None else graphs.fixed) as join:
                if graphs is not None:
                    graphs.refresh = partial(_recompute, faster, own, join)
                yield
        finally:
            for module, name, parameter, _ in replaced:
                module._parameters[name] = parameter
            for parameter in wanted:
                parameter.requires_grad_(True)


def _recompute(copies: list[Tensor], weights: list[Tensor], join: Callable[[], None] = lambda: None) -> None:
    """Recompute everything that is derived from weights."""
    if copies:
        torch._foreach_copy_(copies, weights)
    join()


class Search(NamedTuple):
    """A search over a batch, as a function of tensors."""

    key: Hashable
    """Together with the tensors' shapes, everything that the search depends on besides the tensors and the model.
    None: it cannot be a graph, because it waits for results."""
    function: Callable[..., tuple[Any, Tensor]]
    """Returns what it found, a tuple that begins with the images (B, C, H, W), and whether the threats allow it: bool
    (B,)."""
    tensors: tuple[Tensor, ...]


@dataclass(frozen=True)
class Plan:
    """An attack on a batch whose random numbers are drawn, before it is run. What it does afterwards depends only on
    tensors, unless the search waits for results."""

    model: Model
    x: Tensor
    """Images (B, C, H, W)."""
    y: Tensor
    """Labels (B,)."""
    search: Search
    autocast: bool = True
    """Whether autocast stays on, if it is."""
    gradient: bool = True
    """Whether the search needs gradients of the model."""

    def run(self) -> Any:
        """Search with a frozen model, check the images, and return what was found.

        If the search has been captured as a graph, only the graph runs; it also recomputes everything that is derived
        from weights.

        Raises:
            UserError: the search failed because of the model or the labels (:func:`explain_failure`).
            FloatingPointError: gradients are not finite.
        """
        with torch.inference_mode(False), self._modes():  # gradients are needed, whatever the caller is doing
            found, allowed = self._found()
            self.check(found, allowed)
        return found

    def inside_graph(self, *tensors: Tensor) -> tuple[Any, Tensor]:
        """Search from these tensors with a frozen model, as a part of a function that is captured as a graph; to be
        followed by :meth:`check`."""
        with self._modes(), frozen(self.model):
            return self.search.function(*tensors)

    def check(self, found: Any, allowed: Tensor) -> None:
        """Check the images and results of the search (:func:`rome.attacks.checks.check_results`)."""
        check_results(self.x, self.y, found[:2], allowed)

    @contextmanager
    def _modes(self) -> Iterator[None]:
        kind = self.x.device.type
        with torch.no_grad(), torch.autocast(kind, enabled=self.autocast and torch.is_autocast_enabled(kind)):
            yield

    def _found(self) -> tuple[Any, Tensor]:
        model, (key, function, tensors) = self.model, self.search
        attached = _GRAPHS.get(model) if isinstance(model, nn.Module) else None
        whole = attached is not None and attached.graphs.whole_searches
        if isinstance(model, nn.Module) and attached is not None and whole and attached.graphs.count:
            with graphs_ready(model) as graphs:
                if graphs is not None and (entry := graphs.captured(key, *tensors)) is not None:
                    return copies(entry(*tensors))
        with frozen(model), explain_failure(model, self.x, self.y, gradient=self.gradient):
            graphs = graphs_of(model)
            if graphs is None or not graphs.whole_searches or key is None:
                return function(*tensors)
            return graphs.call(key, _with_recomputed_weights(graphs, function), *tensors)


def _with_recomputed_weights(graphs: Graphs, function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*tensors: Tensor) -> Any:
        graphs.refresh()
        return function(*tensors)

    return run


def _weights_to_copy(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter, dict[str, Any]]]:
    """The float32 weights that are faster in a different form: module, name, parameter and the arguments of
    ``Tensor.to``: ``dtype`` if autocast would cast them at every use, ``memory_format`` for convolutions on a CPU."""
    first = next(model.parameters(), None)
    if first is None:
        return
    kind, last = first.device.type, channels_last_pays(model, first.device)
    cast = {"dtype": torch.get_autocast_dtype(kind)} if torch.is_autocast_enabled(kind) else {}
    products = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    for module in model.modules():
        # including layers with experts and their A and B; other subclasses, and hooks such as those of weight_norm and
        # spectral_norm, may change the weight before it is used
        plain = type(module) in products and not module._forward_pre_hooks
        if plain or (isinstance(module, MixtureLayer) and isinstance(module, products)):
            for name, parameter in list(module.named_parameters(recurse=False)):
                if parameter.ndim > 1 and parameter.dtype == torch.float32:
                    reorder = last and parameter.ndim == 4 and not parameter.is_contiguous(memory_format=LAST)
                    if form := {**cast, **({"memory_format": LAST} if reorder else {})}:
                        yield module, name, parameter, form
