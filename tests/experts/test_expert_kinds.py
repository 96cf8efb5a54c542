"""Experts beside convolutions, in windows, as adapters, as feed-forward networks: literal formulas, starts, counts."""

from __future__ import annotations

import copy
import math
import os
import signal
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from helpers.problems import rest_slow
from helpers.small_models import (
    assert_computes_the_same,
    gates_at,
    grow,
    images,
    normal,
    plain_swin,
    small_cnn,
    timm_model,
)
from helpers.tiny_runs import same, tiny, watched, weights, without_times
from rome.attacks import APGD, PGD
from rome.attacks.engine import frozen, loss_and_gradient
from rome.core.errors import Interrupted, UserError
from rome.evaluation.evaluate import hash_model
from rome.experts import (
    AdapterLinear,
    Adapters,
    Experts,
    FeedForward,
    Global,
    Local,
    LowRank,
    MixtureConv2d,
    MixtureFFN,
    Uniform,
    add_experts,
    expert_layers,
    record_gates,
)
from rome.models import (
    build_model,
    create_model,
    load_experts,
    load_model,
    read_tensors,
    save_experts,
    save_model,
)
from rome.runs.folder import Run
from rome.threats import LpBall, PerExample
from rome.training.setup import train

# Convolutions


def conv_layer(base: nn.Conv2d, **settings: Any) -> MixtureConv2d:
    """Experts beside a convolution, float64, B not 0."""
    torch.manual_seed(0)
    settings = {"layers": "conv", "experts": 3, "rank": 2} | settings
    layer = grow(LowRank(**settings).inject(nn.ModuleDict({"conv": base})).double())["conv"]
    assert isinstance(layer, MixtureConv2d)
    return layer


def dense_kernels(layer: MixtureConv2d) -> list[Tensor]:
    """dW_k (C_out, C_in, c, c) as the official implementation makes them: (B_k A_k).view(...), or PEFT's product."""
    c, r = layer.kernel_size[0], layer.rank
    kernels = []
    for k in range(layer.experts):
        if layer.form == "loralib":
            columns = slice(k * r * c, (k + 1) * r * c)
            kernels.append((layer.B[:, columns] @ layer.A[columns]).view(layer.weight.shape))
        else:
            rows = slice(k * r, (k + 1) * r)
            kernels.append(torch.einsum("or,rixy->oixy", layer.B[:, rows], layer.A[rows]))
    return kernels


def pooled(x: Tensor, height: int, width: int) -> Tensor:
    """Adaptive average pooling: output i is the mean over inputs floor(i H/H') to ceil((i+1) H/H')."""

    def cells(size: int, count: int) -> list[slice]:
        return [slice(i * size // count, math.ceil((i + 1) * size / count)) for i in range(count)]

    rows, columns = cells(x.shape[2], height), cells(x.shape[3], width)
    return torch.stack([torch.stack([x[:, :, i, j].mean((2, 3)) for j in columns], -1) for i in rows], -2)


def dense_conv(layer: MixtureConv2d, x: Tensor) -> Tensor:
    """W * x + sum_k g_k(s) (dW_k * x)(s) with K dense kernels."""

    def convolved(weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.conv2d(x, weight, bias, layer.stride, layer.padding, layer.dilation)

    out = convolved(layer.weight, layer.bias)
    where = pooled(x, *out.shape[2:]).flatten(2).transpose(1, 2)
    g = gates_at(layer, where).transpose(1, 2).unflatten(2, out.shape[2:])  # (B, K, H', W')
    for k, kernel in enumerate(dense_kernels(layer)):
        out = out + g[:, k : k + 1] * convolved(kernel)
    return out


CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "c divides C_in": {"in_channels": 6, "padding": 1},
    "c does not": {"in_channels": 4, "padding": 1},
    "fewer channels than c": {"in_channels": 2, "padding": 1},
    "1x1": {"in_channels": 4, "kernel_size": 1},
    "1x1, stride 2, padding 1": {"in_channels": 4, "kernel_size": 1, "stride": 2, "padding": 1},
    "5x5, padding 2": {"in_channels": 7, "kernel_size": 5, "padding": 2},
    "5x5, c divides C_in": {"in_channels": 10, "kernel_size": 5, "padding": 1},
    "no padding, bias": {"in_channels": 5, "bias": True},
    "padding 2: a larger output": {"in_channels": 3, "padding": 2, "bias": True},
    "stride 2": {"in_channels": 4, "stride": 2, "padding": 1},
    "stride 3": {"in_channels": 6, "stride": 3, "padding": 1, "bias": True},
    "stride by axis": {"in_channels": 5, "stride": (1, 2), "padding": (0, 1)},
    "dilation": {"in_channels": 4, "dilation": 2, "padding": 2},
    "dilation, stride, no padding": {"in_channels": 6, "dilation": 2, "stride": 2},
}


@pytest.mark.parametrize(("form", "dense"), [("loralib", False), ("loralib", True), ("peft", False)])
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_a_convolution_equals_its_experts_as_dense_kernels(
    case: str, form: Any, dense: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"out_channels": 4, "kernel_size": 3, "bias": False} | CONVOLUTIONS[case]
    layer = conv_layer(nn.Conv2d(**settings), conv=form)
    monkeypatch.setattr(type(layer), "dense", dense)
    x = normal(2, settings["in_channels"], 7, 8).requires_grad_()
    values = [p for name, p in layer.named_parameters() if p.requires_grad]
    found, expected = layer(x), dense_conv(layer, x)
    torch.testing.assert_close(found, expected)
    weight = normal(*found.shape, seed=1)
    for one, other in zip(
        torch.autograd.grad((found * weight).sum(), [x, *values]),
        torch.autograd.grad((expected * weight).sum(), [x, *values]),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("channels", "dense"), [((16, 160), True), ((64, 64), True), ((128, 128), False)])
def test_kernels_are_built_where_that_takes_fewer_products(
    channels: tuple[int, int], dense: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = conv_layer(nn.Conv2d(*channels, 3, padding=1), experts=4, rank=16).to("meta")
    x = torch.empty(1, channels[0], 128, 128, device="meta", dtype=torch.float64)  # so large that building is nothing
    assert layer.dense == dense
    products = []
    for way in (dense, not dense):
        monkeypatch.setattr(type(layer), "dense", way)
        with FlopCounterMode(display=False) as counter:
            layer(x)
        products.append(counter.get_total_flops())
    assert products[0] < products[1]


@pytest.mark.parametrize(("alpha", "scale"), [(None, 1.0), (1, 1 / 3), (6, 2.0)])
def test_one_expert_is_the_official_lora_layer(alpha: float | None, scale: float) -> None:
    """Its gate is 1, so W + (B A).view(W.shape) * alpha / r is left, as loralib merges it; without alpha at scale 1."""
    layer = conv_layer(nn.Conv2d(4, 5, 3, stride=2, padding=1), experts=1, rank=3, alpha=alpha)
    assert layer.A.shape == (3 * 3, 4 * 3)  # lora_A (r k, C_in k)
    assert layer.B.shape == (5 * 3, 3 * 3)  # lora_B (C_out k, r k)
    x = normal(2, 4, 8, 8)
    merged = layer.weight + (layer.B @ layer.A).view(layer.weight.shape) * scale
    with record_gates(layer) as recorder:
        torch.testing.assert_close(layer(x), F.conv2d(x, merged, layer.bias, 2, 1))
    assert bool((recorder.records[0].gates.weights == 1).all()), "the scale is no gate's"
    h = normal(2, 5, 6)
    linear = grow(LowRank(experts=1, rank=3, alpha=alpha, layers="fc").inject(nn.ModuleDict({"fc": nn.Linear(6, 7)})))
    fc = linear.double()["fc"]
    torch.testing.assert_close(fc(h), F.linear(h, fc.weight + fc.B @ fc.A * scale, fc.bias))


@pytest.mark.parametrize("rank", [2, 8])
def test_alpha_is_told_apart_from_weights_that_fit(rank: int, tmp_path: Path) -> None:
    """No tensor tells alpha, so a file's must be the model's; a model that is built from the file has it."""
    torch.manual_seed(0)
    plain = timm_model("vit_tiny_patch16_224")
    model = grow(LowRank(rank=rank, alpha=1).inject(plain())).eval()
    save_model(model, tmp_path / "model.safetensors")
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(load_model(tmp_path / "model.safetensors", plain())(x), model(x))
    assert hash_model(model) != hash_model(copy.deepcopy(model).apply(unscaled)), "nor is it the same model to a reader"
    with pytest.raises(UserError, match=r"experts with alpha: 1.*, the model's have None"):
        load_model(tmp_path / "model.safetensors", LowRank(rank=rank).inject(plain()))


@pytest.mark.parametrize(("form", "size"), [("loralib", 46_080), ("peft", 16 * 160 * 9 + 160 * 16)])
def test_parameters_of_a_convolution_expert(form: Any, size: int) -> None:
    with torch.device("meta"):
        holder = nn.ModuleDict({"conv": nn.Conv2d(160, 160, 3, padding=1)})
        layer = LowRank(experts=4, rank=16, layers="conv", conv=form).inject(holder)["conv"]
    assert layer.A.numel() + layer.B.numel() == 4 * size


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_gates_of_a_convolution_stand_at_the_resolution_of_its_output(stride: int) -> None:
    layer = conv_layer(nn.Conv2d(4, 4, 3, stride=stride, padding=1))
    x = normal(2, 4, 7, 9)
    with record_gates(layer) as recorder:
        out = layer(x)
    (gates,) = recorder.gates.values()
    where = pooled(x, *out.shape[2:]).flatten(2).transpose(1, 2)
    torch.testing.assert_close(gates.local, layer.gate.local(where).softmax(-1))
    torch.testing.assert_close(gates.global_, layer.gate.global_(where.mean(1)).softmax(-1))
    if stride == 1:
        torch.testing.assert_close(gates.global_, layer.gate.global_(x.mean((2, 3))).softmax(-1))
    assert gates.weights.shape == (2, out.shape[2] * out.shape[3], 3)


@pytest.mark.parametrize("gate", [Local(), Global(), Uniform()], ids=lambda gate: gate.kind)
def test_every_gate_stands_beside_a_convolution(gate: Any) -> None:
    regularizer = None if isinstance(gate, Uniform) else {"kind": "diversification"}
    layer = conv_layer(nn.Conv2d(4, 5, 3, stride=2), gate=gate, regularizer=regularizer)
    x = normal(2, 4, 8, 8)
    torch.testing.assert_close(layer(x), dense_conv(layer, x))


@pytest.mark.parametrize("form", ["loralib", "peft"])
def test_a_fresh_cnn_keeps_its_function_to_the_last_bit(form: Any) -> None:
    plain = small_cnn()
    adapted = LowRank(rank=2, conv=form).inject(copy.deepcopy(plain))
    assert list(expert_layers(adapted)) == ["block.0.conv1", "block.0.conv2"]
    assert_computes_the_same(plain, adapted, normal(3, 1, 8, 8, dtype=torch.float32))


def test_a_step_moves_b_first_and_a_as_soon_as_b_is_not_zero() -> None:
    model = LowRank(rank=2).inject(small_cnn())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    x, y = normal(8, 1, 8, 8, dtype=torch.float32), torch.arange(8)
    moved = []
    for _ in range(2):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        moved.append({name for name, p in model.named_parameters() if not torch.equal(p, before[name])})
    backbone = {name for name, _ in small_cnn().named_parameters()}
    blocks = ("block.0.conv1", "block.0.conv2")
    assert moved[0] == backbone | {f"{block}.B" for block in blocks}
    gates = {
        f"{block}.gate.{part}.{leaf}"
        for block in blocks
        for part in ("local", "global_")
        for leaf in ("weight", "bias")
        for block in blocks
        for part in ("local", "global_")
        for leaf in ("weight", "bias")
    }
    assert moved[1] == backbone | gates | {f"{block}.{leaf}" for block in blocks for leaf in "AB"}


@pytest.mark.parametrize("form", ["loralib", "peft"])
def test_bf16_autocast_of_a_convolution_is_close_to_fp32(form: Any) -> None:
    layer = conv_layer(nn.Conv2d(8, 8, 3, stride=2, padding=1), conv=form, experts=4, rank=4).float()
    x = normal(4, 8, 8, 8, dtype=torch.float32)
    full = layer(x)
    with torch.autocast("cpu", torch.bfloat16), record_gates(layer) as recorder:
        half = layer(x)
    assert half.dtype == torch.bfloat16
    assert (half.float() - full).norm() < 0.015 * full.norm()
    half.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in (layer.A, layer.B, layer.weight))
    assert {part.dtype for gates in recorder.gates.values() for part in gates} == {torch.float32}


def compiled_pair(eager: nn.Module) -> tuple[nn.Module, nn.Module]:
    compiled = copy.deepcopy(eager)
    compiled.compile(fullgraph=True, backend="aot_eager")
    return eager, compiled


@pytest.mark.parametrize("kind", rest_slow(["convolution", "adapter"], 1))
def test_compiled_equals_eager_also_while_recording_and_training(kind: str) -> None:
    if kind == "convolution":
        pair, x = compiled_pair(conv_layer(nn.Conv2d(4, 5, 3, stride=2, padding=1))), normal(2, 4, 8, 8)
    else:
        pair, x = compiled_pair(adapter_layer()), normal(2, 4, 6)
    gradients = []
    for layer in pair:
        with record_gates(layer, detached=True) as recorder:
            out = layer(x)
        (gates,) = recorder.gates.values()
        (out.square().sum() + gates.local.square().sum() + gates.global_.square().sum()).backward()
        gradients.append([out, *gates] + [p.grad for p in layer.parameters() if p.requires_grad])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(other, one)


# Adapters


def adapter_layer(*, bias: bool = True, **settings: Any) -> AdapterLinear:
    torch.manual_seed(0)
    settings = {"layers": "fc", "experts": 3, "rank": 2} | settings
    holder = nn.ModuleDict({"fc": nn.Linear(6, 5, bias=bias)})
    layer = grow(Adapters(**settings).inject(holder).double())["fc"]
    assert isinstance(layer, AdapterLinear)
    return layer


def literal_adapter(layer: AdapterLinear, h: Tensor) -> Tensor:
    """o_i = y_i + sum_k g_ik (U_k gelu(D_k y_i + c_k) + e_k), y_i = W h_i, token by token."""
    r, g = layer.rank, gates_at(layer, h)
    out = F.linear(h, layer.weight, layer.bias)
    result = out.clone()
    for b, i, k in product(range(h.shape[0]), range(h.shape[1]), range(layer.experts)):
        rows = slice(k * r, (k + 1) * r)
        code = F.gelu(layer.D[rows] @ out[b, i] + layer.D_bias[rows])
        result[b, i] = result[b, i] + g[b, i, k] * (layer.U[:, rows] @ code + layer.U_bias[k])
    return result


@pytest.mark.parametrize("bias", [True, False])
def test_adapters_read_literally(bias: bool) -> None:
    layer, h = adapter_layer(bias=bias), normal(2, 4, 6)
    torch.testing.assert_close(layer(h), literal_adapter(layer, h))
    strided = normal(2, 6, 4).transpose(1, 2)
    torch.testing.assert_close(layer(strided), literal_adapter(layer, strided))
    grid = normal(2, 2, 3, 6)
    torch.testing.assert_close(layer(grid), literal_adapter(layer, grid.flatten(1, 2)).view(2, 2, 3, 5))


def test_gradients_of_adapters_are_exact() -> None:
    layer, h = adapter_layer(), normal(2, 3, 6).requires_grad_()
    names = [name for name, parameter in layer.named_parameters() if parameter.requires_grad]
    assert {"D", "D_bias", "U", "U_bias"} < set(names)
    values = [layer.get_parameter(name) for name in names]
    found = torch.autograd.grad(layer(h).square().sum(), [h, *values])
    expected = torch.autograd.grad(literal_adapter(layer, h).square().sum(), [h, *values])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_fresh_adapters_change_nothing_by_a_bit_and_have_houlsbys_size() -> None:
    torch.manual_seed(0)
    plain = timm_model("vit_tiny_patch16_224")().eval()
    adapted = Adapters(experts=3, rank=4).inject(copy.deepcopy(plain))
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(adapted(x), plain(x))
    for layer in expert_layers(adapted).values():
        size = sum(layer.get_parameter(name).numel() for name in ("D", "D_bias", "U", "U_bias"))
        d = layer.out_features
        assert size == 3 * (4 * d + 4 + d * 4 + d)


def test_adapters_in_windows_read_the_gate_of_the_whole_image() -> None:
    torch.manual_seed(0)
    model = grow(Adapters(rank=2, experts=3).inject(plain_swin()).double().eval())
    x = images(2)
    with record_gates(model) as recorder:
        logits = model(x)
    assert recorder.gates["layers.0.blocks.0.attn.qkv"].weights.shape == (2, 64, 3)
    assert torch.equal(model(x[[1, 0]]), logits[[1, 0]])


def test_adapters_stand_behind_linear_layers_only() -> None:
    model = small_cnn()
    with pytest.raises(UserError, match=r"block\.0\.conv1 is a convolution; adapters are for Linear"):
        Adapters(rank=2).inject(model)
    assert not expert_layers(model)


# Feed-forward experts


def ffn_layer(*, experts: int = 4, top: int | None = 2, **settings: Any) -> MixtureFFN:
    """Experts that differ, with a gate of clear preferences, float64."""
    torch.manual_seed(0)
    holder = nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 5))})
    layer = FeedForward(experts=experts, top=top, **settings).inject(holder).double()["mlp"]
    assert isinstance(layer, MixtureFFN)
    return grow(layer)


def dense_ffn(layer: MixtureFFN, h: Tensor) -> Tensor:
    """Every expert on every token; the weights of the ``top`` largest gates scaled to sum to 1."""
    scores, g = h @ layer.gate.rows().t() + layer.gate.local.bias, gates_at(layer, h)
    out = torch.zeros(*h.shape[:2], 5, dtype=h.dtype)
    for b, i in product(range(h.shape[0]), range(h.shape[1])):
        chosen = sorted(range(layer.experts), key=lambda k: -g[b, i, k].item())[: layer.top]
        shares = scores[b, i, chosen].softmax(-1)  # the same as the chosen gates over their sum
        torch.testing.assert_close(shares, g[b, i, chosen] / g[b, i, chosen].sum())
        for share, k in zip(shares, chosen, strict=True):
            out[b, i] = out[b, i] + share * layer.networks[k](h[b, i])
    return out


@pytest.mark.parametrize("top", [1, 2, 3, 4, None])
def test_feed_forward_experts_equal_the_dense_computation_with_every_gradient(top: int | None) -> None:
    layer, h = ffn_layer(top=top), normal(3, 5, 6).requires_grad_()
    names = [name for name, p in layer.named_parameters() if p.requires_grad]
    values = [layer.get_parameter(name) for name in names]
    found, expected = layer(h), dense_ffn(layer, h)
    torch.testing.assert_close(found, expected)
    gradients = torch.autograd.grad(found.square().sum(), [h, *values])
    literal = torch.autograd.grad(expected.square().sum(), [h, *values], allow_unused=True, materialize_grads=True)
    for name, one, other in zip(["input", *names], gradients, literal, strict=True):
        torch.testing.assert_close(one, other, msg=lambda text, name=name: f"{name}: {text}")
    if top in (None, 4):
        g = gates_at(layer, h)
        soft = sum(g[..., k : k + 1] * network(h) for k, network in enumerate(layer.networks))
        torch.testing.assert_close(found, soft)


def test_every_token_of_a_grid_visits_its_own_experts() -> None:
    layer, h = ffn_layer(), normal(2, 2, 3, 6)
    torch.testing.assert_close(layer(h), dense_ffn(layer, h.flatten(1, 2)).view(2, 2, 3, 5))


def test_an_expert_that_no_token_visits_gets_a_gradient_of_zeros() -> None:
    """Not none: several processes wait for a gradient of every parameter."""
    layer, h = ffn_layer(experts=3, top=1), normal(2, 3, 6)
    layer.gate.local.weight.data.zero_()
    layer.gate.local.bias.data = torch.tensor([0.0, 5.0, 1.0], dtype=torch.float64)
    visits: list[int] = []
    handles = [n.register_forward_hook(lambda m, args, out: visits.append(len(args[0]))) for n in layer.networks]
    out = layer(h)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(out, layer.networks[1](h))
    assert visits == [0, 6, 0]
    out.square().sum().backward()
    for number, network in enumerate(layer.networks):
        for parameter in network.parameters():
            assert parameter.grad is not None
            assert bool((parameter.grad != 0).any()) == (number == 1)


@pytest.mark.parametrize("top", [2, None])
def test_a_token_costs_as_many_networks_as_it_visits(top: int | None) -> None:
    layer, h = ffn_layer(top=top), normal(3, 7, 6)
    visits: list[int] = []
    for network in layer.networks:
        network.register_forward_hook(lambda m, args, out: visits.append(args[0].shape[:-1].numel()))
    layer(h)
    assert sum(visits) == 21 * (2 if top else 4)


@pytest.mark.parametrize("top", [2, None])
def test_copies_start_equal_so_that_the_function_stays_up_to_rounding(top: int | None) -> None:
    """Not to the last bit: shares that sum to 1 up to rounding multiply equal outputs, here in float32."""
    torch.manual_seed(0)
    plain = timm_model("vit_tiny_patch16_224")().eval()
    adapted = FeedForward(top=top).inject(copy.deepcopy(plain))
    assert list(expert_layers(adapted)) == ["blocks.0.mlp", "blocks.1.mlp"]
    for layer in expert_layers(adapted).values():
        first, *others = (network.state_dict() for network in layer.networks)
        assert all(torch.equal(other[key], first[key]) for other in others for key in first)
    x = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(adapted(x), plain(x), rtol=1e-5, atol=1e-5)


def test_experts_that_start_at_random_keep_nothing_of_the_networks() -> None:
    """All K, the first too: weights of a fresh ViT, and nothing that a file of experts could leave to the backbone."""
    torch.manual_seed(0)
    plain = timm_model("vit_tiny_patch16_224", embed_dim=64)()
    for parameter in plain.parameters():
        parameter.data += 1
    (layer, _) = expert_layers(FeedForward(start="random").inject(plain)).values()
    weights = torch.stack([network.fc1.weight for network in layer.networks]).detach()
    assert len(torch.unique(weights)) > 0.9 * weights.numel()
    assert abs(float(weights.mean())) < 4 * 0.02 / weights.numel() ** 0.5
    assert float(weights.std()) == pytest.approx(0.02, rel=4 / (2 * weights.numel()) ** 0.5)
    assert not any(bool(network.fc1.bias.any()) for network in layer.networks)
    assert layer.shared == ()
    own = nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(4, 4), nn.PReLU(), Scale(4))})
    with pytest.raises(UserError, match=r"start: random cannot initialise mlp\.2\.factor; use start: copies"):
        FeedForward(start="random").inject(own)


def unscaled(module: nn.Module) -> None:
    module.scale = 1


class Scale(nn.Module):
    """A parameter without a start of its own."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def test_vit_b_with_feed_forward_experts_has_the_papers_size() -> None:
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224", img_size=32, patch_size=4, num_classes=10)
        model = FeedForward(experts=4, top=2).inject(model)
    assert sum(p.numel() for p in model.parameters()) == 255_196_474  # 255.20M


def test_bf16_autocast_of_feed_forward_experts_is_close_to_fp32() -> None:
    layer, h = ffn_layer().float(), normal(4, 9, 6, dtype=torch.float32)
    full = layer(h)
    with torch.autocast("cpu", torch.bfloat16), record_gates(layer) as recorder:
        half = layer(h)
    (gates,) = recorder.gates.values()
    routed = gates.weights.topk(2, -1).indices.sort(-1).values
    exact = gates_at(layer, h).topk(2, -1).indices.sort(-1).values
    alike = (routed == exact).all(-1)
    assert alike.float().mean() > 0.8  # rounding may send a token elsewhere
    assert half.dtype == torch.bfloat16
    assert (half.float() - full)[alike].norm() < 0.03 * full[alike].norm()
    half.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.networks.parameters())


def twice_the_same() -> nn.Module:
    model = timm_model("vit_tiny_patch16_224")()
    model.blocks[1].mlp = model.blocks[0].mlp
    return model


FFN_REFUSALS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "no such network": (small_cnn, {}, r"no feed-forward networks named mlp; set experts\.layers"),
    "no Linear inside": (timm_model("vit_tiny_patch16_224"), {"layers": ("norm1",)}, r"norm1 has no Linear layer"),
    "one inside another": (
        timm_model("vit_tiny_patch16_224"), {"layers": ("mlp", "blocks.0")}, r"0\.mlp inside it is to get experts"
    ),
    "one shared by two blocks": (twice_the_same, {}, r"blocks\.0\.mlp and blocks\.1\.mlp are one shared module"),
    "experts already": (lambda: FeedForward().inject(timm_model("vit_tiny_patch16_224")()), {}, "has experts already"),
    "experts inside": (
        lambda: add_experts(timm_model("vit_tiny_patch16_224")(), layers="fc1", rank=2), {}, "fc1 inside it has experts"
    ),
    "compiled": (lambda: torch.compile(timm_model("vit_tiny_patch16_224")()), {}, "compiled already"),
}  # fmt: skip


@pytest.mark.parametrize("case", FFN_REFUSALS)
def test_feed_forward_experts_that_do_not_fit_are_refused_and_change_nothing(case: str) -> None:
    build, settings, message = FFN_REFUSALS[case]
    model = build()
    before = [(name, type(module)) for name, module in model.named_modules()]
    with pytest.raises(UserError, match=message):
        FeedForward(**settings).inject(model)
    assert [(name, type(module)) for name, module in model.named_modules()] == before


# Every kind under attack


class Tokens(nn.Module):
    """An image (B, 1, 4, 4) as four tokens of four pixels through ``inner`` to 5 logits."""

    def __init__(self, inner: nn.Module, width: int) -> None:
        super().__init__()
        self.inner, self.head = inner, nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x.flatten(1, 2)).tanh().mean(1))


def plain_model(kind: str) -> nn.Module:
    """What experts of a kind are put into, float64."""
    torch.manual_seed(0)
    if kind == "low-rank":
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.Tanh(),
            nn.Flatten(), nn.Linear(24, 5),
        ).double()  # fmt: skip
    if kind == "adapter":
        return Tokens(nn.Linear(4, 6), 6).double()
    return Tokens(nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 5)), 5).double()


def literal_tokens(apply: Callable[[Any, Tensor], Tensor]) -> Callable[[nn.Module, Tensor], Tensor]:
    return lambda model, x: model.head(apply(model.inner, x.flatten(1, 2)).tanh().mean(1))


def literal_cnn(model: nn.Module, x: Tensor) -> Tensor:
    return model[5](dense_conv(model[2], model[0](x).tanh()).tanh().flatten(1))


KINDS: dict[str, tuple[Experts, Callable[[nn.Module, Tensor], Tensor]]] = {
    "loralib": (LowRank(layers=("2",), experts=3, rank=2), literal_cnn),
    "peft": (LowRank(layers=("2",), experts=3, rank=2, conv="peft"), literal_cnn),
    "adapter": (Adapters(layers=("inner",), experts=3, rank=2), literal_tokens(literal_adapter)),
    "ffn": (FeedForward(layers=("inner",), top=2), literal_tokens(dense_ffn)),
    "ffn, soft": (FeedForward(layers=("inner",), top=None), literal_tokens(dense_ffn)),
}
THREATS = (LpBall(norm="L1", eps=0.8), LpBall(norm="L2", eps=0.3), LpBall(norm="Linf", eps=0.06))


@pytest.mark.parametrize("attack", [PGD(steps=3), APGD(steps=3)], ids=["pgd", "apgd"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_attack_finds_what_it_finds_on_the_literal_model(kind: str, attack: Any) -> None:
    """So every input gradient on the way was right; and flags and weights are as they were."""
    settings, literal = KINDS[kind]
    model = grow(settings.inject(plain_model(settings.kind))).train()
    x = torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y, threats = torch.arange(6) % 5, PerExample(THREATS, torch.arange(6) % 3)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    before = copy.deepcopy(model.state_dict())
    found = attack(model, x, y, threats)
    torch.testing.assert_close(found, attack(lambda images: literal(model, images), x, y, threats))
    assert not torch.allclose(found, x)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert all(p.grad is None for p in model.parameters())
    assert all(module.training for module in model.modules())
    assert same(dict(model.state_dict()), dict(before))


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_an_attack_casts_once_give_the_bits_of_casting_at_every_step(kind: str) -> None:
    settings, _ = KINDS[kind]
    model = grow(settings.inject(plain_model(settings.kind))).float()
    model.to(memory_format=torch.channels_last)  # as an attack puts it
    x, y = torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 5
    with torch.autocast("cpu", torch.bfloat16):
        _, _, plain = loss_and_gradient(model.eval(), x, y)
        with frozen(model):
            _, _, once = loss_and_gradient(model, x, y)
    assert torch.equal(once, plain)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_comes_back_from_its_files(kind: str, tmp_path: Path) -> None:
    settings, _ = KINDS[kind]
    model, x = grow(settings.inject(plain_model(settings.kind))).eval(), torch.rand(2, 1, 4, 4, dtype=torch.float64)
    save_model(model, tmp_path / "whole.safetensors")
    save_experts(model, tmp_path / "experts.safetensors")
    whole = load_model(tmp_path / "whole.safetensors", plain_model(settings.kind))
    assert same(dict(whole.state_dict()), dict(model.state_dict()))
    assert torch.equal(whole(x), model(x))
    experts = read_tensors(tmp_path / "experts.safetensors")[1]
    assert len(experts) + len(plain_model(settings.kind).state_dict()) == len(model.state_dict())
    alone = load_experts(plain_model(settings.kind), tmp_path / "experts.safetensors")  # the backbone is the same
    assert same(dict(alone.state_dict()), dict(model.state_dict()))


# Training

OWN_CNN = """
from torch import nn

def build(num_classes):
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(96, num_classes),
    )
"""
RUNS: dict[str, dict[str, Any]] = {
    "convolutions": {"experts": {"experts": 2, "rank": 2}, "model": None},
    "ffn": {"experts": {"kind": "ffn", "experts": 3, "top": 3, "regularizer": "load-balancing"}},  # each is visited
    "adapter": {
        "experts": {"kind": "adapter", "experts": 3, "rank": 2, "regularizer": "classification"},
        "epochs": 2, "natural_epochs": 1,
    },
    "learned coefficient": {
        "experts": {
            "experts": 2, "rank": 2, "gate": {"coefficient": "learned", "pool": "cls"},
            "regularizer": {"kind": "diversification", "gradient": "gates", "estimate": "unbiased"},
        }
    },
    "trainable projection": {
        "experts": {
            "experts": 2, "rank": 2, "projection": "trainable",
            "regularizer": {"kind": "diversification", "distance": "cosine", "tokens": "patches"},
        }
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", rest_slow(RUNS.keys(), 3))
def test_training_learns_every_part_and_goes_on_after_a_stop_to_the_same_bits(kind: str, tmp_path: Path) -> None:
    changes = {"epochs": 1, **RUNS[kind]}
    if kind == "convolutions":
        (tmp_path / "own.py").write_text(OWN_CNN)
        changes["model"] = {"name": f"{tmp_path / 'own.py'}:build"}
    config = tiny(**changes)
    whole = train(config, tmp_path / "whole")
    stopped = Run(tmp_path / "stopped")
    with pytest.raises(Interrupted):
        train(
            config, stopped.folder, progress=watched(lambda n: os.kill(os.getpid(), signal.SIGTERM) if n == 3 else None)
        )
    resumed = train(config, stopped.folder, resume=True)
    assert same(weights(resumed.folder), weights(whole.folder))
    assert without_times(resumed.log()) == without_times(whole.log())

    torch.manual_seed(config.seed)
    shape = (1, 8, 8)
    start = build_model(config.model, config.experts, classes=10, shape=shape).state_dict()
    end = weights(whole.folder)
    still = {name for name in start if torch.equal(start[name], end[name])}
    fixed = ("projection.bias",) if kind == "trainable projection" else ("projection.weight", "projection.bias")
    assert still == {"mean", "std"} | {name for name in start if name.endswith(fixed)}
    loaded = load_model(whole.folder)
    assert same(dict(loaded.state_dict()), end)
    x = torch.rand(2, *shape)
    again = create_model(**read_tensors(whole.folder)[0]["model"])
    assert torch.equal(load_model(whole.folder, again)(x), loaded(x))


def test_a_file_adds_a_kind(tmp_path: Path) -> None:
    """The example of docs/extending.md: it changes nothing at the start, trains, and a file of it loads."""
    page = (Path(__file__).parents[2] / "docs" / "extending.md").read_text()
    example = page.split("## A kind of experts")[1].split("```python")[1].split("```")[0]
    space: dict[str, Any] = {"__name__": "scales"}
    exec(example, space)
    torch.manual_seed(0)
    bare = nn.ModuleDict({"fc": nn.Linear(6, 5)})
    model = Experts.of_kind("scales").model_validate({"layers": ["fc"], "rank": 1}).inject(copy.deepcopy(bare))
    h = torch.randn(2, 3, 6)
    assert torch.equal(model["fc"](h), bare["fc"](h))
    model["fc"](h).square().mean().backward()
    assert model["fc"].c.grad.abs().min() > 0
    nn.init.normal_(model["fc"].c)
    save_experts(model, tmp_path / "experts.safetensors")
    assert torch.equal(load_experts(bare, tmp_path / "experts.safetensors")["fc"](h), model["fc"](h))
