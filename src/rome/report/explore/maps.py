"""Gate weights of tokens, put where their patches lie in the image."""

from __future__ import annotations

from torch import Tensor, nn

from rome.core.errors import UserError
from rome.experts.token_maps import grid_of


def on_grid(model: nn.Module, name: str, weights: Tensor, size: tuple[int, int]) -> tuple[Tensor, str]:
    """The weights of a layer's tokens as a map over the image, and a sentence where they do not differ by place.

    Args:
        name: of the layer, as :func:`rome.experts.record_gates` calls it.
        weights: (..., T, K), as recorded.
        size: (H, W) of the image.

    Returns:
        (..., h, w, K) for a grid of h x w patches (:func:`rome.experts.token_maps.grid_of`); (..., 1, 1, K) where the
        tokens have no place in the image.
    """
    tokens = weights.shape[-2]
    try:
        grid = grid_of(model, name, tokens, size)
    except UserError:
        why = f"Its {tokens} tokens form no grid over the image; this is their mean."
        whole = weights.mean(dim=-2)[..., None, None, :]
        return whole, "This gate decides once for the whole image." if tokens == 1 else why
    patches = weights[..., grid.order, :]
    note = "" if bool((patches != patches[..., :1, :]).any()) else "This gate gives every patch the same weights."
    return patches.reshape(*patches.shape[:-2], grid.rows, grid.columns, patches.shape[-1]), note
