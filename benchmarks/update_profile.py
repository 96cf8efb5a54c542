"""Where the time of a training update goes: its parts, and the operations that take longest (training.py --profile)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from lightning_fabric import Fabric
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.profiler import ProfilerActivity, profile

import common
import rome.attacks.lp.apgd
import rome.attacks.lp.pgd
import rome.methods.base
from rome.attacks.engine import Plan

if TYPE_CHECKING:
    from training import Training

PARTS = ("attack: model", "attack: steps", "training forward", "backward", "optimizer", "rest")


class Clock:
    """Seconds in each part of an update, measured by wrapping its functions and waiting for the device around each."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, dict.fromkeys(PARTS, 0.0)

    def now(self) -> float:
        common.synchronize(self.device)
        return time.perf_counter()

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            started = self.now()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[part] += self.now() - started

        return wrapper

    @contextmanager
    def running(self) -> Iterator[None]:
        """Wrap the functions inside the context."""
        places: list[tuple[Any, str, str]] = [
            (rome.attacks.lp.pgd, "loss_and_gradient", "attack: model"),
            (rome.attacks.lp.apgd, "loss_and_gradient", "attack: model"),
            (Plan, "run", "attack: steps"),  # the whole attack; show_profile() subtracts the model
            (rome.methods.base, "training_forward", "training forward"),
            (Fabric, "backward", "backward"),
        ]
        originals = [getattr(owner, attribute) for owner, attribute, _ in places]
        started = 0.0

        def before(*_: Any) -> None:
            nonlocal started
            started = self.now()

        def after(*_: Any) -> None:
            self.seconds["optimizer"] += self.now() - started

        hooks = [register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)]
        try:
            for (owner, attribute, part), original in zip(places, originals, strict=True):
                setattr(owner, attribute, self.timed(part, original))
            yield
        finally:
            for (owner, attribute, _), original in zip(places, originals, strict=True):
                setattr(owner, attribute, original)
            for hook in hooks:
                hook.remove()


def show_profile(title: str, training: Training, device: torch.device, report: common.Report, top: int = 12) -> None:
    """Print the parts of one update, and the operations of another."""
    clock = Clock(device)
    with clock.running():
        total = training.step()
    clock.seconds["attack: steps"] -= clock.seconds["attack: model"]
    clock.seconds["rest"] = total - sum(clock.seconds.values())
    rows = [
        {"part": part, "ms": f"{1000 * seconds:.4g}", "share": f"{seconds / total:.1%}"}
        for part, seconds in clock.seconds.items()
    ]
    report.table(f"Parts of an update: {title}", rows, [{"total": total, **clock.seconds}])

    cuda = device.type == "cuda"
    profiler = profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])])
    total = training.step(before=profiler.start)  # started in the thread that it profiles
    training.step(before=profiler.stop)
    events = profiler.key_averages()

    def own(event: Any) -> float:
        return float(event.self_device_time_total if cuda else event.self_cpu_time_total)

    busy = sum(map(own, events))
    data = [
        {"part": event.key, "seconds": own(event) / 1e6, "calls": event.count, "share": own(event) / max(busy, 1)}
        for event in sorted(events, key=own, reverse=True)[:top]
    ]
    rows = [
        {
            "part": str(line["part"])[:70],
            "ms": f"{1000 * line['seconds']:.4g}",
            "calls": str(line["calls"]),
            "share": f"{line['share']:.1%}",
        }
        for line in data
    ]
    report.table(f"Operations by self time ({'device' if cuda else 'CPU'}): {title}", rows, data)
    launches = sum(event.count for event in events if "LaunchKernel" in event.key)
    report.note(f"profiled update {total:.3f} s, busy {busy / 1e6 / total:.0%}" + f", {launches} launches" * cuda)
