"""Cost of experts in one attack step (forward and input gradient) on a GPU, eager and in a CUDA graph.

    python -m benchmarks.gpu_steps --device cuda --minutes 3 --out DIR

Starts with the card's speed in bare matrix products. Then, for each model at 32 px and each batch size, in bf16 with
frozen weights: the plain model, RoME, and RoME by the general path (gates computed with torch's own operations), each
eager and captured in a CUDA graph. ``x plain`` is the median over rounds of the time divided by the plain model's in
the same round, with the smallest and largest in brackets; cases take turns within a round. ``arithmetic`` is that ratio
in counted multiply-adds. Goal: in a graph at most 1.15 for ViT-B at batch 64, and 1.10 at 192. ``same`` tells whether
the graph's gradient equals the eager one bit for bit. Ends with the layers of the first model: microseconds of each
operation in a graph.

Each row is printed, and written to ``DIR/gpu_steps.json``, as soon as it is measured. A row that fails is reported in
one line and the rest continues; what does not fit into ``--minutes`` is skipped with a note. On a CPU: eager only.
"""

from __future__ import annotations

import copy
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parent))  # for python -m

import common
from flops import count_flops
from rome.attacks.engine import frozen, loss_and_gradient
from rome.experts import add_experts, expert_layers

Step = Callable[[], Any]


class OutOfTimeError(BaseException):
    """The time given by ``--minutes`` is over; not the failure of a row, so no Exception."""


class Bench:
    """Prints and saves the rows of several tables as they are measured, until the time is over."""

    def __init__(self, options: Any, device: torch.device, report: common.Report) -> None:
        self.options, self.device, self.report = options, device, report
        self.end = time.monotonic() + 60 * options.minutes

    def row(self, title: str, shown: dict[str, str], data: dict[str, Any]) -> None:
        """Print and save one row of a table; the first one also prints the head."""
        if title not in self.report.tables:
            print(f"\n{title}\n\n| {' | '.join(shown)} |\n|{' --- |' * len(shown)}")
        print(f"| {' | '.join(shown.values())} |", flush=True)
        self.report.tables.setdefault(title, []).append(data)
        self.report.save()

    def attempt(self, what: str, work: Callable[..., Any], *arguments: Any) -> Any:
        """Return the result of ``work(*arguments)``; if it fails, print a line and return None.

        Raises:
            OutOfTimeError: the time is over.
        """
        if time.monotonic() > self.end:
            raise OutOfTimeError(what)
        try:
            return work(*arguments)
        except Exception as error:
            self.report.notes.append(f"{what}: {traceback.format_exc()}")
            print(f"{what} failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300])
            self.report.save()
            return None

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def interleave(self, cases: dict[str, Step]) -> dict[str, list[float]]:
        shortest = 0 if self.options.quick else 0.05
        return common.interleave(cases, self.device, rounds=self.options.repeats, warmup=3, shortest=shortest)


def captured(step: Step) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Capture a step in a CUDA graph; return the graph and the tensors that it fills."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    return graph, found


# -- bare products -----------------------------------------------------------------------------------------------------


def ceilings(bench: Bench) -> None:
    """Measure the FLOP/s of bare matrix products: a large one, and those of the models."""
    for rows, inputs, outputs in ((64, 64, 64),) if bench.options.quick else (
        (8192, 8192, 8192), *((65 * batch, d, 4 * d) for batch in bench.options.batch for d in (768, 384, 192))
    ):  # fmt: skip
        x, w = (torch.randn(shape, device=bench.device).bfloat16() for shape in ((rows, inputs), (inputs, outputs)))
        (times,) = bench.interleave({"product": lambda x=x, w=w: x @ w}).values()
        flops = 2 * rows * inputs * outputs / min(times)
        shown = {"product": f"{rows} x {inputs} x {outputs}", "TFLOP/s": f"{flops / 1e12:.0f}"}
        bench.row("Bare products, bf16", shown, {"product": [rows, inputs, outputs], "flops": flops})


# -- the models --------------------------------------------------------------------------------------------------------


def variants(name: str, device: torch.device, seed: int) -> dict[str, nn.Module]:
    """Return the plain model; RoME with the same weights and random B; and RoME with hooks on its gates, which make it
    take the general path."""
    plain = common.make_model(name, torch.device("cpu"), seed)
    rome = add_experts(copy.deepcopy(plain))
    for layer in expert_layers(rome).values():
        nn.init.normal_(layer.B, std=0.02)
    general = copy.deepcopy(rome)
    for layer in expert_layers(general).values():
        layer.gate.register_forward_pre_hook(lambda *_: None)
    return {"plain": plain.to(device), "rome": rome.to(device), "general": general.to(device)}


def arithmetic(models: dict[str, nn.Module]) -> dict[str, int]:
    """FLOPs of forward and input gradient per image, the same for both forms of RoME."""
    flops = {case: count_flops(models[case]).gradient for case in ("plain", "rome")}
    return flops | {"general": flops["rome"]}


class Operations(TorchDispatchMode):
    """Counts operations that are not views."""

    VIEWS = ("aten._unsafe_view.default", "aten.detach.default")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not (func.is_view or str(func) in self.VIEWS)
        return func(*args, **(kwargs or {}))


def kernels(step: Step) -> Counter[str]:
    """Return the microseconds of each kernel of a step by name, and the number of kernels under the empty name."""
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as seen:
        step()
        torch.cuda.synchronize()
    found: Counter[str] = Counter()
    for event in seen.events():
        if event.device_type == DeviceType.CUDA and not event.name.startswith(("Mem", "Activity")):
            found[""] += 1
            found[event.name[:90]] += event.time_range.elapsed_us()
    return found


def steps(bench: Bench, name: str, batch: int, models: dict[str, nn.Module], flops: dict[str, int]) -> None:
    """Measure the rows of one model at one batch size."""
    x, y = common.images(batch, None, bench.device, bench.options.seed)
    what = f"{name}, batch {batch}"

    def attack_step(model: nn.Module) -> Any:  # as in Attack.run, which enters these contexts once for all steps
        with torch.autocast(bench.device.type, torch.bfloat16), torch.no_grad():
            return loss_and_gradient(model, x, y)

    with ExitStack() as stack:
        with torch.autocast(bench.device.type, torch.bfloat16):
            for model in models.values():
                stack.enter_context(frozen(model))
        eager = {case: partial(attack_step, model) for case, model in models.items()}
        gradients, operations = {}, {}
        for case, step in list(eager.items()):
            with Operations() as seen:
                found = bench.attempt(f"{what}, {case}", step)
            if found is None:
                del eager[case]
            else:
                gradients[case], operations[case] = found[2], seen.count
        graphs: dict[str, Any] = {}
        for case, step in eager.items() if bench.cuda else ():
            made = bench.attempt(f"{what}, {case}, graph", captured, step)
            if made is not None:
                graphs[case] = made
        same = {}
        for case, (graph, found) in graphs.items():
            graph.replay()
            again = eager[case]()[2]
            same[case] = bool(torch.equal(found[2], again)), bool(torch.equal(again, gradients[case]))
        used: dict[str, Counter[str]] = {}
        for case, step in eager.items() if bench.cuda else ():
            used[case] = bench.attempt(f"{what}, {case}, profile", kernels, step) or Counter()
        ways: dict[str, dict[str, Step]] = {"eager": eager}
        if graphs:
            ways["graph"] = {case: graph.replay for case, (graph, _) in graphs.items()}
        reference = gradients.get("general")
        for way, cases in ways.items():
            times = bench.attempt(f"{what}, {way}", bench.interleave, cases) or {}
            for case, seconds in times.items():
                apart = None
                if reference is not None and case == "rome":
                    apart = ((gradients[case] - reference).norm() / reference.norm()).item()
                middle = sorted(seconds)[len(seconds) // 2]
                data = {
                    "model": name,
                    "batch": batch,
                    "way": way,
                    "case": case,
                    "seconds": seconds,
                    "ratio": common.ratio(seconds, times["plain"]) if "plain" in times else None,
                    "arithmetic": flops[case] / flops["plain"],
                    "achieved_flops": flops[case] * batch / middle,
                    "operations": operations[case],
                    "kernels": used.get(case, {}).get(""),
                    "kernel_microseconds": dict(used.get(case, Counter()).most_common(16)),
                    "same": same.get(case, (None, None))[0],
                    "eager_repeats": same.get(case, (None, None))[1],
                    "apart_from_general": apart,
                }
                shown = {
                    "model": name,
                    "batch": str(batch),
                    "way": way,
                    "case": case,
                    "ms": common.milliseconds(seconds),
                    "x plain": str(data["ratio"] or ""),
                    "arithmetic": f"{data['arithmetic']:.3f}",
                    "TFLOP/s": f"{data['achieved_flops'] / 1e12:.4g}",
                    "operations": str(operations[case]),
                    "kernels": str(data["kernels"] or ""),
                    "same": {None: "", True: "yes", False: "NO"}[data["same"]] if way == "graph" else "",
                    "from general": "" if apart is None else f"{apart:.1e}",
                }
                bench.row("Attack steps, bf16, frozen weights", shown, data)


def parity(bench: Bench, name: str, models: dict[str, nn.Module]) -> None:
    """Compare RoME with the general path in fp32: logits and input gradient, relative to the largest entry."""
    common.cast(bench.device, "fp32")
    x, y = common.images(4, None, bench.device, bench.options.seed)
    found = []
    for case in ("rome", "general"):
        with frozen(models[case]), torch.no_grad():
            found.append((models[case](x), loss_and_gradient(models[case], x, y)[2]))
    apart = [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(*found, strict=True)]
    shown = {"model": name, "logits": f"{apart[0]:.1e}", "input gradient": f"{apart[1]:.1e}"}
    bench.row("RoME from the general path, fp32", shown, {"model": name, "logits": apart[0], "gradient": apart[1]})


# -- the parts of a layer ----------------------------------------------------------------------------------------------


def parts(bench: Bench, batch: int, width: int, outputs: int, calls: int = 20) -> None:
    """Measure the microseconds of each operation of a layer with 4 experts of rank 16, on 65 tokens."""
    K, r, tokens = (4, 16, 65) if not bench.options.quick else (2, 2, 5)
    n, rows, wide = K * r, batch * tokens, K * r + 2 * K

    def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, device=bench.device).to(dtype)

    x, weight, bias, stacked, B = (
        random(rows, width), random(outputs, width), random(outputs), random(wide, width), random(outputs, n)
    )  # fmt: skip
    longer, joint = random(rows, width + n), random(outputs, width + n)
    y, d_x, d_y = random(rows, outputs), random(rows, width), random(rows, outputs)
    read, gate_bias = random(batch, tokens, wide), random(K, dtype=torch.float32)
    settings = (0.5, 0, tokens, 1.0)
    mixed, u, v = torch.ops.rome.mix(read, gate_bias, gate_bias, None, K, *settings)
    d_mixed = torch.randn_like(mixed)
    d_read = torch.randn_like(read).view(rows, wide)
    cases: dict[str, Step] = {
        "plain product": lambda: F.linear(x, weight, bias),
        "thin product": lambda: F.linear(x, stacked),
        "mix": lambda: torch.ops.rome.mix(read, gate_bias, gate_bias, None, K, *settings),
        "add experts": lambda: y.addmm_(mixed.view(rows, n), B.t()),
        "plain gradient": lambda: d_y @ weight,
        "thin gradient": lambda: d_y @ B,
        "mix backward": lambda: torch.ops.rome.mix_backward(d_mixed, read, u, v, None, None, None, *settings),
        "add gradient": lambda: d_x.addmm_(d_read, stacked),
        "product with K r more inputs": lambda: F.linear(longer, joint, bias),
        "gradient with K r more inputs": lambda: d_y @ joint,
    }

    def repeat(work: Step) -> None:
        for _ in range(calls):
            work()

    several: dict[str, Step] = {part: partial(repeat, work) for part, work in cases.items()}
    if bench.cuda:
        several = {part: captured(work)[0].replay for part, work in several.items()}
    for part, seconds in bench.interleave(several).items():
        each = [second / calls for second in seconds]
        shown = {
            "layer": f"{rows} x {width} x {outputs}",
            "part": part,
            "us": f"{1000 * float(common.milliseconds(each)):.4g}",
        }
        bench.row("Parts of a layer, bf16", shown, {"layer": [rows, width, outputs], "part": part, "seconds": each})


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = common.arguments(__doc__, models=["vit-b", "vit-s", "vit-ti"], batch=[64, 192], repeats=9)
    parser.add_argument("--minutes", type=float, default=3.0, help="time limit; no row starts after it")
    parser.add_argument("--out", metavar="DIR", help="write DIR/gpu_steps.json")
    options = parser.parse_args(argv)
    if options.quick:
        options.models, options.batch, options.repeats = ["vit-micro"], [2], 2
    if options.out:
        Path(options.out).mkdir(parents=True, exist_ok=True)
        options.json = options.json or str(Path(options.out) / "gpu_steps.json")
    device = common.start(options)
    report = common.Report(options, device, argv)
    bench = Bench(options, device, report)
    try:
        bench.attempt("bare products", ceilings, bench)
        for name in options.models:
            models = bench.attempt(name, variants, name, device, options.seed)
            if models is None:
                continue
            flops = bench.attempt(f"{name}, arithmetic", arithmetic, models) or dict.fromkeys(models, 1)
            bench.attempt(f"{name}, parity", parity, bench, name, models)
            for batch in options.batch:
                bench.attempt(f"{name}, batch {batch}", steps, bench, name, batch, models, flops)
            del models
            if bench.cuda:
                torch.cuda.empty_cache()
            if name == options.models[0]:
                width = 768 if not options.quick else 8
                for batch in options.batch:
                    for outputs in (3 * width, width):
                        bench.attempt(f"parts, batch {batch}", parts, bench, batch, width, outputs)
    except OutOfTimeError as error:
        report.note(f"out of time before: {error}")
    return report.finish()


if __name__ == "__main__":
    main()
