"""Gain of L1-APGD on linear models relative to the known optimum: our search and the published one.

    python benchmarks/apgd_l1.py --threads 1       # 200 models of 64 inputs and 50 of 3,072; takes minutes

The logits are (0, <w, x>), with a different Gaussian w for each image. The optimum spends the radius on the largest
weights, each as far as the box allows. Pixels are ``inside`` (0.35 to 0.65), ``uniform``, ``third`` (a third of them
exactly 0 or 1) or ``saturated`` (all of them 0 or 1). ``mean`` and ``least`` are the mean and minimum over images of
the attack's gain divided by the optimum's; 1 is optimal. pyautoattack's search starts at a random point, with a fifth
of the coordinates, in a single run at the full radius; ``at the image`` is the variant used in training
(github.com/fra31/robust-finetuning), which starts at the image and with as many coordinates as ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import pyautoattack.autopgd_base as reference
import torch
from torch import Tensor, nn

import common
from rome.attacks import APGD
from rome.threats import LpBall


class Linears(nn.Module):
    """A different linear model for each image."""

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.w = w

    def forward(self, x: Tensor) -> Tensor:
        score = (x.flatten(1) * self.w).sum(1)
        return torch.stack([torch.zeros_like(score), score], dim=1)


def problem(pixels: str, n: int, d: int) -> tuple[Tensor, Tensor]:
    """Return weights (n, d) and images (n, 1, 8, d/8) in float64."""
    g = torch.Generator().manual_seed(0)
    w = torch.randn(n, d, generator=g, dtype=torch.float64)
    u = torch.rand(n, 1, 8, d // 8, generator=g, dtype=torch.float64)
    kinds = {"inside": 0.35 + 0.3 * u, "uniform": u, "third": (1.5 * u - 0.25).clamp(0, 1), "saturated": u.round()}
    return w / w.norm(dim=1, keepdim=True), kinds[pixels].float().double()


def optimum(w: Tensor, x: Tensor, eps: float) -> Tensor:
    room = torch.where(w > 0, 1 - x.flatten(1), x.flatten(1))
    order = w.abs().argsort(dim=1, descending=True)
    room = room.gather(1, order)
    return ((eps - room.cumsum(1) + room).clamp(min=0).minimum(room) * w.abs().gather(1, order)).sum(1)


def published(w: Tensor, x: Tensor, eps: float, steps: int, *, at_image: bool) -> Tensor:
    attack = reference.APGDAttack(Linears(w), n_iter=steps, norm="L1", eps=eps, device="cpu")
    attack.init_hyperparam(x)
    y, d = torch.zeros(len(x), dtype=torch.int64), x[0].numel()
    if not at_image:
        return attack.attack_single_run(x.clone(), y)[0].detach()
    first = [torch.full((len(x),), max(0.05 * d, 12) * 1.5), torch.full((len(x),), float(d))]  # its first two calls
    count = reference.L0_norm
    with patch.object(reference, "L0_norm", lambda z: first.pop(0) if first else count(z)):
        return attack.attack_single_run(x.clone(), y, x_init=x.clone())[0].detach()


def measure(pixels: str, n: int, d: int, eps: float, steps: int) -> list[dict[str, Any]]:
    w, x = problem(pixels, n, d)
    y, threat = torch.zeros(n, dtype=torch.int64), LpBall(norm="L1", eps=eps)
    adversarial = {
        "rome": APGD(steps=steps)(Linears(w.float()), x.float(), y, threat),
        "rome, float64": APGD(steps=steps)(Linears(w), x, y, threat),
        "rome, a fifth": APGD(steps=steps, l1_share=0.2)(Linears(w.float()), x.float(), y, threat),
        "published": published(w.float(), x.float(), eps, steps, at_image=False),
        "published, at the image": published(w.float(), x.float(), eps, steps, at_image=True),
    }
    rows = []
    for case, images in adversarial.items():
        share = ((images.double() - x).flatten(1) * w).sum(1) / optimum(w, x, eps)
        setting = {"pixels": pixels, "d": d, "eps": eps, "steps": steps, "case": case}
        rows.append(setting | {"mean": share.mean().item(), "least": share.min().item()})
    return rows


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = common.arguments(__doc__, models=[], batch=[200], repeats=1)
    parser.add_argument("--steps", nargs="+", type=int, default=[20, 100])
    options = parser.parse_args(argv)
    if options.quick:
        options.batch, options.steps = [4], [2]
    report = common.Report(options, common.start(options), argv)
    for d, radii in ((64, (0.3, 4.0)), (3072, (1.0, 12.0))):
        for steps in options.steps if d == 64 else options.steps[:1]:
            for eps in radii:
                rows: list[dict[str, Any]] = []
                for pixels in ("inside", "uniform", "third", "saturated"):
                    rows += measure(pixels, max(options.batch[0] * 64 // d, options.batch[0] // 4), d, eps, steps)
                cells = {(row["case"], row["pixels"]): f"{row['mean']:.3f} ({row['least']:.2f})" for row in rows}
                kinds = dict.fromkeys(row["pixels"] for row in rows)
                shown = [
                    {"case": case} | {kind: cells[case, kind] for kind in kinds}
                    for case in dict.fromkeys(row["case"] for row in rows)
                ]
                report.table(f"{d} inputs, radius {eps}, {steps} steps: mean (least)", shown, rows)
    return report.finish()


if __name__ == "__main__":
    main()
