"""Where experts stand: the layers of every family of models, and windows and class tokens in what a layer sees."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from itertools import product
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from timm.models.swin_transformer import window_partition, window_reverse
from torch import Tensor, nn

from helpers.problems import rest_slow
from helpers.small_models import grow, images, normal, plain_swin, small_cnn, timm_model
from rome.core.errors import UserError
from rome.experts import (
    DualScale,
    Experts,
    FeedForward,
    Layout,
    LowRank,
    MixtureLayer,
    add_experts,
    expert_layers,
    layout_of,
    record_gates,
)
from rome.experts.checking import check_experts
from rome.experts.token_maps import grid_of
from rome.models import ModelSettings, build_model

# Windows


def swin(window: int, *, size: Any = 32, depths: tuple[int, ...] = (2, 2)) -> nn.Module:
    """A small Swin whose experts are grown: at 32 px stages of 8x8 and 4x4 tokens, every second block shifted."""
    torch.manual_seed(0)
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=size, window_size=window, embed_dim=8, depths=depths,
        num_heads=(1,) * len(depths), num_classes=10,
    )  # fmt: skip
    return grow(add_experts(model, rank=2, experts=3).double().eval())


SWINS = [(4, 32), (7, 32), (3, 32), (4, (32, 64)), (3, (24, 40))]


@pytest.mark.parametrize(("window", "size"), SWINS, ids=str)
def test_gates_of_windowed_attention_read_whole_images_without_padding(window: int, size: Any) -> None:
    """Against the tokens caught before the block shifts, pads and cuts them, and after it puts them together."""
    model, x = swin(window, size=size), images(size=size if isinstance(size, tuple) else (size, size))
    blocks = {name: block for name, block in model.named_modules() if hasattr(block, "shift_size")}
    tokens: dict[str, Tensor] = {}
    handles = []
    for name, block in blocks.items():

        def caught(module: nn.Module, args: Any, out: Tensor, name: str = name) -> None:
            tokens[name] = out

        def windows(module: nn.Module, args: Any, name: str = name) -> None:
            tokens[name + ".proj"] = args[0]

        handles += [block.norm1.register_forward_hook(caught), block.attn.proj.register_forward_pre_hook(windows)]
    with record_gates(model) as recorder:
        model(x)
    for handle in handles:
        handle.remove()
    kinds = set()
    for name, block in blocks.items():
        before = tokens[name]
        height, width = before.shape[1:3]
        rows, columns = block.window_size
        padded = (math.ceil(height / rows) * rows, math.ceil(width / columns) * columns)
        kinds.add((any(block.shift_size), padded != (height, width), padded[0] * padded[1] > rows * columns))
        shifted = before.roll([-s for s in block.shift_size], (1, 2))
        joined = window_reverse(
            tokens[name + ".proj"].view(-1, rows, columns, before.shape[3]), (rows, columns), *padded
        )
        inside = F.pad(torch.ones(3, height, width, 1), (0, 0, 0, padded[1] - width, 0, padded[0] - height))
        real = window_partition(inside, (rows, columns)).view(3, -1).bool()
        for leaf, seen in (("qkv", shifted), ("proj", joined[:, :height, :width])):
            layer, gates = block.attn.get_submodule(leaf), recorder.gates[f"{name}.attn.{leaf}"]
            assert gates.weights.shape == (3, height * width, 3)
            torch.testing.assert_close(gates.global_, layer.gate.global_(seen.mean((1, 2))).softmax(-1))
            grid = F.pad(seen, (0, 0, 0, padded[1] - width, 0, padded[0] - height))
            cut = window_partition(grid, (rows, columns)).view(3, -1, before.shape[3])
            local = layer.gate.local(cut[real].view(3, height * width, -1)).softmax(-1)
            torch.testing.assert_close(gates.local, local)
            mixed = (1 - layer.gate.beta) * local + layer.gate.beta * gates.global_.unsqueeze(1)
            torch.testing.assert_close(gates.weights, mixed)
    expected = {4: (True, False, True), 7: (True, True, True), 3: (True, True, True)}[window]
    assert expected in kinds, "a shifted block with several windows must be among them"


def test_the_block_before_the_shift_has_the_same_mean() -> None:
    """A cyclic shift moves no token out: the mean over the image is that of the block's own input."""
    model, x = swin(4), images()
    block = model.layers[0].blocks[1]
    assert any(block.shift_size)
    caught: list[Tensor] = []
    handle = block.norm1.register_forward_hook(lambda module, args, out: caught.append(out))
    with record_gates(model) as recorder:
        model(x)
    handle.remove()
    found = recorder.gates["layers.0.blocks.1.attn.qkv"].global_
    torch.testing.assert_close(found, block.attn.qkv.gate.global_(caught[0].mean((1, 2))).softmax(-1))


@pytest.mark.parametrize("window", [4, 7])
def test_images_of_a_batch_do_not_mix_in_windows(window: int) -> None:
    model, x = swin(window), images(4)
    logits, order = model(x), torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(model(x[order]), logits[order])
    torch.testing.assert_close(model(x[1:2]), logits[1:2])
    changed = x.clone()
    changed[0] = 1 - changed[0]
    assert not torch.allclose(model(changed)[0], logits[0])
    assert torch.equal(model(changed)[1:], logits[1:])


@pytest.mark.parametrize("window", [4, 7])
def test_every_window_of_an_image_is_weighed_by_its_one_global_gate(window: int) -> None:
    """Eq. 2 with the image's own v, token by token, on the windows the layer was given."""
    model = swin(window)
    layer = model.layers[0].blocks[1].attn.qkv
    windows = layer.layout.windows
    h = normal(2 * windows, window**2, 8)
    expected = F.linear(h, layer.weight, layer.bias)
    real = torch.arange(windows * window**2) if layer.real is None else layer.real
    for image in range(2):
        rows = slice(image * windows, (image + 1) * windows)
        own = h[rows].reshape(-1, 8)
        v = layer.gate.global_(own[real].mean(0)).softmax(-1)
        g = (1 - layer.gate.beta) * layer.gate.local(h[rows]).softmax(-1) + layer.gate.beta * v
        for k in range(3):
            update = h[rows] @ layer.A[2 * k : 2 * k + 2].t() @ layer.B[:, 2 * k : 2 * k + 2].t()
            expected[rows] = expected[rows] + g[..., k : k + 1] * update
    torch.testing.assert_close(layer(h), expected)


def test_swin_b_has_24_blocks_and_can_be_planned_without_memory() -> None:
    with torch.device("meta"):
        for window in (4, 7):
            model = timm.create_model("swin_base_patch4_window7_224", img_size=32, window_size=window, num_classes=10)
            assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == 86.69
            layers = add_experts(model)
            betas = [layer.gate.beta for layer in expert_layers(layers).values()]
            assert betas == [1 / (1 + math.exp(-(4 * (1 - (i // 2 + 1) / 24) - 2))) for i in range(48)]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("swinv2_cr_tiny_224", r"attn\.qkv gets 8 inputs for 2 images"),
        ("swinv2_tiny_window8_256", r"attn\.qkv.* never called.*uses the layer's weight without calling the layer"),
    ],
)
def test_windowed_attention_that_cannot_hold_experts_is_refused_when_the_model_is_built(
    name: str, message: str
) -> None:
    args = {"window_size": 4, "embed_dim": 8, "depths": (1, 1), "num_heads": (1, 1)}
    with pytest.raises(UserError, match=message):
        build_model(ModelSettings(name=name, img_size=32, args=args), LowRank(rank=2), classes=10, shape=(3, 32, 32))


class Skipping(nn.Module):
    """Reads the weight of a layer without calling it; takes tokens (B, T, 8), so its images have no known size."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, h: Tensor) -> Tensor:
        return self.second(F.linear(h, self.first.weight)).mean(1)


class Folding(Skipping):
    """Folds the tokens into the batch before its layers."""

    def forward(self, h: Tensor) -> Tensor:
        return self.second(self.first(h.flatten(0, 1))).view(*h.shape[:2], -1).mean(1)


class Conv(nn.Sequential):
    """Tells no size of its images and takes one alone."""

    def __init__(self, wrapped: nn.Module) -> None:
        super().__init__(nn.Conv2d(3, 8, 4, 4), nn.Flatten(2), Turn(), wrapped)


class Turn(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return h.transpose(1, 2)


UNUSED = {
    "beit": lambda: timm_model("beit_base_patch16_224", patch_size=8, embed_dim=32, num_heads=2)(),
    "torchvision swin": lambda: torchvision.models.swin_t(num_classes=10),
    "mobilevit": lambda: timm.create_model("mobilevit_xxs", num_classes=10),
    "never called": lambda: Conv(Skipping()),
    "folded": lambda: Conv(Folding()),
}


@pytest.mark.parametrize("kind", UNUSED)
def test_experts_that_never_run_or_see_no_images_are_refused_and_the_model_is_as_before(kind: str) -> None:
    model = UNUSED[kind]().train()
    layers = ("first", "second") if kind in ("never called", "folded") else None
    before, modules = list(model.state_dict()), list(model.modules())
    with pytest.raises(UserError, match=r"never called in this forward pass|gets \d+ inputs for 2 images"):
        add_experts(model, rank=2, layers=layers)
    assert list(model.state_dict()) == before
    assert [id(module) for module in model.modules()] == [id(module) for module in modules]
    assert all(module.training for module in modules)
    assert not hasattr(model, "experts_settings")


def test_looking_at_fresh_experts_changes_nothing_else() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Conv2d(4, 4, 3), nn.Flatten(2)
    ).train()
    add_experts(model, rank=2, layers=("3",))
    before, random = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    check_experts(model)
    assert all(torch.equal(before[name], now) for name, now in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("build", "message"),
    [(Skipping, "first were never called"), (Folding, r"first gets (8|12) inputs for [23] images")],
)
@pytest.mark.parametrize("how", ["plain", "recorded", "copied", "pickled", "given images"])
def test_where_no_size_is_known_the_first_pass_tells_or_the_images_given(build: Any, message: str, how: str) -> None:
    model, h = build(), torch.rand(3, 4, 8)
    if how == "given images":
        with pytest.raises(UserError, match=message):
            add_experts(model, rank=2, layers=("first", "second"), images=h)
        assert not expert_layers(model)
        return
    add_experts(model, rank=2, layers=("first", "second"))
    if how == "copied":
        model = copy.deepcopy(model)
    if how == "pickled":
        model = pickle.loads(pickle.dumps(model))
    with pytest.raises(UserError, match=message), record_gates(model) if how == "recorded" else nullcontext():
        model(h)


def test_the_first_pass_is_looked_at_once_and_one_that_breaks_off_is_none() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 5))
    add_experts(model, rank=2, layers=("0", "2"))
    names = list(model.state_dict())
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(torch.rand(3, 7))
    assert all(layer.sink is None for layer in expert_layers(model).values())
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="eager")
    h = torch.rand(3, 4, 8)
    torch.testing.assert_close(compiled(h), model(h))
    assert all(layer.sink is None for layer in expert_layers(model).values())
    assert not [*model._forward_hooks, *model._forward_pre_hooks, *model._forward_hooks_always_called]
    assert list(model.state_dict()) == names


class WindowAttention(nn.Module):
    """Of a Swin that writes its window as a number, as the original code does."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)


def test_windows_given_as_a_number_are_square() -> None:
    block = nn.Module()
    block.attn, block.input_resolution, block.window_size = WindowAttention(), (8, 6), 4
    layout = layout_of(nn.ModuleDict({"block": block}), "block.attn.qkv")
    assert layout.windows == 4
    assert len(layout.real) == 48
    columns_inside = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 20, 21, 24, 25, 28, 29]
    assert layout.real == tuple(columns_inside) + tuple(32 + i for i in columns_inside)
    block.input_resolution = (8, 8)
    assert layout_of(nn.ModuleDict({"block": block}), "block.attn.qkv") == Layout(windows=4)


# Which layers


class OwnBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.ModuleDict({"qkv": nn.Linear(8, 24), "proj": nn.Linear(8, 8)})
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, h: Tensor) -> Tensor:
        q, k, v = self.attention["qkv"](h).chunk(3, dim=-1)
        h = h + self.attention["proj"](F.scaled_dot_product_attention(q, k, v))
        return h + self.mlp(h)


class OwnTransformer(nn.Module):
    """Reads an image (B, C, 8, 8) row by row."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.proj = nn.LazyLinear(8)
        self.blocks = nn.ModuleList([OwnBlock(), OwnBlock()])
        self.head = nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        h = self.proj(x.transpose(1, 2).flatten(2))
        for block in self.blocks:
            h = block(h)
        return self.head(h.mean(1))


XCIT = {"embed_dim": 32, "num_heads": 2, "num_classes": 10, "img_size": 32}
FAMILIES: dict[str, tuple[Callable[[], nn.Module], int, list[str]]] = {
    "ViT": (timm_model("vit_tiny_patch16_224"), 1, [f"blocks.{i}.attn" for i in range(2)]),
    "ViT with registers": (timm_model("vit_tiny_patch16_224", reg_tokens=3), 4, [f"blocks.{i}.attn" for i in range(2)]),
    "ViT without class token": (
        timm_model("vit_tiny_patch16_224", class_token=False, global_pool="avg"), 0, ["blocks.0.attn", "blocks.1.attn"]
    ),
    "DeiT": (timm_model("deit_tiny_patch16_224"), 1, [f"blocks.{i}.attn" for i in range(2)]),
    "DeiT, distilled": (timm_model("deit_tiny_distilled_patch16_224"), 2, [f"blocks.{i}.attn" for i in range(2)]),
    "ViT behind a normalisation": (
        lambda: nn.Sequential(nn.Identity(), timm_model("vit_tiny_patch16_224")()),
        1,
        [f"1.blocks.{i}.attn" for i in range(2)],
    ),
    "Swin": (plain_swin, 0, ["layers.0.blocks.0.attn", "layers.1.blocks.0.attn"]),
    "XCiT": (
        lambda: timm.create_model("xcit_small_12_p16_224", **XCIT), 0, [f"blocks.{i}.attn" for i in range(12)]
    ),
    "own transformer": (OwnTransformer, 0, ["blocks.0.attention", "blocks.1.attention"]),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_the_papers_layers_are_qkv_and_proj_of_every_attention_block(family: str) -> None:
    build, prefix, blocks = FAMILIES[family]
    adapted = expert_layers(add_experts(build(), rank=2))
    assert list(adapted) == [f"{block}.{leaf}" for block in blocks for leaf in ("qkv", "proj")]
    assert {layer.layout.prefix for layer in adapted.values()} == {prefix}
    betas = [layer.gate.beta for layer in adapted.values()]
    depth = len(blocks)
    assert betas == [1 / (1 + math.exp(-(4 * (1 - (i // 2 + 1) / depth) - 2))) for i in range(2 * depth)]


def test_xcit_has_experts_in_its_cross_covariance_blocks_and_no_class_token_there() -> None:
    model = add_experts(timm.create_model("xcit_small_12_p16_224", **XCIT), rank=2).eval()
    assert not any(isinstance(module, MixtureLayer) for module in model.cls_attn_blocks.modules())
    with record_gates(model) as recorder:
        model(torch.rand(2, 3, 32, 32))
    assert {gates.weights.shape for gates in recorder.gates.values()} == {(2, 4, 4)}  # 2x2 patches alone


@pytest.mark.parametrize("name", ["patch_embed.proj", "head"])
def test_layers_outside_the_blocks_see_no_class_token(name: str) -> None:
    model = add_experts(timm_model("vit_tiny_patch16_224")(), layers=name, rank=2)
    assert expert_layers(model)[name].layout.prefix == 0


def test_class_tokens_of_an_own_model_are_those_it_tells_and_never_a_convolutions() -> None:
    model = OwnTransformer()
    model.num_prefix_tokens = 2
    model.blocks[0].conv = nn.Conv2d(4, 4, 3)
    assert layout_of(model, "blocks.0.attention.qkv") == Layout(prefix=2)
    assert layout_of(model, "blocks.0.conv") == layout_of(model, "head") == Layout()


def test_a_cnn_has_experts_at_3x3_convolutions_but_not_at_stem_shortcuts_and_groups() -> None:
    model = add_experts(small_cnn(), rank=2)
    assert list(expert_layers(model)) == ["block.0.conv1", "block.0.conv2"]
    assert len({layer.gate.beta for layer in expert_layers(model).values()}) == 1  # one residual block


def test_a_wide_resnet_numbers_its_residual_blocks() -> None:
    names = [f"layer.{group}.block.{i}.conv_{c}" for group, i, c in product(range(3), range(4), range(2))]
    holder = nn.Module()
    for name in names:
        parent = holder
        *path, leaf = name.split(".")
        for part in path:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(leaf, nn.Conv2d(4, 4, 3, padding=1))
    holder.init_conv = nn.Conv2d(3, 4, 3)
    layers = add_experts(holder, layers=("conv_?",), rank=2)
    betas = [layer.gate.beta for layer in expert_layers(layers).values()]
    assert betas == [1 / (1 + math.exp(-(4 * (1 - (i // 2 + 1) / 12) - 2))) for i in range(24)]


# Models whose layers are not where a name says


@pytest.mark.parametrize(
    ("name", "args", "why"),
    [
        ("pvt_v2_b0", {}, r"no fused qkv layer.*layers ending in .*kv, proj, q"),
        ("levit_128s", {}, "no fused qkv layer"),
        ("samvit_base_patch16_224", {"img_size": 64, "depth": 2}, "gets padded windows of Block"),
        ("twins_svt_small", {}, "gets padded windows of LocallyGroupedAttn"),
    ],
)
def test_attention_of_other_forms_is_refused_and_not_adapted_in_part(name: str, args: Any, why: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, **args)
    with pytest.raises(UserError, match=why):
        add_experts(model)
    assert not expert_layers(model)


def test_one_window_that_is_the_whole_image_is_an_image() -> None:
    with torch.device("meta"):
        model = timm.create_model("samvit_base_patch16_224", depth=2)
    assert {layer.layout for layer in expert_layers(add_experts(model)).values()} == {Layout()}


def test_a_stem_of_several_convolutions_is_left_alone() -> None:
    with torch.device("meta"):
        model = timm.create_model("resnet26d")
    assert [name for name in expert_layers(add_experts(model)) if name.startswith("conv1")] == []
    assert next(iter(expert_layers(model))) == "layer1.0.conv2"


def test_feed_forward_experts_stand_in_the_blocks_and_not_in_class_attention() -> None:
    with torch.device("meta"):
        model = timm.create_model("xcit_nano_12_p16_224", depth=3)
        named = timm.create_model("xcit_nano_12_p16_224", depth=3)
    assert list(expert_layers(FeedForward().inject(model))) == [f"blocks.{i}.mlp" for i in range(3)]
    FeedForward(layers=("cls_attn_blocks.0.mlp",)).inject(named)
    assert list(expert_layers(named)) == ["cls_attn_blocks.0.mlp"]


def test_register_tokens_are_no_class_token() -> None:
    build = timm_model("vit_tiny_patch16_224", class_token=False, reg_tokens=2, global_pool="avg")
    with pytest.raises(UserError, match=r"reads a class token, and the input of layer .* has none"):
        LowRank(gate=DualScale(pool="cls")).inject(build())
    with_both = timm_model("vit_tiny_patch16_224", reg_tokens=2)()
    assert LowRank(gate=DualScale(pool="cls")).inject(with_both) is with_both


def test_tokens_in_another_order_have_no_map() -> None:
    with torch.device("meta"):
        model = add_experts(timm.create_model("nest_tiny", img_size=64))
    name = next(iter(expert_layers(model)))
    with pytest.raises(UserError, match="tokens of Nest are not ordered row by row"):
        grid_of(model, name, 64, (64, 64))


# Programs


def program(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "convolution":
        return grow(add_experts(small_cnn(), rank=2)).eval()
    if kind == "window":
        return swin(4).float()
    model = timm_model("vit_tiny_patch16_224")()
    settings: dict[str, Any] = {} if kind == "ffn" else {"rank": 2}
    return grow(Experts.of_kind(kind)(**settings).inject(model)).eval()


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("form", ["export", "trace"])
@pytest.mark.parametrize("kind", rest_slow(["low-rank", "window", "adapter", "ffn", "convolution"], 1))
def test_programs_of_adapted_models_take_any_batch(kind: str, form: str) -> None:
    model = program(kind)
    shape = (1, 8, 8) if kind == "convolution" else (3, 32, 32)
    x, other = (normal(n, *shape, seed=n, dtype=torch.float32) for n in (6, 3))
    with torch.no_grad():
        if form == "export":
            made = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
        else:
            made = torch.jit.trace(model, (x,), check_trace=False)
        torch.testing.assert_close(made(other), model(other), rtol=1e-4, atol=1e-5)
