"""Recomputed blocks: the same run to the last bit, with less stored."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers import small_models
from helpers.problems import rest_slow
from helpers.replay import Replay
from helpers.small_models import grow, tiny_vit
from helpers.tiny_runs import changed, same, tiny, two_processes, weights, without_times, write_yaml
from rome.attacks.engine import frozen, loss_and_gradient, set_gradient_batch_size
from rome.core.errors import Interrupted, UserError
from rome.core.graphs import Graphs
from rome.experts import add_experts, record_gates
from rome.models.checkpointing import checkpoint_blocks
from rome.training import setup
from rome.training.loop import Loop
from rome.training.setup import train

APGD = {"kind": "apgd", "steps": 2}
FEW = {"experts": 2, "rank": 2}
FEATURES = {"features": ["self"], "layers": ["blocks.0"], "steps": 2}
WIDE = {"name": "wide_resnet", "args": {"depth": 10, "width": 1}}
DROPPING = {"embed_dim": 16, "depth": 2, "num_heads": 2, "proj_drop_rate": 0.2, "drop_path_rate": 0.3}
RUNS: dict[str, dict[str, Any]] = {
    "RoME+RANDOM, its loss for the gates alone": {"experts": {**FEW, "regularizer": {"gradient": "gates"}}},
    "BatchNorm, RoME+MAX": {"model": WIDE, "method": "max", "experts": FEW, "data__train_limit": 24},
    "dropout and stochastic depth": {"model__args": DROPPING},
    "RoME+RANDOM": {},
    "bf16, accumulated": {"precision": "bf16", "accumulate": 2},
    "AVG": {"method": "avg"},
    "MSD": {"method": {"kind": "msd", "steps": 2}},
    "E-AT": {"method": "eat", "attack": APGD},
    "RAMP": {"method": "ramp", "attack": APGD},
    "RAMP with TRADES": {"method": {"kind": "ramp", "trades": 6}, "attack": APGD},
    "PAT": {"method": {"kind": "pat", **FEATURES}},
    "PAT+VR": {"method": {"kind": "vr", **FEATURES}},
    "MORE": {"method": "more", "experts": {"kind": "more", "experts": 3}},
    "feed-forward experts": {"experts": {"kind": "ffn"}},
    "feed-forward experts, all mixed": {"experts": {"kind": "ffn", "top": None}},
    "adapters": {"experts": {"kind": "adapter", **FEW}},
    "load balancing": {"experts": {**FEW, "regularizer": "load-balancing"}},
    "ResNet": {"model": {"name": "preact_resnet_18", "args": {"width": 4}}, "experts": FEW, "data__train_limit": 24},
    "Swin": {
        "model": {
            "name": "swin_tiny_patch4_window7_224", "img_size": 8, "patch_size": 1,
            "args": {"window_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [1, 1]},
        },
        "data__train_limit": 24,
    },
    "XCiT": {
        "model": {"name": "xcit_nano_12_p16_224", "img_size": 32, "args": {"depth": 2, "cls_attn_layers": 1}},
        "data__train_limit": 24,
    },
}  # fmt: skip


@pytest.mark.parametrize("changes", rest_slow(RUNS, 3))
def test_a_run_is_the_same_to_the_last_bit(changes: dict[str, Any], tmp_path: Path) -> None:
    """Losses and their parts at every update, and at the end weights and statistics."""
    changes = {"epochs": 2 if changes.get("method") == "more" else 1, **changes}
    alone = train(tiny(**changes), tmp_path / "alone")
    run = train(tiny(activation_checkpointing=True, **changes), tmp_path / "run")
    assert without_times(run.log()) == without_times(alone.log())
    assert same(weights(run.folder), weights(alone.folder))


@pytest.mark.parametrize(("changes", "graphs"), rest_slow([({}, 2), ({"model__args": DROPPING}, 1)], 1))
def test_graphs_hold_the_recomputation_but_where_it_draws_random_numbers(
    changes: dict[str, Any],
    graphs: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = tiny(activation_checkpointing=True, epochs=1, **changes)
    alone = train(config, tmp_path / "alone")
    monkeypatch.setattr(setup, "graphs_for", lambda *_: Graphs(capture=Replay()))
    run = train(config, tmp_path / "run")
    assert same(weights(run.folder), weights(alone.folder))
    assert f": {graphs} CUDA graphs" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_goes_on_in_the_middle_of_an_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny(activation_checkpointing=True, model__args=DROPPING)
    alone, update = train(config, tmp_path / "alone"), Loop._update

    def stopping(self: Loop, *arguments: Any) -> Any:
        self.signal = 15 if self.updates == 3 else 0
        return update(self, *arguments)

    monkeypatch.setattr(Loop, "_update", stopping)
    with pytest.raises(Interrupted):
        train(config, tmp_path / "run")
    monkeypatch.setattr(Loop, "_update", update)
    run = train(config, tmp_path / "run", resume=True)
    assert same(weights(run.folder), weights(alone.folder))


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"method": "max", "accumulate": 2}, {"method": "ramp", "attack": APGD}])
def test_two_processes_compute_the_same(changes: dict[str, Any], tmp_path: Path) -> None:
    found = []
    for recomputed in (False, True):
        settings = changed(name="run", activation_checkpointing=recomputed, epochs=1, **changes)
        config, out = write_yaml(tmp_path / f"{recomputed}.yaml", settings), tmp_path / str(recomputed)
        ended = [child.wait() for child in two_processes("train", config, "--out", out, logs=tmp_path / f"l{out.name}")]
        assert [process.code for process in ended] == [0, 0], ended
        found.append(weights(out))
    assert same(*found)


@pytest.mark.slow
def test_compiled_blocks_are_recomputed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def compile_it(self: nn.Module) -> None:
        self._compiled_call_impl = torch.compile(self._call_impl, backend="aot_eager")

    monkeypatch.setattr(nn.Module, "compile", compile_it)
    runs = [
        train(tiny(compile=True, activation_checkpointing=recomputed, epochs=1), tmp_path / str(recomputed))
        for recomputed in (False, True)
    ]
    torch._dynamo.reset()
    assert same(*(weights(run.folder) for run in runs))


def stored(forward: Callable[[], Tensor], model: nn.Module) -> int:
    """Bytes that a forward pass leaves for the backward pass, beside parameters and buffers."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    held: dict[int, tuple[Tensor, int]] = {}

    def pack(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in own:
            held[place] = (tensor, tensor.untyped_storage().nbytes())  # held, or its place would be another's
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(size for _, size in held.values())


def test_a_recomputed_block_stores_its_input_alone() -> None:
    x = torch.rand(4, 3, 32, 32)
    plain, recomputed = [], []
    for depth in (2, 4):
        model = tiny_vit(depth=depth).train()
        plain.append(stored(lambda model=model: model(x), model))
        checkpoint_blocks(model)
        recomputed.append(stored(lambda model=model: model(x), model))
    one = 4 * len(x) * 17 * 32  # float32, tokens, width
    assert recomputed[1] - recomputed[0] == 2 * one
    assert plain[1] - plain[0] > 2 * 14 * one, (
        "the inputs of two norms, four products and a GELU four times as wide, ..."
    )


def test_gates_are_recorded_once_and_keep_their_gradient() -> None:
    x = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    gradients = []
    for recomputed in (False, True):
        torch.manual_seed(0)
        model = grow(add_experts(tiny_vit().train(), experts=3, rank=2))
        if recomputed:
            assert checkpoint_blocks(model) == checkpoint_blocks(model) == 2
        with record_gates(model) as recorder:
            logits = model(x)
        records = len(recorder.records)
        sum(record.gates.weights[..., 0].sum() for record in recorder.complete()).backward(retain_graph=True)
        logits.square().sum().backward()  # a second recomputation, by another backward
        assert len(recorder.records) == records == 4
        gradients.append(
            {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
        )
    assert gradients[0].keys() == gradients[1].keys()
    assert same(*gradients)


def test_buffers_that_a_forward_changes_change_once() -> None:
    """Spectral norm's vectors too, whose values before the forward decide the weight."""
    found = []
    for recomputed in (False, True):
        torch.manual_seed(0)
        block = nn.Sequential(
            nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)), nn.BatchNorm1d(4, momentum=None)
        )
        model = nn.Sequential(nn.ModuleList([block, copy.deepcopy(block)]))
        if recomputed:
            checkpoint_blocks(model)
        x = torch.rand(5, 4)
        model[0][1](model[0][0](x)).square().sum().backward()
        found.append({**model.state_dict(), **{name: p.grad for name, p in model.named_parameters()}})
    assert same(*found)


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.add_(1))


def test_a_block_that_changes_its_input_is_refused() -> None:
    model = nn.Sequential(nn.Sequential(InPlace(), InPlace())).train()
    checkpoint_blocks(model)
    with pytest.raises(UserError, match="InPlace changes its input in place"):
        model(torch.rand(2, 3))


def test_a_model_without_blocks_is_refused(tmp_path: Path) -> None:
    own = {"name": f"{Path(small_models.__file__)}:SmallCNN", "num_classes": None}
    with pytest.raises(UserError, match="this one has none: leave it out"):
        train(tiny(model=own, activation_checkpointing=True, experts=None), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_copies_recompute_and_evaluation_does_not() -> None:
    model = tiny_vit()
    checkpoint_blocks(model)
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    twin = copy.deepcopy(model)
    assert repr(twin) == repr(tiny_vit())
    twin.blocks[0].mlp.register_forward_pre_hook(count)
    x = torch.rand(2, 3, 32, 32)
    twin.train()(x).sum().backward()
    assert calls == 2
    with frozen(twin):
        loss_and_gradient(twin, x, torch.tensor([0, 1]))
    assert calls == 3


def test_an_input_gradient_in_parts_is_that_of_the_whole() -> None:
    torch.manual_seed(0)
    model = tiny_vit().double().eval()
    x, y = torch.rand(7, 3, 32, 32, dtype=torch.float64), torch.arange(7)
    whole = loss_and_gradient(model, x, y)
    seen: list[int] = []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    set_gradient_batch_size(model, 3)
    for found, expected in zip(loss_and_gradient(model, x, y), whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert seen == [3, 3, 1]


@pytest.mark.parametrize("method", rest_slow(["max", {"kind": "msd", "steps": 2}, "eat"], 1))
def test_attacks_of_a_run_differentiate_so_many_at_once(
    method: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import rome.attacks.engine

    sizes, odds = [], rome.attacks.engine.log_odds

    def spy(logits: Tensor, y: Tensor) -> Tensor:
        if logits.requires_grad:
            sizes.append(len(y))
        return odds(logits, y)

    monkeypatch.setattr(rome.attacks.engine, "log_odds", spy)
    train(tiny(method=method, attack=APGD, attack_batch_size=5, epochs=1), tmp_path / "run")
    assert max(sizes) == 5
