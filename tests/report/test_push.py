"""What is sent to the Hub, what is not, and that it is the same model and the same numbers on the other side."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import torch
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from PIL import Image

import rome
from helpers.hub import READER, TOKEN, StandIn, connect, serving
from helpers.problems import case
from helpers.tiny_runs import EXACT, Ended, save_run, tiny
from rome.core.errors import UserError
from rome.core.files import file_hash
from rome.core.trust import trusting
from rome.data import Cifar10
from rome.evaluation.evaluate import Report
from rome.evaluation.run import evaluate_saved
from rome.evaluation.store import MATRIX, RESULT, SETTINGS
from rome.methods import Method
from rome.models import load_model, read_tensors
from rome.models.hub import HubModel
from rome.report.card import SUITES, citations, eval_results, model_card
from rome.report.columns import DASH
from rome.report.compared import gather
from rome.report.evaluated import evaluations
from rome.report.push import push
from rome.runs.folder import Run
from rome.runs.origin import data_facts

N = 12
QUICK = {"suite": {"kind": "lp", "steps": 1}, "n": N, "batch_size": N}
PLACE = f"evaluation/lp-{N}"
BOTH = {"README.md", "config.yaml", "model.safetensors", *(f"{PLACE}/{name}" for name in (MATRIX, RESULT, SETTINGS))}


def run_of(folder: Path, **changes: Any) -> Path:
    """A run that was never trained, with an evaluation."""
    save_run(folder, name=folder.name, evaluation=QUICK, **changes)
    run = Run(folder)
    run.origin_file.write_text(json.dumps({"data": data_facts(run.config.data.open("train"))}))
    for name in ("last.pt", "log.jsonl", "best.safetensors"):
        (folder / name).write_bytes(b"private")
    evaluate_saved(str(folder))
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``mixed`` with experts, ``plain`` without, which timm can load."""
    root = tmp_path_factory.mktemp("runs")
    run_of(root / "mixed")
    run_of(root / "plain", experts=None, model__mean=[0.25], model__std=[0.75])
    return root


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    monkeypatch.chdir(tmp_path)
    with serving() as standing_in:
        connect(standing_in, monkeypatch, tmp_path / "cache")
        yield standing_in


@pytest.fixture
def x() -> torch.Tensor:
    return torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def sent(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def unpack(files: dict[str, bytes], folder: Path) -> Path:
    """A repository as ``hf download --local-dir`` leaves it."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


# -------- what is sent


def test_weights_card_config_and_evaluations_are_sent_and_nothing_else(runs: Path, tmp_path: Path) -> None:
    for name, more in (("mixed", set()), ("plain", {"config.json"})):
        out = tmp_path / name
        push(runs / name, "alice/net", dry_run=out)
        assert set(sent(out)) == BOTH | more
        assert (out / PLACE / MATRIX).read_bytes() == (runs / name / PLACE / MATRIX).read_bytes()
        there, here = Report.load(out / PLACE), Report.load(runs / name / PLACE)
        assert there.to_json() | {"settings": 0} == here.to_json() | {"settings": 0}
        assert there.settings["provenance"]["checkpoint_sha256"] == file_hash(out / "model.safetensors")
        assert read_tensors(out)[0]["config"] == Run(out).config.dump(), "the config is inside the weights"
        assert b"private" not in b"".join(sent(out).values())


def test_no_byte_says_where_it_was_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data, weights, code and the run lie in folders named after a person, on a machine with a name."""
    home = tmp_path / "Ann Secretperson"
    home.mkdir()
    monkeypatch.setattr(Path, "home", lambda: home)
    monkeypatch.setattr("socket.gethostname", lambda: "secrethost-7")
    for split, n in (("train", 20), ("test", N)):
        images = [{"bytes": _png(i), "path": f"{home}/{i}.png"} for i in range(n)]
        pq.write_table(pa.table({"image": images, "label": [i % 10 for i in range(n)]}), home / f"{split}-0.parquet")
    own: dict[str, Any] = {"data": {"kind": "parquet", "path": str(home)}, "threats": "digits"}
    start = save_run(home / "start", experts=None, **own) / "model.safetensors"
    about = f"kept at {home}/notes by secrethost-7"
    run = run_of(home / "net", about=about, model__weights=str(start), **own)
    secrets = [text.encode() for text in (str(home), str(tmp_path), "Secretperson", "secrethost-7")]
    assert all(secret in b"".join(sent(run).values()) for secret in secrets[:2]), "the run itself does say it"
    push(run, "alice/net", dry_run=tmp_path / "out")
    for name, content in sent(tmp_path / "out").items():
        arrays = b"".join(map(_bytes, np.load(tmp_path / "out" / name).values())) if name.endswith(".npz") else b""
        for secret in secrets:
            assert secret not in content + arrays, (name, secret)
    config = Run(tmp_path / "out").config
    assert (config.data.path, config.model.weights) == ("PATH", "model.safetensors")
    assert config.about == "kept at PATH by HOST"
    assert "Cannot" not in (tmp_path / "out" / "README.md").read_text()
    assert "rome train config.yaml data.path=PATH" in (tmp_path / "out" / "README.md").read_text()


def _png(number: int, side: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((side, side), number, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def _bytes(array: np.ndarray) -> bytes:
    return " ".join(map(str, array.ravel())).encode() + array.tobytes()


# -------- the card


def test_the_card_has_the_reports_numbers(runs: Path, tmp_path: Path) -> None:
    push(runs / "mixed", "alice/net", dry_run=tmp_path / "out", license="mit")
    card, report = ModelCard.load(tmp_path / "out" / "README.md"), Report.load(runs / "mixed" / PLACE)
    for name, value in {"clean": report.clean, **report.robust, "union": report.union}.items():
        low, high = report.interval(name)
        line = next(line for line in card.text.splitlines() if line.startswith(f"| {name} "))
        assert line.endswith(f"| {100 * value:.1f} | {100 * low:.1f}{DASH}{100 * high:.1f} |")
    assert "| Linf (ε = 0.1) |" in card.text
    assert f"{N} test examples of digits, suite lp" in card.text
    assert 'rome.load_model("hf://alice/net")' in card.text
    assert "Chance level is 10% (10 classes)" in card.text
    for suite, what in SUITES.items():
        assert f"{what} (`--suite {suite}`)" in card.text
    data = card.data.to_dict()
    assert data["license"] == "mit"
    assert {"l1", "l2", "linf", "random", "mixture-of-experts"} <= set(data["tags"])
    values = {result.metric_name.split(",")[0]: result.metric_value for result in card.data.eval_results}
    assert values["clean"] == round(100 * report.clean, 2)
    assert values["average"] == round(100 * report.average, 2)
    assert len(values) == len(report.cases) + 2


def test_the_card_says_what_the_evaluation_warns_of(runs: Path) -> None:
    one = evaluations(Run(runs / "mixed"))["learned", "lp", N]

    def card(**changes: Any) -> str:
        changed = replace(one, report=replace(one.report, **changes))
        return model_card(tiny(), [changed], HubModel("alice/net"), facts={"version": "1", "changed": []})

    check = {"check": "more-steps", "examples": 3, "values": {}, "raised": True, "message": "more steps find more"}
    raised = {"check": "more-steps", "case": None, "attack": None, "examples": 3, "message": check["message"]}
    assert "Not checked for masked gradients" in card()
    unset = model_card(tiny(attack={"kind": "pgd"}), [one], HubModel("alice/net"), facts={})
    assert "| training attack | pgd |" in unset, "no steps None"
    assert "Checks for masked gradients (1) found none" in card(checks=[check | {"raised": False}])
    assert "- Warning (suite lp: more-steps): more steps find more." in card(checks=[check], warnings=[raised])
    searched = card(settings=one.report.settings | {"search_precision": "tf32"})
    assert f"{N} test examples of digits, suite lp, searched in TF32, seed 0" in searched
    assert "--search-precision tf32" in searched
    without = one.report.correct[:, :-1]
    said = card(correct=without, cases=one.report.cases[:-1], failed={"Linf": "out of memory"})
    assert "Linf failed: out of memory" in said
    assert "there is no average and no union until all attacks have run" in said.lower()


def test_every_method_has_its_papers() -> None:
    for kind, member in Method.members().items():
        if not member.__module__.startswith("rome."):
            continue
        with case(kind):
            experts = {"kind": "more"} if kind == "more" else None
            own = {"kind": kind, "features": "self"} if kind in ("pat", "vr") else {"kind": kind}
            found = citations(tiny(method=own, experts=experts))
            assert [entry.partition("{")[2].partition(",")[0] for entry in found] == ["kim2026rome", *member.papers]
            assert member.papers


def test_results_on_data_of_the_hub_are_in_its_form(runs: Path) -> None:
    """The client reads them back; of data that the Hub does not have there are none."""
    one = evaluations(Run(runs / "mixed"))["learned", "lp", N]
    assert eval_results(tiny(), one, HubModel("alice/net")) == []
    config = tiny().model_copy(update={"data": Cifar10()})
    entries = parse_eval_result_entries(
        yaml.safe_load(yaml.safe_dump(eval_results(config, one, HubModel("alice/net"))))
    )
    assert {entry.dataset_id for entry in entries} == {"uoft-cs/cifar10"}
    assert [entry.task_id for entry in entries] == [*one.report.cases, "average", "union"]
    assert entries[0].value == round(100 * one.report.clean, 2)
    assert entries[0].date == one.report.date[:10]
    assert entries[0].source_url == "https://huggingface.co/alice/net"


# -------- the other side


def test_what_was_pushed_is_the_same_model_with_the_same_result(
    runs: Path, hub: StandIn, x: torch.Tensor, rome: Any
) -> None:
    for name in ("mixed", "plain"):
        ended: Ended = rome("push", runs / name, f"alice/{name}", "--tag", "v1", "--license", "mit")
        assert ended.code == 0, ended.err
        repo = hub.repositories[f"alice/{name}"]
        (commit,) = set(repo.branches.values()) & set(repo.tags.values())
        assert repo.private
        assert torch.equal(load_model(f"hf://alice/{name}@v1")(x), load_model(runs / name)(x))
        ended = rome("evaluate", f"hf://alice/{name}", "--json")
        assert ended.code == 0, ended.err
        found, here = json.loads(ended.out), Report.load(runs / name / PLACE)
        assert found["settings"]["provenance"]["model"]["name"] == f"hf://alice/{name}@{commit}"
        assert found["settings"]["provenance"]["config"]["model"]["name"] == f"hf://alice/{name}@{commit}"
        assert found["settings"]["model"]["sha256"] == here.settings["model"]["sha256"]
        assert np.array_equal(Report.load(f"evaluations/alice-{name}-lp-{N}").correct, here.correct)
        again = rome("evaluate", "--model", f"hf://alice/{name}", "--data", "digits", "--suite", "{kind: lp, steps: 1}",
                     "--n", N, "--batch-size", N, "--out", "again")  # fmt: skip
        assert again.code == 0, again.err
        assert np.array_equal(Report.load("again").correct, here.correct)
        shutil.rmtree("again")
    for one in gather([Path(f"evaluations/alice-{name}-lp-{N}") for name in ("mixed", "plain")]):  # rome report
        assert torch.equal(one.subject(torch.device("cpu")).model(x), load_model(one.name)(x))


def test_a_downloaded_repository_is_a_runs_folder(runs: Path, hub: StandIn, rome: Any) -> None:
    push(runs / "plain", "alice/net")
    folder = unpack(hub.repositories["alice/net"].files, Path("got"))
    (one,) = gather([folder])
    assert np.array_equal(one.report.correct, Report.load(runs / "plain" / PLACE).correct)
    assert "this is the result of" in rome("evaluate", folder).err, "nothing has to be attacked again"


def test_timm_loads_a_plain_model_with_the_same_logits(runs: Path, hub: StandIn, x: torch.Tensor) -> None:
    push(runs / "plain", "alice/net")
    model = timm.create_model("hf-hub:alice/net", pretrained=True).eval()
    config = timm.data.resolve_model_data_config(model)
    assert [list(config[name]) for name in ("mean", "std", "input_size")] == [[0.25], [0.75], [1, 8, 8]]
    mean, std = (torch.tensor(config[name]).view(-1, 1, 1) for name in ("mean", "std"))
    assert torch.equal(model((x - mean) / std), load_model(runs / "plain")(x))
    assert "license" not in model.pretrained_cfg or not model.pretrained_cfg["license"], "not that of other weights"


def test_a_later_push_takes_away_what_an_earlier_one_left_and_no_more(runs: Path, hub: StandIn) -> None:
    push(runs / "plain", "alice/net")
    repo = hub.repositories["alice/net"]
    repo.commit("main", repo.files | {"notes.md": b"mine", "evaluation/lp-5/result.json": b"{}"})
    push(runs / "mixed", "alice/net")
    assert set(repo.files) == BOTH | {"notes.md", ".gitattributes"}
    before = repo.branches["main"]
    push(runs / "plain", "alice/net", revision="plain")
    assert repo.branches["main"] == before
    assert "config.json" in repo.commits[repo.branches["plain"]]


def test_nothing_is_published_by_accident(runs: Path, hub: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    push(runs / "plain", "alice/open", public=True)
    assert not hub.repositories["alice/open"].private
    before = dict(hub.repositories["alice/open"].branches)
    with pytest.raises(UserError, match="alice/open is public, and nothing is published without --public"):
        push(runs / "plain", "alice/open")
    assert hub.repositories["alice/open"].branches == before
    push(runs / "plain", "alice/closed")
    push(runs / "plain", "alice/closed", public=True)
    assert hub.repositories["alice/closed"].private
    assert "is private and stays private" in capsys.readouterr().err


def test_each_refusal_is_one_line_and_sends_nothing(
    runs: Path, hub: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(runs / "plain", "alice/tagged", tag="v1")
    stale = shutil.copytree(runs / "plain", tmp_path / "stale")
    (stale / "model.safetensors").write_bytes((runs / "mixed" / "model.safetensors").read_bytes())
    bare = shutil.copytree(runs / "plain", tmp_path / "bare")
    shutil.rmtree(bare / "evaluation")
    routed = shutil.copytree(runs / "mixed", tmp_path / "routed")
    shutil.rmtree(routed / "evaluation")
    evaluate_saved(str(routed), routing="none")
    unfinished = shutil.copytree(runs / "plain", tmp_path / "unfinished")
    (unfinished / "model.safetensors").unlink()
    wrong: dict[str, tuple[Path, str, dict[str, Any]]] = {
        "give USER/NAME": (runs / "plain", "net", {}),
        "give a branch with --revision": (runs / "plain", "alice/net@v2", {}),
        "is a folder with neither run nor config": (tmp_path, "alice/net", {}),
        "is not an empty folder": (runs / "plain", "alice/net", {"dry_run": stale}),
        "is of other weights": (stale, "alice/net", {}),
        "has no evaluation, and": (bare, "alice/net", {}),
        "has no evaluation with its own gates": (routed, "alice/net", {}),
        "holds no finished model": (unfinished, "alice/net", {}),
        "already has a tag v1": (runs / "plain", "alice/tagged", {"tag": "v1"}),
        "the token has no permission": (runs / "plain", "bob/net", {}),
    }
    for said, (run, repo, options) in wrong.items():
        with case(said), pytest.raises(UserError, match=said) as error:
            push(run, repo, **options)
        assert "\n" not in str(error.value)
    assert list(hub.repositories) == ["alice/tagged"]
    assert len(hub.repositories["alice/tagged"].commits) == 2, "an empty one, and the first push"
    monkeypatch.setenv("HF_TOKEN", READER)
    with pytest.raises(UserError, match="the token has no permission"):
        push(runs / "plain", "alice/net")
    monkeypatch.delenv("HF_TOKEN")
    calls = len(hub.calls)
    with pytest.raises(UserError, match="there is no token for the Hub"):
        push(runs / "plain", "alice/net")
    with pytest.raises(UserError, match="is a folder with neither run nor config"):  # said first
        push(tmp_path, "alice/net")
    assert len(hub.calls) == calls


def test_an_evaluation_of_a_pushed_model_needs_its_data_and_classes(runs: Path, hub: StandIn, tmp_path: Path) -> None:
    for split in ("train", "test"):
        images = [{"bytes": _png(i)} for i in range(N)]
        pq.write_table(
            pa.table({"image": images, "label": [i % 10 for i in range(N)]}), tmp_path / f"{split}-0.parquet"
        )
    push(run_of(tmp_path / "net", data={"kind": "parquet", "path": str(tmp_path)}, threats="digits"), "alice/net")
    with pytest.raises(UserError, match=r"on this machine is unknown: rome evaluate hf://alice/net --data PATH"):
        evaluate_saved("hf://alice/net")
    report, _ = evaluate_saved("hf://alice/net", data=str(tmp_path))
    assert np.array_equal(report.correct, Report.load(tmp_path / "net" / PLACE).correct)
    other = tmp_path / "other"
    other.mkdir()
    pq.write_table(pa.table({"image": [{"bytes": _png(1)}] * 4, "label": [0, 1, 2, 3]}), other / "test-0.parquet")
    with pytest.raises(UserError, match="has other classes than hf://alice/net was trained on"):
        evaluate_saved("hf://alice/net", data=str(other))
    push(runs / "plain", "alice/plain")
    with pytest.raises(UserError, match="has no path; leave --data out"):
        evaluate_saved("hf://alice/plain", data="somewhere")


def test_a_model_of_ones_own_code_is_shared_without_it(tmp_path: Path) -> None:
    with trusting(True):
        run = run_of(tmp_path / "net", model=EXACT["model"], experts=None)
    with pytest.raises(UserError, match="would run code"):
        push(run, "alice/net", dry_run=tmp_path / "out")
    push(run, "alice/net", dry_run=tmp_path / "out", trust_code=True)
    assert Run(tmp_path / "out").config.model.name == "exact_model.py:build"
    assert set(sent(tmp_path / "out")) == BOTH
    card = (tmp_path / "out" / "README.md").read_text()
    assert "The model is built by code that is not in this repository: `exact_model.py:build`" in card
    assert 'rome.load_model("hf://alice/net", module)' in card


def test_python_has_it_too(runs: Path, tmp_path: Path) -> None:
    assert rome.push(runs / "plain", "alice/net", dry_run=tmp_path / "out") == str(tmp_path / "out")


def test_a_training_keeps_the_commit_it_started_from(runs: Path, hub: StandIn, tmp_path: Path) -> None:
    push(runs / "plain", "alice/net")
    config = tiny(experts=None, epochs=1, data__train_limit=12, model__weights="hf://alice/net")
    pinned = f"hf://alice/net@{hub.repositories['alice/net'].branches['main']}"
    assert rome.train(config, tmp_path / "next").config.model.weights == pinned


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("resnet18", {"img_size": None, "patch_size": None, "args": {}}),
        ("convnext_atto", {"img_size": None, "patch_size": None, "args": {"depths": [1, 1, 1, 1]}}),
        (
            "swin_tiny_patch4_window7_224",
            {"img_size": 32, "patch_size": 2, "args": {"window_size": 4, "embed_dim": 24}},
        ),
        ("xcit_nano_12_p16_224", {"img_size": None, "patch_size": None, "args": {"depth": 2}}),
        (
            "vit_tiny_patch16_224.augreg_in21k",
            {"img_size": 32, "patch_size": 8, "args": {"depth": 1, "global_pool": "avg"}},
        ),
    ],
)
def test_timm_loads_every_family(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """From the folder that a dry run writes, as from a repository: colour images of 32 pixels out of a table."""
    for split in ("train", "test"):
        images = [{"bytes": _png(i, 32)} for i in range(N)]
        pq.write_table(
            pa.table({"image": images, "label": [i % 10 for i in range(N)]}), tmp_path / f"{split}-0.parquet"
        )
    data = {"kind": "parquet", "path": str(tmp_path)}
    run = run_of(tmp_path / "net", experts=None, data=data, threats="cifar10", model={"name": name, **settings})
    push(run, "alice/net", dry_run=tmp_path / "out")
    theirs, ours = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval(), load_model(run)
    config = timm.data.resolve_model_data_config(theirs)
    mean, std = (torch.tensor(config[key]).view(-1, 1, 1) for key in ("mean", "std"))
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(theirs((images - mean) / std), ours(images), rtol=0, atol=0)


@pytest.mark.slow
def test_the_commands_in_processes_of_their_own_obey_the_clients_variables(
    runs: Path, hub: StandIn, tmp_path: Path
) -> None:
    variables = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}

    def command(*words: object, **more: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, **variables, **more}
        return subprocess.run(
            [sys.executable, "-m", "rome.cli", *map(str, words)], env=env, text=True, capture_output=True, check=False
        )

    pushed = command("push", runs / "mixed", "alice/net", HF_TOKEN=TOKEN)
    assert pushed.returncode == 0, pushed.stderr
    commit = hub.repositories["alice/net"].branches["main"]
    assert f"{hub.url}/alice/net/commit/{commit}" in pushed.stderr
    refused = command("evaluate", "hf://alice/net", HF_TOKEN=TOKEN, HF_HUB_OFFLINE="1")
    assert (refused.returncode, len(refused.stderr.splitlines())) == (2, 1), refused.stderr
    assert f"not in the cache ({tmp_path / 'home' / 'hub'}), and HF_HUB_OFFLINE is set" in refused.stderr
    evaluated = command("evaluate", "hf://alice/net", "--json", HF_TOKEN=TOKEN)
    assert evaluated.returncode == 0, evaluated.stderr
    calls = len(hub.calls)
    again = command("evaluate", f"hf://alice/net@{commit}", "--json", HF_HUB_OFFLINE="1")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["robust"] == json.loads(evaluated.stdout)["robust"]
    assert len(hub.calls) == calls
