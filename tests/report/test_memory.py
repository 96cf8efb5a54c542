"""The memory of a config, against closed forms and against what torch allocates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from helpers.problems import rest_slow
from helpers.tiny_runs import tiny
from rome.core.device import placed
from rome.report.cost import parameters, updates
from rome.report.memory import architecture, peak_memory
from rome.runs.config import Config, load
from rome.runs.experiments import files, path_of

WIDE = {"name": "wide_resnet", "args": {"depth": 10, "width": 2}}


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "states"), [("adamw", 2), ("sgd", 1), ({"kind": "sgd", "momentum": 0}, 0)])
def test_between_updates_weights_buffers_states_and_the_batch_are_there(optimizer: Any, states: int) -> None:
    config = tiny(optimizer=optimizer, accumulate=2)
    model, shape, _ = architecture(config)
    counts = parameters(model)
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    batch = 6 * (4 * shape[1] * shape[2] + 8)
    expected = 4 * (counts["parameters"] + states * counts["trainable"]) + buffers + batch
    assert peak_memory(config)["state"] == expected


def allocated(config: Config) -> int:
    """Bytes above those between two updates, at the peak of one on this CPU, as torch's profiler sees its allocator."""
    torch.manual_seed(0)
    model, shape, classes = architecture(config)
    ((update, _),) = updates(config, placed(model, torch.device("cpu")), shape, classes, torch.device("cpu"))
    update()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        update()
    now, peak = 0, 0
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


MEASURED: dict[str, dict[str, Any]] = {
    "RoME+MAX, recomputed and in parts": {"method": "max", "activation_checkpointing": True, "attack_batch_size": 32},
    "RoME+RANDOM": {},
    "RoME+MAX, APGD": {"method": "max", "attack": {"kind": "apgd", "steps": 3}},
    "RAMP": {"method": {"kind": "ramp", "trades": 6}, "attack": {"kind": "apgd", "steps": 2}},
    "bf16": {"precision": "bf16", "method": "avg"},
    "stochastic depth": {"model__args": {"embed_dim": 16, "depth": 2, "num_heads": 2, "drop_path_rate": 0.3}},
    "convolutions": {"model": WIDE, "experts": None, "method": "max"},
    "convolutions, recomputed": {"model": WIDE, "experts": None, "activation_checkpointing": True},
}


@pytest.mark.parametrize("changes", rest_slow(MEASURED, 1))
def test_the_peak_is_what_torch_allocates(changes: dict[str, Any]) -> None:
    """But for what single kernels take beside, which counts on a model so small."""
    config = tiny(batch_size=60, **changes)
    found = peak_memory(config)
    assert 0.99 < allocated(config) / (found["training"] - found["state"]) < 1.3


@pytest.mark.slow
def test_each_setting_lowers_its_own_peak() -> None:
    plain, parts, again, half = (
        peak_memory(tiny(method="max", experts=None, batch_size=48, **settings))
        for settings in ({}, {"attack_batch_size": 16}, {"activation_checkpointing": True}, {"accumulate": 2})
    )
    assert parts["attack"] < plain["attack"] / 3
    assert parts["update"] == plain["update"]
    assert again["update"] < 0.7 * plain["update"]
    assert again["attack"] == plain["attack"]
    assert half["training"] < 0.6 * plain["training"]
    assert plain["evaluation"] == parts["evaluation"] == again["evaluation"]


FRAGMENTED = 0.85
"""Share of a GPU's memory that tensors may take: the rest is CUDA's, its kernels' and the allocator's."""


def _counted(config: Config) -> str:
    """What the memory of a config depends on."""
    facts = config.dump()
    for name in ("name", "about", "paper", "seed", "epochs", "natural_epochs", "schedule", "loggers", "workers"):
        del facts[name]
    facts |= {name: facts[name]["kind"] for name in ("optimizer", "attack")}
    facts["evaluation"] = facts["evaluation"]["batch_size"]
    if facts["experts"] is not None:
        facts["experts"] |= {"regularizer": None}
    return json.dumps(facts, sort_keys=True)


def _groups() -> dict[str, list[Path]]:
    """The experiments of each folder, by its path."""
    found: dict[str, list[Path]] = {}
    for file in files():
        found.setdefault(path_of(file).removeprefix("experiments/").rpartition("/")[0], []).append(file)
    return found


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("group", _groups())
def test_every_experiment_fits_a_gpu_of_80_gb(group: str) -> None:
    found: dict[str, dict[str, int]] = {}
    for file in _groups()[group]:
        own = ["model.num_classes=10"] if path_of(file) == "experiments/own-data.yaml" else []
        config = load(file, own)
        if config.method.kind in ("pat", "vr") or getattr(config.experts, "top", None) is not None:
            continue  # they decide by what they compute
        if (key := _counted(config)) not in found:
            found[key] = peak_memory(config)
        for what in ("training", "evaluation"):
            assert found[key][what] < FRAGMENTED * 80e9, (path_of(file), what)
