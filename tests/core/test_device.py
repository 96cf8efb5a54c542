"""The precision of float32 products: set in one place, and as before afterwards."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
import torch

from rome.core.device import float32_products

BACKENDS: Any = torch.backends
PRODUCTS = (
    BACKENDS.cuda.matmul,
    BACKENDS.cudnn.conv,
    BACKENDS.cudnn.rnn,
    BACKENDS.mkldnn.matmul,
    BACKENDS.mkldnn.conv,
)


def precisions() -> list[str]:
    return [product.fp32_precision for product in PRODUCTS]


@pytest.mark.parametrize("before", ["highest", "high", "medium", "contradictory"])
@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_products_have_the_precision_inside_and_the_earlier_one_afterwards(precision: str, before: str) -> None:
    """torch refuses to answer in which precision it computes where its older settings contradict its newer ones."""
    with float32_products("fp32"):  # restores what this test sets
        if before == "contradictory":
            for product in PRODUCTS:
                product.fp32_precision = "tf32"
        else:
            torch.set_float32_matmul_precision(before)
        earlier = precisions()
        with suppress(ZeroDivisionError), float32_products(precision):
            assert precisions() == ["tf32" if precision == "tf32" else "ieee"] * 3 + ["ieee"] * 2
            assert torch.get_float32_matmul_precision() == {"fp32": "highest", "tf32": "high"}[precision]
            assert torch.backends.cudnn.allow_tf32 == torch.backends.cuda.matmul.allow_tf32 == (precision == "tf32")
            raise ZeroDivisionError
        assert precisions() == earlier
        if before != "contradictory":
            assert torch.get_float32_matmul_precision() == before
