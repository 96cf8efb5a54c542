"""AutoAttack on a thousand images: time and verdicts of rome's evaluation beside pyautoattack's.

    python benchmarks/autoattack.py --data PATH --device cuda --json autoattack.json
    python benchmarks/autoattack.py --models resnet18-16 --images 16 --batch 16         # on a CPU
    python benchmarks/autoattack.py --models resnet18 --images 32 --batch 32 --shorter 20
    python benchmarks/autoattack.py --data PATH --device cuda --unfrozen

ResNet-18 is pyautoattack's, trained on CIFAR-10; ViT-Ti has random weights. Radii are CIFAR-10's times ``--scale``
(default 1/8), because models without robust training lose every image at full radius. rome runs the suite
``autoattack``, verifies every adversarial image again and stores nothing; once for each precision of ``--search``, by
default in fp32 and, on CUDA, in TF32 as well (``search_precision``). pyautoattack runs its version ``standard`` in
strict fp32, although torch convolves in TF32 by default on CUDA, on the images that rome's evaluation attacks, those
that the model classifies correctly, in batches of the same size.

By default, the model's parameters do not require gradients. ``--unfrozen`` leaves them as torch creates them, which is
what users of pyautoattack get who follow its example (examples/eval.py): its FAB then computes the gradients of all
weights as well. rome freezes the model itself during an evaluation.

How to read it: ``x rome`` is the time over that of rome's first search; ``same`` counts the images with the verdict of
that search. rome and pyautoattack draw different random numbers, so a few verdicts may differ. ``robust %`` is over all
images. TF32 could become the default if it left at most 0.1 points more on 1,000 images of both models.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from pyautoattack import AutoAttack
from torch import Tensor, nn

import common
from rome import evaluate
from rome.attacks.lp.autoattack import set_iterations
from rome.attacks.suites import Suite
from rome.core.device import float32_products
from rome.threats import CIFAR10, LpBall


def measure(name: str, batch: int, suite: Any, options: Any, device: torch.device, report: common.Report) -> None:
    """Measure every case, one norm after the other. Each is saved as soon as it is measured, and printed below the
    earlier cases of its norm."""
    model = common.make_model(name, device, options.seed).requires_grad_(options.unfrozen)
    x, y = common.images(options.images, options.data, torch.device("cpu"), options.seed)
    if options.data is None or name != "resnet18":
        with torch.no_grad():
            y = torch.cat([model(part.to(device)).argmax(1).cpu() for part in x.split(batch)])
    for ball in CIFAR10:
        threat = LpBall(norm=ball.norm, eps=ball.eps * options.scale)
        rows: list[dict[str, Any]] = []
        first: tuple[float, Tensor] | None = None
        for case, seconds, robust in cases(model, x, y, threat, batch, suite, options, device):
            first = first or (seconds, robust)
            rows.append(
                {
                    "model": name,
                    "batch": batch,
                    "norm": threat.norm,
                    "case": case,
                    "seconds": seconds,
                    "times_rome": seconds / first[0],
                    "robust": robust.double().mean().item(),
                    "same": int((robust == first[1]).sum()),
                    "images": len(x),
                }
            )
            report.table(f"AutoAttack, {len(x)} images", [shown(row) for row in rows], rows[-1:])
            report.save()


def cases(
    model: nn.Module, x: Tensor, y: Tensor, threat: LpBall, batch: int, suite: Any, options: Any, device: torch.device
) -> Iterator[tuple[str, float, Tensor]]:
    """Run rome's searches, then pyautoattack; yield each one's name, seconds, and which images stay correct, (n,)."""
    for precision in options.search:
        common.synchronize(device)
        started = time.perf_counter()
        found = evaluate(
            model, x, y, threats=threat, suite=suite, batch_size=batch, checks=False, search_precision=precision
        )
        seconds = time.perf_counter() - started
        yield "rome" if precision == "fp32" else f"rome, {precision}", seconds, torch.from_numpy(found.correct[:, 1])
    robust = torch.from_numpy(found.correct[:, 0]).clone()
    clean = robust.clone()
    attack = AutoAttack(model, norm=threat.norm, eps=threat.eps, seed=options.seed, device=device)
    set_iterations(attack.apgd, suite.iterations)
    set_iterations(attack.apgd_targeted, suite.iterations)
    attack.fab.n_iter, attack.square.n_queries = suite.iterations, getattr(suite, "square_queries", 0)
    if options.quick:
        attack.attacks_to_run = ["apgd-ce"]
    started = time.perf_counter()
    adversarial, _ = attack.run_standard_evaluation(x[clean].to(device), y[clean].to(device), batch_size=batch)
    common.synchronize(device)
    seconds = time.perf_counter() - started
    with torch.no_grad():
        right = [model(part).argmax(1).cpu() for part in adversarial.split(batch)]
    robust[clean] = torch.cat(right) == y[clean]
    yield "pyautoattack", seconds, robust


def shown(row: dict[str, Any]) -> dict[str, str]:
    """Return the numbers of a row as printed in the table."""
    return {
        "model": row["model"],
        "batch": str(row["batch"]),
        "norm": row["norm"],
        "case": row["case"],
        "s": f"{row['seconds']:.4g}",
        "x rome": f"{row['times_rome']:.2f}",
        "robust %": f"{100 * row['robust']:.1f}",
        "same": f"{row['same']} of {row['images']}",
    }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = common.arguments(__doc__, models=["resnet18", "vit-ti"], batch=[500], repeats=1)
    parser.add_argument("--data", metavar="PATH", help="folder of CIFAR-10; random images by default")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--scale", type=float, default=1 / 8, help="factor on CIFAR-10's radii")
    parser.add_argument(
        "--shorter", type=int, default=1, metavar="N", help="1/N of AutoAttack's iterations and queries"
    )
    parser.add_argument(
        "--search", nargs="+", choices=["fp32", "tf32"], help="precisions of rome's search; both by default on CUDA"
    )
    parser.add_argument("--unfrozen", action="store_true", help="leave requires_grad on, as in pyautoattack's example")
    options = parser.parse_args(argv)
    shorter = {"iterations": max(5, 100 // options.shorter), "square_queries": max(1, 5000 // options.shorter)}
    suite: Any = Suite.of_kind("autoattack")(**shorter)
    if options.quick:
        suite = Suite.of_kind("apgd")(iterations=5)
        options.models, options.batch, options.images = ["vit-micro"], [4], 4
    device = common.start(options)
    options.search = options.search or (["fp32", "tf32"] if device.type == "cuda" else ["fp32"])
    report = common.Report(options, device, argv)
    for name in options.models:
        for batch in options.batch:
            with float32_products("fp32"):
                measure(name, batch, suite, options, device, report)
    return report.finish()


if __name__ == "__main__":
    main()
