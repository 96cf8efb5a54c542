"""Storage of an evaluation: one file for each batch of each attack, written atomically.

    settings.json                        settings that determine the result, and its provenance
    batches/CASE/0-apgd-ce-00003.safetensors
                                         one attack on one batch: indices, correct, and the images that fooled the
                                         model or all images (uint8 if all pixels are whole grey levels, else float32;
                                         ``whole_levels`` says which); the case ``clean`` is without an attack
    matrix.npz, result.json              written last

A kill at any moment leaves files that are complete or absent; a file with a wrong checksum counts as absent.
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
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rome.core import trust
from rome.core.errors import UserError, some
from rome.core.files import make_folder, now, remove_partials, replace_file
from rome.core.plain_data import parse_json
from rome.models.module_tree import tensor_bytes
from rome.runs.origin import NOT_COMPARED, differences

SETTINGS, RESULT, MATRIX, BATCHES = "settings.json", "result.json", "matrix.npz", "batches"
WHOLE_LEVELS, _UINT8, _FLOAT32 = "whole_levels", "images_uint8", "images_float32"


@dataclass
class BatchResult:
    """Result of one attack on one batch."""

    indices: np.ndarray
    """int64 (b,): indices of the examples."""
    correct: np.ndarray
    """bool (b,): examples still classified correctly."""
    images: Tensor | None = None
    """float32 (k, C, H, W): images of the misclassified examples, or of all, in order; None if images are not kept."""
    facts: dict[str, Any] = field(default_factory=dict)
    """JSON data: ``seconds``, ``warnings`` and, for a result read from disk, its ``date``."""


class StorageError(UserError):
    """A result cannot be written, so it is useless to continue."""


class Store:
    """The folder of one evaluation; if ``directory`` is None, nothing is stored."""

    def __init__(self, directory: Path | None) -> None:
        self.directory = directory
        self.fingerprint = ""
        """Hash of the settings (:func:`fingerprint`); batches written under other settings count as absent."""

    def settings(self) -> dict[str, Any] | None:
        """The stored settings; None if there are none."""
        if self.directory is None or not (self.directory / SETTINGS).exists():
            return None
        return read_json(self.directory / SETTINGS)

    def result(self) -> dict[str, Any] | None:
        """The stored result; None if there is none, or if it belongs to settings other than the stored ones."""
        stored = self.settings()
        if self.directory is None or stored is None:
            return None
        if not all((self.directory / name).exists() for name in (MATRIX, RESULT)):
            return None
        result = read_json(self.directory / RESULT)
        own = result.get("settings", {})
        same = not differences(own, stored) and own.get("networks") == stored.get("networks")
        return result if same else None

    def open(self, settings: dict[str, Any], *, overwrite: bool) -> dict[str, Any]:
        """Start or continue an evaluation with these settings; return the stored settings, with the current networks.

        Raises:
            UserError: the folder holds an evaluation with other settings, or one that cannot be compared because the
                model or attacks cannot be identified.
        """
        self.fingerprint = fingerprint(settings)
        if self.directory is None:
            return settings
        for folder in (self.directory, *(self.directory / BATCHES).glob("**/")):
            remove_partials(folder)
        unseen = _unidentifiable(settings)
        stored = None if overwrite else self.settings()
        if stored is None:
            make_folder(self.directory)
            self._clear(batches=overwrite or bool(unseen))  # without their settings, results may be of anything
            return self._save(settings)
        advice = "choose another folder (--out), or overwrite=True (--overwrite) to throw that evaluation away"
        if differing := differences(stored, settings):
            raise UserError(
                f"{self.directory} holds an evaluation with other settings ({some(differing, 5, '; ')}): {advice}"
            )
        if unseen:
            raise UserError(f"{self.directory} holds an evaluation of {unseen}, so it may be a different one: {advice}")
        before = stored.get("networks", {})
        networks = before | settings["networks"]
        if networks == before:
            return stored
        return self._save({**settings, "save_images": stored["save_images"], "networks": networks})

    def _save(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Write the settings to the folder and return them."""
        assert self.directory is not None
        _write_file(self.directory / SETTINGS, json.dumps(settings, indent=2, default=str).encode())
        trust.record(self.directory / SETTINGS, settings.get("provenance", {}))
        return settings

    def _clear(self, *, batches: bool) -> None:
        """Remove the files of an earlier evaluation and nothing else; its batches only on request, since each of them
        is tied to its settings by a checksum."""
        assert self.directory is not None
        stored = (self.directory / BATCHES).glob("**/*.safetensors*") if batches else ()
        settings = self.directory / SETTINGS  # last: without it, the rest would seem to be new
        for path in (self.directory / RESULT, self.directory / MATRIX, *stored, settings):
            path.unlink(missing_ok=True)

    def path(self, key: str) -> Path | None:
        return self.directory / BATCHES / f"{key}.safetensors" if self.directory else None

    def read(self, key: str, indices: np.ndarray) -> BatchResult | None:
        """Read the stored result of the batch ``key`` for exactly these examples; None if it is absent or damaged."""
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
        images = _unpack(tensors) if WHOLE_LEVELS in tensors else None
        return BatchResult(indices, tensors["correct"].numpy(), images, json.loads(facts))

    def write(self, key: str, unit: BatchResult) -> None:
        path = self.path(key)
        if path is None:
            return
        tensors = {"indices": torch.from_numpy(unit.indices), "correct": torch.from_numpy(unit.correct)}
        if unit.images is not None:
            tensors |= _pack(unit.images)
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
        """Write the matrix, then the result, whose presence marks the evaluation as finished."""
        if self.directory is not None:
            buffer = io.BytesIO()
            np.savez(buffer, **dict(arrays))  # type: ignore[arg-type]  # numpy's stub mistakes allow_pickle for a key
            _write_file(self.directory / MATRIX, buffer.getvalue())
            _write_file(self.directory / RESULT, json.dumps(result, indent=2, default=str).encode())


def finished(result: Mapping[str, Any] | None) -> bool:
    """Whether a result contains every case."""
    return result is not None and not result["failed"] and not result.get("pending")


def _unidentifiable(settings: Mapping[str, Any]) -> str:
    """Describe the parts of an evaluation that cannot be told apart from others; empty if there are none."""
    unknown = [*settings["model"].get("unknown", ()), *settings["unknown"]]
    if settings["model"]["sha256"] is None:
        return "a function, whose weights cannot be seen (those of a torch module can)"
    return f"what cannot be distinguished from others of its kind ({', '.join(unknown)})" if unknown else ""


def fingerprint(settings: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the settings that determine a result."""
    compared = {name: value for name, value in settings.items() if name not in NOT_COMPARED}
    return hashlib.sha256(json.dumps(compared, sort_keys=True).encode()).hexdigest()


def example_images(directory: str | Path, case: str, k: int | None = None) -> tuple[np.ndarray, Tensor]:
    """Return the first ``k`` misclassified adversarial images kept for a case, in the order of the examples; None: all.

    Returns:
        The examples' indices, int64 (k,), and the images, float32 (k, C, H, W) in [0, 1] on the CPU; there may be fewer
        than ``k``.

    Raises:
        UserError: no such case, its images were not kept, or a file is damaged.
    """
    places: list[tuple[int, Path, int]] = []
    files = sorted((Path(directory) / BATCHES / case).glob("*.safetensors"))
    why = "" if files else f"no case {case!r} in {directory}"
    for path in files:
        with _open_batch(path) as file:
            if WHOLE_LEVELS not in file.keys():  # noqa: SIM118
                why = f"the images of {case!r} were not kept (save_images)"
                continue
            indices, fooled = file.get_tensor("indices"), (~file.get_tensor("correct")).nonzero().flatten()
            alone = len(file.get_tensor(WHOLE_LEVELS)) == len(fooled)  # if only images of fooled examples were kept
            rows = range(len(fooled)) if alone else fooled.tolist()
            places += [(index, path, row) for row, index in zip(rows, indices[fooled].tolist(), strict=True)]
    if why:
        raise UserError(f"{why}: evaluate into this folder with save_images='fooled' (--save-images fooled)")
    chosen = sorted(places)[:k]
    images = [_read_image(path, row) for _, path, row in chosen] or [_read_image(files[0], None)]
    return np.array([index for index, _, _ in chosen], dtype=np.int64), torch.cat(images)


def _read_image(path: Path, row: int | None) -> Tensor:
    """Image number ``row`` of a batch's file, (1, C, H, W); for None, no image, (0, C, H, W)."""
    with _open_batch(path) as file:
        whole = file.get_tensor(WHOLE_LEVELS)
        kind = _UINT8 if row is None or whole[row] else _FLOAT32
        place = 0 if row is None else int((whole[:row] == whole[row]).sum())
        images: Tensor = file.get_slice(kind)[place : place + (row is not None)]
    return images.float() / 255 if kind == _UINT8 else images


def _pack(images: Tensor) -> dict[str, Tensor]:
    """Pack images (k, C, H, W) without loss: as uint8 if all their pixels are whole grey levels, else as float32."""
    levels = (images * 255).round()
    whole = (levels / 255 == images).flatten(1).all(dim=1)
    return {WHOLE_LEVELS: whole, _UINT8: levels[whole].to(torch.uint8), _FLOAT32: images[~whole].contiguous()}


def _unpack(tensors: Mapping[str, Tensor]) -> Tensor:
    whole = tensors[WHOLE_LEVELS]
    images = torch.empty(len(whole), *tensors[_FLOAT32].shape[1:])
    images[whole] = tensors[_UINT8].float() / 255
    images[~whole] = tensors[_FLOAT32]
    return images


@contextmanager
def _open_batch(path: Path) -> Iterator[Any]:
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
            f"{path} cannot be written ({error.strerror or error}): make room; finished work is kept, and the "
            "same command continues from there"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that contains an object.

    Raises:
        UserError: the file is absent or damaged.
    """
    try:
        content = parse_json(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path} is missing: there is no finished evaluation in {path.parent}") from None
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: evaluate again with overwrite=True, or into another folder")
    return content
