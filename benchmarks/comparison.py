"""The paper's claim at the scale of a quarter of an hour on one GPU: train, evaluate and compare experiments/gpu.

    python benchmarks/comparison.py --data PATH --minutes 6 --json comparison.json
    python benchmarks/comparison.py --data PATH --runs runs/gpu --minutes 60              # keeps the runs

RANDOM, RoME+RANDOM, RANDOM with RoME's experts but without its loss, MAX and RoME+MAX start from the same naturally
trained model and train for equally many updates: as many epochs as fit into ``--minutes`` at the speed of a short pilot
run. When time runs out, the methods at the end of this list are skipped. Each model is evaluated as its config says
(4,000 test images under APGD).

How to read it: ``over`` is the difference in union from the first method on the same images, with a 95% interval
(Agresti and Min 2005) and McNemar's exact p. ``at equal time`` is the mean training accuracy under attack, from the
logs, over the last twentieth of the updates made by the time the fastest training ended; the others had made fewer
updates by then. ``information``, ``distance`` and ``probe`` are the routing numbers of benchmarks/routing.py.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import routing
from rome.evaluation.run import evaluate_saved
from rome.evaluation.statistics import paired_difference
from rome.report.subject import open_subjects
from rome.runs.config import load
from rome.runs.experiments import folder
from rome.runs.folder import Run
from rome.training.setup import train

METHODS = {"random": 1.0, "rome-random": 1.2, "no-loss-random": 1.2, "max": 3.0, "rome-max": 3.6}
"""The experiments -> approximate time of their updates relative to RANDOM's."""
IMAGES, NATURAL, EVALUATION = 50_000, 0.15, 0.15
"""Images per epoch, and the shares of the time for natural training and for evaluation."""
TINY = [
    "model.args={embed_dim: 16, depth: 2, num_heads: 2}", "model.patch_size=8", "batch_size=12", "precision=fp32",
    "data.train_limit=48", "data.test_limit=24", "attack.steps=1",
    "evaluation={suite: {kind: apgd, iterations: 5}, n: 24}",
]  # fmt: skip
"""Overrides for ``--quick``."""


def trained(name: str, runs: Path, *overrides: str) -> Run:
    """Train one of the experiments, unless its finished run exists."""
    run = Run(runs / name)
    if run.model_file.exists():
        return run
    return train(load(folder() / "gpu" / f"{name}.yaml", overrides), runs / name, resume=True)


def rate(run: Run) -> float:
    """Median images per second in the second half of a run."""
    updates = [line["images_per_second"] for line in run.log() if line["event"] == "update"]
    return statistics.median(updates[len(updates) // 2 :])


def before(log: list[dict[str, Any]], seconds: float) -> float:
    """Mean training accuracy under attack over the last twentieth of the updates within this many seconds."""
    ends = [(line["update"], line["seconds"]) for line in log if line["event"] == "epoch"]
    last, total = ends[-1]
    reached = max(int(last * min(seconds / total, 1)), 1)
    updates = [line for line in log if line["event"] == "update" and line["update"] <= reached]
    few = updates[-max(last // 20, 1) :]
    return statistics.fmean(statistics.fmean(line["accuracy"].values()) for line in few)


def compare(options: Any, runs: Path, report: common.Report) -> None:
    """Train and evaluate one method after the other, and print the table after each."""
    started, seconds = time.perf_counter(), 60 * options.minutes
    base = [f"data.path={options.data}", f"device={options.device}", f"seed={options.seed}"]
    base += TINY if options.quick else []
    few = [] if options.quick else ["data.train_limit=7680"]
    first = Run(runs / "natural")
    if not first.model_file.exists():
        short = [*base, *few, "epochs=1", "natural_epochs=1"]
        pilot = train(load(folder() / "gpu" / "natural.yaml", short), runs / "natural-pilot", overwrite=True)
        epochs = min(max(int(NATURAL * seconds * rate(pilot) / IMAGES), 1), 25)
        first = trained("natural", runs, *base, f"epochs={epochs}", f"natural_epochs={epochs}")
    base.append(f"model.weights={first.folder}")
    pilot = train(load(folder() / "gpu" / "random.yaml", [*base, *few, "epochs=1"]), runs / "pilot", overwrite=True)
    speed = rate(pilot)
    left = seconds - (time.perf_counter() - started) - EVALUATION * seconds
    epochs = max(int(left * speed / IMAGES / sum(METHODS.values())), 1)
    report.note(f"{epochs} epochs each, planned from RANDOM's {speed:.0f} images/s")
    done: dict[str, Any] = {}
    for name in METHODS:
        if done and time.perf_counter() - started > seconds:
            report.note(f"out of time before {name}")
            break
        run = trained(name, runs, *base, f"epochs={epochs}")
        evaluated, _ = evaluate_saved(run.folder, device=options.device)
        done[name] = run, evaluated
        rows(done, options, report)
        report.save()


def rows(done: dict[str, Any], options: Any, report: common.Report) -> None:
    """Print the table of the methods evaluated so far."""
    shortest = min(line["seconds"] for run, _ in done.values() for line in run.log()[-1:])
    reference = next(iter(done.values()))[1]
    shown, data = [], []
    for name, (run, evaluated) in done.items():
        over = paired_difference(evaluated.correct.all(axis=1), reference.correct.all(axis=1))
        numbers = routing.routing(open_subjects([run.folder], options.device)[0], 24 if options.quick else 256)
        values = {
            "case": name,
            "updates": run.log()[-1]["update"],
            "seconds": run.log()[-1]["seconds"],
            "clean": evaluated.clean,
            **evaluated.robust,
            "union": evaluated.union,
            "over": list(over),
            "at_equal_time": before(run.log(), shortest),
            **numbers,
        }
        data.append(values)
        percent = {key: f"{100 * values[key]:.1f}" for key in ("clean", *evaluated.robust, "union")}
        shown.append(
            {
                "case": name,
                "updates": str(values["updates"]),
                "s": f"{values['seconds']:.0f}",
                **percent,
                "over": ""
                if evaluated is reference
                else f"{100 * over.value:+.1f} ({100 * over.low:+.1f} to {100 * over.high:+.1f}), p = {over.p:.2g}",
                "at equal time": f"{100 * values['at_equal_time']:.1f}",
                **{
                    key: f"{numbers[key]:.3f}" if key in numbers else "" for key in ("information", "distance", "probe")
                },
            }
        )
    report.tables.pop("Equal updates", None)
    report.table("Equal updates", shown, data)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = common.arguments(__doc__, models=["vit-ti"], batch=[192], repeats=1)
    parser.add_argument("--data", metavar="PATH", required=True, help="folder of CIFAR-10")
    parser.add_argument("--minutes", type=float, default=6.0)
    parser.add_argument("--runs", metavar="DIR", help="folder that keeps the runs; deleted at the end by default")
    options = parser.parse_args(argv)
    options.device = str(common.start(options))
    report = common.Report(options, common.torch.device(options.device), argv)
    with tempfile.TemporaryDirectory() as temporary:
        compare(options, Path(options.runs or temporary), report)
    return report.finish()


if __name__ == "__main__":
    main()
