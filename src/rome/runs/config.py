"""One YAML file and ``key=value`` overrides become a validated, frozen config.

Every mistake is reported at once, with file, line and nearest name.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, ValidationInfo

from rome.attacks import PGD, Attack, AttackThreat
from rome.attacks.suites import BATCH_SIZE, SaveImages, Suite, SuiteChoice
from rome.core.component import Seed, Settings, mistakes
from rome.core.errors import UserError, did_you_mean
from rome.core.files import check_name
from rome.core.trust import import_own
from rome.data import Data
from rome.experts import Experts, Routing
from rome.methods import Method, Random
from rome.models import ModelSettings
from rome.runs.loggers import Loggers, TensorBoard
from rome.runs.meant import explained
from rome.runs.optim import AdamW, Optimizer, Schedule
from rome.runs.reading import Places, read_config
from rome.threats import NAMED_BUDGETS, LpBall, Threat, labelled

DATA_BUDGETS = {"digits": "digits", "cifar10": "cifar10", "folder": "imagenet"}
"""The budgets a data set is attacked with unless the config says otherwise."""


def _threats(value: Any, info: ValidationInfo) -> Any:
    if value in (None, "", ()):
        data = info.data.get("data")
        if data is not None and data.kind not in DATA_BUDGETS:
            raise ValueError(
                f"is missing; data kind {data.kind!r} has no budgets of its own; give cifar10, imagenet or digits, or "
                "balls such as {norm: L2, eps: 0.5}"
            )
        value = DATA_BUDGETS[data.kind if data is not None else "digits"]  # data that is none is a mistake already
    if isinstance(value, str):
        if value not in NAMED_BUDGETS:
            raise ValueError(f"unknown budgets {value!r}.{did_you_mean(value, NAMED_BUDGETS)}")
        return NAMED_BUDGETS[value]
    return value


def _distinct(threats: tuple[Threat, ...]) -> tuple[Threat, ...]:
    threats = labelled(threats)
    names = [threat.name for threat in threats]
    if len(set(names)) < len(names):
        advice = "name each ball once, and give attacks of one kind a label each"
        raise ValueError(f"{', '.join(names)} are not distinct; {advice}")
    return threats


Budgets = Literal["cifar10", "imagenet", "digits"]
"""The names of :data:`NAMED_BUDGETS`."""
Threats = Annotated[
    tuple[Threat, ...],
    BeforeValidator(_threats, json_schema_input_type=Budgets | tuple[Threat, ...]),
    Field(min_length=1, validate_default=True),
    AfterValidator(_distinct),
]


class Evaluation(Settings):
    """The ``evaluation`` part of a config: the defaults of ``rome evaluate``."""

    suite: SuiteChoice = Field(default_factory=lambda: Suite.of_kind("apgd")())
    """A name, settings, or a list of these: ``[apgd, unseen]``."""
    n: int | None = Field(default=1000, ge=1)
    """First n test examples; null for all."""
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = BATCH_SIZE
    """``auto``: 250, halved where memory does not suffice."""
    seed: Seed = 0
    """Of the attacks' random starts."""
    save_images: SaveImages = "fooled"
    """Whose adversarial images are kept: ``none``, those that ``fooled`` the model, or those of ``all`` examples."""
    routing: Routing = "learned"
    """Other gate weights than the learned ones: ``random``, ``inverse``, or ``none`` for no experts (Table 5)."""


class Checkpoint(Settings):
    """The ``checkpoint`` part of a config: from where a run goes on that was stopped or killed.

    Each epoch ends in a checkpoint, and a signal in another one; these are the ones between, for long epochs.
    """

    minutes: float | None = Field(default=15, gt=0)
    """From one checkpoint to the next within an epoch, which is what a kill costs at most; null: at the end of epochs
    alone."""


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
    """Such as ``Table 1``."""
    row: str
    """Its name in the paper."""
    numbers: dict[str, float] = Field(default_factory=dict)
    """Column -> percent."""


class Config(Settings):
    """Everything that determines a run."""

    name: Annotated[str, AfterValidator(check_name)] = ""
    """Shown in tables, and what the run's folder is called unless --out says; the file's name if empty."""
    about: str = ""
    """A sentence for ``rome list experiments``."""
    seed: Seed = 0
    """Of everything random in the training: start, order, augmentation, attacks."""
    epochs: int = Field(default=20, ge=1)
    """Passes over the training examples."""
    natural_epochs: int = Field(default=0, ge=0)
    """The first so many of the epochs train on unperturbed images, without loss that parts threats: a start for models
    that are not pretrained. All of them: standard training."""
    batch_size: int = Field(default=64, ge=1)
    """Examples per update, over all processes and accumulation steps."""
    accumulate: int = Field(default=1, ge=1)
    """Forward and backward passes per update; must divide the batch."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """``auto``: the best there is."""
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    """Of training alone; evaluation is fp32."""
    activation_checkpointing: bool = False
    """Store only the input of each block in the training forward and recompute the rest in the backward pass: the same
    results with less memory, for one more forward pass an update. Attacks have ``attack_batch_size``."""
    attack_batch_size: int | None = Field(default=None, ge=1)
    """Images that PGD, APGD and MSD differentiate at once in training, with the same results but for rounding: less
    memory where a method attacks more images than fit. null: all that a method attacks."""
    compile: bool = False
    """Compile the model for training, block by block."""
    graphs: Literal["auto"] | bool = "auto"
    """Replay attacks and training steps as CUDA graphs, with the same results; ``auto``: on CUDA."""
    workers: int = Field(default=0, ge=0)
    """Processes that read images on each machine, shared out among those that train there (of any, each has at least
    one), where images are read while they are used: folders, timm's readers, and Parquet files with a size."""
    imports: tuple[str, ...] = ()
    """Python modules to import first: they register attacks, methods, data sets by subclassing."""
    data: Data
    """The data set: ``rome list data``."""
    model: ModelSettings
    """The classifier and the weights it starts from."""
    experts: Experts | None = None
    """Experts beside the model's layers; null: none, the baseline."""
    method: Method = Field(default_factory=Random)
    """How threats are combined in training: ``rome list methods``."""
    attack: Attack = Field(default_factory=PGD)
    """What searches the threats in training: ``rome list attacks``."""
    threats: Threats = ()
    """Those of :data:`DATA_BUDGETS` if none are named."""
    optimizer: Optimizer = Field(default_factory=AdamW)
    """``adamw`` or ``sgd``, with the peak learning rate."""
    schedule: Schedule = Field(default_factory=Schedule)
    """The learning rate over the training."""
    validation: Validation | None = None
    """Null: none, and nothing is held out."""
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    """When the state of the run is saved, beside the end of each epoch."""
    loggers: Loggers = Field(default_factory=lambda: (TensorBoard(),))
    """Where training and evaluation can be followed, besides ``log.jsonl``; one may be named alone, ``[]`` is none."""
    evaluation: Evaluation = Field(default_factory=Evaluation)
    """The defaults of ``rome evaluate``."""
    paper: Paper | None = None
    """The row of the paper that this reproduces."""

    def dump(self) -> dict[str, Any]:
        """Plain data that :func:`parse` turns into the same config."""
        return self.model_dump(mode="json")


def _place(places: Places, path: tuple[str | int, ...]) -> str:
    """The place of a value, or of the nearest mapping around it."""
    while path and path not in places:
        path = path[:-1]
    return places.get(path, "")


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a config file and apply ``key=value`` overrides such as ``attack.steps=5`` or ``model.args.depth=6``.

    Kinds and names are set before what belongs to them, whatever their order; of two for one key the last counts.

    Raises:
        UserError: every mistake, one line each, with file, line and nearest name.
    """
    data, places = read_config(path, overrides)
    if data.get("name") in (None, ""):
        data["name"] = Path(path).stem
    return parse(data, places)


def files_and_changes(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """What names a file or folder that is there, or has no "=", and the changes ``key=value``."""
    changes = [text for text in texts if "=" in text and not os.path.exists(text)]
    return [text for text in texts if text not in changes], changes


def parse(data: dict[str, Any], places: Places | None = None) -> Config:
    """Validate plain data.

    Raises:
        UserError: every mistake, one line each.
    """
    places = places or {}
    if not isinstance(data, dict):
        raise UserError("a config is a mapping of keys to values")
    modules = data.get("imports")
    for module in modules if isinstance(modules, (list, tuple)) else ():
        try:
            import_own(module)
        except Exception as error:  # whatever the user's module raises
            problem = f"{module} cannot be imported: {type(error).__name__}: {error}"
            raise UserError(f"{_place(places, ('imports',))}imports: {problem}") from error
    try:
        config = Config.model_validate(data)
        found: dict[tuple[str | int, ...], str] = dict(_contradictions(config))
    except ValidationError as error:
        found = mistakes(error)
    if found:
        raise UserError("\n".join(_explained(places, path, message) for path, message in found.items()))
    return config


class _Threats(Settings):
    threats: Threats


def parse_threats(value: Any, place: str) -> tuple[Threat, ...]:
    """A config's threats alone.

    Args:
        place: where the value stands, for messages.

    Raises:
        UserError: every mistake, one line each.
    """
    try:
        return _Threats.model_validate({"threats": value}).threats
    except ValidationError as error:
        lines = [_explained({("threats",): place}, *mistake) for mistake in mistakes(error).items()]
        raise UserError("\n".join(lines)) from None


def _explained(places: Places, path: tuple[str | int, ...], message: str) -> str:
    """A mistake in a line: where, what, and what is valid."""
    place, key = _place(places, path), str(path[-1]) if path else ""
    override = place.removeprefix("override '").removesuffix("': ") if place.startswith("override '") else ""
    return f"{place}{'.'.join(map(str, path))}: {explained(message, key, override, Config)}"


def _contradictions(config: Config) -> Iterator[tuple[tuple[str, ...], str]]:
    """Settings that do not go together: where, and why."""
    if config.batch_size % config.accumulate:
        yield ("accumulate",), f"{config.accumulate} does not divide batch_size {config.batch_size}"
    if config.natural_epochs > config.epochs:
        share = f"natural_epochs={config.epochs // 2}"
        yield ("natural_epochs",), f"{config.natural_epochs} exceeds epochs {config.epochs}; set both: {share}"
    kinds = [logger.kind for logger in config.loggers]
    if len(set(kinds)) < len(kinds):
        yield ("loggers",), f"{', '.join(kinds)} are not distinct; name each once"
    bare = [threat.name for threat in config.threats if not isinstance(threat, (LpBall, AttackThreat))]
    if bare:
        yield (
            ("threats",),
            (
                f"{', '.join(bare)} cannot be trained on as such; give Lp balls such as {{norm: linf, eps: 8/255}}, "
                "and other threats with the attack that searches them: {kind: attack, attack: {kind: stadv}}"
            ),
        )
    try:
        trained = config.method.trained(config.threats, config.attack)
        config.method.suits(trained, config.experts, range(config.natural_epochs, config.epochs))
    except UserError as error:
        yield ("method",), f"{config.method.kind}: {error}"
        return
    try:
        if config.experts is not None:
            config.experts.check_threats(len(trained))
    except UserError as error:
        yield ("experts", "regularizer"), str(error)


__all__ = ["Config", "Evaluation", "Paper", "Validation", "load", "parse", "parse_threats"]
