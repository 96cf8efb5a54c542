"""Host time of an update that is replayed as one graph, or as two: how long a GPU may wait for Python.

    python benchmarks/host.py --threads 1

The models have the modules of the real ones at a small width, and replaying their graphs does nothing. All measured
time is therefore Python's: drawing threats, sorting the batch, checks, looking up graphs. Meanwhile a GPU works on its
queue; it waits only between two updates. ``one graph`` has everything from the attack to the optimizer's step in it;
with ``two graphs``, attack and gradients are replayed and the optimizer steps by itself (on this narrow model, on the
CPU). ``freeze`` is the time to freeze and unfreeze the model, which every attack needed before searches were replayed.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import patch

import torch

import common
from rome import add_experts, create_model
from rome.attacks import PGD
from rome.attacks.engine import frozen, graphed
from rome.core import graphs
from rome.core.graphs import Graphs
from rome.core.randomness import stream
from rome.experts import Diversification
from rome.methods import Random, TrainContext
from rome.methods.base import set_lr
from rome.runs import optim
from rome.runs.config import parse
from rome.runs.optim import AdamW
from rome.threats import CIFAR10
from rome.training.step import SingleProcess, Step


def captured(function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """Run the function and return its result with a replay that does nothing."""
    return (lambda: None), function()


def measure(name: str, *, experts: bool, options: Any, batch: int) -> tuple[dict[str, str], dict[str, Any]]:
    kind, settings = common.TIMM[name]
    heads = settings.get("num_heads", 12 if name == "vit-b" else 6 if name == "vit-s" else 3)
    narrow = {**settings, "embed_dim": 8 * heads, "num_heads": heads}
    model = create_model(kind, num_classes=10, img_size=32, **narrow)
    if experts:
        add_experts(model, experts=4, rank=16)
    model.train()
    context = TrainContext(
        model=model,
        threats=tuple(CIFAR10),
        attack=PGD(steps=1),
        regularizer=Diversification() if experts else None,
        attack_stream=stream(options.seed, "attack"),
        threat_stream=stream(options.seed, "threats"),
        new_optimizer=AdamW().build,
    )
    with patch.object(optim, "fuses", lambda model: True):  # as on CUDA
        optimizer = AdamW().build(model)
    step = Step(
        parse({"data": {"kind": "digits"}, "model": {"name": kind}, "experts": None, "precision": "bf16"}),
        SingleProcess(torch.device("cpu")),
        optimizer,
    )
    x, y = common.images(batch, None, torch.device("cpu"), options.seed)
    method = Random()

    def update() -> None:
        set_lr(optimizer, 1e-3)
        step(method, context, itertools.repeat((x, y)))

    def as_two() -> None:
        with patch.object(Step, "_whole", lambda *arguments: None):
            update()

    def freeze() -> None:
        with torch.autocast("cpu", torch.bfloat16), frozen(model):
            pass

    # a replay that does nothing has no results to compare
    with patch.object(graphs, "_same", lambda one, other: True), graphed(model, Graphs(capture=captured)):
        for _ in range(3):
            update()
            as_two()
        times = common.interleave(
            {"one graph": update, "two graphs": as_two, "freeze": freeze}, torch.device("cpu"), rounds=options.repeats
        )
    label = "RoME+RANDOM" if experts else "RANDOM"
    found = {way: 1000 * statistics.median(values) for way, values in times.items()}
    return (
        {"model": name, "case": label, **{f"{way}, ms": f"{value:.2f}" for way, value in found.items()}},
        {"model": name, "case": label, "batch": batch, "milliseconds": found},
    )


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = common.arguments(__doc__, models=["vit-ti", "vit-b"], batch=[6], repeats=15)
    options = parser.parse_args(argv)
    if options.quick:
        options.models, options.repeats = ["vit-micro"], 1
    device = common.start(options)
    report = common.Report(options, device, argv)
    rows = [
        measure(name, experts=experts, options=options, batch=batch)
        for name in options.models
        for batch in options.batch
        for experts in (False, True)
    ]
    report.table("Host time of a replayed update", [shown for shown, _ in rows], [data for _, data in rows])
    return report.finish()


if __name__ == "__main__":
    main()
