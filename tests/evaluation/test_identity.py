"""What tells two evaluations apart: whatever changes an answer, and nothing else. What is reused is said."""

from __future__ import annotations

import copy
import functools
import importlib
import json
import os
import runpy
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from helpers.tiny_runs import changed, same, started, tiny, watched, weights
from helpers.toy_suites import shades
from rome.attacks.suites.base import QuickSuite
from rome.cli.app import main
from rome.core.errors import Interrupted, UserError
from rome.core.user_code import is_users
from rome.evaluation.evaluate import Report, evaluate, hash_model
from rome.evaluation.identity import code_of, identity
from rome.evaluation.run import evaluate_saved
from rome.experts import DualScale, LowRank
from rome.models import create_model
from rome.runs.config import Config, parse
from rome.runs.origin import code_facts, differences
from rome.threats import LpBall
from rome.training.setup import train

LINF, SHADES, LABELS = [LpBall(norm="Linf", eps=0.1)], shades(0.1, 0.45, 0.9, 0.55, 0.2), torch.tensor([0, 0, 1, 1, 1])
QUICK = QuickSuite(steps=2)
Files = Callable[..., Any]


class Net(nn.Module):
    """Two classes, and something of every kind that a module may hold beside its tensors."""

    gain = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.act: Any = nn.ReLU()
        self.scale: Any = 10.0
        self.shape, self.names, self.lock = (1, 2), {"a", "b", "c"}, threading.Lock()
        self.function: Any = functools.partial(torch.clamp, min=0)
        self.seen: list[int] = []
        self.other: Any = [nn.Linear(2, 2)]

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(len(x))
        bright = self.gain * self.scale * (self.act(x).flatten(1).mean(dim=1) - 0.5)
        return torch.stack([-bright, bright], dim=1)


def net(**changes: Any) -> Net:
    torch.manual_seed(0)
    made = Net()
    for name, value in changes.items():
        setattr(made, name, value)
    return made.eval()


def run(model: Any, out: Path, **settings: Any) -> Report:
    return evaluate(model, SHADES, LABELS, **{"threats": LINF, "suite": QUICK, "out": out, **settings})


def closure(number: float) -> Callable[[Tensor], Tensor]:
    return lambda x: x * number


def hooked(model: Net) -> Net:
    model.act.register_forward_hook(lambda module, args, output: -output)
    return model


def patched(model: Net) -> Net:
    model.act.forward = lambda x: -x
    return model


class Negative(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return -x


OTHERS: dict[str, tuple[Callable[[], Any], str]] = {
    "activation": (lambda: net(act=nn.GELU()), r"model.layers.GELU: null there, 1 now"),
    "number": (lambda: net(scale=20.0), r'model.attributes.Net.scale: "10.0" there, "20.0" now'),
    "tuple": (lambda: net(shape=(2, 1)), r"model.attributes.Net.shape"),
    "plain tensor": (lambda: net(scale=torch.tensor(10.0)), r"model.attributes.Net.scale"),
    "lambda": (lambda: net(function=lambda x: x), r"model.attributes.Net.function"),
    "closure": (lambda: net(function=closure(2)), r"model.attributes.Net.function"),
    "partial": (lambda: net(function=functools.partial(torch.clamp, min=1)), r"model.attributes.Net.function"),
    "list of modules": (lambda: net(other=[nn.Linear(2, 2), nn.ReLU()]), r"model.attributes.Net.other"),
    "class of one's own": (lambda: net(act=Negative()), r"model.layers.Negative: null there, 1 now"),
    "hook": (lambda: hooked(net()), r"model.attributes.ReLU._forward_hooks"),
    "method": (lambda: patched(net()), r"model.attributes.ReLU.forward"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_another_model_is_refused_by_name(case: str, tmp_path: Path) -> None:
    make, message = OTHERS[case]
    first = run(net(), tmp_path)
    assert run(net(), tmp_path).reused == {"result": first.date}
    before = {path: path.read_bytes() for path in tmp_path.glob("**/*.*")}
    with pytest.raises(UserError, match=message):
        run(make(), tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.glob("**/*.*")} == before, "nothing is lost"
    assert run(make(), tmp_path, overwrite=True).reused == {}
    assert run(make(), tmp_path).reused, "and it is the same again when it is made again"


def test_two_closures_and_two_lambdas_are_told_apart(tmp_path: Path) -> None:
    run(net(function=closure(2)), tmp_path / "a")
    with pytest.raises(UserError, match=r"Net\.function"):
        run(net(function=closure(3)), tmp_path / "a")
    run(net(function=lambda x: x + 1), tmp_path / "b")
    with pytest.raises(UserError, match=r"Net\.function"):
        run(net(function=lambda x: x + 2), tmp_path / "b")


def test_a_class_that_is_changed_after_it_was_made_is_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(net(), tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Net, "gain", 2.0)
        with pytest.raises(UserError, match=r"test_identity.py:Net.gain: 1.0 there, 2.0 now"):
            run(net(), tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(nn.ReLU, "forward", lambda self, x: -x)
        with pytest.raises(UserError, match=r"the code of test_identity.py changed"):
            run(net(), tmp_path)
    assert run(net(), tmp_path).reused


def test_what_wraps_a_model_changes_nothing() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(16, 4), nn.ReLU()), nn.Linear(4, 2)).eval()
    inside = copy.deepcopy(model)
    inside[1] = nn.DataParallel(inside[1])
    inside[2] = torch.compile(inside[2])
    for wrapped in (torch.compile(model), nn.DataParallel(model), nn.DataParallel(torch.compile(model)), inside):
        assert hash_model(wrapped) == hash_model(model)
        assert identity(wrapped) == identity(model)


def test_tensors_of_every_layout_are_part_of_a_model() -> None:
    def holding(buffer: Tensor) -> str | None:
        model = nn.Linear(2, 2)
        model.load_state_dict({"weight": torch.eye(2), "bias": torch.ones(2)})
        model.register_buffer("held", buffer)
        return hash_model(model)

    turned = torch.tensor([1 + 2j, 3j])
    buffers = [torch.eye(2).to_sparse(), (2 * torch.eye(2)).to_sparse(), turned, turned.conj()]
    assert len({holding(buffer) for buffer in buffers}) == 4


def test_settings_of_gates_are_part_of_a_model() -> None:
    def gated(pool: str) -> dict[str, Any]:
        torch.manual_seed(0)
        arguments: dict[str, Any] = {"embed_dim": 16, "depth": 1, "num_heads": 2}
        model = create_model("vit_tiny_patch16_224", num_classes=3, img_size=8, patch_size=4, **arguments)
        return identity(LowRank(experts=2, rank=2, gate=DualScale(pool=pool)).inject(model))

    found = differences({"model": gated("mean")}, {"model": gated("patches")})
    assert "model.attributes.Pool.which: \"'mean'\" there, \"'patches'\" now" in found


def test_counters_and_caches_do_not_make_another_model(tmp_path: Path) -> None:
    """What a forward changes while the answers stay is no setting; it has changed when the same model comes again."""
    model = net()
    first = run(model, tmp_path)
    assert len(model.seen) > 0
    assert first.settings["model"]["changing"] == ["Net.seen"]
    assert run(model, tmp_path).reused
    assert run(net(), tmp_path).reused
    (tmp_path / "result.json").unlink()
    assert run(model, tmp_path).reused["batches"] > 0


def test_what_cannot_be_told_apart_is_not_reused(tmp_path: Path) -> None:
    def held() -> Net:
        return net(other=ContextVar("mode"))

    run(held(), tmp_path)
    with pytest.raises(UserError, match=r"cannot be distinguished from others .*Net.other \(_contextvars.ContextVar\)"):
        run(held(), tmp_path)
    (tmp_path / "settings.json").unlink()
    assert run(held(), tmp_path).reused == {}


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Files]:
    """Writes modules, in place of those of that name, and imports the last."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    written: set[str] = set()

    def write(**sources: str) -> Any:
        written.update(sources)
        for name, source in sources.items():
            (tmp_path / f"{name}.py").write_text(source)
        for name in written:
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        return importlib.import_module(list(sources)[-1])

    yield write
    for name in written:
        sys.modules.pop(name, None)


TOP = "import torch\nfrom torch import nn\n"
DEEP = "FACTOR = 1\nclass Table:\n    rows = [1, 2]\ndef deep(x):\n    return FACTOR * x\n"
HELPER = "import deepest\ndef helper(x):\n    return deepest.deep(x)\n"
MINE = (
    TOP
    + "from helping import helper\nclass Mine(nn.Module):\n    def forward(self, x):\n"
    + "        from late import last\n        return last(helper(x)).flatten(1)[:, :2]\n"
)
LATE = "def last(x):\n    return x\n"


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("deepest", "FACTOR * x", "FACTOR + x", "the code of deepest.py changed"),
        ("deepest", "FACTOR = 1", "FACTOR = 2", "deepest.py:FACTOR: 1 there, 2 now"),
        ("helping", "deep(x)", "deep(x) + 1", "the code of helping.py changed"),
        ("late", "return x", "return -x", "the code of late.py changed"),
        ("mine", "[:, :2]", "[:, 1:3]", "the code of mine.py changed"),
    ],
)
def test_the_code_of_every_module_that_is_reached_counts(
    name: str, old: str, new: str, message: str, files: Files
) -> None:
    sources = {"deepest": DEEP, "helping": HELPER, "late": LATE, "mine": MINE}
    first = identity(files(**sources).Mine())
    assert identity(files(**sources).Mine()) == first
    commented = {each: f"# a remark\n\n{source}" for each, source in sources.items()}
    unread = {**commented, "deepest": commented["deepest"] + "def unused():\n    return 2\n"}
    assert identity(files(**unread).Mine()) == first, "neither remarks nor what is not reached"
    other = identity(files(**{**sources, name: sources[name].replace(old, new)}).Mine())
    assert differences({"model": first}, {"model": other}) == [message]


ATTACK = """
import deepest
from rome.attacks.base import NOT_EVALUATED, Attack, AttackResult
from rome.attacks.suites.base import Case, Suite
class Own(Attack):
    kind = "own-attack"
    def steps_for(self, threat): return 1
    def search(self, model, x, y, groups, noise): return deepest.deep(x)
class OwnSuite(Suite):
    kind = "own-suite"
    def cases(self, threats, classes): return [Case(name=n, threat=t, attacks=(Own(),)) for n, t in threats.items()]
"""


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("deepest", "FACTOR = 1", "FACTOR = 20", "deepest.py:FACTOR: 1 there, 20 now"),
        ("attack", "return 1", "return 2", "the code of attack.py changed"),
        ("attack", "(Own(),)", "(Own(), Own())", "the code of attack.py changed"),
    ],
)
def test_the_code_of_attacks_and_suites_counts(name: str, old: str, new: str, message: str, files: Files) -> None:
    def now(**sources: str) -> dict[str, str]:
        module = files(**sources)
        code, unknown = code_of([module.OwnSuite(), module.Own()])
        assert not unknown
        return code

    sources = {"deepest": DEEP, "attack": ATTACK}
    first = now(**sources)
    assert first.keys() >= {"attack.py", "deepest.py", "deepest.py:FACTOR", "python"}
    other = now(**{**sources, name: sources[name].replace(old, new)})
    assert differences({"code": first}, {"code": other}) == [message]


def test_only_rome_has_no_code_of_ones_own() -> None:
    assert code_of([QUICK, LINF]) == ({}, [])


SCRIPT = """
import json, sys, torch
from torch import nn
from rome.evaluation.identity import identity
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.names, self.f = {"a", "b", "c", "d"}, lambda x: x in {"p", "q", "r"}
    def forward(self, x): return EDIT
told = json.dumps(identity(Net()))
if __name__ == "__main__":
    print(told)
"""


def tell(script: str, to: Path) -> None:
    to.write_text(json.dumps([runpy.run_path(script, run_name="__main__")["told"], hash("a text")]))


def test_another_process_finds_the_same_and_an_edit_is_seen(tmp_path: Path) -> None:
    """The class of a script, wherever it lies; hashes of texts differ from process to process."""

    def written(edit: str, folder: str) -> str:
        file = tmp_path / folder / "script.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text(SCRIPT.replace("EDIT", edit))
        return str(file)

    first = json.loads(runpy.run_path(written("x", "a"), run_name="script")["told"])
    process = started(tell, written("x", "b"), tmp_path / "told")
    process.join()
    seen, hashed = json.loads((tmp_path / "told").read_text())
    assert hashed != hash("a text"), "the test's own process"
    assert json.loads(seen) == first
    edited = json.loads(runpy.run_path(written("-x", "a"), run_name="script")["told"])
    assert differences(first, edited) == ["the code of script.py changed"]


def test_code_that_is_in_no_file_is_told_apart() -> None:
    def told(edit: str) -> Any:
        space = {"__name__": "typed"}
        exec(SCRIPT.replace("EDIT", edit), space)
        return json.loads(space["told"])

    assert told("x") == told("x")
    assert differences(told("x"), told("-x")) == ["the code of typed changed"]


def test_batches_of_an_earlier_call_are_said_with_their_date(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = run(net(), tmp_path, batch_size=2)
    count = len(list(tmp_path.glob("batches/*/*.safetensors")))
    assert first.reused == {}
    assert "reused" not in capsys.readouterr().err
    (tmp_path / "result.json").unlink()
    next(tmp_path.glob("batches/Linf/*.safetensors")).unlink()
    again = run(net(), tmp_path, batch_size=2)
    expected = {"batches": count - 1, "of": count, "cases": ["clean", "Linf"]}
    assert {name: again.reused[name] for name in expected} == expected
    said = f"{count - 1} of {count} batches are from an earlier call ({again.reused['first']}"
    assert said in capsys.readouterr().err
    assert json.loads((tmp_path / "result.json").read_text())["reused"] == again.reused
    assert run(net(), tmp_path, batch_size=2).reused == {"result": again.date}
    assert f"reused: this is the result of {again.date}" in capsys.readouterr().err


# -------- runs: data that moved, code that changed


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of 12 images to train on and 6 to test, of three classes; the working folder is the one around it."""
    monkeypatch.chdir(tmp_path)
    draw(Path("data"))
    return Path("data")


def draw(folder: Path, shades: tuple[int, ...] = (40, 110, 180), names: str = "abc", count: int = 4) -> None:
    for part, number in (("train", count), ("val", 2)):
        for name, shade in zip(names, shades, strict=True):
            place = folder / part / name
            place.mkdir(parents=True)
            for i in range(number):
                Image.fromarray(np.full((8, 8, 3), shade, np.uint8)).save(place / f"{i}.png")


def settings(**changes: Any) -> dict[str, Any]:
    data = {"kind": "folder", "path": "data", "size": 8}
    return changed(data=data, epochs=1, evaluation={"suite": "lp", "n": 6}, **changes)


def test_a_run_is_evaluated_where_its_data_lies_now(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(parse(settings()), "run")
    pictures.rename("elsewhere")
    with pytest.raises(UserError, match=r"data is not a folder.*rome evaluate run/model.safetensors --data PATH, or"):
        evaluate_saved("run")
    with pytest.raises(SystemExit, match="0"):
        main(["evaluate", "run", "--data", "elsewhere", "--json"])
    first = json.loads(capsys.readouterr().out)
    assert first["settings"]["provenance"]["config"]["data"]["path"] == "elsewhere"
    run.config_file.write_text(run.config_file.read_text().replace("path: data", "path: elsewhere"))
    again, _ = evaluate_saved("run")
    assert again.reused == {"result": first["date"]}
    draw(Path("renamed"), names="abd")
    with pytest.raises(UserError, match=r"renamed has other classes than run was trained on: 3 \(a, b, d\) instead of"):
        evaluate_saved("run", data="renamed")
    draw(Path("brighter"), shades=(50, 120, 190))
    with pytest.raises(UserError, match=r"data.sha256"):
        evaluate_saved("run", data="brighter")
    digits = train(tiny(epochs=1), "digits")
    with pytest.raises(UserError, match=r"the data of digits \(digits\) has no path; leave --data out"):
        evaluate_saved(digits.folder, data="elsewhere")


def stop(number: int) -> Any:
    def see(done: int) -> None:
        if done == number:
            os.kill(os.getpid(), signal.SIGTERM)

    return watched(see)


def test_training_goes_on_where_its_data_lies_now_if_it_is_the_same(pictures: Path) -> None:
    config = settings(batch_size=4, attack__steps=1)
    whole = train(parse(config), "whole")
    with pytest.raises(Interrupted):
        train(parse(config), "run", progress=stop(1))
    draw(Path("other"), shades=(50, 120, 190))
    draw(Path("fewer"), count=3)
    for place, what in (("other", "its images differ"), ("fewer", "its examples differ")):
        with pytest.raises(UserError, match=rf"run was started with other data than {place} holds \({what}\)"):
            train(parse({**config, "data": {**config["data"], "path": place}}), "run", resume=True)
    pictures.rename("elsewhere")
    run = train(parse({**config, "data": {**config["data"], "path": "elsewhere"}}), "run", resume=True)
    assert same(weights(run.folder), weights(whole.folder))
    draw(Path("data"), shades=(50, 120, 190))
    run.model_file.unlink()
    with pytest.raises(UserError, match="was started with other data than data holds"):
        train(parse(config), "run", resume=True)


OWN = """
from rome.attacks import PGD
EXTRA = 0
class OwnPGD(PGD):
    kind = "own-pgd"
    def search(self, *args, **kwargs):
        return super().search(*args, **kwargs) if EXTRA >= 0 else None
"""


def test_code_that_changed_before_a_run_goes_on_is_said_and_kept(
    files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def config() -> Config:
        return parse(changed(epochs=1, attack={"kind": "own-pgd", "steps": 1}, imports=["own_pgd"]))

    own = files(own_pgd=OWN)
    with pytest.raises(Interrupted):
        train(config(), tmp_path / "run", progress=stop(1))
    with pytest.raises(Interrupted):
        train(config(), tmp_path / "run", resume=True, progress=stop(2))
    assert "other code" not in capsys.readouterr().err
    own.EXTRA = 1
    run = train(config(), tmp_path / "run", resume=True)
    assert "run continues with changed code: own_pgd.py:EXTRA: 0 there, 1 now" in capsys.readouterr().err
    assert [text.partition(" (")[0] for text in run.origin["changed"]] == ["own_pgd.py:EXTRA: 0 there, 1 now"]
    assert run.other_code(code_facts(config())) == []
    own.EXTRA = 2
    assert run.other_code(code_facts(config())) == ["own_pgd.py:EXTRA: 1 there, 2 now"]


def test_packages_in_a_folder_of_ones_own_are_no_code_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``pip install --target``: told from a folder of one's own modules by the records of what is installed."""
    for name, installed in (("packages", True), ("own", False)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / f"{name}_module.py").write_text("def scale(x):\n    return x\n")
        if installed:
            (folder / f"{name}-1.0.dist-info").mkdir()
        monkeypatch.syspath_prepend(folder)
        assert is_users(importlib.import_module(f"{name}_module").scale) != installed


def test_evaluations_of_version_0_1_are_of_other_settings() -> None:
    """They stored whether images are kept as true or false."""
    assert differences({"save_images": True}, {"save_images": "none"}) == ["save_images: True there, none now"]
