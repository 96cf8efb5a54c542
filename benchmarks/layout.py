"""Speed of convolutions with weights in channels-last order and with BatchNorm folded into them.

    python benchmarks/layout.py --threads 1                                     # ResNet-18, without and with experts
    python benchmarks/layout.py --device cuda --batch 256 --precision bf16      # would a GPU profit too?

Times forward, input gradient (an attack step) and training step (forward and backward to all parameters, no
optimizer). Only the order of the weights is changed; activations follow it. ``folded`` is channels last with BatchNorm
folded into the convolutions. ``x first`` is the median over rounds of the time divided by that of channels first in the
same round, with the smallest and largest in brackets. On CPUs rome uses channels last (rome.core.device.placed) and
folds in evaluations (rome.models.folding).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

import common
from experts import forward, gradient, training
from rome.experts import add_experts
from rome.models.folding import foldable, folded


def measure(name: str, batch: int, options: Any, device: torch.device) -> list[dict[str, Any]]:
    """Measure all times of one model."""
    plain = common.make_model(name, device, options.seed)
    x, y = common.images(batch, None, device, options.seed)
    context = partial(common.cast, device, options.precision)
    rows = []
    for what, first in {"plain": plain, "rome": add_experts(copy.deepcopy(plain))}.items():
        last = copy.deepcopy(first).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        models = {"channels first": first, "channels last": last}
        found = {}
        for model in models.values():
            model.eval().requires_grad_(False)
        joined = copy.deepcopy(last)
        folds = foldable(joined, x[:2])  # none on a GPU
        with folded(folds):
            frozen = {**models, "folded": joined} if folds else models
            cases = {key: partial(forward, model, context, x) for key, model in frozen.items()}
            found["forward"] = common.interleave(cases, device, rounds=options.repeats)
            cases = {key: partial(gradient, model, context, x, y) for key, model in frozen.items()}
            found["input gradient"] = common.interleave(cases, device, rounds=options.repeats)
        for model in models.values():
            model.train().requires_grad_(True)
        cases = {key: partial(training, model, context, x, y) for key, model in models.items()}
        found["training step"] = common.interleave(cases, device, rounds=options.repeats)
        for step, times in found.items():
            for case, seconds in times.items():
                ratio = common.ratio(seconds, times["channels first"])
                rows.append(
                    {
                        "model": f"{name}, {what}",
                        "batch": batch,
                        "what": step,
                        "case": case,
                        "seconds": seconds,
                        "ratio": ratio,
                    }
                )
    return rows


def shown(row: dict[str, Any]) -> dict[str, str]:
    """Format a row of the printed table."""
    return {
        **{key: str(row[key]) for key in ("model", "batch", "what", "case")},
        "ms": common.milliseconds(row["seconds"]),
        "x first": str(row["ratio"]),
    }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = common.arguments(__doc__, models=["resnet18"], batch=[32], repeats=7)
    parser.add_argument("--precision", choices=("fp32", "tf32", "bf16"), default="fp32")
    options = parser.parse_args(argv)
    if options.quick:
        options.batch, options.repeats = [2], 2
    device = common.start(options)
    report = common.Report(options, device, argv)
    list(report.measured(measure, shown, f"Layout, {options.precision}"))
    return report.finish()


if __name__ == "__main__":
    main()
