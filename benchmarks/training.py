"""Whole training updates: images per second, share of the hardware's peak, and where the time goes.

    python benchmarks/training.py --device cuda --precision bf16 --ways eager graph compiled --json training.json
    python benchmarks/training.py --models vit-ti --batch 16 --steps-scale 0.1       # on a CPU; ViT-B takes long

Runs rome.train itself, on CIFAR-10 from ``--data`` or on random images: the paper's RANDOM (PGD 20/20/10, one mixed
batch, AdamW) and RoME+RANDOM (experts and L_div), and MAX if ``--methods`` names it, all in the same process, one
update each in turn. A time covers a whole update: images from the data set, attack, training step, optimizer, log.
``--steps-scale`` shortens the attacks. ``--ways`` are eager, CUDA graphs, and CUDA graphs of compiled blocks. Results
are printed and written after each way, model and batch size.

How to read it: ``x RANDOM`` is the median over updates of the time divided by RANDOM's in the same round, with the
smallest and largest in brackets. ``MFU`` is the counted arithmetic of the update (matrix products and convolutions, two
operations per MAC, recomputation not counted) over time x peak. The peak is the data sheet's for known GPUs, otherwise
that of a measured matrix product; ``of product`` is relative to that product's on the same machine. ``20 epochs`` is
the time for 20 x 50,000 images at the full 20/20/10 steps, from the measured images/s or, if ``--steps-scale`` is not
1, extrapolated by the counted arithmetic (marked ~). Goal: ViT-B in at most 30 minutes on one H100; RoME at most 1.10 x
RANDOM on a CPU. ``--profile`` adds two tables per case: the parts of an update (measured in a separate round that waits
for the device around each part) and torch.profiler's top operations by self time; ``busy`` is the share of the update
in which the device was computing.
"""

from __future__ import annotations

import itertools
import queue
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

import common
from flops import count_flops, matmul_flops, peak_flops
from rome.attacks import PGD
from rome.data import CIFAR10_CLASSES, Data, MemorySplit, Split, SplitName
from rome.models import build_model
from rome.runs.config import Config, parse
from rome.threats import CIFAR10
from rome.training.setup import train
from update_profile import show_profile

METHODS = ("RANDOM", "RoME+RANDOM", "MAX", "RoME+MAX")
WAYS = {"eager": {"graphs": False}, "graph": {"graphs": "auto"}, "compiled": {"graphs": "auto", "compile": True}}
STEPS = {"L1": 20, "L2": 20, "Linf": 10}
CIFAR10_IMAGES, EPOCHS = 50_000, 20


class RandomImages(Data):
    """Random images with random labels, as many as in CIFAR-10, for machines without CIFAR-10."""

    kind = "benchmark-random-images"

    def open(self, split: SplitName) -> Split:
        generator = torch.Generator().manual_seed(0)
        count = self._count(split, CIFAR10_IMAGES, "random images")
        return MemorySplit(
            torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator),
            torch.randint(10, (count,), generator=generator),
            CIFAR10_CLASSES,
            levels=255,
            mean=(0.5, 0.5, 0.5),
            std=(0.25, 0.25, 0.25),
            augment=self.augment,
            pad=4,
            flip=True,
        )


def make_config(name: str, method: str, way: str, batch: int, options: Any, device: torch.device) -> Config:
    """Return the config of the paper's run on CIFAR-10."""
    kind, settings = common.TIMM[name]
    data = {"kind": "cifar10", "path": options.data} if options.data else {"kind": RandomImages.kind}
    limit, scale = max(20 * batch, 1000) if options.quick else None, options.steps_scale
    model = {"name": kind, "img_size": 32, "patch_size": settings["patch_size"]}
    model["args"] = {key: value for key, value in settings.items() if key != "patch_size"}
    return parse(
        {
            "seed": options.seed,
            "epochs": EPOCHS,
            "batch_size": batch,
            "device": device.type,
            "precision": options.precision,
            **WAYS[way],
            "data": {**data, "train_limit": limit},
            "model": model,
            "experts": "low-rank" if method.startswith("RoME") else None,
            "method": "max" if method.endswith("MAX") else "random",
            "attack": {"kind": "pgd", "steps": {norm: max(round(n * scale), 1) for norm, n in STEPS.items()}},
            "threats": "cifar10",
        }
    )


def count_update(config: Config, *, full: bool = False) -> float:
    """Counted FLOPs of an update per image of its batch; ``full``: with the unscaled number of attack steps."""
    model = build_model(config.model, config.experts, classes=10, shape=(3, 32, 32))
    flops = count_flops(model)
    attack = PGD() if full else config.attack
    steps = statistics.mean(attack.steps_for(threat) for threat in CIFAR10)
    return (steps * flops.gradient + flops.training) * (len(CIFAR10) if config.method.kind == "max" else 1)


# -- several trainings, one update each in turn ------------------------------------------------------------------------


class StopTraining(BaseException):
    """Raised in the progress display to end a training without saving anything."""


class Training:
    """A rome.train in a thread of its own that does one update per call of :meth:`step`."""

    def __init__(self, config: Config, device: torch.device, folder: str) -> None:
        self.config, self.device, self.folder = config, device, folder
        self.threads = torch.get_num_threads()
        self.go, self.stop = threading.Event(), False
        self.before: Callable[[], None] | None = None
        self.results: queue.Queue[float | BaseException] = queue.Queue()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def step(self, before: Callable[[], None] | None = None) -> float:
        """Do the next update and return its seconds; ``before`` is called first, in the training's thread."""
        self.before = before
        self.go.set()
        result = self.results.get()
        if isinstance(result, BaseException):
            raise result
        return result

    def end(self) -> None:
        """End the training without saving anything."""
        self.stop = True
        self.go.set()
        self.thread.join()

    def _run(self) -> None:
        try:
            torch.set_num_threads(self.threads)
            train(self.config, self.folder, overwrite=True, progress=self._shown)
            raise RuntimeError("training ended before the benchmark; choose fewer --repeats or a smaller --batch")
        except StopTraining:
            pass
        except BaseException as error:  # raised again in the main thread
            self.results.put(error)

    @contextmanager
    def _shown(self, config: Config, total: int, done: int) -> Iterator[Training]:
        self._wait()
        yield self

    def update(self, update: Any) -> None:
        common.synchronize(self.device)
        self.results.put(time.perf_counter() - self.started)
        self._wait()

    def epoch(self, summary: dict[str, Any]) -> None:
        pass

    def _wait(self) -> None:
        self.go.wait()
        self.go.clear()
        if self.stop:
            raise StopTraining
        if self.before is not None:
            self.before()
        common.synchronize(self.device)
        self.started = time.perf_counter()


def measure(
    name: str, batch: int, way: str, options: Any, device: torch.device, report: common.Report
) -> list[dict[str, Any]]:
    """Measure the updates of all methods."""
    common.cast(device, options.precision)  # sets the precision of fp32 products
    common.compile_models()  # resets the compiler; train compiles the models
    configs = {method: make_config(name, method, way, batch, options, device) for method in options.methods}
    flops = {method: count_update(config) for method, config in configs.items()}
    full = {method: count_update(config, full=True) for method, config in configs.items()}
    peak = peak_flops(device, options.precision, size=256 if options.quick else None)
    known = peak.source == "data sheet"
    product = matmul_flops(device, options.precision) if known else peak.flops
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with tempfile.TemporaryDirectory() as folder:
        trainings: dict[str, Training] = {}
        try:
            warmup: dict[str, float] = {}
            for method, config in configs.items():
                trainings[method] = Training(config, device, f"{folder}/{method}")
                warmup[method] = sum(trainings[method].step() for _ in range(options.warmup))
            times: dict[str, list[float]] = {method: [] for method in configs}
            for turn in range(options.repeats):
                for method in options.methods if turn % 2 == 0 else options.methods[::-1]:
                    times[method].append(trainings[method].step())
            memory = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
            if options.profile:
                for method, training in trainings.items():
                    show_profile(f"{name}, batch {batch}, {method}", training, device, report)
        finally:
            for training in trainings.values():
                training.end()
    rows = []
    for method, seconds in times.items():
        middle = statistics.median(seconds)
        achieved = flops[method] * batch / middle
        rows.append(
            {
                "model": name,
                "batch": batch,
                "case": method,
                "attack_steps": configs[method].attack.dump()["steps"],
                "seconds": seconds,
                "warmup_seconds": warmup[method],
                "images_per_second": batch / middle,
                "way": way,
                "ratio": common.ratio(seconds, times[options.methods[0]]),
                "arithmetic": flops[method] / flops[options.methods[0]],
                "flops_per_image": flops[method],
                "achieved_flops": achieved,
                "peak_flops": peak.flops,
                "peak_source": peak.source,
                "product_flops": product,
                "mfu": achieved / peak.flops,
                "of_product": achieved / product,
                "extrapolated": options.steps_scale != 1,
                "minutes_20_epochs": EPOCHS * CIFAR10_IMAGES * full[method] / achieved / 60,
                "gpu_memory_gib": memory,
            }
        )
    return rows


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = common.arguments(__doc__, models=["vit-ti", "vit-s", "vit-b"], batch=[64], repeats=5)
    parser.add_argument("--data", metavar="PATH", help="folder of CIFAR-10; random images by default")
    parser.add_argument("--precision", choices=("fp32", "tf32", "bf16"), default="fp32")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS[:2], help="the first is the reference")
    parser.add_argument(
        "--ways", nargs="+", choices=WAYS, default=["graph"], help="on a CPU, graph is the same as eager"
    )
    parser.add_argument("--steps-scale", type=float, default=1.0, help="factor on the attacks' 20, 20, 10 steps")
    parser.add_argument("--warmup", type=int, default=6, help="untimed updates of each training, which capture graphs")
    parser.add_argument("--profile", action="store_true", help="also show where the time of an update goes")
    options = parser.parse_args(argv)
    if options.quick:
        options.models, options.batch, options.repeats, options.warmup = ["vit-micro"], [6], 2, 1
        options.steps_scale = 0.1
    if "resnet18" in options.models:
        parser.error("resnet18 takes no experts; choose ViTs")
    device = common.start(options)
    report = common.Report(options, device, argv)
    for way, name, batch in itertools.product(options.ways, options.models, options.batch):
        data = measure(name, batch, way, options, device, report)
        rows = []
        for row in data:
            minutes, mark = row["minutes_20_epochs"], "~" if row["extrapolated"] else ""
            rows.append(
                {
                    "model": row["model"],
                    "batch": str(row["batch"]),
                    "steps": "/".join(map(str, row["attack_steps"].values())),
                    "case": row["case"],
                    "ms/update": common.milliseconds(row["seconds"]),
                    "images/s": f"{row['images_per_second']:.4g}",
                    f"x {options.methods[0]}": str(row["ratio"]),
                    "arithmetic": f"{row['arithmetic']:.3f}",
                    "TFLOP/s": f"{row['achieved_flops'] / 1e12:.3g}",
                    "MFU": f"{row['mfu']:.1%}",
                    "of product": f"{row['of_product']:.1%}",
                    "20 epochs": f"{mark}{minutes / 60:.3g} h" if minutes > 120 else f"{mark}{minutes:.3g} min",
                }
            )
        report.table(f"Training updates, {options.precision}, {way}", rows, data)
        peak, memory = data[0]["peak_flops"] / 1e12, data[0]["gpu_memory_gib"]
        report.note(
            f"peak {peak:.3g} TFLOP/s ({data[0]['peak_source']}), product {data[0]['product_flops'] / 1e12:.3g}"
            + (f"; all trainings together took at most {memory:.1f} GiB" if memory else "")
        )
        report.save()
    return report.finish()


if __name__ == "__main__":
    main()
