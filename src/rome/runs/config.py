"""Validated, frozen configs from a YAML file and ``key=value`` overrides.

All mistakes are reported together, each with its file, line and the nearest valid name.
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
"""Kind of data -> name of the budgets it is attacked with unless the config sets ``threats``."""


def _threats(value: Any, info: ValidationInfo) -> Any:
    if value in (None, "", ()):
        data = info.data.get("data")
        if data is not None and data.kind not in DATA_BUDGETS:
            raise ValueError(
                f"is missing; data kind {data.kind!r} has no budgets of its own; give cifar10, imagenet or digits, or "
                "balls such as {norm: L2, eps: 0.5}"
            )
        value = DATA_BUDGETS[data.kind if data is not None else "digits"]  # invalid data is reported already
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
    """The suite of attacks: a name, settings, or a list of these such as ``[apgd, unseen]``."""
    n: int | None = Field(default=1000, ge=1)
    """Evaluate on the first n test examples; null: on all of them."""
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = BATCH_SIZE
    """Examples per batch; ``auto``: 250, halved whenever memory runs out."""
    seed: Seed = 0
    """Seed of the attacks' random starts."""
    save_images: SaveImages = "fooled"
    """Which adversarial images are kept: ``none``, those that ``fooled`` the model, or those of ``all`` examples."""
    routing: Routing = "learned"
    """Gate weights to evaluate with: ``learned``, or a replacement such as ``random``, ``inverse``, or ``none``, which
    switches the experts off (Table 5)."""


class Checkpoint(Settings):
    """The ``checkpoint`` part of a config: how often to save the state from which a stopped or killed run resumes.

    A checkpoint is always written at the end of each epoch and when a signal stops the run; this part adds checkpoints
    within long epochs.
    """

    minutes: float | None = Field(default=15, gt=0)
    """Minutes between checkpoints within an epoch, and so the most work that a kill can cost; null: checkpoints only at
    the end of epochs."""


class Validation(Settings):
    """The ``validation`` part of a config: attack held-out training examples during training.

    The weights with the highest union accuracy on them are kept as ``best.safetensors``
    (:mod:`rome.training.validation`).
    """

    n: int = Field(default=256, ge=1)
    """Number of training examples to hold out."""
    every: int = Field(default=1, ge=1)
    """Validate every so many epochs, and always after the last one."""
    steps: int = Field(default=10, ge=1)
    """APGD iterations under each Lp ball."""


class Paper(Settings):
    """The result of the paper that a config reproduces, with the paper's numbers in percent."""

    table: str
    """The paper's table, such as ``Table 1``."""
    row: str
    """The row's name in the paper."""
    numbers: dict[str, float] = Field(default_factory=dict)
    """The paper's numbers: column -> percent."""


class Config(Settings):
    """All settings of a run: data, model, training and evaluation."""

    name: Annotated[str, AfterValidator(check_name)] = ""
    """Name in tables, and of the run's folder unless --out is given; if empty, the config file's name."""
    about: str = ""
    """One-sentence description, shown by ``rome list experiments``."""
    seed: Seed = 0
    """Seed of everything random in training: initial weights, order of examples, augmentation, attacks."""
    epochs: int = Field(default=20, ge=1)
    """Number of passes over the training examples."""
    natural_epochs: int = Field(default=0, ge=0)
    """Number of epochs at the start that train on clean images, where losses that separate threats are zero: a warm
    start for models that are not pretrained. Equal to ``epochs``: standard training."""
    batch_size: int = Field(default=64, ge=1)
    """Examples per update, summed over all processes and accumulation steps."""
    accumulate: int = Field(default=1, ge=1)
    """Gradient accumulation: forward and backward passes per update; must divide ``batch_size``."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Device to train and evaluate on; ``auto``: the fastest one available."""
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    """Numeric precision of training; evaluation always runs in fp32."""
    activation_checkpointing: bool = False
    """Store only the input of each block in the training forward pass and recompute the rest in the backward pass: the
    same results with less memory, at the cost of one more forward pass per update. For the memory of attacks see
    ``attack_batch_size``."""
    attack_batch_size: int | None = Field(default=None, ge=1)
    """Images that PGD, APGD and MSD differentiate at once in training. Smaller values need less memory where a method
    attacks more images than fit, and give the same results up to rounding. null: all images that a method attacks."""
    compile: bool = False
    """Compile the model for training with ``torch.compile``, block by block."""
    graphs: Literal["auto"] | bool = "auto"
    """Replay attacks and training steps as CUDA graphs, with the same results; ``auto``: whenever training on CUDA."""
    workers: int = Field(default=0, ge=0)
    """Worker processes per machine that read images, divided among the training processes there (each gets at least one
    unless this is 0). They serve data that is read during training: folders, timm's readers, and Parquet files with a
    ``size``."""
    imports: tuple[str, ...] = ()
    """Python modules to import first, which register attacks, methods or data sets of your own by subclassing."""
    data: Data
    """The data set; ``rome list data`` shows the kinds."""
    model: ModelSettings
    """The classifier and the weights it starts from."""
    experts: Experts | None = None
    """Experts to add beside the model's layers; null: none, as in the baselines."""
    method: Method = Field(default_factory=Random)
    """How threats are combined in training; ``rome list methods`` shows the kinds."""
    attack: Attack = Field(default_factory=PGD)
    """The attack that searches Lp balls in training; ``rome list attacks`` shows the kinds."""
    threats: Threats = ()
    """The threats to train and evaluate on: names of budgets or a list; if empty, the data set's own budgets
    (:data:`DATA_BUDGETS`)."""
    optimizer: Optimizer = Field(default_factory=AdamW)
    """The optimizer, ``adamw`` or ``sgd``, with the peak learning rate."""
    schedule: Schedule = Field(default_factory=Schedule)
    """How the learning rate changes during training."""
    validation: Validation | None = None
    """Validation under attack during training; null: none, and no examples are held out."""
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    """How often to save the run's state within an epoch, in addition to its end."""
    loggers: Loggers = Field(default_factory=lambda: (TensorBoard(),))
    """Where to log training and evaluation in addition to ``log.jsonl``: one logger or a list; ``[]`` for none."""
    evaluation: Evaluation = Field(default_factory=Evaluation)
    """The defaults of ``rome evaluate``."""
    paper: Paper | None = None
    """The row of the paper that this config reproduces, if any."""

    def dump(self) -> dict[str, Any]:
        """Return plain data from which :func:`parse` makes the same config."""
        return self.model_dump(mode="json")


def _nearest_place(places: Places, path: tuple[str | int, ...]) -> str:
    """Where a value is written, or else the nearest mapping around it."""
    while path and path not in places:
        path = path[:-1]
    return places.get(path, "")


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a config file and apply ``key=value`` overrides such as ``attack.steps=5`` or ``model.args.depth=6``.

    Overrides of a ``kind`` or ``name`` are applied before those of the settings that belong to it, whatever their
    order; if a key is set twice, the last one counts.

    Raises:
        UserError: the config has mistakes; one line for each, with file, line and nearest valid name.
    """
    data, places = read_config(path, overrides)
    if data.get("name") in (None, ""):
        data["name"] = Path(path).stem
    return parse(data, places)


def files_and_changes(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split arguments into paths (existing files or folders, and whatever has no "=") and ``key=value`` overrides."""
    changes = [text for text in texts if "=" in text and not os.path.exists(text)]
    return [text for text in texts if text not in changes], changes


def parse(data: dict[str, Any], places: Places | None = None) -> Config:
    """Validate plain data and return the config.

    Args:
        places: where each value is written, for messages.

    Raises:
        UserError: the config has mistakes; one line for each.
    """
    places = places or {}
    if not isinstance(data, dict):
        raise UserError("a config must be a mapping of keys to values")
    modules = data.get("imports")
    for module in modules if isinstance(modules, (list, tuple)) else ():
        try:
            import_own(module)
        except Exception as error:  # a user's module may raise anything
            problem = f"{module} cannot be imported: {type(error).__name__}: {error}"
            raise UserError(f"{_nearest_place(places, ('imports',))}imports: {problem}") from error
    try:
        config = Config.model_validate(data)
        found: dict[tuple[str | int, ...], str] = dict(_contradictions(config))
    except ValidationError as error:
        found = mistakes(error)
    if found:
        raise UserError("\n".join(_format_mistake(places, path, message) for path, message in found.items()))
    return config


class _Threats(Settings):
    threats: Threats


def parse_threats(value: Any, place: str) -> tuple[Threat, ...]:
    """Validate the ``threats`` of a config on their own.

    Args:
        place: where the value is written, for messages.

    Raises:
        UserError: the threats have mistakes; one line for each.
    """
    try:
        return _Threats.model_validate({"threats": value}).threats
    except ValidationError as error:
        lines = [_format_mistake({("threats",): place}, *mistake) for mistake in mistakes(error).items()]
        raise UserError("\n".join(lines)) from None


def _format_mistake(places: Places, path: tuple[str | int, ...], message: str) -> str:
    """One line about a mistake: where it is, what is wrong, and what is valid."""
    place, key = _nearest_place(places, path), str(path[-1]) if path else ""
    override = place.removeprefix("override '").removesuffix("': ") if place.startswith("override '") else ""
    return f"{place}{'.'.join(map(str, path))}: {explained(message, key, override, Config)}"


def _contradictions(config: Config) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield settings that contradict each other: their path in the config, and why."""
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
