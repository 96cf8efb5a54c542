"""How much memory a config takes, found by running its update on fake tensors, which have sizes but no content."""

from __future__ import annotations

import warnings
import weakref
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rome.attacks.checks import deferred_checks
from rome.attacks.engine import frozen, loss_and_gradient
from rome.methods import Method, TrainContext
from rome.models import build_model
from rome.runs.config import Config
from rome.training.setup import train_context

CPU = torch.device("cpu")
AUTO = 250
"""Images per batch assumed for an evaluation that finds its own batch size."""


def architecture(config: Config) -> tuple[nn.Module, tuple[int, int, int], int]:
    """Build a config's model with random weights; return it with the shape of its images and the number of classes."""
    shape, classes = config.data.form(config.model.num_classes)
    return build_model(config.model.architecture_only(), config.experts, classes=classes, shape=shape), shape, classes


def peak_memory(config: Config) -> dict[str, int]:
    """Count the bytes of a config's tensors, as torch allocates them for one process.

    Nothing is computed: the operations of an update run on tensors without content, each of which counts from its
    creation until it is freed. This covers weights, gradients, the optimizer's state, the batch, what is stored for the
    backward pass and intermediate results, in the config's precision and with its ``accumulate``,
    ``activation_checkpointing`` and ``attack_batch_size``. It does not cover the allocator's fragmentation, the working
    memory of single kernels, CUDA's own context (some hundred MB), pools of CUDA graphs (which are given up if memory
    is short), or the communication buckets of several processes, which are as large as the gradients.

    Returns:
        ``state``: between two updates; ``attack`` and ``update``: at the peak of the attack, and of the rest of an
        update; ``training``: the larger of these two; ``evaluation``: at the peak of an attack's forward and backward
        pass on ``evaluation.batch_size`` images.

    Raises:
        Exception: the model cannot be built, or the control flow of the method, an attack or the experts (such as
            feed-forward experts that sort tokens) depends on tensor values, which these tensors do not have.
    """
    with torch.device("meta"):
        model, shape, _ = architecture(config)
    counter = _MemoryCounter(model)
    with warnings.catch_warnings(), counter:
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # a copy of a model does
        with FakeTensorMode(allow_non_fake_inputs=True):
            _without_content(model)
            sizes = config.batch_size // config.accumulate, _evaluation_batch(config)
            (x, y), (x_test, y_test) = [(torch.empty(n, *shape), torch.empty(n, dtype=torch.int64)) for n in sizes]
        with frozen(model):
            loss_and_gradient(model, x_test, y_test)
        found = {"evaluation": counter.peaks[False]}
        del x_test, y_test
        quick = {"attack": _with_one_step(config.attack), "method": _with_one_step(config.method)}
        config = config.model_copy(deep=True, update=quick)
        method, optimizer, context = config.method, config.optimizer.build(model), train_context(config, model, CPU)
        method.prepare(context)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        for stage in method.stages(context.epochs):
            context.epoch = stage.start
            method.epoch_start(context, stage.start)
            counter.peaks.clear()
            before = counter.now
            _update(config, method, context, optimizer, x, y)
            if counter.now > before:  # the method allocated something in its first update that all others already have
                counter.peaks.clear()
                _update(config, method, context, optimizer, x, y)
            found["state"] = counter.now
            for what, training in (("attack", False), ("update", True)):
                found[what] = max(found.get(what, 0), counter.peaks.get(training, 0))
    return found | {"training": max(found["attack"], found["update"])}


def gigabytes(size: float) -> str:
    """Format a size in bytes: ``1.2 GB``, ``3.4 MB``."""
    return f"{size / 1e9:.3g} GB" if size >= 1e9 else f"{size / 1e6:.3g} MB"


def too_large(config: Config, memory: dict[str, int], limit: float) -> dict[str, str]:
    """Describe each part (``attack``, ``update``, ``evaluation``) that does not fit into ``limit`` bytes, and what to
    change."""
    found = {}
    if memory["attack"] > limit:
        half = config.batch_size // config.accumulate // 2 or 1
        less = f"to less than {config.attack_batch_size}" if config.attack_batch_size else f"such as {half}"
        found["attack"] = (
            f"the attack takes {gigabytes(memory['attack'])}: set attack_batch_size, {less} (same results)"
        )
    if memory["update"] > limit:
        ways = [] if config.activation_checkpointing else ["activation_checkpointing=true (same results)"]
        ways += [f"accumulate={2 * config.accumulate} (any BatchNorm sees fewer images at once)"]
        ways += [] if config.precision == "bf16" else ["precision=bf16 (less precise)"]
        found["update"] = f"the update takes {gigabytes(memory['update'])}: set {' or '.join(ways)}"
    if memory["evaluation"] > limit:
        size = config.evaluation.batch_size
        found["evaluation"] = (
            f"an evaluation takes {gigabytes(memory['evaluation'])}: lower evaluation.batch_size ({size})"
        )
    return found


def _update(
    config: Config, method: Method, context: TrainContext, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor
) -> None:
    """Run the last micro-batch of an update; if there are several, gradients of the earlier ones already exist."""
    if config.accumulate == 1:
        optimizer.zero_grad(set_to_none=True)
    context.model.train()
    with deferred_checks():  # not made here, since nothing has content; they hold the attack's images during the update
        with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16"):
            outcome = method.loss(context, x, y)
        torch.autograd.backward(outcome.loss)
        del outcome
        optimizer.step()
    with suppress(DataDependentOutputException):  # E-AT reads its error counts on the host
        method.update_end(context)
    optimizer.zero_grad(set_to_none=True)


class _MemoryCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all tensors without content: ``now``, and in ``peaks`` the maximum since it was cleared,
    while the model was in training mode (True) and in evaluation mode (False), as during attacks."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.model, self.now = model, 0
        self.peaks: dict[bool, int] = {}
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(results):
            if isinstance(leaf, FakeTensor) and (key := leaf.untyped_storage()._cdata) not in self.known:
                self._take(key, leaf.untyped_storage())
        mode = self.model.training
        self.peaks[mode] = max(self.peaks.get(mode, 0), self.now)
        return results

    def _take(self, key: int, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self.now += size
        self.known.add(key)

        def release() -> None:
            self.now -= size
            self.known.discard(key)

        weakref.finalize(storage, release)


def _without_content(model: nn.Module) -> None:
    """Replace a model's tensors by tensors without content; shared tensors stay shared. Convolutional weights get the
    memory format that the attack engine uses on a CPU; otherwise it would copy them."""
    made: dict[int, tuple[Tensor, Tensor]] = {}

    def empty(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            order = torch.channels_last if tensor.ndim == 4 else torch.contiguous_format
            bare = torch.empty(tensor.shape, dtype=tensor.dtype, memory_format=order)
            made[id(tensor)] = (
                tensor,
                nn.Parameter(bare, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else bare,
            )
        return made[id(tensor)][1]

    for module in model.modules():
        tensors: Any
        for tensors in (module._parameters, module._buffers):
            tensors.update({name: empty(tensor) for name, tensor in tensors.items() if tensor is not None})


def _evaluation_batch(config: Config) -> int:
    """Number of images in a batch of the evaluation."""
    size = AUTO if config.evaluation.batch_size == "auto" else config.evaluation.batch_size
    return min(size, config.evaluation.n or size)


def _with_one_step(component: Any) -> Any:
    """Return a copy with one step, which has the same peak as any number of steps."""
    return component.model_copy(update={"steps": 1}) if "steps" in type(component).model_fields else component
