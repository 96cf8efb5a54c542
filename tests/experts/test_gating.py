"""Gates: softmaxes of a local and a global Linear, mixed by the block's beta (Eq. 3-5); numbering blocks; recording."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from rome.core.errors import UserError
from rome.experts import (
    DualScale,
    Gate,
    Global,
    Layout,
    Local,
    LowRank,
    MixtureLinear,
    Uniform,
    add_experts,
    expert_layers,
    record_gates,
)
from rome.experts.gates import SoftmaxGate
from rome.experts.placement import block_numbers
from rome.models import load_experts, load_model, save_experts, save_model


def softmax(scores: list[float]) -> list[float]:
    top = max(scores)
    exps = [math.exp(s - top) for s in scores]
    return [e / sum(exps) for e in exps]


def affine(linear: nn.Linear, h: list[float]) -> list[float]:
    rows, bias = linear.weight.tolist(), linear.bias.tolist()
    return [sum(w * v for w, v in zip(row, h, strict=True)) + b for row, b in zip(rows, bias, strict=True)]


def gate_of(tokens: Tensor, *, experts: int = 3, block: int = 2, blocks: int = 5) -> SoftmaxGate:
    torch.manual_seed(0)
    gate = DualScale(s=3.0, b=1.0).build(tokens.shape[-1], experts, block=block, blocks=blocks).to(tokens.dtype)
    assert isinstance(gate, SoftmaxGate)
    return gate


@pytest.fixture
def tokens() -> Tensor:
    """(B=2, T=4, d=5), float64."""
    return torch.randn(2, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_equations_3_to_5_read_literally(tokens: Tensor) -> None:
    gate = gate_of(tokens, block=2, blocks=5)
    g, u, v = gate(tokens @ gate.rows().t())
    beta = 1 / (1 + math.exp(-(3.0 * (1 - 2 / 5) - 1.0)))
    for image in range(2):
        mean = [sum(tokens[image, :, d].tolist()) / 4 for d in range(5)]
        v_here = softmax(affine(gate.global_, mean))
        assert v[image].tolist() == pytest.approx(v_here)
        for token in range(4):
            u_here = softmax(affine(gate.local, tokens[image, token].tolist()))
            assert u[image, token].tolist() == pytest.approx(u_here)
            mixed = [(1 - beta) * a + beta * b for a, b in zip(u_here, v_here, strict=True)]
            assert g[image, token].tolist() == pytest.approx(mixed)


def test_every_gate_is_a_distribution_over_experts(tokens: Tensor) -> None:
    gate = gate_of(tokens)
    for weights in gate(20 * tokens @ gate.rows().t()):
        assert (weights >= 0).all()
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))


def test_the_global_gate_ignores_token_order_and_the_local_one_follows_it(tokens: Tensor) -> None:
    gate = gate_of(tokens)
    order = torch.tensor([2, 0, 3, 1])
    _, u, v = gate(tokens @ gate.rows().t())
    _, u_shuffled, v_shuffled = gate(tokens[:, order] @ gate.rows().t())
    torch.testing.assert_close(v_shuffled, v)
    torch.testing.assert_close(u_shuffled, u[:, order])


@pytest.mark.parametrize(("block", "beta"), [(1, 0.841), (6, 0.5), (12, 0.119)])
def test_beta_of_twelve_blocks(block: int, beta: float) -> None:
    assert DualScale().beta(block, 12) == pytest.approx(beta, abs=5e-4)


def test_beta_falls_with_depth_and_is_symmetric_about_the_middle() -> None:
    betas = [DualScale().beta(block, 12) for block in range(1, 13)]
    assert betas == sorted(betas, reverse=True)
    assert betas[0] + betas[10] == pytest.approx(1)  # l=1 and l=11, since l=6 is the middle


def test_s_and_b_shape_beta() -> None:
    assert DualScale(s=0, b=0).beta(3, 7) == 0.5
    assert DualScale(s=0, b=50).beta(3, 7) < 1e-20  # local only
    assert DualScale(s=0, b=-50).beta(3, 7) == 1  # global only


# Kinds


CLASS_AND_REGISTER = Layout(prefix=2)
"""Of the four tokens, the first two are no patches."""
POOLS: dict[str, list[int]] = {"mean": [0, 1, 2, 3], "patches": [2, 3], "cls": [0]}


def literal_gates(gate: Any, image: Tensor, pooled: list[int]) -> tuple[list[list[float]], list[float]]:
    """u (T, K) and v (K,) of one image, in plain floats; empty where the gate has no such part."""
    rows = image.tolist()
    u = [softmax(affine(gate.local, row)) for row in rows] if gate.local else []
    middle = [sum(rows[i][d] for i in pooled) / len(pooled) for d in range(len(rows[0]))]
    return u, softmax(affine(gate.global_, middle)) if gate.global_ else []


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("coefficient", ["adaptive", "inverted", "learned"])
def test_coefficients_and_pools_of_the_dual_scale_gate(coefficient: Any, pool: Any, tokens: Tensor) -> None:
    torch.manual_seed(0)
    settings = DualScale(s=3.0, b=1.0, coefficient=coefficient, pool=pool)
    gate: Any = settings.build(5, 3, block=2, blocks=5, layout=CLASS_AND_REGISTER).double()
    beta = 1 / (1 + math.exp(-(3.0 * (1 - 2 / 5) - 1.0)))
    beta = 1 - beta if coefficient == "inverted" else beta
    assert torch.as_tensor(gate.beta).item() == pytest.approx(beta)
    g, u, v = gate(tokens @ gate.rows().t())
    for image in range(2):
        u_here, v_here = literal_gates(gate, tokens[image], POOLS[pool])
        assert v[image].tolist() == pytest.approx(v_here)
        for token in range(4):
            assert u[image, token].tolist() == pytest.approx(u_here[token])
            mixed = [(1 - beta) * a + beta * b for a, b in zip(u_here[token], v_here, strict=True)]
            assert g[image, token].tolist() == pytest.approx(mixed)


def test_the_local_gate_alone_is_u(tokens: Tensor) -> None:
    gate = Local().build(5, 3, block=1, blocks=2).double()
    g, u, v = gate(tokens @ gate.rows().t())
    assert v is None
    assert torch.equal(g, u)
    for image in range(2):
        u_here, _ = literal_gates(gate, tokens[image], [0])
        for token in range(4):
            assert u[image, token].tolist() == pytest.approx(u_here[token])


@pytest.mark.parametrize("pool", POOLS)
def test_the_global_gate_alone_is_v_for_every_token(pool: Any, tokens: Tensor) -> None:
    gate = Global(pool=pool).build(5, 3, block=1, blocks=2, layout=CLASS_AND_REGISTER).double()
    g, u, v = gate(tokens @ gate.rows().t())
    assert u is None
    for image in range(2):
        _, v_here = literal_gates(gate, tokens[image], POOLS[pool])
        assert v[image].tolist() == pytest.approx(v_here)
        assert all(g[image, token].tolist() == pytest.approx(v_here) for token in range(4))


def test_no_gate_weighs_every_expert_alike_and_learns_nothing(tokens: Tensor) -> None:
    gate = Uniform().build(5, 4, block=1, blocks=2).double()
    g, u, v = gate(tokens @ gate.rows().t())
    assert g.shape == (2, 4, 4)
    assert (g == 0.25).all()
    assert u is v is None
    assert not list(gate.parameters())
    assert not gate.state_dict()


@pytest.mark.parametrize("pool", ["mean", "patches"])
def test_padding_is_no_part_of_the_image(pool: Any, tokens: Tensor) -> None:
    """Among the tokens of all windows only some hold the image; the rest may be anything."""
    torch.manual_seed(0)
    gate: Any = DualScale(pool=pool).build(5, 3, block=1, blocks=2, layout=Layout(windows=2, real=(0, 3))).double()
    _, _, v = gate(tokens @ gate.rows().t())
    other = tokens.clone()
    other[:, 1:3] = 100.0
    assert torch.equal(gate(other @ gate.rows().t())[2], v)
    torch.testing.assert_close(v, gate.global_(tokens[:, [0, 3]].mean(1)).softmax(-1))


@pytest.mark.parametrize("block", [1, 3, 6])
def test_a_learned_coefficient_starts_at_beta_and_follows_its_gradient(block: int, tokens: Tensor) -> None:
    gate: Any = DualScale(coefficient="learned").build(5, 3, block=block, blocks=6).double()
    assert gate.beta.item() == pytest.approx(DualScale().beta(block, 6))
    g, u, v = gate(tokens @ gate.rows().t())
    weight = torch.randn(g.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    (gradient,) = torch.autograd.grad((g * weight).sum(), gate.logit)
    beta = gate.beta.item()
    assert gradient.item() == pytest.approx(((v.unsqueeze(1) - u) * weight).sum().item() * beta * (1 - beta))
    assert "learned" in repr(gate)


@pytest.mark.parametrize("b", [60, -60])
def test_a_coefficient_that_starts_at_an_end_is_finite(b: float, tokens: Tensor) -> None:
    gate = DualScale(s=0, b=b, coefficient="learned").build(5, 3, block=1, blocks=2).double()
    assert all(part.isfinite().all() for part in gate(tokens @ gate.rows().t()))


def test_learned_coefficients_of_a_model_learn_each_their_own() -> None:
    model = add_experts(Blocks(), experts=3, rank=2, gate=DualScale(coefficient="learned"))
    for layer in expert_layers(model).values():
        nn.init.normal_(layer.B)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))).square().mean().backward()
    before = [layer.gate.beta.item() for layer in expert_layers(model).values()]
    optimizer.step()
    after = [layer.gate.beta.item() for layer in expert_layers(model).values()]
    assert all(one != other for one, other in zip(before, after, strict=True))
    assert len(set(after)) == 4


# Class tokens


def vit(**changes: Any) -> nn.Module:
    torch.manual_seed(0)
    size = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 10}
    return timm.create_model("vit_tiny_patch16_224", **(size | changes)).eval()


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda: Blocks(), "blocks.0.qkv"),
        (lambda: vit(class_token=False, global_pool="avg"), "blocks.0.attn.qkv"),
        (
            lambda: timm.create_model("xcit_small_12_p16_224", embed_dim=32, num_heads=2, img_size=32),
            "blocks.0.attn.qkv",
        ),
        (
            lambda: timm.create_model(
                "swin_tiny_patch4_window7_224", img_size=32, embed_dim=8, depths=(1,), num_heads=(1,)
            ),
            "layers.0.blocks.0.attn.qkv",
        ),
    ],
    ids=["own", "ViT without it", "XCiT", "Swin"],
)
@pytest.mark.parametrize("gate", [DualScale(pool="cls"), Global(pool="cls")], ids=lambda gate: gate.kind)
def test_the_class_token_can_be_read_only_where_there_is_one(build: Any, name: str, gate: Gate) -> None:
    model = build()
    with pytest.raises(
        UserError, match=rf"gate\.pool: cls reads a class token, and the input of layer {name} has none; use mean"
    ):
        LowRank(rank=2, gate=gate).inject(model)
    assert not expert_layers(model)


@pytest.mark.parametrize("layer", ["head", "patch_embed.proj"])
def test_layers_that_see_no_class_token_read_all_they_see(layer: str) -> None:
    with pytest.raises(UserError, match="has none; use mean"):
        add_experts(vit(), layers=layer, rank=2, gate=DualScale(pool="cls"))
    patches, every = (
        add_experts(vit(), layers=layer, rank=2, gate=DualScale(pool=pool)) for pool in ("patches", "mean")
    )
    every.load_state_dict(patches.state_dict())
    x = torch.rand(2, 3, 16, 16)
    with record_gates(patches) as one, record_gates(every) as other:
        assert patches(x).isfinite().all()
        every(x)
    assert torch.equal(one.gates[layer].global_, other.gates[layer].global_)


@pytest.mark.parametrize(("pool", "pooled"), [("cls", slice(0, 1)), ("patches", slice(4, None)), ("mean", slice(None))])
def test_pools_of_a_vit_with_registers(pool: Any, pooled: slice) -> None:
    """A class token, three registers, four patches."""
    model = add_experts(vit(reg_tokens=3), rank=2, gate=DualScale(pool=pool))
    layer, seen = model.blocks[1].attn.qkv, []
    layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with record_gates(model) as recorder:
        model(torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
    assert seen[0].shape[1] == 8
    expected = layer.gate.global_(seen[0][:, pooled].mean(1)).softmax(-1)
    torch.testing.assert_close(recorder.gates["blocks.1.attn.qkv"].global_, expected)


# Files and settings

GATES: list[Gate] = [
    DualScale(s=3, b=1),
    DualScale(coefficient="inverted", pool="cls"),
    DualScale(coefficient="learned", pool="patches"),
    Local(),
    Global(pool="cls"),
    Uniform(),
]


@pytest.mark.parametrize("gate", GATES, ids=repr)
def test_every_gate_comes_back_from_both_files(gate: Gate, tmp_path: Path) -> None:
    regularizer = None if isinstance(gate, Uniform) else {"kind": "diversification"}
    model = LowRank(rank=2, experts=3, gate=gate, regularizer=regularizer).inject(vit())
    for layer in expert_layers(model).values():
        for name, parameter in layer.named_parameters():
            if name not in layer.shared:
                nn.init.normal_(parameter)
    save_model(model, tmp_path / "whole.safetensors")
    save_experts(model, tmp_path / "experts.safetensors")
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for loaded in (
        load_model(tmp_path / "whole.safetensors", vit()),
        load_experts(vit(), tmp_path / "experts.safetensors"),
    ):
        assert torch.equal(loaded(x), model(x))
        own, other = loaded.state_dict(), model.state_dict()
        assert own.keys() == other.keys()
        assert all(torch.equal(own[name], other[name]) for name in own)
        for one, two in zip(expert_layers(loaded).values(), expert_layers(model).values(), strict=True):
            assert type(one.gate) is type(two.gate)
            assert (one.projection is None) == (two.projection is None) == (not gate.has_global)


@pytest.mark.parametrize("name", ["dual-scale", "local", "global", "uniform"])
def test_gates_are_named_by_kind(name: str) -> None:
    assert Gate.of_kind(name).kind == name
    assert LowRank(gate=name, regularizer=None).gate.dump()["kind"] == name


def test_a_regularizer_needs_a_gate_that_learns() -> None:
    with pytest.raises(UserError, match="gate: uniform has no parameters"):
        LowRank(gate=Uniform())
    model = add_experts(Blocks(), rank=2, gate=Uniform())  # leaves the regularizer out itself
    assert model.experts_settings[0]["regularizer"] is None
    assert add_experts(Blocks(), rank=2, gate=Local()).blocks[0].qkv.gate.global_ is None


# Block numbers


def test_layers_of_a_vit_block_share_its_number() -> None:
    names = [f"backbone.blocks.{i}.attn.{leaf}" for i in range(12) for leaf in ("qkv", "proj")]
    assert block_numbers(names) == {name: int(name.split(".")[2]) + 1 for name in names}


def test_blocks_of_a_swin_count_on_through_its_stages() -> None:
    depths = (2, 2, 18, 2)
    names = [f"layers.{s}.blocks.{i}.attn.qkv" for s, depth in enumerate(depths) for i in range(depth)]
    assert list(block_numbers(names).values()) == list(range(1, 25))


def test_a_name_without_number_is_a_block_of_its_own() -> None:
    assert block_numbers(["stem.proj", "blocks.0.qkv", "blocks.0.proj", "head"]) == {
        "stem.proj": 1,
        "blocks.0.qkv": 2,
        "blocks.0.proj": 2,
        "head": 3,
    }


def test_injected_layers_hold_the_beta_of_their_block() -> None:
    model = add_experts(Blocks(), rank=2)
    betas = {name: layer.gate.beta for name, layer in expert_layers(model).items()}
    assert betas == {
        "blocks.0.qkv": DualScale().beta(1, 2),
        "blocks.0.proj": DualScale().beta(1, 2),
        "blocks.1.qkv": DualScale().beta(2, 2),
        "blocks.1.proj": DualScale().beta(2, 2),
    }


# Recording


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.proj(self.qkv(h).tanh())


class Blocks(nn.Module):
    """Two blocks on (B, T, 6); ``skip`` leaves the second one out, ``around`` reads a weight without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.skip = False

    def forward(self, h: Tensor) -> Tensor:
        h = self.blocks[0](h)
        return h @ self.blocks[1].qkv.weight.t() if self.skip else self.blocks[1](h)


@pytest.fixture
def model() -> Blocks:
    torch.manual_seed(0)
    return add_experts(Blocks(), experts=3, rank=2)


@pytest.fixture
def h() -> Tensor:
    return torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))


def test_gates_come_by_name_in_module_order_with_their_shapes(model: Blocks, h: Tensor) -> None:
    with record_gates(model) as recorder:
        model(h)
    assert list(recorder.gates) == ["blocks.0.qkv", "blocks.0.proj", "blocks.1.qkv", "blocks.1.proj"]
    for gates in recorder.gates.values():
        assert gates.weights.shape == gates.local.shape == (2, 5, 3)
        assert gates.global_.shape == (2, 3)


def test_gates_are_the_ones_that_weighed_the_experts(model: Blocks, h: Tensor) -> None:
    first = model.blocks[0].qkv
    with record_gates(model) as recorder:
        model(h)
    expected = first.gate(h @ first.gate.rows().t())
    for found, wanted in zip(recorder.gates["blocks.0.qkv"], expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_recorded_gates_carry_gradient_to_the_gate_and_the_input(model: Blocks, h: Tensor) -> None:
    h.requires_grad_()
    with record_gates(model) as recorder:
        model(h)
    gates = recorder.gates["blocks.1.proj"]
    (gates.local.square().sum() + gates.global_.square().sum()).backward()
    gate = model.blocks[1].proj.gate
    for parameter in (*gate.parameters(), h, model.blocks[0].qkv.weight):
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0


def test_recording_ends_with_its_context_even_by_an_error(model: Blocks, h: Tensor) -> None:
    with record_gates(model) as recorder:
        model(h)
    with pytest.raises(RuntimeError), record_gates(model):
        model(h[..., :3])  # too narrow
    model(h)
    assert len(recorder.records) == 4
    assert all(layer.sink is None for layer in expert_layers(model).values())


def test_layers_keep_no_tensor_of_a_forward(model: Blocks, h: Tensor) -> None:
    def tensors(module: nn.Module) -> set[int]:
        held = [value for part in module.modules() for value in vars(part).values() if isinstance(value, Tensor)]
        return {id(t) for t in [*held, *module.parameters(), *module.buffers()]}

    before = tensors(model)
    with record_gates(model):
        model(h)
    assert tensors(model) == before


def test_the_latest_of_several_forwards_counts(model: Blocks, h: Tensor) -> None:
    with record_gates(model) as last:
        model(2 * h)
    with record_gates(model) as both:
        model(h)
        model(2 * h)
    assert len(both.records) == 8
    for name, gates in last.gates.items():
        assert torch.equal(both.gates[name].weights, gates.weights)


def test_recording_does_not_change_the_output(model: Blocks, h: Tensor) -> None:
    plain = model(h)
    with record_gates(model):
        assert torch.equal(model(h), plain)


def test_nested_recording_is_refused_and_the_outer_goes_on(model: Blocks, h: Tensor) -> None:
    with record_gates(model) as outer:
        with pytest.raises(UserError, match="being recorded already"), record_gates(model):
            pass
        model(h)
    assert len(outer.complete()) == 4


def test_a_model_without_experts_is_refused() -> None:
    with pytest.raises(UserError, match=r"no experts.*add_experts"), record_gates(Blocks()):
        pass


def test_a_layer_whose_weight_is_read_without_a_call_is_named(model: Blocks, h: Tensor) -> None:
    model(h)
    model.skip = True
    with record_gates(model) as recorder:
        model(h)
    with pytest.raises(UserError, match=r"blocks\.1\.qkv, blocks\.1\.proj were never called"):
        _ = recorder.gates


def test_layers_without_a_projection_are_recorded_too(h: Tensor) -> None:
    model = LowRank(rank=2, projection="none").inject(Blocks())
    with record_gates(model) as recorder:
        model(h)
    assert all(isinstance(r.layer, MixtureLinear) and r.layer.projection is None for r in recorder.complete())
