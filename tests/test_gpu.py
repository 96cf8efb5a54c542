"""What only a CUDA device can show: no waiting inside the attacks' loops, bf16 and compiled training, equal results."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.fused_operations import KINDS, arguments
from helpers.tiny_runs import same, tiny, weights
from rome.attacks import APGD, PGD, Attack
from rome.attacks.base import Group
from rome.attacks.engine import frozen, graphed, loss_and_gradient
from rome.attacks.lp.autoattack import APGDCE, APGDT, FABT, Square
from rome.attacks.suites.base import APGDSuite
from rome.core.device import float32_products
from rome.core.graphs import Graphs
from rome.core.trial import check_attackable
from rome.evaluation.evaluate import evaluate, example_images
from rome.experts import add_experts, record_gates
from rome.experts.operations import mix, mix_backward
from rome.models import create_model
from rome.runs.config import load
from rome.runs.experiments import folder
from rome.runs.folder import Run
from rome.runs.saving import Saver
from rome.threats import CIFAR10, PerExample
from rome.threats.projections import project_l1
from rome.training.setup import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
SMALL = {"img_size": 32, "patch_size": 8, "depth": 3, "embed_dim": 96, "num_heads": 3}


@contextmanager
def no_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("attack", [PGD(steps=3), APGD(steps=5)], ids=["pgd", "apgd"])
def test_the_search_never_waits_for_the_device(attack: Attack) -> None:
    model = create_model("vit_tiny_patch16_224", num_classes=10, **SMALL).cuda()
    add_experts(model)
    x, y = torch.rand(12, 3, 32, 32, device="cuda"), torch.randint(10, (12,), device="cuda")
    groups = [Group(threat, slice(4 * i, 4 * i + 4), attack.steps_for(threat)) for i, threat in enumerate(CIFAR10)]
    noise = torch.rand_like(x)
    with frozen(model), torch.no_grad():
        attack.search(model, x, y, groups, noise)  # libraries may wait the first time they are used
        with no_waiting():
            attack.search(model, x, y, groups, noise)


def test_a_checkpoint_is_copied_without_waiting_before_anything_overwrites_it(tmp_path: Path) -> None:
    weight = torch.arange(2.0**26, device="cuda")  # 256 MiB: it is still on its way when the next kernel starts
    expected = weight.cpu()
    with closing(Saver(Run(tmp_path), None)) as saver:
        saver.save({"weight": weight})  # the first call allocates pinned memory, which waits
        saver.wait()
        with no_waiting():
            saver.save({"weight": weight})
            weight.zero_()
        saver.wait()
    assert torch.equal(Run(tmp_path).load_checkpoint()["weight"], expected)


def test_the_projection_agrees_with_the_cpu() -> None:
    g = torch.Generator().manual_seed(0)
    x, delta = torch.rand(8, 3072, generator=g), torch.randn(8, 3072, generator=g) * 0.1
    on_cpu = project_l1(delta, 12.0, -x, 1 - x)
    on_gpu = project_l1(delta.cuda(), 12.0, -x.cuda(), (1 - x).cuda())
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=1e-5, atol=1e-7)


def test_a_mixed_batch_equals_separate_runs_on_the_gpu() -> None:
    torch.manual_seed(0)
    model = create_model("vit_tiny_patch16_224", num_classes=10, **SMALL).cuda().eval()
    x, y = torch.rand(9, 3, 32, 32, device="cuda"), torch.randint(10, (9,), device="cuda")
    labels = torch.arange(9) % 3
    attack = PGD(steps=2, random_start=False)
    mixed = attack(model, x, y, PerExample(CIFAR10, labels))
    for i, threat in enumerate(CIFAR10):
        alone = attack(model, x[labels == i], y[labels == i], threat)
        torch.testing.assert_close(mixed[labels == i], alone, rtol=0, atol=1e-2)
        assert bool(threat.contains(alone, x[labels == i]).all())


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_bf16_training_learns_and_records_gates(compiled: bool, tmp_path: Path) -> None:
    overrides = ["device=cuda", "precision=bf16", "epochs=3", "natural_epochs=1", f"compile={str(compiled).lower()}"]
    run = train(load(folder() / "digits" / "rome-random.yaml", overrides), tmp_path / "run")
    losses = [line["loss"] for line in run.log() if line["event"] == "epoch"]
    assert losses[-1] < losses[0]
    assert all("regularizer" in line for line in run.log() if line["event"] == "epoch" and line["epoch"] > 1)


def test_gates_on_the_gpu_sum_to_one() -> None:
    model = create_model("vit_tiny_patch16_224", num_classes=10, **SMALL).cuda()
    add_experts(model)
    with record_gates(model) as recorder, torch.autocast("cuda", torch.bfloat16):
        model(torch.rand(2, 3, 32, 32, device="cuda"))
    for gates in recorder.gates.values():
        torch.testing.assert_close(gates.weights.sum(-1).float(), torch.ones(2, 17, device="cuda"), rtol=0, atol=1e-2)


def test_a_model_that_convolves_is_not_taken_for_one_that_depends_on_its_batch() -> None:
    torch.manual_seed(0)
    model = create_model("resnet_18", num_classes=10).cuda().eval()
    assert check_attackable(model, torch.rand(3, 3, 32, 32, device="cuda")) == 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(3, 65, 4, 16), (2, 197, 8, 16), (2, 7, 3, 5), (1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_kernels_of_experts_compute_what_plain_torch_does(
    kind: str, shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    limits = {torch.float32: 1e-5, torch.bfloat16: 2**-7}
    for given in arguments(*shape, kind, dtype):
        forward = len(given) == 9
        there = [part.cuda() if isinstance(part, torch.Tensor) else part for part in given]
        ours = (torch.ops.rome.mix if forward else torch.ops.rome.mix_backward)(*there)
        for one, other in zip(ours, (mix if forward else mix_backward)(*given), strict=True):
            limit = limits[one.dtype] * (1 if not other.numel() else max(other.abs().max().item(), 1))
            torch.testing.assert_close(one.cpu(), other, rtol=0, atol=limit)


def test_an_attack_step_in_a_cuda_graph_is_eagers_to_the_last_bit() -> None:
    torch.manual_seed(0)
    model = add_experts(create_model("vit_tiny_patch16_224", num_classes=10, **SMALL)).cuda()
    for name, parameter in model.named_parameters():
        if name.endswith(".B"):
            torch.nn.init.normal_(parameter, std=0.02)
    x, y = torch.rand(12, 3, 32, 32, device="cuda"), torch.randint(10, (12,), device="cuda")
    with torch.autocast("cuda", torch.bfloat16), frozen(model), torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                eager = loss_and_gradient(model, x, y)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = loss_and_gradient(model, x, y)
        graph.replay()
    for one, other in zip(captured, eager, strict=True):
        assert torch.equal(one, other)


APGD_STEPS = {"kind": "apgd", "steps": 3}
RUNS: dict[str, dict[str, Any]] = {
    "RANDOM": {},
    "RANDOM, bf16": {"precision": "bf16", "natural_epochs": 1, "validation": {"n": 12, "steps": 2}},
    "RANDOM, dropout": {"model__args": {"embed_dim": 16, "depth": 2, "num_heads": 2, "proj_drop_rate": 0.2}},
    "BatchNorm": {"model": {"name": "preact_resnet_18", "args": {"width": 8}}, "experts": None},
    "SGD, two learning rates": {"optimizer": {"kind": "sgd", "gates_lr": 3}},
    "MAX, accumulated": {"method": "max", "accumulate": 2},
    "MSD": {"method": {"kind": "msd", "steps": 3}},
    "E-AT": {"method": "eat", "attack": APGD_STEPS},
    "RAMP": {"method": "ramp", "attack": APGD_STEPS},
    "MORE": {"method": "more", "experts": {"kind": "more", "experts": 3}},
    "threats with attacks": {
        "threats": [{"norm": "linf", "eps": 0.1}, {"kind": "attack", "attack": {"kind": "fog", "steps": 2}}]
    },
}


@pytest.mark.parametrize("changes", RUNS.values(), ids=RUNS)
def test_training_with_graphs_is_eagers_to_the_last_bit(
    changes: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = []
    for graphs in (False, False, True):
        capsys.readouterr()
        run = train(tiny(**{"device": "cuda", "graphs": graphs, **changes}), tmp_path / str(len(found)))
        found.append(weights(run.folder))
    assert "CUDA graphs, captured in" in capsys.readouterr().err
    if same(found[0], found[1]):  # where the kernels themselves repeat
        assert same(found[0], found[2])
    for name, value in found[0].items():
        torch.testing.assert_close(found[2][name], value, rtol=1e-2, atol=1e-3)


def test_the_parts_of_autoattack_find_the_same_with_graphs() -> None:
    torch.manual_seed(0)
    model = create_model("vit_tiny_patch16_224", num_classes=10, **SMALL).cuda().eval().requires_grad_(False)
    x = torch.rand(20, 3, 32, 32, device="cuda")
    y = model(x).argmax(1)
    parts = [APGDCE(iterations=10), APGDT(iterations=10, targets=3), FABT(iterations=5, targets=3), Square(queries=50)]
    for attack in parts:
        for threat in CIFAR10:
            ball = threat.model_copy(update={"eps": threat.eps / 8})
            found = []
            for graphs in (None, Graphs(whole_searches=False)):
                with graphed(model, graphs), frozen(model), torch.no_grad():
                    seeded = torch.Generator().manual_seed(0)
                    found.append(attack.run(model, x, y, ball, generator=seeded))
                    assert graphs is None or graphs.count > 0
            assert torch.equal(found[0].robust, found[1].robust), (attack.kind, threat.name)
            assert torch.equal(found[0].images, found[1].images), (attack.kind, threat.name)


def test_a_search_in_tf32_is_judged_in_fp32(tmp_path: Path) -> None:
    """The verdicts are those of an fp32 forward pass of the saved images, and the search did compute in TF32."""
    torch.manual_seed(0)
    model = create_model("vit_tiny_patch16_224", num_classes=10, **SMALL).cuda().eval()
    seen = set()

    def note(*_: object) -> None:
        seen.add((torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision))

    x = torch.rand(20, 3, 32, 32)
    with torch.no_grad(), float32_products("fp32"):
        y = model(x.cuda()).argmax(1).cpu()
    hook = model.register_forward_pre_hook(note)
    threats = [ball.model_copy(update={"eps": ball.eps / 2}) for ball in CIFAR10]
    settings = {"threats": threats, "suite": APGDSuite(iterations=10), "save_images": "all", "out": tmp_path}
    found = evaluate(model, x, y, **settings, search_precision="tf32")
    hook.remove()
    assert seen == {("ieee", "ieee"), ("tf32", "tf32")}
    for column, case in enumerate(found.cases[1:], start=1):
        indices, images = example_images(tmp_path, case)
        with torch.no_grad(), float32_products("fp32"):
            logits = model(images.cuda()).cpu()
        others = logits.scatter(1, y[indices][:, None], -torch.inf).amax(dim=1)
        margins = logits[torch.arange(len(indices)), y[indices]] - others
        assert margins.max() <= 1e-4 * logits.abs().max(), "apart from rounding in a batch of another size"
        assert set(indices.tolist()) == set((~found.correct[:, column]).nonzero()[0].tolist())


def test_what_waits_for_the_device_is_noticed_and_runs_eagerly(capsys: pytest.CaptureFixture[str]) -> None:
    graphs = Graphs()
    for _ in range(3):
        x = torch.rand(4, device="cuda")
        found = graphs.call("key", lambda x: x * 2 if x.sum() > 0 else x, x)
        assert torch.equal(found, x * 2)
        assert torch.equal(graphs.call("other", lambda x: x.sort().values, x), x.sort().values)
    assert graphs.count == 1
    assert "it waits for the device" in capsys.readouterr().err
