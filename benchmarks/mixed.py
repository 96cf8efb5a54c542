"""Speed of mixed batches: all threats attacked together, compared with one attack call per threat.

    python benchmarks/mixed.py                                     # ViT-Ti, batch 64 and 192, PGD 20/20/10
    python benchmarks/mixed.py --models vit-micro vit-ti vit-b --device cuda --json mixed.json

Two workloads, both with the paper's PGD (20, 20, 10 steps in L1, L2, Linf):
RANDOM: every example has one threat, a third of the batch each; one mixed call, or three calls on a third each.
MAX: every example has every threat; one mixed call on the batch repeated three times, or three calls on the batch.

How to read it: ``x separate`` is the median over rounds of the time divided by that of separate calls in the same
round, with the smallest and largest in brackets; below 1 the mixed batch is faster. Both compute the same images
(``same`` is the share of images that agree within 1e-3), so the arithmetic is equal and only the number of model calls
differs: ``forwards``, and as many backwards. The gain is largest if a third of the batch does not fill the hardware.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import common
from rome.attacks import PGD
from rome.core.randomness import Stream, stream
from rome.experts import add_experts
from rome.threats import CIFAR10, PerExample


class FixedNoise(Stream):
    """A stream that returns a given tensor, so that mixed and separate calls start from the same noise."""

    def __init__(self, noise: Tensor) -> None:
        super().__init__(torch.Generator())
        object.__setattr__(self, "noise", noise)

    def uniform(self, shape: torch.Size | tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
        assert tuple(shape) == tuple(self.noise.shape)
        return self.noise


def measure(name: str, batch: int, options: Any, device: torch.device) -> list[dict[str, Any]]:
    """Measure both workloads, mixed and separate."""
    model = common.make_model(name, device, options.seed)
    if options.experts:
        add_experts(model)
    model.requires_grad_(False)
    attack = PGD(steps=dict(zip(("L1", "L2", "Linf"), options.steps, strict=True)))
    x, y = common.images(batch, options.data, device, options.seed)
    draws = stream(options.seed, "attack", device=device)
    source = stream(options.seed, "threats")
    threats, rows = tuple(CIFAR10), []
    calls = _count(model)
    for workload in ("RANDOM", "MAX"):
        if workload == "RANDOM":
            mixture, images, labels = PerExample(threats, source.permutation(batch) % len(threats)), x, y
        else:
            mixture = PerExample.repeated(threats, batch)
            images, labels = x.repeat(len(threats), 1, 1, 1), y.repeat(len(threats))
        noise = draws.uniform(images.shape, device)
        parts = [(threat, where.to(device)) for threat, where in mixture.groups()]

        # default arguments bind the values of this iteration
        def mixed(images=images, labels=labels, mixture=mixture, noise=noise) -> Tensor:  # type: ignore[no-untyped-def]
            return attack(model, images, labels, mixture, generator=FixedNoise(noise))

        def separate(images=images, labels=labels, parts=parts, noise=noise) -> Tensor:  # type: ignore[no-untyped-def]
            result = torch.empty_like(images)
            for threat, where in parts:
                own = FixedNoise(noise[where])
                result[where] = attack(model, images[where], labels[where], threat, generator=own)
            return result

        cases: dict[str, Callable[[], Tensor]] = {"mixed": mixed, "separate": separate}
        forwards, result = {}, {}
        with common.cast(device, options.precision):
            for case, work in cases.items():
                calls.clear()
                result[case] = work()
                forwards[case] = len(calls)
            times = common.interleave(cases, device, rounds=options.repeats, warmup=1)
        apart = (result["mixed"] - result["separate"]).flatten(1).abs().amax(dim=1)
        for case in cases:
            rows.append(
                {
                    "model": name,
                    "batch": batch,
                    "what": workload,
                    "case": case,
                    "seconds": times[case],
                    "ratio": common.ratio(times[case], times["separate"]),
                    "forwards": forwards[case],
                    "same": (apart < 1e-3).double().mean().item(),
                }
            )
    return rows


def _count(model: nn.Module) -> list[int]:
    """Return a list to which every forward of the model appends its batch size."""
    calls: list[int] = []
    model.register_forward_hook(lambda module, args, out: calls.append(len(args[0])))
    return calls


def shown(row: dict[str, Any]) -> dict[str, str]:
    """Format a row of the printed table."""
    return {
        "model": row["model"],
        "batch": str(row["batch"]),
        "what": row["what"],
        "case": row["case"],
        "ms": common.milliseconds(row["seconds"]),
        "x separate": str(row["ratio"]),
        "forwards": str(row["forwards"]),
        "same": f"{row['same']:.0%}",
    }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = common.arguments(__doc__, models=["vit-ti"], batch=[64, 192], repeats=3)
    parser.add_argument("--data", metavar="PATH", help="folder of CIFAR-10; random images by default")
    parser.add_argument("--steps", nargs=3, type=int, default=[20, 20, 10], help="steps in L1, L2, Linf")
    parser.add_argument("--experts", action="store_true", help="add RoME's experts to the ViT")
    parser.add_argument("--precision", choices=("fp32", "tf32", "bf16"), default="fp32")
    options = parser.parse_args(argv)
    if options.quick:
        options.models, options.batch, options.repeats, options.steps = ["vit-micro"], [6], 2, [2, 2, 1]
    device = common.start(options)
    report = common.Report(options, device, argv)
    steps, experts = "/".join(map(str, options.steps)), ", with experts" if options.experts else ""
    list(report.measured(measure, shown, f"Mixed batch, PGD {steps}, {options.precision}{experts}"))
    return report.finish()


if __name__ == "__main__":
    main()
