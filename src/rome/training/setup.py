"""``train``: set up model, data, method and folder from a config, and run the training loop."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rome.attacks.engine import set_gradient_batch_size
from rome.attacks.threat import check_channels
from rome.core import trust
from rome.core.console import say
from rome.core.device import numerics, pick_device, placed
from rome.core.distributed import Team, lost_process_as, own_device, total
from rome.core.errors import UserError, first_line
from rome.core.graphs import Graphs
from rome.core.launched import launched_together
from rome.core.randomness import stream
from rome.core.trial import check_attackable, without_side_effects
from rome.data import Split
from rome.methods import TrainContext
from rome.models import build_model, save_model
from rome.models.checkpointing import checkpoint_blocks
from rome.models.compiling import compile_blocks
from rome.runs.config import Config
from rome.runs.folder import Run
from rome.training.loop import Loop, Position
from rome.training.validation import Validator, hold_out


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
    """Train a model as described by a config, and save it in a folder.

    Args:
        config: from :func:`rome.runs.config.load`.
        out: the run's folder (see :mod:`rome.runs.folder`).
        resume: continue from the folder's checkpoint, or start if there is none yet.
        overwrite: remove the files of an earlier run in the folder.
        progress: called with the config, the total number of updates and the number already done; returns a context
            manager that yields a :class:`~rome.training.loop.Progress`.
        trust_code: allow the file of a network that measures perceptual distances to run the code that it names
            (:mod:`rome.core.trust`).

    Returns:
        The finished run.

    Raises:
        UserError: invalid settings, data or folder, or a non-finite loss.
        Interrupted: SIGINT, SIGTERM, SIGUSR1 or SIGUSR2 was received, or another process ended; continue with
            ``resume=True``.
    """
    run = Run(out)
    try:
        with lost_process_as(f"another process of this training ended; continue with: rome train --resume {out}"):
            _train(run, config, resume=resume, overwrite=overwrite, progress=progress)
    finally:
        run.release()
    return run


def _train(
    run: Run, config: Config, *, resume: bool, overwrite: bool, progress: Callable[[Config, int, int], Any] | None
) -> None:
    # the method's state belongs to this run alone
    config = config.model_copy(update={"model": config.model.pinned()}, deep=True)
    world = launched_together()
    check_settings(config)
    fabric = _fabric(config)
    rank, graphs = fabric.global_rank, graphs_for(config, fabric.device)
    _check_agreed(fabric, config)  # no process may end with an error while others still connect to the first
    start = assemble(config, fabric.device, rank=rank, world=world)
    model, optimizer, context = start.model, start.optimizer, start.context
    checkpoint = _prepare(fabric, run, config, resume=resume, overwrite=overwrite, data=start.whole)
    position = Position()
    validator = None if start.held is None else Validator(config, start.held, run, fabric)
    if checkpoint is not None:
        try:
            model.load_state_dict(checkpoint["model"])
            optimizer.load_state_dict(checkpoint["optimizer"])
            config.method.load_state(checkpoint["method"])
            position = Position(checkpoint["epoch"], checkpoint["step"], checkpoint["seconds"])
            if validator is not None:
                validator.restore(model, checkpoint["best"])
        except (RuntimeError, KeyError, ValueError) as error:
            raise UserError(
                f"{run.checkpoint_file} does not fit this config ({str(error).splitlines()[0]}); "
                "restore it, or pass --overwrite to start anew"
            ) from error
    if config.compile:
        blocks = compile_blocks(model)
        what = f"the model in {blocks} blocks" if blocks else "the model as a whole"
        say(f"{config.name}: compiling {what}; the first updates wait for it")
    context.model, optimizer = fabric.setup(model, optimizer)
    loop = Loop(config, run, fabric, context, optimizer, start.split, start.steps, position, validator, graphs)
    with numerics(config.precision):
        if progress is not None and rank == 0:
            with progress(config, start.steps * config.epochs, loop.updates) as shown:
                loop.run_all(shown)
        else:
            loop.run_all(None)

    def finish() -> None:
        save_model(model, run.model_file, config=config.dump())
        for checkpoint in (run.checkpoint_file, run.before_file):
            checkpoint.unlink(missing_ok=True)

    Team(rank, world).first(finish)


def graphs_for(config: Config, device: torch.device) -> Graphs | None:
    """The container for the model's CUDA graphs, if the config and the device allow any."""
    return Graphs() if config.graphs and device.type == "cuda" else None


@dataclass(frozen=True)
class Start:
    """The data, model, optimizer and method that a training starts from."""

    whole: Split
    """All training examples."""
    split: Split
    """The examples to train on."""
    held: Split | None
    """The examples held out for validation, if any."""
    steps: int
    """Updates in an epoch."""
    model: nn.Module
    optimizer: torch.optim.Optimizer
    context: TrainContext


def assemble(config: Config, device: torch.device, *, rank: int = 0, world: int = 1) -> Start:
    """Create data, model, optimizer and method, and try the model on a few images. Nothing is written.

    Raises:
        UserError: the training cannot start.
    """
    micro = config.batch_size // config.accumulate
    if micro % world:
        raise UserError(f"batch_size/accumulate = {micro} is not a multiple of the {world} processes; change either")
    whole = split = config.data.open("train")
    held = None
    if config.validation is not None:
        split, held = hold_out(split, config.validation.n, config.seed)
    check_channels(config.threats, config.attack, split.shape[0])
    steps = len(split) // config.batch_size
    if not steps:
        raise UserError(f"batch_size {config.batch_size} exceeds the {len(split)} training examples; make it smaller")

    torch.manual_seed(config.seed)
    model: nn.Module = build_model(config.model, config.experts, classes=len(split.classes), shape=split.shape)
    model = placed(model, device)
    with without_side_effects(model):
        x = split.first(min(3, len(split)))[0].to(device)
        check_attackable(model, x, name=f"model {config.model.name}")
        if micro == world:
            _check_one_image(model.train(), x[:1])
    optimizer = config.optimizer.build(model)
    context = train_context(config, model, device, rank=rank, world=world)
    config.method.prepare(context)
    return Start(whole, split, held, steps, model, optimizer, context)


def check_settings(config: Config) -> None:
    """Raise UserError, with a line for every mistake, if this machine or its packages lack what the config needs."""
    found = []
    for logger in config.loggers:
        try:
            logger.check()
        except UserError as error:
            found.append(str(error))
    try:
        kind = pick_device(config.device).type
        if config.graphs is True and kind != "cuda":
            found.append(f"graphs: true needs a CUDA device, and this run is on {kind}; use graphs: auto")
    except UserError as error:
        found.append(str(error))
    if found:
        raise UserError("\n".join(found))


def train_context(
    config: Config, model: nn.Module, device: torch.device, *, rank: int = 0, world: int = 1
) -> TrainContext:
    """The context for the config's method in this one of ``world`` processes. Also sets up the memory savings that the
    config requests for the model.

    Raises:
        UserError: the model does not support these memory savings, or the method these threats.
    """
    if config.activation_checkpointing:
        checkpoint_blocks(model)
    if config.attack_batch_size is not None:
        set_gradient_batch_size(model, config.attack_batch_size)
    return TrainContext(
        model=model,
        threats=config.method.training_threats(config.threats, config.attack),
        attack=config.attack,
        regularizer=config.experts.regularizer if config.experts is not None else None,
        attack_stream=stream(config.seed, "attack", rank=rank, world=world, device=device),
        threat_stream=stream(config.seed, "threats", rank=rank, world=world),
        new_optimizer=config.optimizer.build,
        epochs=range(config.natural_epochs, config.epochs),
    )


def _check_one_image(model: nn.Module, x: Tensor) -> None:
    """Raise UserError if a training forward of one image fails: BatchNorm cannot compute statistics of one value."""
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
    """Prepare the folder in the first process, and return the checkpoint, if any, in every process. An error is raised
    in every process, so that none waits."""
    checkpoint = None

    def ready() -> bool:
        nonlocal checkpoint
        checkpoint = run.prepare(config, resume=resume, overwrite=overwrite, data=data)
        return checkpoint is not None

    resumes = Team(fabric.global_rank, fabric.world_size).first(ready)
    return run.load_checkpoint() if resumes and checkpoint is None else checkpoint


def _check_agreed(fabric: Any, config: Config) -> None:
    """Raise UserError in every process if their settings differ, such as a seed that depends on the task."""
    own = config.dump()
    if total(torch.tensor(float(fabric.broadcast(own) != own), device=fabric.device)):
        raise UserError(
            "the processes were given different settings, but together they train one model: start different runs one "
            "after the other, or with rome sweep"
        )


def _fabric(config: Config) -> Any:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from lightning_fabric import Fabric
        from lightning_fabric.plugins.environments.lightning import LightningEnvironment
        from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
        from lightning_fabric.strategies.ddp import DDPStrategy
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # or every process would print its rank

    world = launched_together()
    local = int(os.environ["LOCAL_WORLD_SIZE"]) if world > 1 else 1
    strategy: Any = "auto"
    devices: Any = 1
    if world > 1:
        own = own_device(pick_device(config.device))  # Fabric takes the one at the index of the local rank
        strategy = DDPStrategy(parallel_devices=[own] * local, find_unused_parameters=config.method.partial_gradients)
        devices = "auto"  # those of the strategy
    fabric = Fabric(
        accelerator=config.device,
        devices=devices,
        num_nodes=world // local,
        strategy=strategy,
        # not chosen by Lightning: a shell in a SLURM job has the variables of several processes
        plugins=[TorchElasticEnvironment() if world > 1 else LightningEnvironment()],
        precision="32-true",  # bf16 is autocast in Step: Fabric's plugin would also round the adversarial images
    )
    fabric.launch()
    return fabric
