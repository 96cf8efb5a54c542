"""Cost of the attacks of the suite ``unseen`` and of corruptions, compared with the model passes that they need.

    python benchmarks/unseen.py --data PATH --threads 1      # ResNet-18 and ViT-Ti, 32 images; an hour on a CPU
    python benchmarks/unseen.py --data PATH --models resnet18 --cases sparsefool sparsefool-original

ResNet-18 is pyautoattack's, trained on CIFAR-10; ViT-Ti has random weights and its own predictions as labels. All
images are classified correctly, as those that an evaluation attacks. PPGD and LPA measure distances with the trained
network of ``--features`` or with an AlexNet of random weights; the weights affect ``robust`` but not speed.

Each case runs once on ``--n`` images, ``--batch`` at a time, including the verdict on the result. Bare passes of the
model are timed before and after it: a forward, and a forward with the gradient to the input. Times are CPU time of the
process on a CPU, which other programs disturb less, and wall-clock time on a GPU. ``x bare`` is the time in units of
bare forwards with gradient. ``passes`` counts the model's forwards + backwards per image, and ``x passes`` divides by
the time of exactly those: 1 is the physical limit, the rest is the attack's own work, in PPGD and LPA mostly that of
the other network. ``minutes`` extrapolates to 1,000 correctly classified images. Corruptions have severity 3 of the
suite's five. ``robust`` is the share of images still classified correctly. Cases such as ``fog-stop``, which run only
if ``--cases`` names them, use the suite's ``stop: true``: an example ends at its first misclassified image.

Cases such as ``ppgd-original`` are the published code (:mod:`originals`) with the same settings: SparseFool from
torchattacks, the others from perceptual-advex. They run as their users get them, parameter gradients included, except
that they need no CUDA. The packages are optional (``make test-originals`` names them). Goal: SparseFool 20 times as
fast as torchattacks' on a CPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import common
from originals import published
from rome.attacks import Attack
from rome.attacks.engine import frozen
from rome.attacks.free import LastIterate, changed_pixels
from rome.attacks.perceptual.features import loaded
from rome.attacks.suites.base import Case
from rome.attacks.suites.unseen import COMMON_CORRUPTIONS, UNSEEN, CorruptionsSuite, UnseenSuite
from rome.models import create_model, load_model
from rome.threats import CIFAR10, Perceptual

SEVERITY = 3
NAMES = (*(row.kind for row in UNSEEN), *(f"{kind}-{SEVERITY}" for kind in COMMON_CORRUPTIONS))
STOP, ORIGINAL = "-stop", "-original"
ORIGINALS = tuple(row.kind + ORIGINAL for row in UNSEEN if row.kind not in ("patch", "gma"))
STOPPING = tuple(row.kind + STOP for row in UNSEEN if issubclass(Attack.of_kind(row.kind), LastIterate))


class Batch(NamedTuple):
    """Result of one case on one batch: the adversarial images, and which examples stay correct."""

    images: Tensor
    robust: Tensor


Attacked = Callable[[Tensor, Tensor], Batch]


def problem(name: str, options: Any, device: torch.device) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a model, and images that it classifies correctly with their labels."""
    model = load_model(name).to(device).eval() if options.run else common.make_model(name, device, options.seed)
    real = options.data is not None and name not in common.TIMM
    x, y = common.images(8 * options.n if real else options.n, options.data, device, options.seed)
    with torch.no_grad():
        answer = model(x).argmax(dim=1)
    right = (answer == y).nonzero().flatten()[: options.n] if real else torch.arange(options.n, device=device)
    assert len(right) == options.n, f"{name} classifies only {len(right)} of {len(x)} images correctly"
    return model, x[right], answer[right]


def features(options: Any, device: torch.device) -> Perceptual:
    """Return the threat of PPGD and LPA."""
    threat = Perceptual(bound=UnseenSuite().bound, features=options.features or "random")
    if options.features:
        return threat
    torch.manual_seed(options.seed)
    return threat.measured_by(create_model("alexnet_cifar", num_classes=10).to(device).eval())


def planned(options: Any) -> dict[str, Case]:
    """Return the cases of both suites, with two steps for ``--quick``."""
    suites = (UnseenSuite(), CorruptionsSuite(severities=(SEVERITY,)))
    threats = {threat.name: threat for threat in CIFAR10}
    cases = [case for suite in suites for case in suite.cases(threats, 10)]
    for case in UnseenSuite(stop=True).cases(threats, 10):
        if case.name + STOP in STOPPING:
            cases.append(case.model_copy(update={"name": case.name + STOP}))
    found = {}
    for case in cases:
        (attack,) = case.attacks
        if options.quick and not case.on_all:
            attack = attack.model_copy(update={"steps": 2})
        found[case.name] = case.model_copy(update={"attacks": (attack,)})
    return found


def attacks(model: nn.Module, options: Any, device: torch.device) -> dict[str, Attacked]:
    """Return the cases of ``--cases`` whose packages are installed."""
    perceptual, cases, found = loaded(features(options, device), device), planned(options), {}
    network = perceptual.network
    assert network is not None

    def ours(case: Case, x: Tensor, y: Tensor) -> Batch:
        threat = perceptual if isinstance(case.threat, Perceptual) else case.threat
        result = case.attacks[0].run(model, x, y, threat)
        return Batch(result.adversarial, result.robust)

    def theirs(reference: Any, x: Tensor, y: Tensor) -> Batch:
        images = reference(x, y)
        with torch.no_grad():
            return Batch(images, model(images).argmax(dim=1) == y)

    for name in options.cases:
        if name in cases:
            found[name] = partial(ours, cases[name])
        elif (
            reference := published(model, cases[name.removesuffix(ORIGINAL)].attacks[0], network, perceptual.bound)
        ) is not None:
            found[name] = partial(theirs, reference)
    return found


def passes(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Seconds per image of a bare forward, and of a forward with the gradient to the input."""

    def forward() -> None:
        with torch.no_grad():
            model(x)

    with frozen(model):
        one, both = (
            min(timed(x.device, work)[0] for _ in range(2)) / len(x)
            for work in (forward, partial(common.input_gradient, model, x, y))
        )
    return one, both


def timed(device: torch.device, work: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds that ``work`` takes (on a CPU, CPU time of the process) and its result."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    common.synchronize(device)
    started = clock()
    found = work()
    common.synchronize(device)
    return clock() - started, found


def measure(model: nn.Module, x: Tensor, y: Tensor, size: int, attack: Attacked) -> dict[str, Any]:
    """Measure one case on all images."""
    made = {"forwards": 0, "backwards": 0}

    def count(module: nn.Module, args: tuple[Tensor, ...], logits: Tensor) -> None:
        made["forwards"] += len(args[0])
        if logits.requires_grad:
            logits.register_hook(lambda gradient: made.update(backwards=made["backwards"] + len(gradient)))

    attack(x[:1], y[:1])  # allocates, chooses kernels
    before = passes(model, x[:size], y[:size])
    handle = model.register_forward_hook(count)
    parts = [timed(x.device, partial(attack, *part)) for part in zip(x.split(size), y.split(size), strict=True)]
    handle.remove()
    after = passes(model, x[:size], y[:size])
    forward, both = ((a + b) / 2 for a, b in zip(before, after, strict=True))
    seconds = sum(part[0] for part in parts) / len(x)
    forwards, backwards = (number / len(x) for number in made.values())
    robust = torch.cat([part[1].robust for part in parts])
    changed = changed_pixels(torch.cat([part[1].images for part in parts]), x)[~robust]
    return {
        "seconds": seconds,
        "bare": {"forward": forward, "with gradient": both},
        "times_bare": seconds / both,
        "passes": (forwards, backwards),
        "over_passes": seconds / (forwards * forward + backwards * (both - forward)),
        "minutes_1000": 1000 * seconds / 60,
        "robust": robust.double().mean().item(),
        "verdicts": robust.tolist(),
        "pixels": changed.double().median().item() if len(changed) else None,
    }


def shown(row: dict[str, Any]) -> dict[str, str]:
    """Format a row of the printed table."""
    return {
        "model": row["model"],
        "case": row["case"],
        "images": str(row["images"]),
        "ms/image": f"{1000 * row['seconds']:.4g}",
        "images/s": f"{1 / row['seconds']:.3g}",
        "x bare": f"{row['times_bare']:.1f}",
        "passes": "{:.4g} + {:.4g}".format(*row["passes"]),
        "x passes": f"{row['over_passes']:.2f}",
        "minutes": f"{row['minutes_1000']:.2g}",
        "robust %": f"{100 * row['robust']:.0f}",
    }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = common.arguments(__doc__, models=["resnet18", "vit-ti"], batch=[32], repeats=1)
    parser.add_argument("--data", metavar="PATH", help="folder of CIFAR-10; random images by default")
    parser.add_argument("--n", type=int, default=32, help="total number of images")
    parser.add_argument("--run", metavar="PATH", help="attack the model of this run instead of --models")
    known = (*NAMES, *STOPPING, *ORIGINALS)
    parser.add_argument("--cases", nargs="+", choices=known, default=[*NAMES, "sparsefool-original"], metavar="CASE")
    parser.add_argument("--features", metavar="PATH", help="run or file of the network of PPGD's and LPA's distance")
    options = parser.parse_args(argv)
    if options.quick:
        options.models, options.batch, options.n = ["vit-micro"], [4], 4
    if options.run:
        options.models = [options.run]
    device = common.start(options)
    report = common.Report(options, device, argv)
    report.note(f"PPGD and LPA measure with {options.features or 'an AlexNet of random weights'}")
    ran: set[str] = set()
    for name in options.models:
        model, x, y = problem(name, options, device)
        for size in options.batch:
            data = []
            for case, attack in attacks(model, options, device).items():
                ran.add(case)
                data.append(
                    {"model": name, "images": options.n, "batch": size, "case": case}
                    | measure(model, x, y, size, attack)
                )
            report.table(f"Unseen threats, batch {size}", [shown(row) for row in data], data)
            summary(report, name, data)
    if missing := sorted(set(options.cases) & set(ORIGINALS) - ran):
        report.note(f"{', '.join(missing)} skipped: the package is not installed")
    return report.finish()


def summary(report: common.Report, model: str, rows: list[dict[str, Any]]) -> None:
    """Print what follows from the rows of one model: time of the whole suite, and ratios to the originals."""
    found = {row["case"]: row for row in rows}
    unseen = [row for name, row in found.items() if name in [row.kind for row in UNSEEN]]
    made = [row for name, row in found.items() if name.endswith(f"-{SEVERITY}")]
    for title, part, factor in (("attacks", unseen, 1), ("types of corruption at five severities", made, 5)):
        if part:
            minutes = factor * sum(row["minutes_1000"] for row in part)
            report.note(f"{model}: {len(part)} {title} take {minutes:.3g} minutes for 1,000 images")
    for name, theirs in found.items():
        ours = found.get(name.removesuffix(ORIGINAL))
        if name.endswith(ORIGINAL) and ours is not None:
            same = sum(a == b for a, b in zip(ours["verdicts"], theirs["verdicts"], strict=True))
            report.note(
                f"{model}: {ours['case']} takes 1/{theirs['seconds'] / ours['seconds']:.2f} of the original's time, "
                f"with the same verdict on {same} of {ours['images']} images"
            )


if __name__ == "__main__":
    main()
