"""What a config costs: parameters, multiply-accumulates, seconds per update, latency (paper Table 6)."""

from __future__ import annotations

import functools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from rome.core.console import print_table
from rome.core.device import numerics, pick_device, placed
from rome.core.errors import UserError
from rome.data import ImageFolder
from rome.experts import FeedForward, MixtureLayer, expert_layers
from rome.models import build_model, trains_on, weights_file
from rome.runs.config import Config, load
from rome.runs.experiments import files, path_of
from rome.training.setup import train_context

Work = Callable[[], None]
RATIOS = {"latency_one_ms": "latency_one_ratio", "latency_ms": "latency_ratio", "seconds_per_update": "update_ratio"}
"""What is timed -> what its ratio to the first config is called."""


def parameters(model: nn.Module) -> dict[str, int]:
    """Counts: all, trainable, and what the experts add (frozen projections counted, as in the paper)."""
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "trainable": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        "experts": sum(map(added, expert_layers(model).values())),
    }


def count(config: Config) -> dict[str, int]:
    """:func:`parameters` of a config's model, which is built without memory.

    Raises:
        UserError: its data are not here, which say how many classes there are.
    """
    shape, classes = config.data.form()
    with torch.device("meta"):
        return parameters(build_model(config.model.without_weights(), config.experts, classes=classes, shape=shape))


def added(layer: MixtureLayer) -> int:
    """Parameters of an adapted layer that the model does not have without experts."""
    return sum(parameter.numel() for name, parameter in layer.named_parameters() if name not in layer.shared)


def macs(model: nn.Module, shape: tuple[int, int, int]) -> int:
    """Multiply-accumulates of one image's forward pass: half of torch's FLOP count, products and convolutions."""
    device = next(model.parameters()).device
    with flop_counter() as counter, torch.no_grad():
        model(torch.zeros(1, *shape, device=device))
    return counter.get_total_flops() // 2


def flop_counter() -> FlopCounterMode:
    """torch's counter, taught the in-place product that the experts end in."""

    def addmm_flop(_: Any, left: Any, right: Any, **unused: Any) -> int:
        return 2 * int(left[0]) * int(left[1]) * int(right[1])

    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_flop})


def measure(config: Config, *, repeats: int = 3, timing: bool = True) -> dict[str, Any]:
    """All costs of a config on this machine; see :func:`compare`."""
    (facts,) = compare([config], repeats=repeats, timing=timing)
    return facts


def compare(configs: Sequence[Config], *, repeats: int = 3, timing: bool = True) -> list[dict[str, Any]]:
    """All costs of some configs on this machine, timed in turn so that its moods hit all of them alike.

    Args:
        configs: weights and images are random: the cost depends on neither. Precision and compilation are theirs, but
            for the latency, which is without autocast.
        repeats: timed updates and forward passes of a batch (of one image five times as many), after one warm-up;
            medians are reported.
        timing: False leaves out everything that takes time.

    Returns:
        For each config ``parameters``, ``trainable``, ``experts``, ``macs``, and with timing ``seconds_per_update``
        (attack, forward, backward, optimizer on one batch; the mean over the epochs of a method with stages),
        ``latency_ms`` (forward of a batch as it is trained, by its images, as in the paper's Table 6),
        ``latency_one_ms`` (forward of one image alone), and their ratios to the first config: ``update_ratio``,
        ``latency_ratio`` and ``latency_one_ratio``, each median, least and largest of the rounds.
    """
    built = []
    for config in configs:
        weights = config.model.weights
        if weights is not None and Path(weights).expanduser().exists() and weights_file(weights).is_file():
            trains_on(config.model, config.experts)  # or it could not be trained
        shape, classes = config.data.form(config.model.num_classes)
        torch.manual_seed(config.seed)
        model = build_model(config.model.architecture_only(), config.experts, classes=classes, shape=shape)
        facts: dict[str, Any] = {"name": config.name, **parameters(model), "macs": macs(model.eval(), shape)}
        built.append((config, model, shape, classes, facts))
    if timing:
        ones, batches, stages = [], [], []
        for config, model, shape, classes, facts in built:
            device = pick_device(config.device)
            placed(model, device)
            if config.compile:
                model.compile()
            batch = config.batch_size // config.accumulate
            facts["device"] = torch.cuda.get_device_name() if device.type == "cuda" else device.type
            facts |= {"batch_size": config.batch_size, "latency_batch": batch}
            ones.append(([(_forward(config, model, shape, device, 1), 1.0)], device))
            batches.append(([(_forward(config, model, shape, device, batch), 1 / batch)], device))
            stages.append((updates(config, model, shape, classes, device), device))
        rounds = zip(_in_turn(ones, repeats * 5), _in_turn(batches, repeats), _in_turn(stages, repeats), strict=True)
        first: list[list[float]] = []
        for (*_, facts), times in zip(built, rounds, strict=True):
            first = first or list(times)
            for (what, ratio), own, other in zip(RATIOS.items(), times, first, strict=True):
                facts[what] = statistics.median(own) * (1000 if what.endswith("_ms") else 1)
                facts[ratio] = _ratios(own, other)
    return [row[-1] for row in built]


def updates(
    config: Config, model: nn.Module, shape: tuple[int, int, int], classes: int, device: torch.device
) -> list[tuple[Work, float]]:
    """One update of each of the method's stages, to be called again and again, and that stage's share of the epochs."""
    method = config.method.model_copy(deep=True)  # its state belongs to these updates alone
    optimizer = config.optimizer.build(model)
    context = train_context(config, model, device)
    method.prepare(context)
    batch = config.batch_size // config.accumulate
    source = torch.Generator().manual_seed(config.seed)
    x = torch.rand(batch, *shape, generator=source).to(device)
    y = torch.randint(classes, (batch,), generator=source).to(device)

    @numerics(config.precision)
    def update(epoch: int) -> None:
        model.train()
        context.epoch = epoch
        for _ in range(config.accumulate):
            with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                outcome = method.loss(context, x, y)
            torch.autograd.backward(outcome.loss / config.accumulate)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        method.update_end(context)

    method.epoch_start(context, 0)
    stages = [(stage.start, max(len(stage), 1)) for stage in method.stages(context.epochs)]
    epochs = sum(length for _, length in stages)
    return [(functools.partial(update, start), length / epochs) for start, length in stages]


def _forward(config: Config, model: nn.Module, shape: tuple[int, int, int], device: torch.device, size: int) -> Work:
    images = torch.zeros(size, *shape, device=device)

    def forward() -> None:
        with numerics(config.precision), torch.no_grad():
            model.eval()(images)

    return forward


def _in_turn(works: Sequence[tuple[list[tuple[Work, float]], torch.device]], rounds: int) -> list[list[float]]:
    """Seconds of each work in each round, after a round that is not counted; parts weighted with their shares."""
    times: list[list[float]] = [[] for _ in works]
    for _ in range(rounds + 1):
        for own, (parts, device) in zip(times, works, strict=True):
            seconds = 0.0
            for work, share in parts:
                started = time.perf_counter()
                work()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                seconds += share * (time.perf_counter() - started)
            own.append(seconds)
    return [own[1:] for own in times]


def _ratios(times: Sequence[float], base: Sequence[float]) -> list[float]:
    """Median, least and largest of the ratios round by round."""
    ratios = [own / other for own, other in zip(times, base, strict=True)]
    return [statistics.median(ratios), min(ratios), max(ratios)]


def show_cost(facts: dict[str, Any]) -> None:
    """Print what :func:`rome.report.cost.measure` found."""
    console = Console(highlight=False, markup=False)
    lines = [
        ("parameters", f"{facts['parameters'] / 1e6:.3f} M", f"{facts['parameters']:,}"),
        ("trainable", f"{facts['trainable'] / 1e6:.3f} M", f"{facts['trainable']:,}"),
        ("added by experts", f"{facts['experts'] / 1e6:.3f} M", f"{facts['experts']:,}"),
        ("multiply-accumulates", f"{facts['macs'] / 1e9:.4g} G", "one image, forward"),
    ]
    if "seconds_per_update" in facts:
        where = facts.get("device", "")
        lines += [
            ("update", f"{facts['seconds_per_update']:.3g} s", f"batch of {facts['batch_size']}, {where}"),
            ("latency per image", f"{facts['latency_ms']:.3g} ms", f"batch of {facts['latency_batch']}, forward"),
            ("latency of one", f"{facts['latency_one_ms']:.3g} ms", "one image alone, forward"),
        ]
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    table.add_column()
    table.add_column(justify="right", no_wrap=True, style="bold")
    table.add_column(style="dim")
    for line in lines:
        table.add_row(*line)
    console.print(Text(str(facts["name"]), style="bold"))
    console.print(table)


def show_costs(facts: Sequence[dict[str, Any]]) -> None:
    """Print what :func:`rome.report.cost.compare` found, beside the first config."""
    console = Console(highlight=False, markup=False)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    timed = "seconds_per_update" in facts[0]
    times = ("ms, one image", "x first", "ms/image", "x first", "s/update", "x first")
    for title in ("config", "params (M)", "GMACs", *(times if timed else ())):
        table.add_column(title, justify="left" if title == "config" else "right", no_wrap=True)
    for each in facts:
        cells = [str(each["name"]), f"{each['parameters'] / 1e6:.2f}", f"{each['macs'] / 1e9:.3f}"]
        if timed:
            for value, ratio in RATIOS.items():
                middle, low, high = each[ratio]
                cells += [f"{each[value]:.3g}", f"{middle:.2f} ({low:.2f}\N{EN DASH}{high:.2f})"]
        table.add_row(*cells)
    print_table(table, console)
    if timed:
        what = f"batch of {facts[0]['batch_size']}, {facts[0]['device']}; in turn, median (least\N{EN DASH}largest)"
        console.print(what, style="dim")


IMAGES = {"digits": 1_437, "cifar10": 50_000, "imagenet100": 126_689, "imagenet": 1_281_167}
"""Training images of the data sets that experiments name."""


def rough_costs(pattern: str = "*") -> Iterator[tuple[str, str]]:
    """Path, and parameters and multiply-accumulates to train, of the experiments; ``pattern`` as above.

    Counted, not measured: those of a forward pass x the method's passes x images x epochs. Models are built without
    memory, one for each architecture.
    """
    counted: dict[str, tuple[int, int] | str] = {}
    for path in files(pattern):
        config = load(path)
        shape, classes = config.data.form(config.model.num_classes)
        experts = None if config.experts is None else {**config.experts.dump(), "regularizer": None}
        key = json.dumps(
            [config.model.architecture_only().model_dump(mode="json"), experts, shape, classes], sort_keys=True
        )
        if key not in counted:
            try:
                counted[key] = _sizes_of(config, classes, shape)
            except UserError as error:  # such as a model from a package that is not here
                counted[key] = str(error).partition(";")[0].partition(":")[0]
        found = counted[key]
        if isinstance(found, str):
            yield path_of(path), found
            continue
        size, products = found
        threats = config.method.trained(config.threats, config.attack)
        natural, attacked = config.natural_epochs, config.epochs - config.natural_epochs
        passes = 3 * natural + (config.method.passes(threats, config.attack) * attacked if attacked else 0)
        work = products * passes * _images(config)
        yield path_of(path), f"{size / 1e6:.2f}M parameters, {work:.2g} multiply-accumulates to train"


def _sizes_of(config: Config, classes: int, shape: tuple[int, int, int]) -> tuple[int, int]:
    """Parameters and multiply-accumulates."""
    sends_tokens = isinstance(config.experts, FeedForward) and config.experts.top is not None  # where, values decide
    with torch.device("cpu" if sends_tokens else "meta"):
        model = build_model(config.model.architecture_only(), config.experts, classes=classes, shape=shape)
        return parameters(model)["parameters"], macs(model.eval(), shape)


def _images(config: Config) -> int:
    known = IMAGES.get(config.data.kind)
    if isinstance(config.data, ImageFolder):
        known = IMAGES["imagenet100" if config.data.classes == "imagenet100" else "imagenet"]
    assert known is not None
    return min(known, config.data.train_limit or known)
