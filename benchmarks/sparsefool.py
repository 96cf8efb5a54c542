"""SparseFool on a batch against torchattacks' SparseFool, which takes one image after the other.

    python benchmarks/sparsefool.py --data PATH --threads 1      # ResNet-18, 16 images; torchattacks takes minutes
    python benchmarks/sparsefool.py --models vit-ti --batch 8

Both attack images the model classifies correctly, with the same settings: 10 rounds, lambda 3, 50 steps of DeepFool.
``--fewer N`` adds a run that looks at N candidate classes instead of 10. ResNet-18 is pyautoattack's, trained on
CIFAR-10; the others have random weights and their own answers as labels.
torchattacks is optional (``pip install --no-deps torchattacks``); it computes the gradients of all parameters too,
as its users get it. Runs once each, in turn: ``seconds`` by the clock, ``CPU s`` of the process, which other work on
the machine disturbs less. ``x`` is the ratio of CPU seconds (on a GPU: of seconds). ``robust`` counts images still
classified correctly, ``coordinates`` is the median of what the others have changed, ``passes`` images forwards.
Aim: 20 x on a CPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import common
from rome.attacks import SparseFool
from rome.threats import AnyImage

try:
    from torchattacks.attacks.sparsefool import SparseFool as Reference
except ImportError:
    Reference = None


def problem(name: str, count: int, options: Any, device: torch.device) -> tuple[nn.Module, Tensor, Tensor]:
    """A model and images that it classifies correctly."""
    model = common.make_model(name, device, options.seed)
    real = options.data is not None and name == "resnet18"
    x, y = common.images(4 * count if real else count, options.data, device, options.seed)
    with torch.no_grad():
        answer = model(x).argmax(dim=1)
    right = (answer == y).nonzero().flatten()[:count] if real else torch.arange(count, device=device)
    return model, x[right], answer[right]


def measure(model: nn.Module, x: Tensor, y: Tensor, attack: Callable[[], Tensor]) -> dict[str, Any]:
    """Time and result of one run."""
    passes = 0

    def count(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        nonlocal passes
        passes += len(args[0])

    handle = model.register_forward_hook(count)
    common.synchronize(x.device)
    started, cpu = time.perf_counter(), time.process_time()
    found = attack().detach()
    common.synchronize(x.device)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    handle.remove()
    with torch.no_grad():
        robust = model(found).argmax(dim=1) == y
    changed = (found != x).flatten(1).sum(dim=1)[~robust].double()
    return {
        "seconds": seconds,
        "cpu": cpu,
        "passes": passes,
        "robust": int(robust.sum()),
        "verdicts": robust.tolist(),
        "coordinates": changed.median().item() if len(changed) else None,
    }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = common.arguments(__doc__, models=["resnet18"], batch=[16], repeats=1)
    parser.add_argument("--data", metavar="PATH", help="folder of CIFAR-10; random images unless given")
    parser.add_argument("--fewer", type=int, metavar="N", help="also with N candidate classes")
    options = parser.parse_args(argv)
    attack = SparseFool()
    if options.quick:
        options.models, options.batch = ["vit-micro"], [4]
        attack = SparseFool(steps=2, deepfool_steps=5)
    device = common.start(options)
    report = common.Report(options, device, argv)
    threat = AnyImage(label="l0")
    for name in options.models:
        for batch in options.batch:
            model, x, y = problem(name, batch, options, device)
            attack(model, x[:1], y[:1], threat)  # allocates, chooses kernels
            cases: dict[str, Callable[[], Tensor]] = {"rome": partial(attack, model, x, y, threat)}
            if options.fewer:
                fewer = attack.model_copy(update={"candidates": options.fewer})
                cases[f"rome, {options.fewer} candidates"] = partial(fewer, model, x, y, threat)
            if Reference is not None:
                reference = Reference(model, steps=attack.steps)
                reference.deepfool.steps = attack.deepfool_steps
                cases["torchattacks"] = partial(reference, x, y)
            found = {case: measure(model, x, y, run) for case, run in cases.items()}
            clock = "cpu" if device.type == "cpu" else "seconds"
            data = [
                {"model": name, "images": batch, "case": case, "ratio": row[clock] / found["rome"][clock], **row}
                for case, row in found.items()
            ]
            rows = [
                {
                    "model": row["model"],
                    "case": row["case"],
                    "images": str(row["images"]),
                    "seconds": f"{row['seconds']:.4g}",
                    "CPU s": f"{row['cpu']:.4g}",
                    "images/s": f"{row['images'] / row[clock]:.3g}",
                    "x": f"{row['ratio']:.2f}",
                    "passes": str(row["passes"]),
                    "robust": str(row["robust"]),
                    "coordinates": "" if row["coordinates"] is None else f"{row['coordinates']:g}",
                }
                for row in data
            ]
            report.table(f"SparseFool, {attack.steps} rounds", rows, data)
            for case in list(cases)[1:]:
                same = sum(a == b for a, b in zip(found["rome"]["verdicts"], found[case]["verdicts"], strict=True))
                report.note(f"{name}: the verdicts of {case} are rome's on {same} of {batch} images")
    return report.finish()


if __name__ == "__main__":
    main()
