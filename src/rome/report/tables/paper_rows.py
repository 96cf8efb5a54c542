"""The paper's tables as data: columns, sections, and the experiments that are their rows."""

from __future__ import annotations

from collections.abc import Sequence

from rome.evaluation.result import UNION

BALLS = ("L1", "L2", "Linf")
"""The cases whose mean and union the paper reports, whatever else a suite attacked with."""
LP = ("clean", *BALLS, "average", UNION)
UNSEEN = ("corruptions", "L0", "perceptual", "PPGD", "LPA", "patch", "StAdv", "ReColorAdv", "GMA")
CASES = {"L0": "sparsefool", "PPGD": "ppgd", "LPA": "lpa", "StAdv": "stadv", "ReColorAdv": "recoloradv", "GMA": "gma"}
"""Columns of Table 2 -> cases of the suite ``unseen`` under other names."""
COST = ("parameters_M", "GMACs", "seconds_per_update", "latency_ms", "latency_one_ms")
"""The paper's columns, and the latency of one image alone, which it does not give."""
SIZE = {"parameters_M": "parameters", "added_parameters_M": "experts"}
"""Columns of Tables A3 and A4 that are counted -> what :func:`rome.report.cost.count` calls them."""
UNITS = {*COST, *SIZE}
"""Columns that are no percentages."""

_PGD = ("random", "avg", "max", "msd", "rome-random", "rome-max")
_WITH_MORE = (*_PGD[:4], "more", *_PGD[4:])
_APGD = ("random", "max", "eat", "ramp", "rome-random", "rome-max")


def _both(place: str, pgd: Sequence[str] = _WITH_MORE, apgd: Sequence[str] = _APGD) -> list[str]:
    return [*(f"{place}/{name}-pgd" for name in pgd), *(f"{place}/{name}-apgd" for name in apgd)]


_PERCEPTUAL = ("pat", "vr", "rome-pat", "rome-vr")
_TWO = ("random", "max", "rome-random", "rome-max")
OURS = "table1/rome-random-pgd"
_TUNED = ("eat", "eat-per-example", "rome-eat", "max", "rome-max", "ramp", "rome-ramp")

_FINE_TUNING = {
    "vit-b": "ViT-B (CIFAR-10)",
    "wrn-28-10": "WRN-28-10 (CIFAR-10)",
    "wrn-94-16": "WRN-94-16 (CIFAR-10)",
    "xcit-s": "XCiT-S (ImageNet-1K)",
}
_GATES = ("uniform", "local", "global", "inverted", "learned", "cls")
_REGULARIZERS = ("no-regularization", "load-balancing", "importance", "classification", "no-projection")


def _with_experts(attack: str) -> list[str]:
    """Methods without experts, with experts and gates that nothing regularizes, and RoME's."""
    plain = (f"table{place}-{attack}" for place in ("1/random", "A3/random-experts", "1/max", "A3/max-experts"))
    return [*plain, f"table1/rome-random-{attack}", f"table1/rome-max-{attack}"]


TABLES: dict[str, tuple[tuple[str, ...], dict[str, list[str]]]] = {
    "1": (LP, {"CIFAR-10": _both("table1"), "ImageNet-100": _both("table1/imagenet100")}),
    "2": (UNSEEN, {"CIFAR-10": [*_both("table1"), *(f"table2/{name}" for name in _PERCEPTUAL)]}),
    "3": (
        ("clean", UNION),
        {title: [f"fine-tuning/{place}/{name}" for name in _TUNED] for place, title in _FINE_TUNING.items()},
    ),
    "4": (
        LP,
        {
            "Low-rank experts": ["table4/ffn", "table4/adapter", OURS],
            "Dual-scale gating": [*(f"table4/{name}" for name in _GATES), OURS],
            "Gating diversification": [*(f"table4/{name}" for name in _REGULARIZERS), "table4/three-experts", OURS],
        },
    ),
    "5": (LP, {"RoME+RANDOM, PGD": ["table5/random", "table5/inverse", "table5/none", OURS]}),
    "6": (COST, {"ViT-B": ["table6/random", "table6/more", "table6/moe-ffn", "table6/rome"]}),
    "A1": (LP, {"DeiT-B": _both("tableA1/deit-b", _PGD), "Swin-B": _both("tableA1/swin-b", _PGD)}),
    "A2": (LP, {"ImageNet-1K": _both("tableA2", _TWO, _TWO)}),
    "A3": ((*LP, "parameters_M"), {"PGD": _with_experts("pgd"), "APGD": _with_experts("apgd")}),
    "A4": (
        (*LP, "added_parameters_M"),
        {
            "Layers": [
                *("tableA4/qkv", "tableA4/out", "tableA4/ffn", OURS),
                *("tableA4/qkv-ffn", "tableA4/out-ffn", "tableA4/qkv-out-ffn"),
            ]
        },
    ),
    "A5": (
        LP,
        {"Distances": ["table4/no-regularization", "tableA5/cosine", "tableA5/kl", "tableA5/wasserstein", OURS]},
    ),
}
"""Table -> its columns and, section by section, the experiments that are its rows, in the paper's order."""
BY_MODEL = ("3", "A1")
"""Tables that compare architectures."""
