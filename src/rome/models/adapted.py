"""Experts in saved files: adding them to a model by their saved settings, and comparing the settings."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import nn

from rome.core.errors import UserError, first_line
from rome.core.wrappers import unwrapped
from rome.experts import Experts
from rome.experts.state import PART, expert_names, settings_of

IGNORED_SETTINGS = {"regularizer", "layers", "experts", "rank", "projection", "projection_dim", PART}
"""Settings of experts that do not affect outputs, or that follow from the names and shapes of the tensors."""


def copy_with_experts(
    model: nn.Module, saved: list[dict[str, Any]], path: object, copy_into: Callable[[nn.Module], None]
) -> None:
    """Copy a file's tensors into a model; a model without experts gets the saved experts first.

    If anything does not fit, the model stays unchanged.

    Args:
        saved: settings of the experts in the file.
        path: of the file, for messages.
        copy_into: checks that the tensors fit a model and copies them into it, or raises UserError.

    Raises:
        UserError: the experts cannot be built, the model's experts have other settings, or ``copy_into`` raised it.
    """
    if saved and not expert_names(model):
        if hasattr(model, "_orig_mod"):
            raise UserError("this model is already compiled: load its experts first, then compile it")
        trial = inject(saved, copy.deepcopy(model), path)
        copy_into(trial)
        inject(saved, model, path)
    elif saved:
        check_settings(saved, model, path)
    copy_into(model)


def inject(saved: list[dict[str, Any]], model: nn.Module, path: object) -> nn.Module:
    """Add the saved experts to a model, in the order in which they were added to the saved one, and return it."""
    for each in saved:
        plain = dict(each)
        try:
            part = unwrapped(model).get_submodule(plain.pop(PART, ""))
            Experts.of_kind(plain.pop("kind")).model_validate(plain).inject(part)
        except UserError:
            raise
        except Exception as error:  # impossible sizes raise many kinds
            raise UserError(f"{path} holds experts that cannot be built here: {first_line(error)}") from error
    return model


def check_settings(saved: list[dict[str, Any]], model: nn.Module, path: object) -> None:
    """Check that a model's experts have the saved settings. Settings such as a gate's beta are in no tensor, so weights
    would also fit a model that computes something else with them.

    Raises:
        UserError: a setting that affects outputs differs.
    """
    for own, other in zip(settings_of(model), saved, strict=False):
        for key in (own.keys() & other.keys()) - IGNORED_SETTINGS:
            if own[key] != other[key]:
                raise UserError(
                    f"{path} holds experts with {key}: {other[key]}, the model's have {own[key]}; "
                    "add experts with the same settings, or load into a model without experts"
                )
