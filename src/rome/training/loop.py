"""The training loop, for any method, any model and any number of processes. It survives a kill.

All random numbers of an update are a function of the seed and the update's number, drawn for the global batch. So a
run that is killed and resumed, or distributed over processes, computes what a single undisturbed process computes.
"""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rome.attacks import PGD
from rome.attacks.engine import graphed
from rome.core.console import say
from rome.core.distributed import Team, follow_first, local_share
from rome.core.errors import Interrupted, UserError
from rome.core.graphs import Graphs
from rome.core.randomness import derive_seed, stream
from rome.core.signals import HANDLED, exit_code, handled
from rome.data import Split
from rome.methods import Method, Random, TrainContext
from rome.methods.base import set_lr
from rome.runs.config import Config
from rome.runs.folder import Run
from rome.runs.loggers import Tracking, tracking
from rome.runs.saving import Saver
from rome.threats import Unperturbed
from rome.training.log import Tally, Update, epoch_means, log_line, scalars
from rome.training.step import Step
from rome.training.validation import Validator


class NonFiniteLossError(UserError):
    """The loss became infinite or NaN; the last good checkpoint is kept."""


class Progress(Protocol):
    """A display of the training's progress."""

    def update(self, update: Update) -> None: ...
    def epoch(self, summary: dict[str, Any]) -> None: ...
    def validation(self, found: dict[str, Any]) -> None: ...


@dataclass
class Position:
    """How far a run is: finished epochs, finished updates of the current epoch, and training time in seconds."""

    epoch: int = 0
    step: int = 0
    seconds: float = 0.0


def natural(method: Method, context: TrainContext) -> tuple[Method, TrainContext]:
    """The method and context for natural training, without perturbations. The regularizer stays: a term that separates
    threats is 0, since there is only one, and losses on the use of experts (load balancing, importance) still act."""
    method = method if method.own_natural else Random()
    return method, replace(context, attack=PGD(steps=0, random_start=False), threats=(Unperturbed(),))


def statistics(model: nn.Module) -> Iterator[Tensor]:
    """The running statistics of all BatchNorm layers."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            yield from module.buffers()


class Loop:
    """The training of one run from a position on, with ``steps`` updates per epoch."""

    def __init__(
        self,
        config: Config,
        run: Run,
        fabric: Any,
        context: TrainContext,
        optimizer: torch.optim.Optimizer,
        split: Split,
        steps: int,
        position: Position,
        validator: Validator | None,
        graphs: Graphs | None,
    ) -> None:
        self.config, self.run, self.fabric, self.context = config, run, fabric, context
        self.optimizer, self.split, self.steps, self.position = optimizer, split, steps, position
        self.validator, self.graphs = validator, graphs
        self.step = Step(config, fabric, optimizer)
        self.team = Team(fabric.global_rank, fabric.world_size)
        self.saver = Saver(run, config.checkpoint.minutes)
        self.signal = 0
        """The signal that this process received; 0: none."""
        self.agreed = 0
        """The signal that all processes know of since the last update; 0: none."""
        self.due = False
        """Whether a checkpoint is due by the first process's clock, as all processes know since the last update."""
        self.problem: UserError | None = None
        """Why the first process can no longer write; from then on nothing is saved."""
        self.log_file: Any = None
        self.tracked = Tracking()

    @property
    def updates(self) -> int:
        """Number of finished updates."""
        return self.position.epoch * self.steps + self.position.step

    def run_all(self, shown: Progress | None) -> None:
        graphs = graphed(self.context.attacked, self.graphs)
        with self._logs(), closing(self.saver), self._signals(), graphs:
            while self.position.epoch < self.config.epochs:
                self._epoch(shown)
                self.position = Position(self.position.epoch + 1, 0, self.position.seconds)
                self._validate(shown)
                self._checkpoint()
                if self._stop and self.position.epoch < self.config.epochs:
                    raise self._interrupted()
            self._settle()

    def _epoch(self, shown: Progress | None) -> None:
        config, epoch = self.config, self.position.epoch
        if config.workers:
            self._settle()  # workers are forked, and the writing thread could hold a lock then
        batches = self.split.batches(
            self._order(epoch, self.position.step),
            augment_seed=derive_seed(config.seed, "augment", epoch) if config.data.augment else None,
            device=self.fabric.device,
            workers=local_share(config.workers),
        )
        method, context = config.method, self.context
        context.epoch = epoch
        if epoch < config.natural_epochs:
            method, context = natural(method, context)
        context.model.train()
        if not self.position.step:
            method.epoch_start(context, epoch)
        done = self._logged()
        for step in range(self.position.step, self.steps):
            update = self._update(method, context, batches)
            self.position.step = step + 1
            done.append({"event": "update", **log_line(update)})
            self._write(done[-1])
            if shown is not None:
                shown.update(update)
            if (self._stop or self.due) and self.position.step < self.steps:
                self._checkpoint()
                if self._stop:
                    raise self._interrupted()
        method.epoch_end(context, epoch)
        summary = {"event": "epoch", "update": self.updates, "epoch": epoch + 1, **epoch_means(done)}
        summary["seconds"] = round(self.position.seconds, 3)
        self._write(summary)
        if self.graphs is not None and (news := self.graphs.news()):
            say(f"{config.name}: {news}")
        if shown is not None:
            shown.epoch(summary)

    def _validate(self, shown: Progress | None) -> None:
        """Validate if it is due. This precedes the checkpoint, which includes the result; its time is not counted as
        training time."""
        epoch = self.position.epoch
        if self.validator is None or not self.validator.due(epoch):
            return
        validator, model = self.validator, self.context.attacked
        self._settle()
        try:
            found = validator.measure(model)
        except FloatingPointError as error:
            raise self._diverged(str(error), self.context.lr) from error
        best = self.team.first(lambda: validator.save_if_best(model, epoch, found))
        line = {"event": "validation", "update": self.updates, "epoch": epoch, **found, "best": best}
        line["seconds"] = round(self.position.seconds, 3)
        self._write(line)
        if shown is not None:
            shown.validation(line)

    def _logged(self) -> list[dict[str, Any]]:
        """The log lines of this epoch's updates from before the run was interrupted."""
        if not self.position.step or self.fabric.global_rank:
            return []
        first = self.position.epoch * self.steps
        return [line for line in self.run.log() if line["event"] == "update" and line["update"] > first]

    @property
    def _stop(self) -> int:
        """The signal to stop for. All processes stop at the same update, so that none waits for another."""
        return self.agreed if self.fabric.world_size > 1 else self.signal

    def _interrupted(self) -> Interrupted:
        self._settle()  # if another process ended earlier, the launcher would kill the first one
        name = signal.Signals(self._stop).name
        return Interrupted(
            exit_code(self._stop), f"stopped by {name}; continue with: rome train --resume {self.run.folder}"
        )

    def _settle(self) -> None:
        """Wait until the first process has written everything to disk.

        Raises:
            UserError: it cannot; raised in every process.
        """

        def settled() -> None:
            if self.problem is not None:
                raise self.problem
            self.saver.wait()

        self.team.first(settled)

    def _flags(self) -> tuple[int, int, int]:
        """The values that this process shares with the others at the end of an update: its signal, whether a checkpoint
        is due, and whether something could not be written."""
        if self.fabric.global_rank:
            return self.signal, 0, 0
        with self._failure_recorded():
            self.saver.check()
        return self.signal, self.saver.due(), self.problem is not None

    @contextmanager
    def _failure_recorded(self) -> Iterator[None]:
        """Record an error of writing in the first process, to end all processes together after the next update."""
        try:
            yield
        except UserError as error:
            self.problem = self.problem or error

    def _update(self, method: Method, context: TrainContext, batches: Iterator[tuple[Tensor, Tensor]]) -> Update:
        config, number = self.config, self.updates
        started = time.perf_counter()
        for source, name in ((context.attack_stream, "attack"), (context.threat_stream, "threats")):
            source.generator.manual_seed(derive_seed(config.seed, name, number))
        torch.manual_seed(derive_seed(config.seed, "model", number, self.fabric.global_rank))  # dropout
        lr = config.optimizer.lr * config.schedule.factor((number + 1) / (self.steps * config.epochs))
        context.lr = lr
        set_lr(self.optimizer, lr)

        # attacks bypass DistributedDataParallel, which would do this only for the training forward
        follow_first(statistics(context.attacked))
        tally = Tally(len(context.threats), self.fabric.device)
        try:
            self.step(method, context, batches, tally.add)
        except FloatingPointError as error:  # gradients in the attack are not finite
            raise self._diverged(str(error), lr) from error
        loss, parts, accuracy, (self.agreed, due, failed) = tally.read(self.fabric, config.accumulate, self._flags())
        self.due = bool(due)
        if failed:
            self._settle()
        if not all(map(math.isfinite, (loss, *parts.values()))):
            raise self._diverged(f"the loss became {loss}", lr)
        method.update_end(context)
        seconds = time.perf_counter() - started
        self.position.seconds += seconds
        names = [threat.name for threat in context.threats]
        return Update(
            number=number + 1,
            epoch=round((number + 1) / self.steps, 6),
            loss=loss,
            parts=parts,
            accuracy={names[i]: value for i, value in accuracy.items()},
            lr=lr,
            images_per_second=config.batch_size / seconds,
        )

    def _diverged(self, what: str, lr: float) -> NonFiniteLossError:
        kept = f"; the last good checkpoint is kept in {self.run.folder}" if self.run.checkpoint_file.exists() else ""
        return NonFiniteLossError(
            f"{what} at update {self.updates + 1} of epoch {self.position.epoch + 1} (lr {lr:.3g}){kept}. "
            "Lower optimizer.lr or experts.regularizer.weight, or use precision=fp32."
        )

    def _order(self, epoch: int, first: int) -> list[Tensor]:
        """This process's share of the example indices of every micro-batch, from update ``first`` of the epoch on."""
        order = stream(self.config.seed, f"order:{epoch}").permutation(len(self.split))
        micro = self.config.batch_size // self.config.accumulate
        share, rank = micro // self.fabric.world_size, self.fabric.global_rank
        starts = range(first * self.config.batch_size, self.steps * self.config.batch_size, micro)
        return [order[start + rank * share : start + (rank + 1) * share] for start in starts]

    def _checkpoint(self) -> None:
        """Save a checkpoint, replacing the last one, unless the weights are not finite and training could not continue
        from them."""
        if not torch.stack([p.isfinite().all() for p in self.context.attacked.parameters()]).all():
            raise self._diverged("weights became infinite or NaN", self.optimizer.param_groups[0]["lr"])
        if self.fabric.global_rank or self.problem is not None:
            return
        state = {
            "update": self.updates,
            "epoch": self.position.epoch,
            "step": self.position.step,
            "seconds": self.position.seconds,
            "model": self.context.attacked.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "method": self.config.method.state(),
        }
        best = {} if self.validator is None else {"best": self.validator.best}
        with self._failure_recorded():
            self.saver.save(state, constant=best, log=self.log_file.fileno())

    def _write(self, line: dict[str, Any]) -> None:
        if self.log_file is None or self.problem is not None:
            return
        text = json.dumps(line).encode() + b"\n"
        try:
            while text:  # a disk that fills up first takes a part of it
                text = text[self.log_file.write(text) :]
        except OSError as error:
            self.problem = UserError(
                f"{self.run.log_file} cannot be written ({error.strerror}): make room and continue with --resume"
            )
        self.tracked.log_scalars({f"{line['event']}/{key}": value for key, value in scalars(line)}, line["update"])

    @contextmanager
    def _logs(self) -> Iterator[None]:
        if self.fabric.global_rank:
            yield
            return
        config, folder = self.config, self.run.folder
        self.run.rewind_log(self.updates)
        with (
            open(self.run.log_file, "ab", buffering=0) as self.log_file,
            tracking(config.loggers, folder, config.name, config.dump(), after=self.updates) as self.tracked,
        ):
            yield

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Stop with a checkpoint after the current update on the first signal, and at once on a second SIGINT."""

        def stop(number: int, frame: Any) -> None:
            if self.signal and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.signal = number

        with handled(stop, (signal.SIGINT, *HANDLED)):
            yield
