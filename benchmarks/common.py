"""Shared code of the benchmarks: models, images, fair timing, hardware, tables and JSON."""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch._dynamo
import torch.nn.functional as F
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from rome.data import Cifar10
from rome.models import create_model

CONSOLE = Console(width=160, highlight=False)

TIMM: dict[str, tuple[str, dict[str, Any]]] = {
    "vit-b": ("vit_base_patch16_224", {"patch_size": 4}),
    "vit-s": ("vit_small_patch16_224", {"patch_size": 4}),
    "vit-ti": ("vit_tiny_patch16_224", {"patch_size": 4}),
    # 4 blocks, 17 tokens: like the model for the digits, limited by overhead rather than arithmetic
    "vit-micro": ("vit_tiny_patch16_224", {"patch_size": 8, "depth": 4, "embed_dim": 64, "num_heads": 4}),
}
"""Models for 32x32 images -> timm name and arguments."""
MODELS = (*TIMM, "resnet18", "resnet18-16")


# -- command line ------------------------------------------------------------------------------------------------------


def arguments(doc: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """Return a parser with the options of all benchmarks; ``defaults`` are ``models``, ``batch``, ``repeats``."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=defaults["models"])
    parser.add_argument("--batch", nargs="+", type=int, default=defaults["batch"])
    parser.add_argument(
        "--repeats", type=int, default=defaults["repeats"], help="rounds, each of which times every case once"
    )
    parser.add_argument("--threads", type=int, help="CPU threads; all cores by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="write settings, hardware and every single time to FILE")
    parser.add_argument("--quick", action="store_true", help="a tiny run, only to see that it works")
    return parser


def start(options: argparse.Namespace) -> torch.device:
    """Set seed and number of threads, and return the device."""
    torch.manual_seed(options.seed)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(options.device)


# -- models and images -------------------------------------------------------------------------------------------------


def make_model(name: str, device: torch.device, seed: int = 0) -> nn.Module:
    """Return a model for 32x32 images of 10 classes, in evaluation mode.

    ResNet-18 has pyautoattack's weights for CIFAR-10; all others, and ``resnet18-16`` of width 16, have seeded random
    weights.
    """
    torch.manual_seed(seed)
    model: nn.Module
    if name == "resnet18":
        model = create_model("resnet_18", num_classes=10, weights="pyautoattack").backbone  # needs no normalisation
    elif name == "resnet18-16":
        model = create_model("resnet_18", num_classes=10, width=16)
    else:
        kind, settings = TIMM[name]
        model = create_model(kind, num_classes=10, img_size=32, **settings)
    return model.to(device).eval()


@functools.lru_cache(maxsize=4)
def _cifar(path: str, n: int) -> tuple[Tensor, Tensor]:
    return Cifar10(path=path, test_limit=n).open("test").first(n)


def images(n: int, data: str | None, device: torch.device, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return the first n test images and labels of CIFAR-10 in the folder ``data``, or random ones if it is None."""
    if data is not None:
        x, y = _cifar(data, n)
    else:
        generator = torch.Generator().manual_seed(seed)
        x = torch.rand(n, 3, 32, 32, generator=generator)
        y = torch.randint(10, (n,), generator=generator)
    return x.to(device), y.to(device)


# -- what is timed -----------------------------------------------------------------------------------------------------


def input_gradient(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    """The bare minimum of an attack step: a forward, and a backward to the input. Freeze the parameters first."""
    x = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(x).float(), y, reduction="sum"), x)
    return gradient


@contextmanager
def frozen_parameters(model: nn.Module) -> Iterator[None]:
    """Disable the gradients of all parameters inside the context."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def cast(device: torch.device, precision: str) -> Any:
    """Return the autocast context for forward passes (bf16 or none), and set the precision of fp32 products."""
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def compile_models(*models: nn.Module) -> None:
    """Compile in place, discarding earlier compilations. Falling back to eager mode raises an error."""
    torch.compiler.reset()
    torch._dynamo.config.recompile_limit = 64  # models share one forward's code, and each has several modes
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    for model in models:
        model.compile()


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleave(
    cases: dict[str, Callable[[], object]],
    device: torch.device,
    *,
    rounds: int,
    warmup: int = 2,
    shortest: float = 0.1,
    every_call: bool = False,
) -> dict[str, list[float]]:
    """Time several cases in turn (A B C, B C A, ...), so that disturbances of the machine affect all of them alike.

    Args:
        warmup: untimed calls of each case before the first round (compiling, allocating, choosing kernels).
        shortest: each timing repeats its case, at most 200 times, until it lasts about this many seconds.
        every_call: wait for the device after every call, not only after every timing: latency instead of throughput.

    Returns:
        Seconds per call of each case, one value per round.
    """

    def timed(case: Callable[[], object], calls: int) -> float:
        synchronize(device)
        started = time.perf_counter()
        for _ in range(calls):
            case()
            if every_call:
                synchronize(device)
        synchronize(device)
        return (time.perf_counter() - started) / calls

    calls: dict[str, int] = {}
    for name, case in cases.items():
        seconds = math.inf
        for _ in range(max(warmup, 1)):
            seconds = min(seconds, timed(case, 1))
        calls[name] = min(max(math.ceil(shortest / seconds), 1), 200)
    times: dict[str, list[float]] = {name: [] for name in cases}
    names = list(cases)
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(timed(cases[name], calls[name]))
    return times


class Ratio(NamedTuple):
    """Median, minimum and maximum of the ratios between times of the same round."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.2f}-{self.high:.2f})"


def ratio(times: Sequence[float], reference: Sequence[float]) -> Ratio:
    """Return the ratios of ``times`` to ``reference``, taken round by round."""
    paired = [a / b for a, b in zip(times, reference, strict=True)]
    return Ratio(statistics.median(paired), min(paired), max(paired))


def milliseconds(times: Sequence[float]) -> str:
    return f"{1000 * statistics.median(times):.4g}"


# -- report ------------------------------------------------------------------------------------------------------------


def hardware(device: torch.device) -> dict[str, Any]:
    """Describe the machine that the numbers are measured on."""
    described: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": [round(value, 2) for value in os.getloadavg()],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": str(device),
    }
    if device.type == "cuda":
        described |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return described


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """Return the commit that the numbers belong to, followed by ``+`` if the working tree differs from it."""
    root = Path(__file__).resolve().parent.parent
    try:
        done = [
            subprocess.run(
                ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
            ).stdout.strip()
            for arguments in (("rev-parse", "--short", "HEAD"), ("status", "--porcelain"))
        ]
    except (OSError, subprocess.CalledProcessError):
        return None
    return done[0] + ("+" if done[1] else "")


class Report:
    """Prints the measured rows as Markdown tables and collects them for the JSON file."""

    def __init__(self, options: argparse.Namespace, device: torch.device, argv: Sequence[str] | None) -> None:
        self.options, self.device = options, device
        script = Path(sys.modules["__main__"].__file__ or "").name if argv is None else ""
        self.head: dict[str, Any] = {
            "command": " ".join(["python", f"benchmarks/{script}", *sys.argv[1:]]) if argv is None else list(argv),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "commit": _commit(),
            "settings": vars(options).copy(),
            "hardware": hardware(device),
        }
        self.tables: dict[str, list[dict[str, Any]]] = {}
        self.notes: list[str] = []
        CONSOLE.print(f"{self.head['date']}, commit {self.head['commit']}, seed {options.seed}")
        CONSOLE.print(", ".join(f"{key} {value}" for key, value in self.head["hardware"].items()) + "\n")

    def table(self, title: str, rows: list[dict[str, str]], data: list[dict[str, Any]]) -> None:
        """Print a table of ``rows``, and add ``data`` to the JSON file's table of that title."""
        CONSOLE.print(f"{title}\n")
        table = Table(box=MARKDOWN)
        for name in rows[0]:
            table.add_column(name, justify="left" if name in ("model", "case", "what", "part") else "right")
        for row in rows:
            table.add_row(*row.values())
        CONSOLE.print(table)
        self.tables.setdefault(title, []).extend(data)

    def measured(
        self,
        measure: Callable[[str, int, argparse.Namespace, torch.device], list[dict[str, Any]]],
        shown: Callable[[dict[str, Any]], dict[str, str]],
        title: str,
    ) -> Iterator[tuple[str, int, list[dict[str, Any]]]]:
        """Measure each model at each batch size, print its table, and yield the model, the batch size and the rows."""
        for name in self.options.models:
            for batch in self.options.batch:
                data = measure(name, batch, self.options, self.device)
                self.table(title, [shown(row) for row in data], data)
                yield name, batch, data

    def note(self, text: str) -> None:
        CONSOLE.print(text + "\n", markup=False)
        self.notes.append(text)

    def save(self) -> dict[str, Any]:
        """Return everything collected so far as plain data, and write it to the file of ``--json``."""
        everything = {**self.head, "tables": self.tables, "notes": self.notes}
        everything["load_at_end"] = [round(value, 2) for value in os.getloadavg()]
        if self.options.json:
            Path(self.options.json).write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")
        return everything

    def finish(self) -> dict[str, Any]:
        """:meth:`save`, and print where it was saved."""
        everything = self.save()
        if self.options.json:
            CONSOLE.print(f"wrote {self.options.json}")
        return everything
