"""Weights of others: usual wrappings are understood, nothing is executed, what does not fit is counted and named."""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import timm
import timm.layers
import torch
import torch.optim.swa_utils
from safetensors.torch import save_file
from torch import Tensor, nn

import rome
import rome.experts
from rome.core.errors import UserError
from rome.models import ModelSettings, build_model, create_model, load_model, load_weights, save_experts, save_model
from rome.models.fitting import head_names

TINY = {"depth": 10, "width": 1}


def tiny(seed: int = 0, **changes: Any) -> rome.models.Classifier:
    torch.manual_seed(seed)
    return create_model("wide_resnet", **({"num_classes": 10} | TINY | changes))


def vit(seed: int = 0, **changes: Any) -> rome.models.Classifier:
    torch.manual_seed(seed)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2, "num_classes": 10}
    return create_model("vit_tiny_patch16_224", **(sizes | changes))


def copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def theirs() -> dict[str, Tensor]:
    """The state dict that somebody else would save: of the backbone alone."""
    return copied(tiny(seed=1).backbone)


@pytest.fixture
def save(tmp_path: Path) -> Callable[[Any], Path]:
    """Write something with torch.save."""

    def write(held: Any, name: str = "theirs.pt") -> Path:
        torch.save(held, tmp_path / name)
        return tmp_path / name

    return write


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}


# What is understood


@pytest.mark.parametrize("wrapper", ["", "state_dict", "model", "model_state_dict", "net", "model+state_dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "model.", "backbone.", "_orig_mod.", "module._orig_mod.model."])
def test_a_checkpoint_is_unwrapped_and_its_prefixes_stripped(
    wrapper: str, prefix: str, theirs: dict[str, Tensor], save: Callable[..., Path]
) -> None:
    held: Any = prefixed(theirs, prefix)
    for key in reversed(wrapper.split("+") if wrapper else []):
        held = {"epoch": 3, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}, key: held}
    model = tiny()
    load_weights(model, save(held))
    assert same(copied(model.backbone), theirs)
    assert model.mean.flatten().tolist() == pytest.approx([0.4914, 0.4822, 0.4465]), "the model's own"


@pytest.mark.parametrize("name", ["a.pt", "a.pth", "a.ckpt", "a.bin", "a.pth.tar", "a.safetensors"])
def test_the_ending_tells_the_format(name: str, theirs: dict[str, Tensor], tmp_path: Path) -> None:
    (save_file if name.endswith("safetensors") else torch.save)(theirs, tmp_path / name)
    model = create_model("wide_resnet", num_classes=10, weights=tmp_path / name, **TINY)
    assert same(copied(model.backbone), theirs)


@pytest.mark.parametrize("names", [("mean", "std"), ("mu", "sigma"), ("normalize.mean", "normalize.std")])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_the_files_normalisation_counts_whatever_its_shape(
    names: tuple[str, str], prefix: str, theirs: dict[str, Tensor], save: Callable[..., Path]
) -> None:
    inner = "model." if names[0].startswith("normalize") else ""
    mean, std = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1), torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1)
    state = {**prefixed(theirs, prefix + inner), prefix + names[0]: mean, prefix + names[1]: std}
    model = tiny()
    load_weights(model, save(state))
    assert same(copied(model.backbone), theirs)
    assert torch.equal(model.mean, mean.view(1, 3, 1, 1))
    assert torch.equal(model.std, std)


def layouts(state: dict[str, Tensor]) -> dict[str, tuple[Any, str]]:
    """Checkpoints of usual tools: what they hold, and what is said of it."""
    swa = prefixed(state, "module.") | {"n_averaged": torch.tensor(7)}
    madry = prefixed(state, "module.model.") | prefixed(state, "module.attacker.model.")
    for place in ("module.normalizer", "module.attacker.normalize"):
        madry |= {f"{place}.new_mean": torch.full((3, 1, 1), 0.25), f"{place}.new_std": torch.full((3, 1, 1), 0.5)}
    sequential = {"0.mean": torch.full((3,), 0.25), "0.std": torch.full((3,), 0.5), **prefixed(state, "1.")}
    lightning = {"state_dict": prefixed(state, "model.net.") | {"criterion.weight": torch.ones(10)}, "epoch": 3}
    moments = {"state": {0: {"exp_avg": torch.ones(3)}, 1: {"exp_avg": torch.ones(3)}}}
    return {
        "AveragedModel": (swa, "the weights under module are loaded; left out: n_averaged"),
        "MadryLab": ({"model": madry}, "normalisation of .*: mean 0.25, 0.25, 0.25, std 0.5, 0.5, 0.5"),
        "Sequential": (sequential, "normalisation of .*: mean 0.25, 0.25, 0.25, std 0.5, 0.5, 0.5"),
        "Lightning": (lightning, r"under state_dict\.model\.net are loaded; left out: state_dict\.criterion\.weight"),
        "optimizer": ({"model_state": state, "optimizer": moments}, r"left out: optimizer \(2 tensors\)"),
        "BYOL": ({"state_dict": prefixed(state, "encoder.") | {"proj.0.weight": torch.ones(2)}}, "state_dict.proj.0"),
        "args": ({"state_dict": state, "args": argparse.Namespace(lr=0.1)}, ""),
        "only averaged": ({"state_dict_ema": state}, ""),
    }


@pytest.mark.parametrize("tool", layouts({}))
def test_the_prefix_below_which_a_model_is_complete_is_found(
    tool: str, theirs: dict[str, Tensor], save: Callable[..., Path]
) -> None:
    held, said = layouts(theirs)[tool]
    model = tiny()
    remarks = load_weights(model, save(held))
    assert same(copied(model.backbone), theirs)
    assert bool(remarks) == bool(said)
    assert re.search(said, "".join(remarks))
    normalised = "normalisation" in said
    assert model.mean.flatten().tolist() == pytest.approx([0.25] * 3 if normalised else [0.4914, 0.4822, 0.4465])
    assert model.std.flatten().tolist() == pytest.approx([0.5] * 3 if normalised else [0.2471, 0.2435, 0.2616])


def test_averaged_weights_are_taken_where_timm_takes_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    raw, averaged = (timm.create_model("resnet10t", num_classes=4) for _ in range(2))
    file = tmp_path / "last.pth.tar"
    torch.save({"arch": "resnet10t", "state_dict": raw.state_dict(), "state_dict_ema": averaged.state_dict()}, file)
    model = create_model("resnet10t", num_classes=4)
    (remark,) = load_weights(model, file)
    reference = timm.create_model("resnet10t", num_classes=4, checkpoint_path=str(file))
    assert same(copied(model.backbone), copied(reference))
    assert "averaged weights (state_dict_ema) are loaded" in remark
    assert "--weights-key" in remark
    chosen = create_model("resnet10t", num_classes=4, weights=file, weights_key="state_dict")
    assert same(copied(chosen.backbone), copied(raw))


def test_several_models_in_a_file_are_refused_without_a_key(
    theirs: dict[str, Tensor], save: Callable[..., Path]
) -> None:
    other = copied(tiny(seed=2).backbone)
    file = save({"teacher": prefixed(other, "module."), "student": prefixed(theirs, "module.")})
    with pytest.raises(UserError, match=r"holds 2 sets .* differ: teacher\.module, student\.module; set model\."):
        load_weights(tiny(), file)
    model = tiny()
    load_weights(model, file, key="student")
    assert same(copied(model.backbone), theirs)
    with pytest.raises(UserError, match=r"no tensors of this model under 'stud'; its keys: teacher .*, student"):
        load_weights(tiny(), file, key="stud")
    wider = copied(tiny(seed=2, width=2).backbone)
    load_weights(model, save({"teacher": wider, "student": other}))  # one fits by its shapes
    assert same(copied(model.backbone), other)


def test_trades_wide_resnet_takes_its_checkpoints_and_the_other_one_does_not(save: Callable[..., Path]) -> None:
    torch.manual_seed(1)
    source = create_model("wide_resnet_trades", num_classes=10, **TINY).backbone
    state = copied(source)
    state |= {f"sub_{name}": torch.randn_like(value.float()) for name, value in state.items() if "block1" in name}
    model = create_model("wide_resnet_trades", num_classes=10, weights=save(prefixed(state, "module.")), **TINY)
    assert same(copied(model.backbone), copied(source))
    with pytest.raises(UserError, match=r"does not fit .*; its names are those of model\.name=wide_resnet_trades"):
        tiny(weights=save(state))


def test_the_content_tells_the_format(theirs: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(theirs, tmp_path / "theirs.pt")
    torch.save(theirs, tmp_path / "theirs.safetensors")
    torch.save(theirs, tmp_path / "old.weights", _use_new_zipfile_serialization=False)
    for name in ("theirs.pt", "theirs.safetensors", "old.weights"):
        assert same(copied(tiny(weights=tmp_path / name).backbone), theirs)


def test_a_model_in_several_files_is_put_together(theirs: dict[str, Tensor], tmp_path: Path) -> None:
    names = list(theirs)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, part in shards.items():
        save_file({name: theirs[name] for name in part}, tmp_path / shard)
    index = {"weight_map": {name: shard for shard, part in shards.items() for name in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert same(copied(tiny(weights=tmp_path).backbone), theirs)
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(UserError, match=r"there is no model at .*b\.safetensors"):
        tiny(weights=tmp_path)


def test_a_backbone_whose_own_names_look_like_prefixes_is_left_alone(save: Callable[..., Path]) -> None:
    class Wrapped(nn.Module):
        """Names: model.weight, model.bias, and its own mean and std."""

        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Linear(3, 2)
            self.register_buffer("mean", torch.rand(1))
            self.register_buffer("std", torch.rand(1))

    source, target = Wrapped(), rome.models.Classifier(Wrapped(), (0.5,), (0.5,))
    for prefix in ("", "module.", "model."):
        load_weights(target, save(prefixed(copied(source), prefix)))
        assert same(copied(target.backbone), copied(source))
        assert target.mean.item() == 0.5


def test_a_plain_module_takes_a_checkpoint_too(save: Callable[..., Path]) -> None:
    source, target = nn.Linear(3, 2), nn.Linear(3, 2)
    load_weights(target, save({"state_dict": prefixed(copied(source), "module.")}))
    assert same(copied(target), copied(source))
    target.register_buffer("mean", torch.zeros(1))
    with pytest.raises(UserError, match="mean is missing in the file"):
        load_weights(target, save(copied(source)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_another_precision_becomes_the_models_and_is_said(
    dtype: torch.dtype, theirs: dict[str, Tensor], save: Callable[..., Path]
) -> None:
    model = tiny()
    cast = {name: value.to(dtype) if value.is_floating_point() else value for name, value in theirs.items()}
    (remark,) = load_weights(model, save(cast))
    assert remark.endswith(f"its weights are {str(dtype).removeprefix('torch.')}")
    for name, value in copied(model.backbone).items():
        assert value.dtype == theirs[name].dtype
        assert torch.equal(value, cast[name].to(value.dtype))


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.int64], ids=str
)
def test_another_type_of_number_is_no_weight(
    dtype: torch.dtype, theirs: dict[str, Tensor], save: Callable[..., Path]
) -> None:
    model = tiny()
    before = copied(model)
    with pytest.raises(UserError, match=r"backbone\.init_conv\.weight holds .*, in the model real numbers"):
        load_weights(model, save(theirs | {"init_conv.weight": theirs["init_conv.weight"].to(dtype)}))
    assert same(copied(model), before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(
    value: float, theirs: dict[str, Tensor], save: Callable[..., Path], tmp_path: Path
) -> None:
    theirs["layer.0.block.0.conv_0.weight"][0, 0, 0, 0] = value
    with pytest.raises(UserError, match=r"backbone\.layer\.0\.block\.0\.conv_0\.weight is not finite"):
        load_weights(tiny(), save(theirs))
    model = tiny()
    with torch.no_grad():
        model.backbone.logits.bias[0] = value
    save_model(model, tmp_path / "m.safetensors")
    with pytest.raises(UserError, match=r"backbone\.logits\.bias is not finite"):
        load_model(tmp_path / "m.safetensors")


def test_the_normalisation_that_timm_keeps_beside_weights_for_the_hub_is_taken(tmp_path: Path) -> None:
    model = vit(seed=1)
    tensors = {name: value.contiguous() for name, value in model.backbone.state_dict().items()}
    save_file(tensors, tmp_path / "model.safetensors")
    config = {"architecture": "vit", "pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for source in (tmp_path, tmp_path / "model.safetensors"):
        loaded = vit()
        assert any("mean 0.1, 0.2, 0.3, std 0.4, 0.5, 0.6" in remark for remark in load_weights(loaded, source))
        torch.testing.assert_close(loaded.mean.flatten(), torch.tensor([0.1, 0.2, 0.3]))
        torch.testing.assert_close(loaded.std.flatten(), torch.tensor([0.4, 0.5, 0.6]))
    kept = vit()
    load_weights(kept, tmp_path, keep_normalization=True)
    assert torch.equal(kept.mean, vit().mean)
    (tmp_path / "config.json").write_text('{"pretrained_cfg": {"mean": [null], "std": [1]}}')
    load_weights(kept, tmp_path)
    assert torch.equal(kept.mean, vit().mean), "one without numbers is ignored"


def test_a_normalisation_that_is_given_stands(save: Callable[..., Path], theirs: dict[str, Tensor]) -> None:
    file = save(theirs | {"mean": torch.full((3,), 0.25), "std": torch.full((3,), 0.5)})
    model = tiny()
    assert load_weights(model, file, keep_normalization=True) == [
        f"normalisation: mean 0.4914, 0.4822, 0.4465, std 0.2471, 0.2435, 0.2616, as given; {file} has "
        "mean 0.25, 0.25, 0.25, std 0.5, 0.5, 0.5"
    ]
    assert model.mean.flatten().tolist() == pytest.approx([0.4914, 0.4822, 0.4465])
    assert tiny(weights=file, mean=(0.1, 0.2, 0.3)).mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    recipe = tiny(weights=file).recipe
    assert recipe is not None
    assert recipe["mean"] == (0.25, 0.25, 0.25), "of what the model does"
    with pytest.raises(UserError, match=r"mean 125, .*not for images in \[0, 1\]"):
        tiny(weights=save(theirs | {"mean": torch.full((3,), 125.0), "std": torch.full((3,), 60.0)}))


def test_weights_of_a_model_built_with_other_arguments_are_told(tmp_path: Path) -> None:
    save_model(tiny(activation="relu"), tmp_path / "m.safetensors")
    remarks = load_weights(tiny(), tmp_path / "m.safetensors")
    assert f"{tmp_path / 'm.safetensors'} was saved from a model with activation=relu (here None)" in remarks


def test_counters_that_old_checkpoints_lack_are_not_missed(
    theirs: dict[str, Tensor], save: Callable[..., Path]
) -> None:
    old = {name: value for name, value in theirs.items() if not name.endswith("num_batches_tracked")}
    assert len(old) < len(theirs)
    load_weights(tiny(), save(old))


def test_an_unfinished_runs_checkpoint_is_a_start(save: Callable[..., Path]) -> None:
    source = tiny(seed=1, mean=(0.1, 0.2, 0.3))
    model = tiny()
    load_weights(model, save({"model": copied(source), "epoch": 2, "format": 1}, "last.pt"))
    assert same(copied(model), copied(source))


def test_a_config_names_weights_and_drops_a_head(theirs: dict[str, Tensor], save: Callable[..., Path]) -> None:
    settings = ModelSettings(name="wide_resnet", args=TINY, weights=str(save(theirs)), drop_head=True)
    model = build_model(settings, None, classes=4, shape=(3, 32, 32))
    fitting = {name: value for name, value in theirs.items() if not name.startswith("logits")}
    assert all(torch.equal(model.backbone.state_dict()[name], value) for name, value in fitting.items())
    assert model.backbone.logits.weight.shape == (4, 64)
    assert settings.without_weights() == ModelSettings(name="wide_resnet", args=TINY)


# A file that does not fit


def test_everything_that_does_not_fit_is_counted_in_one_line_and_nothing_is_loaded(
    theirs: dict[str, Tensor], save: Callable[..., Path]
) -> None:
    broken = {name: value for name, value in theirs.items() if not name.startswith("layer.2")}
    broken |= {"extra.weight": torch.zeros(1), "init_conv.weight": torch.zeros(2, 2)}
    model = tiny()
    before = copied(model)
    with pytest.raises(UserError) as error:
        load_weights(model, save(broken))
    message = str(error.value)
    missing = [n for n in theirs if n.startswith("layer.2") and not n.endswith("num_batches_tracked")]
    assert "\n" not in message
    assert f"backbone.{sorted(missing)[0]}, " in message
    assert f" and {len(missing) - 3} more are missing in the file; " in message
    assert "; backbone.extra.weight is not in the model; " in message
    assert "; backbone.init_conv.weight is (2, 2) in the file, (16, 3, 3, 3) in the model" in message
    assert "drop_head" not in message
    assert same(copied(model), before)


def test_experts_come_with_the_weights_or_are_dropped_on_purpose(tmp_path: Path) -> None:
    source = rome.add_experts(vit(seed=1), rank=2, gate=rome.DualScale(s=3, b=1))
    for layer in rome.experts.expert_layers(source).values():
        nn.init.normal_(layer.B)
    save_model(source, tmp_path / "m.safetensors")
    save_model(nn.Sequential(nn.Identity(), source), tmp_path / "deep.safetensors")
    torch.save(source.state_dict(), tmp_path / "bare.pt")
    x, plain = torch.rand(2, 3, 32, 32), vit(seed=1)
    for name in ("m", "deep"):
        model = vit(weights=tmp_path / f"{name}.safetensors")
        assert torch.equal(model.eval()(x), source.eval()(x))
        dropped = vit(weights=tmp_path / f"{name}.safetensors", drop_experts=True)
        assert torch.equal(dropped.eval()(x), plain.eval()(x))
    with pytest.raises(UserError, match=r"proj\.A, .* not in the model; it seems to have experts, but only a file"):
        vit(weights=tmp_path / "bare.pt")


def test_training_goes_on_from_a_model_with_experts(tmp_path: Path) -> None:
    sizes = {"embed_dim": 24, "depth": 1, "num_heads": 2}
    shape = {"classes": 10, "shape": (3, 32, 32)}
    for kind, experts in {"low-rank": {"rank": 2}, "ffn": {}, "more": {}}.items():
        chosen = rome.experts.Experts.of_kind(kind).model_validate(experts)
        source = chosen.inject(vit(seed=1))
        with torch.no_grad():
            for parameter in source.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        save_model(source, tmp_path / "m.safetensors")
        start = ModelSettings(
            name="vit_tiny_patch16_224",
            img_size=32,
            patch_size=8,
            args=sizes,
            weights=str(tmp_path / "m.safetensors"),
        )
        assert same(copied(build_model(start, chosen, **shape)), copied(source))
        with pytest.raises(UserError, match=r"has experts, and the config has none: .*model\.drop_experts=true"):
            build_model(start, None, **shape)
    other = rome.experts.LowRank(rank=3)
    save_model(rome.add_experts(vit(seed=1), rank=2), tmp_path / "m.safetensors")
    with pytest.raises(UserError, match=r"does not fit .*drop_experts=true starts with new experts"):
        build_model(start, other, **shape)
    fresh = build_model(start.model_copy(update={"drop_experts": True}), other, **shape)
    assert torch.equal(fresh.backbone.head.weight, vit(seed=1).backbone.head.weight)


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compile": lambda model: torch.compile(model, backend="eager"),  # type: ignore[return-value]
    "DataParallel": nn.DataParallel,
    "AveragedModel": torch.optim.swa_utils.AveragedModel,
    "both": lambda model: nn.DataParallel(torch.compile(model, backend="eager")),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", [*WRAPPERS, "backbone"])
def test_what_is_saved_of_a_wrapped_model_can_be_read(name: str, tmp_path: Path) -> None:
    source = rome.add_experts(vit(seed=1), rank=2)
    state = copied(source)
    if name == "backbone":  # a part of it
        source.backbone = torch.compile(source.backbone, backend="eager")
    wrapped = WRAPPERS.get(name, lambda model: model)(source)
    save_model(wrapped, tmp_path / "m.safetensors")
    save_experts(wrapped, tmp_path / "e.safetensors")
    assert same(copied(load_model(tmp_path / "m.safetensors")), state)
    assert same(copied(rome.load_experts(vit(seed=1), tmp_path / "e.safetensors")), state)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            parameter.zero_()
    load_model(tmp_path / "m.safetensors", wrapped)  # and into it
    save_model(wrapped, tmp_path / "again.safetensors")
    assert same(copied(load_model(tmp_path / "again.safetensors")), state)


def test_what_was_changed_after_it_was_built_is_not_built_again_as_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Activations are in no tensor."""

    def changed() -> nn.Module:
        model = vit(seed=1)
        model.backbone.blocks[0].mlp.act = nn.ReLU()
        return model

    file, message = tmp_path / "m.safetensors", r"was saved from a model with .*1 ReLU \(here 0\)"
    source, x = rome.add_experts(changed(), rank=2).eval(), torch.rand(2, 3, 32, 32)
    save_model(source, file)
    with pytest.raises(UserError, match=f"{message}.*pass the module to load it into"):
        load_model(file)
    capsys.readouterr()
    assert torch.equal(load_model(file, changed())(x), source(x))
    assert capsys.readouterr().err == ""
    load_model(file, vit())
    assert re.search(message, capsys.readouterr().err)
    assert any(re.search(message, remark) for remark in load_weights(vit(), file))


class Own(nn.Module):
    """A module of somebody's around a model."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(2 * x)


def test_settings_of_experts_are_found_inside_a_module_or_saving_is_refused(tmp_path: Path) -> None:
    source = Own(rome.add_experts(vit(seed=1), rank=2, gate=rome.DualScale(s=3, b=1)))
    for layer in rome.experts.expert_layers(source).values():
        nn.init.normal_(layer.B)
    save_model(source, tmp_path / "m.safetensors")
    save_experts(source, tmp_path / "e.safetensors")
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(load_model(tmp_path / "m.safetensors", Own(vit()))(x), source.eval()(x))
    assert torch.equal(rome.load_experts(Own(vit(seed=1)), tmp_path / "e.safetensors").eval()(x), source(x))
    with pytest.raises(UserError, match=r"holds experts with gate: .*'b': 1\.0.*the model's have .*'b': 2\.0"):
        load_model(tmp_path / "m.safetensors", Own(rome.add_experts(vit(), rank=2)))
    with pytest.raises(UserError, match=r"the settings of the experts at net\.0\.attn\.qkv are unknown"):
        save_model(Own(source.net.backbone.blocks), tmp_path / "part.safetensors")
    assert not (tmp_path / "part.safetensors").exists()


def test_a_path_may_begin_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    source = tiny(seed=1)
    save_model(source, "~/m.safetensors")
    assert same(copied(load_model("~/m.safetensors")), copied(source))
    assert same(copied(tiny(weights="~/m.safetensors")), copied(source))


def test_a_deeper_file_of_ours_is_not_taken_for_experts(tmp_path: Path) -> None:
    deep = rome.add_experts(vit(depth=2), experts=2, rank=2)
    save_model(deep, tmp_path / "deep.safetensors")
    with pytest.raises(UserError, match=r"backbone\.blocks\.1\.attn\.proj\.A.* and \d+ more are not in the model"):
        load_weights(vit(), tmp_path / "deep.safetensors")
    load_weights(vit(depth=2), tmp_path / "deep.safetensors")


@pytest.mark.parametrize(("build", "head"), [(tiny, "logits"), (vit, "head")])
def test_another_number_of_classes_says_what_to_do(build: Any, head: str, tmp_path: Path) -> None:
    source = build(seed=1)
    torch.save(source.backbone.state_dict(), tmp_path / "theirs.pt")
    save_model(source, tmp_path / "ours.safetensors")
    for file in (tmp_path / "theirs.pt", tmp_path / "ours.safetensors"):
        with pytest.raises(UserError) as error:
            build(num_classes=4, weights=file)
        assert f"backbone.{head}.bias is (10,) in the file, (4,) in the model" in str(error.value)
        assert str(error.value).endswith(
            "only the head differs: set model.drop_head=true (drop_head=True) to start with a new one"
        )
        fresh = build(seed=5, num_classes=4)
        model = build(seed=5, num_classes=4, weights=file, drop_head=True)
        assert head_names(model) == (f"backbone.{head}",)
        for name, value in copied(model).items():
            expected = fresh if name.startswith(f"backbone.{head}.") else source
            assert torch.equal(value, expected.state_dict()[name]), name


def test_a_file_without_a_head_needs_drop_head(theirs: dict[str, Tensor], save: Callable[..., Path]) -> None:
    file = save({name: value for name, value in theirs.items() if not name.startswith("logits")})
    with pytest.raises(UserError, match=r"logits\.weight are missing in the file; only the head differs: set model"):
        tiny(weights=file)
    tiny(weights=file, drop_head=True)


def test_timm_knows_which_layers_are_the_head() -> None:
    for name, heads in (
        ("swin_tiny_patch4_window7_224", ["head.fc"]),
        ("deit_tiny_distilled_patch16_224", ["head", "head_dist"]),
    ):
        with torch.device("meta"):
            model = create_model(name, num_classes=10)
        assert list(head_names(model)) == [f"backbone.{head}" for head in heads]


def test_a_head_that_cannot_be_dropped(save: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match=r"drop_head drops the last layer of model\.weights, which is not set"):
        tiny(drop_head=True)
    conv = nn.Conv2d(3, 2, 1)
    with pytest.raises(UserError, match="it is unknown which layer is its head"):
        load_weights(conv, save(copied(conv)), drop_head=True)


# A file that cannot be read


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


def test_nothing_in_a_checkpoint_is_executed(save: Callable[..., Path], tmp_path: Path) -> None:
    file = save({"state_dict": {}, "trap": Trap(tmp_path / "executed")})
    with pytest.raises(UserError, match=r"theirs\.pt holds code \(\S+\), and rome loads only tensors"):
        load_weights(tiny(), file)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("held", "message"),
    [
        (
            nn.Linear(2, 2),
            r"holds code \(torch\.nn\.modules\.linear\.Linear\).*torch\.save\(model\.state_dict",
        ),
        ({"state_dict": {"a": torch.ones(1)}, "best": np.float64(0.5)}, r"holds code \(numpy"),
        ([torch.ones(1)], r"holds no state dict but a list; save model\.state_dict\(\), alone or under a key"),
        (torch.ones(1), r"holds no state dict but a Tensor; "),
        ({"epoch": 3}, r"holds no state dict but a dict \(epoch\); "),
        ({"state_dict": {}}, r"holds no state dict but a dict \(state_dict\); "),
        ({"model": {"a": torch.ones(1), "step": 3}}, r"does not fit .* missing in the file; .*model\.a is not in the"),
    ],
    ids=["module", "numpy", "list", "tensor", "no tensors", "empty", "another model"],
)
def test_what_is_no_state_dict_is_explained(held: Any, message: str, save: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match=message) as error:
        load_weights(tiny(), save(held))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"words, not weights", None], ids=["empty", "text", "cut short"])
def test_a_damaged_checkpoint_is_named(
    content: bytes | None, theirs: dict[str, Tensor], save: Callable[..., Path]
) -> None:
    file = save(theirs)
    file.write_bytes(file.read_bytes()[:-200] if content is None else content)
    with pytest.raises(UserError, match=r"theirs\.pt .*; copy it again$"):
        load_weights(tiny(), file)


def test_files_that_are_not_there_or_hold_something_else(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no checkpoint at .*nowhere\.pth; give an existing file"):
        load_weights(tiny(), tmp_path / "nowhere.pth")
    with pytest.raises(UserError, match="there is no model at"):
        load_weights(tiny(), tmp_path / "nowhere")
    save_experts(rome.add_experts(vit(), rank=2), tmp_path / "e.safetensors")
    with pytest.raises(UserError, match="holds only experts, without a backbone"):
        load_weights(vit(), tmp_path / "e.safetensors")


def test_pyautoattack_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pyautoattack is not installed with its example weights: pip install"):
        create_model("resnet_18", num_classes=10, weights="pyautoattack")


def test_pyautoattacks_weights_fit_its_resnet_alone() -> None:
    with pytest.raises(UserError, match=r"^pyautoattack does not fit the model: .*only the head differs"):
        create_model("resnet_18", num_classes=100, weights="pyautoattack")
    with pytest.raises(UserError, match=r"^pyautoattack does not fit the model: .* not in the model"):
        tiny(weights="pyautoattack")


# timm


@pytest.mark.skipif(
    tuple(map(int, re.findall(r"\d+", timm.__version__)[:3])) < (1, 0, 31),
    reason="earlier ones read no .pt file that a config names",
)
def test_pretrained_embeddings_are_resampled_by_timm(tmp_path: Path) -> None:
    """A ViT at 224 pixels with patches of 16 becomes one at 32 with patches of 4: 14x14 positions become 8x8."""
    source = vit(img_size=224, patch_size=16, num_classes=1000).backbone
    nn.init.normal_(source.pos_embed)
    torch.save(source.state_dict(), tmp_path / "hub.pt")
    overlay = {"file": str(tmp_path / "hub.pt")}
    model = vit(seed=1, img_size=32, patch_size=4, pretrained=True, pretrained_cfg_overlay=overlay)
    ours, hub = model.backbone.state_dict(), source.state_dict()
    resampled = {
        "pos_embed": timm.layers.resample_abs_pos_embed(hub["pos_embed"], (8, 8), num_prefix_tokens=1),
        "patch_embed.proj.weight": timm.layers.resample_patch_embed(hub["patch_embed.proj.weight"], [4, 4]),
    }
    for name, value in ours.items():
        if name in resampled:
            torch.testing.assert_close(value, resampled[name])
        elif name.startswith("head."):
            assert value.shape[0] == 10
        else:
            assert torch.equal(value, hub[name]), name
    save_model(model, tmp_path / "m.safetensors")
    (tmp_path / "hub.pt").unlink()
    assert same(copied(load_model(tmp_path / "m.safetensors")), copied(model)), "rebuilt without the Hub's file"


# RobustBench


class Zoo(nn.Module):
    """A model as RobustBench's: takes images in [0, 1] and normalises inside."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.net((images.mean((2, 3)) - 0.5) / 0.25)


@pytest.fixture
def robustbench(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A stand-in for the package; what its ``load_model`` was asked for."""
    asked: list[dict[str, Any]] = []

    def load_model(**settings: Any) -> nn.Module:
        asked.append(settings)
        print("Downloading ...")
        if settings["model_name"] == "Blocked2021":
            raise OSError("quota exceeded\ntry later")
        return {"Gowal2020Uncovering_28_10_extra": Zoo()}[settings["model_name"]]

    for name in ("robustbench", "robustbench.utils"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["robustbench.utils"].load_model = load_model  # type: ignore[attr-defined]
    return asked


GOWAL = "robustbench:Gowal2020Uncovering_28_10_extra"


def test_robustbenchs_models_come_with_their_normalisation(
    robustbench: list[dict[str, Any]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = create_model(GOWAL, num_classes=10)
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(model(x), model.backbone(x)), "no second normalisation"
    assert robustbench == [
        {
            "model_name": "Gowal2020Uncovering_28_10_extra",
            "dataset": "cifar10",
            "threat_model": "Linf",
            "model_dir": "models",
        }
    ]
    assert "Downloading" not in capsys.readouterr().out, "standard output holds results only"
    save_model(model, tmp_path / "m.safetensors")
    assert same(copied(load_model(tmp_path / "m.safetensors")), copied(model))


def test_robustbenchs_settings_are_the_models_arguments(robustbench: list[dict[str, Any]]) -> None:
    args = {"dataset": "cifar10", "threat_model": "L2", "model_dir": "elsewhere"}
    settings = ModelSettings(name=GOWAL, args=args, mean=(0.5,), std=(0.5,))
    model = build_model(settings, None, classes=10, shape=(3, 8, 8))
    assert {key: robustbench[0][key] for key in args} == args
    assert model.mean.flatten().tolist() == [0.5] * 3, "given, so taken"


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        (GOWAL, {"dataset": "cifar"}, "RobustBench has no dataset 'cifar'. Did you mean 'cifar10'"),
        (GOWAL, {"threat_model": "linf"}, "RobustBench has no threat_model 'linf'. Did you mean 'Linf'"),
        (
            GOWAL,
            {"num_classes": 7},
            r"has cifar10's 10 classes, not 7; .*model\.weights to its file, and model\.drop_head=true",
        ),
        (GOWAL, {"threat": "L2"}, "cannot be built with .*threat=L2.*threat"),
        ("robustbench:Gowal", {}, "RobustBench has no model 'Gowal' for cifar10 and Linf; .*robustbench.github.io"),
        (
            "robustbench:Blocked2021",
            {},
            r"cannot load Blocked2021: quota exceeded; .*models/cifar10/Linf/Blocked2021\.pt",
        ),
    ],
    ids=str,
)
@pytest.mark.usefixtures("robustbench")
def test_what_robustbench_does_not_have_is_explained(name: str, args: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        create_model(name, **({"num_classes": 10} | args))


@pytest.mark.parametrize(
    ("name", "args", "twin"),
    [
        ("Gowal2020Uncovering_28_10_extra", {"model_dir": "zoo"}, "wide_resnet_28_10"),
        ("Bartoldson2024Adversarial_WRN-94-16", {}, "wide_resnet_94_16"),
        ("Debenedetti2022Light_XCiT-S12", {"dataset": "imagenet"}, "xcit_small_12_p16_224"),
        ("Debenedetti2022Light_XCiT-S12", {}, ""),  # CIFAR-10's has other patches
        ("Carmon2019Unlabeled", {}, ""),
    ],
)
def test_who_counts_builds_the_papers_models_without_robustbench(name: str, args: dict[str, Any], twin: str) -> None:
    settings = ModelSettings(name=f"robustbench:{name}", args=args, num_classes=10, weights="w.pt", pretrained=True)
    kept = {"name": twin, "args": {}} if twin else {"name": settings.name, "args": args}
    assert settings.architecture_only() == ModelSettings(num_classes=10, **kept)


def test_robustbench_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "robustbench", None)
    with pytest.raises(
        UserError, match=r"need the package robustbench .*: pip install git\+https://github\.com/RobustBench"
    ):
        create_model(GOWAL, num_classes=10)
