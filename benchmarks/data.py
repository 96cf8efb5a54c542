"""Cost of reading a large data set: time to open it, memory of several processes, and images per second.

    python benchmarks/data.py --images 1281167 --kinds folder parquet --ranks 8 --workers 2 --threads 1

The images are tiny JPEG files in 1,000 class folders, hard links to a few hundred distinct files; or the same images as
rows of Parquet files with 100 rows per group. Each of ``--ranks`` processes opens the data set and reads ``--read``
images in random order with ``--workers`` worker processes. Memory is measured by Linux while all of them are running:
``unique`` is the memory that one process shares with no other; ``together`` sums the proportional set sizes (PSS),
which divide shared memory among its users, and is what all processes need. Each data set is opened twice, because the
first time may leave a list of the files for the second.
"""

from __future__ import annotations

import argparse
import importlib
import io
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from rome.data import Data, ImageFolder, Parquet

CLASSES, DIFFERENT, GROUP, SHARD = 1000, 500, 100, 40_000


def jpegs(side: int, seed: int) -> list[bytes]:
    """Return JPEG files of smooth noise, which are about as large as photographs of this size."""
    files, generator = [], np.random.default_rng(seed)
    for _ in range(DIFFERENT):
        small = Image.fromarray(generator.integers(0, 256, (side // 4, side // 4, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        small.resize((side, side), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    return files


def make_folder(root: Path, images: list[bytes], n: int) -> None:
    """Make ``train`` with n images and ``val`` with one image per class."""
    for number, content in enumerate(images):
        (root / "source").mkdir(parents=True, exist_ok=True)
        (root / "source" / f"{number}.JPEG").write_bytes(content)
    for split, count in (("train", n), ("val", CLASSES)):
        for label in range(CLASSES):
            folder = root / split / f"n{label:08}"
            folder.mkdir(parents=True)
            for number in range(label, count, CLASSES):
                os.link(root / "source" / f"{number % DIFFERENT}.JPEG", folder / f"{split}_{number}.JPEG")


def make_parquet(root: Path, images: list[bytes], n: int) -> None:
    """Make Parquet files of ``train`` with n images and ``test`` with one image per class."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    root.mkdir(parents=True)
    for split, count in (("train", n), ("test", CLASSES)):
        pieces = -(-count // SHARD)
        for piece in range(pieces):
            numbers = range(piece * SHARD, min((piece + 1) * SHARD, count))
            rows = [{"bytes": images[number % DIFFERENT] + f"{number:07}".encode(), "path": None} for number in numbers]
            labels = [number * 7919 % CLASSES for number in numbers]
            table = pa.table({"image": pa.array(rows, kind), "label": labels})
            pq.write_table(table, root / f"{split}-{piece:05}-of-{pieces:05}.parquet", row_group_size=GROUP)


def memory(pid: int | str) -> dict[str, int]:
    """Return a process's unshared memory and its proportional set size, in bytes."""
    sizes = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, value = line.split()[:2]
        sizes[name.rstrip(":")] = 1024 * int(value)
    return {"unique": sizes["Private_Clean"] + sizes["Private_Dirty"], "pss": sizes["Pss"]}


def read(data: Data, number: int, options: argparse.Namespace, barrier: Any, results: Any) -> None:
    """Run one rank: open the training images and read some of them."""
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # as in processes of torchrun, unlike in this spawned one
    for module in ("pyarrow.compute", "pyarrow.parquet", "timm.data.transforms_factory"):
        importlib.import_module(module)  # imported before memory is measured

    begun = memory("self")
    barrier.wait()
    started = time.perf_counter()
    split = data.open("train")
    opened = time.perf_counter() - started
    after = memory("self")
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(number)).split(options.batch)
    batches = split.batches(order, augment_seed=0, workers=options.workers)
    barrier.wait()
    started = time.perf_counter()
    for _ in range(max(options.read // options.batch, 1)):
        next(batches)
    seconds = time.perf_counter() - started
    barrier.wait()  # measure while all ranks and their workers are running
    workers = [memory(child.pid or 0) for child in multiprocessing.active_children()]
    measured = {"open": opened, "seconds": seconds, "rank": memory("self"), "workers": workers, "begun": begun}
    results.put({**measured, "opened": after})
    barrier.wait()


def measure(kind: str, data: Data, options: argparse.Namespace, ranks: int) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(ranks), context.Queue()
    processes = [
        context.Process(target=read, args=(data, number, options, barrier, results)) for number in range(ranks)
    ]
    for process in processes:
        process.start()
    measured = [results.get(timeout=3600) for _ in processes]
    for process in processes:
        process.join()
    images = ranks * max(options.read // options.batch, 1) * options.batch
    cores = min(len(os.sched_getaffinity(0)), ranks * max(options.workers, 1))
    return {
        "what": kind,
        "ranks": ranks,
        "workers": options.workers,
        "open": max(each["open"] for each in measured),
        "list": max(each["opened"]["unique"] - each["begun"]["unique"] for each in measured),
        "rank": max(each["rank"]["unique"] for each in measured),
        "worker": max((worker["unique"] for each in measured for worker in each["workers"]), default=0),
        "together": sum(each["rank"]["pss"] + sum(worker["pss"] for worker in each["workers"]) for each in measured),
        "images_per_second_and_core": images / max(each["seconds"] for each in measured) / cores,
    }


def shown(row: dict[str, Any]) -> dict[str, str]:
    def mib(value: float) -> str:
        return f"{value / 2**20:,.0f}"

    return {
        "what": row["what"],
        "ranks": str(row["ranks"]),
        "workers each": str(row["workers"]),
        "open, s": f"{row['open']:.2f}",
        "rank: open adds, MiB": mib(row["list"]),
        "rank: unique, MiB": mib(row["rank"]),
        "worker: unique, MiB": mib(row["worker"]),
        "together, MiB": mib(row["together"]),
        "images/s and core": f"{row['images_per_second_and_core']:.0f}",
    }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_281_167)
    parser.add_argument("--side", type=int, default=48, help="side of the stored images, in pixels")
    parser.add_argument("--size", type=int, default=32, help="side that images are resized to, in pixels")
    parser.add_argument("--kinds", nargs="+", choices=["folder", "parquet"], default=["folder", "parquet"])
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--workers", type=int, default=2, help="worker processes of each rank")
    parser.add_argument("--read", type=int, default=2000, help="images read by each rank")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--where", help="folder that keeps the images; a temporary one by default")
    parser.add_argument("--device", default="cpu", help="ignored: reading runs on the CPU")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="write settings, hardware and all numbers to FILE")
    parser.add_argument("--quick", action="store_true", help="a tiny run, only to see that it works")
    options = parser.parse_args(argv)
    import common  # here, so that ranks do not import what only models need

    if options.quick:
        options.images, options.ranks, options.workers, options.read = 2 * CLASSES, 2, 1, 64
    device = common.start(options)
    report = common.Report(options, device, argv)
    where = Path(options.where or tempfile.mkdtemp(prefix="rome-data-"))
    cache = tempfile.mkdtemp(prefix="rome-cache-")
    os.environ["XDG_CACHE_HOME"] = cache
    makers: dict[str, Any] = {"folder": make_folder, "parquet": make_parquet}
    kinds: dict[str, type[Data]] = {"folder": ImageFolder, "parquet": Parquet}
    rows = []
    try:
        for kind in options.kinds:
            path = where / kind
            if not path.exists():
                makers[kind](path, jpegs(options.side, options.seed), options.images)
            data = kinds[kind](path=str(path), size=options.size)  # type: ignore[call-arg]
            for what, ranks in ((f"{kind}, first time", 1), (kind, 1), (kind, options.ranks)):
                rows.append(measure(what, data, options, ranks))
                report.note(", ".join(f"{name} {value}" for name, value in shown(rows[-1]).items()))
    finally:
        shutil.rmtree(cache)
        if not options.where:
            shutil.rmtree(where)
    report.table(f"{options.images:,} images to train on", [shown(row) for row in rows], rows)
    return report.finish()


if __name__ == "__main__":
    main()
