"""Evaluate a list of models, each on its data and budgets, and rank them on one leaderboard (``rome bench``).

A list is a YAML file:

    suite: apgd                # for every model; likewise n, budgets, data, seed, search_precision and save_images
    data: cifar10:data
    models:
      - runs/rome-random       # a run, its weights file, or hf://USER/NAME
      - resnet18.tv_in1k       # a model of timm
      - robustbench:Engstrom2019Robustness
      - {name: mine, model: "net.py:build", weights: mine.pt, mean: [0.49, 0.48, 0.45], std: [0.2, 0.2, 0.2]}

Each model is a separate job (:mod:`rome.runs.launchers`), evaluated into ``OUT/NAME``.
"""

from __future__ import annotations

import functools
import math
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator

from rome.attacks.suites import SaveImages, SearchPrecision
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
from rome.runs.hints import what_is
from rome.runs.launchers import Job

SHARED = ("data", "suite", "n", "budgets", "batch_size", "seed", "features", "search_precision")
"""Settings that an entry may give for itself and the list for all its models."""


def _as_typed(values: Any) -> Any:
    """Convert a value from YAML to the text one would type on the command line: ``[0.49, 0.48]`` -> ``0.49,0.48``."""
    return ",".join(map(str, values)) if isinstance(values, list) else values if values is None else str(values)


Typed = Annotated[str | None, BeforeValidator(_as_typed)]


class SharedSettings(Settings):
    """Settings that a list gives for all its models and that each entry may override."""

    data: Typed = None
    """The data, as for ``--data`` of ``rome evaluate``. For a run, which knows its data, the place where it is now."""
    suite: Typed = None
    """The attacks, as for ``--suite``; default ``apgd``."""
    budgets: Typed = None
    """The threats, as for ``--budgets``: ``cifar10``, or balls, several per norm if wanted:
    ``Linf=2/255,Linf=4/255``."""
    n: int | None = Field(None, ge=1)
    """Number of test examples, from the first; default 1000."""
    batch_size: int | None = Field(None, ge=1)
    """Examples per batch."""
    seed: Seed | None = None
    """Seed of the attacks' random starts."""
    features: str | None = None
    """The network that measures perceptual distances for PPGD and LPA."""
    search_precision: SearchPrecision | None = None
    """Precision of products in attacks in Lp balls, ``fp32`` or ``tf32``; default ``fp32``."""


class Entry(SharedSettings):
    """One model of a list."""

    name: str = ""
    """Name on the leaderboard; derived from the model if empty."""
    run: Annotated[str, AfterValidator(os.path.expanduser)] | None = None
    """A run's folder, a ``model.safetensors`` written by rome, or ``hf://USER/NAME``."""
    model: str | None = None
    """Any other model, as for ``--model`` of ``rome evaluate``; the settings below apply to it."""
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
            raise ValueError("give either a run or a model")
        own = {name: getattr(self, name) for name in Entry.model_fields.keys() - SharedSettings.model_fields.keys()}
        extra = [name for name, value in own.items() if value is not None and name not in ("name", "run", "model")]
        if self.run is not None and extra:
            raise ValueError(f"{', '.join(sorted(extra))}: only for a model; a run's own config has these settings")
        return self

    @property
    def label(self) -> str:
        """Name on the leaderboard."""
        if self.name:
            return self.name
        if self.model is not None:
            return named_after(self.model)
        assert self.run is not None
        if on_hub(self.run):
            return self.run.removeprefix("hf://")
        place = Path(self.run)
        return (place.parent if place.is_file() else place).resolve().name


class Models(SharedSettings):
    """A list of models."""

    save_images: SaveImages = "none"
    """Which examples' adversarial images are saved."""
    models: tuple[Entry, ...] = Field(min_length=1)

    @property
    def entries(self) -> list[Entry]:
        """The models, each completed by the settings for all; runs in folders keep the data of their configs."""
        common = {name: getattr(self, name) for name in SHARED}
        found = []
        for entry in self.models:
            knows = {"data"} if entry.run is not None and not on_hub(entry.run) else set()
            missing = {key: each for key, each in common.items() if key not in knows and getattr(entry, key) is None}
            found.append(entry.model_copy(update=missing))
        return found


def read_models(file: Path, **changes: Any) -> Models:
    """Read the list of models in a YAML file.

    Args:
        changes: settings that replace the file's for all models; None leaves the file's.

    Raises:
        UserError: there is no such file, or its contents are invalid; one line for each mistake.
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
        raise UserError(f"{file}: several models are called {twice[0]}; give each a distinct name (name: ...)")
    return models


def jobs_of(models: Models, out: Path, **options: Any) -> dict[str, Job]:
    """Return the job that evaluates each model, by the model's name.

    Args:
        options: further arguments of :func:`rome.evaluation.run.evaluate_saved`, for all models.
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
    """Evaluate one model of a list into a folder, continuing where an earlier call was stopped.

    Returns:
        The entry and the hash of the weights, by which a later call knows whether anything changed.
    """
    one = Entry.model_validate(entry)
    named = {"data", "budgets", *Entry.model_fields.keys() - SharedSettings.model_fields.keys()} - {"name", "run"}
    given = {name: getattr(one, name) for name in named}
    with launched() as team:
        config = None if one.model is None else named_config(given)
        report, _ = evaluate_saved(
            config or one.run or "",
            data=named_data(one.data).path if config is None and one.data is not None else None,
            budgets=one.budgets if config is None else None,
            suite=one.suite or "apgd",
            n=one.n,
            batch_size=one.batch_size,
            features=one.features,
            search_precision=one.search_precision,
            settings=Evaluation(seed=one.seed or 0),
            out=out,
            loggers=(),
            team=team,
            **options,
        )
    report.require_complete()
    return {"entry": entry, "weights": _weights(one)}


def _weights(entry: Entry) -> str | None:
    """Hash the weights file that a model is read from; None if there is none."""
    source = entry.run or entry.weights
    if source is None or on_hub(source):
        return None
    file = Run(source).model_file if Path(source).is_dir() else Path(source).expanduser()
    return file_hash(weights_file(str(file))) if file.exists() else None


def _done(entry: Entry, folder: Path, arguments: dict[str, Any]) -> bool:
    """Whether the same entry with the same weights has been completely evaluated. A model built by the user's own
    function is always evaluated again, since the function may have changed; that is quick if it has not."""
    if (
        arguments.get("overwrite")
        or not (folder / RESULT).is_file()
        or (entry.model is not None and names_code(entry.model))
    ):
        return False
    known = Job(folder, "").result(dict[str, Any])
    return known == {"entry": arguments["entry"], "weights": _weights(entry)}


def _summary(folder: Path) -> str:
    report = Report.load(folder)
    return f"clean {report.clean:.1%}, union {report.union:.1%}"


def gather_models(models: Models, out: Path) -> list[Evaluated]:
    """Load the evaluations of those models of a list that have been evaluated, in the order of the list."""
    found = []
    for entry in models.entries:
        folder = out / as_file_name(entry.label)
        if not (folder / RESULT).is_file():
            continue
        place = None if entry.run is None or on_hub(entry.run) else Path(entry.run)
        run = None if place is None else Run(place.parent if place.is_file() else place)
        if run is not None and not run.config_file.is_file():
            run = None
        config = None if run is None else run.config
        found.append(Evaluated(name=entry.label, folder=folder, report=Report.load(folder), run=run, config=config))
    return found


def comparable(models: Sequence[Evaluated]) -> list[list[Evaluated]]:
    """Group models evaluated with the same attacks on the same examples. Each group is sorted by union, largest first;
    groups are in the order of their first model."""
    groups: list[list[Evaluated]] = []
    for one in models:
        group = next((group for group in groups if not unlike(group[0], one)), None)
        if group is None:
            groups.append([one])
        else:
            group.append(one)
    return [sorted(group, key=lambda one: (math.isnan(one.report.union), -one.report.union)) for group in groups]
