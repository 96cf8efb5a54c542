"""Features and gates read from every kind of model, and the figures made of them."""

from __future__ import annotations

import csv
import gc
import io
import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from matplotlib.figure import Figure
from torch import Tensor, nn

from helpers.problems import rest_slow
from helpers.small_models import SmallCNN, grow, plain_swin
from helpers.tiny_runs import changed
from rome.cli.app import main
from rome.core.errors import UserError
from rome.data import Digits
from rome.experts import (
    Adapters,
    FeedForward,
    Global,
    Local,
    LowRank,
    Networks,
    Uniform,
    add_experts,
    expert_layers,
    record_gates,
    set_routing,
)
from rome.models import Classifier, build_model, create_model, save_model
from rome.report import features, gates, subject
from rome.report.figures import Options, registered, write_figures
from rome.report.separability import difference, embed, silhouettes
from rome.report.subject import Subject, attack_all
from rome.runs.config import parse
from rome.runs.folder import Run
from rome.threats import DIGITS, LpBall

N = 10
THREATS = ("L1", "L2", "Linf")


def vit() -> Classifier:
    args = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 10}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Classifier(timm.create_model("vit_tiny_patch16_224", in_chans=1, **args), (0.5,), (0.5,)).eval()


def cnn() -> Classifier:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Classifier(SmallCNN(), (0.5,), (0.5,)).eval()


def made(build: Callable[[], nn.Module], settings: Any) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return grow(settings.inject(build())).eval()


KINDS: dict[str, Callable[[], nn.Module]] = {
    "low-rank": partial(made, vit, LowRank(experts=3, rank=2)),
    "global gate": partial(made, vit, LowRank(experts=3, rank=2, gate=Global())),
    "one layer, two experts": partial(made, vit, LowRank(experts=2, rank=2, layers=("blocks.1.attn.proj",))),
    "uniform gate": partial(made, vit, LowRank(experts=2, rank=2, gate=Uniform(), regularizer=None)),
    "adapter": partial(made, vit, Adapters(experts=3, rank=2)),
    "ffn, best two": partial(made, vit, FeedForward(experts=3, top=2)),
    "ffn, all": partial(made, vit, FeedForward(experts=3, top=None, gate=Local())),
    "conv": partial(made, cnn, LowRank(experts=3, rank=2)),
    "conv, peft": partial(made, cnn, LowRank(experts=3, rank=2, conv="peft")),
    "more": partial(made, vit, Networks(experts=3)),
    "more of cnns": partial(made, cnn, Networks(experts=2)),
}
REPLACING = {"ffn, best two", "ffn, all", "more", "more of cnns"}


def batch(seed: int = 0, n: int = N) -> Tensor:
    return torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


class Fake:
    """A subject whose threats are noise: what figures ask of one, without a run and its attack."""

    run = None

    def __init__(self, model: nn.Module, name: str = "a run", threats: tuple[str, ...] = THREATS) -> None:
        self.model, self.name, self.names = model, name, threats

    def images(self, n: int) -> tuple[Tensor, Tensor]:
        return batch(n=n), torch.arange(n) % 10

    def attacked_parts(self, n: int) -> Iterator[Mapping[str, Tensor]]:
        every = self.attacked(n)
        for start in range(0, n, 5):
            yield {name: x[start : start + 5] for name, x in every.items()}

    def attacked(self, n: int) -> Mapping[str, Tensor]:
        x = batch(n=n)
        noise = {name: 0.3 * (batch(i + 1, n) - 0.5) * (i + 1) for i, name in enumerate(self.names)}
        return {"natural": x, **{name: (x + shift).clamp(0, 1) for name, shift in noise.items()}}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def outputs(model: nn.Module, name: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """A module's input and output in a forward, by a hook of the test's own."""
    found: list[Tensor] = []
    module = model.get_submodule(name)
    handle = module.register_forward_hook(lambda _, args, out: found.extend((args[0].clone(), out.clone())))
    with torch.no_grad():
        model(x)
    handle.remove()
    return found[-2], found[-1]


def as_tokens(output: Tensor, prefix: int) -> Tensor:
    if output.ndim == 4:
        return output.flatten(2).mT
    return output.unsqueeze(1) if output.ndim == 2 else output[:, prefix:]


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def test_backbone_and_experts_are_the_layers_real_output(kind: str) -> None:
    model, x = KINDS[kind](), batch()
    for name, layer in expert_layers(model).items():
        given, out = outputs(model, name, x)
        with torch.no_grad(), features.record_features(model, [name]) as found:
            model(x)
        assert torch.equal(found[name].output, as_tokens(out, layer.layout.prefix))
        parts = features.parts(model, {"natural": x}, name)
        assert np.array_equal(parts.output[0], found[name].output.mean(dim=1).numpy())
        if kind in REPLACING:
            with torch.no_grad():
                first = layer.networks[0](given)
            assert torch.equal(found[name].plain, as_tokens(first, layer.layout.prefix))
            assert np.array_equal(parts.experts, parts.output)
        else:
            assert np.allclose(parts.backbone + parts.experts, parts.output, atol=1e-6)
        assert not np.allclose(parts.backbone, parts.output, atol=1e-3)
    assert hooks(model) == 0


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in REPLACING])
def test_the_backbone_at_the_first_layer_is_the_model_with_its_experts_off(kind: str) -> None:
    model, x = KINDS[kind](), batch()
    first, layer = next(iter(expert_layers(model).items()))
    with torch.no_grad(), features.record_features(model, [first]) as found:
        model(x)
    _, off = outputs(set_routing(model, "none"), first, x)
    assert torch.equal(found[first].plain, as_tokens(off, layer.layout.prefix))


def test_features_of_every_block_are_patch_tokens() -> None:
    model, x = vit(), batch()
    assert features.block_layers(model) == ("backbone.blocks.0", "backbone.blocks.1")
    for name in features.block_layers(model):
        _, out = outputs(model, name, x)
        found = features.collect(model, {"a": x, "b": x.flip(0)}, name)
        assert found.shape == (2, N, 4, 16)  # two by two patches; the class token is left out
        assert np.allclose(found[0], out[:, 1:].numpy(), atol=1e-6)
        assert np.allclose(found[1], found[0][::-1], atol=1e-6)
    with torch.no_grad():
        last = model.backbone.norm(torch.tensor(found[0]))
        assert torch.allclose(last, model.backbone.forward_features((x - 0.5) / 0.5)[:, 1:], atol=1e-6)


def test_features_of_maps_go_row_by_row() -> None:
    model, x = cnn(), batch()
    names = features.block_layers(model)
    assert names[0] == "backbone.stem"
    assert "backbone.head" not in names
    _, out = outputs(model, "backbone.stem", x)
    found = features.collect(model, {"natural": x}, "backbone.stem")[0]
    assert found.shape == (N, 64, 4)
    assert np.array_equal(found[:, 8 * 3 + 5], out[:, :, 3, 5].numpy())


def test_windows_are_put_together_and_swins_maps_read_channels_last() -> None:
    model = Classifier(plain_swin(), (0.5,) * 3, (0.5,) * 3).eval()
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    _, out = outputs(model, features.block_layers(model)[0], x)
    found = features.collect(model, {"natural": x}, features.block_layers(model)[0])
    assert np.array_equal(found[0], out.flatten(1, 2).numpy())
    made = LowRank(experts=2, rank=2).inject(model)
    first, layer = next(iter(expert_layers(made).items()))
    _, out = outputs(made, first, x)
    windows = layer.layout.windows
    assert windows > 1
    assert len(out) == 2 * windows
    parts = features.parts(made, {"natural": x}, first)
    assert np.allclose(parts.output[0], out.unflatten(0, (2, windows)).mean(dim=(1, 2)).numpy(), atol=1e-6)


def test_a_mixture_of_networks_shows_the_first_networks_blocks() -> None:
    model = KINDS["more"]()
    names = features.block_layers(model)
    assert names == ("backbone.networks.0.blocks.0", "backbone.networks.0.blocks.1")
    _, out = outputs(model, names[1], batch())
    assert np.allclose(features.collect(model, {"natural": batch()}, names[1])[0], out[:, 1:].numpy(), atol=1e-6)


def test_a_mixture_of_swins_reads_their_maps_channels_last() -> None:
    model = Networks(experts=2).inject(Classifier(plain_swin(), (0.5,) * 3, (0.5,) * 3)).eval()
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    name = features.block_layers(model)[0]
    _, out = outputs(model, name, x)
    assert np.array_equal(features.collect(model, {"natural": x}, name)[0], out.flatten(1, 2).numpy())


def test_gates_over_different_numbers_of_experts_are_not_compared() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    add_experts(model, layers="0", experts=2, rank=1)
    add_experts(model, layers="1", experts=3, rank=1)
    with pytest.raises(UserError, match="layers have 2 and 3 experts"):
        gates.read(model, {"natural": torch.rand(2, 3, 4)})


def test_recording_keeps_copies_and_ends_even_when_the_forward_fails() -> None:
    class Ends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.act = nn.Linear(4, 4), nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            out = self.act(self.one(x))
            if len(x) > 3:
                raise RuntimeError("too many")
            return out

    model = Ends()
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), features.record_features(model, ["one"]) as found:
        model(x)
        assert torch.equal(found["one"].output[:, 0], nn.functional.linear(x, model.one.weight, model.one.bias))
    assert (found["one"].output < 0).any()
    with pytest.raises(RuntimeError, match="too many"), features.record_features(model, ["one"]):
        model(torch.randn(4, 4))
    assert hooks(model) == 0


def test_places() -> None:
    tokens = np.arange(24.0).reshape(2, 4, 3)
    assert np.array_equal(features.at(tokens, "first"), tokens[:, 0])
    assert np.array_equal(features.at(tokens, "middle"), tokens[:, 2])
    assert np.array_equal(features.at(tokens, "last"), tokens[:, 3])
    assert np.array_equal(features.at(tokens, "global"), tokens.mean(axis=1))


def test_silhouettes_by_hand_and_of_tight_clusters() -> None:
    # 0, 2 against 5, 7: a = 2 everywhere; b = 6, 4, 4, 6
    by_hand = silhouettes(np.array([[[0.0], [2.0]], [[5.0], [7.0]]]))
    assert by_hand == pytest.approx([(4 / 6 + 2 / 4) / 2] * 2)
    noise = np.random.default_rng(0).normal(size=(3, 30, 5))
    assert silhouettes(0.01 * noise + 10 * np.eye(5)[:3, None]) == pytest.approx([1, 1, 1], abs=0.01)
    assert np.abs(silhouettes(noise)).max() < 0.1


def test_what_images_show_hides_threats_that_their_difference_reveals() -> None:
    rng = np.random.default_rng(0)
    content = rng.normal(size=(1, 40, 8))
    effect = np.concatenate([np.zeros((1, 1, 8)), 0.05 * np.eye(8)[:3, None]])
    seen = content + effect + 0.001 * rng.normal(size=(4, 40, 8))
    assert np.abs(silhouettes(seen[1:])).max() < 0.05
    assert silhouettes(difference(seen)).min() > 0.9


def test_embeddings_depend_on_values_and_seed_alone() -> None:
    values = np.random.default_rng(0).normal(size=(3, 12, 6))
    state, torch_state = np.random.get_state()[1].copy(), torch.get_rng_state()
    assert np.array_equal(embed(values, seed=0), embed(values, seed=0))
    assert np.array_equal(np.random.get_state()[1], state)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert embed(values[..., :1], seed=0).shape == (3, 12, 2)
    assert np.array_equal(embed(np.ones((2, 5, 3)), seed=0), np.zeros((2, 5, 2)))


def figure(name: str, *subjects: Fake, **options: Any) -> dict[str, Any]:
    return registered()[name]().measure(subjects, Options(n=N, **options))  # type: ignore[arg-type]


def drawn(run: dict[str, Any]) -> list[dict[str, Any]]:
    """The panels of a run that have a picture."""
    return [panel for panel in run["panels"] if "points" in panel]


def picture(canvas: Figure) -> bytes:
    file = io.BytesIO()
    canvas.savefig(file, format="png", dpi=30)
    return file.getvalue()


@pytest.fixture(scope="module")
def three() -> list[Fake]:
    """With low-rank experts, with feed-forward experts, and without."""
    return [Fake(KINDS["low-rank"](), "rome"), Fake(KINDS["ffn, best two"](), "ffn"), Fake(vit(), "plain")]


@pytest.mark.parametrize("name", rest_slow(["fig3", "routing", "fig1", "fig5", "fig6", "figA4"], 2))
def test_a_picture_can_be_drawn_again_from_its_file(name: str, three: list[Fake]) -> None:
    subjects = three if name != "figA4" else three[:1]
    data = figure(name, *subjects)
    again = json.loads(json.dumps(data, allow_nan=False))
    drawn = registered()[name]()
    assert picture(drawn.draw(data)) == picture(drawn.draw(again))
    assert drawn.rows(data) == drawn.rows(again)


def test_densities_are_those_of_token_averaged_gates(kind: str) -> None:
    subject = Fake(KINDS[kind]())
    (run,) = figure("fig3", subject)["runs"]
    assert run["layer"] == list(expert_layers(subject.model))[-1]
    assert list(run["weights"]) == ["natural", *THREATS]
    for name, x in subject.attacked(N).items():
        with torch.no_grad(), record_gates(subject.model) as recorder:
            subject.model(x)
        expected = recorder.gates[run["layer"]].weights.mean(dim=1)
        assert np.allclose(run["weights"][name], expected.numpy(), atol=1e-5)
    assert np.allclose(np.sum(list(run["weights"].values()), axis=-1), 1, atol=1e-4)


def test_every_kind_of_experts_has_its_routing_and_outputs(kind: str) -> None:
    subject = Fake(KINDS[kind](), threats=("L2", "Linf"))
    layers = expert_layers(subject.model)
    data = figure("routing", subject)
    (run,) = data["runs"]
    assert run["threats"] == ("L2", "Linf")
    assert list(run["layers"]) == list(layers)
    assert all(0 <= value <= 1 for value in run["information"])
    assert run["gates_probe"]["chance"] == 0.5
    assert len(registered()["routing"]().rows(data)) == len(layers) + 1
    registered()["routing"]().draw(data)
    sample = gates.read(subject.model, subject.attacked(N))
    assert run["entropy"][-1] == pytest.approx(float(sample.entropy[1:, -1].mean()))
    (run,) = figure("fig6", subject)["runs"]
    parts = drawn(run)
    assert {panel["layer"] for panel in parts} == {list(layers)[-1]}
    assert [panel["part"] for panel in parts] == ["backbone", "backbone + experts"]
    given = features.parts(subject.model, subject.attacked(N), list(layers)[-1])
    for panel, values in zip(parts, (given.backbone, given.output), strict=True):
        assert list(panel["silhouettes"].values()) == pytest.approx(silhouettes(values), abs=1e-5)
        assert [len(points) for points in panel["points"].values()] == [N] * 3


def test_runs_without_experts_show_what_they_have(three: list[Fake]) -> None:
    plain = three[-1]
    for name in ("fig1", "fig6"):
        (run,) = figure(name, plain)["runs"]
        assert [(panel["layer"], panel["part"]) for panel in drawn(run)] == [("backbone.blocks.1", "backbone")]
        registered()[name]().draw({"runs": [run]})
    assert [run["run"] for run in figure("fig3", *three)["runs"]] == ["rome", "ffn"]
    for name in ("fig3", "routing"):
        with pytest.raises(UserError, match="none of these runs has experts"):
            figure(name, plain)
    for name, kind in (("figA1", "ffn"), ("figA2", "low-rank")):
        with pytest.raises(UserError, match=f"trained {kind} experts with a load-balancing loss.*fig3 shows the same"):
            figure(name, *three)


def test_local_scores_are_mean_and_spread_over_tokens(three: list[Fake]) -> None:
    data = figure("figA4", three[-1])
    (run,) = data["runs"]
    for layer in features.block_layers(three[-1].model):
        given = features.collect(three[-1].model, three[-1].attacked(N), layer)
        for space, values in (("difference", difference(given)), ("features", given[1:])):
            own = [panel for panel in run["panels"] if (panel["layer"], panel["space"]) == (layer, space)]
            scores = {panel["place"]: panel["silhouettes"] for panel in own}
            local = np.array([silhouettes(values[:, :, t]) for t in range(4)])
            for i, threat in enumerate(THREATS):
                assert scores["local"][threat] == pytest.approx([local[:, i].mean(), local[:, i].std()], abs=1e-5)
                assert scores["last"][threat] == pytest.approx(local[3, i], abs=1e-5)
                expected = silhouettes(values.mean(axis=2))[i]
                assert scores["global"][threat] == pytest.approx(expected, abs=1e-5)
    rows = registered()["figA4"]().rows(data)
    # 2 layers x 2 spaces x 3 threats x (5 places, the embedding's 4, and the points of 4 pictures)
    assert len(rows) == 2 * 2 * 3 * (5 + 4 + 4 * N)


@pytest.mark.parametrize("name", ["fig5", "figA4"])
@pytest.mark.slow
def test_features_are_drawn_as_they_are_and_less_the_natural_images_and_every_row_says_which(
    name: str, three: list[Fake]
) -> None:
    data = figure(name, three[-1])
    panels = drawn(data["runs"][0])
    layers = {panel["layer"] for panel in panels}
    model, groups = three[-1].model, three[-1].attacked(N)
    for layer in layers:
        given = features.collect(model, groups, layer)
        for space, values in (("features", given[1:]), ("difference", difference(given))):
            expected = embed(features.at(values, "global"), seed=0)
            (panel,) = [p for p in panels if (p["layer"], p["space"], p["place"]) == (layer, space, "global")]
            points = [panel["points"][threat] for threat in THREATS]
            np.testing.assert_allclose(points, expected, atol=1e-4)
    canvas = registered()[name]().draw(data)
    canvas.draw_without_rendering()
    bars = [axes for axes in canvas.axes if axes.containers]
    assert len(bars) == (2 if name == "fig5" else 0)
    low, high = bars[0].get_ylim() if bars else (0, 0)
    for axes in bars:  # on one scale, which shows all of them
        ends = [patch.get_y() + patch.get_height() for patch in axes.patches]
        assert (axes.get_ylim(), low <= min(ends) <= max(ends) <= high) == ((low, high), True)
    titles = [axes.get_title() for axes in canvas.axes if axes.get_title().startswith("global")]
    assert [title.endswith("\ndifference from natural") for title in titles] == [False, True] * len(layers)


def test_more_images_than_are_kept_have_the_same_gates(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = batch(n=150), torch.arange(150) % 10
    threats = {threat.name: threat for threat in DIGITS}
    once, parted = (Subject.of_model(KINDS["low-rank"](), "a model", x, y, threats) for _ in range(2))
    fig3 = registered()["fig3"]()
    kept = fig3.measure([once], Options(n=150))
    sizes = []
    monkeypatch.setattr(subject, "MAX_CACHED", 100)
    monkeypatch.setattr(subject, "attack_all", lambda *given: sizes.append(len(given[1])) or attack_all(*given))
    assert fig3.measure([parted], Options(n=150)) == kept
    assert sizes == [64, 64, 22]
    assert parted._attacked == {}


def test_the_layer_can_be_chosen(three: list[Fake]) -> None:
    (run,) = figure("fig3", three[0], layer="blocks.0")["runs"]
    assert run["layer"] == "backbone.blocks.0.attn.proj"
    (run,) = figure("fig5", three[0], layer="blocks.0")["runs"]
    assert {panel["layer"] for panel in run["panels"]} == {"backbone.blocks.0"}
    with pytest.raises(
        UserError, match=r"no layer's name contains 'blocks.7'; the layers are backbone.blocks.0.attn.qkv"
    ):
        figure("fig3", three[0], layer="blocks.7")


def test_separating_takes_two_threats() -> None:
    with pytest.raises(UserError, match="two or more"):
        figure("fig5", Fake(vit(), threats=("L2",)))
    data = figure("fig6", Fake(KINDS["low-rank"](), threats=("L2",)))
    registered()["fig6"]().draw(data)


def test_figures_of_a_run(tmp_path: Path) -> None:
    config = parse(changed(data__test_limit=12, experts__regularizer={"kind": "load-balancing"}))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config.dump()))
    model = build_model(config.model, config.experts, classes=10, shape=(1, 8, 8))
    save_model(grow(model), tmp_path / "run" / "model.safetensors", config=config.dump())
    names = ("fig1", "fig3", "figA2", "routing")
    made = write_figures([tmp_path / "run"], tmp_path / "out", only=names, formats=("svg",), options=Options(n=12))
    assert [file.name for file in made] == [f"{name}.svg" for name in names]
    tables = {name: (tmp_path / "out" / f"{name}.csv").read_text() for name in names}
    for name in names:
        data = json.loads((tmp_path / "out" / f"{name}.json").read_text())
        assert len(list(csv.DictReader(io.StringIO(tables[name])))) == len(registered()[name]().rows(data))
    assert tables["fig3"] == tables["figA2"]
    weights = list(csv.DictReader(io.StringIO(tables["fig3"])))
    assert {row["threat"] for row in weights} == {"natural", *THREATS}
    assert len(weights) == 4 * 12 * 2


def test_any_model_has_its_figures_without_a_run(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10))
    x, y = batch(n=12), torch.arange(12) % 10
    given = Subject.of_model(model, "mine", x, y, {"L2": DIGITS["L2"], "Linf": DIGITS["Linf"]})
    assert not model.training
    write_figures([given], tmp_path, only=["fig5", "fig6"], formats=["svg"], options=Options(n=50))
    (run,) = json.loads((tmp_path / "fig5.json").read_text())["runs"]
    tokens = {(panel["layer"], panel["tokens"]) for panel in run["panels"] if "tokens" in panel}
    assert (run["run"], tokens) == ("mine", {("0", 64)})
    attacked = given.attacked(50)
    assert {name: len(images) for name, images in attacked.items()} == {"natural": 12, "L2": 12, "Linf": 12}
    assert torch.equal(attacked["natural"], x)
    assert float((attacked["Linf"] - x).abs().max()) == pytest.approx(DIGITS["Linf"].eps)
    with pytest.raises(UserError, match="fig8: mine is a model without a run: it has no log"):
        write_figures([given], tmp_path, only=["fig8"])
    with pytest.raises(UserError, match="fig3: none of these runs has experts"):
        write_figures([given], tmp_path, only=["fig3"])
    with pytest.raises(UserError, match="name at least one run's folder"):
        write_figures([], tmp_path)


@pytest.mark.slow
def test_a_command_line_names_any_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """timm's, with a file of weights: the numbers are those of the model in Python."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = create_model("test_vit", num_classes=10, in_chans=1, img_size=8, patch_size=2)
    save_model(model, tmp_path / "vit.safetensors")
    named = ["--model", "test_vit", "--weights", str(tmp_path / "vit.safetensors"), "--data", "digits"]
    named += ["--img-size", "8", "--patch-size", "2", "--budgets", "L2=0.3,Linf=0.1"]
    with pytest.raises(SystemExit) as ended:
        main(["figures", *named, "--n", "8", "--format", "svg", "--out", str(tmp_path / "out")])
    told = capsys.readouterr()
    assert ended.value.code == 0, told.err
    written = [Path(line).name for line in told.out.split()]
    assert written == ["fig1.svg", "fig5.svg", "fig6.svg", "figA4.svg"]
    for missing in (
        "fig3: none of these runs has experts",
        "fig7: none of these runs weights",
        "routing: none",
        "fig8: test_vit is a model",
    ):
        assert len([line for line in told.err.splitlines() if line.startswith(f"skipped {missing}")]) == 1
    x, y = Digits().open("test").first(8)
    given = Subject.of_model(model, "test_vit", x, y, {"L2": LpBall(norm="L2", eps=0.3), "Linf": DIGITS["Linf"]})
    write_figures([given], tmp_path / "again", only=["fig5"], formats=["svg"], options=Options(n=8))
    assert (tmp_path / "out" / "fig5.json").read_text() == (tmp_path / "again" / "fig5.json").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name at least one run's folder, or a model and its data: --model NAME --data DATA"),
        (["--model", "test_vit"], "--model test_vit needs --data"),
        (["--weights", "x", "--mean", "0.5"], "--weights, --mean can only be given with --model"),
        (
            ["runs/x", "--data", "digits"],
            "--data can only be given with --model, not with runs/x, which has",
        ),
        (["--model", "test_vit", "--data", "digits"], "the pretrained weights of test_vit"),
    ],
)
def test_a_model_that_is_not_named_well_is_told_before_anything_is_made(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["figures", *arguments, "--out", str(tmp_path / "out")])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")
    assert not (tmp_path / "out").exists()


def test_beside_runs_a_given_model_is_left_out_of_what_asks_for_a_log(tmp_path: Path) -> None:
    lines = [{"event": "epoch", "epoch": 1, "seconds": 1.0, "accuracy": {"L2": 0.5}}]
    run: Any = SimpleNamespace(
        name="run",
        source=Run(tmp_path),
        config=SimpleNamespace(experts=None),
        run=SimpleNamespace(log=lambda: lines, folder=tmp_path),
    )
    given = Subject.of_model(nn.Flatten(), "mine", batch(n=2), torch.arange(2), DIGITS)
    data = registered()["fig8"]().measure([given, run], Options())
    assert [curve["name"] for curve in data["runs"]] == ["run"]
    assert data["left_out"]["mine"].startswith("it is a model without a run")


def test_the_documented_figure_works(three: list[Fake]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "figures.md").read_text()
    names: dict[str, Any] = {}
    blocks = [block.split("```")[0] for block in page.split("```python\n")[1:]]
    exec(next(block for block in blocks if "class Lengths" in block), names)
    assert registered()["lengths"] is names["Lengths"]
    data = figure("lengths", *three)
    assert data["rome"]["natural"] == 0
    given = features.collect(three[2].model, three[2].attacked(N), "backbone.blocks.1").mean(axis=2)
    assert data["plain"]["L2"] == pytest.approx(np.sqrt((difference(given)[1] ** 2).sum(-1).mean()))
    assert len(registered()["lengths"]().rows(data)) == 3
    registered()["lengths"]().draw(data)
    names.clear()
    gc.collect()  # the class goes, and its registration with it
    assert "lengths" not in registered()
