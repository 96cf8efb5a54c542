"""Overhead of attacks over their model: our PGD and APGD, and other libraries', against the bare limit at equal steps.

    python benchmarks/attacks.py --data PATH       # ResNet-18 and ViT-Ti, 10 steps
    python benchmarks/attacks.py --models resnet18 --batch 128 --steps 20 --json attacks.json

The bare limit is steps x (forward + input gradient) of the same model on the same images with frozen parameters,
without any update or projection. ResNet-18 is pyautoattack's, trained on CIFAR-10; ViT-Ti has random weights unless
``--weights`` names a file saved by rome. All attacked images are classified correctly: they are CIFAR-10's from
``--data`` for ResNet-18 or with ``--weights``, otherwise any images, labelled with the model's own predictions. Radii
are CIFAR-10's times ``--scale`` (default 1/8), because a model without robust training loses every image at full
radius.

How to read it: ``x limit`` is the median over rounds of the time divided by the limit's in the same round, with the
smallest and largest in brackets; cases take turns within a round. APGD needs one forward more than it has steps
(pyautoattack's needs two more forwards and one more backward): ``passes`` counts forwards and backwards in full
batches, and ``x passes`` divides by the time of exactly those passes, so it shows the overhead alone. ``robust %`` is
the accuracy left on the returned images; lower is a stronger attack. ``size`` is the largest perturbation in units of
the radius; above 1.00 the images are outside the ball and the accuracy does not count. foolbox (optional) uses our
step sizes; frozen parameters spare it the parameter gradients that it would otherwise compute. Goal: our attacks at
most 1.05 x limit in every norm (APGD: x passes).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

import common
from rome.attacks import APGD, PGD
from rome.core.randomness import stream
from rome.models import load_weights
from rome.threats import CIFAR10, LpBall

try:
    import foolbox
except ImportError:
    foolbox = None
try:
    import pyautoattack.autopgd_base as reference
except ImportError:
    reference = None

Images = Callable[[], Tensor]


class Counter(nn.Module):
    """A model that counts the images passed forwards and backwards through it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.forwards, self.backwards = model, 0, 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += len(x)
        logits: Tensor = self.model(x)
        if logits.requires_grad:
            logits.register_hook(self._seen)
        return logits

    def _seen(self, gradient: Tensor) -> None:
        self.backwards += len(gradient)


def problem(name: str, batch: int, options: Any, device: torch.device) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a frozen model, and images that it classifies correctly with their labels."""
    model = common.make_model(name, device, options.seed)
    if options.weights and name != "resnet18":
        load_weights(model, options.weights)
    model.requires_grad_(False)
    real = options.data is not None
    x, y = common.images(4 * batch if real else batch, options.data, device, options.seed)
    with torch.no_grad():
        answer = model(x).argmax(dim=1)
    if real and (name == "resnet18" or options.weights):
        right = (answer == y).nonzero().flatten()[:batch]
        assert len(right) == batch, f"{name} classifies only {len(right)} of {len(x)} images correctly"
        return model, x[right], y[right]
    return model, x[:batch], answer[:batch]


def attacks(model: nn.Module, x: Tensor, y: Tensor, threat: LpBall, steps: int, seed: int) -> dict[str, Images]:
    """Return every attack as a function without arguments that returns images."""
    pgd, apgd = PGD(steps=steps), APGD(steps=steps)
    start = stream(seed, "attack", device=x.device)  # on the device, as in training
    cases: dict[str, Images] = {
        "rome PGD": lambda: pgd(model, x, y, threat, generator=start),
        "rome APGD": lambda: apgd.run(model, x, y, threat).adversarial,
    }
    if reference is not None:
        cases["pyautoattack APGD"] = partial(_reference_apgd, reference, model, x, y, threat, steps, seed)
    if foolbox is not None:
        cases["foolbox PGD"] = _foolbox_pgd(foolbox, model, x, y, threat, steps, pgd.step_size_for(threat))
    return cases


def _reference_apgd(
    package: ModuleType, model: nn.Module, x: Tensor, y: Tensor, threat: LpBall, steps: int, seed: int
) -> Tensor:
    attack = package.APGDAttack(
        model, n_iter=steps, norm=threat.norm, eps=threat.eps, n_restarts=1, seed=seed, device=x.device
    )
    adversarial: Tensor = attack.perturb(x, y)
    return adversarial


def _foolbox_pgd(
    package: ModuleType, model: nn.Module, x: Tensor, y: Tensor, threat: LpBall, steps: int, size: float
) -> Images:
    kinds = {"L1": "SparseL1DescentAttack", "L2": "L2PGD", "Linf": "LinfPGD"}
    attack = getattr(package.attacks, kinds[threat.norm])(abs_stepsize=size, steps=steps, random_start=True)
    wrapped = package.PyTorchModel(model, bounds=(0, 1), device=x.device)
    criterion = package.criteria.Misclassification(y)
    return lambda: attack.run(wrapped, x, criterion, epsilon=threat.eps)


def measure(name: str, batch: int, options: Any, device: torch.device) -> list[dict[str, Any]]:
    """Measure cost and strength of every attack under every norm."""
    model, x, y = problem(name, batch, options, device)
    steps = options.steps
    if options.compile:
        common.compile_models(model)

    def forwards(n: int) -> None:
        with torch.no_grad():
            for _ in range(n):
                model(x)

    def limit() -> None:
        for _ in range(steps):
            common.input_gradient(model, x, y)

    rows = []
    for ball in CIFAR10:
        threat = LpBall(norm=ball.norm, eps=ball.eps * options.scale)
        found = attacks(model, x, y, threat, steps, options.seed)
        cases: dict[str, Callable[[], object]] = {"limit": limit, "forwards": partial(forwards, steps)}
        with common.cast(device, options.precision):
            times = common.interleave(cases | found, device, rounds=options.repeats)
        forward = [seconds / steps for seconds in times["forwards"]]
        backward = [both / steps - one for both, one in zip(times["limit"], forward, strict=True)]
        counted = strengths(model, x, y, threat, steps, options.seed)
        for case in ["limit", *found]:
            passes, robust, size = counted.get(case, ((float(steps), float(steps)), None, None))
            own = [passes[0] * f + passes[1] * b for f, b in zip(forward, backward, strict=True)]
            rows.append(
                {
                    "model": name,
                    "batch": batch,
                    "norm": threat.norm,
                    "eps": threat.eps,
                    "steps": steps,
                    "case": case,
                    "seconds": times[case],
                    "ratio": common.ratio(times[case], times["limit"]),
                    "passes": passes,
                    "over_passes": common.ratio(times[case], own),
                    "robust": robust,
                    "size": size,
                }
            )
    return rows


def strengths(
    model: nn.Module, x: Tensor, y: Tensor, threat: LpBall, steps: int, seed: int
) -> dict[str, tuple[tuple[float, float], float, float]]:
    """Return per attack (forwards, backwards) in full batches, robust accuracy in percent, largest relative size."""
    measured = {}
    counter = Counter(model).eval()
    for case, attack in attacks(counter, x, y, threat, steps, seed).items():
        counter.forwards = counter.backwards = 0
        adversarial = attack().detach()
        passes = (counter.forwards / len(x), counter.backwards / len(x))
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):  # verdicts are always in fp32
            robust = 100 * (model(adversarial).argmax(dim=1) == y).double().mean().item()
        measured[case] = (passes, robust, threat.size(adversarial, x).max().item() / threat.eps)
    return measured


def shown(row: dict[str, Any]) -> dict[str, str]:
    """Format a row of the printed table."""
    return {
        "model": row["model"],
        "batch": str(row["batch"]),
        "norm": row["norm"],
        "case": row["case"],
        "ms": common.milliseconds(row["seconds"]),
        "x limit": str(row["ratio"]),
        "passes": "{:.3g} + {:.3g}".format(*row["passes"]),
        "x passes": str(row["over_passes"]),
        "robust %": "" if row["robust"] is None else f"{row['robust']:.1f}",
        "size": "" if row["size"] is None else f"{row['size']:.2f}",
    }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = common.arguments(__doc__, models=["resnet18", "vit-ti"], batch=[64], repeats=5)
    parser.add_argument("--data", metavar="PATH", help="folder of CIFAR-10; random images by default")
    parser.add_argument("--weights", metavar="FILE", help="safetensors file with weights for the ViT")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--scale", type=float, default=0.125, help="factor on CIFAR-10's radii 12, 0.5, 8/255")
    parser.add_argument("--precision", choices=("fp32", "tf32", "bf16"), default="fp32")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    options = parser.parse_args(argv)
    if options.quick:
        options.models, options.batch, options.repeats, options.steps = ["vit-micro"], [4], 2, 3
    device = common.start(options)
    report = common.Report(options, device, argv)
    title = f"Attacks, {options.steps} steps, radii x {options.scale:g}, {options.precision}"
    title += ", compiled" if options.compile else ""
    for name, batch, data in report.measured(measure, shown, title):
        worst = max(row["over_passes"].median for row in data if str(row["case"]).startswith("rome"))
        report.note(f"{name}, batch {batch}: our most expensive attack takes {worst:.3f} x its passes")
    return report.finish()


if __name__ == "__main__":
    main()
