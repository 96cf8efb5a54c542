"""Losses on gates beside the default: other distances, the unbiased estimate, balance, and what each may train."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from helpers.contexts import context_of
from helpers.gates import pair_of_blocks, random_gates, recorded_gates
from helpers.small_models import THREADS
from helpers.tiny_runs import changed, in_two_processes
from rome.attacks import PGD
from rome.core.errors import UserError
from rome.experts import (
    Adapters,
    Classification,
    Diversification,
    DualScale,
    Experts,
    FeedForward,
    Gates,
    Global,
    Importance,
    LoadBalancing,
    Local,
    LowRank,
    MixtureLinear,
    Recorded,
    Regularizer,
    Uniform,
    expert_layers,
    record_gates,
)
from rome.experts.gates import Layout
from rome.methods.base import training_forward
from rome.runs.config import parse
from rome.threats import budgets

LABELS = [0, 1, 2, 0, 1, 2, 0]


def of(regularizer: Regularizer, records: list[Recorded], labels: list[int] = LABELS, threats: int = 3) -> Tensor:
    return regularizer.loss(records, torch.tensor(labels), threats)


# Distances of Table A5


def cosine(a: list[float], b: list[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return -dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def symmetric_kl(a: list[float], b: list[float]) -> float:
    one = sum(x * math.log(x / y) for x, y in zip(a, b, strict=True))
    return one + sum(y * math.log(y / x) for x, y in zip(a, b, strict=True))


def unsorted_wasserstein(a: list[float], b: list[float]) -> float:
    return sum(abs(sum(a[: k + 1]) - sum(b[: k + 1])) for k in range(len(a)))


def wasserstein(a: list[float], b: list[float]) -> float:
    return unsorted_wasserstein(sorted(a), sorted(b))


def squared(a: list[float], b: list[float]) -> float:
    return sum((x - y) ** 2 for x, y in zip(a, b, strict=True))


DISTANCES: dict[str, Callable[[list[float], list[float]], float]] = {
    "l2": squared,
    "cosine": cosine,
    "kl": symmetric_kl,
    "wasserstein": wasserstein,
    "wasserstein-unsorted": unsorted_wasserstein,
}


def mean(rows: list[list[float]]) -> list[float]:
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def literal(records: list[Recorded], labels: list[int], distance: str) -> float:
    """Eq. 6-8 with a distance of Table A5, in loops; only l2 and cosine compare the projected global gates."""
    measure, total = DISTANCES[distance], 0.0
    for layer, gates in records:
        u, v = gates.local.tolist(), gates.global_.tolist()
        for p, q in permutations(sorted(set(labels)), 2):
            one, other = ([n for n, label in enumerate(labels) if label == threat] for threat in (p, q))
            for i in range(len(u[0])):
                total -= measure(mean([u[n][i] for n in one]), mean([u[n][i] for n in other])) / len(u[0])
            v_p, v_q = mean([v[n] for n in one]), mean([v[n] for n in other])
            if layer.projection is not None and distance in ("l2", "cosine"):
                P = layer.projection.weight.tolist()
                v_p, v_q = ([sum(w * x for w, x in zip(row, v, strict=True)) for row in P] for v in (v_p, v_q))
            total -= measure(v_p, v_q)
    return total / len(records)


@pytest.mark.parametrize("project", [5, 0], ids=["projected", "unprojected"])
@pytest.mark.parametrize("distance", DISTANCES)
def test_every_distance_read_literally(distance: Any, project: int) -> None:
    records = [random_gates(seed=0, project=project), random_gates(tokens=5, experts=3, seed=1, project=project)]
    for labels in (LABELS, [2, 0, 0, 0, 2, 2, 0]):
        found = of(Diversification(distance=distance), records, labels)
        assert found.item() == pytest.approx(literal(records, labels, distance))


@pytest.mark.parametrize("distance", DISTANCES)
def test_every_distance_is_zero_or_least_between_equal_gates_and_grows_with_difference(distance: Any) -> None:
    g = torch.tensor([[0.7, 0.2, 0.1]] * 2, dtype=torch.float64)
    other = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]], dtype=torch.float64)

    def loss(v: Tensor) -> float:
        return of(Diversification(distance=distance), [recorded_gates(v.unsqueeze(1), v)], [0, 1], 2).item()

    assert loss(g) == pytest.approx(2 * 2 * 1.0 if distance == "cosine" else 0, abs=1e-12)
    assert loss(other) < loss(g)


def test_sorting_makes_a_permutation_of_experts_no_distance() -> None:
    v = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.7, 0.2]], dtype=torch.float64)
    record = recorded_gates(v.unsqueeze(1), v)
    assert of(Diversification(distance="wasserstein"), [record], [0, 1], 2) == 0
    assert of(Diversification(distance="wasserstein-unsorted"), [record], [0, 1], 2) < -1


@pytest.mark.parametrize("distance", ["kl", "cosine", "wasserstein"])
def test_saturated_gates_have_finite_losses_and_gradients(distance: Any) -> None:
    scores = torch.tensor([[200.0, 0.0, -200.0], [-200.0, 0.0, 200.0]], requires_grad=True)
    v = scores.softmax(-1)
    layer = recorded_gates(v.detach().unsqueeze(1), v.detach()).layer
    loss = of(Diversification(distance=distance), [Recorded(layer, Gates(v, v.unsqueeze(1), v))], [0, 1], 3)
    assert loss.isfinite()
    assert torch.autograd.grad(loss, scores)[0].isfinite().all()


# Parts of the gates


def test_a_gate_with_one_part_has_that_part_alone() -> None:
    both = random_gates()
    u, v = both.gates.local, both.gates.global_
    local = of(Diversification(), [Recorded(both.layer, Gates(u, u, None))])
    whole = of(Diversification(), [Recorded(both.layer, Gates(u, None, v))])
    torch.testing.assert_close(local + whole, of(Diversification(), [both]))
    with pytest.raises(UserError, match=r"no gate has a local or a global part.*regularizer: null"):
        of(Diversification(), [Recorded(both.layer, Gates(u, None, None))])


def test_the_mean_over_projected_dimensions_divides_the_global_term_by_their_number() -> None:
    record = random_gates(project=5)
    u, v = record.gates.local, record.gates.global_
    local = of(Diversification(), [Recorded(record.layer, Gates(u, u, None))])
    whole = of(Diversification(), [Recorded(record.layer, Gates(u, None, v))])
    torch.testing.assert_close(of(Diversification(projected="mean"), [record]), local + whole / 5)
    alone = random_gates(project=0)
    assert of(Diversification(projected="mean"), [alone]) == of(Diversification(), [alone])


@pytest.mark.parametrize("distance", DISTANCES)
def test_patches_leave_class_tokens_out_of_the_local_term(distance: Any) -> None:
    record = random_gates(tokens=6)
    record.layer.layout = Layout(prefix=2)
    u, v = record.gates.local, record.gates.global_
    without = Recorded(record.layer, Gates(u[:, 2:], u[:, 2:], v))
    found = of(Diversification(distance=distance, tokens="patches"), [record])
    torch.testing.assert_close(found, of(Diversification(distance=distance), [without]))
    assert not torch.allclose(found, of(Diversification(distance=distance), [record]))


# The unbiased estimate

TRUE = torch.tensor([[0.5, 0.3, 0.2], [0.4, 0.4, 0.2], [0.5, 0.2, 0.3]], dtype=torch.float64)
SPREAD = (0.1, 0.2, 0.4)
MEMBERS = (2, 3, 5)


def sampled(draws: int) -> tuple[Tensor, list[int]]:
    """Independent batches (10, draws, 3): threat p has its true mean, a spread of its own and 2, 3 or 5 members."""
    labels = [p for p, n in enumerate(MEMBERS) for _ in range(n)]
    noise = torch.randn(len(labels), draws, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return TRUE[labels].unsqueeze(1) + torch.tensor(SPREAD)[labels].view(-1, 1, 1) * noise, labels


def spread(P: Tensor) -> float:
    """What sampling adds to the sum over ordered pairs: |P e|^2 of the two means' errors."""
    variances = [s**2 * P.square().sum().item() / n for s, n in zip(SPREAD, MEMBERS, strict=True)]
    return sum(variances[p] + variances[q] for p, q in permutations(range(3), 2))


def apart(P: Tensor) -> float:
    return sum((P @ (TRUE[p] - TRUE[q])).square().sum().item() for p, q in permutations(range(3), 2))


def test_the_unbiased_local_term_is_right_on_average_and_the_plain_one_too_large() -> None:
    u, labels = sampled(20_000)  # the term is a mean over tokens: here each is a batch of its own
    record = recorded_gates(u, torch.zeros(10, 3))
    eye = torch.eye(3, dtype=torch.float64)
    unbiased = -of(Diversification(estimate="unbiased"), [record], labels).item()
    plain = -of(Diversification(), [record], labels).item()
    assert spread(eye) > 2 * apart(eye)
    assert unbiased == pytest.approx(apart(eye), rel=0.03)
    assert plain == pytest.approx(apart(eye) + spread(eye), rel=0.01)


def test_the_unbiased_global_term_is_right_through_the_projection() -> None:
    P = torch.randn(4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    v, labels = sampled(2_000)
    layer = recorded_gates(v[:, :1], v[:, 0], P).layer
    records = [Recorded(layer, Gates(v, None, v[:, draw])) for draw in range(v.shape[1])]
    unbiased = -of(Diversification(estimate="unbiased"), records, labels).item()
    plain = -of(Diversification(), records, labels).item()
    assert unbiased == pytest.approx(apart(P), rel=0.1)
    assert plain == pytest.approx(apart(P) + spread(P), rel=0.05)
    half = -of(Diversification(estimate="unbiased", pairs="unordered", projected="mean"), records, labels).item()
    assert half == pytest.approx(unbiased / 2 / 4)


def test_the_estimate_subtracts_each_threats_variance_of_the_mean() -> None:
    """Worked out: gates 0.6 and 0.8 of threat 0 have the sample variance 0.02 and their mean half of that."""
    u = torch.tensor([[[0.6, 0.4]], [[0.8, 0.2]], [[0.3, 0.7]], [[0.3, 0.7]]], dtype=torch.float64)
    record = recorded_gates(u, torch.zeros(4, 2))
    found = of(Diversification(estimate="unbiased", pairs="unordered"), [record], [0, 0, 1, 1], 2)
    assert found.item() == pytest.approx(-(2 * 0.4**2 - 2 * 0.02 / 2))


def test_a_threat_with_one_example_or_none_has_no_variance_to_subtract() -> None:
    record = random_gates(batch=3)
    for labels in ([0, 1, 2], [2, 0, 0]):
        unbiased, plain = (of(Diversification(estimate=e), [record], labels) for e in ("unbiased", "plain"))
        assert (unbiased == plain) == (labels == [0, 1, 2])
        assert unbiased.isfinite()


# Losses of conventional mixtures


def balance_by_hand(g: list[list[list[float]]]) -> float:
    tokens = [token for image in g for token in image]
    K = len(tokens[0])
    f = [sum(max(range(K), key=token.__getitem__) == k for token in tokens) / len(tokens) for k in range(K)]
    P = mean(tokens)
    return K * sum(a * b for a, b in zip(f, P, strict=True))


def importance_by_hand(g: list[list[list[float]]]) -> float:
    totals = [sum(token[k] for image in g for token in image) for k in range(len(g[0][0]))]
    middle = sum(totals) / len(totals)
    return sum((total - middle) ** 2 for total in totals) / len(totals) / middle**2


def classification_by_hand(record: Recorded, labels: list[int]) -> float:
    u, v = record.gates.local.tolist(), record.gates.global_.tolist()
    local = [-math.log(token[p]) for image, p in zip(u, labels, strict=True) for token in image]
    return sum(local) / len(local) + sum(-math.log(v[n][p]) for n, p in enumerate(labels)) / len(v)


def test_balance_importance_and_classification_read_literally() -> None:
    records = [random_gates(experts=3, seed=0), random_gates(experts=3, tokens=5, seed=1)]
    for regularizer, by_hand in ((LoadBalancing(), balance_by_hand), (Importance(), importance_by_hand)):
        expected = sum(by_hand(record.gates.weights.tolist()) for record in records) / 2
        assert of(regularizer, records).item() == pytest.approx(expected)
    expected = sum(classification_by_hand(record, LABELS) for record in records) / 2
    assert of(Classification(), records).item() == pytest.approx(expected)


def gates(weights: Any) -> Recorded:
    g = torch.as_tensor(weights, dtype=torch.float64)
    return recorded_gates(g, g.mean(1))


def test_uniform_gates_are_balanced_and_of_equal_importance() -> None:
    uniform = gates(torch.full((4, 5, 3), 1 / 3))
    assert of(LoadBalancing(), [uniform], [0] * 4).item() == pytest.approx(1)
    assert of(Importance(), [uniform], [0] * 4).item() == pytest.approx(0, abs=1e-12)
    assert of(Classification(), [uniform], [0, 1, 2, 0]).item() == pytest.approx(2 * math.log(3))


@pytest.mark.parametrize("seed", range(5))
def test_one_hot_gates_have_a_balance_of_at_least_one_reached_by_equal_shares(seed: int) -> None:
    chosen = torch.randint(3, (4, 6), generator=torch.Generator().manual_seed(seed))
    shares = [float((chosen == k).double().mean()) for k in range(3)]
    found = of(LoadBalancing(), [gates(F.one_hot(chosen, 3))], [0] * 4).item()
    assert found == pytest.approx(3 * sum(share**2 for share in shares))
    assert found >= 1
    equal = torch.arange(24).view(4, 6) % 3
    assert of(LoadBalancing(), [gates(F.one_hot(equal, 3))], [0] * 4).item() == pytest.approx(1)
    assert of(Importance(), [gates(F.one_hot(equal, 3))], [0] * 4).item() == pytest.approx(0, abs=1e-12)


def test_balance_is_below_one_where_shares_and_weights_disagree() -> None:
    """Six tokens prefer expert 0 by a hair, four expert 1 entirely: f = (.6, .4), P = (.306, .694)."""
    g = torch.tensor([[[0.51, 0.49]] * 6 + [[0.0, 1.0]] * 4])
    assert of(LoadBalancing(), [gates(g)], [0]).item() == pytest.approx(2 * (0.6 * 0.306 + 0.4 * 0.694))


def test_one_expert_for_all_is_the_worst_balance() -> None:
    g = F.one_hot(torch.zeros(4, 5, dtype=torch.int64), 3)
    assert of(LoadBalancing(), [gates(g)], [0] * 4).item() == pytest.approx(3)
    assert of(Importance(), [gates(g)], [0] * 4).item() == pytest.approx(2)  # CV^2 of (n, 0, 0)


@pytest.mark.parametrize("regularizer", [LoadBalancing(), Importance()], ids=lambda r: r.kind)
def test_descending_evens_out_the_experts(regularizer: Regularizer) -> None:
    scores = torch.randn(8, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    (scores.data[..., 0]).add_(2.0)  # a collapse on the first expert
    layer = gates(scores.detach().softmax(-1)).layer

    def record() -> Recorded:
        g = scores.softmax(-1)
        return Recorded(layer, Gates(g, g, None))

    before = record().gates.weights.mean((0, 1)).max()
    for _ in range(50):
        (gradient,) = torch.autograd.grad(of(regularizer, [record()], [0] * 8), scores)
        scores.data -= 50 * gradient
    assert record().gates.weights.mean((0, 1)).max() < before - 0.2


def test_classification_is_least_for_gates_that_name_the_threat() -> None:
    right = F.one_hot(torch.tensor(LABELS), 3).double()
    assert of(Classification(), [recorded_gates(right.unsqueeze(1).expand(-1, 4, -1), right)]).item() == 0
    for seed in range(4):
        assert of(Classification(), [random_gates(experts=3, seed=seed)]) > 0
    wrong = right.roll(1, dims=1)
    assert of(Classification(), [recorded_gates(wrong.unsqueeze(1), wrong)]).isfinite()


def test_classification_uses_the_parts_that_a_gate_has() -> None:
    both = random_gates(experts=3)
    u, v = both.gates.local, both.gates.global_
    parts = [of(Classification(), [Recorded(both.layer, g)]) for g in (Gates(u, u, None), Gates(u, None, v))]
    torch.testing.assert_close(sum(parts), of(Classification(), [both]))


def test_classification_needs_an_expert_for_every_threat() -> None:
    with pytest.raises(UserError, match=r"one expert for each of the 3 threats, not 4; set experts\.experts=3"):
        of(Classification(), [random_gates(experts=4)])


NATURAL = [Diversification(), Diversification(estimate="unbiased"), Diversification(distance="kl"), Classification()]


@pytest.mark.parametrize("regularizer", NATURAL, ids=repr)
def test_without_threats_to_part_the_loss_is_zero_with_a_gradient_of_zeros(regularizer: Regularizer) -> None:
    """Natural epochs: whatever the number of experts; not without gradient, for which several processes would wait."""
    record = random_gates(experts=4)
    u, v = record.gates.local.requires_grad_(), record.gates.global_.requires_grad_()
    g = 0.5 * u + 0.5 * v.unsqueeze(1)
    loss = regularizer.loss([Recorded(record.layer, Gates(g, u, v))], torch.zeros(7, dtype=torch.int64), 1)
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(loss, (u, v)))


@pytest.mark.parametrize("regularizer", [LoadBalancing(), Importance()], ids=lambda r: r.kind)
def test_threats_do_not_matter_to_balance(regularizer: Regularizer) -> None:
    records = [random_gates()]
    assert of(regularizer, records, [0] * 7, threats=1) == of(regularizer, records)


# What the loss trains


class Tokens(nn.Module):
    """Images (B, 1, 4, 4) as four tokens through two layers, with two convolutions in front."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 4, 3, padding=1)
        self.one, self.two = nn.Linear(16, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(self.stem(x).tanh()).tanh().flatten(2)
        return self.head(self.two(self.one(h).tanh()).tanh().mean(1))


SETTINGS: dict[str, Experts] = {
    "low-rank": LowRank(experts=3, rank=2, layers=("one", "two")),
    "low-rank, trainable projection": LowRank(experts=3, rank=2, layers=("one", "two"), projection="trainable"),
    "low-rank, learned coefficient": LowRank(
        experts=3, rank=2, layers=("one", "two"), gate=DualScale(coefficient="learned")
    ),
    "convolution": LowRank(experts=3, rank=1, layers=("conv",)),
    "adapter": Adapters(experts=3, rank=2, layers=("one", "two")),
    "ffn": FeedForward(experts=3, layers=("one", "two"), gate=DualScale()),
}
REGULARIZERS: list[Regularizer] = [
    Diversification(),
    Diversification(estimate="unbiased", projected="mean"),
    Diversification(distance="cosine"),
    Diversification(distance="wasserstein"),
    LoadBalancing(),
    Importance(),
    Classification(),
]


def tokens_model(settings: Experts) -> nn.Module:
    """Grown experts: a loss on one layer's gates moves everything before it."""
    torch.manual_seed(0)
    model = settings.inject(Tokens()).double()
    for layer in expert_layers(model).values():
        for name, parameter in layer.named_parameters():
            if name not in layer.shared and parameter.requires_grad and "logit" not in name:
                nn.init.normal_(parameter, std=0.5)
    return model


X = torch.rand(9, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.arange(9)
THREATS = torch.tensor([0, 1, 2] * 3)


def gradients(model: nn.Module, regularizer: Regularizer) -> dict[str, Tensor]:
    """Of cross-entropy plus weighted regularizer, through a method's training forward."""
    context = context_of(model, threats=budgets(1, 1, 1), attack=PGD(steps=0), regularizer=regularizer)
    model.zero_grad()
    training_forward(context, X, Y, THREATS).loss.backward()
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is not None for p in wanted.values())
    return {name: p.grad.clone() for name, p in wanted.items()}


def test_checkpointing_that_hides_the_gates_from_their_loss_is_refused() -> None:
    class Checkpointed(nn.Module):
        def __init__(self, inner: nn.Module, reentrant: bool) -> None:
            super().__init__()
            self.inner, self.reentrant = inner, reentrant

        def forward(self, x: Tensor) -> Tensor:
            return torch.utils.checkpoint.checkpoint(self.inner, x.requires_grad_(), use_reentrant=self.reentrant)

    kind = next(kind for kind in SETTINGS if "trainable" not in kind)
    plain = gradients(tokens_model(SETTINGS[kind]), REGULARIZERS[0])
    kept = gradients(Checkpointed(tokens_model(SETTINGS[kind]), reentrant=False), REGULARIZERS[0])
    for name, gradient in plain.items():
        torch.testing.assert_close(kept[f"inner.{name}"], gradient)
    with pytest.raises(UserError, match=r"recorded without gradient.*use_reentrant=False"):
        gradients(Checkpointed(tokens_model(SETTINGS[kind]), reentrant=True), REGULARIZERS[0])


@pytest.mark.parametrize(
    ("regularizer", "kind"),
    [(r, kind) for r in REGULARIZERS for kind in SETTINGS if r.projects or "trainable" not in kind],
    ids=lambda value: value if isinstance(value, str) else getattr(value, "distance", value.kind),
)
def test_gradient_gates_leaves_everything_else_to_the_cross_entropy(regularizer: Any, kind: str) -> None:
    """To the last bit; with ``backbone`` the layers before a gate move too."""
    model = tokens_model(SETTINGS[kind])
    alone = gradients(model, regularizer.model_copy(update={"weight": 0.0, "gradient": "gates"}))
    own = gradients(model, regularizer.model_copy(update={"weight": 3.0, "gradient": "gates"}))
    all_of_it = gradients(model, regularizer.model_copy(update={"weight": 3.0}))
    gate = {name for name in alone if ".gate." in name or ".projection." in name}
    moved = {name for name in alone if not torch.equal(own[name], alone[name])}
    assert moved <= gate
    assert any(name.endswith("local.weight") for name in moved)
    last = "conv" if kind == "convolution" else "two"
    for name in (name for name in gate if name.startswith(last)):  # nothing comes after it
        torch.testing.assert_close(own[name], all_of_it[name])
    before = {"stem.weight"} if last == "conv" else {"one.weight" if kind != "ffn" else "one.networks.0.weight"}
    assert before <= {name for name in alone if not torch.allclose(all_of_it[name], alone[name], atol=1e-12)}


# Several processes

CASES = [*REGULARIZERS, Diversification(distance="kl", pairs="unordered")]
BATCH = torch.randn(8, 2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
UNEVEN = torch.tensor([0, 0, 0, 1, 0, 1, 2, 1])  # halves: threats 0 0 0 1 and 0 1 2 1


def train_step(regularizer: Regularizer, model: nn.Module, called: nn.Module, rows: slice) -> dict[str, Any]:
    with record_gates(model) as recorder:
        out = called(BATCH[rows])
    penalty = regularizer.loss(recorder.complete(), UNEVEN[rows], 3)
    model.zero_grad()
    (out.square().mean() + penalty).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    return {"penalty": penalty.detach(), "gradients": found}


def one_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(THREADS)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for number, regularizer in enumerate(CASES):
        model = pair_of_blocks("frozen")
        wrapped = nn.parallel.DistributedDataParallel(model)
        torch.save(train_step(regularizer, model, wrapped, slice(4 * rank, 4 * rank + 4)), f"{folder}/{number}-{rank}")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_have_every_loss_and_gradient_of_one(tmp_path: Path) -> None:
    in_two_processes(one_of_two, str(tmp_path))
    for number, regularizer in enumerate(CASES):
        model = pair_of_blocks("frozen")
        one = train_step(regularizer, model, model, slice(None))
        halves = [torch.load(tmp_path / f"{number}-{rank}") for rank in range(2)]
        mean_of_halves = sum(half["penalty"] for half in halves) / 2
        torch.testing.assert_close(mean_of_halves, one["penalty"])
        if not isinstance(regularizer, Classification):  # a mean over examples needs no message
            torch.testing.assert_close(halves[0]["penalty"], halves[1]["penalty"])
        for half in halves:
            assert half["gradients"].keys() == one["gradients"].keys()
            for name, gradient in one["gradients"].items():
                torch.testing.assert_close(half["gradients"][name], gradient, msg=f"{regularizer!r}: {name}")


# Settings


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        ({"gate": "uniform"}, r"gate: uniform has no parameters .* add regularizer: null"),
        ({"projection": "trainable", "regularizer": "load-balancing"}, r"trainable needs a diversification loss"),
        ({"projection": "trainable", "regularizer": {"distance": "kl"}}, r"trainable needs .* use projection: frozen"),
        ({"projection": "trainable", "regularizer": None}, r"trainable needs .* use projection: frozen"),
        ({"experts": 4, "regularizer": "classification"}, r"experts.regularizer: .* each of the 3 threats, not 4; set"),
        ({"regularizer": {"distance": "cosine", "estimate": "unbiased"}}, r"are for distance: l2; leave them out"),
        ({"regularizer": {"distance": "kl", "projected": "mean"}}, r"are for distance: l2; leave them out"),
        ({"regularizer": "balance"}, r"unknown regularizer kind 'balance'.*load-balancing"),
        ({"kind": "ffn", "rank": None, "experts": 2, "top": 3}, r"top: 3 exceeds the 2 experts"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_meant_are_refused_before_a_run_starts(experts: dict[str, Any], message: str) -> None:
    settings = {key: value for key, value in ({"rank": 2} | experts).items() if key != "rank" or value is not None}
    with pytest.raises(UserError, match=message):
        parse(changed(experts=settings))


def test_classification_goes_with_as_many_experts_as_threats() -> None:
    assert parse(changed(experts={"experts": 3, "rank": 2, "regularizer": "classification"})).experts is not None
    one = changed(
        experts={"rank": 2, "regularizer": "classification"}, threats=[{"kind": "lp", "norm": "L2", "eps": 1}]
    )
    assert parse(one).experts is not None


@pytest.mark.parametrize(
    "gate", [DualScale(coefficient="inverted", pool="cls"), Local(), Global(pool="patches"), Uniform()]
)
@pytest.mark.parametrize("build", [LowRank, Adapters, FeedForward])
def test_every_setting_survives_the_config_file(build: Any, gate: Any) -> None:
    experts = build(gate=gate, regularizer=None if isinstance(gate, Uniform) else LoadBalancing(gradient="gates"))
    config = parse(changed(experts=experts.dump()))
    assert config.experts == experts
    assert parse(config.dump()).experts == experts


@pytest.mark.parametrize(
    "settings", [{"distance": "l1"}, {"tokens": "cls"}, {"estimate": "biased"}, {"gradient": "no"}]
)
def test_unknown_choices_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        Diversification(**settings)


def test_load_balancing_has_the_weight_of_its_source_and_the_others_the_papers() -> None:
    assert LoadBalancing().weight == 0.5
    assert Importance().weight == Classification().weight == Diversification().weight == 0.1
    assert isinstance(recorded_gates(torch.ones(1, 1, 1), torch.ones(1, 1)).layer, MixtureLinear)
