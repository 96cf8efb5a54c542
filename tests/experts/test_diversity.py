"""The diversification loss (Eq. 6-8): numbers worked out by hand, its symmetries and bound, and several processes."""

from __future__ import annotations

import math
from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from helpers.gates import pair_of_blocks, random_gates, recorded_gates
from helpers.small_models import THREADS, timm_model
from helpers.tiny_runs import in_two_processes
from rome.core.distributed import group_means
from rome.core.errors import UserError
from rome.experts import Diversification, Gates, LowRank, Recorded, record_gates


def loss(records: list[Recorded], labels: list[int] | Tensor, threats: int = 3, **settings: Any) -> Tensor:
    return Diversification(**settings).loss(records, torch.as_tensor(labels), threats)


def literal(records: list[Recorded], labels: list[int], threats: int) -> float:
    """Eq. 6-8 with loops and plain floats; threats without examples have no pairs."""
    groups = {p: [i for i, label in enumerate(labels) if label == p] for p in range(threats)}
    groups = {p: members for p, members in groups.items() if members}
    total = 0.0
    for layer, gates in records:
        u, v = gates.local.tolist(), gates.global_.tolist()
        T, K = len(u[0]), len(v[0])
        P = (
            layer.projection.weight.tolist()
            if layer.projection is not None
            else [[j == k for k in range(K)] for j in range(K)]
        )
        local, whole = 0.0, 0.0
        for p, q in permutations(groups, 2):
            for i in range(T):
                for k in range(K):
                    u_p = sum(u[n][i][k] for n in groups[p]) / len(groups[p])
                    u_q = sum(u[n][i][k] for n in groups[q]) / len(groups[q])
                    local -= (u_p - u_q) ** 2 / T
            for row in P:
                v_p = sum(w * v[n][k] for n in groups[p] for k, w in enumerate(row)) / len(groups[p])
                v_q = sum(w * v[n][k] for n in groups[q] for k, w in enumerate(row)) / len(groups[q])
                whole -= (v_p - v_q) ** 2
        total += local + whole
    return total / len(records)


# Values


def test_three_threats_worked_out_by_hand() -> None:
    # Two tokens, two experts; examples 0 and 3 belong to threat 0, example 1 to threat 1, example 2 to threat 2.
    u = [
        [[1.0, 0.0], [0.5, 0.5]],
        [[0.0, 1.0], [0.5, 0.5]],
        [[0.5, 0.5], [1.0, 0.0]],
        [[0.6, 0.4], [0.5, 0.5]],
    ]  # fmt: skip
    v = [[0.9, 0.1], [0.2, 0.8], [0.5, 0.5], [0.7, 0.3]]
    P = [[1.0, 0.0], [2.0, 1.0], [0.0, 3.0]]
    # Means, first expert, of threats 0, 1, 2 (the second expert has one minus it):
    # token 1: .8 0 .5; token 2: .5 .5 1. A difference d in the first expert is a squared distance 2 d^2.
    local = -1 / 2 * 2 * ((2 * 0.8**2 + 0) + (2 * 0.3**2 + 2 * 0.5**2) + (2 * 0.5**2 + 2 * 0.5**2))
    # v: .8 .2 .5; P (d, -d) = (d, d, -3d), squared 11 d^2.
    whole = -2 * 11 * (0.6**2 + 0.3**2 + 0.3**2)
    assert loss([recorded_gates(u, v, P)], [0, 1, 2, 0]).item() == pytest.approx(local + whole)
    assert local + whole == pytest.approx(-2.96 - 11.88)


@pytest.mark.parametrize("project", [5, 0], ids=["projected", "unprojected"])
def test_equations_6_to_8_read_literally(project: int) -> None:
    records = [random_gates(seed=0, project=project), random_gates(tokens=5, experts=3, seed=1, project=project)]
    labels = [2, 0, 1, 0, 0, 2, 1]
    assert loss(records, labels).item() == pytest.approx(literal(records, labels, 3))


def test_two_and_four_threats() -> None:
    record = random_gates()
    for labels, threats in (([0, 1, 0, 0, 1, 1, 0], 2), ([3, 1, 2, 0, 0, 3, 1], 4)):
        assert loss([record], labels, threats).item() == pytest.approx(literal([record], labels, threats))


def test_ordered_pairs_count_twice() -> None:
    record, labels = random_gates(), [0, 1, 2, 0, 1, 2, 0]
    ordered = loss([record], labels)
    assert ordered == 2 * loss([record], labels, pairs="unordered")
    assert ordered == loss([record], labels, pairs="ordered")  # the default


def test_the_loss_is_the_mean_over_layers() -> None:
    one, two, labels = random_gates(seed=0), random_gates(seed=1, tokens=6), [0, 1, 2, 0, 1, 2, 0]
    torch.testing.assert_close(loss([one, two], labels), (loss([one], labels) + loss([two], labels)) / 2)


@pytest.mark.parametrize(("layers", "blocks", "ratio"), [(("qkv", "proj"), 2, 2.0), (("qkv", "proj", "fc1"), 2, 3.0)])
def test_the_mean_over_blocks_adds_the_layers_of_a_block_up(layers: tuple[str, ...], blocks: int, ratio: float) -> None:
    """Eq. 8 with L the blocks of a ViT: the sum over a block's gated layers, so many times the mean over layers."""
    torch.manual_seed(0)
    model = LowRank(rank=2, layers=layers).inject(timm_model("vit_tiny_patch16_224", depth=blocks)())
    with record_gates(model) as recorder:
        model(torch.rand(7, 3, 32, 32))
    records, labels = recorder.complete(), [2, 0, 1, 0, 0, 2, 1]
    by_block = loss(records, labels, mean_over="blocks")
    torch.testing.assert_close(by_block, ratio * loss(records, labels))
    assert by_block.item() == pytest.approx(sum(literal([each], labels, 3) for each in records) / blocks, rel=1e-4)


def test_a_threat_without_examples_drops_its_pairs_without_renormalising() -> None:
    record, labels = random_gates(), [0, 2, 2, 0, 0, 2, 2]
    alone = loss([record], [min(label, 1) for label in labels], threats=2)
    torch.testing.assert_close(loss([record], labels, threats=3), alone)
    torch.testing.assert_close(loss([record], labels, threats=9), alone)


def test_one_threat_alone_gives_zero_and_zero_gradient() -> None:
    record = random_gates()
    u, v = record.gates.local.requires_grad_(), record.gates.global_.requires_grad_()
    value = loss([Recorded(record.layer, Gates(u, u, v))], [1] * 7)
    assert value == 0
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(value, (u, v)))


def test_equal_gates_give_zero() -> None:
    u, v = torch.full((4, 2, 3), 1 / 3), torch.full((4, 3), 1 / 3)
    assert loss([recorded_gates(u, v, torch.randn(5, 3))], [0, 1, 2, 0]).item() == pytest.approx(0, abs=1e-12)


# Symmetries and bound


def test_the_order_of_examples_does_not_matter() -> None:
    record, labels = random_gates(), torch.tensor([0, 1, 2, 0, 1, 2, 0])
    order = torch.tensor([4, 2, 6, 0, 5, 1, 3])
    u, _, v = record.gates
    shuffled = Recorded(record.layer, Gates(u[order], u[order], v[order]))
    torch.testing.assert_close(loss([shuffled], labels[order]), loss([record], labels))


def test_the_names_of_threats_do_not_matter() -> None:
    record, labels = random_gates(), [0, 1, 2, 0, 1, 2, 0]
    for renamed in permutations(range(3)):
        torch.testing.assert_close(loss([record], [renamed[p] for p in labels]), loss([record], labels))


def test_distances_are_taken_token_by_token_not_between_mean_tokens() -> None:
    # Both threats use both experts equally over the image, at opposite tokens.
    u = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]]])
    record = recorded_gates(u, torch.full((2, 2), 0.5))
    assert loss([record], [0, 1], threats=2).item() == pytest.approx(-2 * 2, rel=1e-12)


def test_only_means_over_a_threat_matter_not_its_spread() -> None:
    # One-hot gates that average to the same mixture: no separation, however pure each example is.
    u = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]], [[1.0, 0.0]], [[0.0, 1.0]]])
    assert loss([recorded_gates(u, u[:, 0])], [0, 0, 1, 1], threats=2) == 0


@pytest.mark.parametrize("threats", [2, 3, 4])
def test_opposite_one_hot_gates_reach_the_local_bound_of_two_a_pair(threats: int) -> None:
    u = torch.eye(threats).unsqueeze(1).expand(-1, 6, -1)
    v = torch.full((threats, threats), 1 / threats)
    pairs = len(list(combinations(range(threats), 2)))
    best = loss([recorded_gates(u, v)], range(threats), threats, pairs="unordered").item()
    assert best == pytest.approx(-2 * pairs)
    for seed in range(5):
        rivals = recorded_gates(random_gates(threats, 6, threats, seed=seed).gates.local, v)
        assert loss([rivals], range(threats), threats, pairs="unordered").item() > best


# The projection


def test_projection_bias_has_no_effect() -> None:
    record, labels = random_gates(), [0, 1, 2, 0, 1, 2, 0]
    before = loss([record], labels)
    record.layer.projection.bias.data += 1000.0
    assert loss([record], labels) == before


def test_global_term_grows_with_the_square_of_the_projection() -> None:
    record, labels = random_gates(), [0, 1, 2, 0, 1, 2, 0]
    u, v = record.gates.local, record.gates.global_
    local = loss([recorded_gates(u, torch.zeros_like(v))], labels)
    before = loss([record], labels) - local
    record.layer.projection.weight.data *= 3
    torch.testing.assert_close(loss([record], labels) - local, 9 * before)


@pytest.mark.parametrize("projection", ["frozen", "trainable", "none"])
def test_gradient_reaches_gates_and_only_a_trainable_projection(projection: str) -> None:
    model, h = pair_of_blocks(projection), torch.randn(6, 2, 6, dtype=torch.float64)
    with record_gates(model) as recorder:
        model(h)
    loss(recorder.complete(), [0, 1, 2, 0, 1, 2]).backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and (p.grad != 0).any()}
    gates = {
        f"{layer}.gate.{scale}.{part}"
        for layer in (0, 2)
        for scale in ("local", "global_")
        for part in ("weight", "bias")
    }
    projections = {"0.projection.weight", "2.projection.weight"} if projection == "trainable" else set()
    # the first layer's output moves the gates of the second: its W and B learn too, not its A while B = 0
    assert reached == gates | projections | {"0.weight", "0.bias", "0.B"}


def test_descending_separates_the_threats() -> None:
    model = pair_of_blocks("frozen")
    h, labels = torch.randn(12, 2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), [0, 1, 2] * 4
    optimizer, values = torch.optim.SGD(model.parameters(), lr=0.05), []
    for _ in range(30):
        with record_gates(model) as recorder:
            model(h)
        value = loss(recorder.complete(), labels)
        values.append(value.item())
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    assert values == sorted(values, reverse=True)
    assert values[-1] < 2 * values[0] < 0


# Settings


def test_weight_is_lambda_and_applied_by_the_method_not_here() -> None:
    record, labels = random_gates(), [0, 1, 2, 0, 1, 2, 0]
    assert Diversification().weight == 0.1
    assert loss([record], labels, weight=5) == loss([record], labels)


@pytest.mark.parametrize("settings", [{"weight": -1}, {"pairs": "all"}, {"lambda": 1}], ids=str)
def test_invalid_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        Diversification(**settings)


# Several processes

BATCH = torch.randn(8, 2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
LABELS = torch.tensor([0, 0, 0, 1, 0, 1, 2, 1])  # halves: threats 0 0 0 1 and 0 1 2 1, so threat 2 is in one only


def train_step(model: nn.Module, called: nn.Module, rows: slice) -> dict[str, Any]:
    """A loss with a data term and the regularizer, and every parameter's gradient."""
    with record_gates(model) as recorder:
        out = called(BATCH[rows])
    penalty = Diversification().loss(recorder.complete(), LABELS[rows], 3)
    model.zero_grad()
    (out.square().mean() + 0.1 * penalty).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    return {"penalty": penalty.detach(), "gradients": gradients}


def one_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(THREADS)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for projection in ("frozen", "trainable"):
        model = pair_of_blocks(projection)
        wrapped = nn.parallel.DistributedDataParallel(model)
        train_step(model, wrapped, slice(4 * rank, 4 * rank + 4))  # a second step fails if a parameter got no gradient
        torch.save(train_step(model, wrapped, slice(4 * rank, 4 * rank + 4)), f"{folder}/{projection}{rank}")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_have_the_loss_and_gradients_of_one(tmp_path: Path) -> None:
    in_two_processes(one_of_two, str(tmp_path))
    for projection in ("frozen", "trainable"):
        model = pair_of_blocks(projection)
        one = train_step(model, model, slice(None))
        assert not math.isclose(one["penalty"], 0, abs_tol=1e-6)
        for rank in range(2):
            two = torch.load(tmp_path / f"{projection}{rank}")
            torch.testing.assert_close(two["penalty"], one["penalty"], rtol=1e-5, atol=1e-6)
            assert two["gradients"].keys() == one["gradients"].keys()
            for name, gradient in one["gradients"].items():
                torch.testing.assert_close(two["gradients"][name], gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("count", [600, 601])
def test_members_are_counted_exactly_whatever_the_precision_of_the_gates(count: int) -> None:
    values = torch.ones(count, 2, dtype=torch.bfloat16)
    means, members = group_means(values, torch.zeros(count, dtype=torch.int64), 2)
    assert members.tolist() == [count, 0]
    assert means.tolist() == [[1, 1], [0, 0]]
