"""Any user's model: by name, by function, by file; what it is given, and what it is told when it does not fit."""

from __future__ import annotations

import io
import json
import re
import shlex
import sys
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import torch
from PIL import Image
from scipy.stats import binomtest
from torch import Tensor, nn

import rome
from helpers.small_models import drawn, knowing
from helpers.tiny_runs import Ended
from rome.core.errors import UserError
from rome.data import CIFAR10_CLASSES, Cifar10, Digits, ImageFolder, Parquet
from rome.evaluation.evaluate import Report, evaluate, hash_model
from rome.evaluation.named import build_named, named_config, named_data, preprocessing
from rome.evaluation.run import evaluate_saved
from rome.experts import expert_layers
from rome.models import file_hash
from rome.report import examples
from rome.report.compared import findings, gather, paired
from rome.report.page import write_report
from rome.threats import CIFAR10, DIGITS, IMAGENET, LpBall, Threat

N = 30
QUICK = ("--suite", "lp", "--n", str(N))
VIT = {"img_size": 8, "patch_size": 4}
NET = """
import torch
from torch import nn

def net(num_classes, seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Dropout(0.5), nn.ReLU(), nn.Linear(32, num_classes))
    net.load_state_dict(torch.load("net.pth"))
    return net
"""


GREEDY = """
import torch
from torch import nn

class Greedy(nn.Linear):
    def forward(self, x):
        if len(x) > 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(x.flatten(1))

def net(num_classes):
    torch.manual_seed(0)
    return Greedy(64, num_classes)
"""


def net(inputs: int = 64, outputs: int = 10) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, 32), nn.Dropout(0.5), nn.ReLU(), nn.Linear(32, outputs))


class Built(NamedTuple):
    model: nn.Module
    facts: dict[str, Any]
    remarks: list[str]


def built(name: str, **options: object) -> Built:
    """What ``rome evaluate --model NAME --data digits`` with further options would attack."""
    config = named_config({"model": name, "data": "digits", **options})
    assert config is not None
    return Built(*build_named(config, Digits().open("test")))


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """A net that knows digits in [0, 1]."""
    x, y = Digits().open("train").first(1000)
    model = drawn(net())
    return knowing(model, model[4], x, y)


@pytest.fixture(scope="module")
def files(trained: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The net in every form that a user may have it in."""
    root = tmp_path_factory.mktemp("models")
    x = torch.rand(3, 1, 8, 8)
    torch.save(trained.state_dict(), root / "net.pth")
    (root / "my_net.py").write_text(NET)
    (root / "greedy.py").write_text(GREEDY)
    (root / "typo.py").write_text("tocrh.tensor(1)")
    (root / "late.py").write_text("def net(num_classes):\n    return tocrh.nn.Identity()\n")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(trained, x)
        traced.save(root / "traced.pt")
        torch.jit.freeze(torch.jit.script(trained)).save(root / "frozen.ts")
        torch.jit.trace(nn.Sequential(_Three(), trained), x, check_trace=False).save(root / "three.pt")
    batch = torch.export.Dim("batch")
    for name, dynamic in {
        "dynamic": {0: batch},
        "fixed": None,
        "sixteen": {0: torch.export.Dim("batch", min=2, max=16)},
    }.items():
        program = torch.export.export(trained, (x,), dynamic_shapes=None if dynamic is None else (dynamic,))
        torch.export.save(program, root / f"{name}.pt2")
    torch.export.save(torch.export.export(_Constant(), (x,), dynamic_shapes=({0: batch},)), root / "constant.pt2")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = rome.create_model("vit_tiny_patch16_224", num_classes=10, in_chans=1, embed_dim=192, depth=12, **VIT)
    rome.save_model(model, root / "vit.safetensors")
    return root


class _Three(nn.Module):
    """Only knows batches of three, as a trace of ``x.view(len(x), ...)`` does."""

    def forward(self, x: Tensor) -> Tensor:
        return x.view(3, 64)


class _Constant(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x.detach() * 0).flatten(1)[:, :10]


@pytest.fixture
def call(files: Path, tmp_path: Path, rome: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``rome evaluate --model ...`` in a folder with the files."""
    for file in files.iterdir():
        if file.is_file():
            (tmp_path / file.name).symlink_to(file)
    monkeypatch.chdir(tmp_path)
    return partial(rome, "evaluate")


@pytest.fixture(autouse=True)
def _own_modules() -> Iterator[None]:
    with torch.random.fork_rng():
        yield


def test_a_module_in_the_working_folder_is_found(call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = {"", str(tmp_path)}
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place not in here])  # as the script starts
    ended = call("--model", "my_net:net", "--data", "digits", *QUICK)
    assert ended.code == 0, ended.err
    before = list(sys.path)
    assert call("--model", "my_net:net", "--data", "digits", *QUICK).code == 0
    assert sys.path == before
    del sys.modules["my_net"]


# -------- the same model in every form


@pytest.mark.parametrize("model", ["my_net.py:net", "traced.pt", "frozen.ts", "dynamic.pt2"])
def test_every_form_gives_the_numbers_of_the_model(model: str, call: Any, trained: nn.Module, tmp_path: Path) -> None:
    x, y = Digits().open("test").first(N)
    expected = evaluate(trained, x, y, threats=DIGITS, suite="lp")
    ended = call("--model", model, "--data", "digits", *QUICK, "--json")
    assert ended.code == 0, ended.err
    assert ended.out.count("\n") == 1
    result = json.loads(ended.out)
    assert result["robust"] == expected.robust
    assert (result["n"], result["clean"], result["union"]) == (N, expected.clean, expected.union)
    assert result["groups"] == {"lp": expected.average}
    assert 0 < result["union"] < result["clean"]
    assert result["settings"]["threats"]["Linf"]["eps"] == 0.1
    facts = result["settings"]["provenance"]["model"]
    assert facts["normalisation"] is None
    assert "no normalisation added" in ended.err
    stem = re.split(r"[:.]", model)[2 if ":" in model else 0]
    assert (tmp_path / "evaluations" / f"{stem}-lp-{N}" / "matrix.npz").exists()
    again = call("--model", model, "--data", "digits", *QUICK, "--json")
    assert json.loads(again.out) == result | {"reused": {"result": result["date"]}}
    assert f"reused: this is the result of {result['date']}" in again.err


@pytest.mark.slow
def test_a_timm_model_with_weights_normalises_itself(call: Any, files: Path) -> None:
    arguments = ("--model", "vit_tiny_patch16_224", "--weights", "vit.safetensors", "--data", "digits")
    ended = call(*arguments, "--img-size", 8, "--patch-size", 4, *QUICK, "--json")
    assert ended.code == 0, ended.err
    result = json.loads(ended.out)
    facts = result["settings"]["provenance"]["model"]
    assert facts["normalisation"] == {"mean": [0.5], "std": [0.5]}
    assert (facts["weights"], len(facts["weights_sha256"])) == ("vit.safetensors", 64)
    assert "no normalisation" not in ended.err
    assert "no better than guessing among 10 classes" in ended.err, "it was never trained"
    model = rome.load_model(files / "vit.safetensors")
    x, y = Digits().open("test").first(N)
    assert result["clean"] == pytest.approx((model(x).argmax(1) == y).float().mean().item())


@pytest.mark.parametrize("model", ["my_net.py:net", "dynamic.pt2"])
def test_normalisation_that_a_model_lacks_is_put_in_front(model: str, call: Any, trained: nn.Module) -> None:
    x, y = Digits().open("test").first(N)
    expected = (trained((x - 0.25) / 0.5).argmax(1) == y).float().mean().item()
    ended = call("--model", model, "--data", "digits", *QUICK, "--mean", "0.25", "--std", "0.5", "--json")
    result = json.loads(ended.out)
    assert result["clean"] == pytest.approx(expected)
    assert result["settings"]["provenance"]["model"]["normalisation"] == {"mean": [0.25], "std": [0.5]}
    assert "no normalisation" not in ended.err


def test_a_table_says_which_model(call: Any) -> None:
    ended = call("--model", "traced.pt", "--data", "digits", *QUICK, "--budgets", "L2=0.3,Linf=8/255")
    assert ended.code == 0
    assert all(word in ended.out for word in ("traced.pt", "L2", "Linf", "union", "suite lp"))
    assert "L1" not in ended.out
    assert f"saved in evaluations/traced-lp-{N}" in ended.err


def test_several_suites_some_cases_and_a_batch_that_halves(call: Any) -> None:
    arguments = ("--model", "traced.pt", "--data", "digits", *QUICK, "--batch-size", "auto", "--no-checks")
    first = json.loads(call(*arguments, "--cases", "L2, Linf", "--out", "result", "--json").out)
    assert (list(first["robust"]), first["pending"], first["union"]) == (["L2", "Linf"], ["L1"], None)
    told = call(*arguments, "--cases", "L2", "--out", "result")
    assert "not run yet: L1" in told.out
    whole = json.loads(call(*arguments, "--out", "result", "--json").out)
    assert whole["pending"] == []
    assert whole["robust"]["L2"] == first["robust"]["L2"]


def test_settings_of_a_suite_may_be_given(call: Any) -> None:
    suite = "[{kind: lp, steps: 3}, {kind: unseen, attacks: {patch: {size: 2, steps: 1}, gma: {steps: 2}}}]"
    arguments = ("--model", "traced.pt", "--data", "digits", "--n", 6, "--suite", suite, "--json")
    ended = call(*arguments, "--cases", "Linf,patch,gma")
    assert ended.code == 0, ended.err
    result = json.loads(ended.out)
    attacks = {case["name"]: case["attacks"] for case in result["settings"]["cases"]}
    assert (attacks["Linf"][0]["steps"], attacks["patch"][0]["size"], attacks["gma"][0]["steps"]) == (3, 2, 2)
    assert (set(result["robust"]), result["failed"]) == ({"Linf", "patch", "gma"}, {})


def test_want_of_memory_is_told_with_what_to_do(call: Any) -> None:
    """On the clean images already: no case has begun."""
    ended = call("--model", "greedy.py:net", "--data", "digits", *QUICK)
    assert (ended.code, ended.out) == (2, "")
    assert "error: not enough memory (CUDA out of memory): use a smaller batch size (rome evaluate" in ended.err
    assert call("--model", "greedy.py:net", "--data", "digits", *QUICK, "--batch-size", "auto").code == 0


@pytest.mark.parametrize("place", ["signed.py", "signed"])
def test_a_function_is_told_apart_by_its_code(
    place: str, call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weights are the same and its answers are not, so its result is not that of before."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    code = NET.replace("return net", "return nn.Sequential(net, Sign())") + (
        "class Sign(nn.Module):\n    def forward(self, x):\n        return 1 * x\n"
    )
    arguments = ("--model", f"{place}:net", "--data", "digits", *QUICK, "--json")

    def run(code: str, *more: str) -> Ended:
        sys.modules.pop("signed", None)
        Path("signed.py").write_text(code)
        return call(*arguments, *more)

    first = run(code)
    again = run(code)
    assert first.code == 0
    assert json.loads(again.out)["reused"] == {"result": json.loads(first.out)["date"]}
    other = run(code.replace("1 * x", "-x"))
    assert other.code == 2
    assert "holds an evaluation with other settings (the code of signed.py changed)" in other.err
    anew = run(code.replace("1 * x", "-x"), "--overwrite")
    assert json.loads(anew.out)["clean"] < json.loads(first.out)["clean"]


def test_a_file_is_told_apart_by_its_content(files: Path) -> None:
    """Weights in a graph, or none at all: what a result is filed under covers the file."""
    hashes = set()
    for name in ("traced.pt", "frozen.ts", "dynamic.pt2"):
        named = built(str(files / name))
        assert not any(module.training for module in named.model.modules())
        hashes.add(hash_model(named.model))
        assert hash_model(built(str(files / name)).model) in hashes
    assert len(hashes) == 3


# -------- what comes after: comparing


def matrix(folder: Path) -> dict[str, Any]:
    with np.load(folder / "matrix.npz") as file:
        return {name: file[name] for name in file.files}


@pytest.fixture
def two(call: Any) -> list[Path]:
    """The net as it is, and with a normalisation that it was not trained with."""
    folders = []
    for name, options in {"plain": (), "odd": ("--mean", "0.2", "--std", "0.5")}.items():
        ended = call("--model", "traced.pt", "--data", "digits", *QUICK, *options, "--out", name)
        assert ended.code == 0, ended.err
        folders.append(Path(name))
    return folders


def test_the_paired_comparison_is_that_of_the_stored_matrices(two: list[Path]) -> None:
    ours, theirs = (matrix(folder)["correct"].all(axis=1) for folder in two)
    only_ours, only_theirs = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
    assert only_ours != only_theirs
    first, second = gather(two)
    found = paired(first.report, second.report)
    assert found.value == pytest.approx((only_ours - only_theirs) / N)
    assert found.p == pytest.approx(binomtest(only_ours, only_ours + only_theirs).pvalue)
    assert [run.name for run in (first, second)] == ["plain", "odd"], "both are traced.pt"
    told = findings([first, second])[1]
    assert f"{100 * abs(found.value):.1f} points above" in told


def test_a_report_builds_given_models_again_and_says_what_they_are(two: list[Path], tmp_path: Path) -> None:
    page = write_report(two, tmp_path / "report").read_text()
    digest = file_hash(Path("traced.pt"))
    for text in (page, (tmp_path / "report" / "report.md").read_text()):
        assert text.count(digest) == 2
        assert "mean 0.2, std 0.5" in text
        assert "none of ours" in text
        assert re.search(r"data(</dt><dd>| )digits", text)
    assert re.findall("<section id=.([a-z]+)", page) == ["accuracy", "classes", "examples", "provenance"]
    assert "<h3>Settings that differ" not in page
    assert "Full config" not in page
    x, y = Digits().open("test").first(N)
    compared = gather(two)
    rows = examples.pick(compared, 4)
    assert np.logical_and(*(matrix(folder)["correct"][:, 0] for folder in two))[rows].all()
    model = compared[1].subject(torch.device("cpu")).model
    assert (model(x).argmax(1) == y).tolist() == matrix(two[1])["correct"][:, 0].tolist()
    assert page.count("<img") == len(rows) * (1 + 2 * 6)  # the image; for each model three attacks, each twice


def test_a_report_shows_a_file_without_parameters(call: Any, tmp_path: Path) -> None:
    folder = tmp_path / "frozen"
    assert call("--model", "frozen.ts", "--data", "digits", *QUICK, "--out", folder).code == 0
    page = write_report([folder], tmp_path / "report").read_text()
    assert page.count("<img") == 4 * 7


def test_a_model_that_is_another_now_has_numbers_and_no_pictures(two: list[Path], tmp_path: Path) -> None:
    Path("traced.pt").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(net().eval(), torch.rand(3, 1, 8, 8)).save("traced.pt")
    page = write_report(two, tmp_path / "report").read_text()
    assert page.count("the model is no longer the one that was evaluated (model.sha256") == 2
    assert re.findall("<section id=.([a-z]+)", page) == ["accuracy", "classes", "provenance"]
    Path("traced.pt").unlink()
    page = write_report(two, tmp_path / "report").read_text()
    assert "No pictures of odd: there is no file traced.pt" in page


def test_other_examples_are_refused_and_both_are_named(two: list[Path], trained: nn.Module) -> None:
    x, y = Digits().open("test").first(N)
    evaluate(trained, x.flip(3), y, threats=DIGITS, suite="lp", out="mirrored")
    with pytest.raises(UserError, match=r"^traced.pt and mirrored were evaluated differently \(data.sha256 .* and "):
        gather([two[0], Path("mirrored")])
    evaluate(trained, x[:9], y[:9], threats=DIGITS, suite="lp", out="few")
    with pytest.raises(UserError, match=r"share no evaluation .*\(plain: lp-30; few: lp-9\)"):
        gather([two[0], Path("few")])
    stored = matrix(two[1])
    np.savez("odd/matrix.npz", **{**stored, "indices": stored["indices"][::-1]})
    with pytest.raises(UserError, match=r"plain and odd name the same data, but the rows .* are different examples"):
        gather(two)
    with pytest.raises(UserError, match="not evaluated on the same examples"):
        paired(Report.load(two[0]), Report.load(two[1]))


def test_one_evaluated_in_python_has_numbers_and_a_line_for_its_pictures(
    two: list[Path], trained: nn.Module, tmp_path: Path
) -> None:
    x, y = Digits().open("test").first(N)
    evaluate(trained, x, y, threats=DIGITS, suite="lp", out="mine", provenance={"model": "some text", "data": [1]})
    page = write_report([Path("mine"), two[0]], tmp_path / "report").read_text()
    assert "No pictures of mine: mine does not record how to build its model" in page
    assert str(hash_model(trained)) in page
    assert re.findall("<section id=.([a-z]+)", page) == ["accuracy", "classes", "examples", "provenance"]
    shown = page[page.index('<section id="examples"') : page.index('<section id="provenance"')]
    assert set(re.findall(r'class="first"><svg.*?</svg>\s*([\w.]+)', shown, re.DOTALL)) == {"traced.pt"}


def test_the_kept_command_evaluates_the_same_again(two: list[Path], call: Any) -> None:
    _, *words = shlex.split(gather(two)[1].command)
    assert words[0] == "evaluate"
    again = json.loads(call(*words[1:], *QUICK, "--out", "again", "--json").out)
    assert again["robust"] == Report.load(two[1]).robust
    assert (matrix(Path("again"))["correct"] == matrix(two[1])["correct"]).all()


@pytest.mark.parametrize(
    ("missing", "message"), [("result.json", "unfinished"), ("settings.json", "a folder with neither run nor config")]
)
def test_a_folder_without_a_whole_evaluation(missing: str, message: str, two: list[Path]) -> None:
    (two[1] / missing).unlink()
    with pytest.raises(UserError, match=f"^odd .*{message}"):
        gather(two)


# -------- what does not fit


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "fixed.pt2"], "exported for batches of exactly 3.*dynamic batch.*torch.export.Dim"),
        (
            ["--model", "sixteen.pt2"],
            "exported for batches of up to 16 images, not 30: set --batch-size 16",
        ),
        (["--model", "three.pt"], r"three.pt does not take 2 images of 1x8x8: .*shape '\[3, 64\]' is invalid"),
        (["--model", "constant.pt2"], "has no gradient with respect to its images"),
        (["--model", "net.pth"], "is not a TorchScript module.*--weights"),
        (["--model", "my_net.py"], "my_net.py is a Python file: name its function, my_net.py:net"),
        (["--model", "my_net.py:nte"], "my_net.py has no function 'nte'. Did you mean 'net'"),
        (["--model", "nowhere.pt2"], "there is no file nowhere.pt2"),
        (
            ["--model", "vit_tiny_patch16_224"],
            "pretrained weights of vit_tiny_patch16_224 are for 1000 classes, not 10",
        ),
        (["--model", "vit_tiny_patch16_244"], "Did you mean 'vit_tiny_patch16_224'"),
        (
            ["--model", "test_vit", "--weights", "vit.safetensors"],
            "vit.safetensors does not fit the model|does not take",
        ),
        (["--model", "resnet18.nonsense"], r"resnet18.nonsense: Invalid pretrained tag.*Valid: .*resnet18\.a1_in1k"),
        (
            ["--model", "resnet18.nonsense", "--weights", "net.pth"],
            r"resnet18.nonsense: Invalid pretrained tag \(nonsense\) for resnet18\.",
        ),
        (["--model", "traced.pt", "--weights", "net.pth"], "holds its weights already"),
        (["--model", "traced.pt", "--num-classes", "12"], r"has 10 classes, not 12"),
        (["--model", "traced.pt", "--mean", "0.5"], "--mean and --std go together"),
        (["--model", "traced.pt", "--img-size", "16"], "digits has images of 8 pixels, never resized"),
        (["--model", "traced.pt", "--mean", "0.5", "--std", "0"], "--std must be positive"),
        (["--model", "traced.pt", "--mean", "1,2", "--std", "1,1"], "one for each of 1 channels"),
        (
            ["--model", "traced.pt", "--mean", "a", "--std", "1"],
            "--mean a: model.mean.0: input should be a valid num",
        ),
        (["--model", "traced.pt", "--budgets", "cifra10"], "unknown budgets 'cifra10'. Did you mean 'cifar10'"),
        (["--model", "traced.pt", "--budgets", "L3=1"], "--budgets L3=1: threats.0.norm: .*L1.*L2.*Linf"),
        (["--model", "traced.pt", "--suite", "apdg"], "Did you mean 'apgd'"),
        (["--model", "traced.pt", "--suite", ""], "suite: name at least one. Valid: all, apgd"),
        (["--model", "traced.pt", "--suite", "{kind: lp, steps: x}"], "suite: input should be a valid integer"),
        (["--model", "traced.pt", "--suite", "unseen", "--features", "gone"], "there is no model at gone;.*Train it"),
        (
            ["--model", "traced.pt", "--suite", "[lp, {kind: corruptions, path: gone}]"],
            "gone/labels.npy is missing: give the unpacked folder of CIFAR-10-C",
        ),
        (["--model", "traced.pt", "--out", "net.pth"], "nothing can be written in net.pth .*: choose another --out"),
        (["--model", "traced.pt", "--out", "net.pth/deeper"], "nothing can be written in net.pth/deeper"),
        (["--model", "typo.py:net"], "cannot be imported: NameError: name 'tocrh' is not defined"),
        (["--model", "late.py:net"], "cannot be built with .*: name 'tocrh' is not defined"),
        (["--model", "traced.pt", "--cases", "Lnf"], "no case 'Lnf'"),
        (["--model", "traced.pt", "--batch-size", "big"], "--batch-size 'big': give a positive integer, or auto"),
        (["--model", "traced.pt", "--n", "361"], "--n 361 exceeds the 360 test examples of digits"),
        (["--model", "traced.pt", "--routing", "none"], "name what to evaluate"),
        (["runs/x", "--model", "traced.pt"], "name what to evaluate"),
        (["runs/x", "--mean", "0.5"], "--mean can only be given with --model, not with runs/x"),
        ([], "--data can only be given with --model$"),
    ],
)
def test_a_mistake_is_answered_in_one_line(arguments: list[str], message: str, call: Any, tmp_path: Path) -> None:
    n = () if "--n" in arguments else ("--n", N)
    suite = () if "--suite" in arguments else ("--suite", "lp")
    ended = call(*arguments, "--data", "digits", *n, *suite)
    assert (ended.code, ended.out) == (2, "")
    assert re.search(f"error: .*(?:{message})", ended.err), ended.err
    assert [line.startswith("error: ") for line in ended.err.splitlines()].count(True) == 1
    assert not (tmp_path / "evaluations").exists()


def test_a_batch_that_an_export_takes_is_enough(call: Any) -> None:
    ended = call("--model", "sixteen.pt2", "--data", "digits", *QUICK, "--batch-size", 16, "--json")
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["settings"]["batch_size"] == 16


def test_junk_is_no_export(call: Any, tmp_path: Path) -> None:
    (tmp_path / "junk.pt2").write_bytes(b"not a zip")
    assert "junk.pt2 was not written by torch.export.save" in call("--model", "junk.pt2", "--data", "digits").err


def test_weights_bring_their_experts_and_their_normalisation(tmp_path: Path) -> None:
    (tmp_path / "vit.py").write_text(
        "import timm\n\ndef net(num_classes):\n"
        "    return timm.create_model('vit_tiny_patch16_224', num_classes=num_classes, img_size=8, patch_size=4, "
        "in_chans=1, embed_dim=24, depth=1, num_heads=2)\n"
    )
    name, file, x = f"{tmp_path / 'vit.py'}:net", tmp_path / "m.safetensors", torch.rand(3, 1, 8, 8)
    source = rome.add_experts(rome.create_model(name, num_classes=10, in_chans=1, mean=[0.25], std=[0.5]), rank=2)
    for layer in expert_layers(source).values():
        torch.nn.init.normal_(layer.B)
    rome.save_model(source, file)
    named = built(name, weights=str(file))
    assert torch.equal(named.model(x), source.eval()(x))
    assert named.facts["normalisation"] == {"mean": [0.25], "std": [0.5]}
    assert named.remarks == [f"normalisation of {file}: mean 0.25, std 0.5"]
    given = built(name, weights=str(file), mean="0.75", std="1")
    assert given.facts["normalisation"] == {"mean": [0.75], "std": [1.0]}
    assert torch.equal(given.model(x), source.backbone(x - 0.75))
    assert given.remarks == [f"normalisation: mean 0.75, std 1, as given; {file} has mean 0.25, std 0.5"]
    torch.save({"state_dict": source.backbone.state_dict()}, tmp_path / "bare.pt")
    with pytest.raises(UserError, match=r"not in the model; it seems to have experts"):
        built(name, weights=str(tmp_path / "bare.pt"))
    plain = rome.create_model(name, num_classes=10, in_chans=1).backbone.state_dict()
    torch.save({"teacher": source.backbone.state_dict(), "student": plain}, tmp_path / "both.pt")
    named = built(name, weights=str(tmp_path / "both.pt"), weights_key="student")
    assert named.facts["normalisation"] is None
    assert any(remark.startswith("no normalisation added") for remark in named.remarks)


def test_more_logits_than_classes_only_if_asked_for() -> None:
    with pytest.raises(UserError, match=r"pretrained weights of test_vit.r160_in1k are for 1000 classes, not 10"):
        built("test_vit.r160_in1k")
    with pytest.raises(UserError, match=r"has no pretrained weights: give --weights FILE"):
        built(next(name for name in timm.list_models("vit_*") if not _has_weights(name)))


def _has_weights(name: str) -> bool:
    return bool(timm.get_pretrained_cfg(name).has_weights)


# -------- data


def pictures(root: Path, split: str) -> Path:
    for name in ("cat", "dog"):
        folder = root / split / name
        folder.mkdir(parents=True)
        Image.new("RGB", (9, 9)).save(folder / "1.png")
    return root


def hub(file: Path, names: tuple[str, ...], *sides: int) -> None:
    """A Parquet file as of the Hub, with one image of each of these sides."""
    file.parent.mkdir(parents=True, exist_ok=True)
    images = []
    for side in sides:
        buffer = io.BytesIO()
        Image.new("RGB", (side, side)).save(buffer, "PNG")
        images.append({"bytes": buffer.getvalue(), "path": None})
    features = {"features": {"label": {"names": names}}}
    table = pa.table({"image": images, "label": [0] * len(sides)})
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps({"info": features})}), file)


def test_data_is_known_by_its_content(tmp_path: Path) -> None:
    assert named_data("digits") == Digits()
    assert named_data("cifar10:some/where") == Cifar10(path="some/where")
    folder = str(pictures(tmp_path / "pets", "val"))
    assert named_data(folder, size=32, crop_pct=0.9) == ImageFolder(path=folder, size=32, crop_pct=0.9)
    assert named_data(f"folder:{folder}") == ImageFolder(path=folder)
    for place, names in (("cifar", CIFAR10_CLASSES), ("pets", ("cat", "dog"))):
        hub(tmp_path / place / "data" / "test-00000-of-00001.parquet", names, 32)
    assert named_data(str(tmp_path / "cifar"), size=224) == Cifar10(path=str(tmp_path / "cifar"))
    pets = str(tmp_path / "pets")
    assert named_data(pets, size=224, crop_pct=0.9) == Parquet(path=pets)  # of one size: as they are
    assert named_data(pets, img_size=64, size=224, crop_pct=0.9) == Parquet(path=pets, size=64, crop_pct=0.9)
    hub(tmp_path / "pets" / "data" / "test-00000-of-00001.parquet", ("cat", "dog"), 32, 48)
    assert named_data(pets, size=224, crop_pct=0.9) == Parquet(path=pets, size=224, crop_pct=0.9)
    (tmp_path / "torch" / "cifar-10-batches-py").mkdir(parents=True)
    for place in (tmp_path / "torch", tmp_path / "torch" / "cifar-10-batches-py"):
        assert named_data(str(place)) == Cifar10(path=str(place))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("digts", "there is no folder digts with data; .*Did you mean 'digits'"),
        ("cifra10:x", "unknown data 'cifra10:x'; give digits; cifar10:PATH"),
        (r"C:\data", r"there is no folder C:\\data with data; give digits"),
        ("./a:b", "there is no folder a:b with data; give digits"),
        ("x" * 5000, "there is no folder x+ with data"),
        ("folder:" + "x" * 5000, "path: .*cannot be a path: File name too long"),
        ("~nobody-of-that-name/x", "there is no folder ~nobody"),
        ("{kind: foldr, path: x}", "unknown data kind 'foldr'. Did you mean 'folder'"),
        ("{kind: folder", "not valid YAML"),
        ("{kind: folder, path: x, splitt: y}", "splitt: unknown key. Did you mean 'test_split'"),
        ("empty", "empty holds no data of a recognised kind; give digits"),
        ("flat", "flat holds no data of a recognised kind"),
        ("batches", "rename it to cifar-10-batches-py"),
    ],
)
def test_data_that_is_not_known(given: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "flat" / "val").mkdir(parents=True)
    (tmp_path / "batches").mkdir()
    (tmp_path / "batches" / "batches.meta").touch()
    with pytest.raises(UserError, match=message):
        named_data(given)


def test_a_file_without_rows_is_told(tmp_path: Path) -> None:
    file = tmp_path / "pets.parquet"
    hub(file, ("cat", "dog"), 8)
    pq.write_table(pq.read_table(file).slice(0, 0), file)
    with pytest.raises(UserError, match=r"pets\.parquet: has no rows"):
        named_data(str(file))


def test_a_folder_is_read_as_a_timm_model_wants_it() -> None:
    wanted = preprocessing("vit_tiny_patch16_224", None)
    assert wanted == {"size": 224, "crop_pct": 0.9, "crop_mode": "center", "interpolation": "bicubic"}
    assert preprocessing("vit_tiny_patch16_224", 64)["size"] == 64
    assert preprocessing("net.py:f", None) == {}
    assert preprocessing("net.pt2", 96) == {"size": 96}
    tall = "vit_base_patch16_sapiens2"
    if timm.is_model(tall):  # in new versions
        with pytest.raises(UserError, match=r"takes images of 768 x 1024 pixels, not square ones: give --img-size"):
            preprocessing(tall, None)


@pytest.mark.parametrize("name", [r"C:\nets\net.pt", "./a:b/net.pt2", "./a:b/net.py", r"C:\nets\net.py"])
def test_a_colon_in_the_path_of_a_model_makes_it_no_module(name: str) -> None:
    message = "there is no file" if name.endswith(("pt", "pt2")) else "a function is named path.py:function"
    with pytest.raises(UserError, match=message):
        built(name)


def test_settings_of_data_may_be_named_in_braces(tmp_path: Path) -> None:
    folder = str(pictures(tmp_path / "a:b", "val"))
    for text in (f"{{path: '{folder}', test_split: val}}", f"{{kind: folder, path: '{folder}', test_split: val}}"):
        assert named_data(text, size=32, crop_pct=0.9) == ImageFolder(
            path=folder, size=32, crop_pct=0.9, test_split="val"
        )
    assert named_data(folder) == ImageFolder(path=folder)
    assert named_data(f"{{path: '{folder}', size: 16}}", size=32) == ImageFolder(path=folder, size=16)


def test_a_folder_of_images_is_evaluated(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.rand(3, 3, 8, 8)
    torch.export.save(
        torch.export.export(net(192, 2).eval(), (x,), dynamic_shapes=({0: torch.export.Dim("batch")},)),
        tmp_path / "pets.pt2",
    )
    pets = str(pictures(tmp_path / "pets", "test"))
    config = named_config({"model": str(tmp_path / "pets.pt2"), "data": pets, "img_size": 8})
    assert config is not None
    report, folder = evaluate_saved(config, suite="lp", out=tmp_path / "out")
    assert (report.n, report.settings["classes"], folder) == (2, 2, tmp_path / "out")
    assert report.settings["threats"]["L1"]["eps"] == IMAGENET["L1"].eps
    assert report.settings["provenance"]["config"]["data"]["size"] == 8
    assert report.settings["provenance"]["examples"] == str(tmp_path / "pets" / "test")


def test_parquet_files_of_other_data_are_evaluated_under_named_budgets(tmp_path: Path) -> None:
    torch.jit.script(net(192, 2).eval()).save(str(tmp_path / "pets.pt"))
    hub(tmp_path / "pets" / "test.parquet", ("cat", "dog"), 8, 8, 8)
    options = {"model": str(tmp_path / "pets.pt"), "data": str(tmp_path / "pets")}
    with pytest.raises(UserError, match=r"threats: is missing; data kind 'parquet' has no default budgets; give"):
        named_config(options)
    config = named_config({**options, "budgets": "L2=0.5"})
    assert config is not None
    report, _ = evaluate_saved(config, suite="lp", out=tmp_path / "out")
    assert (report.n, report.settings["classes"], list(report.settings["threats"])) == (3, 2, ["L2"])


def test_budgets() -> None:
    def budgets(text: str) -> tuple[Threat, ...]:
        config = named_config({"model": "net.py:net", "data": "digits", "budgets": text})
        assert config is not None
        return config.threats

    assert budgets("cifar10") == CIFAR10
    assert budgets("Linf=8/255, l2=0.5") == (LpBall(norm="Linf", eps=8 / 255), LpBall(norm="L2", eps=0.5))
    assert [threat.name for threat in budgets("L2=1,2=3")] == ["L2-1", "L2-3"]
    with pytest.raises(UserError, match="L2-1, L2-1 are not distinct"):
        budgets("L2=1,2=1")
