"""What a config costs: parameters, multiply-accumulates, seconds per update, latency (paper Table 6)."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from rome.config import Config
from rome.device import pick_device
from rome.experts import expert_layers
from rome.methods import Setting
from rome.models import build_model
from rome.randomness import stream


def parameters(model: nn.Module) -> dict[str, int]:
    """Counts: all, trainable, and what the experts add (frozen projections counted, as in the paper)."""
    added = sum(
        parameter.numel()
        for layer in expert_layers(model).values()
        for name, parameter in layer.named_parameters()
        if name not in layer.shared
    )
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "trainable": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        "experts": added,
    }


def macs(model: nn.Module, shape: tuple[int, int, int]) -> int:
    """Multiply-accumulates of one image's forward pass: half of torch's FLOP count, products and convolutions."""
    device = next(model.parameters()).device
    with flop_counter() as counter, torch.no_grad():
        model(torch.zeros(1, *shape, device=device))
    return counter.get_total_flops() // 2


def flop_counter() -> FlopCounterMode:
    """torch's counter, taught the in-place product that the experts end in."""

    def addmm_flop(_: Any, left: Any, right: Any, **unused: Any) -> int:
        return 2 * int(left[0]) * int(left[1]) * int(right[1])

    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_flop})


def measure(config: Config, *, repeats: int = 3, timing: bool = True) -> dict[str, Any]:
    """All costs of a config on this machine.

    Args:
        config: the config. Weights and images are random: the cost depends on neither.
        repeats: timed updates and latency passes, after one warm-up each; medians are reported.
        timing: False leaves out everything that takes time.

    Returns:
        ``parameters``, ``trainable``, ``experts``, ``macs``, and with timing ``seconds_per_update`` (attack, forward,
        backward, optimizer on one batch; the mean over the epochs of a method with stages) and ``latency_ms`` (one
        image, forward).
    """
    shape, classes = config.data.form()
    torch.manual_seed(config.seed)
    # the cost does not depend on the weights
    untrained = config.model.model_copy(update={"pretrained": False, "weights": None})
    model = build_model(untrained, config.experts, classes=classes, shape=shape)
    facts: dict[str, Any] = {"name": config.name, **parameters(model), "macs": macs(model.eval(), shape)}
    if timing:
        device = pick_device(config.device)
        model = model.to(device)
        facts["device"] = torch.cuda.get_device_name() if device.type == "cuda" else device.type
        facts["batch_size"] = config.batch_size
        facts["latency_ms"] = 1000 * _median(lambda: _forward(model, shape, device), repeats * 5, device)
        facts["seconds_per_update"] = _seconds_per_update(config, model, shape, classes, repeats, device)
    return facts


def _seconds_per_update(
    config: Config, model: nn.Module, shape: tuple[int, int, int], classes: int, repeats: int, device: torch.device
) -> float:
    optimizer = config.optimizer.build(model)
    setting = Setting(
        model=model.train(),
        attacked=model,
        threats=config.method.trained(config.threats, config.attack),
        attack=config.attack,
        regularizer=config.experts.regularizer if config.experts is not None else None,
        attack_stream=stream(config.seed, "attack", device=device),
        threat_stream=stream(config.seed, "threats"),
        optimizer=config.optimizer,
        epochs=range(config.natural_epochs, config.epochs),
    )
    config.method.prepare(setting)
    batch = config.batch_size // config.accumulate
    source = torch.Generator().manual_seed(config.seed)
    x = torch.rand(batch, *shape, generator=source).to(device)
    y = torch.randint(classes, (batch,), generator=source).to(device)
    reduced = config.precision == "bf16"

    def update() -> None:
        for _ in range(config.accumulate):
            with torch.autocast(device.type, torch.bfloat16, enabled=reduced):
                outcome = config.method.loss(setting, x, y)
            torch.autograd.backward(outcome.loss / config.accumulate)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        config.method.update_end(setting)

    seconds, epochs = 0.0, 0
    for stage in config.method.stages(setting.epochs):
        setting.epoch, length = stage.start, max(len(stage), 1)
        seconds += _median(update, repeats, device) * length
        epochs += length
    return seconds / epochs


def _forward(model: nn.Module, shape: tuple[int, int, int], device: torch.device) -> None:
    with torch.no_grad():
        model.eval()(torch.zeros(1, *shape, device=device))


def _median(work: Any, repeats: int, device: torch.device) -> float:
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])
