"""Cost of checkpoints in training: how long training stops, and how much an update slows down during the write.

    python benchmarks/checkpoints.py --threads 1
    python benchmarks/checkpoints.py --device cuda --models vit-b --batch 128 --folder /scratch

An update is forward, backward and a step of AdamW on clean images. An adversarial update takes about ten times as long,
so the relative cost in adversarial training is a tenth of the one shown. ``x update`` is the median over rounds of the
time divided by that of an update alone in the same round, with the smallest and largest in brackets. ``CPU ms`` is
CPU time, summed over threads; it is less affected by other programs on the machine. The write, including fsync, goes
to ``--folder``.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch

import common
from experts import training
from rome.runs.folder import Run
from rome.runs.saving import Saver


def measure(name: str, batch: int, options: Any, device: torch.device) -> list[dict[str, Any]]:
    """Measure all times of one model."""
    model = common.make_model(name, device, options.seed).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    x, y = common.images(batch, None, device, options.seed)

    def update() -> None:
        training(model, partial(common.cast, device, "fp32"), x, y)
        optimizer.step()

    def timed(work: Callable[[], object]) -> tuple[float, float]:
        common.synchronize(device)
        started, worked = time.perf_counter(), time.process_time()
        work()
        common.synchronize(device)
        return time.perf_counter() - started, time.process_time() - worked

    times: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder, closing(Saver(Run(folder), None)) as saver:

        def save() -> None:
            saver.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()})

        update()  # creates the optimizer's states
        for turn in range(options.repeats + 1):
            found = {"update": timed(update), "stop, written in the background": timed(save)}
            found["update beside the write"] = timed(update)
            saver.wait()
            found["stop, waiting for the write"] = timed(lambda: (save(), saver.wait()))
            for case, both in found.items() if turn else ():
                times.setdefault(case, []).append(both)
        size = (Path(folder) / "last.pt").stat().st_size
    return [
        {
            "model": name,
            "batch": batch,
            "bytes": size,
            "case": case,
            "seconds": [seconds for seconds, _ in both],
            "processor": [seconds for _, seconds in both],
            "ratio": common.ratio([seconds for seconds, _ in both], [seconds for seconds, _ in times["update"]]),
        }
        for case, both in times.items()
    ]


def shown(row: dict[str, Any]) -> dict[str, str]:
    """Format a row of the printed table."""
    return {
        **{key: str(row[key]) for key in ("model", "batch", "case")},
        "MB": f"{row['bytes'] / 1e6:.0f}",
        "ms": common.milliseconds(row["seconds"]),
        "CPU ms": common.milliseconds(row["processor"]),
        "x update": str(row["ratio"]),
    }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = common.arguments(__doc__, models=["vit-ti", "vit-b"], batch=[8], repeats=5)
    parser.add_argument("--folder", help="folder to write to; the system's folder for temporary files by default")
    options = parser.parse_args(argv)
    if options.quick:
        options.models, options.batch, options.repeats = ["resnet18-16"], [2], 1
    device = common.start(options)
    report = common.Report(options, device, argv)
    list(report.measured(measure, shown, "Checkpoints"))
    return report.finish()


if __name__ == "__main__":
    main()
