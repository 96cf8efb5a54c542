"""A dry run of experts: which layers of a config's model get them, and what that adds (``rome cost --layers``)."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn

from rome.core.console import print_table
from rome.experts import block_numbers, expert_layers
from rome.models import build_model
from rome.report.cost import added, parameters
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
    shape, classes = config.data.form(config.model.num_classes)
    model = build_model(config.model.architecture_only(), config.experts, classes=classes, shape=shape)
    adapted = expert_layers(model)
    blocks = block_numbers(list(adapted))
    inside = tuple(f"{name}." for name in adapted)
    totals = parameters(model)
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
    """Print what :func:`plan` found; layers without experts that differ in a number alone share a line."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    layers = facts["layers"]
    table = Table(box=None, pad_edge=False)
    for title in ("layer", "type", "shape", "block", "beta", "added"):
        table.add_column(title, no_wrap=True, justify="right" if title in ("block", "beta", "added") else "left")
    for layer in layers:
        beta = "" if layer["beta"] is None else f"{layer['beta']:.3f}"
        table.add_row(
            layer["name"], layer["type"], _sizes(layer["shape"]), str(layer["block"]), beta, f"{layer['added']:,}"
        )
    console.print(Text(str(facts["name"]), style="bold"))
    if layers:
        print_table(table, console)
        where = f"{len(layers)} of {len(layers) + len(facts['others'])} layers, blocks up to {layers[-1]['block']}"
        print(f"with experts: {where}; {facts['added']:,} parameters added, {facts['parameters']:,} in all")
    else:
        print("with experts: none, for the config has no experts")
    groups: dict[tuple[str, str, str], list[str]] = {}
    for other in facts["others"]:
        groups.setdefault((_pattern(other["name"]), other["type"], _sizes(other["shape"])), []).append(other["name"])
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


def _pattern(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))
