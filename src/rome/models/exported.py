"""Modules saved with their code: TorchScript (.pt, .ts) and torch.export (.pt2)."""

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
    """Whether a model's name is that of a saved module, and not of a timm model or a function."""
    return Path(name).suffix in PROGRAMS and not on_hub(name)  # never of a function: its name has no dot


class SavedModule(nn.Module):
    """A module from a file, for inference: it stays in evaluation mode, for what was exported cannot change its mode.

    Its code is the file's, so the file's hash is part of its state.

    Raises:
        UserError: no such file, not readable, or exported for one image or a fixed number of them.
    """

    identified_by_state = True
    """Its state identifies it; what is inside need not be looked at."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        if not file.is_file():
            raise UserError(
                f"there is no file {file}; --model is a timm model, path.py:function or a file (.pt, .ts, .pt2)"
            )
        self.file, self.digest, self.most = file, file_hash(file), None
        self.program: Any = None
        if file.suffix == EXPORTED:
            self.program = _exported(file)
            self.most = _largest_batch(self.program, file)
        self._take(_scripted(file) if self.program is None else self.program.module())

    def _take(self, inner: nn.Module) -> None:
        self.inner, self.training = inner, False
        for module in inner.modules():
            module.training = False

    def forward(self, images: Tensor) -> Tensor:
        if self.most is not None and len(images) > self.most:
            raise UserError(
                f"{self.file} was exported for batches of up to {self.most}, and this one has {len(images)} images: "
                f"give --batch-size {self.most}, or export it with a dynamic batch: {HOW_TO_EXPORT}"
            )
        return self.inner(images)

    def train(self, mode: bool = True) -> Self:
        self.training = mode
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        device = fn(torch.empty(0)).device
        if device.type != "cpu":  # graphs and frozen constants name devices, which .to() does not change
            if self.program is None:
                self._take(_scripted(self.file, device))
            else:
                from torch.export.passes import move_to_device_pass

                self._take(move_to_device_pass(self.program, str(device)).module())
            return self
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def get_extra_state(self) -> dict[str, str]:
        return {"sha256": self.digest}

    def set_extra_state(self, state: dict[str, str]) -> None:
        """Nothing to do: the file was read already."""


def _scripted(file: Path, device: torch.device | str = "cpu") -> nn.Module:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch would rather have modules exported
            return torch.jit.load(str(file), map_location=device).eval()  # type: ignore[no-untyped-call]
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"{file} is not a TorchScript module ({last_line(error)}); for a file of weights give the model's name "
            f"with --model and the file with --weights"
        ) from error


def _exported(file: Path) -> Any:
    if not zipfile.is_zipfile(file):
        raise UserError(f"{file} is not a file of torch.export.save; write it again: {HOW_TO_EXPORT}")
    logging.disable()  # it logs tracebacks, and what is wrong with a file is in the exception
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.load(str(file))
    except Exception as error:  # it raises almost any kind
        raise UserError(
            f"{file} is not a file of torch.export.save that this torch can read: {last_line(error)}"
        ) from error
    finally:
        logging.disable(logging.NOTSET)


def _largest_batch(program: Any, file: Path) -> int | None:
    """How many images an exported program takes at once; None where it is any number."""
    names = program.graph_signature.user_inputs
    inputs = [node for node in program.graph.nodes if node.op == "placeholder" and node.name in names]
    if len(inputs) != 1:
        raise UserError(f"{file} was exported with {len(inputs)} inputs; rome gives one: a batch of images")
    batch = inputs[0].meta["val"].shape[0]
    bounds = None if isinstance(batch, int) else program.range_constraints.get(batch.node.expr)
    lower = 0 if bounds is None else int(bounds.lower)
    if isinstance(batch, int) or lower > 2:  # 2: what torch writes for "any"
        wrong = f"exactly {batch}" if isinstance(batch, int) else f"at least {lower}"
        raise UserError(
            f"{file} was exported for batches of {wrong}, and attacks need batches of any size; export it with a "
            f"dynamic batch: {HOW_TO_EXPORT}"
        )
    return int(bounds.upper) if bounds is not None and bounds.upper < 1_000_000 else None
