"""What a config costs: parameters, multiply-accumulates, seconds per update, latency (paper, Table 6); and which layers
of its model get experts (``rome cost --layers``). Nothing is trained."""

from __future__ import annotations

import functools
import itertools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from rome.attacks.engine import graphed
from rome.core.console import print_table
from rome.core.device import numerics, pick_device, placed
from rome.core.graphs import Graphs
from rome.experts import MixtureLayer, block_numbers, expert_layers
from rome.models import keeps_experts, weights_file
from rome.models.compiling import compile_blocks
from rome.report.memory import architecture, gigabytes, peak_memory
from rome.runs.config import Config
from rome.training.setup import graphs_for, train_context
from rome.training.step import SingleProcess, Step

Work = Callable[[], None]
RATIOS = {"latency_one_ms": "latency_one_ratio", "latency_ms": "latency_ratio", "seconds_per_update": "update_ratio"}
"""Name of each timing -> name of its ratio to that of the first config."""
CAPTURES = 15
"""Warm-up updates in which graphs are captured: each mixture of threats has its own, captured at its second or third
update."""


def parameters(model: nn.Module) -> dict[str, int]:
    """Count all parameters, the trainable ones, and those added by experts (including frozen projections, as in the
    paper)."""
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "trainable": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        "experts": sum(map(added, expert_layers(model).values())),
    }


def count(config: Config) -> dict[str, int]:
    """Count the :func:`parameters` of a config's model without allocating them.

    Raises:
        UserError: the number of classes is unknown, because the data is not here.
    """
    with torch.device("meta"):
        return parameters(architecture(config)[0])


def added(layer: MixtureLayer) -> int:
    """Count the parameters that experts add to a layer."""
    return sum(parameter.numel() for name, parameter in layer.named_parameters() if name not in layer.shared)


def macs(model: nn.Module, shape: tuple[int, int, int]) -> int:
    """Count the multiply-accumulates of one image's forward pass: half of torch's FLOP count, which covers matrix
    products and convolutions."""
    device = next(model.parameters()).device
    # attention as plain matrix products: not every torch version counts the fused kernels
    with flop_counter() as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(torch.zeros(1, *shape, device=device))
    return counter.get_total_flops() // 2


def flop_counter() -> FlopCounterMode:
    """Return torch's counter, extended by the in-place matrix product that ends the experts."""

    def addmm_flop(_: Any, left: Any, right: Any, **unused: Any) -> int:
        return 2 * int(left[0]) * int(left[1]) * int(right[1])

    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_flop})


def measure(config: Config, *, repeats: int = 3, timing: bool = True) -> dict[str, Any]:
    """Measure all costs of a config on this machine; see :func:`compare`."""
    return compare([config], repeats=repeats, timing=timing)[0]


def compare(
    configs: Sequence[Config], *, repeats: int = 3, timing: bool = True, memory: bool = False
) -> list[dict[str, Any]]:
    """Measure all costs of several configs on this machine, timed in turn so that its load affects all of them alike.

    Args:
        configs: configs to measure, with random weights and images (the cost depends on neither), in each config's
            precision and compilation, and with CUDA graphs if its training uses them, except that latency is measured
            without autocast and graphs.
        repeats: number of timed updates and of timed forward passes of a batch (five times as many of one image), after
            warm-ups; medians are reported.
        timing: whether to measure times.
        memory: whether to count the memory of training and evaluation.

    Returns:
        For each config ``parameters``, ``trainable``, ``experts`` and ``macs``. With ``memory``, also ``memory``
        (:func:`rome.report.memory.peak_memory`; None if it cannot be counted). With ``timing``, also
        ``seconds_per_update`` (attack, forward, backward and optimizer on one batch; for a method with stages, the mean
        over the epochs), ``latency_ms`` (forward pass of a training batch divided by its images, as in the paper's
        Table 6), ``latency_one_ms`` (forward pass of a single image), and their ratios to the first config,
        ``update_ratio``, ``latency_ratio`` and ``latency_one_ratio``, each as median, least and largest of the rounds.
    """
    costs: list[dict[str, Any]] = []
    works: list[dict[str, list[tuple[Work, float]]]] = []
    graphs: list[tuple[nn.Module, Graphs | None]] = []
    for config in configs:
        weights = config.model.weights
        if weights is not None and Path(weights).expanduser().exists() and weights_file(weights).is_file():
            keeps_experts(config.model, config.experts)  # raises if it could not be trained
        torch.manual_seed(config.seed)
        model, shape, classes = architecture(config)
        costs.append({"name": config.name, **parameters(model), "macs": macs(model.eval(), shape)})
        if memory:
            try:
                costs[-1]["memory"] = peak_memory(config)
            except Exception:  # the control flow of a method or an attack depends on computed values
                costs[-1]["memory"] = None
        if timing:
            device, batch = pick_device(config.device), config.batch_size // config.accumulate
            placed(model, device)
            if config.compile:
                compile_blocks(model)
            graphs.append((model, graphs_for(config, device)))
            name = torch.cuda.get_device_name() if device.type == "cuda" else device.type
            costs[-1] |= {"device": name, "batch_size": config.batch_size, "latency_batch": batch}
            works.append(
                {
                    "latency_one_ms": [(_forward(config, model, shape, device, 1), 1000.0)],
                    "latency_ms": [(_forward(config, model, shape, device, batch), 1000 / batch)],
                    "seconds_per_update": updates(config, model, shape, classes, device),
                }
            )
    with ExitStack() as stack:
        for model, own_graphs in graphs:
            stack.enter_context(graphed(model, own_graphs))
        for what, ratio in RATIOS.items() if timing else ():
            rounds = repeats * 5 if what == "latency_one_ms" else repeats
            captures = what == "seconds_per_update" and any(each for _, each in graphs)
            times = _in_turn([each[what] for each in works], rounds, CAPTURES if captures else 1)
            for facts, own in zip(costs, times, strict=True):
                ratios = [a / b for a, b in zip(own, times[0], strict=True)]
                facts[what] = statistics.median(own)
                facts[ratio] = [statistics.median(ratios), min(ratios), max(ratios)]
    return costs


def updates(
    config: Config, model: nn.Module, shape: tuple[int, int, int], classes: int, device: torch.device
) -> list[tuple[Work, float]]:
    """Return for each of the method's stages a function that runs one update, and the stage's share of the epochs."""
    method = config.method.model_copy(deep=True)  # a copy, since updates change its state
    optimizer = config.optimizer.build(model)
    context = train_context(config, model, device)
    method.prepare(context)
    batch = config.batch_size // config.accumulate
    source = torch.Generator().manual_seed(config.seed)
    x = torch.rand(batch, *shape, generator=source).to(device)
    y = torch.randint(classes, (batch,), generator=source).to(device)

    step = Step(config, SingleProcess(device), optimizer)

    @numerics(config.precision)
    def update(epoch: int) -> None:
        model.train()
        context.epoch = epoch
        step(method, context, itertools.repeat((x, y)))
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


def _in_turn(works: Sequence[list[tuple[Work, float]]], rounds: int, warm_ups: int) -> list[list[float]]:
    """Time each work in each round, in seconds, after some warm-up rounds; the parts of a work are weighted by their
    shares."""
    times: list[list[float]] = [[] for _ in works]
    for _ in range(rounds + warm_ups):
        for own, parts in zip(times, works, strict=True):
            seconds = 0.0
            for work, share in parts:
                started = time.perf_counter()
                work()
                if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
                    torch.cuda.synchronize()
                seconds += share * (time.perf_counter() - started)
            own.append(seconds)
    return [own[warm_ups:] for own in times]


def show_costs(facts: Sequence[dict[str, Any]]) -> None:
    """Print the costs of configs (:func:`compare`), with ratios to the first if there are several."""
    times = {"latency_one_ms": "ms, one image", "latency_ms": "ms/image", "seconds_per_update": "s/update"}
    timed, several = "device" in facts[0], len(facts) > 1
    titles = ["config", "params (M)", "trainable (M)", "experts (M)", "GMACs"]
    titles += ["training", "evaluation"] if "memory" in facts[0] else []
    for title in times.values() if timed else ():
        titles += [title, "x first"] if several else [title]
    rows = []
    for each in facts:
        counts = (f"{each[what] / 1e6:.3f}" for what in ("parameters", "trainable", "experts"))
        cells = [str(each["name"]), *counts, f"{each['macs'] / 1e9:.4g}"]
        if "memory" in each:
            found = each["memory"]
            cells += ["not known" if found is None else gigabytes(found[what]) for what in ("training", "evaluation")]
        for what in times if timed else ():
            middle, low, high = each[RATIOS[what]]
            ratio = f"{middle:.2f} ({low:.2f}\N{EN DASH}{high:.2f})"
            cells += [f"{each[what]:.3g}", ratio] if several else [f"{each[what]:.3g}"]
        rows.append(cells)
    print_table(rows, titles, gap=2)
    if timed:
        batch = "updates of {batch_size} examples, forward passes of {latency_batch}, {device}".format_map(facts[0])
        print(f"{batch}; timed in turn, median (least\N{EN DASH}largest)")


def plan(config: Config) -> dict[str, Any]:
    """Build a config's model with random weights and find out which layers get experts. Performs the checks of training
    except for files: the paper's models need neither images nor RobustBench's package here.

    Returns:
        ``layers``: for each adapted layer its ``name``, ``type``, ``shape`` of the weight, ``block`` (l = 1..L),
        ``beta`` of the gate (None if it has none) and number of ``added`` parameters; ``others``: name, type and shape
        of the Linear and convolutional layers without experts; ``added`` and ``parameters``: counts for the whole
        model.

    Raises:
        UserError: nothing matches ``experts.layers``, or a match cannot be adapted.
    """
    model, _, _ = architecture(config)
    adapted, totals = expert_layers(model), parameters(model)
    blocks = block_numbers(list(adapted))
    inside = tuple(f"{name}." for name in adapted)
    return {
        "name": config.name,
        "layers": [
            {**_describe(name, layer), "block": blocks[name], "beta": _beta(layer), "added": added(layer)}
            for name, layer in adapted.items()
        ],
        "others": [
            _describe(name, module)
            for name, module in model.named_modules()
            if isinstance(module, (nn.Linear, nn.Conv2d)) and name not in adapted and not name.startswith(inside)
        ],
        "added": totals["experts"],
        "parameters": totals["parameters"],
    }


def show_plan(facts: dict[str, Any]) -> None:
    """Print a :func:`plan`; layers without experts whose names differ only in a number share a line."""
    layers, others = facts["layers"], facts["others"]
    print(facts["name"])
    rows = []
    for row in layers:
        beta = "" if row["beta"] is None else f"{row['beta']:.3f}"
        rows.append([row["name"], row["type"], _sizes(row["shape"]), str(row["block"]), beta, f"{row['added']:,}"])
    where = "none, because the config has no experts"
    if layers:
        print_table(rows, ("layer", "type", "shape", "block", "beta", "added"), left=range(3), wrapped=(), gap=2)
        where = f"{len(layers)} of {len(layers) + len(others)} layers, blocks up to {layers[-1]['block']}"
        where += f"; {facts['added']:,} parameters added, {facts['parameters']:,} in total"
    print(f"with experts: {where}")
    groups: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for other in others:
        pattern = ".".join("*" if part.isdigit() else part for part in other["name"].split("."))
        groups[pattern, other["type"], _sizes(other["shape"])].append(other["name"])
    for (pattern, kind, sizes), names in groups.items():
        which = f"{len(names)} x {pattern}" if len(names) > 1 else names[0]
        print(f"without experts: {which} ({kind} {sizes})")


def _describe(name: str, module: nn.Module) -> dict[str, Any]:
    layer = next((cls.__name__ for cls in type(module).__mro__ if cls.__module__.startswith("torch.nn.modules.")), "")
    weight = getattr(module, "weight", None)
    kind, shape = (type(module).__name__, []) if weight is None else (layer, list(weight.shape))
    return {"name": name, "type": kind, "shape": shape}


def _beta(layer: nn.Module) -> float | None:
    """Return the weight of a layer's global gate (Eq. 5), or None if it has none."""
    beta = getattr(getattr(layer, "gate", None), "beta", None)
    return None if beta is None else float(beta)


def _sizes(shape: list[int]) -> str:
    """Format the shape of a weight: ``768 -> 2304``, ``16 -> 160 3x3``."""
    if not shape:
        return ""
    kernel = f" {'x'.join(map(str, shape[2:]))}" if shape[2:] else ""
    return f"{shape[1]} -> {shape[0]}{kernel}"
