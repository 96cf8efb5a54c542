"""Experts of saved models: their settings, which are in no tensor, and models that get them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import nn

from rome.core.errors import UserError, first_line
from rome.core.wrappers import unwrapped
from rome.experts import Experts
from rome.experts.state import PART, expert_names, settings_of

NO_MATTER = {"regularizer", "layers", "experts", "rank", "projection", "projection_dim", PART}
"""Settings of experts that change no output, or that names and shapes of the tensors show."""


def fill(model: nn.Module, saved: list[dict[str, Any]], path: object, copy_into: Callable[[nn.Module], None]) -> None:
    """Copy tensors into a model, which gets the saved experts first if it has none; it changes only if they fit.

    Args:
        saved: settings of the experts in the file.
        path: for messages.
        copy_into: fits and copies, or raises UserError.

    Raises:
        UserError: the experts cannot be built or the model's own have other settings, or what ``copy_into`` raises.
    """
    if saved and not expert_names(model):
        if hasattr(model, "_orig_mod"):
            raise UserError("this model is compiled already: load its experts first, then compile")
        trial = inject(saved, copy.deepcopy(model), path)
        copy_into(trial)
        inject(saved, model, path)
    elif saved:
        check_settings(saved, model, path)
    copy_into(model)


def inject(saved: list[dict[str, Any]], model: nn.Module, path: object) -> nn.Module:
    """Add experts as often as the saved model got some, and return the model."""
    for each in saved:
        plain = dict(each)
        try:
            part = unwrapped(model).get_submodule(plain.pop(PART, ""))
            Experts.of_kind(plain.pop("kind")).model_validate(plain).inject(part)
        except UserError:
            raise
        except Exception as error:  # also what sizes without sense raise
            raise UserError(f"{path} holds experts that cannot be built here: {first_line(error)}") from error
    return model


def check_settings(saved: list[dict[str, Any]], model: nn.Module, path: object) -> None:
    """Some settings of gates are in no tensor: the weights would fit a model that computes something else with them.

    Raises:
        UserError: the model's experts were made with other settings than the saved ones.
    """
    for own, other in zip(settings_of(model), saved, strict=False):
        for key in (own.keys() & other.keys()) - NO_MATTER:
            if own[key] != other[key]:
                raise UserError(
                    f"{path} holds experts with {key}: {other[key]}, the model's have {own[key]}; "
                    "add them with the same settings, or load into a model without experts"
                )
