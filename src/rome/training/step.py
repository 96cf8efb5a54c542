"""One update: attack, training forward, gradients and the optimizer's step, on a GPU replayed as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rome.attacks.checks import deferred_checks
from rome.attacks.engine import graphs_ready
from rome.methods import Method, MinMaxMethod, Outcome, PlannedMethod, TrainContext
from rome.methods.base import Examples, Planned
from rome.runs.config import Config


@dataclass(frozen=True)
class SingleProcess:
    """What :class:`Step` needs of Fabric, for a single process."""

    device: torch.device
    world_size: ClassVar[int] = 1

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients."""
        torch.autograd.backward(loss)

    def no_backward_sync(self, model: nn.Module, *, enabled: bool) -> AbstractContextManager[None]:
        """There is nothing to synchronize."""
        return nullcontext()


class Step:
    """Updates of ``config.accumulate`` micro-batches each.

    Attacks find the model's graphs by themselves (:func:`rome.attacks.engine.graphed`). If a single process trains with
    a method whose objective is separate from its attack, the forward and backward pass of the objective are a graph,
    too. If the method also plans its attacks and an update has one micro-batch, the whole update is one graph, from the
    attack to the step of the optimizer.
    """

    def __init__(self, config: Config, fabric: Any, optimizer: torch.optim.Optimizer) -> None:
        self.config, self.fabric, self.optimizer = config, fabric, optimizer
        self.stepped = False
        """Whether this object has taken a step of the optimizer, which then has its state."""

    def __call__(
        self,
        method: Method,
        context: TrainContext,
        batches: Iterator[tuple[Tensor, Tensor]],
        add: Callable[[Outcome], None] = lambda outcome: None,
    ) -> None:
        """Make an update from the next micro-batches: images (B, C, H, W) and labels (B,).

        Args:
            add: called with the outcome of each micro-batch, which is valid until the next one.

        Raises:
            FloatingPointError: gradients in an attack are not finite.
        """
        with deferred_checks() as settle:  # a GPU has the whole update queued before anything waits for it
            for part in range(self.config.accumulate):
                settle()  # frees the images of the previous part
                x, y = next(batches)
                add(self._micro_batch(method, context, x, y, last=part + 1 == self.config.accumulate))
            settle()

    def _micro_batch(self, method: Method, context: TrainContext, x: Tensor, y: Tensor, *, last: bool) -> Outcome:
        """Attack a batch, and add the gradients of its loss to those of the parameters; after the ``last`` one, the
        optimizer takes its step."""
        kind, alone = self.fabric.device.type, self.fabric.world_size == 1
        with torch.autocast(kind, torch.bfloat16, enabled=self.config.precision == "bf16"):
            if alone and isinstance(method, MinMaxMethod) and type(method).loss is MinMaxMethod.loss:
                if isinstance(method, PlannedMethod) and type(method).perturb is PlannedMethod.perturb:
                    planned = method.plan(context, x, y)
                    if (outcome := self._whole(method, context, planned)) is not None:
                        return outcome
                    examples = planned.run()
                    del planned  # its random numbers
                else:
                    examples = method.perturb(context, x, y)
                outcome = self._objective(method, context, examples)
            else:
                outcome = method.loss(context, x, y)
        if outcome.loss.requires_grad:  # not replayed
            with self.fabric.no_backward_sync(context.model, enabled=not last):
                self.fabric.backward(outcome.loss / self.config.accumulate)
        if last:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.stepped = True
        return outcome

    def _objective(self, method: MinMaxMethod, context: TrainContext, examples: Examples) -> Outcome:
        """The method's objective; if it is replayed as a graph, the gradients are added to those of the parameters."""
        with graphs_ready(context.attacked) as graphs:
            if graphs is None:
                return method.objective(context, examples)
            learning = [parameter for parameter in graphs.parameters if parameter.requires_grad]

            def run(images: Tensor, y: Tensor, labels: Tensor, *more: Tensor) -> Any:
                return self._differentiated(method, context, Examples(images, y, labels, more), learning)

            images, y, labels, more = examples
            tensors = images, y, labels.to(images.device, non_blocking=True), *more
            loss, correct, parts, gradients = graphs.call(
                _key(method, context), run, *tensors, changed=graphs.buffers, in_place=True
            )
        for parameter, gradient in zip(learning, gradients, strict=True):
            if gradient is None:
                continue
            if parameter.grad is not None:
                parameter.grad += gradient
            else:  # the graph's own memory, which its next replay overwrites
                parameter.grad = gradient if self.config.accumulate == 1 else gradient.clone()
        return Outcome(loss, labels, correct, parts)

    def _whole(self, method: PlannedMethod, context: TrainContext, planned: Planned) -> Outcome | None:
        """The update, replayed as one graph; None if it cannot be, and nothing was done."""
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # Fabric wraps it
        groups, search = optimizer.param_groups, planned.attack.search
        # fused optimizers keep everything in tensors
        capturable = self.stepped and search.key is not None and all(group.get("fused") for group in groups)
        if not capturable or self.config.accumulate > 1:
            return None
        with graphs_ready(context.attacked) as graphs:
            if graphs is None:
                return None
            device = self.fabric.device
            more = [tensor.to(device, non_blocking=True) for tensor in planned.more]
            rates = [torch.full((), group["lr"], dtype=torch.float32, device=device) for group in groups]
            first, second = len(search.tensors), len(search.tensors) + len(more)
            key, tensors = (search.key, _key(method, context)), (*search.tensors, *more, *rates)
            if not graphs.replays(key, *tensors):
                return None
            learning = [parameter for parameter in graphs.parameters if parameter.requires_grad]

            def run(*tensors: Tensor) -> Any:
                found, allowed = planned.attack.inside_graph(*tensors[:first])
                examples = planned.examples(found, *tensors[first:second])
                *results, gradients = self._differentiated(method, context, examples, learning)
                for parameter, gradient in zip(learning, gradients, strict=True):
                    parameter.grad = gradient
                with _learning_rates(optimizer, tensors[second:]):
                    optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                return found, allowed, examples.labels, *results

            state = (tensor for each in optimizer.state.values() for tensor in each.values() if torch.is_tensor(tensor))
            changed = (tensor for each in (learning, graphs.buffers, state) for tensor in each)
            found, allowed, labels, *results = graphs.call(key, run, *tensors, changed=changed, in_place=True)
        planned.attack.check(found, allowed)
        loss, correct, parts = results
        return Outcome(loss, labels, correct, parts)

    def _differentiated(
        self,
        method: MinMaxMethod,
        context: TrainContext,
        examples: Examples,
        learning: list[nn.Parameter] | list[Tensor],
    ) -> tuple[Tensor, Tensor, dict[str, Tensor], tuple[Tensor | None, ...]]:
        """Loss, correctness, logged parts, and the gradients of the loss divided by the number of micro-batches."""
        outcome = method.objective(context, examples)
        with torch.autocast(examples.images.device.type, enabled=False):
            loss = outcome.loss / self.config.accumulate
            found = torch.autograd.grad(loss, learning, allow_unused=True)
        gradients = tuple(map(_laid_out_as, found, learning))
        return outcome.loss.detach(), outcome.correct, outcome.parts, gradients


def _laid_out_as(gradient: Tensor | None, parameter: Tensor) -> Tensor | None:
    """The gradient with its parameter's strides, as ``backward`` stores it and fused optimizers expect it."""
    if gradient is None or gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter).copy_(gradient)


def _key(method: Method, context: TrainContext) -> tuple[str, ...]:
    return repr(method), repr(context.threats), repr(context.regularizer)


@contextmanager
def _learning_rates(optimizer: torch.optim.Optimizer, rates: tuple[Tensor, ...]) -> Iterator[None]:
    """Let the optimizer read its learning rates, one for each group, from tensors, which a graph can read."""
    before = [dict(group) for group in optimizer.param_groups]
    try:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
            if rate.is_cuda and torch.cuda.is_current_stream_capturing():
                group["capturable"] = True
        yield
    finally:
        for group, own in zip(optimizer.param_groups, before, strict=True):
            group.clear()
            group.update(own)
