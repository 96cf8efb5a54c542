"""Fused experts: few operations, values and gradients of the closed form, kernels for CUDA in Triton's interpreter."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.fused_operations import KINDS, arguments
from rome.attacks.engine import frozen
from rome.experts import (
    DualScale,
    Gate,
    Global,
    Layout,
    Local,
    MixtureLinear,
    Uniform,
    add_experts,
    expert_layers,
    record_gates,
    set_routing,
)
from rome.experts.fused import closed_form, is_exporting
from rome.models import create_model

GATES: dict[str, Gate] = {
    "dual-scale": DualScale(s=3, b=1),
    "learned": DualScale(coefficient="learned"),
    "patches": DualScale(pool="patches"),
    "class token": DualScale(pool="cls"),
    "local": Local(),
    "global": Global(),
    "global, patches": Global(pool="patches"),
}


def layer_of(gate: Gate, layout: Layout, *, bias: bool = True, experts: int = 3, scale: float = 1) -> MixtureLinear:
    """One of 6 inputs and 5 outputs, float64, all its weights random."""
    torch.manual_seed(0)
    built = gate.build(6, experts, block=1, blocks=3, layout=layout)
    layer = MixtureLinear(nn.Linear(6, 5, bias=bias), experts=experts, rank=2, gate=built, layout=layout).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    layer.scale = scale
    return layer


def in_general(layer: MixtureLinear) -> MixtureLinear:
    """A copy that computes gates by the gate's own forward."""
    twin = copy.deepcopy(layer)
    twin.gate.register_forward_hook(lambda *_: None)
    assert closed_form(twin) is None
    return twin


def answers(layer: MixtureLinear, h: Tensor, context: Any = None) -> list[Tensor]:
    """Output, gates, and the gradients of a loss on all of them."""
    h, seed = h.clone().requires_grad_(), torch.Generator().manual_seed(5)
    with record_gates(layer) as recorder, context or torch.enable_grad():
        output = layer(h)
    (gates,) = recorder.gates.values()
    outputs = [output, *(part for part in gates if part is not None)]
    loss = sum((part * torch.randn(part.shape, generator=seed).to(part)).sum() for part in outputs)
    parameters = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    return [*outputs, *torch.autograd.grad(loss, [h, *parameters])]


def apart(one: list[Tensor], other: list[Tensor]) -> float:
    """The largest difference, relative to the largest entry of all: sums whose terms cancel round as their terms do."""
    a, b = (torch.cat([part.detach().double().flatten() for part in parts]) for parts in (one, other))
    return ((a - b).abs().max() / b.abs().max()).item()


class Operations(TorchDispatchMode):
    """Counts operations that are no views."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not (func.is_view or func is torch.ops.aten._unsafe_view.default)
        return func(*args, **(kwargs or {}))


def operations(model: nn.Module) -> int:
    """Of one attack step under bf16 autocast."""
    x, y = torch.rand(2, 3, 32, 32), torch.tensor([1, 2])
    with torch.autocast("cpu", torch.bfloat16), frozen(model), Operations() as seen:
        x = x.requires_grad_()
        torch.autograd.grad(F.cross_entropy(model(x).float(), y, reduction="sum"), x)
    return seen.count


def test_an_attack_step_takes_at_most_eight_more_operations_for_each_adapted_layer() -> None:
    settings = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "num_heads": 2}
    plain = create_model("vit_tiny_patch16_224", num_classes=10, **settings)
    adapted = add_experts(copy.deepcopy(plain))
    assert len(expert_layers(adapted)) == 24
    assert operations(adapted) <= operations(plain) + 24 * 8


@pytest.mark.parametrize("windows", [1, 2])
@pytest.mark.parametrize("scale", [1, 0.5])
@pytest.mark.parametrize("name", GATES)
def test_values_and_every_gradient_are_those_of_the_gates_own_forward(name: str, scale: float, windows: int) -> None:
    layer = layer_of(GATES[name], Layout(windows=windows, prefix=1), scale=scale, bias=windows == 1)
    assert closed_form(layer) is not None
    h = torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    reference = answers(in_general(layer), h)
    assert apart(answers(layer, h), reference) < 1e-12
    assert apart(answers(layer.float(), h.float()), reference) < 1e-6


@pytest.mark.parametrize("name", GATES)
def test_under_bf16_they_agree_within_its_rounding(name: str) -> None:
    layer = layer_of(GATES[name], Layout(prefix=1)).float()
    h = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(1))
    reduced, general = (answers(each, h, torch.autocast("cpu", torch.bfloat16)) for each in (layer, in_general(layer)))
    assert [part.dtype for part in reduced] == [part.dtype for part in general]
    assert apart(reduced, general) < 2**-7  # bf16 rounds by up to 2^-9, codes, scores, gates, output in turn


@pytest.mark.parametrize("name", GATES)
def test_gradients_are_exact_also_of_a_loss_on_gates(name: str) -> None:
    layer = layer_of(GATES[name], Layout(prefix=1), experts=2)
    names = [key for key, _ in layer.named_parameters()]

    def outputs(h: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        with record_gates(layer) as recorder:
            output = torch.func.functional_call(layer, dict(zip(names, values, strict=True)), h)
        return (output, *(part for part in recorder.records[0].gates if part is not None))

    h = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    values = [parameter.detach().clone().requires_grad_() for parameter in layer.parameters()]
    assert torch.autograd.gradcheck(outputs, (h, *values), fast_mode=True)


def test_a_second_derivative_is_refused_instead_of_wrong() -> None:
    layer = layer_of(DualScale(), Layout())
    h = torch.randn(2, 3, 6, dtype=torch.float64).requires_grad_()
    (gradient,) = torch.autograd.grad(layer(h).square().sum(), h, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_no_images_give_no_answers() -> None:
    layer = layer_of(DualScale(), Layout())
    h = torch.zeros(0, 3, 6, dtype=torch.float64).requires_grad_()
    (gradient,) = torch.autograd.grad(layer(h).sum(), h)
    assert layer(h).shape == (0, 3, 5)
    assert gradient.shape == h.shape


# Where the closed form is not what the layer does


class Doubled(DualScale):
    """A gate of another class than rome's."""

    kind = "test-doubled"

    def build(self, *args: Any, **settings: Any) -> Any:
        gate = super().build(*args, **settings)

        class Twice(type(gate)):  # type: ignore[misc]
            def forward(self, scores: Tensor) -> Any:
                return super().forward(2 * scores)

        gate.__class__ = Twice
        return gate


@pytest.mark.parametrize("case", ["padding", "uniform", "own gate", "inverse", "random", "none"])
def test_other_gates_padding_and_other_routing_take_the_general_path(case: str) -> None:
    gate = {"uniform": Uniform(), "own gate": Doubled()}.get(case, DualScale())
    layer = layer_of(gate, Layout(real=(0, 2)) if case == "padding" else Layout())
    if case in ("inverse", "random", "none"):
        set_routing(layer, case)
    assert closed_form(layer) is None
    set_routing(layer, "learned")
    assert (closed_form(layer) is None) == (case in ("padding", "uniform", "own gate"))


# Frozen weights


def test_frozen_layers_join_their_weights_once_and_anew_after_a_change() -> None:
    layer = nn.ModuleDict({"fc": layer_of(DualScale(), Layout())})["fc"]
    assert isinstance(layer, MixtureLinear)
    h = torch.randn(2, 3, 6, dtype=torch.float64)
    for _ in range(2):
        free = layer(h)
        with frozen(layer):
            assert layer.stacked is not None
            with Operations() as seen:
                fixed = layer(h)
            with frozen(layer):
                assert torch.equal(layer(h), free)
            assert torch.equal(layer(h), free)
        assert torch.equal(fixed, free)
        assert seen.count == 4  # plain product, thin product, gates, experts
        assert layer.stacked is None
        with torch.no_grad():
            layer.A += 1
    with pytest.raises(ZeroDivisionError), frozen(layer):
        raise ZeroDivisionError
    assert layer.stacked is None


# The operations


@pytest.mark.parametrize("kind", KINDS)
def test_the_operations_keep_their_schema_and_tell_the_shape_of_their_results(kind: str) -> None:
    for given in arguments(2, 3, 3, 2, kind, torch.float32):
        operation = torch.ops.rome.mix if given[0].shape[-1] != 6 else torch.ops.rome.mix_backward
        torch.library.opcheck(operation.default, given, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_the_kernels_for_cuda_compute_the_same_in_tritons_interpreter() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    code = "from helpers.fused_operations import check_kernels; check_kernels()"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    if "only 0-dimensional arrays can be converted" in done.stderr:
        pytest.skip("this Triton's interpreter does not know this numpy")
    assert "kernels agree" in done.stdout, done.stderr[-2000:]


@pytest.mark.slow
def test_without_triton_every_kind_of_experts_is_there() -> None:
    code = "import sys; sys.modules['triton'] = None; from rome.experts import Experts; print(*Experts.members())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["adapter", "ffn", "low-rank", "more"], done.stderr[-2000:]


def test_compiling_is_not_exporting() -> None:
    """Compiled models use the fused operation, too; exported programs must run without this package."""

    class Asking(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1 if is_exporting() else x - 1

    x = torch.zeros(2)
    compiled = torch.compile(Asking(), backend="eager")
    assert compiled(x).tolist() == [-1, -1]
    torch._dynamo.reset()
    assert torch.export.export(Asking(), (x,)).module()(x).tolist() == [1, 1]
