"""AutoAttack on a thousand images: time and verdicts of rome's evaluation beside pyautoattack's.

    python benchmarks/autoattack.py --data PATH --device cuda --json autoattack.json
    python benchmarks/autoattack.py --models resnet18-16 --images 16 --batch 16         # on a CPU
    python benchmarks/autoattack.py --models resnet18 --images 32 --batch 32 --shorter 20

ResNet-18 is pyautoattack's, trained on CIFAR-10; ViT-Ti has random weights. Radii are CIFAR-10's times ``--scale``
(default 1/8), because models without robust training lose every image at full radius. rome runs the suite
``autoattack``, verifies every adversarial image again and stores nothing. pyautoattack runs its version ``standard``
on the images that rome's evaluation attacks, those that the model classifies correctly, in batches of the same size.

How to read it: ``x rome`` is pyautoattack's time over rome's; ``same`` counts the images on which both verdicts agree.
The two draw different random numbers, so a few verdicts may differ. ``robust %`` is over all images.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from pyautoattack import AutoAttack

import common
from rome import evaluate
from rome.attacks.lp.autoattack import set_iterations
from rome.attacks.suites import Suite
from rome.threats import CIFAR10, LpBall


def measure(name: str, batch: int, suite: Any, options: Any, device: torch.device, report: common.Report) -> None:
    """Measure both implementations, one norm after the other."""
    model = common.make_model(name, device, options.seed).requires_grad_(False)
    x, y = common.images(options.images, options.data, torch.device("cpu"), options.seed)
    if options.data is None or name != "resnet18":
        with torch.no_grad():
            y = torch.cat([model(part.to(device)).argmax(1).cpu() for part in x.split(batch)])
    for ball in CIFAR10:
        threat = LpBall(norm=ball.norm, eps=ball.eps * options.scale)
        common.synchronize(device)
        started = time.perf_counter()
        found = evaluate(model, x, y, threats=threat, suite=suite, batch_size=batch, checks=False)
        seconds = {"rome": time.perf_counter() - started}
        clean, robust = torch.from_numpy(found.correct[:, 0]), torch.from_numpy(found.correct[:, 1])
        theirs = clean.clone()
        rows = [row(name, batch, threat, "rome", seconds, robust, robust)]
        attack = AutoAttack(model, norm=threat.norm, eps=threat.eps, seed=options.seed, device=device)
        set_iterations(attack.apgd, suite.iterations)
        set_iterations(attack.apgd_targeted, suite.iterations)
        attack.fab.n_iter, attack.square.n_queries = suite.iterations, getattr(suite, "square_queries", 0)
        if options.quick:
            attack.attacks_to_run = ["apgd-ce"]
        started = time.perf_counter()
        adversarial, _ = attack.run_standard_evaluation(x[clean].to(device), y[clean].to(device), batch_size=batch)
        common.synchronize(device)
        seconds["pyautoattack"] = time.perf_counter() - started
        with torch.no_grad():
            right = [model(part).argmax(1).cpu() for part in adversarial.split(batch)]
        theirs[clean] = torch.cat(right) == y[clean]
        rows.append(row(name, batch, threat, "pyautoattack", seconds, theirs, robust))
        report.table(f"AutoAttack, {len(x)} images, fp32", [shown for shown, _ in rows], [data for _, data in rows])
        report.save()


def row(
    name: str, batch: int, threat: LpBall, case: str, seconds: dict[str, float], robust: Any, reference: Any
) -> tuple[dict[str, str], dict[str, Any]]:
    """Return a row of the printed table, and its numbers."""
    data = {
        "model": name,
        "batch": batch,
        "norm": threat.norm,
        "case": case,
        "seconds": seconds[case],
        "times_rome": seconds[case] / seconds["rome"],
        "robust": robust.double().mean().item(),
        "same": int((robust == reference).sum()),
        "images": len(robust),
    }
    shown = {
        "model": name,
        "batch": str(batch),
        "norm": threat.norm,
        "case": case,
        "s": f"{data['seconds']:.4g}",
        "x rome": f"{data['times_rome']:.2f}",
        "robust %": f"{100 * data['robust']:.1f}",
        "same": f"{data['same']} of {data['images']}",
    }
    return shown, data


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = common.arguments(__doc__, models=["resnet18", "vit-ti"], batch=[500], repeats=1)
    parser.add_argument("--data", metavar="PATH", help="folder of CIFAR-10; random images by default")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--scale", type=float, default=1 / 8, help="factor on CIFAR-10's radii")
    parser.add_argument(
        "--shorter", type=int, default=1, metavar="N", help="1/N of AutoAttack's iterations and queries"
    )
    options = parser.parse_args(argv)
    shorter = {"iterations": max(5, 100 // options.shorter), "square_queries": max(1, 5000 // options.shorter)}
    suite: Any = Suite.of_kind("autoattack")(**shorter)
    if options.quick:
        suite = Suite.of_kind("apgd")(iterations=5)
        options.models, options.batch, options.images = ["vit-micro"], [4], 4
    device = common.start(options)
    report = common.Report(options, device, argv)
    for name in options.models:
        for batch in options.batch:
            measure(name, batch, suite, options, device, report)
    return report.finish()


if __name__ == "__main__":
    main()
