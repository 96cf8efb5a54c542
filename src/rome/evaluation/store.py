"""Store finished work on disk: one file for each batch of each attack, written completely or not at all.

    settings.json                        what determines the result, and its provenance
    batches/CASE/0-apgd-ce-00003.safetensors
                                         one attack on one batch: indices, correct, and the images it fooled or all
                                         (in uint8 those whose pixels are all whole grey levels, else in float32;
                                         ``whole_levels`` says which); the case ``clean`` holds the unattacked batches
    matrix.npz, result.json              written last

If the process is killed at any moment, every file is complete or absent; one whose checksum is wrong counts as absent.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from pydantic import BaseModel
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rome.core import trust
from rome.core.errors import UserError, some
from rome.core.files import make_folder, now, remove_partials, replace_file
from rome.core.plain_data import read_plain
from rome.models.module_tree import tensor_bytes
from rome.runs.origin import NOT_COMPARED, differences

SETTINGS, RESULT, MATRIX, BATCHES = "settings.json", "result.json", "matrix.npz", "batches"
WHOLE_LEVELS, _UINT8, _FLOAT32 = "whole_levels", "images_uint8", "images_float32"


class _Named(BaseModel):
    name: str


class _Settings(BaseModel):
    """Entries of ``settings.json`` that readers use, for validation."""

    model: dict[str, Any]
    networks: dict[str, Any] = {}
    provenance: dict[str, Any] = {}
    suite: dict[str, Any] = {}
    threats: dict[str, Any] = {}
    data: dict[str, Any] = {}
    versions: dict[str, Any] = {}
    environment: dict[str, Any] = {}
    cases: list[_Named] = []
    n: int = 0
    seed: int = 0
    batch_size: int = 0
    classes: int = 0


class _Result(BaseModel):
    """The same for ``result.json``."""

    failed: dict[str, str]
    settings: dict[str, Any]


_SCHEMAS: dict[str, type[BaseModel]] = {SETTINGS: _Settings, RESULT: _Result}


@dataclass
class BatchResult:
    """Result of one attack on one batch."""

    indices: np.ndarray
    """int64 (b,): the positions of the batch's examples in the data."""
    correct: np.ndarray
    """bool (b,): which of them are still classified correctly."""
    images: Tensor | None = None
    """float32 (k, C, H, W): images of the misclassified examples, or of all, in order; None if images are not kept."""
    facts: dict[str, Any] = field(default_factory=dict)
    """JSON data: ``seconds`` and ``warnings``; if read from disk, also the ``date`` it was written."""


class StorageError(UserError):
    """A file of the evaluation cannot be written, so continuing is pointless."""


class Store:
    """The folder of one evaluation; if ``directory`` is None, nothing is stored."""

    def __init__(self, directory: Path | None) -> None:
        self.directory = directory
        self.fingerprint = ""
        """Hash of the settings (:func:`fingerprint`); a unit written under another one counts as absent."""

    def settings(self) -> dict[str, Any] | None:
        """The stored settings; None if there are none."""
        if self.directory is None or not (self.directory / SETTINGS).exists():
            return None
        return read_json(self.directory / SETTINGS)

    def result(self) -> dict[str, Any] | None:
        """The stored result for the stored settings; None if there is none, or if it belongs to other settings."""
        stored = self.settings()
        if self.directory is None or stored is None:
            return None
        if not all((self.directory / name).exists() for name in (MATRIX, RESULT)):
            return None
        result = read_json(self.directory / RESULT)
        own = result["settings"]
        same = not differences(own, stored) and own.get("networks") == stored.get("networks")
        return result if same else None

    def open(self, settings: dict[str, Any], *, overwrite: bool) -> dict[str, Any]:
        """Start or continue an evaluation with these settings.

        Returns:
            The settings in the folder, with the current hashes of the networks that measure perceptual distances.

        Raises:
            UserError: the folder holds an evaluation with other settings, or one that may be of another model or other
                attacks because these cannot be identified.
        """
        self.fingerprint = fingerprint(settings)
        if self.directory is None:
            return settings
        for folder in (self.directory, *(self.directory / BATCHES).glob("**/")):
            remove_partials(folder)
        indistinct = _indistinct(settings)
        stored = None if overwrite else self.settings()
        if stored is None:
            make_folder(self.directory)
            self._clear(batches=overwrite or bool(indistinct))  # batches without settings may be of any model
            return self._save(settings)
        advice = "choose another folder (--out), or overwrite=True (--overwrite) to delete that evaluation"
        if differing := differences(stored, settings):
            raise UserError(
                f"{self.directory} holds an evaluation with other settings ({some(differing, 5, '; ')}): {advice}"
            )
        if indistinct:
            raise UserError(f"{self.directory} holds an evaluation of {indistinct}, which may differ: {advice}")
        before = stored.get("networks", {})
        networks = before | settings["networks"]
        if networks == before:
            return stored
        return self._save({**settings, "save_images": stored.get("save_images", "none"), "networks": networks})

    def _save(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Write the settings to the folder, and return them."""
        assert self.directory is not None
        _write_file(self.directory / SETTINGS, json.dumps(settings, indent=2, default=str).encode())
        trust.record(self.directory / SETTINGS, settings.get("provenance", {}))
        return settings

    def _clear(self, *, batches: bool) -> None:
        """Remove the files of an earlier evaluation, and nothing else.

        Its ``batches`` may stay, as the fingerprint in their checksums shows which settings they belong to.
        """
        assert self.directory is not None
        stored = (self.directory / BATCHES).glob("**/*.safetensors*") if batches else ()
        settings = self.directory / SETTINGS  # last: the settings show whose the other files are
        for path in (self.directory / RESULT, self.directory / MATRIX, *stored, settings):
            path.unlink(missing_ok=True)

    def path(self, key: str) -> Path | None:
        """The file of a unit, whose ``key`` is such as ``Linf/0-apgd-ce-00003``; None if nothing is stored."""
        return self.directory / BATCHES / f"{key}.safetensors" if self.directory else None

    def read(self, key: str, indices: np.ndarray) -> BatchResult | None:
        """The finished unit with this key for exactly these examples; None if it is absent or damaged."""
        path = self.path(key)
        if path is None or not path.exists():
            return None
        try:
            with safe_open(str(path), framework="pt") as file:
                facts = (file.metadata() or {}).get("facts", "")
                digest = (file.metadata() or {}).get("sha256", "")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        except (SafetensorError, OSError, ValueError):
            return None
        if digest != self._digest(tensors, facts) or not np.array_equal(tensors["indices"].numpy(), indices):
            return None
        images = _unpacked(tensors) if WHOLE_LEVELS in tensors else None
        return BatchResult(indices, tensors["correct"].numpy(), images, json.loads(facts))

    def write(self, key: str, unit: BatchResult) -> None:
        """Store a finished unit under its key, with the date."""
        path = self.path(key)
        if path is None:
            return
        tensors = {"indices": torch.from_numpy(unit.indices), "correct": torch.from_numpy(unit.correct)}
        if unit.images is not None:
            tensors |= _packed(unit.images)
        facts = json.dumps({**unit.facts, "date": now()})
        metadata = {"facts": facts, "sha256": self._digest(tensors, facts)}
        _write_file(path, safetensors.torch.save(tensors, metadata))

    def _digest(self, tensors: Mapping[str, Tensor], facts: str) -> str:
        digest = hashlib.sha256(f"{self.fingerprint} {facts}".encode())
        for name, tensor in sorted(tensors.items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor_bytes(tensor))
        return digest.hexdigest()

    def finish(self, arrays: Mapping[str, np.ndarray], result: dict[str, Any]) -> None:
        """Write the matrix, then the readable result, whose presence means that the evaluation is finished."""
        if self.directory is not None:
            buffer = io.BytesIO()
            np.savez(buffer, **dict(arrays))  # type: ignore[arg-type]  # numpy's stub takes allow_pickle for a key
            _write_file(self.directory / MATRIX, buffer.getvalue())
            _write_file(self.directory / RESULT, json.dumps(result, indent=2, default=str).encode())


def finished(result: Mapping[str, Any] | None) -> bool:
    """Whether there is a result and it includes every case."""
    return result is not None and not result["failed"] and not result.get("pending")


def _indistinct(settings: Mapping[str, Any]) -> str:
    """The parts of an evaluation that cannot be distinguished from another's, in words; empty if all can."""
    unknown = [*settings["model"].get("unknown", ()), *settings["unknown"]]
    if settings["model"]["sha256"] is None:
        return "a function, whose weights cannot be compared (those of a torch module can)"
    return f"objects that cannot be distinguished from others of their kind ({', '.join(unknown)})" if unknown else ""


def fingerprint(settings: Mapping[str, Any]) -> str:
    """SHA-256 of the settings that determine a result."""
    compared = {name: value for name, value in settings.items() if name not in NOT_COMPARED}
    return hashlib.sha256(json.dumps(compared, sort_keys=True).encode()).hexdigest()


def example_images(directory: str | Path, case: str, k: int | None = None) -> tuple[np.ndarray, Tensor]:
    """Read the first ``k`` successful adversarial images kept for a case, in the order of the examples; None: all.

    Returns:
        The examples' indices, int64 (k,), and the images, float32 (k, C, H, W) in [0, 1] on the CPU. All of them are
        misclassified; there may be fewer than ``k``.

    Raises:
        UserError: there is no such case, its images were not kept, or a file is damaged.
    """
    places: list[tuple[int, Path, int]] = []
    files = sorted((Path(directory) / BATCHES / case).glob("*.safetensors"))
    why = "" if files else f"no case {case!r} in {directory}"
    for path in files:
        with _opened(path) as file:
            if WHOLE_LEVELS not in file.keys():  # noqa: SIM118
                why = f"the images of {case!r} were not kept (save_images)"
                continue
            indices, fooled = file.get_tensor("indices"), (~file.get_tensor("correct")).nonzero().flatten()
            only_fooled = len(file.get_tensor(WHOLE_LEVELS)) == len(fooled)  # or the images of all
            rows = range(len(fooled)) if only_fooled else fooled.tolist()
            places += [(index, path, row) for row, index in zip(rows, indices[fooled].tolist(), strict=True)]
    if why:
        raise UserError(f"{why}: evaluate into this folder with save_images='fooled' (--save-images fooled)")
    chosen = sorted(places)[:k]
    images = [_image(path, row) for _, path, row in chosen] or [_image(files[0], None)]
    return np.array([index for index, _, _ in chosen], dtype=np.int64), torch.cat(images)


def _image(path: Path, row: int | None) -> Tensor:
    """Read image number ``row`` of a batch's file, (1, C, H, W); with None no image, (0, C, H, W)."""
    with _opened(path) as file:
        whole = file.get_tensor(WHOLE_LEVELS)
        kind = _UINT8 if row is None or whole[row] else _FLOAT32
        place = 0 if row is None else int((whole[:row] == whole[row]).sum())
        images: Tensor = file.get_slice(kind)[place : place + (row is not None)]
    return images.float() / 255 if kind == _UINT8 else images


def _packed(images: Tensor) -> dict[str, Tensor]:
    """Pack images (k, C, H, W) without loss: in uint8 if all pixels are whole grey levels, otherwise in float32."""
    levels = (images * 255).round()
    whole = (levels / 255 == images).flatten(1).all(dim=1)
    return {WHOLE_LEVELS: whole, _UINT8: levels[whole].to(torch.uint8), _FLOAT32: images[~whole].contiguous()}


def _unpacked(tensors: Mapping[str, Tensor]) -> Tensor:
    """The images (k, C, H, W) that :func:`_packed` packed."""
    whole = tensors[WHOLE_LEVELS]
    images = torch.empty(len(whole), *tensors[_FLOAT32].shape[1:])
    images[whole] = tensors[_UINT8].float() / 255
    images[~whole] = tensors[_FLOAT32]
    return images


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open a batch's file.

    Raises:
        UserError: it is damaged.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is damaged ({error}): evaluate again with overwrite=True, or into another folder"
        ) from error


def _write_file(path: Path, content: bytes) -> None:
    try:
        replace_file(path, content)
    except OSError as error:
        raise StorageError(
            f"{path} cannot be written ({error.strerror or error}): make room for it; finished batches are kept, "
            "and the same command continues from them"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """Read the settings or the result of an evaluation.

    Raises:
        UserError: the file is absent or damaged.
    """
    if not path.exists():
        raise UserError(f"{path} is missing: there is no finished evaluation in {path.parent}")
    schema, advice = _SCHEMAS[path.name], "evaluate again with overwrite=True, or into another folder"
    content: dict[str, Any] = read_plain(path, schema, advice)
    return content
