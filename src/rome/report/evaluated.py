"""The entries of a comparison: a run with one of its evaluations, or the evaluation of a model without a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
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
from rome.report.subject import Subject, subject_of_model, subject_of_run
from rome.runs.config import Config, parse
from rome.runs.folder import Run
from rome.threats import LpBall, Threat

LEARNED = "learned"
"""Routing of an evaluation whose provenance names none."""
Key = tuple[str, str, int]
"""Routing, suite and number of examples."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Evaluated:
    """A model with the evaluation that enters the comparison.

    For a model that belongs to no run (``rome evaluate --model``, or :func:`rome.evaluate` with a folder for its
    result), only the evaluation's provenance is known; if it was evaluated in Python, that may be no more than a hash.
    """

    name: str
    folder: Path
    """Folder of the evaluation."""
    report: Report
    others: tuple[str, ...] = ()
    """Evaluations of the same model that were not chosen, such as ``apgd-1000``."""
    run: Run | None = None
    config: Config | None = None
    """Config of the run."""

    @property
    def place(self) -> Path:
        """The folder that identifies the model: the run's, or else the evaluation's."""
        return self.folder if self.run is None else self.run.folder

    @property
    def provenance(self) -> dict[str, Any]:
        """What the evaluation recorded about the model. Callers in Python may record anything as ``config``, ``model``
        and ``data``; whichever is not a mapping is replaced by an empty one."""
        found = dict(self.report.settings.get("provenance") or {})
        parts = {part: found.get(part) for part in ("config", "model", "data")}
        return found | {part: value if isinstance(value, Mapping) else {} for part, value in parts.items()}

    @property
    def key(self) -> Key:
        """What distinguishes the evaluation from others of the same model."""
        return self.provenance.get("routing", LEARNED), self.report.suite, self.report.n

    @property
    def attacks(self) -> dict[str, Case]:
        """The attacks that have been run, by the name of their case.

        Raises:
            UserError: an attack is defined in code that has not been imported, such as a custom suite in Python.
        """
        try:
            cases = [Case.model_validate(case) for case in self.report.settings["cases"]]
        except ValidationError as error:
            reason = error.errors(include_url=False)[0]["msg"]
            raise UserError(
                f"the attacks of {self.folder} cannot be read ({reason}); call rome.report.page.write_report from the "
                "Python code that defines them"
            ) from None
        return {case.name: case for case in cases if case.name in self.report.cases and not case.on_all}

    @property
    def threats(self) -> dict[str, Threat]:
        """The threat of each attack, by the name of its case."""
        return {name: case.threat for name, case in self.attacks.items()}

    @property
    def budgets(self) -> dict[str, float]:
        """The radius of each Lp ball, by the name of its case."""
        return {name: threat.eps for name, threat in self.threats.items() if isinstance(threat, LpBall)}

    @property
    def method(self) -> str:
        """The training method in the paper's notation, such as ``RoME+RANDOM``."""
        if self.config is None:
            return "given model"
        return ("RoME+" if self.config.experts is not None else "") + self.config.method.kind.upper()

    @property
    def about(self) -> str:
        """The one-sentence description in the config; may be empty."""
        return "" if self.config is None else self.config.about

    @property
    def architecture(self) -> str:
        """The backbone, with a note if it has experts."""
        if self.config is None:
            return str(self.provenance["model"].get("name") or self.report.settings["model"]["type"])
        return self.config.model.name + (" + experts" if self.config.experts is not None else "")

    @property
    def data(self) -> Data | None:
        """The data the model was evaluated on; None if the provenance does not record it."""
        if self.config is not None:
            return self.config.data
        recorded = self.provenance["config"].get("data") or self.provenance["data"]
        try:
            return Data.model_validate(recorded) if recorded else None
        except ValidationError:
            return None

    @property
    def source(self) -> str:
        """The data in words: its kind and its path."""
        dumped = {} if self.data is None else self.data.dump()
        return " ".join(str(dumped[key]) for key in ("kind", "path") if dumped.get(key)) or "data in memory"

    @property
    def facts(self) -> dict[str, str]:
        """Where the model and its numbers come from: label -> value."""
        if self.run is not None and self.config is not None:
            found = {
                "method": self.method,
                "folder": str(self.run.folder),
                "training seed": str(self.config.seed),
                "checkpoint": str(self.provenance.get("checkpoint")),
                "SHA-256": str(self.provenance.get("checkpoint_sha256")),
                "code changed during training": "; ".join(self.run.origin.get("changed", ())),
            }
        else:
            model, state = self.provenance["model"], self.report.settings["model"]["sha256"]
            normal = (model.get("normalisation") or {}).items()
            numbers = ", ".join(f"{key} {' '.join(f'{value:.4g}' for value in values)}" for key, values in normal)
            found = {
                "model": self.architecture,
                "weights": str(model.get("weights") or ("its own" if model else "in memory")),
                "SHA-256": str(model.get("weights_sha256") or model.get("sha256") or state or "unknown"),
                "data": self.source,
                "normalisation": numbers or ("none of ours" if model else "unknown"),
                "folder": str(self.folder),
            }
        remarks = "; ".join(map(str, self.provenance.get("remarks") or ()))  # such as which images were chosen
        found |= {"evaluated": self.report.date, "reused": self.report.reuse, "remarks": remarks}
        return {what: value for what, value in found.items() if value}

    @property
    def command(self) -> str:
        """The command that evaluates the model."""
        if self.run is not None:
            return f"rome evaluate {self.run.folder}"
        recorded = self.provenance["config"]
        return command(parse(dict(recorded))) if recorded else "rome evaluate --model"

    def subject(self, device: torch.device) -> Subject:
        """Open the model; that of a run uses the routing it was evaluated with.

        Raises:
            UserError: the model is gone, or the evaluation does not record how to build it.
        """
        if self.run is not None:
            routing, seed = self.provenance.get("routing", LEARNED), self.report.settings["seed"]
            return subject_of_run(self.run, self.name, device, routing=routing, seed=seed)
        recorded = self.provenance["config"]
        if not recorded:
            raise UserError(
                f"{self.folder} does not record how to build its model (it was evaluated in Python), so the model "
                "cannot be opened"
            )
        trust.check(self.folder / SETTINGS, {"config": recorded})
        return subject_of_model(parse(dict(recorded)), self.name, device)

    def check_fresh(self) -> None:
        """Raise UserError if the run's folder now contains different weights from those evaluated."""
        evaluated = self.provenance.get("checkpoint_sha256")
        if self.run and evaluated and self.run.model_file.exists() and file_hash(self.run.model_file) != evaluated:
            raise UserError(
                f"the evaluation in {self.run.folder} is of other weights ({self.provenance.get('checkpoint')}) than "
                f"{self.run.model_file} contains now: run `rome evaluate {self.run.folder} --overwrite`"
            )


def is_evaluation(folder: Path) -> bool:
    """Whether the folder contains an evaluation and is not itself a run."""
    return (folder / SETTINGS).is_file() and not Run(folder).config_file.is_file()


def evaluations(run: Run) -> dict[Key, Evaluated]:
    """Load the finished evaluations of a run, named after the run."""
    config = run.config
    folders = sorted(result.parent for result in (run.folder / "evaluation").glob(f"*/{RESULT}"))
    every = [
        Evaluated(name=config.name, folder=each, report=Report.load(each), run=run, config=config) for each in folders
    ]
    return {one.key: one for one in every}


def load_evaluation(folder: Path) -> Evaluated:
    """Load the evaluation of a model that belongs to no run from its folder.

    Raises:
        UserError: it is not finished, or it belongs to a run.
    """
    if not (folder / RESULT).is_file():
        raise UserError(f"{folder} contains only an unfinished evaluation: run the same `rome evaluate` command again")
    one = Evaluated(name="", folder=folder, report=Report.load(folder))
    if "checkpoint" in one.provenance:
        raise UserError(f"{folder} is an evaluation of a run: give the run's folder, which contains config.yaml")
    return replace(one, name=str(one.provenance["model"].get("name", "")))
