"""E-AT: how often each threat is drawn, and what is counted."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import Field, PrivateAttr
from torch import Tensor, nn

from helpers.contexts import BUDGETS, context_of, network
from helpers.problems import Digits
from helpers.tiny_runs import STEPS, tiny, watched
from rome.attacks import APGD, PGD, Attack, AttackResult
from rome.core.errors import Interrupted, UserError
from rome.core.randomness import stream
from rome.experts import Diversification
from rome.methods import EAT, TrainContext
from rome.methods.eat import stratified
from rome.runs.folder import Run
from rome.threats import Threat
from rome.training.setup import train


class Rigged(Attack):
    """Moves nothing, and says that the first ``shares[name]`` of a threat's examples withstood it."""

    kind = "rigged"
    shares: dict[str, float] = Field(default_factory=dict)
    _met: list[tuple[str, int, int]] = PrivateAttr(default_factory=list)
    """Threat, examples, withstood: of every call."""

    @property
    def uses_noise(self) -> bool:
        return False

    def steps_for(self, threat: Threat) -> int:
        return 1

    def search(self, model: Any, x: Tensor, y: Tensor, groups: Any, noise: Tensor) -> AttackResult:
        robust = torch.zeros_like(y, dtype=torch.bool)
        for group in groups:
            examples = group.rows.stop - group.rows.start
            withstood = round(self.shares[group.threat.name] * examples)
            robust[group.rows][:withstood] = True
            self._met.append((group.threat.name, examples, withstood))
        return AttackResult(x, x, robust, torch.zeros_like(y, dtype=torch.float32))


def prepared(method: EAT, model: nn.Module | None = None, **settings: Any) -> TrainContext:
    model = model or nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    context = context_of(model, **settings)
    context = replace(context, threats=method.training_threats(tuple(BUDGETS), context.attack))
    method.prepare(context)
    return context


def update(method: EAT, context: TrainContext, n: int = 10, parts: int = 1) -> list[list[int]]:
    """One update; the threat labels of its accumulation steps."""
    labels = [
        method.loss(context, torch.zeros(n, 1, 2, 2), torch.zeros(n, dtype=torch.int64)).labels.tolist()
        for _ in range(parts)
    ]
    method.update_end(context)
    return labels


def start(method: EAT, context: TrainContext) -> None:
    """Updates until every threat has been counted."""
    for _ in range(100):
        update(method, context)
        if method.probabilities()[0] != method.probabilities()[1]:
            return
    raise AssertionError("the draw stays even")


# What is drawn


@pytest.mark.slow
@pytest.mark.parametrize(("linf", "l1"), [(0.8, 0.5), (0.1, 0.9)])
def test_batches_meet_threats_in_proportion_to_their_errors(linf: float, l1: float) -> None:
    method = EAT()
    context = prepared(method, attack=Rigged(shares={"Linf": linf, "L1": l1}))
    start(method, context)
    expected = (1 - linf) / ((1 - linf) + (1 - l1))
    assert method.probabilities().tolist() == pytest.approx([expected, 1 - expected])
    draws = [update(method, context)[0] for _ in range(1500)]
    assert all(len(set(labels)) == 1 for labels in draws)
    share = sum(labels[0] == 0 for labels in draws) / 1500
    assert share == pytest.approx(expected, abs=4 * (expected * (1 - expected) / 1500) ** 0.5)
    assert method.probabilities().tolist() == pytest.approx([expected, 1 - expected])


@pytest.mark.parametrize("per", ["batch", "example"])
def test_errors_count_from_the_beginning_over_all_that_was_attacked(per: Any) -> None:
    method, generator = EAT(per=per, threats=("L2", "Linf", "L1")), torch.Generator().manual_seed(0)
    context = prepared(method)
    seen = dict.fromkeys(("L2", "Linf", "L1"), 0)
    withstood = dict.fromkeys(seen, 0)
    for _ in range(40):
        shares = dict(zip(seen, torch.rand(3, generator=generator).tolist(), strict=True))
        context = replace(context, attack=Rigged(shares=shares))
        update(method, context, parts=2)
        assert isinstance(context.attack, Rigged)
        for name, examples, robust in context.attack._met:
            seen[name] += examples
            withstood[name] += robust
        if all(seen.values()):
            errors = [1 - withstood[name] / seen[name] for name in seen]
            assert min(errors) > 0
            assert method.probabilities().tolist() == pytest.approx([error / sum(errors) for error in errors])
        else:
            assert method.probabilities().tolist() == pytest.approx([1 / 3] * 3)
    assert sum(seen.values()) == 40 * 2 * 10


def test_the_draw_is_even_until_both_threats_have_been_drawn() -> None:
    differs = []
    for seed in range(300):
        method = EAT()
        context = prepared(method, attack=Rigged(shares={"Linf": 0.2, "L1": 0.9}), seed=seed)
        (first,) = {*update(method, context, n=5)[0]}
        assert method.probabilities().tolist() == [0.5, 0.5]
        (second,) = {*update(method, context, n=5)[0]}
        differs.append(first != second)
        assert (method.probabilities()[0] == 0.5) != differs[-1]
    assert sum(differs) == pytest.approx(150, abs=4 * 300**0.5 / 2)


def test_a_threat_without_an_error_is_not_given_up() -> None:
    method = EAT()
    context = prepared(method, attack=Rigged(shares={"Linf": 1.0, "L1": 0.5}))
    drawn = {update(method, context)[0][0] for _ in range(20)}
    assert drawn == {0, 1}
    assert method.probabilities().tolist() == [0.5, 0.5]
    context = replace(context, attack=Rigged(shares={"Linf": 0.9, "L1": 0.5}))
    start(method, context)
    assert 0 < method.probabilities()[0] < 0.1


@pytest.mark.parametrize("n", [1, 7, 24, 100])
def test_draws_per_example_are_stratified_and_in_random_order(n: int) -> None:
    probabilities = torch.tensor([0.05, 0.6, 0.35], dtype=torch.float64)
    source = stream(0, "threats")
    draws = torch.stack([stratified(probabilities, n, source) for _ in range(1200)])
    counts = (draws.unsqueeze(2) == torch.arange(3)).sum(dim=1)
    assert (counts >= (n * probabilities - 1e-9).floor()).all()
    assert (counts <= (n * probabilities + 1e-9).ceil()).all()
    deviation = 4.5 * (probabilities * (1 - probabilities) / 1200).sqrt()
    for position in {0, n // 2, n - 1}:
        shares = (draws[:, position].unsqueeze(1) == torch.arange(3)).double().mean(dim=0)
        assert ((shares - probabilities).abs() < deviation).all()


def test_a_threat_of_probability_zero_is_never_drawn() -> None:
    for which in range(3):
        probabilities = torch.zeros(3, dtype=torch.float64).index_fill(0, torch.tensor(which), 1)
        assert set(stratified(probabilities, 50, stream(0, "threats")).tolist()) == {which}


def test_with_a_regularizer_a_batch_holds_both_threats(digits: Digits) -> None:
    x, y = digits.train[0][:8].double(), digits.train[1][:8]
    for experts, per, threats in ((False, None, 1), (True, None, 2), (True, "batch", 1), (False, "example", 2)):
        method = EAT(per=per)
        regularizer = Diversification() if experts else None
        context = prepared(method, network(experts=experts), regularizer=regularizer)
        outcome = method.loss(context, x, y)
        assert len(outcome.labels.unique()) == threats
        if experts:
            assert (outcome.parts["regularizer"] < 0) == (threats == 2), "L_div has two threats, not the config's three"


@pytest.mark.parametrize("per", ["batch", "example"])
def test_processes_draw_their_rows_of_one_global_draw(per: Any) -> None:
    for seed in range(6):
        drawn = []
        for rank, world, n in ((0, 2, 4), (1, 2, 4), (0, 1, 8)):
            method = EAT(per=per)
            context = prepared(method, attack=Rigged(shares={"Linf": 0, "L1": 0}), rank=rank, world=world, seed=seed)
            drawn.append(update(method, context, n=n)[0])
        assert drawn[0] + drawn[1] == drawn[2]


def test_the_accumulation_steps_of_an_update_share_the_draw() -> None:
    method = EAT()
    context = prepared(method, attack=Rigged(shares={"Linf": 0.4, "L1": 0.5}))
    updates = [update(method, context, n=5, parts=3) for _ in range(20)]
    assert all(len({label for labels in parts for label in labels}) == 1 for parts in updates)
    assert {parts[0][0] for parts in updates} == {0, 1}
    # what an accumulation step finds counts only once the update is done
    before = method.probabilities()
    method.loss(context, torch.zeros(5, 1, 2, 2), torch.zeros(5, dtype=torch.int64))
    assert torch.equal(method.probabilities(), before)


# What is trained on and counted


@pytest.mark.parametrize("attack", [APGD(steps=4), PGD(steps=2, random_start=False)], ids=["apgd", "pgd"])
def test_the_loss_and_the_counts_are_those_of_the_attack_on_that_threat(attack: Attack, digits: Digits) -> None:
    x, y = digits.train[0][:40].double(), digits.train[1][:40]
    model = network(experts=False)
    y = torch.where(torch.arange(40) % 4 > 0, model(x).argmax(1), y)
    method = EAT()
    context = prepared(method, model, attack=attack)
    outcome = method.loss(context, x, y)
    method.update_end(context)
    (label,) = outcome.labels.unique().tolist()
    found = attack.run(model, x, y, (BUDGETS["Linf"], BUDGETS["L1"])[label])
    torch.testing.assert_close(outcome.loss.double(), F.cross_entropy(model(found.images), y), rtol=1e-6, atol=1e-6)
    assert method.state()["seen"][label] == 40
    assert 0 < method.state()["robust"][label] == found.robust.sum() < 40
    assert method.state()["seen"][1 - label] == 0


def test_counts_go_on_where_the_state_was_taken() -> None:
    def run(method: EAT, context: TrainContext, numbers: range) -> list[list[list[int]]]:
        labels = []
        for number in numbers:
            context.threat_stream.generator.manual_seed(number)  # as the loop does
            labels.append(update(method, context, n=4))
        return labels

    rigged = Rigged(shares={"Linf": 0.25, "L1": 0.75})
    whole, first, second = EAT(), EAT(), EAT()
    expected = run(whole, prepared(whole, attack=rigged), range(60))
    found = run(first, prepared(first, attack=rigged), range(25))
    context = prepared(second, attack=rigged)
    second.load_state(first.state())
    found += run(second, context, range(25, 60))
    assert found == expected
    assert second.state() == whole.state()


def test_threats_are_named_among_the_configs() -> None:
    with pytest.raises(UserError, match=r"eat trains on L0, which is missing from threats \(there are L1, L2, Linf\)"):
        tiny(method={"kind": "eat", "threats": ["Linf", "L0"]})
    with pytest.raises(UserError, match="L1, L1 are not distinct"):
        tiny(method={"kind": "eat", "threats": ["L1", "L1"]})
    with pytest.raises(UserError):
        EAT(threats=("L1",))
    chosen = EAT(threats=("L2", "L1")).training_threats(tuple(BUDGETS), PGD())
    assert [threat.name for threat in chosen] == ["L2", "L1"]


def test_a_checkpoint_holds_the_counts_since_the_natural_epochs(tmp_path: Path) -> None:
    strike = watched(lambda n: os.kill(os.getpid(), signal.SIGTERM) if n == STEPS + 3 else None)
    with pytest.raises(Interrupted):
        train(tiny(method="eat", experts=None, natural_epochs=1, accumulate=2), tmp_path, progress=strike)
    state = Run(tmp_path).load_checkpoint()["method"]
    assert sum(state["seen"]) == 3 * 12
    assert all(0 <= robust <= seen for robust, seen in zip(state["robust"], state["seen"], strict=True))
