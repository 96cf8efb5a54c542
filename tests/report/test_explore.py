"""Runs looked at one image at a time, without the page: attacks, maps of gates, uploads."""

from __future__ import annotations

import inspect
import math
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor

import rome.report.explore
from helpers.tiny_runs import save_run
from rome.attacks import APGD
from rome.cli import explore as cli
from rome.cli.app import main
from rome.core.errors import UserError
from rome.experts import Local, add_experts, record_gates
from rome.report.examples import diverging
from rome.report.explore import Explorer, open_explorers, read_upload, rendering
from rome.report.explore.desk import Desk
from rome.report.explore.explorer import ball_of, on_grid
from rome.report.explore.uploads import MOST_BYTES
from rome.report.subject import NATURAL
from rome.threats import DIGITS, LpBall


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return {"rome": save_run(folder / "rome"), "plain": save_run(folder / "plain", experts=None)}


@pytest.fixture(scope="module")
def explorer(runs: dict[str, Path]) -> Explorer:
    return open_explorers([runs["rome"]], "cpu")[0]


# Attacks


@pytest.mark.parametrize("norm", ["L1", "L2", "Linf"])
def test_an_answer_holds_the_attack_and_what_the_model_makes_of_it(explorer: Explorer, norm: str) -> None:
    image, label = explorer.test_image(3)
    answer = explorer.look(image, norm, label=label)
    ball = DIGITS[norm]
    assert answer.threat == ball
    assert answer.perturbed.min() >= 0
    assert answer.perturbed.max() <= 1
    assert 0.3 * ball.eps < answer.size <= ball.eps * (1 + 1e-5)
    assert answer.size == pytest.approx(float(ball.size(answer.perturbed[None], image[None])))
    with torch.no_grad():
        expected = explorer.subject.model(torch.stack([image, answer.perturbed])).softmax(1)
    torch.testing.assert_close(torch.stack([answer.natural, answer.attacked]), expected)
    assert answer.attacked[label] < answer.natural[label]


def test_natural_and_radius_zero_attack_nothing(explorer: Explorer) -> None:
    image, label = explorer.test_image(0)
    for answer in (explorer.look(image, NATURAL, label=label), explorer.look(image, "L2", 0, label=label)):
        assert answer.perturbed.equal(image)
        assert (answer.threat, answer.size, answer.largest) == (None, 0, 0)
        torch.testing.assert_close(answer.natural, answer.attacked)


def test_without_a_label_the_models_own_prediction_is_attacked(explorer: Explorer) -> None:
    image = torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(1))
    answer = explorer.look(image, "Linf")
    assert answer.label == int(answer.natural.argmax()) == explorer.predict(image)
    assert answer.perturbed.equal(explorer.look(image, "Linf", label=answer.label).perturbed)


def test_more_steps_or_a_larger_radius_do_no_less_harm(explorer: Explorer) -> None:
    image, label = explorer.test_image(1)
    harm = [1 - float(explorer.look(image, "L2", eps, steps, label=label).attacked[label]) for eps, steps in
            ((0.1, 1), (0.1, 30), (1.0, 30))]  # fmt: skip
    assert harm == sorted(harm)
    assert harm[0] < harm[2]


def test_what_is_shown_is_the_image_of_highest_loss(explorer: Explorer) -> None:
    """And not the last one that was wrong, which a model that is wrong from the start may have a lower loss at."""
    differ = 0
    for number in range(8):
        image, _ = explorer.test_image(number)
        label = (explorer.predict(image) + 1) % 10
        found = APGD(steps=3).run(
            explorer.subject.model, image[None], torch.tensor([label]), LpBall(norm="Linf", eps=0.9)
        )
        assert explorer.look(image, "Linf", 0.9, 3, label=label).perturbed.equal(found.images[0])
        differ += not found.images.equal(found.adversarial)
    assert differ


def test_another_layer_attacks_nothing_again(explorer: Explorer, monkeypatch: pytest.MonkeyPatch) -> None:
    image, label = explorer.test_image(5)
    first = explorer.look(image, "L2", label=label)

    def forbidden(*arguments: Any) -> None:
        raise AssertionError("asked the model again")

    monkeypatch.setattr(explorer.subject.model, "forward", forbidden)
    for layer in explorer.layers:
        again = explorer.look(image, "L2", layer=layer, label=label)
        assert again.perturbed is first.perturbed
        assert again.map is not None
        assert again.map.layer == layer
    with pytest.raises(AssertionError):
        explorer.look(image, "L2", 0.2, label=label)


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ({"threat": "Linf", "eps": "8/2x5"}, "8/255"),
        ({"threat": "Linf", "eps": -1}, "non-negative"),
        ({"threat": "Linf", "eps": 8}, "at most 1, not 8"),
        ({"threat": "Linf", "eps": ""}, "non-negative"),
        ({"threat": "Linf", "eps": float("nan")}, "non-negative"),
        ({"threat": "L2", "eps": "1e30"}, "at most 8, not '1e30'"),
        ({"threat": "L1", "eps": 64.1}, "at most 64, not 64.1"),
        ({"threat": "L1", "eps": "1e999"}, "at most 64, not '1e999'"),
        ({"threat": "Lnif"}, "Did you mean 'Linf'"),
        ({"threat": "Linf", "steps": 0}, "1 to 100"),
        ({"threat": "Linf", "steps": 101}, "1 to 100"),
        ({"threat": "Linf", "steps": float("inf")}, "1 to 100"),
    ],
)
def test_a_question_that_cannot_be_right_gets_one_line(
    question: dict[str, Any], message: str, explorer: Explorer
) -> None:
    image, label = explorer.test_image(0)
    with pytest.raises(UserError, match=message) as raised:
        explorer.look(image, label=label, **question)
    assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match="reads images"):
        explorer.look(torch.zeros(3, 8, 8))


def test_a_radius_may_be_a_fraction() -> None:
    ball = ball_of("Linf", "8/255", {})
    assert ball is not None
    assert ball.eps == 8 / 255


def test_a_radius_may_reach_every_image_and_belong_to_one_of_several_balls_of_a_norm(explorer: Explorer) -> None:
    image, label = explorer.test_image(0)
    for threat, eps in (("L1", 64), ("L2", 8), ("Linf", 1)):
        assert 0 < explorer.look(image, threat, eps, 2, label=label).size <= eps * (1 + 1e-5)
    ball = ball_of("Linf-8_255", "4/255", {"Linf-8_255": LpBall(norm="Linf", eps=8 / 255)})
    assert ball == LpBall(norm="Linf", eps=4 / 255)


def test_two_runs_must_see_the_same_images(runs: dict[str, Path], tmp_path: Path) -> None:
    first, second = open_explorers([runs["rome"], runs["plain"]], "cpu")
    image, label = first.test_image(2)
    assert not first.look(image, "L1", label=label).perturbed.equal(second.look(image, "L1", label=label).perturbed)
    with pytest.raises(UserError, match="one run or two"):
        open_explorers([runs["rome"], runs["plain"], tmp_path], "cpu")
    with pytest.raises(UserError, match=r"there is no .*nowhere"):
        open_explorers([tmp_path / "nowhere"], "cpu")


# Gates over the image


def test_gates_are_the_recorded_ones_with_the_class_token_left_out_of_the_map(explorer: Explorer) -> None:
    image, label = explorer.test_image(4)
    layer = explorer.layers[1]
    answer = explorer.look(image, "L2", layer=layer, label=label)
    with torch.no_grad(), record_gates(explorer.subject.model) as recorder:
        explorer.subject.model(torch.stack([image, answer.perturbed]))
    weights = recorder.gates[layer].weights
    assert weights.shape == (2, 5, 2)  # a class token and 2 x 2 patches
    torch.testing.assert_close(answer.gates[layer], weights.mean(dim=1))
    assert answer.map is not None
    torch.testing.assert_close(answer.map.natural, weights[0, 1:].T.reshape(2, 2, 2))
    torch.testing.assert_close(answer.map.attacked, weights[1, 1:].T.reshape(2, 2, 2))
    assert answer.map.note == ""
    assert list(answer.gates) == list(explorer.layers)


def test_a_run_without_experts_is_attacked_all_the_same(runs: dict[str, Path]) -> None:
    (plain,) = open_explorers([runs["plain"]], "cpu")
    image, label = plain.test_image(0)
    answer = plain.look(image, "Linf", layer="blocks.0", label=label)
    assert not answer.perturbed.equal(image)
    assert (answer.map, dict(answer.gates)) == (None, {})
    assert "no experts" in answer.missing
    assert "no experts" in rendering.experts([answer])


def test_a_layer_that_this_run_lacks_is_said(explorer: Explorer) -> None:
    image, label = explorer.test_image(0)
    assert "no experts in nowhere" in explorer.look(image, layer="nowhere", label=label).missing


@pytest.mark.parametrize("kind", ["global", "uniform"])
def test_a_gate_for_the_whole_image_gives_a_uniform_map_and_a_sentence(tmp_path: Path, kind: str) -> None:
    experts = {"kind": "low-rank", "experts": 2, "rank": 2, "gate": kind, "regularizer": None}
    (explorer,) = open_explorers([save_run(tmp_path / kind, experts=experts)], "cpu")
    image, label = explorer.test_image(0)
    found = explorer.look(image, "L2", label=label).map
    assert found is not None
    assert "every patch the same" in found.note
    assert float((found.natural - found.natural[:, :1, :1]).abs().max()) == 0


def test_networks_as_experts_have_one_weight_for_the_image(tmp_path: Path) -> None:
    run = save_run(tmp_path / "more", experts={"kind": "more", "experts": 3}, method="more")
    (explorer,) = open_explorers([run], "cpu")
    image, label = explorer.test_image(0)
    found = explorer.look(image, "L2", label=label).map
    assert found is not None
    assert found.natural.shape == (3, 1, 1)
    assert "whole image" in found.note


@pytest.mark.parametrize(("size", "shape"), [((8, 8), (4, 4)), ((8, 16), (4, 8)), ((16, 8), (8, 4))])
def test_convolutions_give_a_map_of_the_images_proportions(size: tuple[int, int], shape: tuple[int, int]) -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.Conv2d(4, 4, 3, stride=2, padding=1))
    add_experts(model, layers=("1",), experts=3, rank=1, gate=Local())
    with torch.no_grad(), record_gates(model) as recorder:
        model(torch.rand(2, 1, *size))
    grid, note = on_grid(model, "1", recorder.gates["1"].weights, size)
    assert (tuple(grid.shape), note) == ((2, *shape, 3), "")
    assert grid[0, 0].equal(recorder.gates["1"].weights[0, : shape[1]])  # row by row


@pytest.mark.parametrize(("side", "window"), [(32, 4), (28, 3)])
def test_windows_are_laid_out_as_they_lie_in_the_image(side: int, window: int) -> None:
    """The tokens that a layer inside windowed attention reads, put back, are the block's own, shifted or padded."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = timm.create_model(
            "swin_tiny_patch4_window7_224", img_size=side, patch_size=4, window_size=window, embed_dim=8, depths=(2,),
            num_heads=(2,), num_classes=3,
        )  # fmt: skip
    add_experts(model.eval(), experts=2, rank=1)
    blocks = dict(model.named_modules())
    seen: dict[str, Tensor] = {}
    for name in ("layers.0.blocks.0", "layers.0.blocks.1"):
        blocks[name].norm1.register_forward_hook(lambda _, __, out, name=name: seen.update({name: out}))
        blocks[f"{name}.attn.qkv"].register_forward_pre_hook(
            lambda layer, given, name=name: seen.update({f"{name} inside": layer.tokens(given[0])})
        )
    with torch.no_grad():
        model(torch.rand(1, 3, side, side))
    for name in ("layers.0.blocks.0", "layers.0.blocks.1"):
        layer = f"{name}.attn.qkv"
        real = blocks[layer].real
        inside = seen[f"{name} inside"] if real is None else seen[f"{name} inside"][:, real]
        grid, _ = on_grid(model, layer, inside, (side, side))
        assert grid.equal(seen[name].view(grid.shape))


# The page's questions


def test_the_page_attacks_each_run_on_itself_with_the_same_settings(runs: dict[str, Path]) -> None:
    desk = Desk(open_explorers([runs["rome"], runs["plain"]], "cpu"))
    assert list(desk.balls) == ["L1", "L2", "Linf"]
    shown = desk.test(7)
    one, other = desk.look(shown, "Linf", "4/255", 3.0, desk.layers[0])
    assert one.threat == other.threat == desk.balls["Linf"].model_copy(update={"eps": 4 / 255})
    assert (one.steps, one.label) == (other.steps, other.label) == (3, shown.label)
    assert one.image.equal(other.image)
    with pytest.raises(UserError, match="steps must be 1 to 100, not 0"):
        desk.look(shown, "Linf", "4/255", None, None)


def test_a_test_image_that_is_not_there_is_said_and_random_ones_exist(explorer: Explorer) -> None:
    desk = Desk([explorer])
    for number in (40, -1, math.inf, math.nan):
        with pytest.raises(UserError, match=f"no test image {number}; choose from 0 to 39"):
            desk.test(number)
    assert "is attacked" not in desk.test(0).description, "natural attacks nothing"
    assert desk.test(None).image.equal(desk.test(0).image)
    numbers = {desk.random() for _ in range(60)}
    assert numbers <= set(range(40))
    assert len(numbers) > 20


def test_of_an_upload_the_models_own_prediction_is_attacked_and_it_says_so(explorer: Explorer, tmp_path: Path) -> None:
    desk = Desk([explorer])
    shown = desk.upload(saved(tmp_path / "a.png", Image.effect_noise((20, 30), 60)))
    assert shown.label is None
    assert "against the model's prediction" in shown.description
    (answer,) = desk.look(shown, "L2", 0.35, 5, None)
    assert answer.label == explorer.predict(shown.image)


def test_nobody_else_is_let_in_unless_told() -> None:
    assert inspect.signature(cli.explore).parameters["host"].default == "127.0.0.1"


def test_without_gradio_one_line_says_what_to_install(
    runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)  # as if it were not there
    monkeypatch.delitem(sys.modules, "rome.report.explore.page", raising=False)
    monkeypatch.delattr(rome.report.explore, "page", raising=False)
    for folder in (runs["rome"].parent / "nowhere", runs["rome"]):
        with pytest.raises(SystemExit) as ended:
            main(["explore", str(folder)])
        assert ended.value.code == 2
        if folder != runs["rome"]:
            assert "nowhere" in capsys.readouterr().err, "a wrong folder is reported first"
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    needed = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert said.endswith(f"pip install '{needed['optional-dependencies']['explore'][0]}'\n")
    assert said.count("\n") == 1


# Uploads

RGB = (3, 32, 32)


def saved(path: Path, image: Image.Image, **options: Any) -> Path:
    image.save(path, **options)
    return path


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
@pytest.mark.parametrize("shape", [(1, 8, 8), RGB, (3, 224, 224), (3, 20, 40)])
def test_any_mode_and_size_becomes_the_models_shape(mode: str, shape: tuple[int, int, int], tmp_path: Path) -> None:
    gray = Image.fromarray(np.full((30, 50), 128, dtype=np.uint8))
    image = Image.fromarray(np.full((30, 50), 32896, dtype=np.uint16)) if mode == "I;16" else gray.convert(mode)
    file = saved(tmp_path / ("image.tiff" if mode == "CMYK" else "image.png"), image)
    found, said, _ = read_upload(file, shape)
    assert (tuple(found.shape), found.dtype) == (shape, torch.float32)
    assert said.startswith(f"{file.name}: 50 x 30 ")
    if mode == "1":
        assert 0.3 < float(found.mean()) < 0.7  # dithered
    else:
        torch.testing.assert_close(found, torch.full(shape, 128 / 255), atol=2 / 255, rtol=0)


def test_what_was_done_is_said_in_order(tmp_path: Path) -> None:
    file = saved(tmp_path / "photo.png", Image.new("RGBA", (60, 40), (255, 0, 0, 0)))
    found, said, _ = read_upload(file, (1, 8, 8))
    assert said == (
        "photo.png: 60 x 40 RGBA, transparent parts on white, cropped to the central 40 x 40, resized to 8 x 8, "
        "converted to gray."
    )
    assert found.eq(1).all()
    file = saved(tmp_path / "exact.png", Image.new("RGB", (32, 32), (0, 255, 0)))
    assert read_upload(file, RGB).description == "exact.png: 32 x 32 RGB."
    file = saved(tmp_path / "opaque.png", Image.new("RGBA", (32, 32), (0, 255, 0, 255)))
    assert read_upload(file, RGB).description == "opaque.png: 32 x 32 RGBA."


def test_the_centre_is_kept(tmp_path: Path) -> None:
    pixels = np.zeros((10, 30), dtype=np.uint8)
    pixels[:, 10:20] = 255
    found, _, _ = read_upload(saved(tmp_path / "a.png", Image.fromarray(pixels)), (1, 10, 10))
    assert found.eq(1).all()


def test_a_picture_is_turned_as_its_exif_says(tmp_path: Path) -> None:
    pixels = np.zeros((8, 8), dtype=np.uint8)
    pixels[:4] = 255  # white above; orientation 6 turns it a quarter clockwise: white to the right
    exif = Image.Exif()
    exif[0x0112] = 6
    file = saved(tmp_path / "a.png", Image.fromarray(pixels), exif=exif)
    found, said, _ = read_upload(file, (1, 8, 8))
    assert found[0, :, 4:].eq(1).all()
    assert found[0, :, :4].eq(0).all()
    assert "rotated as its EXIF says" in said


def test_of_several_frames_the_first_is_taken(tmp_path: Path) -> None:
    frames = [Image.new("L", (8, 8), value) for value in (0, 255)]
    file = saved(tmp_path / "a.gif", frames[0], save_all=True, append_images=frames[1:])
    found, said, _ = read_upload(file, (1, 8, 8))
    assert found.eq(0).all()
    assert "first frame only" in said


def test_bad_uploads_get_one_clear_line(tmp_path: Path) -> None:
    files = {name: tmp_path / name for name in ("text.png", "empty.png", "cut.png", "big.png", "gone.png", "bomb.png")}
    files["text.png"].write_text("hello")
    files["empty.png"].touch()
    whole = saved(tmp_path / "whole.png", Image.effect_noise((64, 64), 50)).read_bytes()
    files["cut.png"].write_bytes(whole[: len(whole) // 2])
    with open(files["big.png"], "wb") as big:
        big.truncate(MOST_BYTES + 1)
    saved(files["bomb.png"], Image.new("1", (10_000, 10_000)))
    said = {
        "text.png": "cannot be read as an image", "empty.png": "is empty", "cut.png": "cannot be read as an image",
        "big.png": "larger than 20 MiB", "gone.png": "cannot be read", "bomb.png": "million pixels",
    }  # fmt: skip
    for name, message in said.items():
        with pytest.raises(UserError, match=message) as raised:
            read_upload(files[name], RGB)
        assert str(raised.value).startswith(name)
        assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match="4 channels"):
        read_upload(files["text.png"], (4, 8, 8))


# Larger models and the rendering


def image_folder(path: Path, side: int) -> dict[str, Any]:
    for split in ("train", "val"):
        for name, colour in (("<b>red", (200, 30, 30)), ("blue", (30, 30, 200))):
            folder = path / split / name
            folder.mkdir(parents=True)
            Image.new("RGB", (side, side), colour).save(folder / "0.png")
    return {"kind": "folder", "path": str(path), "size": side}


@pytest.mark.parametrize(("side", "patch"), [(32, 4), (224, 16)])
def test_colour_images_of_other_sizes(side: int, patch: int, tmp_path: Path) -> None:
    data = image_folder(tmp_path / "data", side)
    run = save_run(
        tmp_path / "run", data=data, model__img_size=side, model__patch_size=patch, threats="imagenet", batch_size=2
    )
    (explorer,) = open_explorers([run], "cpu")
    image, label = explorer.test_image(0)
    answer = explorer.look(image, "Linf", "4/255", 2, label=label)
    assert answer.map is not None
    assert answer.map.natural.shape[1:] == (side // patch, side // patch)
    shown = rendering.attacks([answer]) + rendering.experts([answer])
    assert "&lt;b&gt;red" in shown
    assert "<b>red" not in shown
    assert len(shown) < 3_000_000


def test_runs_beside_each_other_share_scales_and_the_order_of_classes(runs: dict[str, Path]) -> None:
    explorers = open_explorers([runs["rome"], runs["plain"]], "cpu")
    image, label = explorers[0].test_image(0)
    answers = [each.look(image, "L2", label=label) for each in explorers]
    scale = max(answer.largest for answer in answers)
    shown = rendering.attacks(answers)
    assert shown.count(f"<span>+{scale:.3g}</span>") == 2
    assert shown.count(diverging(answers[0].perturbed - image, scale)) == 1
    assert "--attacked: var(--threat-2)" in shown, "the colour of L2 in the report"
    first, second = (re.findall(r'<th scope="row" title="(\d)"', card) for card in shown.split("</section>")[:2])
    assert first == second
    assert str(label) in first, "the true class is always among them"
    assert rendering.experts(answers).count("pixels map") == 2 * 2  # two experts, natural and attacked


def test_a_tick_or_a_cross_says_what_colours_say(explorer: Explorer) -> None:
    image, _ = explorer.test_image(0)
    seen = explorer.predict(image)
    for label, mark in ((seen, "✓"), ((seen + 1) % 10, "✗")):
        assert f"{mark} {seen}</b>" in rendering.attacks([explorer.look(image, label=label)])
