"""A model that no run of ours made, and the data it is looked at on, as a command line names them."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rome.core.component import Settings
from rome.core.errors import UserError
from rome.data import Data
from rome.data.base import Split
from rome.evaluation.any_data import named_budgets, named_data, numbers
from rome.models.exported import Named, is_file, named_model, of_another_size, preprocessing
from rome.runs.config import DATA_BUDGETS
from rome.threats import Threat

TRIED = 3
"""Images on which such a model is tried before anything else."""


class Given(Settings):
    """All that it takes to build the model and to open its data, now or again: an evaluation keeps it.

    Each field is the option of that name; see :func:`rome.models.exported.named_model` and
    :mod:`rome.evaluation.any_data`.
    """

    model: str
    data: str
    weights: str | None = None
    weights_key: str | None = None
    budgets: str | None = None
    """None takes those of the kind of data."""
    num_classes: int | None = None
    img_size: int | None = None
    patch_size: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    @classmethod
    def asked(cls, options: Mapping[str, Any], runs: Path | None = None) -> Given | None:
        """What the options of a command say, by name; None where it has none of them.

        Args:
            options: as they are typed, so ``mean`` and ``std`` are text.
            runs: what else the command names, for the message.

        Raises:
            UserError: ``model`` without ``data``, or other options without ``model``.
        """
        said = {name: value for name, value in options.items() if value is not None}
        if not said:
            return None
        names = ", ".join(f"--{name.replace('_', '-')}" for name in said)
        if "model" not in said:
            also = "" if runs is None else f", not with {runs}, whose config says it"
            raise UserError(f"{names} go with --model{also}")
        if "data" not in said:
            raise UserError(f"--model {said['model']} needs --data: digits, cifar10:PATH, a folder or a .parquet file")
        for name in {"mean", "std"} & said.keys():
            said[name] = numbers(said[name], f"--{name}")
        return cls(**said)

    @property
    def name(self) -> str:
        """Of the timm model, the function or the file; without folders."""
        return Path(self.model).stem if is_file(self.model) else self.model.rpartition(":")[2]

    @property
    def command(self) -> str:
        """The command that evaluates it."""
        words = ["rome", "evaluate"]
        for name, value in self.model_dump(exclude_none=True).items():
            text = ",".join(f"{number:g}" for number in value) if isinstance(value, tuple) else str(value)
            words += [f"--{name.replace('_', '-')}", text]
        return shlex.join(words)

    def source(self) -> Data:
        """The data; folders of images are read as a timm model wants them.

        Raises:
            UserError: there is none of that name.
        """
        return named_data(self.data, img_size=self.img_size, **preprocessing(self.model, self.img_size))

    def threats(self) -> dict[str, Threat]:
        """The budgets by column.

        Raises:
            UserError: no such budgets, no such data, or data of a kind that has none.
        """
        kind = self.source().kind
        budgets = self.budgets or DATA_BUDGETS.get(kind)
        if budgets is None:
            raise UserError(
                f"data kind {kind!r} has no budgets of its own; give --budgets cifar10, or L2=0.5,Linf=8/255"
            )
        return named_budgets(budgets)

    def build(self, split: Split, device: torch.device | str = "cpu", *, batch_size: int = TRIED) -> Named:
        """The model in evaluation mode on a device, tried on the first images of the data.

        Args:
            batch_size: the largest batch it will be asked.

        Raises:
            UserError: unknown, unreadable, or it does not fit the data.
        """
        if self.img_size not in (None, split.shape[-1]):
            raise UserError(
                f"--img-size {self.img_size}: {self.data} has images of {split.shape[-1]} pixels, never resized; "
                "leave it out, or give a folder of images"
            )
        named = named_model(
            self.model,
            classes=len(split.classes),
            images=split.first(min(TRIED, len(split)))[0],
            weights=self.weights,
            weights_key=self.weights_key,
            num_classes=self.num_classes,
            img_size=self.img_size,
            patch_size=self.patch_size,
            mean=self.mean,
            std=self.std,
            device=device,
            batch_size=batch_size,
        )
        of_size = "" if self.weights or self.img_size else of_another_size(self.model, split.shape[-1])
        named.remarks += [of_size] if of_size else []
        return named
