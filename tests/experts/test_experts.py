"""Low-rank experts beside Linear layers: Eq. 2 as written, nothing changed at B = 0, parameter counts, refusals."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.models.mlp_mixer import MlpMixer
from torch import Tensor, nn

from helpers.small_models import assert_computes_the_same, tiny_swin, tiny_vit
from rome.core.errors import UserError
from rome.experts import LowRank, MixtureLinear, add_experts, expert_layers, record_gates

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 10}
GATE = ("gate.local.weight", "gate.local.bias", "gate.global_.weight", "gate.global_.bias")


def grow(model: nn.Module, seed: int = 0) -> nn.Module:
    """Experts as after some training: B no longer 0, gates with clear preferences."""
    g = torch.Generator().manual_seed(seed)
    for layer in expert_layers(model).values():
        layer.B.data = 0.5 * torch.randn(layer.B.shape, generator=g).to(layer.B)
        for part in (layer.gate.local, layer.gate.global_):
            part.weight.data = 2 * torch.randn(part.weight.shape, generator=g).to(layer.B)
            part.bias.data = torch.randn(part.bias.shape, generator=g).to(layer.B)
    return model


def mixture(d_in: int = 6, d_out: int = 5, *, bias: bool = True, **settings: Any) -> MixtureLinear:
    """One adapted layer, block 1 of 1, float64, B not 0."""
    torch.manual_seed(0)
    holder = nn.ModuleDict({"fc": nn.Linear(d_in, d_out, bias=bias)})
    layer = grow(add_experts(holder, layers="fc", **({"experts": 3, "rank": 2} | settings)).double())["fc"]
    assert isinstance(layer, MixtureLinear)
    return layer


def literal(layer: MixtureLinear, h: Tensor) -> Tensor:
    """Eq. 2-5 for h (B, T, d_in), token by token and expert by expert."""
    r, beta = layer.rank, 1 / (1 + math.exp(-(4 * (1 - 1 / 1) - 2)))
    out = torch.zeros(*h.shape[:2], layer.out_features, dtype=h.dtype)
    for b in range(h.shape[0]):
        h_mean = sum(h[b, i] for i in range(h.shape[1])) / h.shape[1]
        v = (layer.gate.global_.weight @ h_mean + layer.gate.global_.bias).softmax(0)
        for i in range(h.shape[1]):
            u = (layer.gate.local.weight @ h[b, i] + layer.gate.local.bias).softmax(0)
            g = (1 - beta) * u + beta * v
            out[b, i] = layer.weight @ h[b, i] + (layer.bias if layer.bias is not None else 0)
            for k in range(layer.experts):
                A_k, B_k = layer.A[k * r : (k + 1) * r], layer.B[:, k * r : (k + 1) * r]
                out[b, i] += g[k] * (B_k @ (A_k @ h[b, i]))
    return out


def tokens(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(3))


# Eq. 2


@pytest.mark.parametrize("bias", [True, False])
def test_output_is_equation_2_read_literally(bias: bool) -> None:
    layer, h = mixture(bias=bias), tokens(2, 4, 6)
    torch.testing.assert_close(layer(h), literal(layer, h))


def test_one_vector_per_image_is_one_token() -> None:
    layer, h = mixture(), tokens(3, 6)
    torch.testing.assert_close(layer(h), literal(layer, h.unsqueeze(1)).squeeze(1))


def test_a_grid_of_tokens_is_their_sequence() -> None:
    layer, h = mixture(), tokens(2, 3, 4, 6)
    torch.testing.assert_close(layer(h), literal(layer, h.view(2, 12, 6)).view(2, 3, 4, 5))


def test_memory_layout_of_the_input_does_not_matter() -> None:
    layer, h = mixture(), tokens(2, 6, 4)
    torch.testing.assert_close(layer(h.transpose(1, 2)), literal(layer, h.transpose(1, 2).contiguous()))


def test_images_of_a_batch_do_not_mix() -> None:
    layer, h = mixture(), tokens(3, 4, 6)
    torch.testing.assert_close(layer(h)[1:2], layer(h[1:2]))


def test_one_expert_is_a_plain_low_rank_update() -> None:
    layer, h = mixture(experts=1), tokens(2, 4, 6)
    torch.testing.assert_close(layer(h), nn.functional.linear(h, layer.weight + layer.B @ layer.A, layer.bias))


def test_gradients_of_every_parameter_and_the_input_are_exact() -> None:
    layer = mixture(d_in=3, d_out=2)
    h = tokens(2, 3, 3).requires_grad_()
    names = [name for name, parameter in layer.named_parameters() if parameter.requires_grad]
    assert names == ["weight", "bias", "A", "B", *GATE]  # the projection is frozen

    def output(h: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), h)

    values = [layer.get_parameter(name).detach().clone().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(output, (h, *values))


# The start: B = 0


def test_experts_start_as_lora_does() -> None:
    torch.manual_seed(0)
    layer = add_experts(nn.ModuleDict({"fc": nn.Linear(64, 48)}), layers="fc")["fc"]
    assert (layer.experts, layer.rank) == (4, 16)
    assert layer.A.shape == (64, 64)
    assert layer.B.shape == (48, 64)
    assert (layer.B == 0).all()
    bound = 1 / math.sqrt(64)  # kaiming_uniform(a=sqrt 5) of each A_k (r, d_in)
    assert layer.A.detach().abs().max() <= bound
    assert layer.A.detach().std() == pytest.approx(bound / math.sqrt(3), rel=0.05)


class GridMLP(nn.Module):
    """Reads an image as a grid (B, H, W, C) of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.head = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.fc2(self.fc1(x.permute(0, 2, 3, 1)).relu()).mean((1, 2)))


BACKBONES: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "ViT": (tiny_vit, ("qkv", "proj")),
    "ViT, every Linear of its blocks": (tiny_vit, ("qkv", "proj", "fc1", "fc2")),
    "DeiT, distilled": (lambda: timm.create_model("deit_tiny_distilled_patch16_224", **TINY), ("qkv", "proj")),
    "MLP-Mixer": (
        lambda: MlpMixer(img_size=32, patch_size=8, num_blocks=2, embed_dim=32, num_classes=10), ("fc1", "fc2")
    ),
    "ConvNeXt": (
        lambda: timm.create_model(
            "convnext_atto", conv_mlp=False, depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), num_classes=10
        ),
        ("mlp.fc1", "mlp.fc2"),
    ),
    "MLP on vectors": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(3072, 32), nn.ReLU(), nn.Linear(32, 10)), ("1", "3")
    ),
    "MLP on a grid": (GridMLP, ("fc1", "fc2", "head")),
}  # fmt: skip


@pytest.mark.parametrize("name", BACKBONES)
def test_a_fresh_injection_changes_neither_logits_nor_input_gradient_by_a_bit(name: str) -> None:
    build, layers = BACKBONES[name]
    torch.manual_seed(0)
    plain = build()
    adapted = add_experts(copy.deepcopy(plain), layers=layers, rank=2)
    assert expert_layers(adapted)
    x = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert_computes_the_same(plain, adapted, x)


def test_the_backbone_keeps_its_parameters_and_their_names() -> None:
    plain = tiny_vit()
    parameters = dict(plain.named_parameters())
    adapted = add_experts(plain, rank=2)
    assert adapted is plain
    assert all(adapted.get_parameter(name) is parameter for name, parameter in parameters.items())


def test_a_plain_state_dict_loads_and_only_the_experts_are_missing() -> None:
    torch.manual_seed(0)
    source, adapted = tiny_vit(), add_experts(tiny_vit(), rank=2)
    missing, unexpected = adapted.load_state_dict(source.state_dict(), strict=False)
    assert not unexpected
    own = ("A", "B", *GATE, "projection.weight", "projection.bias")
    assert set(missing) == {f"{layer}.{part}" for layer in expert_layers(adapted) for part in own}
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(adapted.eval()(x), source.eval()(x))


def test_experts_follow_dtype_and_training_mode_of_their_layer() -> None:
    model = add_experts(tiny_vit().double().eval(), rank=2)
    for layer in expert_layers(model).values():
        assert all(p.dtype == torch.float64 for p in layer.parameters())
        assert not any(module.training for module in layer.modules())


@pytest.mark.parametrize(
    ("projection", "trained"), [("frozen", set()), ("trainable", {"projection.weight"}), ("none", set())]
)
def test_projection_setting_decides_what_is_trained(projection: Any, trained: set[str]) -> None:
    layer = mixture(projection=projection)
    names = {name for name, p in layer.named_parameters() if name.startswith("projection") and p.requires_grad}
    assert names == trained  # its bias cancels in Eq. 7; trainable, it would wait for a gradient that never comes
    assert (layer.projection is None) == (projection == "none")


# Autocast and compilation


def test_bf16_autocast_gives_bf16_close_to_fp32() -> None:
    layer, h = mixture(32, 24, experts=4, rank=8).float(), tokens(2, 9, 32, dtype=torch.float32)
    full = layer(h)
    with torch.autocast("cpu", torch.bfloat16), record_gates(layer) as recorder:
        half = layer(h)
    assert half.dtype == torch.bfloat16
    assert (half.float() - full).norm() < 0.01 * full.norm()
    half.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in (layer.A, layer.B, layer.weight))
    (gates,) = recorder.gates.values()
    assert {part.dtype for part in gates} == {torch.float32}  # softmaxes are not rounded


def test_compiled_equals_eager_also_while_recording_and_training() -> None:
    eager = nn.ModuleDict({"fc": mixture().float()})
    compiled = copy.deepcopy(eager)
    compiled["fc"].compile(fullgraph=True, backend="aot_eager")
    h = tokens(2, 4, 6, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(compiled["fc"](h), eager["fc"](h))
    gradients = []
    for model in (eager, compiled):
        with record_gates(model) as recorder:
            out = model["fc"](h)
        gates = recorder.gates["fc"]
        (out.square().sum() + gates.local.square().sum() + gates.global_.square().sum()).backward()
        gradients.append([out, *gates] + [p.grad for p in model.parameters() if p.requires_grad])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(other, one)
    with torch.no_grad():  # and again without recording
        torch.testing.assert_close(compiled["fc"](h), eager["fc"](h))
    assert len(recorder.records) == 1


# Parameter counts of the paper


def vit_b(layers: tuple[str, ...] = (), **settings: Any) -> nn.Module:
    """ViT-B for 32-pixel images in patches of 4, without memory."""
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224", img_size=32, patch_size=4, num_classes=10)
        return add_experts(model, layers=layers, **settings) if layers else model


def count(model: nn.Module, *, trained: bool = False) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trained)


PLAIN = 85_152_010
DEIT = "deit_base_patch16_224"


def test_vit_b_and_deit_b_have_the_papers_size() -> None:
    assert count(vit_b()) == PLAIN
    with torch.device("meta"):
        assert count(timm.create_model(DEIT, img_size=32, patch_size=4, num_classes=10)) == PLAIN


@pytest.mark.parametrize("projection", ["frozen", "trainable"])
def test_rome_on_vit_b_has_the_papers_size(projection: str) -> None:
    model = vit_b(("qkv", "proj"), projection=projection)
    assert count(model) == 88_850_602
    projections = 24 * (4 * 100 + 100)
    biases = 24 * 100  # never trained
    assert count(model, trained=True) == 88_850_602 - (projections if projection == "frozen" else biases)


FFN = ("fc1", "fc2")


@pytest.mark.parametrize(
    ("layers", "millions"),
    [
        (("qkv",), 2.44),
        (("proj",), 1.26),
        (FFN, 6.28),
        (("qkv", "proj"), 3.70),
        # The paper prints 8.82 here. Its rows for QKV and FFN alone add up to 2.44 + 6.28 = 8.72, and all three
        # (9.98) less Out (1.26) is 8.72 too: a misprint.
        (("qkv", *FFN), 8.72),
        (("proj", *FFN), 7.54),
        (("qkv", "proj", *FFN), 9.98),
    ],
    ids=str,
)
def test_added_parameters_of_table_a4(layers: tuple[str, ...], millions: float) -> None:
    assert round((count(vit_b(layers)) - PLAIN) / 1e6, 2) == millions


# Which layers


@pytest.mark.parametrize(
    ("layers", "leaves"),
    [
        ("qkv", {"attn.qkv"}),
        (("attn.proj",), {"attn.proj"}),
        ("mlp.fc?", {"mlp.fc1", "mlp.fc2"}),
        ("blocks.*.mlp.fc?", {"mlp.fc1", "mlp.fc2"}),
        ("*.attn.*", {"attn.qkv", "attn.proj"}),
    ],
)
@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_layers_are_named_by_their_end_or_a_pattern(layers: Any, leaves: set[str], prefix: str) -> None:
    model = tiny_vit() if not prefix else nn.ModuleDict({"backbone": tiny_vit()})
    adapted = expert_layers(add_experts(model, layers=layers, rank=2))
    assert set(adapted) == {f"{prefix}blocks.{i}.{leaf}" for i in range(2) for leaf in leaves}


def test_an_end_is_a_whole_name_not_part_of_one() -> None:
    model = nn.ModuleDict({"qkv": nn.Linear(4, 4), "my_qkv": nn.Linear(4, 4)})
    assert set(expert_layers(add_experts(model, layers="qkv", rank=2))) == {"qkv"}


# Refusals: each leaves the model as it was


def heads() -> nn.Module:
    return nn.ModuleDict({"qkv": nn.Linear(8, 8), "proj": nn.Linear(8, 8)})


def shared() -> nn.Module:
    model = heads()
    model["again"] = model["proj"]
    return model


class Attention(nn.Module):
    """A module of nn.MultiheadAttention beside a layer that could be adapted."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 8)
        self.attn = nn.MultiheadAttention(8, 2)


class Quantized(nn.Linear):
    """A Linear that is not plain."""


def conv(*, size: Any = 3, **settings: Any) -> nn.Module:
    return nn.ModuleDict({"conv": nn.Conv2d(8, 8, size, **settings)})


def spectral() -> nn.Module:
    return nn.ModuleDict({"qkv": nn.Linear(8, 8), "proj": nn.utils.spectral_norm(nn.Linear(8, 8))})


def own_forward() -> nn.Module:
    model = nn.ModuleDict({"qkv": nn.Linear(8, 8), "proj": nn.Linear(8, 8)})
    model.proj.forward = lambda x: 2 * x
    return model


REFUSALS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "nothing matches": (tiny_vit, {"layers": "q"}, r"no Linear or Conv2d layer matches 'q'.*fc1, fc2, head, proj, qkv"),
    "one of two matches nothing": (tiny_vit, {"layers": ("qkv", "out")}, r"matches 'out'; .*fc1, fc2, head, proj, qkv"),
    "nothing of the paper's": (lambda: nn.Sequential(nn.Linear(3, 3)), {}, r"neither fused attention .* ending in 0"),
    "no layers at all": (lambda: nn.Sequential(nn.ReLU()), {"layers": "qkv"}, r"no Linear or Conv2d layers at all"),
    "a convolution in groups": (lambda: conv(groups=2), {"layers": "conv"}, r"conv .* a convolution in 2 groups"),
    "an oblong kernel": (lambda: conv(size=(1, 3)), {"layers": "conv"}, r"kernel \(1, 3\) is not square"),
    "padding by name": (lambda: conv(padding="same"), {"layers": "conv"}, r"padding \('same', zeros\)"),
    "padding that is not zeros": (lambda: conv(padding_mode="circular"), {"layers": "conv"}, r"\(0, 0\), circular"),
    "out_proj of MultiheadAttention": (Attention, {"layers": ("qkv", "out_proj")}, r"attn\.out_proj.*MultiheadAtt"),
    "linear1 of TransformerEncoderLayer": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), {"layers": "linear1"}, "TransformerEncoderLayer"
    ),
    "inside a TransformerEncoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2),
        {"layers": "linear2"},
        r"layers\.0\.linear2.*TransformerEncoderLayer reads",
    ),
    "one module under two names": (shared, {"layers": ("qkv", "proj")}, r"proj and again are one shared module"),
    "adapted already": (lambda: add_experts(tiny_vit(), rank=2), {}, r"attn.qkv cannot hold .* has experts already"),
    "compiled": (lambda: torch.compile(tiny_vit()), {}, r"compiled already: add the experts first"),
    "rank above a layer's size": (tiny_vit, {"rank": 33}, r"rank 33 exceeds layer blocks\.0\.attn\.qkv.*at most 32"),
    "windows nobody counts": (lambda: tiny_swin(dynamic=True), {}, r"windows of an image, .* not declare how many"),
    "a subclass of Linear": (
        lambda: nn.ModuleDict({"proj": Quantized(8, 8)}), {"layers": "proj"}, r"proj .*a Quantized, not a plain"
    ),
    "a forward of its own": (own_forward, {"layers": "proj"}, r"proj .* a forward of its own"),
    "a computed weight": (spectral, {"layers": "proj"}, r"proj .*computed at each call"),
    "a parametrized weight": (
        lambda: nn.ModuleDict(
            {"qkv": nn.Linear(8, 8), "proj": nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))}
        ), {"layers": "proj"}, r"proj .*ParametrizedLinear",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_a_refusal_says_why_and_leaves_the_model_as_it_was(case: str) -> None:
    build, settings, message = REFUSALS[case]
    model = build()
    modules = [(name, module, type(module)) for name, module in model.named_modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError, match=message):
        add_experts(model, **({"rank": 2} | settings))
    after = [(name, module, type(module)) for name, module in model.named_modules()]
    assert all(a[0] == b[0] and a[1] is b[1] and a[2] is b[2] for a, b in zip(modules, after, strict=True))
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())
    assert not hasattr(model, "experts_settings") or case == "adapted already"


def test_rank_may_equal_the_smaller_side() -> None:
    assert len(expert_layers(add_experts(tiny_vit(), rank=32))) == 4


@pytest.mark.parametrize(
    "settings", [{"rank": 0}, {"experts": 0}, {"layers": ()}, {"projection": "learned"}, {"ranks": 4}], ids=str
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        LowRank(**settings)


def test_a_second_group_of_layers_can_be_adapted_differently() -> None:
    model = add_experts(add_experts(tiny_vit(), layers="qkv", rank=2), layers=("fc1", "fc2"), rank=3)
    assert [layer.rank for layer in expert_layers(model).values()] == [2, 3, 3, 2, 3, 3]


@pytest.mark.parametrize(
    ("setting", "value"), [("rank", 0), ("experts", -1), ("layers", ()), ("projection", "learned")]
)
def test_add_experts_names_the_setting_that_is_out_of_range(setting: str, value: Any) -> None:
    model = tiny_vit()
    with pytest.raises(UserError, match=setting):
        add_experts(model, **{setting: value})
    assert not expert_layers(model)


def test_b_may_start_away_from_zero() -> None:
    torch.manual_seed(0)
    for layer in (nn.Linear(64, 96), nn.Conv2d(32, 48, 3, padding=1)):
        model = nn.Sequential(nn.Identity(), layer)
        LowRank(rank=8, layers=("1",), initial_b=0.02).inject(model)
        adapted = next(iter(expert_layers(model).values()))
        assert adapted.B.std().item() == pytest.approx(0.02, rel=0.1)
        assert adapted.B.requires_grad
