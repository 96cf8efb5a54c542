"""Captured functions: replayed to the last bit, bounded in number, refused with a reason; with a stand-in for CUDA."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from helpers.problems import case
from helpers.replay import Replay
from rome.core.graphs import Graphs


def graphs(**settings: Any) -> tuple[Graphs, Replay]:
    replay = settings.pop("capture", Replay())
    return Graphs(capture=replay, **settings), replay


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_function_runs_once_is_captured_then_and_replayed_from_then_on() -> None:
    own, replay = graphs()
    runs, weight = [], drawn(3, 3)

    def function(x: Tensor, y: Tensor) -> dict[str, Any]:
        runs.append(1)
        product = x @ weight
        return {"sum": (product + y).relu_(), "twice": [product, product], "rest": None}

    for seed in range(6):
        x, y = drawn(2, 3, seed=seed), drawn(2, 3, seed=seed + 9)
        expected = function(x, y)
        runs.clear()
        found = own.call("key", function, x, y)
        assert bool(runs) == (seed < 2)
        assert (replay.captures, own.count) == ((0, 0) if seed < 1 else (1, 1))
        assert torch.equal(found["sum"], expected["sum"])
        assert torch.equal(found["twice"][1], expected["twice"][1])
        assert found["twice"][0] is found["twice"][1] or seed < 1
        assert found["rest"] is None
        weight.mul_(1.5)  # read anew where it lies


def test_results_are_copies_unless_they_are_wanted_in_place() -> None:
    own, _ = graphs()
    first = [own.call("key", torch.sin, drawn(4, seed=seed)) for seed in range(4)]
    assert torch.equal(first[2], drawn(4, seed=2).sin())
    before = own.call("key", torch.sin, drawn(4, seed=8), in_place=True)
    own.call("key", torch.sin, drawn(4, seed=9))
    assert torch.equal(before, drawn(4, seed=9).sin())


def test_each_key_shape_type_and_mode_has_its_graph_up_to_the_limit(capsys: pytest.CaptureFixture[str]) -> None:
    own, replay = graphs(limit=3)

    def twice(key: str, x: Tensor) -> None:
        for _ in range(2):
            assert torch.equal(own.call(key, torch.cos, x), x.cos())

    twice("a", drawn(2))
    twice("a", drawn(2))
    twice("b", drawn(2))
    with torch.no_grad():
        twice("b", drawn(2))
    assert own.count == replay.captures == 3
    assert not capsys.readouterr().err
    for n in (3, 4):
        twice("b", drawn(n))
    assert own.count == 3
    assert capsys.readouterr().err.count("there are already 3 graphs") == 1  # said once
    own.release()
    twice("b", drawn(5))
    assert own.count == 1


def waits(x: Tensor) -> Tensor:
    return x * 2 if x.sum() > 0 else x


def masks(x: Tensor) -> Tensor:
    return x[x > 0].sum() + x


def counts(x: Tensor) -> Tensor:
    return x + x.nonzero().sum()


def own_generator(x: Tensor) -> Tensor:
    return x + torch.rand(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (waits, "it waits for the device: return x * 2 if x.sum() > 0 else x (test_graphs.py:"),
        (masks, "it waits for the device: return x[x > 0].sum() + x"),
        (counts, "it waits for the device: return x + x.nonzero().sum()"),
        (own_generator, "it draws numbers from a generator of its own"),
    ],
    ids=["waits", "masks", "counts", "generator"],
)
def test_what_no_graph_can_hold_runs_as_it_is_and_one_line_says_why(
    function: Callable[[Tensor], Tensor], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    own, replay = graphs()
    for seed in range(4):
        x = drawn(5, seed=seed)
        assert torch.equal(own.call("key", function, x), function(x))
    assert replay.captures == own.count == 0
    err = capsys.readouterr().err
    assert err.startswith(f"running without a CUDA graph, which is slower: {reason}")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "said"),
    [
        ("operation not permitted\nwhen capturing", "operation not permitted\n"),
        ("CUDA out of memory", "not enough memory"),
    ],
)
def test_a_capture_that_fails_changes_nothing(error: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    own, _ = graphs(capture=Replay(fail=error))
    norm, twin = (nn.BatchNorm1d(3).double() for _ in range(2))
    for seed in range(3):
        x = drawn(4, 3, seed=seed)
        assert torch.equal(own.call("key", norm, x, changed=norm.buffers()), twin(x))
    for one, other in zip(norm.buffers(), twin.buffers(), strict=True):
        assert torch.equal(one, other)
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


def test_running_statistics_and_random_numbers_move_as_without_a_graph() -> None:
    own, replay = graphs()
    one, two = (nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5)).double() for _ in range(2))
    for seed in range(5):
        x, found = drawn(6, 3, seed=seed), []
        for function in (lambda x: own.call("key", one, x, changed=one.buffers()), two):
            torch.manual_seed(seed)
            found += [function(x), torch.rand(2)]
        assert torch.equal(found[0], found[2])
        assert torch.equal(found[1], found[3])
    assert replay.captures == 1
    for a, b in zip(one.buffers(), two.buffers(), strict=True):
        assert torch.equal(a, b)


def test_an_error_in_the_middle_leaves_the_graphs_usable() -> None:
    own, replay = graphs()
    broken = [True]

    def function(x: Tensor) -> Tensor:
        if broken:
            raise ZeroDivisionError
        return x.exp()

    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            own.call("key", function, drawn(2))
    broken.clear()
    for _ in range(3):
        assert torch.equal(own.call("key", function, drawn(2)), drawn(2).exp())
    assert replay.captures == 1


def test_a_graph_whose_replay_gives_other_results_is_not_used(capsys: pytest.CaptureFixture[str]) -> None:
    own, _ = graphs(capture=lambda function: (lambda: None, function().zero_()))
    for seed in range(4):
        assert torch.equal(own.call("key", torch.sin, drawn(3, seed=seed)), drawn(3, seed=seed).sin())
    assert own.count == 0
    assert "its replay gave different results" in capsys.readouterr().err


def test_a_graph_that_changes_tensors_otherwise_is_not_used(capsys: pytest.CaptureFixture[str]) -> None:
    own, replay = graphs()
    weight, calls = torch.zeros(2), [0]

    def function(x: Tensor) -> Tensor:
        calls[0] += 1
        weight.add_(1 if calls[0] < 4 else 2)  # call 3 is recorded
        return x.exp()

    for seed, total in enumerate((1, 3, 5)):
        assert torch.equal(own.call("key", function, drawn(2, seed=seed), changed=[weight]), drawn(2, seed=seed).exp())
        assert weight.tolist() == [total, total]
    assert (own.count, replay.captures) == (0, 1)
    assert "its replay gave different results" in capsys.readouterr().err


def test_what_a_captured_function_calls_is_part_of_it() -> None:
    own, replay = graphs()

    def outer(x: Tensor) -> Tensor:
        return own.call("inner", torch.tanh, x) * 3

    for seed in range(4):
        assert torch.equal(own.call("outer", outer, drawn(2, seed=seed)), drawn(2, seed=seed).tanh() * 3)
    assert replay.captures == own.count == 1


def test_what_is_refused_is_known_before_the_call() -> None:
    own, _ = graphs()
    x, waits = drawn(2), lambda x: x * float(x.sum())
    for _ in range(3):
        assert own.replays("good", x)
        own.call("good", torch.exp, x)
    assert own.replays("bad", x)
    own.call("bad", waits, x)
    assert not own.replays("bad", x)
    assert own.replays("bad", drawn(3))


def test_graphs_are_gone_when_weights_lie_elsewhere_and_apart_by_state() -> None:
    own, replay = graphs()
    one, other = drawn(3), drawn(3)
    for weight, state, captures in ((one, "a", 1), (one, "a", 1), (one, "b", 2), (one, "a", 2), (other, "a", 3)):
        with case(state, captures), own.on([weight], [], state):
            assert own.ready
            for _ in range(2):
                own.call("key", torch.sin, drawn(2))
            assert replay.captures == captures
        assert not own.ready
    assert own.count == 1


def test_forward_and_backward_are_graphs_of_their_own() -> None:
    own, replay = graphs()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double().requires_grad_(False)
    for seed in range(5):
        found = []
        for function in (lambda x: own.differentiable("key", model, x), model):
            x = drawn(2, 4, seed=seed).requires_grad_()
            answer = function(x * 2)
            found.append(
                [answer, *(torch.autograd.grad(answer[:, k].sum(), x, retain_graph=True)[0] for k in range(3))]
            )
        for one, other in zip(*found, strict=True):
            assert torch.equal(one, other)
    assert replay.captures == 2
    assert own.news().startswith("1 CUDA graphs, captured in")
    assert own.news() == ""


def test_what_torch_says_of_waiting_counts_when_it_says_it_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On CUDA torch warns of every wait: libraries wait when they are used first, and the mode warns of itself."""

    warned, runs = [False], {"never": 0, "first": 0, "always": 0}

    def mode(value: object) -> None:
        warned[0] = value == "warn"
        text = "Synchronization debug mode is a prototype feature and does not yet detect all synchronizing operations"
        warnings.warn(text, UserWarning, stacklevel=1)

    monkeypatch.setattr("rome.core.capturable.cuda_in_use", lambda: [0])
    monkeypatch.setattr("torch.cuda.get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr("torch.cuda.set_sync_debug_mode", mode)

    def function(name: str) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            runs[name] += 1
            if warned[0] and (name == "always" or (name == "first" and runs[name] == 1)):
                warnings.warn("called a synchronizing CUDA operation (somewhere)", UserWarning, stacklevel=1)
            return x.sin()

        return run

    for name, captures in (("never", 1), ("first", 1), ("always", 0)):
        own, replay = graphs()
        for _ in range(4):
            own.call(name, function(name), drawn(2))
        assert replay.captures == captures
        assert bool(capsys.readouterr().err) == (name == "always")


def test_a_function_that_cannot_be_watched_runs_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    own, replay = graphs()
    norm, twin = (nn.BatchNorm1d(3).double() for _ in range(2))

    def function(x: Tensor) -> Tensor:
        answer = norm(x)
        if _get_current_dispatch_mode() is not None:
            raise RuntimeError("no modes in here")
        return answer

    for seed in range(3):
        x = drawn(4, 3, seed=seed)
        assert torch.equal(own.call("key", function, x, changed=norm.buffers()), twin(x))
    assert torch.equal(norm.running_mean, twin.running_mean)
    assert replay.captures == 0
    assert "is slower: no modes in here" in capsys.readouterr().err


def test_a_graph_that_leaves_little_memory_is_dropped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own, _ = graphs()
    monkeypatch.setattr("rome.core.graphs._crowded", lambda: True)
    for _ in range(3):
        assert torch.equal(own.call("key", torch.sin, drawn(2)), drawn(2).sin())
    assert own.count == 0
    assert "not enough memory for a graph" in capsys.readouterr().err
