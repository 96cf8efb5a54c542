"""A dry run of experts: which layers of a config's model get them, and what that adds (``rome cost --layers``)."""

from __future__ import annotations

from typing import Any

from torch import nn

from rome.core.console import print_table
from rome.experts import block_numbers, expert_layers
from rome.report.cost import added, architecture, parameters
from rome.runs.config import Config


def plan(config: Config) -> dict[str, Any]:
    """Build a config's model with its experts, weights random, and say where they are. Everything is checked that
    training checks, but for files: neither images nor RobustBench's package are needed for the paper's models.

    Returns:
        ``layers``: for each adapted layer ``name``, ``type``, ``shape`` of its weight, ``block`` (l = 1..L), ``beta``
        of its gate (None if it has none) and ``added`` parameters; ``others``: name, type and shape of the Linear and
        convolutional layers without experts; ``added`` and ``parameters``: counts for the whole model.

    Raises:
        UserError: nothing matches ``experts.layers``, or a match cannot be adapted.
    """
    model, _, _ = architecture(config)
    adapted, totals = expert_layers(model), parameters(model)
    blocks = block_numbers(list(adapted))
    inside = tuple(f"{name}." for name in adapted)
    return {
        "name": config.name,
        "layers": [
            {**_described(name, layer), "block": blocks[name], "beta": _beta(layer), "added": added(layer)}
            for name, layer in adapted.items()
        ],
        "others": [
            _described(name, module)
            for name, module in model.named_modules()
            if isinstance(module, (nn.Linear, nn.Conv2d)) and name not in adapted and not name.startswith(inside)
        ],
        "added": totals["experts"],
        "parameters": totals["parameters"],
    }


def show_plan(facts: dict[str, Any]) -> None:
    """Print a :func:`plan`; layers without experts that differ in a number alone share a line."""
    layers, others = facts["layers"], facts["others"]
    print(facts["name"])
    if layers:
        rows = [
            [row["name"], row["type"], _sizes(row["shape"]), f"{row['block']}", beta, f"{row['added']:,}"]
            for row in layers
            for beta in ["" if row["beta"] is None else f"{row['beta']:.3f}"]
        ]
        print_table(rows, ("layer", "type", "shape", "block", "beta", "added"), left=range(3), wrapped=())
        where = f"{len(layers)} of {len(layers) + len(others)} layers, blocks up to {layers[-1]['block']}"
        print(f"with experts: {where}; {facts['added']:,} parameters added, {facts['parameters']:,} in all")
    else:
        print("with experts: none, for the config has no experts")
    groups: dict[tuple[str, str, str], list[str]] = {}
    for other in others:
        pattern = ".".join("*" if part.isdigit() else part for part in other["name"].split("."))
        groups.setdefault((pattern, other["type"], _sizes(other["shape"])), []).append(other["name"])
    for (pattern, kind, sizes), names in groups.items():
        which = f"{len(names)} x {pattern}" if len(names) > 1 else names[0]
        print(f"without experts: {which} ({kind} {sizes})")


def _described(name: str, module: nn.Module) -> dict[str, Any]:
    layer = next((cls.__name__ for cls in type(module).__mro__ if cls.__module__.startswith("torch.nn.modules.")), "")
    weight = getattr(module, "weight", None)
    kind = type(module).__name__ if weight is None else layer
    return {"name": name, "type": kind, "shape": [] if weight is None else list(weight.shape)}


def _beta(layer: nn.Module) -> float | None:
    """The gate's share of the whole image (Eq. 5), where it has one."""
    beta = getattr(getattr(layer, "gate", None), "beta", None)
    return None if beta is None else float(beta)


def _sizes(shape: list[int]) -> str:
    """``768 -> 2304``, ``16 -> 160 3x3``."""
    if not shape:
        return ""
    kernel = f" {'x'.join(map(str, shape[2:]))}" if shape[2:] else ""
    return f"{shape[1]} -> {shape[0]}{kernel}"
