"""One YAML file and ``key=value`` overrides become a validated, frozen config.

A file may name one parent with ``extends: base.yaml``; mappings merge, everything else replaces, and a mapping that
names another ``kind`` replaces the parent's whole, as ``paper`` always does; another ``model.name`` drops the parent's
``model.args``. Every mistake is reported at once, with file, line and nearest name.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError

from rome.attacks import PGD, Attack, AttackThreat
from rome.attacks.suites import BATCH_SIZE, Suite, SuiteChoice
from rome.core.component import Seed, Settings, mistakes
from rome.core.errors import UserError, did_you_mean
from rome.core.files import check_name
from rome.core.plain_data import Place, Unreadable, comment_after, parse_yaml
from rome.core.trust import import_own
from rome.data import Data
from rome.experts import Experts, Routing
from rome.methods import Method, Random
from rome.models import ModelSettings
from rome.runs.optim import AdamW, Optimizer, Schedule
from rome.threats import NAMED_BUDGETS, LpBall, Threat

DATA_BUDGETS = {"digits": "digits", "cifar10": "cifar10", "folder": "imagenet"}
"""The budgets a data set is attacked with unless the config says otherwise."""


def _threats(value: Any) -> Any:
    if isinstance(value, str):
        if value not in NAMED_BUDGETS:
            raise ValueError(f"unknown budgets {value!r}.{did_you_mean(value, NAMED_BUDGETS)}")
        return NAMED_BUDGETS[value]
    return value


class Evaluation(Settings):
    """The ``evaluation`` part of a config: what ``rome evaluate`` does unless told otherwise."""

    suite: SuiteChoice = Field(default_factory=lambda: Suite.of_kind("apgd")())
    """A name, settings, or a list of these: ``[apgd, unseen]``."""
    n: int | None = Field(default=1000, ge=1)
    """First n test examples; null for all."""
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = BATCH_SIZE
    """``auto``: 250, halved where memory does not suffice."""
    seed: Seed = 0
    routing: Routing = "learned"
    """Other gate weights than the learned ones: ``random``, ``inverse``, or ``none`` for no experts (Table 5)."""


class Validation(Settings):
    """The ``validation`` part of a config: training examples held out, attacked while training goes on.

    The weights with the largest union on them are kept as ``best.safetensors`` (:mod:`rome.training.validation`).
    """

    n: int = Field(default=256, ge=1)
    """Examples to hold out of training."""
    every: int = Field(default=1, ge=1)
    """Epochs from one validation to the next; the last epoch always ends in one."""
    steps: int = Field(default=10, ge=1)
    """Of APGD under each Lp ball."""


class Paper(Settings):
    """Which result of the paper a config reproduces, and the paper's numbers in percent."""

    table: str
    row: str
    numbers: dict[str, float] = Field(default_factory=dict)


class Config(Settings):
    """Everything that determines a run."""

    name: Annotated[str, AfterValidator(check_name)] = ""
    """Shown in tables, and what the run's folder is called unless --out says; the file's name if empty."""
    about: str = ""
    seed: Seed = 0
    epochs: int = Field(default=20, ge=1)
    natural_epochs: int = Field(default=0, ge=0)
    """The first so many of the epochs train on unperturbed images, without loss that parts threats: a start for models
    that are not pretrained. All of them: standard training."""
    batch_size: int = Field(default=64, ge=1)
    """Examples per update, over all processes and accumulation steps."""
    accumulate: int = Field(default=1, ge=1)
    """Forward and backward passes per update; must divide the batch."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    compile: bool = False
    graphs: Literal["auto"] | bool = "auto"
    """Replay attacks and training steps as CUDA graphs, with the same results; ``auto``: on CUDA."""
    workers: int = Field(default=0, ge=0)
    """Processes that read images, where these are read while they are used: folders, and Parquet files with a size."""
    imports: tuple[str, ...] = ()
    """Python modules to import first: they register attacks, methods, data sets by subclassing."""
    data: Data
    model: ModelSettings
    experts: Experts | None = None
    method: Method = Field(default_factory=Random)
    attack: Attack = Field(default_factory=PGD)
    threats: Annotated[tuple[Threat, ...], BeforeValidator(_threats), Field(min_length=1)] = ()
    optimizer: Optimizer = Field(default_factory=AdamW)
    schedule: Schedule = Field(default_factory=Schedule)
    validation: Validation | None = None
    """Null: none, and nothing is held out."""
    evaluation: Evaluation = Field(default_factory=Evaluation)
    paper: Paper | None = None

    def dump(self) -> dict[str, Any]:
        """Plain data that :func:`parse` turns into the same config."""
        return self.model_dump(mode="json")


class _Where:
    """Remembers the place of every value, for messages."""

    def __init__(self) -> None:
        self.places: dict[tuple[str | int, ...], str] = {}

    def of(self, path: Sequence[str | int]) -> str:
        """The place of a value, or of the nearest mapping around it."""
        parts = tuple(path)
        while parts and parts not in self.places:
            parts = parts[:-1]
        return self.places.get(parts, "")


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a config file and apply ``key=value`` overrides such as ``attack.steps=5`` or ``model.args.depth=6``.

    Kinds and names are set before what belongs to them, whatever their order; of two for one key the last counts.

    Raises:
        UserError: every mistake, one line each, with file, line and nearest name.
    """
    where = _Where()
    data = _read(Path(path), where, ())
    for text in sorted(overrides, key=_depth):
        data = _merge(data, _override(text, where))
    if data.get("name") in (None, ""):
        data["name"] = Path(path).stem
    return parse(data, where)


def files_and_changes(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """What names a file or folder that is there, or has no "=", and the changes ``key=value``."""
    changes = [text for text in texts if "=" in text and not os.path.exists(text)]
    return [text for text in texts if text not in changes], changes


def parse(data: dict[str, Any], where: _Where | None = None) -> Config:
    """Validate plain data.

    Raises:
        UserError: every mistake, one line each.
    """
    where = where or _Where()
    if not isinstance(data, dict):
        raise UserError("a config is a mapping of keys to values")
    modules = data.get("imports")
    for module in modules if isinstance(modules, (list, tuple)) else ():
        try:
            import_own(module)
        except Exception as error:  # whatever the user's module raises
            problem = f"{module} cannot be imported: {type(error).__name__}: {error}"
            raise UserError(f"{where.of(('imports',))}imports: {problem}") from error
    data = dict(data)
    if data.get("threats") in (None, "") and isinstance(data.get("data"), (dict, str)):
        kind = data["data"] if isinstance(data["data"], str) else data["data"].get("kind", Data.default_kind)
        if kind in DATA_BUDGETS:
            data["threats"] = DATA_BUDGETS[kind]
    try:
        config = Config.model_validate(data)
    except ValidationError as error:
        lines = [
            f"{where.of(path)}{'.'.join(map(str, path))}: {message}{hint}"
            for path, message, hint in mistakes(error, data, Config)
        ]
        raise UserError("\n".join(lines)) from None
    _consistent(config, where)
    return config


def _consistent(config: Config, where: _Where) -> None:
    problems = []
    if config.batch_size % config.accumulate:
        problems.append(
            f"{where.of(('accumulate',))}accumulate: {config.accumulate} does not divide batch_size {config.batch_size}"
        )
    if config.natural_epochs > config.epochs:
        place = where.of(("natural_epochs",))
        problems.append(f"{place}natural_epochs: {config.natural_epochs} exceeds epochs {config.epochs}")
    if not config.threats:
        problems.append(f"threats: is missing; data kind {config.data.kind!r} has no budgets of its own")
    names = [threat.name for threat in config.threats]
    if len(set(names)) < len(names):
        advice = "name each norm once, and give attacks of one kind a label each"
        problems.append(f"{where.of(('threats',))}threats: {', '.join(names)} are not distinct; {advice}")
    try:
        trained = config.method.trained(config.threats, config.attack)
        config.method.suits(trained, config.experts, range(config.natural_epochs, config.epochs))
    except UserError as error:
        problems.append(f"{where.of(('method',))}{config.method.kind}: {error}")
    else:
        try:
            if config.experts is not None:
                config.experts.check_threats(len(trained))
        except UserError as error:
            problems.append(f"{where.of(('experts', 'regularizer'))}experts: {error}")
    bare = [threat.name for threat in config.threats if not isinstance(threat, (LpBall, AttackThreat))]
    if bare:
        problems.append(
            f"{where.of(('threats',))}threats: {', '.join(bare)} cannot be trained on as such; give Lp balls such as "
            "{norm: linf, eps: 8/255}, and other threats with the attack that searches them: "
            "{kind: attack, attack: {kind: stadv}}"
        )
    if problems:
        raise UserError("\n".join(problems))


def _read(path: Path, where: _Where, seen: tuple[Path, ...]) -> dict[str, Any]:
    if not path.is_file():
        near = [str(file) for file in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        raise UserError(f"there is no config {path}.{did_you_mean(path, near) if near else ''}")
    if path.resolve() in seen:
        raise UserError(f"{path} extends itself: {' -> '.join(p.name for p in (*seen, path))}")
    own = _Where()

    def note(place: Place, line: int) -> None:
        own.places[place] = f"{path}:{line}: "

    try:
        data = parse_yaml(path.read_text(encoding="utf-8"), note)
    except Unreadable as error:
        raise UserError(f"{path}{f':{error.line}' if error.line else ''}: {error}") from error
    except ValueError as error:  # not text
        raise UserError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise UserError(f"{path}: a config is a mapping of keys to values")
    parent = data.pop("extends", None)
    if parent is None:
        where.places.update(own.places)
        return dict(data)
    if not isinstance(parent, str):
        raise UserError(f"{own.of(('extends',))}extends: name one parent file, not {parent!r}")
    inherited = _read(path.parent / parent, where, (*seen, path.resolve()))
    merged = _merge(inherited, data)
    where.places.update(own.places)
    return merged


def _override(text: str, where: _Where) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise UserError(f"override {text!r}: write key=value, such as epochs=5 or attack.steps=10")
    try:
        parsed = parse_yaml(value)
    except Unreadable as error:
        raise UserError(f"override {text!r}: {value!r} is not a valid value ({error})") from error
    if comment := comment_after(value):
        raise UserError(f"override {text!r}: {comment!r} would be a comment; quote the value: '\"{value}\"'")
    for depth in range(1, len(parts) + 1):
        where.places[tuple(parts[:depth])] = f"override {text!r}: "
    result: Any = parsed
    for part in reversed(parts):
        result = {part: result}
    return dict(result)


def _depth(override: str) -> int:
    """How deep an override reaches. What replaces a mapping (``attack=apgd``, ``attack.kind=apgd``, ``model.name=...``)
    goes before what changes a part of it, or it would take that away again."""
    parts = override.partition("=")[0].strip().split(".")
    return len(parts) - (parts[-1] in ("kind", "name"))


def _merge(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    if "kind" in change and "kind" in base and change["kind"] != base["kind"]:
        return change
    merged = dict(base)
    if change.get("name", base.get("name")) != base.get("name"):
        merged.pop("args", None)  # they are of the model of that name
    for key, value in change.items():
        old = None if key == "paper" else merged.get(key)  # a row's numbers belong to that row alone
        if isinstance(value, dict) and isinstance(old, str):
            old = {"kind": old}  # `attack: pgd` is short for `attack: {kind: pgd}`
        merged[key] = _merge(old, value) if isinstance(value, dict) and isinstance(old, dict) else value
    return merged


__all__ = ["Config", "Evaluation", "Paper", "Validation", "load", "parse"]
