"""Compilation of a model's repeated blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from rome.experts import MixtureLinear
from rome.experts.fused import mixture


def repeated_blocks(model: nn.Module, whole: type[nn.Module] | tuple[()] = ()) -> list[nn.Module]:
    """Return a model's repeated blocks, such as the blocks of a transformer.

    These are the members of each list of two or more modules of one class, if they contain modules themselves. Where
    lists are nested, the innermost counts.

    Args:
        whole: a class of modules that are not searched for blocks.
    """
    found: list[nn.Module] = []
    for child in model.children():
        inner = [] if isinstance(child, whole) else repeated_blocks(child, whole)
        alike = isinstance(child, (nn.ModuleList, nn.Sequential)) and len(
            {type(block) for block in child.children()}
        ) == 1 < len(child)
        if alike and not inner:
            inner = [block for block in child.children() if any(block.children())]
        found += inner
    return found


def compile_blocks(model: nn.Module) -> int:
    """Compile a model in place, at its next call, and return the number of its repeated blocks.

    Blocks of the same shape share one compiled program, so a deep transformer compiles as fast as one of its blocks. A
    model without repeated blocks is compiled as a whole (returns 0). Saved weights do not change.
    """
    blocks = repeated_blocks(model)
    # otherwise beta, which differs from block to block, would become part of the program that the blocks share
    uncompiled: Any = torch.compiler.disable(mixture)  # type: ignore[no-untyped-call]  # imports the compiler: not above
    for block in blocks or [model]:
        for layer in block.modules() if blocks else ():
            if isinstance(layer, MixtureLinear):
                layer.combine = uncompiled
        block.compile()
    return len(blocks)
