"""Compiling the repeated blocks of a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from rome.experts import MixtureLinear
from rome.experts.fused import mixture


def repeated_blocks(model: nn.Module, whole: type[nn.Module] | tuple[()] = ()) -> list[nn.Module]:
    """The members of every list of modules of one class that have modules inside; of nested lists the inner ones.

    Args:
        whole: a class of modules whose own lists do not count.
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
    """Compile a model in place, at its next call; returns the number of blocks.

    Blocks of one shape share a program, so a deep transformer is ready after the time that one of its blocks takes. A
    model without repeated blocks is compiled as a whole (0). Nothing that is saved changes.
    """
    blocks = repeated_blocks(model)
    # or beta, which differs from block to block, would be part of the program that they share
    uncompiled: Any = torch.compiler.disable(mixture)  # type: ignore[no-untyped-call]  # imports the compiler: not above
    for block in blocks or [model]:
        for layer in block.modules() if blocks else ():
            if isinstance(layer, MixtureLinear):
                layer.combine = uncompiled
        block.compile()
    return len(blocks)
