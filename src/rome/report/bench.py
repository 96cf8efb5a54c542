"""Many models from one list, each evaluated with its data and budgets, and set on one leaderboard (``rome bench``).

A list is a YAML file:

    suite: apgd                # of every model; also n, budgets, data, seed and save_images
    data: cifar10:data
    models:
      - runs/rome-random       # a run, a file of its weights, or hf://USER/NAME
      - resnet18.tv_in1k       # a model of timm
      - robustbench:Engstrom2019Robustness
      - {name: mine, model: "net.py:build", weights: mine.pt, mean: [0.49, 0.48, 0.45], std: [0.2, 0.2, 0.2]}

Each model is a job of its own (:mod:`rome.runs.launchers`), evaluated into ``OUT/NAME``.
"""

from __future__ import annotations

import functools
import math
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from rome.attacks.suites import SaveImages
from rome.core import trust
from rome.core.component import Seed, Settings, mistakes
from rome.core.distributed import launched
from rome.core.errors import UserError
from rome.core.files import as_file_name
from rome.core.plain_data import Unreadable, parse_yaml
from rome.core.trust import names_code
from rome.evaluation.named import named_after, named_config, named_data
from rome.evaluation.result import Report
from rome.evaluation.run import evaluate_saved
from rome.evaluation.store import RESULT
from rome.models import file_hash, weights_file
from rome.models.hub import on_hub
from rome.report.compared import unlike
from rome.report.evaluated import Evaluated
from rome.runs.config import Evaluation
from rome.runs.folder import Run
from rome.runs.launchers import Job
from rome.runs.meant import what_is

SHARED = ("data", "suite", "n", "budgets", "batch_size", "seed", "features")
"""What an entry may say for itself, and the list for all."""


def _listed(values: Any) -> Any:
    """``[0.49, 0.48]`` as it is typed on a command line."""
    return ",".join(map(str, values)) if isinstance(values, list) else values if values is None else str(values)


Typed = Annotated[str | None, BeforeValidator(_listed)]


class Common(Settings):
    """What the models of a list have in common, and any of them may say for itself."""

    data: Typed = None
    """As ``--data`` of ``rome evaluate``. A run knows its data: for it this is where they lie now."""
    suite: Typed = None
    """The attacks, as ``--suite``; ``apgd`` unless given."""
    budgets: Typed = None
    """As ``--budgets``: ``cifar10``, or balls of which a norm may have several: ``Linf=2/255,Linf=4/255``."""
    n: int | None = Field(None, ge=1)
    """The first n test examples; 1000 unless given."""
    batch_size: int | None = Field(None, ge=1)
    """Examples at a time."""
    seed: Seed | None = None
    """Of the attacks' random starts."""
    features: str | None = None
    """The network that measures for PPGD and LPA."""


class Entry(Common):
    """A model of a list."""

    name: str = ""
    """What it is called; made of the model where empty."""
    run: str | None = None
    """A run's folder, a ``model.safetensors`` of ours, or ``hf://USER/NAME``."""
    model: str | None = None
    """Any other model, as ``--model`` of ``rome evaluate``; the settings below go with it."""
    weights: str | None = None
    weights_key: str | None = None
    num_classes: int | None = Field(None, ge=2)
    img_size: int | None = Field(None, ge=1)
    patch_size: int | None = Field(None, ge=1)
    mean: Typed = None
    std: Typed = None

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        is_file = not names_code(value) and os.path.exists(os.path.expanduser(value))
        return {"run" if on_hub(value) or is_file else "model": value}

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.run is None) == (self.model is None):
            raise ValueError("name either a run or a model")
        own = {name: getattr(self, name) for name in Entry.model_fields.keys() - Common.model_fields.keys()}
        extra = [name for name, value in own.items() if value is not None and name not in ("name", "run", "model")]
        if self.run is not None and extra:
            raise ValueError(f"{', '.join(sorted(extra))} go with model, not with a run, whose config says it")
        return self

    @property
    def label(self) -> str:
        """What it is called."""
        if self.name:
            return self.name
        if self.model is not None:
            return named_after(self.model)
        assert self.run is not None
        if on_hub(self.run):
            return self.run.removeprefix("hf://")
        place = Path(self.run)
        return (place.parent if place.is_file() else place).resolve().name


class Models(Common):
    """A list of models."""

    save_images: SaveImages = "none"
    """Whose adversarial images are kept."""
    models: tuple[Entry, ...] = Field(min_length=1)

    @property
    def entries(self) -> list[Entry]:
        """The models, each with what the list says for all of them; runs in folders know where their data lies."""
        common = {name: getattr(self, name) for name in SHARED}
        found = []
        for entry in self.models:
            knows = {"data"} if entry.run is not None and not on_hub(entry.run) else set()
            missing = {key: each for key, each in common.items() if key not in knows and getattr(entry, key) is None}
            found.append(entry.model_copy(update=missing))
        return found


def read_models(file: Path, **changes: Any) -> Models:
    """The list in a YAML file.

    Args:
        changes: settings that hold instead of the file's, for all models; None leaves the file's.

    Raises:
        UserError: no such file, or what it says is not valid; every mistake in a line.
    """
    if not file.is_file():
        raise UserError(f"a list of models is a YAML file; {what_is(file)}")
    places: dict[tuple[str | int, ...], int] = {}
    try:
        data = parse_yaml(file.read_text(encoding="utf-8"), places.__setitem__)
    except Unreadable as error:
        raise UserError(f"{file}{f':{error.line}' if error.line else ''}: {error}") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not valid YAML: {error}") from error
    if not isinstance(data, dict):  # the models alone
        data, places = {"models": data}, {("models", *place): line for place, line in places.items()}
    changed = {name: value for name, value in changes.items() if value is not None}
    try:
        models = Models.model_validate(data | changed)
    except ValidationError as error:
        lines = []
        for path, message in mistakes(error).items():
            known = next((places[path[:end]] for end in range(len(path), 0, -1) if path[:end] in places), None)
            where = f"{file}:{known}: " if known else f"{file}: "
            lines.append(f"{where}{'.'.join(map(str, path))}: {message.removeprefix('Value error, ')}")
        raise UserError("\n".join(lines)) from None
    if changed:
        own = dict.fromkeys(changed.keys() & set(SHARED))
        models = models.model_copy(update={"models": tuple(each.model_copy(update=own) for each in models.models)})
    if twice := [label for label, count in Counter(each.label for each in models.models).items() if count > 1]:
        raise UserError(f"{file}: {twice[0]} is the name of several models; give each a name of its own (name: ...)")
    return models


def jobs_of(models: Models, out: Path, **options: Any) -> dict[str, Job]:
    """The evaluation of each model, by its name.

    Args:
        options: further arguments of :func:`rome.evaluation.run.evaluate_saved` for all.
    """
    found = {}
    for entry in models.entries:
        folder = out / as_file_name(entry.label)
        arguments = {
            "entry": entry.model_dump(mode="json", exclude_none=True),
            "out": str(folder),
            "save_images": models.save_images,
            "trust_code": trust.allowed(),
            **{name: value for name, value in options.items() if value is not None},
        }
        found[entry.label] = Job(
            folder,
            "rome.report.bench:evaluate_entry",
            arguments,
            name=entry.label,
            done=functools.partial(_done, entry, folder, arguments),
            summary=functools.partial(_summary, folder),
        )
    return found


@trust.opens_files
def evaluate_entry(entry: dict[str, Any], out: str, *, trust_code: bool = False, **options: Any) -> dict[str, Any]:
    """Evaluate one model of a list into a folder; goes on where an earlier call was stopped.

    Returns:
        Its arguments, and the hash of the weights, by which a later call knows whether anything changed.
    """
    one = Entry.model_validate(entry)
    named = {"data", "budgets", *Entry.model_fields.keys() - Common.model_fields.keys()} - {"name", "run"}
    given = {name: getattr(one, name) for name in named}
    with launched() as team:
        config = None if one.model is None else named_config(given)
        report, _ = evaluate_saved(
            config or one.run or "",
            data=_path(one.data) if config is None else None,
            budgets=one.budgets if config is None else None,
            suite=one.suite or "apgd",
            n=one.n,
            batch_size=one.batch_size,
            features=one.features,
            settings=Evaluation(seed=one.seed or 0),
            out=out,
            loggers=(),
            team=team,
            **options,
        )
    report.require_complete()
    return {"entry": entry, "weights": _weights(one)}


def _path(data: str | None) -> str | None:
    """Where data lies that a list names for a run."""
    return None if data is None else named_data(data).path


def _weights(entry: Entry) -> str | None:
    """A hash of the file of weights that a model is read from; None where there is none."""
    source = entry.run or entry.weights
    if source is None or on_hub(source):
        return None
    file = Run(source).model_file if Path(source).is_dir() else Path(source).expanduser()
    return file_hash(weights_file(str(file))) if file.exists() else None


def _done(entry: Entry, folder: Path, arguments: dict[str, Any]) -> bool:
    """Whether the same entry with the same weights has been evaluated whole. A function of yours may have changed, so
    its evaluation is looked at again, which is quick where it has not."""
    if (
        arguments.get("overwrite")
        or not (folder / RESULT).is_file()
        or (entry.model is not None and names_code(entry.model))
    ):
        return False
    known = Job(folder, "").result()
    return isinstance(known, dict) and known == {"entry": arguments["entry"], "weights": _weights(entry)}


def _summary(folder: Path) -> str:
    report = Report.load(folder)
    return f"clean {report.clean:.1%}, union {report.union:.1%}"


def gather_models(models: Models, out: Path) -> list[Evaluated]:
    """The models of a list that have been evaluated, in its order."""
    found = []
    for entry in models.entries:
        folder = out / as_file_name(entry.label)
        if not (folder / RESULT).is_file():
            continue
        place = None if entry.run is None or on_hub(entry.run) else Path(entry.run)
        run = None if place is None else Run(place.parent if place.is_file() else place)
        known = run is not None and run.config_file.is_file()
        found.append(
            Evaluated(
                name=entry.label,
                folder=folder,
                report=Report.load(folder),
                run=run if known else None,
                config=run.config if run is not None and known else None,
            )
        )
    return found


def comparable(models: Sequence[Evaluated]) -> list[list[Evaluated]]:
    """The models in groups that were attacked alike on the same examples, each with the largest union first; groups in
    the order of their first model."""
    groups: list[list[Evaluated]] = []
    for one in models:
        group = next((group for group in groups if not unlike(group[0], one)), None)
        if group is None:
            groups.append([one])
        else:
            group.append(one)
    return [sorted(group, key=lambda one: (math.isnan(one.report.union), -one.report.union)) for group in groups]
