"""Modules saved together with their code: TorchScript (.pt, .ts) and torch.export (.pt2)."""

from __future__ import annotations

import logging
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from rome.core.errors import UserError
from rome.core.files import file_hash
from rome.core.trial import last_line
from rome.core.trust import PROGRAMS
from rome.models.hub import on_hub

EXPORTED = ".pt2"
HOW_TO_EXPORT = (
    'torch.export.export(model.eval(), (images,), dynamic_shapes=({0: torch.export.Dim("batch")},)) '
    "with two or more images, then torch.export.save"
)


def is_saved_module(name: str) -> bool:
    """Whether a model's name is the file of a saved module, and not a timm model or a function."""
    return Path(name).suffix in PROGRAMS and not on_hub(name)  # a function's name ends in no such suffix


class SavedModule(nn.Module):
    """A module loaded from a file, for inference. It stays in evaluation mode: exported code cannot change its mode.

    Its code is in the file, so the file's hash is part of its state.

    Raises:
        UserError: the file is missing or not readable, or the module was exported for a fixed batch size.
    """

    identified_by_state = True
    """Its state alone identifies it; its submodules need not be inspected."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        if not file.is_file():
            raise UserError(
                f"there is no file {file}; --model takes a timm model, path.py:function or a file (.pt, .ts, .pt2)"
            )
        self.file, self.digest, self.max_batch = file, file_hash(file), None
        self.program: Any = None
        if file.suffix == EXPORTED:
            self.program = _load_program(file)
            self.max_batch = _largest_batch(self.program, file)
        self._set_inner(_load_script(file) if self.program is None else self.program.module())

    def _set_inner(self, inner: nn.Module) -> None:
        self.inner, self.training = inner, False
        for module in inner.modules():
            module.training = False

    def forward(self, images: Tensor) -> Tensor:
        if self.max_batch is not None and len(images) > self.max_batch:
            raise UserError(
                f"{self.file} was exported for batches of up to {self.max_batch} images, not {len(images)}: set "
                f"--batch-size {self.max_batch}, or export it with a dynamic batch: {HOW_TO_EXPORT}"
            )
        return self.inner(images)

    def train(self, mode: bool = True) -> Self:
        self.training = mode
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        device = fn(torch.empty(0)).device
        if device.type != "cpu":  # .to() does not change devices named in graphs and frozen constants
            if self.program is None:
                self._set_inner(_load_script(self.file, device))
            else:
                from torch.export.passes import move_to_device_pass

                self._set_inner(move_to_device_pass(self.program, str(device)).module())
            return self
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def get_extra_state(self) -> dict[str, str]:
        return {"sha256": self.digest}

    def set_extra_state(self, state: dict[str, str]) -> None:
        """Do nothing: the file is already loaded."""


def _load_script(file: Path, device: torch.device | str = "cpu") -> nn.Module:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch recommends torch.export instead
            return torch.jit.load(str(file), map_location=device).eval()  # type: ignore[no-untyped-call]
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"{file} is not a TorchScript module ({last_line(error)}); if it is a file of weights, give the model's "
            f"name with --model and the file with --weights"
        ) from error


def _load_program(file: Path) -> Any:
    if not zipfile.is_zipfile(file):
        raise UserError(f"{file} was not written by torch.export.save; write it with: {HOW_TO_EXPORT}")
    logging.disable()  # torch also logs a traceback of the exception
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.load(str(file))
    except Exception as error:  # almost any kind
        raise UserError(
            f"{file} cannot be read as a file of torch.export.save by this version of torch: {last_line(error)}"
        ) from error
    finally:
        logging.disable(logging.NOTSET)


def _largest_batch(program: Any, file: Path) -> int | None:
    """Largest batch that an exported program accepts; None if any size is accepted."""
    names = program.graph_signature.user_inputs
    inputs = [node for node in program.graph.nodes if node.op == "placeholder" and node.name in names]
    if len(inputs) != 1:
        raise UserError(f"{file} was exported with {len(inputs)} inputs; rome passes one, a batch of images")
    batch = inputs[0].meta["val"].shape[0]
    bounds = None if isinstance(batch, int) else program.range_constraints.get(batch.node.expr)
    lower = 0 if bounds is None else int(bounds.lower)
    if isinstance(batch, int) or lower > 2:  # torch writes 2 for any size
        wrong = f"exactly {batch}" if isinstance(batch, int) else f"at least {lower}"
        raise UserError(
            f"{file} was exported for batches of {wrong}, but attacks need batches of any size; export it with a "
            f"dynamic batch: {HOW_TO_EXPORT}"
        )
    return int(bounds.upper) if bounds is not None and bounds.upper < 1_000_000 else None
