"""The configs that come with rome: the rows of the paper's tables, and small versions of them."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterator
from pathlib import Path

import torch

from rome.core.errors import UserError
from rome.data import ImageFolder
from rome.experts import FeedForward
from rome.models import build_model
from rome.report.cost import macs, parameters
from rome.runs.config import Config, load


def folder() -> Path:
    """Where they lie: in the checkout, or in the installed package.

    Raises:
        UserError: nowhere.
    """
    package = Path(__file__).parents[1]
    for place in (package.parents[1] / "experiments", package / "_experiments"):
        if place.is_dir():
            return place
    raise UserError("the experiments folder is missing; reinstall rome-robust or work in a checkout")


def files(pattern: str = "*") -> list[Path]:
    """Every experiment, or those whose path has a part like the pattern (``table4``, ``rome-*``); files whose name
    starts with an underscore are shared bases."""
    found = sorted(path for path in folder().rglob("*.yaml") if not path.name.startswith("_"))
    return [path for path in found if fnmatch.fnmatch(_shown(path), f"*{pattern}*")]


def _shown(path: Path) -> str:
    """``experiments/table1/max-pgd.yaml``."""
    return str(path.relative_to(folder().parent))


IMAGES = {"digits": 1_437, "cifar10": 50_000, "imagenet100": 126_689, "imagenet": 1_281_167}
"""Training images of the data sets that experiments name."""


def listing(pattern: str = "*") -> list[tuple[str, str]]:
    """Path and description of the experiments, with the paper's numbers where it has some; ``pattern`` as above."""
    rows = []
    for path in files(pattern):
        config = load(path)
        text = config.about or f"{config.method.kind}{' with experts' if config.experts else ''} on {config.data.kind}"
        if config.paper is not None:
            numbers = ", ".join(f"{name} {value:g}" for name, value in config.paper.numbers.items())
            text += f" [paper {config.paper.table}, {config.paper.row}: {numbers}]"
        rows.append((_shown(path), text))
    return rows


def rough_costs(pattern: str = "*") -> Iterator[tuple[str, str]]:
    """Path, and parameters and multiply-accumulates to train, of the experiments; ``pattern`` as above.

    Counted, not measured: those of a forward pass x the method's passes x images x epochs. Models are built without
    memory, one for each architecture.
    """
    counted: dict[str, tuple[int, int] | str] = {}
    for path in files(pattern):
        config = load(path)
        shape, classes = config.data.form(config.model.num_classes)
        experts = None if config.experts is None else {**config.experts.dump(), "regularizer": None}
        key = json.dumps([config.model.outline().model_dump(mode="json"), experts, shape, classes], sort_keys=True)
        if key not in counted:
            try:
                counted[key] = _count(config, classes, shape)
            except UserError as error:  # such as a model from a package that is not here
                counted[key] = str(error).partition(";")[0].partition(":")[0]
        found = counted[key]
        if isinstance(found, str):
            yield _shown(path), found
            continue
        size, products = found
        threats = config.method.trained(config.threats, config.attack)
        natural, attacked = config.natural_epochs, config.epochs - config.natural_epochs
        passes = 3 * natural + (config.method.passes(threats, config.attack) * attacked if attacked else 0)
        work = products * passes * _images(config)
        yield _shown(path), f"{size / 1e6:.2f}M parameters, {work:.2g} multiply-accumulates to train"


def _count(config: Config, classes: int, shape: tuple[int, int, int]) -> tuple[int, int]:
    """Parameters and multiply-accumulates."""
    sends_tokens = isinstance(config.experts, FeedForward) and config.experts.top is not None  # where, values decide
    with torch.device("cpu" if sends_tokens else "meta"):
        model = build_model(config.model.outline(), config.experts, classes=classes, shape=shape)
        return parameters(model)["parameters"], macs(model.eval(), shape)


def _images(config: Config) -> int:
    known = IMAGES.get(config.data.kind)
    if isinstance(config.data, ImageFolder):
        known = IMAGES["imagenet100" if config.data.classes == "imagenet100" else "imagenet"]
    assert known is not None
    return min(known, config.data.train_limit or known)
