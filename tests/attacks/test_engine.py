"""Attacks with graphs find what they find without, to the last bit, while weights, threats and settings change."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.problems import Problem, case, rest_slow
from helpers.replay import Replay
from helpers.small_models import grow, tiny_vit
from rome.attacks import APGD, PGD, Attack, FastLPA, Fog, Patch, SparseFool, StAdv
from rome.attacks.engine import frozen, graphed, logits_of, loss_and_gradient
from rome.attacks.lp.autoattack import APGDCE, APGDT, FABT, Square
from rome.attacks.lp.msd import steepest_descent
from rome.core.graphs import Graphs
from rome.experts import Diversification, add_experts, record_gates, set_routing
from rome.experts.more import ModelMixture
from rome.threats import AnyImage, LpBall, Perceptual, PerExample, Threat, budgets

BUDGETS = tuple(budgets(4, 0.2, 2 / 255))
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return grow(add_experts(tiny_vit(depth=1), experts=2, rank=2))


def batch(seed: int = 0, n: int = 6) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(seed)
    return torch.rand(n, 3, 32, 32, generator=draws), torch.randint(10, (n,), generator=draws)


def equal(one: Any, other: Any) -> bool:
    return all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(one, other, strict=True))


def trained_further(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.02)


def check(model: nn.Module, search: Callable[[nn.Module, int], Any], *, times: int = 4) -> None:
    """The search of a model that has graphs gives what it gives without, while the model learns in between."""
    twin = copy.deepcopy(model)
    for seed in range(times):
        with case(f"call {seed}"):
            assert equal(search(model, seed), search(twin, seed))
        for each in (model, twin):
            trained_further(each)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("attack", [PGD(steps={"L1": 2, "L2": 2, "Linf": 1}), APGD(steps=2)], ids=["pgd", "apgd"])
def test_a_whole_search_is_one_graph(attack: Attack, precision: torch.dtype, model: nn.Module) -> None:
    replay = Replay()

    def search(model: nn.Module, seed: int) -> Any:
        generator = torch.Generator().manual_seed(seed)
        with torch.autocast("cpu", precision, enabled=precision is not torch.float32):
            return attack.run(model, *batch(seed), PerExample(BUDGETS, LABELS), generator=generator)

    with graphed(model, Graphs(capture=replay)):
        check(model, search)
    assert replay.captures == 1


def test_a_search_that_waits_replays_its_steps(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = PGD.search

    def search(self: PGD, *arguments: Any) -> Any:
        found = plain(self, *arguments)
        assert float(found.images.sum()) > 0
        return found

    monkeypatch.setattr(PGD, "search", search)
    replay = Replay()
    with graphed(model, Graphs(capture=replay)):
        check(model, lambda model, seed: PGD(steps=2).run(model, *batch(seed), BUDGETS[2]))
    assert replay.captures == 1
    assert replay.replays > 4
    assert "it waits for the device: assert float(found.images.sum()) > 0" in capsys.readouterr().err


def test_the_path_of_msd_is_one_graph(model: nn.Module) -> None:
    replay = Replay()

    def search(model: nn.Module, seed: int) -> Any:
        return steepest_descent(model, *batch(seed), BUDGETS, (0.5, 0.05, 0.002), steps=2, percentile=99).run()

    with graphed(model, Graphs(capture=replay)):
        check(model, search)
    assert replay.captures == 1


def test_fast_lpa_searches_in_shapes_that_occur_again() -> None:
    """What the model classifies rightly changes from batch to batch; in float64, since batches of another size round
    differently."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, 4), nn.Tanh(), nn.Flatten(), nn.Linear(256, 2)).double()
    model.feature_layers = ("1",)  # type: ignore[assignment]
    attack, replay, right = FastLPA(steps=2, only_correct=True), Replay(), set()
    threat = PerExample((Perceptual(bound=0.3), Perceptual(bound=0.1)), torch.arange(24) % 2)
    twin = copy.deepcopy(model)
    with graphed(model, Graphs(capture=replay)):
        for seed in range(8):
            draws = torch.Generator().manual_seed(seed)
            x, y = batch(seed, n=24)[0].double(), torch.randint(2, (24,), generator=draws)
            right.add(int((model(x).argmax(1) == y).sum()))
            found, expected = (
                attack.run(each, x, y, threat, generator=torch.Generator().manual_seed(seed)) for each in (model, twin)
            )
            torch.testing.assert_close(found.images, expected.images, rtol=0, atol=1e-9)
            assert torch.equal(found.robust, expected.robust)
    assert len(right) > replay.captures > 0


@pytest.mark.parametrize("whole", [True, False])
def test_attacks_inside_of_a_frozen_model_read_what_it_joined(whole: bool, model: nn.Module) -> None:
    """As in an evaluation, which freezes the model around all of its attacks."""
    replay, attack, twin = Replay(), PGD(steps=2), copy.deepcopy(model)
    with graphed(model, Graphs(whole_searches=whole, capture=replay)), frozen(model):
        for seed in range(4):
            found, expected = (attack.run(each, *batch(seed), BUDGETS[2]) for each in (model, twin))
            assert equal(found, expected)
    assert replay.captures == 1
    assert replay.replays


class InFloat64(nn.Module):
    """A model of float64 for images and logits of float32."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x.double()).float()


@pytest.mark.parametrize("rows", rest_slow([4, 1], 1))
@pytest.mark.parametrize(
    "attack",
    [
        APGD(steps=2),
        APGDCE(iterations=5),
        APGDT(iterations=5, targets=2),
        FABT(iterations=2, targets=2),
        Square(queries=12),
        Fog(steps=3),
        StAdv(steps=3),
        SparseFool(),
        Patch(steps=3, size=2),
    ],
    ids=lambda attack: attack.kind,
)
def test_in_evaluation_steps_are_graphs_of_few_shapes(attack: Attack, rows: int, problem: Problem) -> None:
    """Rows that are added change nothing of the others' answers, but for the rounding of float64."""
    replay = Replay()
    norm = "L1" if attack.kind == "sparsefool" else "Linf"
    threat = LpBall(norm=norm, eps=0.02) if issubclass(LpBall, attack.accepts[0]) else AnyImage()
    model, x, y = InFloat64(problem.model), problem.x[:7].float(), problem.y[:7]

    def search(seed: int) -> Any:
        return attack.run(model, x, y, threat, generator=torch.Generator().manual_seed(seed))

    expected = search(0)
    with graphed(model, Graphs(whole_searches=False, rows=rows, capture=replay)):
        for _ in range(2):
            found = search(0)
            assert torch.equal(found.robust, expected.robust)
            torch.testing.assert_close(found.images, expected.images, rtol=0, atol=0 if rows == 1 else 1e-6)
    assert replay.captures > 0


def test_casts_lie_where_graphs_read_them_and_follow_the_weights(model: nn.Module) -> None:
    graphs, seen = Graphs(capture=Replay()), []
    with graphed(model, graphs):
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16), frozen(model):
                casts = [p for p in model.parameters() if p.dtype == torch.bfloat16]
                seen.append([cast.data_ptr() for cast in casts])
                assert casts
            weights = [p for p in model.parameters() if p.ndim > 1 and p.dtype == torch.float32]
            for cast in casts:
                assert any(w.shape == cast.shape and torch.equal(w.detach().bfloat16(), cast) for w in weights)
            trained_further(model)
            casts.clear()
    assert seen[0] == seen[1]


def test_a_model_that_computes_otherwise_has_other_graphs(model: nn.Module) -> None:
    replay = Replay()
    graphs = Graphs(capture=replay)
    with graphed(model, graphs):
        for routing, captures in (("learned", 1), ("inverse", 2), ("learned", 2), ("inverse", 2)):
            set_routing(model, routing)  # type: ignore[arg-type]
            check(model, lambda model, seed: PGD(steps=1).run(model, *batch(seed), BUDGETS[2]), times=3)
            assert replay.captures == captures
        set_routing(model, "none")  # brings weights of its own
        check(model, lambda model, seed: PGD(steps=1).run(model, *batch(seed), BUDGETS[2]), times=3)
        assert (replay.captures, graphs.count) == (3, 1)
    assert graphs.count == 0


def test_the_experts_of_a_mixture_of_networks_have_graphs_of_their_own() -> None:
    torch.manual_seed(0)
    mixture = ModelMixture(nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)), experts=2)
    for parameter in mixture.parameters():
        nn.init.normal_(parameter, std=0.02)
    replay = Replay()
    with graphed(mixture, Graphs(capture=replay)):
        for _ in range(3):
            for expert in (0, 1):
                with mixture.separate_experts(expert):
                    check(mixture, lambda model, seed: PGD(steps=1).run(model, *batch(seed), BUDGETS[2]), times=1)
    assert replay.captures == 2


def test_gates_are_recorded_though_there_are_graphs(model: nn.Module) -> None:
    with graphed(model, Graphs(capture=Replay())):
        for _ in range(3):
            with record_gates(model) as recorder:
                PGD(steps=2).run(model, *batch(), BUDGETS[2], verdict=False)
            assert len(recorder.records) == 2 * len(recorder.gates)
            assert Diversification().loss(recorder.complete(), LABELS, 3).isfinite()


def test_outside_of_a_frozen_model_nothing_is_replayed(problem: Problem) -> None:
    model, x, y = problem(4)
    replay = Replay()
    with graphed(model, Graphs(capture=replay)):
        for _ in range(3):
            loss_and_gradient(model, x, y)
            logits_of(model, x)
        assert replay.captures == 0
        for _ in range(3):
            with frozen(model), frozen(model):
                loss_and_gradient(model, x, y)
        assert replay.captures == 1
    threat: Threat = LpBall(norm="L2", eps=0.1)
    PGD(steps=1).run(model, x, y, threat)
    assert replay.captures == 1


def test_functions_programs_and_models_on_several_devices_are_called_as_they_are(problem: Problem) -> None:
    model, x, y = problem(4)
    traced = torch.jit.trace(model, x, check_trace=False)
    for each in (model.forward, traced, nn.Sequential(traced), nn.DataParallel(model)):
        replay = Replay()
        with graphed(each, Graphs(capture=replay)):
            for _ in range(3):
                PGD(steps=1).run(each, x, y, LpBall(norm="L2", eps=0.1))
        assert replay.captures == 0


def test_graphs_inside_of_others_give_way_to_them_again(problem: Problem) -> None:
    model, x, y = problem(4)
    outer, inner = Replay(), Replay()
    with graphed(model, Graphs(capture=outer)):
        for replay in (outer, inner, outer):
            with graphed(model, Graphs(capture=inner) if replay is inner else None):
                for _ in range(3):
                    PGD(steps=1).run(model, x, y, LpBall(norm="L2", eps=0.1))
            assert (outer.captures, inner.captures) == ((1, 0) if replay is outer and not inner.captures else (1, 1))
