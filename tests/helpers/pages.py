"""The fenced blocks of README and docs, and a folder in which they can be run at tiny sizes.

A comment on the line above a block says what is special about it: ``<!-- not run: WHY -->``; ``<!-- fails: WHY -->``,
where exit code 2 is the point; ``<!-- file: NAME -->``, where the page says to save it under that name.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image

from helpers.tiny_runs import save_run
from rome.evaluation.run import evaluate_saved
from rome.runs.config import load
from rome.runs.experiments import files, path_of

ROOT = Path(__file__).parents[2]
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    *(str(page.relative_to(ROOT)) for page in sorted((ROOT / "docs").rglob("*.md"))),
]
PAGES = [page for page in PAGES if not page.startswith("docs/generated/")]
BLOCK = re.compile(r"^(?:<!-- (\S[^:]*): (.*?) -->\n)?```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

DRY = r"""
rome() { printf '%q ' "$@"; echo; }
torchrun() { while [ "$1" != -m ]; do shift; done; shift 2; rome "$@"; }
srun() { while [ "$1" != rome ]; do shift; done; "$@"; }
pip() { :; }; make() { :; }; python() { :; }; pre-commit() { :; }
"""
"""``rome`` says its arguments, as the shell gives them, and does nothing."""
SHIMS = {
    "rome": f'exec {sys.executable} -m rome.cli "$@"',
    "torchrun": f'while [ "$1" != -m ]; do shift; done; exec {sys.executable} "$@"',
    "pip": "exit 0",
    "make": f'exec {shutil.which("make")} --silent --dry-run -C {ROOT} "$@" > /dev/null',
    "python": f'cd {ROOT}; exec {sys.executable} "$1" --help > /dev/null',
}
"""Commands that would install, or run for hours, only have to exist."""
NAMES = """
import torch
from pathlib import Path
import rome, rome.report.gates, rome.report.routing
from rome import *
torch.manual_seed(0)
x, y = torch.rand(4, 3, 32, 32), torch.arange(4)
threats, labels = tuple(rome.CIFAR10), torch.tensor([0, 1, 2, 0])
size = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
model = rome.create_model("vit_tiny_patch16_224", num_classes=10, **size)
rome.add_experts(model.eval(), experts=2, rank=2)
"""
"""What a snippet may use without making it: a model with experts, a batch, threats."""


QUICK = "--suite '{kind: apgd, iterations: 5}'"
SMALLER = {
    r"--n \d+": "--n 8",
    r"\bn: \d+(?=\nmodels:)": "n: 8",
    r"validation\.n=\d+": "validation.n=8",
    r"-(apgd|autoattack)-\d+": r"-apgd-8",
    r"--suite (apgd|autoattack)(?=\s|$)": QUICK,
    r"--suite apgd,unseen": "--suite '[{kind: apgd, iterations: 5}, unseen]' --cases fog",
    r"--suite (all|unseen)(?=\s|$)(?! --cases)": r"--suite \1 --cases fog",
    r"--cases fog,L2": "--cases fog",
    r"\{fog: \{steps: 200\}, patch: \{size: 4\}\}\}'": r"\g<0> --cases fog",
    r"form: published\}'": r"\g<0> --cases fog",
    r"cifar10:PATH": "cifar10:CIFAR10",
    r"pretrained=True": "pretrained=False",
    r"--layer blocks\.5": "--layer blocks.1",
    r"vit_small": "vit_tiny",
    r"224, 224": "32, 32",
    r"\.first\(20\)": ".first(4)",
    r"suite=\"(apgd|autoattack)\"": 'suite="lp"',
}
"""What a page says -> what runs here: few examples, few iterations, one of many attacks, no download."""


class Block(NamedTuple):
    language: str
    text: str
    mark: str
    """``not run``, ``fails``, ``file`` or empty."""
    about: str
    line: int


def blocks(page: str) -> list[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return [
        Block(found[3], found[4], found[1] or "", found[2] or "", text[: found.start()].count("\n") + 1)
        for found in BLOCK.finditer(text)
    ]


def commands(block: Block, folder: Path) -> list[list[str]]:
    """The arguments of every ``rome`` in a block, as the shell gives them; nothing else is run."""
    import shlex

    ended = subprocess.run(["bash", "-c", DRY + block.text], cwd=folder, capture_output=True, text=True, check=True)
    return [shlex.split(line) for line in ended.stdout.splitlines()]


def run_shell(block: Block, folder: Path) -> subprocess.CompletedProcess[str]:
    places = {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    text = _smaller(block.text)
    command = ["bash", "-euo", "pipefail", "-c", text]
    return subprocess.run(command, cwd=folder, env=os.environ | places, capture_output=True, text=True, check=False)


def run_python(text: str, folder: Path) -> subprocess.CompletedProcess[str]:
    text = NAMES + _smaller(text)
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    return subprocess.run(
        [sys.executable, "-c", text], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def _smaller(text: str) -> str:
    for large, small in SMALLER.items():
        text = re.sub(large, small, text)
    return text


def furnish(folder: Path, page: str, runs: list[str]) -> None:
    """What a page takes to be there: commands, images (``PATH``, ``CIFAR10``), modules, runs; and the experiments of
    the folders that it names at a tiny size, which are found before those that come with rome."""
    folder.mkdir()
    for name, script in SHIMS.items():
        command = folder / "bin" / name
        command.parent.mkdir(exist_ok=True)
        command.write_text(f"#!/bin/bash\n{script}\n")
        command.chmod(0o755)
    for name in ("mine", "my", "my_models"):
        body = (
            "    import timm, torch\n    torch.manual_seed(0)\n"
            "    return timm.create_model('resnet10t', num_classes=num_classes)\n"
        )
        (folder / f"{name}.py").write_text(
            "".join(f"def {function}(num_classes, **other):\n{body}" for function in ("net", "wide", "build"))
        )
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for label in ("cat", "dog"):
            (folder / "PATH" / split / label).mkdir(parents=True)
            for i in range(8):
                Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(
                    folder / "PATH" / split / label / f"{i}.png"
                )
        (folder / "CIFAR10").mkdir(exist_ok=True)
        coded = []
        for _ in range(20):
            file = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file, "PNG")
            coded.append({"bytes": file.getvalue(), "path": None})
        table = pa.table({"img": coded, "label": [i % 10 for i in range(20)]})
        pq.write_table(table, folder / "CIFAR10" / f"{split}-00000-of-00001.parquet")
    text = (ROOT / page).read_text(encoding="utf-8")
    for file in files():
        if f"{path_of(file.parent)}/" in text:
            _shrink(file, folder)
    for name in runs:
        rank = int(name.partition("rank=")[2] or 16)  # that of Table 1
        experts = {"kind": "low-rank", "experts": 4, "rank": rank, "layers": ["qkv", "proj"]}
        changes: dict[str, Any] = {"experts": None if name.endswith("/random-pgd") else experts}
        changes |= {"data": {"kind": "cifar10", "path": str(folder / "CIFAR10")}, "threats": "cifar10"}
        run = save_run(
            folder / name,
            name=Path(name).name,
            model__img_size=32,
            model__patch_size=8,
            evaluation__batch_size=250,
            **changes,
        )
        evaluate_saved(run, suite="lp", n=8)


def _shrink(file: Path, folder: Path) -> None:
    config = load(file)
    small: dict[str, Any] = {
        "extends": str(file), "name": config.name, "batch_size": 8, "accumulate": 1,
        "epochs": 2 if config.method.kind == "more" else 1, "natural_epochs": 0,
        "precision": "fp32", "device": "cpu", "workers": 0, "data": {"train_limit": 16, "test_limit": 8},
        "evaluation": {"suite": {"kind": "apgd", "iterations": 5}, "n": 8}, "attack": {"steps": 1},
    }  # fmt: skip
    if config.data.kind != "digits":
        args = {"embed_dim": 16, "depth": 2, "num_heads": 2}
        small["model"] = {"name": "vit_tiny_patch16_224", "pretrained": False, "weights": None, "args": args}
        small["model"] |= {"img_size": 32, "patch_size": 8}
        small["data"] |= {"path": "PATH", "size": 32} if config.data.kind == "folder" else {"path": "CIFAR10"}
    place = folder / path_of(file)
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(yaml.safe_dump(small))
