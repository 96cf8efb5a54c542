"""The learning-rate schedule in closed form, and who decays."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import timm
import torch
from torch import nn

from rome.core.errors import UserError
from rome.experts import Adapters, add_experts, expert_layers
from rome.methods.base import set_lr
from rome.models import create_model
from rome.runs.optim import SGD, AdamW, Optimizer, Schedule

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}

# Schedule


@pytest.mark.parametrize(
    ("share", "factor"), [(0, 0), (0.1, 0.5), (0.2, 1), (0.5, 0.525), (0.8, 0.05), (0.9, 0.0255), (1, 0.001)]
)
def test_default_schedule_in_closed_form(share: float, factor: float) -> None:
    assert Schedule().factor(share) == pytest.approx(factor)


@pytest.mark.parametrize(("epochs", "knots"), [(20, {4: 1, 16: 0.05, 20: 0.001}), (5, {1: 1, 4: 0.05, 5: 0.001})])
def test_default_schedule_turns_at_the_papers_epochs(epochs: int, knots: dict[int, float]) -> None:
    for epoch, factor in knots.items():
        assert Schedule().factor(epoch / epochs) == pytest.approx(factor)


def test_schedule_is_continuous_and_peaks_at_one() -> None:
    values = [Schedule().factor(i / 1000) for i in range(1001)]
    assert max(values) == 1
    assert max(abs(a - b) for a, b in pairwise(values)) == pytest.approx(1 / 200)  # warm-up's slope


def test_own_points_and_steps() -> None:
    constant = Schedule(points=((0, 1), (1, 1)))
    assert [constant.factor(share) for share in (0, 0.3, 1)] == [1, 1, 1]
    step = Schedule(points=((0, 1), (0.5, 1), (0.5, 0.1), (1, 0.1)))
    assert [step.factor(share) for share in (0, 0.5, 0.500001, 1)] == pytest.approx([1, 1, 0.1, 0.1])
    assert Schedule(points=((0, 0.5), (0, 1), (1, 0))).factor(0) == 1  # a jump at the very start has happened


@pytest.mark.parametrize(
    "points",
    [(), ((0, 1),), ((0.1, 0), (1, 1)), ((0, 0), (0.9, 1)), ((0, 0), (0.8, 1), (0.2, 1), (1, 0)), ((0, 0, 0), (1, 1))],
    ids=str,
)
def test_points_that_do_not_run_from_zero_to_one_are_refused(points: Any) -> None:
    with pytest.raises(UserError):
        Schedule(points=points)


def test_points_may_be_fractions() -> None:
    assert Schedule(points=(("0", 0), ("1/5", 1), (1, "1/1000"))).factor(0.1) == pytest.approx(0.5)


# Weight decay


def decays(optimizer: Optimizer, model: nn.Module) -> dict[str, float]:
    """The weight decay of every parameter by name."""
    names = {id(p): name for name, p in model.named_parameters()}
    groups = optimizer.build(model).param_groups
    found = [(names[id(p)], group["weight_decay"]) for group in groups for p in group["params"]]
    assert len(dict(found)) == len(found)
    return dict(found)


def rome_model() -> nn.Module:
    return add_experts(create_model("vit_tiny_patch16_224", num_classes=10, **TINY), rank=2)


def test_only_matrices_decay_and_not_positions_or_class_token() -> None:
    model = rome_model()
    decay = decays(AdamW(weight_decay=0.3), model)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert name not in decay
        else:
            free = parameter.ndim <= 1 or name in ("backbone.pos_embed", "backbone.cls_token")
            assert decay[name] == (0 if free else 0.3), name
    assert decay["backbone.pos_embed"] == decay["backbone.cls_token"] == 0
    assert decay["backbone.blocks.0.attn.qkv.weight"] == decay["backbone.blocks.0.attn.qkv.A"] == 0.3
    assert decay["backbone.blocks.0.attn.qkv.gate.local.weight"] == 0.3
    assert decay["backbone.blocks.0.attn.qkv.gate.local.bias"] == 0


def test_a_bare_backbone_has_the_same_groups_as_one_behind_its_normalisation() -> None:
    wrapped, bare = rome_model(), add_experts(timm.create_model("vit_tiny_patch16_224", num_classes=10, **TINY), rank=2)
    expected = {name.removeprefix("backbone."): decay for name, decay in decays(AdamW(), wrapped).items()}
    assert decays(AdamW(), bare) == expected


def test_decay_all_leaves_nothing_out() -> None:
    model = rome_model()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert decays(AdamW(weight_decay=0.3, decay_all=True), model) == dict.fromkeys(trained, 0.3)


def test_frozen_parameters_are_left_out() -> None:
    model = rome_model()
    for layer in expert_layers(model).values():
        layer.weight.requires_grad_(False)
    for settings in ({}, {"decay_all": True}):
        names = decays(AdamW(**settings), model)
        assert "backbone.blocks.0.attn.qkv.weight" not in names
        assert "backbone.blocks.0.attn.qkv.projection.weight" not in names
        assert "backbone.blocks.0.attn.qkv.A" in names


def test_a_model_without_a_list_of_exceptions_follows_dimensions_alone() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    assert decays(SGD(), model) == {"0.weight": 5e-4, "0.bias": 0, "1.weight": 0, "1.bias": 0}


# Factors for experts and gates


@pytest.mark.parametrize("decay_all", [False, True])
def test_experts_and_gates_have_learning_rates_of_their_own(decay_all: bool) -> None:
    model = rome_model()
    optimizer = AdamW(lr=0.1, experts_lr=2, gates_lr=5, decay_all=decay_all).build(model)
    set_lr(optimizer, 0.01)
    names = {id(p): name for name, p in model.named_parameters()}
    lr = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert set(lr) == {name for name, p in model.named_parameters() if p.requires_grad}
    for name, value in lr.items():
        factor = 5 if ".gate." in name else 2 if name.endswith((".A", ".B")) else 1
        assert value == pytest.approx(0.01 * factor), name
    plain = decays(AdamW(weight_decay=0.3, decay_all=decay_all), model)
    assert decays(AdamW(weight_decay=0.3, decay_all=decay_all, gates_lr=5), model) == plain


def test_factors_know_the_gate_of_whole_networks() -> None:
    from rome.experts import Networks

    model = Networks(experts=2).inject(create_model("vit_tiny_patch16_224", num_classes=10, **TINY))
    optimizer = SGD(experts_lr=3, gates_lr=7).build(model)
    scale = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert scale[id(p)] == (7 if "router." in name else 3), "the first expert is one of its peers"


def test_a_model_without_experts_ignores_their_factors() -> None:
    groups = SGD(experts_lr=3, gates_lr=7).build(nn.Linear(3, 3)).param_groups
    assert {group["lr_scale"] for group in groups} == {1.0}


def test_settings_reach_the_optimizer() -> None:
    model = nn.Linear(3, 3)
    adamw = AdamW(lr="1/100", betas=(0.8, 0.99)).build(model)
    assert isinstance(adamw, torch.optim.AdamW)
    assert all((group["lr"], group["betas"]) == (0.01, (0.8, 0.99)) for group in adamw.param_groups)
    sgd = SGD(lr=0.2, momentum=0.5, nesterov=True).build(model)
    assert isinstance(sgd, torch.optim.SGD)
    assert all((g["lr"], g["momentum"], g["nesterov"]) == (0.2, 0.5, True) for g in sgd.param_groups)


def test_defaults_are_the_papers() -> None:
    assert (AdamW().lr, AdamW().weight_decay) == (1e-3, 0.05)
    assert (SGD().lr, SGD().weight_decay) == (0.05, 5e-4)


@pytest.mark.parametrize("settings", [{"lr": 0}, {"lr": -1}, {"weight_decay": -1}, {"momentum": 0.9}], ids=str)
def test_invalid_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        AdamW(**settings)


def test_biases_of_adapters_do_not_decay() -> None:
    model = Adapters(rank=2).inject(create_model("vit_tiny_patch16_224", num_classes=10, **TINY))
    decay = decays(AdamW(weight_decay=0.3), model)
    layer = "backbone.blocks.0.attn.qkv"
    assert [decay[f"{layer}.{name}"] for name in ("D", "U", "D_bias", "U_bias")] == [0.3, 0.3, 0, 0]
