"""What can stand in a comparison: a run with one of its evaluations, or the evaluation of a model that no run made."""

from __future__ import annotations

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
from rome.evaluation.named import command
from rome.evaluation.store import RESULT, SETTINGS
from rome.models import file_hash
from rome.report.subject import Subject
from rome.runs.config import Config, parse
from rome.runs.folder import Run
from rome.threats import LpBall, Threat


@dataclass(frozen=True, eq=False, kw_only=True)
class Evaluated:
    """A model with the evaluation that is compared.

    Of a model that no run made, what is known is what the evaluation kept: its config where it was named on the command
    line, perhaps no more than a hash where it was evaluated in Python.
    """

    name: str
    folder: Path
    """Of the evaluation."""
    report: Report
    others: tuple[str, ...] = ()
    """Evaluations of the same model that were not chosen, such as ``apgd-1000``."""
    run: Run | None = None
    """None: no run made the model."""
    config: Config | None = None
    """Of the run."""

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
    def method(self) -> str:
        """How it was trained, as the paper writes it: ``RoME+RANDOM``."""
        if self.config is None:
            return "given model"
        return ("RoME+" if self.config.experts is not None else "") + self.config.method.kind.upper()

    @property
    def about(self) -> str:
        """What the run's config says of it in a sentence."""
        return "" if self.config is None else self.config.about

    @property
    def architecture(self) -> str:
        """The backbone, and that it has experts."""
        if self.config is None:
            return own_name(self.report) or str(self.report.settings["model"]["type"])
        return f"{self.config.model.name}{'' if self.config.experts is None else ' + experts'}"

    @property
    def data(self) -> Data | None:
        """What it was evaluated on; None where an evaluation in Python does not say so."""
        if self.config is not None:
            return self.config.data
        kept = self._kept("config").get("data") or self._kept("data")
        try:
            return Data.model_validate(kept) if kept else None
        except ValidationError:
            return None

    @property
    def source(self) -> str:
        """The data in words: its kind, and where it lies."""
        dumped = {} if self.data is None else self.data.dump()
        return " ".join(str(dumped[key]) for key in ("kind", "path") if dumped.get(key)) or "data in memory"

    @property
    def facts(self) -> dict[str, str]:
        """Where the model and its numbers come from, as words and values for a list."""
        report, model = self.report, self._kept("model")
        dates = {"evaluated": report.date, **({"reused": report.reuse} if report.reuse else {})}
        if self.run is not None and self.config is not None:
            provenance, changed = report.settings.get("provenance") or {}, self.run.origin.get("changed")
            return {
                "method": self.method,
                "folder": str(self.run.folder),
                "training seed": str(self.config.seed),
                "checkpoint": str(provenance.get("checkpoint")),
                "SHA-256": str(provenance.get("checkpoint_sha256")),
                **dates,
                **({"trained with code that changed": "; ".join(changed)} if changed else {}),
            }
        normal, state = model.get("normalisation") or {}, report.settings["model"]["sha256"]
        values = ", ".join(f"{key} {' '.join(f'{value:.4g}' for value in each)}" for key, each in normal.items())
        return {
            "model": self.architecture,
            "weights": str(model.get("weights") or ("its own" if model else "in memory")),
            "SHA-256": str(model.get("weights_sha256") or model.get("sha256") or state or "unknown"),
            "data": self.source,
            "normalisation": values or ("none of ours" if model else "unknown"),
            "folder": str(self.folder),
            **dates,
        }

    @property
    def command(self) -> str:
        """What evaluates it."""
        if self.run is not None:
            return f"rome evaluate {self.run.folder}"
        kept = self._kept("config")
        return command(parse(dict(kept))) if kept else "rome evaluate --model"

    def subject(self, device: torch.device) -> Subject:
        """The model as it was evaluated, opened to be looked at: its gates may have been replaced.

        Raises:
            UserError: it is gone, or the evaluation does not say how to build it.
        """
        settings = self.report.settings
        if self.run is not None and self.config is not None:
            routing = (settings.get("provenance") or {}).get("routing", self.config.evaluation.routing)
            return Subject(self.run, self.name, device, routing=routing, seed=settings["seed"])
        kept = self._kept("config")
        if not kept:
            raise UserError(
                f"{self.folder} does not say how its model is built (it was evaluated in Python), so there is none to "
                "look at"
            )
        trust.check(self.folder / SETTINGS, {"config": kept})
        return Subject(parse(dict(kept)), self.name, device)

    def check_fresh(self) -> None:
        """Raise UserError unless the evaluation is of the weights that lie in the run's folder."""
        provenance = self.report.settings.get("provenance") or {}
        evaluated = provenance.get("checkpoint_sha256")
        if self.run is None or not evaluated or not self.run.model_file.exists():
            return
        if file_hash(self.run.model_file) != evaluated:
            raise UserError(
                f"{self.run.folder} evaluated other weights ({provenance.get('checkpoint')}) than "
                f"{self.run.model_file} holds now: run `rome evaluate {self.run.folder} --overwrite`"
            )

    def _kept(self, what: str) -> Mapping[str, Any]:
        return _kept(self.report, what)


def is_evaluation(folder: Path) -> bool:
    """Whether the folder is that of an evaluation, and not that of a run."""
    return (folder / SETTINGS).is_file() and not Run(folder).config_file.is_file()


def load_evaluation(folder: Path) -> Report:
    """The evaluation of a model that no run made, in its folder.

    Raises:
        UserError: it is not finished, or it is one of a run.
    """
    if not (folder / RESULT).is_file():
        raise UserError(f"{folder} holds an unfinished evaluation only: run the same `rome evaluate` again")
    report = Report.load(folder)
    if "checkpoint" in (report.settings.get("provenance") or {}):
        raise UserError(f"{folder} is an evaluation of a run: name the run's folder, the one with config.yaml")
    return report


def own_name(report: Report) -> str:
    """What a model that no run made is called in its evaluation; empty where it has no name."""
    return str(_kept(report, "model").get("name", ""))


def _kept(report: Report, what: str) -> Mapping[str, Any]:
    """That part of the provenance, which in Python may be anything."""
    part = (report.settings.get("provenance") or {}).get(what)
    return part if isinstance(part, Mapping) else {}
