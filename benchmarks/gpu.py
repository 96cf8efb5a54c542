"""All measurements that need a GPU, in a quarter of an hour: `make gpu DATA=PATH`.

    python -m benchmarks.gpu --data PATH --minutes 12 --out gpu

Runs, in order of importance: the experts' overhead in an attack step, the times of updates (eager, as CUDA graphs,
compiled), the tests for GPUs, AutoAttack at a tenth of its iterations in fp32 and TF32 beside pyautoattack, and the
comparison of experiments/gpu. Each part is a process with a share of the minutes, and is stopped at its end.
Everything measured until then is in the part's JSON file and, with all printed output, in ``gpu.md``; both are
written continuously. Parts for which no time is left are skipped and listed. Needs nothing but what is installed; the
output folder has at most eight small files.
"""

from __future__ import annotations

import argparse
import datetime
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TextIO

HERE = Path(__file__).resolve().parent
LEAST = 20
"""Minimum seconds of a part; with less time left it is skipped."""


class Part(NamedTuple):
    """One of the measurements."""

    name: str
    share: float
    """Share of the time that is left when the part begins."""
    command: list[str]


def parts(data: str | None, minutes: float, device: str, out: Path, quick: bool) -> list[Part]:
    """Return all parts, the most important first."""

    def script(name: str, *options: str, file: str = "") -> list[str]:
        common = ["--device", device, "--json", str(out / f"{file or name}.json"), *(["--quick"] if quick else [])]
        return [sys.executable, str(HERE / f"{name}.py"), *common, *options]

    images = ["--data", data] if data else []
    updates = ["--precision", "bf16", "--batch", "66", "--repeats", "5", *images]
    tests = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider"]
    tests.append(str(HERE.parent / "tests" / "test_gpu.py"))
    found = [
        Part(
            "Experts in an attack step",
            0.15,
            script("gpu_steps", "--models", "vit-b", "--minutes", f"{0.15 * minutes}"),
        ),
        Part(
            "Updates of ViT-B",
            0.2,
            script("training", "--models", "vit-b", "--ways", "graph", "compiled", *updates, file="updates-vit-b"),
        ),
        Part("Tests", 0.2, tests),
        Part(
            "Updates of the smaller models, of MAX, and without graphs",
            0.25,
            script(
                "training", "--models", "vit-s", "vit-ti", "--ways", "graph", "eager",
                "--methods", "RANDOM", "RoME+RANDOM", "MAX", *updates, file="updates-small",
            ),
        ),
        Part(
            "AutoAttack",
            0.3,
            script("autoattack", "--models", "resnet18", "--images", "1000", "--shorter", "10", *images),
        ),
    ]  # fmt: skip
    if data:
        left = str(0.35 * minutes)
        found.append(Part("Comparison", 1.0, script("comparison", "--data", data, "--minutes", left)))
    return found


def run(part: Part, seconds: float, log: TextIO) -> str:
    """Run a part, copy its output to the terminal and the log as it appears, and return how the part ended."""
    process = subprocess.Popen(
        part.command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "COLUMNS": "160"},
    )  # fmt: skip

    def stop(*_: object) -> None:
        os.killpg(process.pid, signal.SIGKILL)

    assert process.stdout is not None
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        for line in process.stdout:
            print(line, end="", flush=True)
            log.write(line)
            log.flush()
        code = process.wait()
    except BaseException:
        stop()
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        process.stdout.close()
    return {0: "done", -signal.SIGKILL: "stopped at the end of its time"}.get(code, f"failed with exit code {code}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", metavar="PATH", help="folder of CIFAR-10; by default random images and no comparison")
    parser.add_argument("--minutes", type=float, default=12.0)
    parser.add_argument("--out", type=Path, default=Path("gpu"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="a tiny run, only to see that it works")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    started, end = time.monotonic(), time.monotonic() + 60 * options.minutes
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    summary = []
    with (options.out / "gpu.md").open("a", encoding="utf-8") as log:
        log.write(f"# {now}: {options.minutes:g} minutes on {options.device}\n")
        for part in parts(options.data, options.minutes, options.device, options.out, options.quick):
            left = end - time.monotonic()
            seconds = max(part.share * left, min(left, LEAST))
            head = f"\n## {part.name} (at {time.monotonic() - started:.0f} s, at most {seconds:.0f} s)\n\n"
            print(head, end="", flush=True)
            log.write(head)
            log.flush()
            ended = run(part, seconds, log) if left >= LEAST else "skipped, no time left"
            summary.append(f"- {part.name}: {ended}\n")
            log.write(summary[-1])
        text = f"\n## Total: {time.monotonic() - started:.0f} s\n\n{''.join(summary)}"
        print(text)
        log.write(text)
    return int(any("failed" in line for line in summary))


if __name__ == "__main__":
    sys.exit(main())
