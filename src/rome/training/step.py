"""One micro-batch: attack, training forward and gradients, replayed as CUDA graphs on a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rome.attacks.engine import graphs_ready
from rome.core.graphs import Graphs
from rome.methods import Method, MinMaxMethod, Outcome, TrainContext
from rome.methods.base import Examples
from rome.runs.config import Config


class Step:
    """Loss and gradients of micro-batches, of which ``config.accumulate`` make an update.

    Attacks find the model's graphs by themselves (:func:`rome.attacks.engine.graphed`). The objective's forward and
    backward pass is captured as a graph if a single process trains with a method whose objective is separate from its
    attack.
    """

    def __init__(self, config: Config, fabric: Any) -> None:
        self.config, self.fabric = config, fabric

    def __call__(self, method: Method, context: TrainContext, x: Tensor, y: Tensor, *, last: bool) -> Outcome:
        """Attack a batch (B, C, H, W), and add the gradients of its loss to those of the parameters.

        Args:
            last: whether this is the last micro-batch of the update.

        Raises:
            FloatingPointError: gradients in the attack are not finite.
        """
        kind, parts = self.fabric.device.type, self.config.accumulate
        with torch.autocast(kind, torch.bfloat16, enabled=self.config.precision == "bf16"):
            alone = self.fabric.world_size == 1
            if alone and isinstance(method, MinMaxMethod) and type(method).loss is MinMaxMethod.loss:
                examples = method.perturb(context, x, y)
                with graphs_ready(context.attacked) as graphs:
                    if graphs is not None:
                        return self._replayed(graphs, method, context, examples)
                outcome = method.objective(context, examples)
            else:
                outcome = method.loss(context, x, y)
        with self.fabric.no_backward_sync(context.model, enabled=not last):
            self.fabric.backward(outcome.loss / parts)
        return outcome

    def _replayed(self, graphs: Graphs, method: MinMaxMethod, context: TrainContext, examples: Examples) -> Outcome:
        parts, kind = self.config.accumulate, examples.images.device.type
        learning = [parameter for parameter in graphs.parameters if parameter.requires_grad]

        def differentiate(images: Tensor, y: Tensor, labels: Tensor, *more: Tensor) -> Any:
            outcome = method.objective(context, Examples(images, y, labels, more))
            with torch.autocast(kind, enabled=False):
                gradients = torch.autograd.grad(outcome.loss / parts, learning, allow_unused=True)
            return outcome.loss.detach(), outcome.correct, outcome.parts, gradients

        images, y, labels, more = examples
        loss, correct, terms, gradients = graphs.call(
            (repr(method), repr(context.threats), repr(context.regularizer)),
            differentiate,
            images,
            y,
            labels.to(images.device, non_blocking=True),
            *more,
            changed=graphs.buffers,
            in_place=True,
        )
        for parameter, gradient in zip(learning, gradients, strict=True):
            if gradient is None:
                continue
            if parameter.grad is not None:
                parameter.grad += gradient
            else:  # the graph's own memory, which its next replay overwrites
                parameter.grad = gradient if parts == 1 else gradient.clone()
        return Outcome(loss, labels, correct, terms)
