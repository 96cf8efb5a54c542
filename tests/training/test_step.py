"""Training with graphs computes what training without computes, to the last bit; with a stand-in for CUDA's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from helpers.contexts import context_of
from helpers.problems import rest_slow
from helpers.replay import Replay
from helpers.small_models import tiny_vit
from helpers.tiny_runs import changed, same, tiny, weights
from rome.attacks import PGD
from rome.attacks.engine import frozen, graphed, loss_and_gradient
from rome.core.errors import Interrupted, UserError
from rome.core.graphs import Graphs
from rome.experts import add_experts, record_gates
from rome.methods import Random
from rome.methods.base import set_lr
from rome.models.compiling import compile_blocks, repeated_blocks
from rome.runs import optim
from rome.runs.config import parse
from rome.runs.folder import Run
from rome.training import setup
from rome.training.loop import Loop
from rome.training.setup import train
from rome.training.step import SingleProcess, Step

APGD = {"kind": "apgd", "steps": 2}
RESNET = {"name": "preact_resnet_18", "args": {"width": 4}}
RUNS: dict[str, tuple[dict[str, Any], int]] = {
    "RANDOM in bf16, validated": (
        {"precision": "bf16", "natural_epochs": 1, "validation": {"n": 12, "steps": 1}, "batch_size": 12}, 3,
    ),
    "MAX, accumulated": ({"method": "max", "accumulate": 2}, 2),
    "BatchNorm": ({"model": RESNET, "experts": None, "data__train_limit": 48}, 1),
    "RANDOM": ({}, 1),
    "E-AT": ({"method": "eat", "attack": APGD}, 3),
    "AVG": ({"method": "avg", "experts": None}, 1),
    "MAX per batch": ({"method": {"kind": "max", "per": "batch"}}, 1),
    "MSD": ({"method": {"kind": "msd", "steps": 2}}, 1),
    "RAMP": ({"method": "ramp", "attack": APGD}, 2),
    "RAMP with TRADES": ({"method": {"kind": "ramp", "trades": 6}, "attack": APGD}, 2),
    "MORE": ({"method": "more", "experts": {"kind": "more", "experts": 3}}, 4),
    "PAT": ({"method": {"kind": "pat", "features": ["self"], "layers": ["blocks.0"], "steps": 2}}, 2),
    "dropout": ({"model__args": {"embed_dim": 16, "depth": 2, "num_heads": 2, "proj_drop_rate": 0.2}}, 1),
}  # fmt: skip


@pytest.fixture(autouse=True)
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Optimizers are fused, as on CUDA."""
    monkeypatch.setattr(optim, "fuses", lambda model: True)


def with_graphs(monkeypatch: pytest.MonkeyPatch, capture: Replay) -> None:
    monkeypatch.setattr(setup, "graphs_for", lambda *_: Graphs(capture=capture))


def trained_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replay: Replay | None = None, **changes: Any
) -> tuple[Replay, Run]:
    """Train without graphs and with them, and compare logs and weights to the last bit; return the replays and the
    run with graphs."""
    replay = replay or Replay()
    alone = train(tiny(**changes), tmp_path / "alone")
    with_graphs(monkeypatch, replay)
    run = train(tiny(**changes), tmp_path / "run")
    assert log(run) == log(alone)
    assert same(weights(run.folder), weights(alone.folder))
    return replay, run


def log(run: Run) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in ("seconds", "images_per_second")} for line in run.log()]


@pytest.mark.parametrize(("changes", "captures"), rest_slow(RUNS, 4))
def test_a_run_is_the_same(
    changes: dict[str, Any], captures: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replay, _ = trained_alike(tmp_path, monkeypatch, **changes)
    assert replay.captures == captures


@pytest.mark.parametrize("optimizer", ["sgd", pytest.param({"kind": "adamw", "gates_lr": 3}, marks=pytest.mark.slow)])
def test_an_update_is_one_graph(optimizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attack, forward, gradients and optimizer: the first update runs by itself, the second is watched."""
    replay, run = trained_alike(tmp_path, monkeypatch, optimizer=optimizer)
    assert replay.captures == 1
    updates = sum(line["event"] == "update" for line in run.log())
    assert replay.replays == 1 + updates - 2  # one to compare


def test_an_optimizer_that_is_not_fused_steps_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim, "fuses", lambda model: False)
    replay, _ = trained_alike(tmp_path, monkeypatch)
    assert replay.captures == 2  # attack and objective


def test_a_run_goes_on_in_the_middle_of_an_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = train(tiny(), tmp_path / "alone")
    with_graphs(monkeypatch, Replay())
    update = Loop._update

    def stopping(self: Loop, *arguments: Any) -> Any:
        if self.updates == 3:
            self.signal = 15
        return update(self, *arguments)

    monkeypatch.setattr(Loop, "_update", stopping)
    with pytest.raises(Interrupted):
        train(tiny(), tmp_path / "run")
    monkeypatch.setattr(Loop, "_update", update)
    run = train(tiny(), tmp_path / "run", resume=True)
    assert log(run) == log(alone)
    assert same(weights(run.folder), weights(alone.folder))


def test_a_method_with_a_loss_of_its_own_replays_its_attacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = train(tiny(), tmp_path / "alone")
    replay = Replay()
    with_graphs(monkeypatch, replay)
    monkeypatch.setattr(
        Random, "loss", lambda self, context, x, y: self.objective(context, self.perturb(context, x, y))
    )
    run = train(tiny(), tmp_path / "run")
    assert same(weights(run.folder), weights(alone.folder))
    assert replay.captures == 1


def test_gradients_are_laid_out_as_their_parameters() -> None:
    """Images in channels-last order give the gradients of weights another order, and a fused optimizer reads memory."""

    def updated(replayed: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(108, 4))
        model.register_forward_pre_hook(lambda _, x: x[0].to(memory_format=torch.channels_last))
        context = context_of(model, attack=PGD(steps=1))
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        set_lr(optimizer, 1e-3)
        step = Step(tiny(), SingleProcess(torch.device("cpu")), optimizer)
        batches = ((torch.rand(6, 2, 8, 8), torch.arange(6) % 4) for _ in range(5))
        with graphed(model, Graphs(capture=Replay()) if replayed else None):
            for _ in range(5):
                step(Random(), context, batches)
        return list(model.parameters())

    assert all(map(torch.equal, updated(True), updated(False)))


def test_an_objective_that_waits_leaves_the_attack_a_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    objective = Random.objective

    def waiting(self: Random, *arguments: Any) -> Any:
        outcome = objective(self, *arguments)
        assert float(outcome.loss.detach()) > 0
        return outcome

    monkeypatch.setattr(Random, "objective", waiting)
    replay, _ = trained_alike(tmp_path, monkeypatch)
    assert replay.captures == 1
    assert capsys.readouterr().err.count("it waits for the device: assert float(outcome") == 1


def test_where_every_capture_fails_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained_alike(tmp_path, monkeypatch, Replay(fail="CUDA error: operation not permitted when stream is capturing"))
    assert capsys.readouterr().err.count("without a CUDA graph, which is slower: CUDA error: operation not") == 1


def test_graphs_are_for_cuda(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="graphs: true needs a CUDA device, and this run is on cpu; use graphs: auto"):
        train(tiny(graphs=True), tmp_path / "run")
    assert not (tmp_path / "run" / "config.yaml").exists()
    assert tiny().graphs == "auto"
    assert parse(changed(graphs=False)).graphs is False
    with pytest.raises(UserError, match="graphs"):
        parse(changed(graphs="always"))


# Compiled blocks


def test_blocks_that_repeat_are_found() -> None:
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=3)
    assert repeated_blocks(vit) == list(vit.blocks)
    swin = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=8, depths=(2, 2), num_heads=(1, 1)
    )
    assert [type(block).__name__ for block in repeated_blocks(swin)] == 4 * ["SwinTransformerBlock"]
    resnet = timm.create_model("resnet18")
    assert len(repeated_blocks(resnet)) == 8
    assert repeated_blocks(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))) == []
    assert compile_blocks(nn.Sequential(nn.Linear(2, 2), nn.ReLU())) == 0


@pytest.mark.slow
@pytest.mark.parametrize("experts", [False, True], ids=["plain", "RoME"])
def test_a_deeper_model_takes_no_more_programs(experts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = []
    for depth in (2, 5):
        torch._dynamo.reset()
        model, counter = tiny_vit(depth=depth), CompileCounterWithBackend("eager")
        if experts:
            add_experts(model)

        def compile_it(self: nn.Module, backend: Any = counter) -> None:
            self._compiled_call_impl = torch.compile(self._call_impl, backend=backend)

        monkeypatch.setattr(nn.Module, "compile", compile_it)
        assert compile_blocks(model) == depth
        x, y = torch.rand(4, 3, 32, 32), torch.arange(4)
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16), frozen(model):
                loss_and_gradient(model, x, y)
            if experts:
                with record_gates(model) as recorder:
                    loss = model(x).sum()
                assert len(recorder.complete()) == 2 * depth
            else:
                loss = model(x).sum()
            loss.backward()
        programs.append(counter.frame_count)
    torch._dynamo.reset()
    assert programs[0] == programs[1] > 0
