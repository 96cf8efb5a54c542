"""Gates replaced at inference (paper Table 5)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rome.core.errors import UserError
from rome.evaluation.evaluate import Report, evaluate, hash_model
from rome.experts import FeedForward, MixtureLinear, add_experts, expert_layers, record_gates, set_routing
from rome.threats import LpBall


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    model = add_experts(nn.ModuleDict({"qkv": nn.Linear(6, 9), "proj": nn.Linear(6, 6)}).double(), experts=3, rank=2)
    for layer in model.values():
        nn.init.normal_(layer.B)
    return model


@pytest.fixture
def h() -> Tensor:
    return torch.randn(2, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def by_hand(layer: MixtureLinear, h: Tensor, weights: Tensor) -> Tensor:
    """Eq. 2 with weights (2, 5, 3), expert by expert."""
    out = nn.functional.linear(h, layer.weight, layer.bias)
    for k in range(3):
        A, B = layer.A[2 * k : 2 * k + 2], layer.B[:, 2 * k : 2 * k + 2]
        out = out + weights[..., k : k + 1] * (h @ A.t() @ B.t())
    return out


def test_inverse_gates_are_one_minus_the_gates_scaled_to_sum_to_one(model: nn.Module, h: Tensor) -> None:
    layer = model["qkv"]
    with record_gates(model) as recorder:
        layer(h)
    g = recorder.records[0].gates.weights
    inverse = (1 - g) / 2
    torch.testing.assert_close(inverse.sum(-1), torch.ones(2, 5, dtype=torch.float64))
    set_routing(model, "inverse")
    torch.testing.assert_close(layer(h), by_hand(layer, h, inverse))
    set_routing(model, "inverse-unscaled")  # as the paper writes it: 1 - g, which sums to K - 1
    torch.testing.assert_close(layer(h), by_hand(layer, h, 1 - g))


def test_no_experts_leave_the_backbone_alone(model: nn.Module, h: Tensor) -> None:
    set_routing(model, "none")
    layer = model["proj"]
    torch.testing.assert_close(layer(h), nn.functional.linear(h, layer.weight, layer.bias), rtol=0, atol=0)


def test_random_gates_are_a_fixed_point_of_the_simplex_that_the_seed_and_the_layer_decide(
    model: nn.Module, h: Tensor
) -> None:
    set_routing(model, "random", seed=1)
    weights = [layer.fixed_weights.clone() for layer in model.values()]
    assert all(float(w.sum()) == pytest.approx(1, rel=1e-6) and bool((w > 0).all()) for w in weights)
    assert not torch.equal(*weights), "each layer has its own"
    layer = model["qkv"]
    assert torch.equal(layer(h), layer(h)), "and keeps it"
    torch.testing.assert_close(layer(h), by_hand(layer, h, weights[0].expand(2, 5, 3)))
    set_routing(model, "random", seed=2)
    assert not torch.equal(model["qkv"].fixed_weights, weights[0])


def test_learned_routing_takes_everything_back_and_records_stay_the_learned_gates(model: nn.Module, h: Tensor) -> None:
    layer = model["qkv"]
    with record_gates(model) as recorder:
        before = layer(h)
    for routing in ("random", "inverse", "inverse-unscaled", "none"):
        set_routing(model, routing)
        assert not torch.allclose(layer(h), before)
        with record_gates(model) as again:
            layer(h)
        torch.testing.assert_close(again.records[0].gates.weights, recorder.records[0].gates.weights)
    set_routing(model, "learned")
    assert torch.equal(layer(h), before)


def test_what_cannot_be_rerouted_is_said() -> None:
    with pytest.raises(UserError, match="routing none is for models with experts"):
        set_routing(nn.Linear(2, 2), "none")
    assert set_routing(nn.Linear(2, 2), "learned") is not None
    lone = add_experts(nn.ModuleDict({"qkv": nn.Linear(6, 6), "proj": nn.Linear(6, 6)}), experts=1, rank=2)
    with pytest.raises(UserError, match="has one expert, whose gate has no inverse"):
        set_routing(lone, "inverse")
    for wrong in ("uniform", "inverted", "inverse-", "None"):  # none of which may pass for the learned gates
        with pytest.raises(UserError, match=f"there is no routing '{wrong}'.*Valid: inverse, inverse-unscaled"):
            set_routing(lone, wrong)  # type: ignore[arg-type]
    ffn = FeedForward(experts=3).inject(nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(6, 6))}))
    with pytest.raises(UserError, match="experts of mlp replace the layer: with routing none nothing would be left"):
        set_routing(ffn, "none")
    assert ffn["mlp"].fixed_weights is None


def test_an_evaluation_with_other_gates_is_another(tmp_path: Path) -> None:
    """Also where one layer alone is changed, and with the same gates the settings are those of before."""
    torch.manual_seed(0)
    model = add_experts(
        nn.Sequential(nn.Flatten(), nn.ModuleDict({"qkv": nn.Linear(4, 6)})["qkv"], nn.Linear(6, 3)),
        experts=3, rank=2, layers=["1", "2"],
    ).eval()  # fmt: skip
    for layer in expert_layers(model).values():
        nn.init.normal_(layer.B)
    x, y = torch.rand(6, 1, 2, 2), torch.arange(6) % 3

    def run() -> Report:
        return evaluate(model, x, y, threats=LpBall(norm="Linf", eps=0.1), suite="lp", out=tmp_path)

    first = run()
    assert "routing" not in first.settings["model"]
    hashes = {hash_model(model)}
    for routing in ("inverse", "inverse-unscaled", "none", "random"):
        set_routing(model, routing)
        hashes.add(hash_model(model))
        with pytest.raises(UserError, match=f'model.routing: null there, "{routing}" now'):
            run()
    set_routing(model, "learned")
    next(iter(expert_layers(model).values())).routing = "inverse"
    hashes.add(hash_model(model))
    with pytest.raises(UserError, match=r'model.routing: null there, "inverse\+learned" now'):
        run()
    assert len(hashes) == 6
    set_routing(model, "learned")
    assert run().to_json() == first.to_json() | {"reused": {"result": first.date}}
