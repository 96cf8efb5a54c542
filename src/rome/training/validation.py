"""Robustness on held-out training examples during training: a curve over time, and the best weights.

Adversarial training overfits: test robustness peaks and then falls while training robustness still rises, so the field
reports the best checkpoint (Rice, Wong and Kolter, "Overfitting in adversarially robust deep learning", ICML 2020).
Choosing it on test images would amount to training on them; here, examples are held out of the training set instead.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rome.attacks import APGD
from rome.attacks.engine import frozen
from rome.core.errors import UserError
from rome.core.randomness import stream
from rome.data import Split
from rome.data.base import Subset
from rome.models import save_model
from rome.runs.config import Config
from rome.runs.folder import Run
from rome.threats import PerExample


def hold_out(split: Split, n: int, seed: int) -> tuple[Split, Split]:
    """Split training examples at random (stream ``validation``) into those to train on and ``n`` held-out ones.

    Raises:
        UserError: that would leave nothing to train on.
    """
    if n >= len(split):
        raise UserError(f"validation.n={n} takes all {len(split)} training examples; make it smaller")
    order = stream(seed, "validation").permutation(len(split))
    return Subset(split, order[n:].sort().values), Subset(split, order[:n].sort().values)


class Validator:
    """Attacks the held-out examples under every threat of the config, and keeps the best weights.

    An example is robust if neither it nor any iterate of APGD is misclassified; under a threat that brings its own
    attack, if neither the example nor that attack's result is. Validation draws no random numbers of the run, and
    restores the model's mode, flags and BatchNorm statistics: in a single process, training continues as if nothing had
    happened. Several processes divide the examples among them; before that, all of them take over the BatchNorm
    statistics of the first process, which are the ones that are saved.

    Args:
        config: must have ``validation``.
        held: the held-out examples.
    """

    def __init__(self, config: Config, held: Split, run: Run, fabric: Any) -> None:
        assert config.validation is not None
        self.config, self.held, self.run, self.fabric = config, held, run, fabric
        self.every, self.attack = config.validation.every, APGD(steps=config.validation.steps)
        self.best: dict[str, Any] | None = None
        """Epoch, union, average and weights (on the CPU) of the best validation so far; first process only."""

    def due(self, epoch: int) -> bool:
        """Whether to validate after this many epochs: after every ``self.every`` epochs, and at the end."""
        return epoch % self.every == 0 or epoch == self.config.epochs

    def measure(self, model: nn.Module) -> dict[str, Any]:
        """``clean``, ``robust`` under each threat, their ``average`` and ``union``: shares of the held-out examples.

        Raises:
            FloatingPointError: the weights or gradients are not finite.
        """
        names = [threat.name for threat in self.config.threats]
        rank, world, device = self.fabric.global_rank, self.fabric.world_size, self.fabric.device
        if world > 1:
            for buffer in model.buffers():
                torch.distributed.broadcast(buffer, 0)
        own = torch.arange(len(self.held))[rank::world]
        at_a_time = max(self.config.batch_size // self.config.accumulate // world // len(names), 1)
        right = torch.zeros(len(names) + 2, dtype=torch.float64 if device.type != "mps" else None, device=device)
        for x, y in self.held.batches(torch.split(own, at_a_time) if len(own) else (), device=device):
            with torch.autocast(device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
                right += self._right(model, x, y).sum(dim=1)
        counts = self.fabric.all_reduce(right, reduce_op="sum") if world > 1 else right
        clean, *robust, union = (counts / len(self.held)).tolist()
        average = sum(robust) / len(robust)
        return {"clean": clean, "robust": dict(zip(names, robust, strict=True)), "average": average, "union": union}

    def _right(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """bool (2 + threats, B), whether each example is classified correctly: clean, under each threat, under all."""
        threats = self.config.threats
        with frozen(model), torch.no_grad():
            clean = model(x).argmax(dim=1) == y
        mixture = PerExample.repeated(threats, len(x))
        found = self.attack.run(model, x.repeat(len(threats), 1, 1, 1), y.repeat(len(threats)), mixture)
        robust = found.robust.view(len(threats), len(x)) & clean
        return torch.cat([clean[None], robust, robust.all(dim=0)[None]])

    def save_if_best(self, model: nn.Module, epoch: int, found: dict[str, Any]) -> bool:
        """Save the weights as ``best.safetensors`` if their union is the largest so far, and return whether it is.

        Ties are decided by the larger mean over the threats, then by the earlier epoch.
        """
        if self.fabric.global_rank:
            return False
        score = {key: found[key] for key in ("union", "average")}
        if self.best is not None and tuple(score.values()) <= (self.best["union"], self.best["average"]):
            return False
        tensors = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
        self.best = {"epoch": epoch, **score, "model": tensors}
        save_model(model, self.run.best_file, config=self.config.dump())
        return True

    def restore(self, model: nn.Module, best: dict[str, Any] | None) -> None:
        """Resume from a checkpoint: restore ``best.safetensors`` as it was then, whatever a killed process left."""
        self.best = best
        if self.fabric.global_rank:
            return
        if best is None:
            self.run.best_file.unlink(missing_ok=True)
            return
        latest = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        model.load_state_dict(best["model"])
        save_model(model, self.run.best_file, config=self.config.dump())
        model.load_state_dict(latest)
