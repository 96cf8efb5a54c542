"""The folder of a run, with checkpoints that survive a kill at any moment.

- ``config.yaml``: the resolved config
- ``origin.json``: fingerprints of the training data and the user's code (:mod:`rome.runs.origin`)
- ``last.pt``: checkpoint of an unfinished run (state of model, optimizer and method); ``before.pt``: the previous
  checkpoint, used if ``last.pt`` is damaged
- ``model.safetensors``: the finished model, with the config in its metadata
- ``best.safetensors``: the weights that did best in validation, if the run has one
- ``log.jsonl``: one line per update, per epoch and per validation
- ``tensorboard/``, ``metrics.csv``, ``wandb/``: output of the loggers; ``loggers.json``: the run's ids in the trackers
  (:mod:`rome.runs.loggers`)
- ``train.lock``: present while a process trains in the folder; ``train.soft.lock`` if the file system has no locks
- ``evaluation/SUITE/``: results of ``rome evaluate``; those for the best weights are in ``evaluation-best/``, those for
  ``last.pt`` in ``evaluation-unfinished/``, and those under other budgets in folders with ``-budgets`` appended
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import warnings
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import yaml
from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout
from typing_extensions import TypedDict

from rome.core import trust
from rome.core.console import say
from rome.core.errors import UserError, first_line, some
from rome.core.files import explain, flatten, make_folder, now, remove_partials, replace_file, replace_with
from rome.core.plain_data import parse_yaml, read_plain
from rome.data import Split
from rome.models.pickles import load_pickle
from rome.runs.config import Config, parse
from rome.runs.hints import what_is
from rome.runs.loggers import base as loggers
from rome.runs.loggers import csv, tensorboard
from rome.runs.origin import Origin, code_facts, data_facts, differences, other_data, read_origin

CHECKPOINT_FORMAT = 1
FREE_KEYS = {"name", "about", "device", "compile", "graphs", "workers", "evaluation", "paper", "imports", "loggers"}
FREE_KEYS |= {"checkpoint"}
"""Config keys that may change when a run is resumed, because they do not affect its weights."""
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP}
"""Error numbers by which a file system reports that it has no locks."""


class LogLine(TypedDict):
    """Entries that all lines of ``log.jsonl`` have."""

    update: int
    event: str


class Run:
    """The folder of one training run."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.config_file = self.folder / "config.yaml"
        self.origin_file = self.folder / "origin.json"
        self.checkpoint_file = self.folder / "last.pt"
        self.before_file = self.folder / "before.pt"
        self.model_file = self.folder / "model.safetensors"
        self.best_file = self.folder / "best.safetensors"
        self.log_file = self.folder / "log.jsonl"
        self.tensorboard = self.folder / tensorboard.FOLDER
        self._lock: BaseFileLock = FileLock(self.folder / "train.lock", timeout=0)

    @property
    def finished(self) -> bool:
        return self.model_file.exists()

    @property
    def config(self) -> Config:
        """The resolved config that this run was started with.

        Raises:
            UserError: the folder holds no run.
        """
        return parse(trust.check(self.config_file, {"config": self.written()})["config"], {(): f"{self.config_file}: "})

    def written(self) -> dict[str, Any]:
        """Read ``config.yaml`` as plain data; no code that it names is imported.

        Raises:
            UserError: the folder holds no run, or the file is not a YAML mapping.
        """
        if not self.config_file.is_file():
            raise UserError(f"a run's folder has a config.yaml; {what_is(self.folder)}")
        found: dict[str, Any] = read_plain(self.config_file, dict[str, Any], "restore it or train again", parse_yaml)
        return found

    @property
    def data_path(self) -> str | None:
        """The path of the data in ``config.yaml``, which the user may have edited; None if there is none."""
        with suppress(UserError, OSError, KeyError, TypeError):
            path = self.written()["data"]["path"]
            return path if isinstance(path, str) else None
        return None

    @property
    def origin(self) -> Origin:
        """Fingerprints of the ``data`` and ``code`` that the run started with, and of code that ``changed`` later;
        empty if they were not recorded.

        Raises:
            UserError: the file is damaged.
        """
        return read_origin(self.origin_file)

    @property
    def classes(self) -> list[str] | None:
        """Names of the classes of the training data; None if they were not recorded."""
        data = self.origin.get("data")
        return data and data["classes"]

    def prepare(
        self, config: Config, *, resume: bool, overwrite: bool, data: Split | None = None
    ) -> dict[str, Any] | None:
        """Lock the folder and prepare it for training with this config.

        Args:
            data: all training examples; if None, they are not compared with those that the run started with.

        Returns:
            The checkpoint to resume from, if there is one.

        Raises:
            UserError: the folder holds a different run, a finished run, a run in training, or an unreadable checkpoint.
        """
        try:
            make_folder(self.folder)
            self._claim()
        except Timeout:
            raise UserError(
                f"another process is training in {self.folder}; wait for it, stop it, or choose another --out"
                + (f" (if none is: remove {self._lock.lock_file})" if isinstance(self._lock, SoftFileLock) else "")
            ) from None
        except OSError as error:
            raise UserError(f"{self.folder} cannot be used ({error.strerror}); choose another --out") from error
        try:
            others = () if self.config_file.exists() else self.folder.iterdir()
            if any(file.suffix not in (".partial", ".lock") for file in others):  # a run leaves these before its config
                raise UserError(f"{self.folder} is not empty and holds no run; choose another --out")
            return self._ready(config, resume=resume, overwrite=overwrite, data=data)
        except BaseException as error:
            self.release()
            if isinstance(error, OSError) and (line := explain(error)):
                raise UserError(line) from error
            raise

    def _claim(self) -> None:
        """Acquire the operating system's lock, which ends with the process. If the file system has none, use a lock
        file, which stays behind if a process on another machine is killed."""
        try:
            with warnings.catch_warnings(action="ignore"):  # for some of _NO_LOCKS, filelock falls back with a warning
                self._lock.acquire()
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            self._lock = SoftFileLock(self.folder / "train.soft.lock", timeout=0)
            self._lock.acquire()

    def _ready(self, config: Config, *, resume: bool, overwrite: bool, data: Split | None) -> dict[str, Any] | None:
        if overwrite and not resume:
            self._clear()
        elif self.finished:
            raise UserError(f"{self.folder} holds a finished run; choose another --out or pass --overwrite")
        elif self.config_file.exists() and not resume:
            raise UserError(
                f"{self.folder} holds an unfinished run; pass --resume to continue it or --overwrite to start anew"
            )
        if resume and self.config_file.exists():
            self.check_same(config, data)
        code, changed = code_facts(config), list[str]()
        if resume and self.has_checkpoint and (found := self.other_code(code)):
            # Reported but allowed: the user may have fixed a bug, but the weights come from both versions.
            say(f"{self.folder} continues with changed code: {'; '.join(found)}")
            changed = [f"{text} ({now()})" for text in found]
        origin = {
            "data": None if data is None else data_facts(data),
            "code": code,
            "changed": [*self.origin.get("changed", ()), *changed],
        }
        remove_partials(self.folder, age=0)  # they are stale, since no other process trains here
        dumped = config.dump()
        replace_file(self.config_file, yaml.safe_dump(dumped, sort_keys=False).encode())
        trust.record(self.config_file, {"config": dumped})
        replace_file(self.origin_file, json.dumps(origin, indent=2).encode())
        return self._load_latest() if self.has_checkpoint else None

    def other_code(self, code: dict[str, str]) -> list[str]:
        """Differences between the user's current code and the code that this run started with."""
        kept = self.origin
        return differences({"code": kept["code"]}, {"code": code}) if "code" in kept else []

    def release(self) -> None:
        """Release the lock that :meth:`prepare` acquired, if it is held."""
        if self._lock.is_locked:
            Path(self._lock.lock_file).unlink(missing_ok=True)
            self._lock.release(force=True)

    @property
    def has_checkpoint(self) -> bool:
        return self.checkpoint_file.exists() or self.before_file.exists()

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Replace the checkpoint atomically and keep the previous one; a kill never leaves a partial file.

        Raises:
            UserError: the checkpoint cannot be written; earlier ones are kept.
        """

        def write(partial: Path) -> None:
            torch.save({**state, "format": CHECKPOINT_FORMAT}, partial)
            if self.checkpoint_file.exists():
                self.before_file.unlink(missing_ok=True)
                try:
                    os.link(self.checkpoint_file, self.before_file)
                except OSError:  # no hard links on this file system: last.pt is missing for a moment
                    os.replace(self.checkpoint_file, self.before_file)

        try:
            replace_with(self.checkpoint_file, write)
        except (OSError, RuntimeError) as error:  # torch raises RuntimeError if the disk is full
            kept = "The previous checkpoint is kept" if self.has_checkpoint else "There is no previous checkpoint"
            raise UserError(
                f"{self.checkpoint_file} cannot be written ({first_line(error)}): is the disk full? {kept}; make room "
                "and continue with --resume"
            ) from error

    def _load_latest(self) -> dict[str, Any]:
        """Load the checkpoint to resume from; if ``last.pt`` is damaged, replace it by ``before.pt``.

        Raises:
            UserError: both are damaged (:meth:`load_checkpoint`).
        """
        damage = _describe_damage(self.checkpoint_file)
        if damage and not _describe_damage(self.before_file):
            os.replace(self.before_file, self.checkpoint_file)
            state = self.load_checkpoint()
            done = max((line["update"] for line in self.log()), default=state["update"])
            say(
                f"{self.checkpoint_file} cannot be used ({damage}): resuming from the previous checkpoint, at update "
                f"{state['update']}; {done - state['update']} updates are repeated"
            )
            return state
        return self.load_checkpoint()

    def load_checkpoint(self, file: Path | None = None) -> dict[str, Any]:
        """Load the last checkpoint, or the one in ``file``, to the CPU.

        Raises:
            UserError: it cannot be read, has a wrong checksum, or was written by another version.
        """
        file, advice = file or self.checkpoint_file, "pass --overwrite to start anew"
        state = load_pickle(file, f"restore it, or {advice}")
        if damage := _describe_damage(file):
            raise UserError(f"{file} cannot be read ({damage}); restore it, or {advice}")
        if not isinstance(state, dict) or state.get("format") != CHECKPOINT_FORMAT:
            raise UserError(f"{file} is not a checkpoint of this version; {advice}")
        return state

    def rewind_log(self, updates: int) -> None:
        """Drop the log lines after this update, and any line that a kill cut short."""
        if not self.log_file.exists():
            return
        kept = [json.dumps(line) for line in self.log() if line["update"] <= updates]
        replace_file(self.log_file, "".join(line + "\n" for line in kept).encode())

    def log(self) -> list[dict[str, Any]]:
        """All lines of the log; a line that a kill cut short is left out.

        Raises:
            UserError: the file cannot be read, or a line is not one of a log.
        """

        def parse_lines(text: str) -> list[dict[str, Any]]:
            lines = []
            for line in text.splitlines():
                with suppress(json.JSONDecodeError, RecursionError):  # a kill cut it short
                    lines.append(json.loads(line))
            return lines

        if not self.log_file.exists():
            return []
        found: list[dict[str, Any]] = read_plain(self.log_file, list[LogLine], "restore or remove it", parse_lines)
        return found

    def check_same(self, config: Config, data: Split | None = None) -> None:
        """Raise UserError if the folder's run was started with different settings that affect the weights.

        The path of the data may differ if the data are the same.

        Args:
            data: all training examples; if None, they are opened if their path has changed.
        """
        pinned = config.model_copy(update={"model": config.model.pinned()})  # like the stored config
        old, new = flatten(self.written()), flatten(pinned.dump())
        changed = {
            key: f"{key} was {old.get(key)!r}, now {new.get(key)!r}"
            for key in sorted(old.keys() | new.keys())
            if old.get(key) != new.get(key) and key.split(".")[0] not in FREE_KEYS
        }
        kept = self.origin.get("data")
        moved = kept and changed.pop("data.path", None)
        if changed:
            what = some(list(changed.values()), 5, "; ")
            raise UserError(f"{self.folder} was started with other settings: {what}; use another --out")
        if moved and data is None:
            data = config.data.open("train")
        if kept and data is not None and (what := other_data(kept, data_facts(data))):
            raise UserError(
                f"{self.folder} was started with other data than {config.data.path or config.data.kind} holds ({what});"
                " restore the data (data.path may be a different path), or use another --out"
            )

    def _clear(self) -> None:
        """Remove only the files that a run writes; the config last, because without it the folder holds no run."""
        weights, budgets = ("", "-best", "-unfinished"), ("", "-budgets")
        evaluations = [f"evaluation{which}{other}" for which in weights for other in budgets]
        for name in (tensorboard.FOLDER, "wandb", *evaluations):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        own = (self.checkpoint_file, self.before_file, self.model_file, self.best_file, self.log_file, self.origin_file)
        for file in (*own, self.folder / csv.FILE, self.folder / loggers.IDS, self.config_file):
            file.unlink(missing_ok=True)


def _describe_damage(checkpoint: Path) -> str:
    """Describe the damage to a file of ``torch.save``, a zip with a CRC-32 for each part; empty if it is intact."""
    try:
        with zipfile.ZipFile(checkpoint) as parts:
            if any(part.compress_type != zipfile.ZIP_STORED for part in parts.infolist()):
                return "it is compressed, which torch.save never does"
            wrong = parts.testzip()
            return "" if wrong is None else f"the checksum of {wrong} is wrong"
    except FileNotFoundError:
        return "it is missing"
    except zipfile.BadZipFile:
        return "it is cut short or overwritten"
    except Exception as error:  # damage can raise almost any exception
        return first_line(error)
