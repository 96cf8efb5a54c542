"""What can stand in a comparison: a run with one of its evaluations, or the evaluation of a model that no run made."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from rome.core import trust
from rome.core.errors import UserError
from rome.data import Data
from rome.evaluation.evaluate import Case, Report
from rome.evaluation.given import Given
from rome.evaluation.store import RESULT, SETTINGS
from rome.models import file_hash
from rome.report.subject import NamedModel, Subject
from rome.runs.config import Config
from rome.runs.folder import Run
from rome.threats import LpBall, Threat


@dataclass(frozen=True, eq=False, kw_only=True)
class Evaluated(ABC):
    """A model with the evaluation that is compared."""

    name: str
    folder: Path
    """Of the evaluation."""
    report: Report
    others: tuple[str, ...] = ()
    """Evaluations of the same model that were not chosen, such as ``apgd-1000``."""
    config: Config | None = None
    """Of the run; None where there is no run."""

    @property
    def attacks(self) -> dict[str, Case]:
        """The cases that are attacks and have been run, by name.

        Raises:
            UserError: they are of code that has not been imported, as a suite of one's own in Python may be.
        """
        try:
            cases = [Case.model_validate(case) for case in self.report.settings["cases"]]
        except ValidationError as error:
            reason = error.errors(include_url=False)[0]["msg"]
            raise UserError(
                f"the attacks of {self.folder} cannot be read ({reason}); call rome.report.page.write_report in "
                "Python, where they are defined"
            ) from None
        return {case.name: case for case in cases if case.name in self.report.cases and not case.on_all}

    @property
    def threats(self) -> dict[str, Threat]:
        """What each attack was allowed, by the case's name."""
        return {name: case.threat for name, case in self.attacks.items()}

    @property
    def budgets(self) -> dict[str, float]:
        """The radius of each Lp ball."""
        return {name: threat.eps for name, threat in self.threats.items() if isinstance(threat, LpBall)}

    @property
    @abstractmethod
    def method(self) -> str:
        """How it was trained, in a word."""

    @property
    @abstractmethod
    def about(self) -> str:
        """What the config says of it in a sentence; empty where nothing does."""

    @property
    @abstractmethod
    def architecture(self) -> str:
        """The backbone, and that it has experts."""

    @property
    @abstractmethod
    def data(self) -> Data | None:
        """What it was evaluated on; None where nobody wrote it down."""

    @property
    def source(self) -> str:
        """The data in words: its kind, and where it lies."""
        dumped = {} if self.data is None else self.data.dump()
        return " ".join(str(dumped[key]) for key in ("kind", "path") if dumped.get(key)) or "data in memory"

    @property
    @abstractmethod
    def facts(self) -> dict[str, str]:
        """Where the model and its numbers come from, as words and values for a list."""

    @property
    def dates(self) -> dict[str, str]:
        """When it was evaluated, and what of that is from earlier calls."""
        report = self.report
        return {"evaluated": report.date, **({"reused": report.reuse} if report.reuse else {})}

    @property
    @abstractmethod
    def command(self) -> str:
        """What evaluates it."""

    @abstractmethod
    def subject(self, device: torch.device) -> Subject:
        """The model, opened to be looked at.

        Raises:
            UserError: it is gone, or nobody wrote down how to build it.
        """


@dataclass(frozen=True, eq=False, kw_only=True)
class EvaluatedRun(Evaluated):
    """A run of ``rome train``."""

    run: Run
    config: Config

    @property
    def method(self) -> str:
        """As the paper writes it, such as ``RoME+RANDOM``."""
        return ("RoME+" if self.config.experts is not None else "") + self.config.method.kind.upper()

    @property
    def about(self) -> str:
        return self.config.about

    @property
    def architecture(self) -> str:
        name = self.config.model.name
        return f"{name} + experts" if self.config.experts is not None else name

    @property
    def data(self) -> Data:
        return self.config.data

    @property
    def facts(self) -> dict[str, str]:
        provenance = self.report.settings.get("provenance") or {}
        changed = self.run.origin.get("changed")
        return {
            "method": self.method,
            "folder": str(self.run.folder),
            "training seed": str(self.config.seed),
            "checkpoint": str(provenance.get("checkpoint")),
            "SHA-256": str(provenance.get("checkpoint_sha256")),
            **self.dates,
            **({"trained with code that changed": "; ".join(changed)} if changed else {}),
        }

    @property
    def command(self) -> str:
        return f"rome evaluate {self.run.folder}"

    def subject(self, device: torch.device) -> Subject:
        """The model as it was evaluated: its gates may have been replaced."""
        settings = self.report.settings
        routing = (settings.get("provenance") or {}).get("routing", self.config.evaluation.routing)
        return Subject(self.run, self.name, device, routing=routing, seed=settings["seed"])

    def check_fresh(self) -> None:
        """Raise UserError unless the evaluation is of the weights that lie in the run's folder."""
        provenance = self.report.settings.get("provenance") or {}
        evaluated, file = provenance.get("checkpoint_sha256"), self.run.model_file
        if evaluated and file.exists() and file_hash(file) != evaluated:
            raise UserError(
                f"{self.run.folder} evaluated other weights ({provenance.get('checkpoint')}) than {file} holds now: "
                f"run `rome evaluate {self.run.folder} --overwrite`"
            )


@dataclass(frozen=True, eq=False, kw_only=True)
class EvaluatedModel(Evaluated):
    """A model that no run made: ``rome evaluate --model``, or :func:`rome.evaluate` with a folder to keep its result.

    What is known of it is what the evaluation kept; of one made in Python that may be no more than its hash.
    """

    @property
    def given(self) -> Given | None:
        """What names it; None where it was evaluated in Python, or before this was kept."""
        kept = self._kept("given")
        try:
            return Given(**kept) if kept else None
        except UserError:
            return None

    @property
    def method(self) -> str:
        return "given model"

    @property
    def about(self) -> str:
        return ""

    @property
    def architecture(self) -> str:
        return own_name(self.report) or str(self.report.settings["model"]["type"])

    @property
    def data(self) -> Data | None:
        kept = self._kept("data")
        try:
            return Data.model_validate(kept) if kept else None
        except ValidationError:
            return None

    @property
    def facts(self) -> dict[str, str]:
        model, state = self._kept("model"), self.report.settings["model"]["sha256"]
        weights = "its own" if model else "in memory"
        normal = model.get("normalisation")
        told = ", ".join(f"{key} {_numbers(values)}" for key, values in normal.items()) if normal else ""
        return {
            "model": self.architecture,
            "weights": str(model.get("weights") or weights),
            "SHA-256": str(model.get("weights_sha256") or model.get("sha256") or state or "unknown"),
            "data": self.source,
            "normalisation": told or ("none of ours" if model else "unknown"),
            "folder": str(self.folder),
            **self.dates,
        }

    @property
    def command(self) -> str:
        return "rome evaluate --model" if self.given is None else self.given.command

    def subject(self, device: torch.device) -> Subject:
        if self.given is None:
            raise UserError(
                f"{self.folder} does not say how its model is built (it was evaluated in Python, or by an earlier "
                "version), so there is none to look at"
            )
        trust.check(self.folder / SETTINGS, {"given": self._kept("given")})
        return NamedModel(self.given, self.name, device)

    def _kept(self, what: str) -> Mapping[str, Any]:
        return _kept(self.report, what)


def is_evaluation(folder: Path) -> bool:
    """Whether the folder is that of an evaluation, and not that of a run."""
    return (folder / SETTINGS).is_file() and not Run(folder).config_file.is_file()


def load_evaluation(folder: Path) -> Report:
    """The evaluation of a given model in its folder.

    Raises:
        UserError: it is not finished, or it is one of a run.
    """
    if not (folder / RESULT).is_file():
        raise UserError(f"{folder} holds an unfinished evaluation only: run the same `rome evaluate` again")
    report = Report.load(folder)
    if "config" in (report.settings.get("provenance") or {}):
        raise UserError(f"{folder} is an evaluation of a run: name the run's folder, the one with config.yaml")
    return report


def own_name(report: Report) -> str:
    """What a given model is called in its evaluation; empty where it is not."""
    return str(_kept(report, "model").get("name", ""))


def _kept(report: Report, what: str) -> Mapping[str, Any]:
    """That part of the provenance, which in Python may be anything."""
    part = (report.settings.get("provenance") or {}).get(what)
    return part if isinstance(part, Mapping) else {}


def _numbers(values: Any) -> str:
    return " ".join(f"{value:.4g}" for value in values)
