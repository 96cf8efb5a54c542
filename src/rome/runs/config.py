"""The config of a run: validated and frozen, built from one YAML file and ``key=value`` overrides.

All mistakes are reported at once, each with its file, its line and the nearest valid name.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, ValidationInfo

from rome.attacks import PGD, Attack, AttackThreat
from rome.attacks.suites import BATCH_SIZE, SaveImages, SearchPrecision, Suite, SuiteChoice
from rome.core.component import Seed, Settings, mistakes
from rome.core.errors import UserError, did_you_mean
from rome.core.files import check_name
from rome.core.trust import import_own
from rome.data import Data
from rome.experts import Experts, Routing
from rome.methods import Method, Random
from rome.models import ModelSettings
from rome.runs.hints import explained
from rome.runs.loggers import Loggers, TensorBoard
from rome.runs.optim import AdamW, Optimizer, Schedule
from rome.runs.reading import Places, read_config
from rome.threats import NAMED_BUDGETS, LpBall, Threat, labelled

DATA_BUDGETS = {"digits": "digits", "cifar10": "cifar10", "folder": "imagenet"}
"""The budgets used for each kind of data set if the config names no threats."""


def _threats(value: Any, info: ValidationInfo) -> Any:
    if value in (None, "", ()):
        data = info.data.get("data")
        if data is not None and data.kind not in DATA_BUDGETS:
            raise ValueError(
                f"is missing; data kind {data.kind!r} has no default budgets; give cifar10, imagenet or digits, or "
                "balls such as {norm: L2, eps: 0.5}"
            )
        value = DATA_BUDGETS[data.kind if data is not None else "digits"]  # invalid data is reported separately
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
    """The attack suite: a name, settings, or a list of these such as ``[apgd, unseen]``."""
    n: int | None = Field(default=1000, ge=1)
    """Evaluate the first n test examples; null for all."""
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = BATCH_SIZE
    """Examples per batch; ``auto``: 250, halved for as long as memory runs out."""
    seed: Seed = 0
    """Seed for the attacks' random starts."""
    save_images: SaveImages = "fooled"
    """Which adversarial images to save: ``none``, those that ``fooled`` the model, or those of ``all`` examples."""
    search_precision: SearchPrecision = "fp32"
    """Precision of products in attacks in Lp balls: ``tf32`` is faster, on CUDA only. Verdicts are always in fp32."""
    routing: Routing = "learned"
    """Gate weights to use: ``learned``, or, as in Table 5, ``random``, ``inverse`` or ``none`` (without experts)."""


class Checkpoint(Settings):
    """The ``checkpoint`` part of a config: how often to save the state that a stopped or killed run resumes from.

    A checkpoint is always saved at the end of each epoch and when a signal stops the run; these settings add
    checkpoints within long epochs.
    """

    minutes: float | None = Field(default=15, gt=0)
    """Minutes between checkpoints within an epoch, and so the most training that a killed run loses; null: save only
    at the end of each epoch."""


class Validation(Settings):
    """The ``validation`` part of a config: measure robustness during training on held-out training examples.

    The weights with the highest union accuracy are kept as ``best.safetensors`` (:mod:`rome.training.validation`).
    """

    n: int = Field(default=256, ge=1)
    """Training examples to hold out."""
    every: int = Field(default=1, ge=1)
    """Epochs between validations; the last epoch is always validated."""
    steps: int = Field(default=10, ge=1)
    """Steps of APGD under each Lp ball."""


class Paper(Settings):
    """The result of the paper that a config reproduces, with the paper's numbers in percent."""

    table: str
    """The paper's table, such as ``Table 1``."""
    row: str
    """Name of the row in that table."""
    numbers: dict[str, float] = Field(default_factory=dict)
    """The paper's numbers in percent, by column."""


class Config(Settings):
    """Everything that determines a run."""

    name: Annotated[str, AfterValidator(check_name)] = ""
    """Name of the run in tables, and of its folder unless ``--out`` is given; if empty, the config file's name."""
    about: str = ""
    """One sentence about the config, shown by ``rome list experiments``."""
    seed: Seed = 0
    """Seed for everything random in training: initialization, order of the examples, augmentation, attacks."""
    epochs: int = Field(default=20, ge=1)
    """Passes over the training examples."""
    natural_epochs: int = Field(default=0, ge=0)
    """Number of initial epochs, out of ``epochs``, that train on clean images, without any loss that separates threats:
    a warm-up for models that are not pretrained. Equal to ``epochs``: standard training."""
    batch_size: int = Field(default=64, ge=1)
    """Examples per update, summed over all processes and accumulation steps."""
    accumulate: int = Field(default=1, ge=1)
    """Gradient accumulation: forward and backward passes per update; must divide ``batch_size``."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Device to run on; ``auto``: the fastest one available."""
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    """Numerical precision of training; evaluation always uses fp32."""
    activation_checkpointing: bool = False
    """Store only the input of each block in the training forward pass and recompute the rest in the backward pass: the
    same results with less memory, at the cost of one more forward pass per update. To save memory in attacks, set
    ``attack_batch_size``."""
    attack_batch_size: int | None = Field(default=None, ge=1)
    """Images that PGD, APGD and MSD process at once in training: lower it if a method attacks more images than fit into
    memory. The results are the same up to rounding. null: all images that the method attacks."""
    compile: bool = False
    """Compile the model for training, block by block."""
    graphs: Literal["auto"] | bool = "auto"
    """Replay attacks and training steps as CUDA graphs, with the same results; ``auto``: only on CUDA devices."""
    workers: int = Field(default=0, ge=0)
    """Processes per machine that read images, divided among the training processes on it (at least one each, unless 0).
    Used only by data sets whose images are read during training: folders, timm's readers, and Parquet files with a
    size."""
    imports: tuple[str, ...] = ()
    """Python modules to import first; the attacks, methods and data sets they define become valid kinds."""
    data: Data
    """The data set; ``rome list data`` shows the kinds."""
    model: ModelSettings
    """The classifier and its initial weights."""
    experts: Experts | None = None
    """Experts to add to the model's layers; null: none, the baseline."""
    method: Method = Field(default_factory=Random)
    """How training combines the threats; ``rome list methods`` shows the kinds."""
    attack: Attack = Field(default_factory=PGD)
    """The attack that finds adversarial examples in training; ``rome list attacks`` shows the kinds."""
    threats: Threats = ()
    """The threats to train against: ``cifar10``, ``imagenet``, ``digits``, or a list such as
    ``[{norm: linf, eps: 8/255}]``. If empty, the usual budgets for the data set."""
    optimizer: Optimizer = Field(default_factory=AdamW)
    """``adamw`` or ``sgd``, with the peak learning rate."""
    schedule: Schedule = Field(default_factory=Schedule)
    """The learning rate over the course of training."""
    validation: Validation | None = None
    """Measure robustness on held-out training examples during training; null: hold out nothing."""
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    """When to save the state of the run, in addition to the end of each epoch."""
    loggers: Loggers = Field(default_factory=lambda: (TensorBoard(),))
    """Loggers for training and evaluation, in addition to ``log.jsonl``: one, or a list; ``[]`` for none."""
    evaluation: Evaluation = Field(default_factory=Evaluation)
    """Default settings for ``rome evaluate``."""
    paper: Paper | None = None
    """The row of the paper that this config reproduces."""

    def dump(self) -> dict[str, Any]:
        """Return plain data that :func:`parse` turns back into the same config."""
        return self.model_dump(mode="json")


def _place(places: Places, path: tuple[str | int, ...]) -> str:
    """Return the file and line of a value, or of the nearest mapping around it."""
    while path and path not in places:
        path = path[:-1]
    return places.get(path, "")


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a config file and apply ``key=value`` overrides such as ``attack.steps=5`` or ``model.args.depth=6``.

    Overrides of kinds and names are applied before those of their settings, in whatever order they are given. If a key
    is overridden twice, the last value counts.

    Raises:
        UserError: all mistakes, one per line, each with its file, its line and the nearest valid name.
    """
    data, places = read_config(path, overrides)
    if data.get("name") in (None, ""):
        data["name"] = Path(path).stem
    return parse(data, places)


def files_and_changes(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split arguments into files or folders (existing paths, or texts without "=") and ``key=value`` changes."""
    changes = [text for text in texts if "=" in text and not os.path.exists(text)]
    return [text for text in texts if text not in changes], changes


def parse(data: dict[str, Any], places: Places | None = None) -> Config:
    """Build a config from plain data.

    Raises:
        UserError: all mistakes, one per line.
    """
    places = places or {}
    if not isinstance(data, dict):
        raise UserError("a config must be a mapping of keys to values")
    modules = data.get("imports")
    for module in modules if isinstance(modules, (list, tuple)) else ():
        try:
            import_own(module)
        except UserError as error:
            raise UserError(f"{_place(places, ('imports',))}imports: {error}") from error
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
    """Parse threats given outside of a config.

    Args:
        place: where the value was given, for error messages.

    Raises:
        UserError: all mistakes, one per line.
    """
    try:
        return _Threats.model_validate({"threats": value}).threats
    except ValidationError as error:
        lines = [_explained({("threats",): place}, *mistake) for mistake in mistakes(error).items()]
        raise UserError("\n".join(lines)) from None


def _explained(places: Places, path: tuple[str | int, ...], message: str) -> str:
    """Format a mistake as one line: where it is, what is wrong, and what is valid."""
    place, key = _place(places, path), str(path[-1]) if path else ""
    override = place.removeprefix("override '").removesuffix("': ") if place.startswith("override '") else ""
    return f"{place}{'.'.join(map(str, path))}: {explained(message, key, override, Config)}"


def _contradictions(config: Config) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield the key of each setting that conflicts with another one, and the reason."""
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
        trained = config.method.training_threats(config.threats, config.attack)
        config.method.check(trained, config.experts, range(config.natural_epochs, config.epochs))
    except UserError as error:
        yield ("method",), f"{config.method.kind}: {error}"
        return
    try:
        if config.experts is not None:
            config.experts.check_threats(len(trained))
    except UserError as error:
        yield ("experts", "regularizer"), str(error)


__all__ = ["Config", "Evaluation", "Paper", "Validation", "load", "parse", "parse_threats"]
