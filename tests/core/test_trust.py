"""What files name is never run: every door times every form of code, with a marker that the code would leave."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import stat
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from helpers.problems import rest_slow
from helpers.tiny_runs import Ended, changed, tiny, write_yaml
from rome.attacks.suites.composed import as_suite
from rome.core import trust
from rome.core.errors import UserError
from rome.evaluation.run import evaluate_saved
from rome.models import create_model, load_model, load_weights, read_tensors
from rome.report.explore import open_explorers
from rome.report.figures import Options, write_figures
from rome.report.page import write_report
from rome.report.subject import open_subjects
from rome.report.sweep import run_point
from rome.runs.config import load, parse
from rome.runs.folder import Run
from rome.training.setup import train

CODE = """
import torch
def leave(what):
    with open({marker!r}, "a") as file:
        file.write(what + "\\n")
leave("imported " + __name__)
def build(num_classes=10, **args):
    leave("called")
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, num_classes))
"""
QUICK = {"suite": {"kind": "lp", "steps": 1}, "n": 8, "batch_size": 8}
SMALL: dict[str, Any] = {"epochs": 1, "data__train_limit": 12, "experts": None, "evaluation": QUICK}
FORMS: dict[str, dict[str, Any]] = {
    "a module to import": {"imports": ["parts"]},
    "a function of a file": {"name": "mine.py:build"},
    "a function of a module": {"name": "mine:build"},
    "a function of torch": {"name": "torch.hub:load", "args": {"repo_or_dir": "evil/repo", "model": "net"}},
    "a model of a zoo that unpickles": {"name": "robustbench:Standard", "args": {"model_dir": "."}},
    "a model of a hub": {"name": "hf-hub:evil/net"},
    "a folder as a hub": {"name": "local-dir:."},
    "a checkpoint that timm reads": {"args": {"checkpoint_path": "evil.pt"}},
    "weights from a place of its own": {"args": {"pretrained_cfg": {"url": "http://127.0.0.1:9/evil.pth"}}},
}


class Place(NamedTuple):
    """A working folder with code in it, runs, and what that code leaves."""

    folder: Path
    plain: Path
    """A run without code, evaluated."""
    own: Path
    """A run whose config names code, trained and evaluated here."""
    marker: Path

    def ran(self) -> str:
        return self.marker.read_text() if self.marker.exists() else ""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    root = tmp_path_factory.mktemp("trust")
    place = Place(root, root / "plain", root / "own", root / "marker")
    for name in ("mine.py", "parts.py"):
        (root / name).write_text(CODE.format(marker=str(place.marker)))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr(sys, "path", [*sys.path])
        evaluate_saved(train(tiny(name="plain", **SMALL), place.plain).folder)
        shutil.copy(place.plain / "model.safetensors", place.plain / "best.safetensors")
        (root / "own.yaml").write_text(
            yaml.safe_dump({**changed(**SMALL), "imports": ["parts"], "model": {"name": "mine.py:build"}})
        )
        train(load("own.yaml"), place.own)
        evaluate_saved(place.own)
        yield place


@pytest.fixture
def place(made: Place, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """The same with a clean slate: nothing imported, no marker."""
    monkeypatch.chdir(made.folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for module in ("mine", "parts"):
        sys.modules.pop(module, None)
    made.marker.unlink(missing_ok=True)
    yield made
    for module in ("mine", "parts"):
        sys.modules.pop(module, None)


def rewritten(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Another metadata in a safetensors file."""
    metadata, tensors = read_tensors(file)
    save_file(tensors, file, {"rome": json.dumps(change(metadata))})


def poisoned(run: Path, form: dict[str, Any], to: Path) -> Path:
    """A copy of a run whose config and metadata name code."""
    shutil.copytree(run, to)

    def named(config: dict[str, Any]) -> dict[str, Any]:
        model = config["model"]
        model = {**model, "name": form.get("name", model["name"]), "args": {**model["args"], **form.get("args", {})}}
        return {**config, "imports": form.get("imports", []), "model": model}

    def inside(metadata: dict[str, Any]) -> dict[str, Any]:
        recipe = {**metadata["model"], **({"name": form["name"]} if "name" in form else {}), **form.get("args", {})}
        return {**metadata, "model": recipe, "config": named(metadata["config"])}

    config = to / "config.yaml"
    config.write_text(yaml.safe_dump(named(yaml.safe_load(config.read_text()))))
    for file in to.glob("*.safetensors"):
        rewritten(file, inside)
    torch.save({"format": 1, "epoch": 1, "model": load_file(to / "model.safetensors")}, to / "last.pt")
    return to


def strangers(own: Path, to: Path) -> Path:
    """The same run from somebody else: what it says is the same, its bytes are not."""
    shutil.copytree(own, to)
    with (to / "config.yaml").open("a") as file:
        file.write("# from afar\n")
    rewritten(to / "model.safetensors", lambda metadata: {**metadata, "version": "0"})
    shutil.rmtree(to / "evaluation")
    evaluate_saved(to, trust_code=True)
    return to


COMMANDS: dict[str, Callable[[Path, Place], list[object]]] = {
    "evaluate": lambda run, _: ["evaluate", run, "--overwrite"],
    "evaluate the file": lambda run, _: ["evaluate", run / "model.safetensors", "--overwrite"],
    "evaluate the best": lambda run, _: ["evaluate", run / "best.safetensors"],
    "evaluate the unfinished": lambda run, _: ["evaluate", run / "last.pt"],
    "report": lambda run, place: ["report", run, place.plain, "--out", run / "report"],
    "table 1": lambda run, _: ["table", "1", run],
    "table 6": lambda run, _: ["table", "6", run, "--no-timing"],
    "figures": lambda run, _: ["figures", run, "--only", "fig5", "--n", "8", "--out", run / "figures"],
    "features": lambda run, place: [
        *["evaluate", place.plain, "--features", run, "--cases", "lpa", "--out", run / "lpa", "--suite", "unseen"]
    ],
    "train": lambda run, place: [
        *[
            "train",
            place.plain / "config.yaml",
            "--out",
            run / "new",
            f"method={{kind: pat, features: {run}, steps: 1}}",
        ]
    ],
}
CALLS: dict[str, Callable[..., Any]] = {
    "load_model": lambda run, **trust: load_model(run, **trust),
    "evaluate_saved": lambda run, **trust: evaluate_saved(run, overwrite=True, **trust),
    "write_report": lambda run, **trust: write_report([run], run / "report", **trust),
    "write_figures": lambda run, **trust: write_figures(
        [run], run / "figures", only=["fig5"], options=Options(n=8), **trust
    ),
    "open_explorers": lambda run, **trust: open_explorers([run], **trust),
    "sweep's point": lambda run, **trust: run_point("own.yaml", (), str(run), **trust),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_runs_what_a_file_names(
    command: str, place: Place, rome: Callable[..., Ended], tmp_path: Path
) -> None:
    for number, (form, what) in enumerate(FORMS.items()):
        run = poisoned(place.plain, what, tmp_path / str(number))
        ended = rome(*COMMANDS[command](run, place))
        assert ended.code == 2, (form, ended.err)
        (line,) = ended.err.strip().splitlines()[-1:]
        assert "would run code: " in line, (form, line)
        named = [*what.get("imports", []), *([what["name"]] if "name" in what else []), *(what.get("args", {}))]
        assert named[0] in line
        assert "--trust-code" in line
        assert not place.ran(), form
    assert not {"mine", "parts"} & set(sys.modules)


@pytest.mark.parametrize("call", CALLS)
def test_no_call_runs_what_a_file_names(call: str, place: Place, tmp_path: Path) -> None:
    for number, (form, what) in enumerate(FORMS.items()):
        run = poisoned(place.plain, what, tmp_path / str(number))
        with pytest.raises((UserError, SystemExit), match=r"would run code: |2") as refused:
            CALLS[call](run)
        assert "\n" not in str(refused.value)
        assert "trust_code" in str(refused.value) or call == "sweep's point"
        assert "parts" not in place.ran() or call == "sweep's point", form  # its own.yaml a person named
    assert "called" not in place.ran()


def test_tensors_alone_need_no_trust(place: Place, tmp_path: Path) -> None:
    run = poisoned(place.plain, {"imports": ["parts"], "name": "mine.py:build"}, tmp_path / "run")
    model = load_model(place.plain)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    load_model(run, model)
    load_weights(model, run)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in read_tensors(run)[1].items())
    assert not place.ran()


# Whom to trust


@pytest.mark.parametrize("command", rest_slow([name for name in COMMANDS if name not in ("features", "train")], 4))
def test_what_was_trained_here_opens_and_the_same_from_elsewhere_only_if_told(
    command: str, place: Place, rome: Callable[..., Ended], tmp_path: Path
) -> None:
    run = strangers(place.own, tmp_path / "run")
    for each in (run, place.own):
        shutil.copy(each / "model.safetensors", each / "best.safetensors")
        torch.save({"format": 1, "epoch": 1, "model": load_file(each / "model.safetensors")}, each / "last.pt")
    place.marker.unlink()
    sys.modules.pop("parts")
    ended = rome(*COMMANDS[command](run, place))
    assert ended.code == 2
    assert "would run code: imports: parts, model: mine.py:build." in ended.err
    assert not place.ran()
    told = rome(*COMMANDS[command](run, place), "--trust-code")
    assert "would run" not in told.err
    assert "imported parts" in place.ran()
    assert "called" in place.ran() or "table" in command
    assert told.code == 0, told.err
    place.marker.unlink()
    sys.modules.pop("parts")
    own = rome(*COMMANDS[command](place.own, place))
    assert (own.code, "would run" in own.err) == (0, False), own.err
    assert "imported parts" in place.ran()


@pytest.mark.parametrize("call", [name for name in CALLS if name != "sweep's point"])
def test_a_call_is_told_to_trust(call: str, place: Place, tmp_path: Path) -> None:
    run = strangers(place.own, tmp_path / "run")
    place.marker.unlink()
    CALLS[call](run, trust_code=True)
    assert "called" in place.ran()
    assert not trust.allowed()


def test_trust_lasts_for_what_was_opened_with_it(place: Place, tmp_path: Path) -> None:
    run = strangers(place.own, tmp_path / "run")
    with trust.trusting(True):
        (subject,) = open_subjects([run])
    assert subject.model is not None
    with pytest.raises(UserError, match="would run code"):
        open_subjects([run])


def test_an_evaluation_from_elsewhere_keeps_its_numbers_and_its_code_stays_where_it_is(
    place: Place, rome: Callable[..., Ended], tmp_path: Path
) -> None:
    own = tmp_path / "own"
    quick = ["--data", "digits", "--n", "8", "--suite", "lp", "--out", own, "--no-checks"]
    assert rome("evaluate", "--model", "mine.py:build", *quick).code in (0, 2)
    place.marker.unlink()
    assert rome("report", own, "--out", tmp_path / "report").code == 0
    assert "called" in place.ran()  # pictures of one's own
    for number, model in enumerate(("mine.py:build", "mine:build", "evil.pt2", "evil.pt")):
        theirs = shutil.copytree(own, tmp_path / str(number))
        settings = json.loads((theirs / "settings.json").read_text())
        settings["provenance"]["config"]["model"]["name"] = model
        (theirs / "settings.json").write_text(json.dumps(settings))
        place.marker.unlink(missing_ok=True)
        ended = rome("report", theirs, "--out", tmp_path / "report")
        assert ended.code == 0
        assert f"settings.json would run code: model: {model}." in ended.err
        assert not place.ran()
    rome("report", tmp_path / "0", "--out", tmp_path / "report", "--trust-code")
    assert "called" in place.ran()


def test_a_lost_record_is_a_file_of_somebody(place: Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(trust, "_written", set())
    load_model(place.own)  # what another process would find
    monkeypatch.setenv("ROME_STATE_HOME", str(tmp_path))
    with pytest.raises(UserError, match="would run code"):
        load_model(place.own)


def test_the_record_is_the_users_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(trust, "_written", set())
    file, named = tmp_path / "file", {"config": {"imports": ["parts"]}}
    file.write_text("content")
    monkeypatch.setenv("ROME_STATE_HOME", "relative")  # whatever lies in the folder where a person works
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    trust.record(file, {"config": {"imports": []}})
    assert not (tmp_path / "state").exists()  # nothing to remember
    trust.record(file, named)
    kept = tmp_path / "state" / "rome" / "written"
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert stat.S_IMODE(kept.parent.stat().st_mode) == 0o700
    monkeypatch.setattr(trust, "_written", set())
    assert trust.check(file, named) == named
    kept.chmod(0o622)  # somebody else may have written into it
    with pytest.raises(UserError, match="would run code"):
        trust.check(file, named)
    kept.chmod(0o600)
    file.write_text("other content")
    with pytest.raises(UserError, match="would run code"):
        trust.check(file, named)


def test_a_record_that_cannot_be_written_fails_no_training(
    place: Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ROME_STATE_HOME", str(tmp_path / "file" / "no-folder"))
    run = train(load("own.yaml"), tmp_path / "run")
    assert run.finished
    load_model(run.folder)  # this process remembers what it wrote


def test_the_working_folder_is_searched_for_what_a_person_names_alone(
    place: Place, rome: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a package that is tried and not installed, such as robustbench, would be found in a stranger's folder."""
    monkeypatch.setattr(sys, "path", [each for each in sys.path if each not in ("", str(place.folder))])
    assert rome("report", place.plain, "--out", place.folder / "report").code == 0
    assert "" not in sys.path
    assert "imported mine" in (trust.import_own("mine") and place.ran())


# Files that are none


DEEP = "[" * 1000 + "]" * 1000


@pytest.mark.parametrize(
    "metadata",
    [
        *(
            "[]",
            "null",
            "3",
            '"text"',
            "",
            "{",
            DEEP,
            f'{{"config": {DEEP}}}',
            '{"config": ' + DEEP[901:1099] + "}",
        ),
        *('{"model": []}', '{"model": {}}', '{"model": {"num_classes": 10}}', '{"model": {"name": 3}}'),
        *('{"model": {"name": "resnet_18"}}', '{"model": {"name": "resnet_18", "num_classes": "many"}}'),
        *('{"model": {"name": "resnet_18", "num_classes": 10, "mean": "gray"}}', '{"config": []}', '{"experts": [3]}'),
        *('{"model": {"name": "no such", "num_classes": 10}}', '{"experts": {"rank": 3}}', "1" * 5000),
    ],
    ids=lambda text: text[:40],
)
def test_metadata_of_any_form_ends_in_one_line(metadata: str, rome: Callable[..., Ended], tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"weight": torch.zeros(3)}, file, {"rome": metadata})
    ended = rome("evaluate", file)
    assert ended.code == 2
    assert ended.err.count("\n") == 1
    with pytest.raises(UserError, match=r"model\.safetensors|unknown model"):
        load_model(file)


@pytest.mark.parametrize("name", ["empty", "length", "long", "random", "no JSON", "unknown type", "not text"])
def test_a_header_of_any_form_ends_in_one_line(name: str, rome: Callable[..., Ended], tmp_path: Path) -> None:
    header = json.dumps({"w": {"dtype": "F77", "shape": [1], "data_offsets": [0, 4]}}).encode()
    content = {
        "empty": b"",
        "length": struct.pack("<Q", 2**60),
        "long": struct.pack("<Q", 99_000_000) + b"[" * 1000,
        "random": random.Random(0).randbytes(1000),
        "no JSON": struct.pack("<Q", 5) + b"[[[[[",
        "unknown type": struct.pack("<Q", len(header)) + header + bytes(4),
        "not text": struct.pack("<Q", 8) + b"\xff" * 8,
    }[name]
    (tmp_path / "model.safetensors").write_bytes(content)
    ended = rome("evaluate", tmp_path / "model.safetensors")
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert "is not a readable safetensors file" in ended.err


def test_what_steers_a_terminal_is_not_printed(rome: Callable[..., Ended], tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"weight": torch.zeros(3)}, file, {"rome": json.dumps({"model": {"name": "\x1b]0;x\x07:\nf"}})})
    with pytest.raises(UserError) as refused:
        load_model(file)
    assert "\x1b" not in str(refused.value)
    assert "\n" not in str(refused.value)
    assert "\x1b" not in rome("train", tmp_path / "\x1b[2Jx.yaml").err


@pytest.mark.parametrize(
    "state", [{}, {"model": {}, "epoch": 1}, {"model": 3, "epoch": 1}, {"model": {"w": torch.zeros(1)}, "epoch": 1}]
)
def test_a_checkpoint_of_a_run_that_is_none_ends_in_one_line(
    state: dict[str, Any], place: Place, rome: Callable[..., Ended], tmp_path: Path
) -> None:
    run = shutil.copytree(place.plain, tmp_path / "run")
    torch.save({"format": 1, **state}, run / "last.pt")
    ended = rome("evaluate", run / "last.pt")
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert "last.pt does not fit its config.yaml" in ended.err


@pytest.mark.parametrize("form", ["sparse", "meta"])
def test_a_tensor_without_plain_numbers_ends_in_one_line(form: str, tmp_path: Path) -> None:
    model = create_model("resnet_18", num_classes=10)
    state = model.backbone.state_dict()
    odd = state["conv1.weight"].to_sparse() if form == "sparse" else state["conv1.weight"].to("meta")
    torch.save({**state, "conv1.weight": odd}, tmp_path / "odd.pt")
    with pytest.raises(UserError, match=r"conv1\.weight is sparse, quantized or meta"):
        load_weights(model, tmp_path / "odd.pt")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        *(("settings", {"cases": value}) for value in (3, [3], None)),
        *(("settings", {key: []}) for key in ("suite", "data", "threats", "versions", "environment", "model", "n")),
        *(("result", {key: 3}) for key in ("warnings", "failed", "seconds", "after", "checks", "pending")),
    ],
)
def test_an_evaluation_of_any_form_ends_in_one_line(
    name: str, change: dict[str, Any], place: Place, rome: Callable[..., Ended], tmp_path: Path
) -> None:
    run = shutil.copytree(place.plain, tmp_path / "run")
    (file,) = (run / "evaluation").glob(f"*/{name}.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    for command in (["report", run, "--out", tmp_path / "report"], ["table", "1", run]):
        ended = rome(*command)
        assert (ended.code, ended.err.count("\n")) == (2, 1)
        assert "is damaged" in ended.err


# Bombs, and names that lead elsewhere


def aliases(levels: int, merge: bool = False) -> str:
    """A mapping that means 10^levels values."""
    lines = ["a0: &a0 {x: 1}"]
    for i in range(levels):
        many = ", ".join([f"*a{i}"] * 10)
        lines.append(f"a{i + 1}: &a{i + 1} " + (f"{{<<: [{many}]}}" if merge else f"[{many}]"))
    return "\n".join(lines) + "\n"


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "text",
    [
        aliases(10),
        aliases(10, merge=True),
        f"seed: {DEEP[800:1200]}",
        "seed: &a [*a]",
        "? &a [*a]\n: 1",
        "seed: 0x" + "f" * 9000,
    ],
    ids=["aliases", "merges", "deep", "round", "key", "number"],
)
def test_few_lines_of_yaml_cannot_mean_gigabytes(text: str, rome: Callable[..., Ended], tmp_path: Path) -> None:
    base = changed(**SMALL)
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(base) + text)
    assert rome("train", file, "--out", tmp_path / "run").code == 2
    with pytest.raises(UserError, match=r"config\.yaml"):
        Run(tmp_path).written()
    flow = "{" + ", ".join(text.strip().splitlines()) + "}"
    with pytest.raises(UserError, match="suite"):
        as_suite(flow)
    with pytest.raises(UserError, match=r"override|evaluation"):
        load(write_yaml(tmp_path / "base.yaml", base), [f"evaluation={flow}"])
    assert not (tmp_path / "run").exists()


def test_aliases_that_mean_little_are_welcome(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("data: digits\nthreats: [&ball {norm: linf, eps: 8/255}]\nmodel: {name: resnet_18}\nabout: &s x\n")
    assert load(file).threats[0].name == "Linf"


@pytest.mark.parametrize("legacy", [False, True])
def test_a_checkpoint_cannot_fill_the_memory(legacy: bool, tmp_path: Path) -> None:
    file = tmp_path / "small.pt"
    torch.save({"w": torch.zeros(1_000_000)}, file)
    with zipfile.ZipFile(file) as whole, zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as packed:
        for entry in whole.infolist():
            packed.writestr(entry.filename, whole.read(entry))
    model = create_model("resnet_18", num_classes=10)
    with pytest.raises(UserError, match=r"bomb\.pt is compressed, [\d,]+ bytes for 4,[\d,]+"):
        load_weights(model, tmp_path / "bomb.pt")

    class Large:
        def __reduce__(self) -> Any:
            return bytearray, (1 << 40,)

    torch.save({"w": Large()}, file, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UserError, match="bytearray"):
        load_weights(model, file)


@pytest.mark.parametrize("form", ["torch", "torch before 1.6", 0, 2, 4, 5])
def test_a_pickle_that_wants_to_run_code_is_called_so(form: str | int, tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path / 'harm'}",)

    file, harm = tmp_path / "theirs.pt", {"state_dict": Harm()}
    if isinstance(form, int):
        file.write_bytes(pickle.dumps(harm, protocol=form))
    else:
        torch.save(harm, file, _use_new_zipfile_serialization=form == "torch")
    with pytest.raises(UserError, match=rf"theirs\.pt holds code \({os.name}\.system\).*none of it was run"):
        load_weights(create_model("resnet_18", num_classes=10), file)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("name", ["../../x", "..", ".", "/tmp/x", "a/../../x", "..\\x", "\x1b[2J", "x" * 200])
def test_a_name_stays_inside_the_folder_of_runs(name: str) -> None:
    with pytest.raises(UserError, match="name: "):
        parse({**changed(**SMALL), "name": name})


@pytest.mark.parametrize("name", ["rome-random", "My run é", "a b..c"])
def test_other_names_are_taken(name: str) -> None:
    assert parse({**changed(**SMALL), "name": name}).name == name
