"""Cost of experts: RoME beside the plain model and beside a literal loop over the experts.

    python benchmarks/experts.py                                    # ViT-B, -S, -Ti at 32 px, patch 4, fp32
    python benchmarks/experts.py --precision bf16 --compile         # also on a GPU: --device cuda --batch 64
    python benchmarks/experts.py --models vit-b --repeats 15 --json experts.json
    python benchmarks/experts.py --models resnet18 --batch 16       # convolutions

Times forward, input gradient (an attack step), training step (forward and backward to all parameters, no optimizer)
and latency (forward of one image) of the plain model, of RoME (rome.add_experts: K=4, r=16, QKV and output), of RoME
with L_div in the training step, and of a loop that follows Eq. 2-5 literally, with separate A_k and B_k and both gates
computed separately. Before timing, loop and RoME get the same random weights and must agree to 1e-5.

How to read it: ``x plain`` is the median over rounds of the time divided by the plain model's in the same round, with
the smallest and largest in brackets; cases take turns within a round. ``arithmetic`` is the same ratio in counted
multiply-adds, the limit for a machine without overhead; times below it are noise. Goal: at most 1.06 on ViT-B (the
paper: 1.17 in training, 1.13 in latency).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common
from flops import count_flops
from rome.experts import Diversification, MixtureConv2d, MixtureLinear, add_experts, expert_layers, record_gates


class LoopLinear(nn.Module):
    """Eq. 2-5 as written: o_i = W h_i + sum_k g_ik B_k A_k h_i, one expert after another."""

    def __init__(self, mixture: MixtureLinear) -> None:
        super().__init__()
        self.base = nn.Linear(mixture.in_features, mixture.out_features, bias=mixture.bias is not None)
        self.base.weight, self.base.bias = mixture.weight, mixture.bias
        self.A = nn.ParameterList(a.clone() for a in mixture.A.detach().chunk(mixture.experts))
        self.B = nn.ParameterList(b.clone() for b in mixture.B.detach().chunk(mixture.experts, dim=1))
        self.local, self.whole = copy.deepcopy(mixture.gate.local), copy.deepcopy(mixture.gate.global_)
        self.beta = mixture.gate.beta

    def forward(self, h: Tensor) -> Tensor:
        u = self.local(h).softmax(dim=-1)
        v = self.whole(h.mean(dim=1)).softmax(dim=-1)
        g = (1 - self.beta) * u + self.beta * v.unsqueeze(1)
        out = self.base(h)
        for k, (a, b) in enumerate(zip(self.A, self.B, strict=True)):
            out = out + g[..., k : k + 1] * F.linear(F.linear(h, a), b)
        return out


class LoopConv2d(nn.Module):
    """The same for a convolution: W * x + sum_k g_k (dW_k * x) with loralib's kernels dW_k = B_k A_k, one by one."""

    def __init__(self, mixture: MixtureConv2d) -> None:
        super().__init__()
        self.weight, self.stride, self.padding = mixture.weight, mixture.stride, mixture.padding
        self.A = nn.ParameterList(a.clone() for a in mixture.A.detach().chunk(mixture.experts))
        self.B = nn.ParameterList(b.clone() for b in mixture.B.detach().chunk(mixture.experts, dim=1))
        self.local, self.whole = copy.deepcopy(mixture.gate.local), copy.deepcopy(mixture.gate.global_)
        self.beta = mixture.gate.beta

    def forward(self, x: Tensor) -> Tensor:
        out = F.conv2d(x, self.weight, None, self.stride, self.padding)
        h = F.adaptive_avg_pool2d(x, (out.shape[2], out.shape[3])).flatten(2).transpose(1, 2)
        u = self.local(h).softmax(dim=-1)
        v = self.whole(h.mean(dim=1)).softmax(dim=-1)
        g = ((1 - self.beta) * u + self.beta * v.unsqueeze(1)).transpose(1, 2).unflatten(2, out.shape[2:])
        for k, (a, b) in enumerate(zip(self.A, self.B, strict=True)):
            kernel = (b @ a).view(self.weight.shape)
            out = out + g[:, k : k + 1] * F.conv2d(x, kernel, None, self.stride, self.padding)
        return out


def looped(model: nn.Module) -> nn.Module:
    """Return a copy of a model with experts in which a loop replaces every mixture."""
    twin = copy.deepcopy(model)
    for name, layer in expert_layers(twin).items():
        parent, _, leaf = name.rpartition(".")
        loop = LoopLinear(layer) if isinstance(layer, MixtureLinear) else LoopConv2d(layer)
        setattr(twin.get_submodule(parent), leaf, loop.to(layer.weight.device))
    return twin


def variants(name: str, device: torch.device, seed: int) -> dict[str, nn.Module]:
    """Return plain model, RoME and loop with the same weights; B is random, so that the experts contribute."""
    plain = common.make_model(name, device, seed)
    rome = add_experts(copy.deepcopy(plain))
    for layer in expert_layers(rome).values():
        nn.init.normal_(layer.B, std=0.02)
    return {"plain": plain, "rome": rome, "loop": looped(rome)}


def disagreement(one: nn.Module, other: nn.Module, x: Tensor) -> float:
    """Largest difference in logits and in input gradients, each relative to the largest entry."""
    y = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    with common.frozen_parameters(one), common.frozen_parameters(other):
        a, b = one(x), other(x)
        worst = (a - b).abs().max() / a.abs().max()
        a, b = (common.input_gradient(model, x, y) for model in (one, other))
    return max(worst.item(), ((a - b).abs().max() / a.abs().max()).item())


def forward(model: nn.Module, context: Callable[[], Any], x: Tensor) -> None:
    with torch.no_grad(), context():
        model(x)


def gradient(model: nn.Module, context: Callable[[], Any], x: Tensor, y: Tensor) -> None:
    with context():
        common.input_gradient(model, x, y)


def training(model: nn.Module, context: Callable[[], Any], x: Tensor, y: Tensor, labels: Tensor | None = None) -> None:
    """Run forward and backward; with threat labels, also record gates and add L_div."""
    model.zero_grad(set_to_none=True)
    with context():
        with record_gates(model) if labels is not None else nullcontext() as recorder:
            loss = F.cross_entropy(model(x).float(), y)
        if labels is not None:
            loss = loss + 0.1 * Diversification().loss(recorder.complete(), labels, 3)
    loss.backward()


def measure(name: str, batch: int, options: Any, device: torch.device) -> list[dict[str, Any]]:
    """Measure all times of one model."""
    models = variants(name, device, options.seed)
    x, y = common.images(batch, None, device, options.seed)
    common.cast(device, "fp32")
    apart = disagreement(models["rome"], models["loop"], x[:4])
    if apart > 1e-5:
        raise AssertionError(f"{name}: RoME and the loop differ by {apart:.1e}; they must agree before they are timed")
    flops = {key: count_flops(model) for key, model in models.items()}
    if options.compile:
        common.compile_models(*models.values())
    context = partial(common.cast, device, options.precision)
    labels = torch.arange(batch) % 3

    def timed(cases: dict[str, Callable[[], object]], **settings: Any) -> dict[str, list[float]]:
        return common.interleave(cases, device, rounds=options.repeats, warmup=3, **settings)

    found: dict[str, dict[str, list[float]]] = {}
    for model in models.values():
        model.eval().requires_grad_(False)
    found["forward"] = timed({key: partial(forward, model, context, x) for key, model in models.items()})
    found["latency"] = timed(
        {key: partial(forward, model, context, x[:1]) for key, model in models.items()}, every_call=True
    )
    found["input gradient"] = timed({key: partial(gradient, model, context, x, y) for key, model in models.items()})
    for model in models.values():
        model.train().requires_grad_(True)
    cases = {key: partial(training, model, context, x, y) for key, model in models.items()}
    cases["rome + L_div"] = partial(training, models["rome"], context, x, y, labels)
    found["training step"] = timed(cases)

    places = {"forward": "forward", "latency": "forward", "input gradient": "gradient", "training step": "training"}
    rows = []
    for what, times in found.items():
        for case, seconds in times.items():
            own, base = (getattr(flops[key.removesuffix(" + L_div")], places[what]) for key in (case, "plain"))
            rows.append(
                {
                    "model": name,
                    "batch": 1 if what == "latency" else batch,
                    "what": what,
                    "case": case,
                    "seconds": seconds,
                    "ratio": common.ratio(seconds, times["plain"]),
                    "arithmetic": own / base,
                    "gmacs_per_image": own / 2e9,
                    "disagreement": apart,
                }
            )
    return rows


def shown(row: dict[str, Any]) -> dict[str, str]:
    """Format a row of the printed table."""
    return {
        "model": row["model"],
        "batch": str(row["batch"]),
        "what": row["what"],
        "case": row["case"],
        "ms": common.milliseconds(row["seconds"]),
        "x plain": str(row["ratio"]),
        "arithmetic": f"{row['arithmetic']:.3f}",
        "GMAC/image": f"{row['gmacs_per_image']:.3g}",
    }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = common.arguments(__doc__, models=["vit-b", "vit-s", "vit-ti"], batch=[8], repeats=9)
    parser.add_argument("--precision", choices=("fp32", "tf32", "bf16"), default="fp32")
    parser.add_argument("--compile", action="store_true", help="torch.compile all variants")
    options = parser.parse_args(argv)
    if options.quick:
        options.models, options.batch, options.repeats = ["vit-micro"], [2], 2
    device = common.start(options)
    report = common.Report(options, device, argv)
    title = f"Experts, {options.precision}, {'compiled' if options.compile else 'eager'}"
    for name, _, data in report.measured(measure, shown, title):
        report.note(f"{name}: RoME and the loop agree to {data[0]['disagreement']:.1e} of the largest value")
    return report.finish()


if __name__ == "__main__":
    main()
