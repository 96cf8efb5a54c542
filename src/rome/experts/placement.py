"""Which layers of a model get experts, and how their input makes up an image. Nothing here changes a model."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping
from itertools import pairwise, product
from typing import Any

from torch import nn

from rome.core.errors import UserError
from rome.experts.gated import MixtureLayer
from rome.experts.gates import PLAIN, Layout

KINDS = (nn.Linear, nn.Conv2d)
"""The layers that ``layers`` can name. A pattern selects the Linear layers it matches, or else the convolutions."""
STEMS = {"stem", "conv_stem", "patch_embed"}
"""Names of network parts before the first block."""


def find_layers(model: nn.Module, patterns: tuple[str, ...] | None) -> dict[str, nn.Module]:
    """Return the layers whose names match, by name and in module order.

    Args:
        patterns: ends of names (``qkv``, ``attn.proj``) or patterns for ends (``blocks.*.mlp.fc?``). None picks the
            paper's layers (5.1): the fused QKV and output projections of attention, except class attention; in a model
            without those, the 3x3 convolutions after the stem.

    Raises:
        UserError: a pattern matches nothing (the message lists possible names), or a match cannot be adapted.
    """
    adapted = tuple(name + "." for name, module in model.named_modules() if isinstance(module, MixtureLayer))
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, KINDS) and not name.startswith(adapted)
    }
    chosen = _paper_layers(layers) if patterns is None else _matching(layers, patterns)
    for name, module in chosen.items():
        reason = _refusal(model, name, module)
        if reason:
            raise UserError(f"layer {name} cannot hold experts: {reason}. Leave it out of experts.layers.")
    return chosen


def check_places(model: nn.Module, chosen: Mapping[str, nn.Module]) -> None:
    """Check that modules, of whatever kind, can be replaced.

    Raises:
        UserError: a module has two names, is inside another one, or has experts.
    """
    names: dict[int, str] = {}
    ids = {id(module) for module in chosen.values()}
    for name, module in model.named_modules(remove_duplicate=False):
        if id(module) in ids and names.setdefault(id(module), name) != name:
            raise UserError(f"layers {names[id(module)]} and {name} are one shared module; it cannot be adapted twice")
    for name, module in chosen.items():
        for inner, part in module.named_modules(prefix=name):
            if isinstance(part, MixtureLayer) or (inner in chosen and inner != name):
                what = "has experts already" if isinstance(part, MixtureLayer) else "is to get experts too"
                raise UserError(f"layer {name} cannot hold experts: {inner} inside it {what}. Change experts.layers.")


def _paper_layers(layers: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    attention = {
        name: layers[name]
        for name in layers
        if _leaf(name) in ("qkv", "proj")
        and all(isinstance(layers.get(name.removesuffix(_leaf(name)) + leaf), nn.Linear) for leaf in ("qkv", "proj"))
    }
    if attention:
        return attention
    convolutions = [(name, module) for name, module in layers.items() if isinstance(module, nn.Conv2d)]
    behind_stem: dict[str, nn.Module] = {
        name: module
        for name, module in convolutions[1:]
        if module.kernel_size == (3, 3) and module.groups == 1 and not _in_stem(name)
    }
    attends = any("attn" in name.split(".") and isinstance(module, nn.Linear) for name, module in layers.items())
    if attends or not behind_stem:
        reason = "this model has neither fused attention (qkv and proj) nor 3x3 convolutions"
        if attends:
            reason = "the attention of this model has no fused qkv layer with a proj layer"
        raise UserError(
            f"{reason}, so the layers have to be named (experts.layers); it has layers ending in {_ends(layers)}"
        )
    return behind_stem


def _in_stem(name: str) -> bool:
    """Whether a convolution comes before the first block, by its name; timm's deep stems are ``conv1.0``, ..."""
    parts = name.split(".")
    return bool(STEMS & set(parts)) or any(a == "conv1" and b.isdigit() for a, b in pairwise(parts))


def _matching(layers: Mapping[str, nn.Module], patterns: tuple[str, ...]) -> dict[str, nn.Module]:
    matches = {pattern: [name for name in layers if matches_end(name, pattern)] for pattern in patterns}
    if missing := [repr(pattern) for pattern, names in matches.items() if not names]:
        raise UserError(
            f"no Linear or Conv2d layer matches {', '.join(missing)}; this model has layers ending in {_ends(layers)}"
        )
    chosen: set[str] = set()
    for names in matches.values():
        chosen |= {name for name in names if isinstance(layers[name], nn.Linear)} or set(names)
    return {name: module for name, module in layers.items() if name in chosen}


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _ends(layers: Mapping[str, nn.Module]) -> str:
    ends = sorted({_leaf(name) for name, module in layers.items() if type(module) in KINDS})
    return ", ".join(ends) or "(no Linear or Conv2d layers at all)"


def matches_end(name: str, pattern: str) -> bool:
    """Whether a module's name, or its end after any dot, matches a pattern."""
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, "*." + pattern)


def ancestors(model: nn.Module, name: str) -> list[nn.Module]:
    """Return the modules around a module, the innermost first."""
    parts = name.split(".")
    return [model.get_submodule(".".join(parts[:depth])) for depth in reversed(range(len(parts)))]


def channels_last(model: nn.Module, name: str) -> bool:
    """Whether the network around a module has feature maps of shape (B, H, W, C), as timm's Swin does."""
    return any(getattr(parent, "output_fmt", None) == "NHWC" for parent in ancestors(model, name))


def sees_class_token(model: nn.Module, name: str) -> bool:
    """Whether a layer's input begins with a class token; register tokens do not count."""
    around = ancestors(model, name)
    places = [*around, *(getattr(part, "embeds", None) for part in around)]  # timm's NaFlexViT has it in ``embeds``
    return any(getattr(place, "cls_token", None) is not None for place in places) and _prefix(around, name) > 0


def _refusal(model: nn.Module, name: str, module: nn.Module) -> str | None:
    if isinstance(module, MixtureLayer):
        return "it has experts already"
    if not name:
        return "it is the model itself; put it into a module"
    for parent in ancestors(model, name):
        if isinstance(parent, (nn.MultiheadAttention, nn.TransformerEncoderLayer)):
            return f"{type(parent).__name__} reads its weight without calling it"
    if type(module) not in KINDS:
        base = "Conv2d" if isinstance(module, nn.Conv2d) else "Linear"
        return f"it is a {type(module).__name__}, not a plain {base}"
    if not isinstance(module.weight, nn.Parameter):
        return "its weight is computed at each call (spectral_norm, weight_norm)"
    if "forward" in vars(module):
        return "it has a forward of its own, which would be lost"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
        return "it has hooks, which would be lost"
    if isinstance(module, nn.Conv2d):
        if module.groups > 1:
            return f"it is a convolution in {module.groups} groups"
        if module.kernel_size[0] != module.kernel_size[1]:
            return f"its kernel {module.kernel_size} is not square"
        if isinstance(module.padding, str) or module.padding_mode != "zeros":
            return f"its padding ({module.padding!r}, {module.padding_mode}) is not a number of zeros"
    return None


def layout_of(model: nn.Module, name: str) -> Layout:
    """Return how a layer's input makes up images: windows of windowed attention, class tokens before the patches.

    Raises:
        UserError: windowed attention whose partition into windows is unknown.
    """
    if isinstance(model.get_submodule(name), nn.Conv2d):
        return PLAIN
    around = ancestors(model, name)
    for inner, outer in pairwise(around):
        if type(inner).__name__.startswith("WindowAttention"):
            return _window_layout(outer, name)
    for parent in around:
        if _has_unsupported_windows(parent, model):
            raise UserError(
                f"layer {name} gets padded windows of {type(parent).__name__}; windows are joined into images for Swin "
                "only. Leave it out of experts.layers."
            )
    return Layout(prefix=_prefix(around, name))


def _has_unsupported_windows(parent: nn.Module, model: nn.Module) -> bool:
    """Whether this is windowed attention of timm's Twins or SAM whose window is not the whole image."""
    if type(parent).__name__ == "LocallyGroupedAttn":
        return True
    size: Any = getattr(parent, "window_size", 0)
    if not isinstance(size, int) or size < 1 or not isinstance(getattr(parent, "attn", None), nn.Module):
        return False
    patches = (getattr(getattr(part, "patch_embed", None), "num_patches", None) for part in model.modules())
    return size**2 not in patches


CLASS_TOKEN_BLOCKS = ("cls_attn_blocks", "blocks_token_only")
"""Final blocks of timm's XCiT and CaiT, before which the class token is added; the other blocks get patches only."""


def for_class_token(name: str, pattern: str) -> bool:
    """Whether a module is in a part that updates the class token alone and that the pattern does not name."""
    return any(part in (*CLASS_TOKEN_BLOCKS, "attn_pool") and part not in pattern for part in name.split("."))


def _prefix(around: list[nn.Module], name: str) -> int:
    """Return the number of class and register tokens (timm's ``num_prefix_tokens``) before a layer's patches.

    0 outside the numbered blocks: the patch embedding precedes these tokens, and the head follows the pooling.
    """
    for depth, parent in enumerate(reversed(around)):
        count: Any = getattr(parent, "num_prefix_tokens", None)
        if isinstance(count, int):
            in_block = any(part.isdigit() for part in name.split(".")[depth:])
            return count if in_block and not any(hasattr(parent, blocks) for blocks in CLASS_TOKEN_BLOCKS) else 0
    return 0


def _window_layout(block: Any, name: str) -> Layout:
    """Return the layout of a Swin block, padded to whole windows cut row by row; a cyclic shift does not change it."""
    (height, width), (rows, columns) = _resolution_and_window(block, name)
    inside = [row < height and column < width for row, column in _window_tokens(height, width, rows, columns)]
    real = () if all(inside) else tuple(position for position, holds in enumerate(inside) if holds)
    return Layout(windows=len(inside) // (rows * columns), real=real)


def window_positions(block: Any, name: str) -> tuple[int, int, list[int]]:
    """Return height and width of the tokens of a Swin block, and each token's place in them, counted row by row.

    Tokens are in the order of the windows, without padding. Before it cuts, the block rolls its tokens by
    ``shift_size`` towards the start.

    Raises:
        UserError: the block's partition into windows is unknown.
    """
    (height, width), (rows, columns) = _resolution_and_window(block, name)
    down, across = _pair(getattr(block, "shift_size", 0))
    return (
        height,
        width,
        [
            (row + down) % height * width + (column + across) % width
            for row, column in _window_tokens(height, width, rows, columns)
            if row < height and column < width
        ],
    )


def _window_tokens(height: int, width: int, rows: int, columns: int) -> list[tuple[int, int]]:
    """Return row and column of every token of every window; padding is beyond the height and width."""
    windows = product(range(math.ceil(height / rows)), range(math.ceil(width / columns)), range(rows), range(columns))
    return [(i * rows + row, j * columns + column) for i, j, row, column in windows]


def _resolution_and_window(block: Any, name: str) -> tuple[tuple[int, int], tuple[int, int]]:
    resolution, window = getattr(block, "input_resolution", None), getattr(block, "window_size", None)
    if resolution is None or window is None or getattr(block, "dynamic_mask", False):
        raise UserError(
            f"layer {name} gets windows of an image, and its block does not declare how many, so a global gate cannot "
            "average over the image. Leave it out of experts.layers."
        )
    return _pair(resolution), _pair(window)


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def block_numbers(names: list[str]) -> dict[str, int]:
    """Return the block l = 1..L of each layer, for beta(l): layers whose names agree up to the last number share one.

    ``blocks.3.attn.qkv`` and ``blocks.3.attn.proj`` share a block; a name without a number is a block of its own.
    """
    keys: dict[str, str] = {}
    for name in names:
        parts = name.split(".")
        numbers = [i for i, part in enumerate(parts) if part.isdigit()]
        keys[name] = ".".join(parts[: numbers[-1] + 1]) if numbers else name
    order = {key: i + 1 for i, key in enumerate(dict.fromkeys(keys.values()))}
    return {name: order[key] for name, key in keys.items()}
