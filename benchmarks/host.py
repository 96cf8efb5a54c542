"""What the host does in an update whose attack and training step are replayed: how long a GPU may wait for it.

    python benchmarks/host.py --threads 1

The models have the modules of the real ones at a small width, and the replay of their graphs does nothing. So all of
the time is Python's: the draw of threats, the order of the batch, the checks, the search for the graphs. A GPU works
meanwhile on what is queued; it waits for the part between two updates. ``freeze`` is what one attack took before whole
searches were found without it: to freeze the model and to thaw it again.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import patch

import torch

import common
from rome import add_experts, create_model
from rome.attacks import PGD
from rome.attacks.checks import checked_later
from rome.attacks.engine import frozen, graphed
from rome.core import graphs
from rome.core.graphs import Graphs
from rome.core.randomness import stream
from rome.experts import Diversification
from rome.methods import Random, TrainContext
from rome.runs.config import parse
from rome.runs.optim import AdamW
from rome.threats import CIFAR10
from rome.training.step import Step


class Alone:
    """One process, on the CPU."""

    device, world_size = torch.device("cpu"), 1


def captured(function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """A capture whose replay does nothing."""
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
    step = Step(
        parse({"data": {"kind": "digits"}, "model": {"name": kind}, "experts": None, "precision": "bf16"}), Alone()
    )
    x, y = common.images(batch, None, torch.device("cpu"), options.seed)
    method = Random()

    def update() -> None:
        with checked_later() as settle:
            step(method, context, x, y, last=True)
            model.zero_grad(set_to_none=True)
            settle()

    def freeze() -> None:
        with torch.autocast("cpu", torch.bfloat16), frozen(model):
            pass

    # a replay that does nothing gives no results to compare
    with patch.object(graphs, "_same", lambda one, other: True), graphed(model, Graphs(capture=captured)):
        for _ in range(3):
            update()
        times = common.interleave({"update": update, "freeze": freeze}, torch.device("cpu"), rounds=options.repeats)
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
    report.table("Host time of an update that is replayed", [shown for shown, _ in rows], [data for _, data in rows])
    return report.finish()


if __name__ == "__main__":
    main()
