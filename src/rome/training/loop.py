"""The training loop: any method, any model, one or many processes, and it survives a kill.

All random numbers of an update are a function of the seed and the update's number, drawn for the global batch. So a
run that is killed and resumed, or spread over processes, computes what one undisturbed process computes.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rome.attacks import PGD
from rome.attacks.threat import check_channels
from rome.core import trust
from rome.core.device import numerics, placed
from rome.core.distributed import follow_first, launched_together
from rome.core.errors import Interrupted, UserError, first_line
from rome.core.randomness import derive_seed, stream
from rome.core.trial import check_attackable, tried
from rome.data import Split
from rome.methods import Method, Random, Setting
from rome.methods.base import set_lr
from rome.models import build_model, save_model
from rome.runs.config import Config
from rome.runs.folder import Run
from rome.threats import Unperturbed
from rome.training.log import Tally, Update, epoch_means, finite, log_line, scalars
from rome.training.validation import Validator, hold_out


class NonFiniteLossError(UserError):
    """The loss became infinite or NaN; the last good checkpoint is kept."""


class Progress(Protocol):
    """What shows the training to a person."""

    def update(self, update: Update) -> None: ...
    def epoch(self, summary: dict[str, Any]) -> None: ...
    def validation(self, found: dict[str, Any]) -> None: ...


@dataclass
class _Position:
    """Where the run stands."""

    epoch: int = 0
    step: int = 0
    seconds: float = 0.0


@trust.opens_files
def train(
    config: Config,
    out: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: Callable[[Config, int, int], Any] | None = None,
    trust_code: bool = False,
) -> Run:
    """Train as the config says, into a folder.

    Args:
        config: from :func:`rome.runs.config.load`.
        out: the run's folder (see :mod:`rome.runs.folder`).
        resume: go on from the folder's checkpoint, or start if there is none yet.
        overwrite: remove what an earlier run left there.
        progress: makes a context manager with a :class:`Progress`, given config, total updates and updates done.
        trust_code: let the file of a network that measures distances run the code that it names
        (:mod:`rome.core.trust`).

    Returns:
        The finished run.

    Raises:
        UserError: bad settings, data or folder, or a non-finite loss.
        Interrupted: SIGINT or SIGTERM; resume with ``resume=True``.
    """
    run = Run(out)
    try:
        _train(run, config, resume=resume, overwrite=overwrite, progress=progress)
    finally:
        run.release()
    return run


def _train(
    run: Run, config: Config, *, resume: bool, overwrite: bool, progress: Callable[[Config, int, int], Any] | None
) -> None:
    config = config.model_copy(deep=True)  # the method's state belongs to this run alone
    world, micro = launched_together(), config.batch_size // config.accumulate
    if micro % world:
        raise UserError(f"{world} processes do not divide batch_size/accumulate = {micro}; change one of them")
    fabric = _fabric(config)
    rank = fabric.global_rank
    fabric.barrier()  # nobody ends over a mistake while others still look for the first process
    split, held = config.data.open("train"), None
    whole = split
    if config.validation is not None:
        split, held = hold_out(split, config.validation.n, config.seed)
    check_channels(config.threats, config.attack, split.shape[0])
    steps = len(split) // config.batch_size
    if not steps:
        raise UserError(f"batch_size {config.batch_size} exceeds the {len(split)} training examples; make it smaller")

    torch.manual_seed(config.seed)
    model: nn.Module = build_model(config.model, config.experts, classes=len(split.classes), shape=split.shape)
    model = placed(model, fabric.device)
    with tried(model):
        x = split.first(min(3, len(split)))[0].to(fabric.device)
        check_attackable(model, x, name=f"model {config.model.name}")
        if micro == world:
            _check_one_image(model.train(), x[:1])
    optimizer = config.optimizer.build(model)
    setting = Setting(
        model=model,
        attacked=model,
        threats=config.method.trained(config.threats, config.attack),
        attack=config.attack,
        regularizer=config.experts.regularizer if config.experts is not None else None,
        attack_stream=stream(config.seed, "attack", rank=rank, world=world, device=fabric.device),
        threat_stream=stream(config.seed, "threats", rank=rank, world=world),
        new_optimizer=config.optimizer.build,
        epochs=range(config.natural_epochs, config.epochs),
    )
    config.method.prepare(setting)
    checkpoint = _prepare(fabric, run, config, resume=resume, overwrite=overwrite, data=whole)
    position = _Position()
    validator = None if held is None else Validator(config, held, run, fabric)
    if checkpoint is not None:
        try:
            model.load_state_dict(checkpoint["model"])
            optimizer.load_state_dict(checkpoint["optimizer"])
            config.method.load_state(checkpoint["method"])
            position = _Position(checkpoint["epoch"], checkpoint["step"], checkpoint["seconds"])
            if validator is not None:
                validator.restore(model, checkpoint["best"])
        except (RuntimeError, KeyError, ValueError) as error:
            raise UserError(
                f"{run.checkpoint_file} does not fit this config ({str(error).splitlines()[0]}); "
                "restore it, or pass --overwrite to start anew"
            ) from error
    if config.compile:
        model.compile()
    setting.model, optimizer = fabric.setup(model, optimizer)
    loop = _Loop(config, run, fabric, setting, optimizer, split, steps, position, validator)
    with numerics(config.precision):
        if progress is not None and rank == 0:
            with progress(config, steps * config.epochs, loop.updates) as shown:
                loop.run_all(shown)
        else:
            loop.run_all(None)
    if fabric.global_rank == 0:
        save_model(model, run.model_file, config=config.dump())
        run.checkpoint_file.unlink(missing_ok=True)
    fabric.barrier()


def _check_one_image(model: nn.Module, x: Tensor) -> None:
    """Raise UserError if a training forward of one image fails: BatchNorm has no statistics of one value."""
    try:
        model(x)
    except ValueError as error:
        raise UserError(
            f"this model cannot train on one image at a time ({first_line(error)}): make batch_size larger, or "
            "accumulate or the number of processes smaller"
        ) from error


def _prepare(
    fabric: Any, run: Run, config: Config, *, resume: bool, overwrite: bool, data: Split
) -> dict[str, Any] | None:
    """The first process makes the folder ready; what it finds wrong is raised in every process, so that none waits."""
    checkpoint, problem = None, ""
    if fabric.global_rank == 0:
        try:
            checkpoint = run.prepare(config, resume=resume, overwrite=overwrite, data=data)
        except UserError as error:
            problem = str(error)
    problem, goes_on = fabric.broadcast((problem, checkpoint is not None))
    if problem:
        raise UserError(problem)
    return run.load_checkpoint() if goes_on and checkpoint is None else checkpoint


def natural(method: Method, setting: Setting) -> tuple[Method, Setting]:
    """Training without perturbations. The regularizer stays: what parts threats is 0, for there
    are no two, and losses on the use of experts (load balancing, importance) go on."""
    method = method if method.own_natural else Random()
    return method, replace(setting, attack=PGD(steps=0, random_start=False), threats=(Unperturbed(),))


def statistics(model: nn.Module) -> Iterator[Tensor]:
    """The running statistics of BatchNorm."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            yield from module.buffers()


class _Loop:
    def __init__(
        self,
        config: Config,
        run: Run,
        fabric: Any,
        setting: Setting,
        optimizer: torch.optim.Optimizer,
        split: Split,
        steps: int,
        position: _Position,
        validator: Validator | None,
    ) -> None:
        self.config, self.run, self.fabric, self.setting = config, run, fabric, setting
        self.optimizer, self.split, self.steps, self.position = optimizer, split, steps, position
        self.validator = validator
        self.asked = 0
        """The signal this process got."""
        self.agreed = 0
        """The signal that every process knows of since the latest update."""
        self.log_file: Any = None
        self.board: Any = None

    @property
    def updates(self) -> int:
        return self.position.epoch * self.steps + self.position.step

    def run_all(self, shown: Progress | None) -> None:
        with self._logs(), self._signals():
            while self.position.epoch < self.config.epochs:
                self._epoch(shown)
                self.position = _Position(self.position.epoch + 1, 0, self.position.seconds)
                self._validate(shown)
                self._checkpoint()
                if self._stop and self.position.epoch < self.config.epochs:
                    raise self._interrupted()

    def _epoch(self, shown: Progress | None) -> None:
        config, epoch = self.config, self.position.epoch
        batches = self.split.batches(
            self._order(epoch, self.position.step),
            augment_seed=derive_seed(config.seed, "augment", epoch) if config.data.augment else None,
            device=self.fabric.device,
            workers=config.workers,
        )
        method, setting = config.method, self.setting
        setting.epoch = epoch
        if epoch < config.natural_epochs:
            method, setting = natural(method, setting)
        setting.model.train()
        if not self.position.step:
            method.epoch_start(setting, epoch)
        done = self._logged()
        for step in range(self.position.step, self.steps):
            update = self._update(method, setting, batches)
            self.position.step = step + 1
            done.append({"event": "update", **log_line(update)})
            self._write(done[-1])
            if shown is not None:
                shown.update(update)
            if self._stop and self.position.step < self.steps:
                self._checkpoint()
                raise self._interrupted()
        method.epoch_end(setting, epoch)
        summary = {"event": "epoch", "update": self.updates, "epoch": epoch + 1, **epoch_means(done)}
        summary["seconds"] = round(self.position.seconds, 3)
        self._write(summary)
        if shown is not None:
            shown.epoch(summary)

    def _validate(self, shown: Progress | None) -> None:
        """Before the checkpoint, which keeps what was found; its time is not counted as training."""
        epoch = self.position.epoch
        if self.validator is None or not self.validator.due(epoch):
            return
        try:
            found = self.validator.measure(self.setting.attacked)
        except FloatingPointError as error:
            raise self._diverged(str(error), self.setting.lr) from error
        best = self.validator.keep(self.setting.attacked, epoch, found)
        line = {"event": "validation", "update": self.updates, "epoch": epoch, **found, "best": best}
        line["seconds"] = round(self.position.seconds, 3)
        self._write(line)
        if shown is not None:
            shown.validation(line)

    def _logged(self) -> list[dict[str, Any]]:
        """The updates of this epoch that were done before the run was interrupted."""
        if not self.position.step or self.fabric.global_rank:
            return []
        first = self.position.epoch * self.steps
        return [line for line in self.run.log() if line["event"] == "update" and line["update"] > first]

    @property
    def _stop(self) -> int:
        """The signal to stop at: all processes at the same update, so that none waits for another."""
        return self.agreed if self.fabric.world_size > 1 else self.asked

    def _interrupted(self) -> Interrupted:
        self.fabric.barrier()  # the first process has written the checkpoint; whoever ended before would have it killed
        return Interrupted(128 + self._stop, f"stopped by {signal.Signals(self._stop).name}; resume with --resume")

    def _update(self, method: Method, setting: Setting, batches: Iterator[tuple[Tensor, Tensor]]) -> Update:
        config, number = self.config, self.updates
        started = time.perf_counter()
        for source, name in ((setting.attack_stream, "attack"), (setting.threat_stream, "threats")):
            source.generator.manual_seed(derive_seed(config.seed, name, number))
        torch.manual_seed(derive_seed(config.seed, "model", number, self.fabric.global_rank))  # dropout
        lr = config.optimizer.lr * config.schedule.factor((number + 1) / (self.steps * config.epochs))
        setting.lr = lr
        set_lr(self.optimizer, lr)

        # attacks run beside DistributedDataParallel, which would do this for the training forward alone
        follow_first(statistics(setting.attacked))
        tally = Tally(len(setting.threats), self.fabric.device)
        for part in range(config.accumulate):
            x, y = next(batches)
            try:
                with torch.autocast(self.fabric.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                    outcome = method.loss(setting, x, y)
            except FloatingPointError as error:  # the attack met gradients that are not finite
                raise self._diverged(str(error), lr) from error
            with self.fabric.no_backward_sync(setting.model, enabled=part + 1 < config.accumulate):
                self.fabric.backward(outcome.loss / config.accumulate)
            tally.add(outcome)
        loss, parts, accuracy, self.agreed = tally.read(self.fabric, config.accumulate, self.asked)
        if not all(map(finite, (loss, *parts.values()))):
            raise self._diverged(f"the loss became {loss}", lr)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        method.update_end(setting)
        seconds = time.perf_counter() - started
        self.position.seconds += seconds
        names = [threat.name for threat in setting.threats]
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
        """This process's share of every micro-batch from update ``first`` of the epoch on."""
        order = stream(self.config.seed, f"order:{epoch}").permutation(len(self.split))
        micro = self.config.batch_size // self.config.accumulate
        share, rank = micro // self.fabric.world_size, self.fabric.global_rank
        starts = range(first * self.config.batch_size, self.steps * self.config.batch_size, micro)
        return [order[start + rank * share : start + (rank + 1) * share] for start in starts]

    def _checkpoint(self) -> None:
        """Replace the checkpoint, unless the weights are not finite: nothing could go on from those."""
        if not all(bool(p.isfinite().all()) for p in self.setting.attacked.parameters()):
            raise self._diverged("weights became infinite or NaN", self.optimizer.param_groups[0]["lr"])
        if self.fabric.global_rank:
            return
        self.run.save_checkpoint(
            {
                "epoch": self.position.epoch,
                "step": self.position.step,
                "seconds": self.position.seconds,
                "model": self.setting.attacked.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "method": self.config.method.state(),
                **({} if self.validator is None else {"best": self.validator.best}),
            }
        )

    def _write(self, line: dict[str, Any]) -> None:
        if self.log_file is None:
            return
        self.log_file.write(json.dumps(line) + "\n")
        self.log_file.flush()
        for key, value in scalars(line):
            self.board.add_scalar(f"{line['event']}/{key}", value, line["update"])

    @contextmanager
    def _logs(self) -> Iterator[None]:
        if self.fabric.global_rank:
            yield
            return
        from torch.utils.tensorboard import SummaryWriter

        self.run.rewind_log(self.updates)
        self.board = SummaryWriter(str(self.run.tensorboard), purge_step=self.updates + 1)
        with open(self.run.log_file, "a", encoding="utf-8") as self.log_file:
            try:
                yield
            finally:
                self.board.close()

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """The first SIGINT or SIGTERM ends after the current update with a checkpoint; a second SIGINT at once."""

        def ask(number: int, frame: Any) -> None:
            if self.asked and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.asked = number

        try:
            before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not the main thread
            yield
            return
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _fabric(config: Config) -> Any:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from lightning_fabric import Fabric
        from lightning_fabric.plugins.environments.lightning import LightningEnvironment
        from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
        from lightning_fabric.strategies.ddp import DDPStrategy
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # it tells every process's number

    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device: cuda was asked for but torch sees no CUDA device; use device=auto or device=cpu")
    if config.device == "mps" and not torch.backends.mps.is_available():
        raise UserError("device: mps was asked for but torch sees none; use device=auto or device=cpu")
    world = launched_together()
    local = int(os.environ["LOCAL_WORLD_SIZE"]) if world > 1 else 1
    strategy: Any = "auto"
    if world > 1:
        strategy = DDPStrategy(find_unused_parameters=config.method.partial_gradients)
    fabric = Fabric(
        accelerator=config.device,
        devices=local,
        num_nodes=world // local,
        strategy=strategy,
        # not what Lightning takes for one: a shell of SLURM has the variables of a job of several processes
        plugins=[TorchElasticEnvironment() if world > 1 else LightningEnvironment()],
        precision="32-true",  # bf16 is autocast in _update: Fabric's plugin would round the adversarial images too
    )
    fabric.launch()
    return fabric


__all__ = ["NonFiniteLossError", "Progress", "Update", "train"]
