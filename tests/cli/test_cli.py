"""The command line: results on standard output, words on standard error, an exit code, and never a traceback."""

from __future__ import annotations

import errno
import importlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.problems import case, rest_slow
from helpers.tiny_runs import changed, tiny, watched, write_yaml
from helpers.toy_suites import ToySuite
from rome import cli as rome_cli
from rome.cli.app import main
from rome.core.errors import REQUEUE, Interrupted
from rome.evaluation.run import evaluate_saved
from rome.evaluation.store import Store
from rome.runs.folder import Run
from rome.training.setup import train

COMMANDS = {file.stem for file in Path(rome_cli.__file__).parent.glob("[a-z]*.py")} - {"app", "options"}
"""One file a command."""


@pytest.fixture
def rome(rome: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``rome ARGUMENTS`` in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return rome


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that other tests only read."""
    return train(tiny(name="tiny"), tmp_path_factory.mktemp("cli") / "tiny")


@pytest.fixture(scope="session")
def evaluated(finished: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with its evaluation."""
    folder = tmp_path_factory.mktemp("evaluated") / "tiny"
    shutil.copytree(finished.folder, folder)
    evaluate_saved(folder)
    return folder


@pytest.fixture
def run(finished: Run, tmp_path: Path) -> Run:
    """A copy of it."""
    shutil.copytree(finished.folder, tmp_path / "runs" / "tiny")
    return Run(tmp_path / "runs" / "tiny")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_yaml(tmp_path / "tiny.yaml", changed(epochs=1, data__train_limit=12))


def plain(text: str) -> str:
    """Without colours and boxes, in one line."""
    return " ".join(re.sub(r"\x1b\[[0-9;]*m|[│╭╮╰╯─]", " ", text).split())


# Help and lists


def modules_after(code: str) -> set[str]:
    """What a fresh process has imported after these lines."""
    lines = f"import sys\ntry:\n    {code}\nfinally:\n    print('modules:', *sys.modules)"
    said = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, check=False).stdout
    before, _, names = said.rpartition("modules:")
    assert before, "it answers"
    return set(names.split())


@pytest.mark.parametrize("arguments", [["--help"], ["list", "experiments"]], ids=" ".join)
def test_what_needs_no_torch_does_not_wait_for_it(arguments: list[str]) -> None:
    names = modules_after(f"from rome.cli.app import main; main({arguments})")
    assert "typer" in names
    assert not {"torch", "timm", "numpy"} & names


def test_a_config_is_read_without_what_only_training_needs() -> None:
    """Each of these takes as long as the rest together, or nearly so."""
    file = Path(__file__).parents[2] / "experiments/digits/rome-random.yaml"
    names = modules_after(f"from rome.runs.config import load; print(load({str(file)!r}).name)")
    assert "torch" in names
    assert not {"torch._dynamo", "timm", "torchvision", "scipy", "sklearn", "lightning_fabric", "matplotlib"} & names


def test_every_public_name_can_be_had_from_the_package() -> None:
    package = importlib.import_module("rome")
    assert set(package.__all__) <= set(dir(package))
    assert all(getattr(package, name) is not None for name in package.__all__)
    assert callable(package.train)
    assert callable(package.evaluate)
    with pytest.raises(AttributeError, match="tarin"):
        _ = package.tarin


def test_help_names_every_command(rome: Any) -> None:
    ended = rome("--help")
    assert ended.code == 0
    assert all(command in ended.out for command in COMMANDS)


def test_alone_it_says_what_to_do_first_and_which_version_it_is(rome: Any) -> None:
    alone = rome()
    assert "Start with rome demo" in plain(alone.out + alone.err)
    ended = rome("--version")
    assert (ended.code, ended.out) == (0, f"rome {importlib.import_module('rome').__version__}\n")
    assert "--install-completion" in plain(alone.out + alone.err)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("demo", ["--out", "--overwrite", "RoME+RANDOM"]),
        ("train", ["config", "key=value", "--out", "--resume", "--overwrite", "torchrun"]),
        (
            "evaluate",
            ["target", "--suite", "--n", "--batch-size", "--device", "--json", "autoattack", "--cases", "--checks"],
        ),
        (
            "evaluate",
            [
                "--model",
                "--data",
                "--weights",
                "--budgets",
                "--mean",
                "--std",
                "--num-classes",
                "torchrun",
                "--loggers",
            ],
        ),
        ("evaluate", ["{kind:corruptions,path:CIFAR-10-C}", "hf://user/name@revision"]),  # not taken for markup
        ("report", ["runs", "--out", "report.html", "--union", "--robustbench"]),
        ("cost", ["config", "--no-timing", "--repeats", "--layers", "--json"]),
        ("check", ["config", "key=value", "--json", "missing"]),
        ("schema", ["--out", "--imports"]),
        ("list", ["family", "methods|attacks|models|", "pattern"]),
    ],
)
def test_each_command_explains_itself(command: str, words: list[str], rome: Any) -> None:
    ended = rome(command, "--help")
    assert ended.code == 0
    told = plain(ended.out).replace(" ", "").lower()  # words may be wrapped
    assert all(word.lower() in told for word in words), told


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("methods", ["avg", "max", "random"]),
        ("attacks", ["apgd", "pgd"]),
        ("data", ["cifar10", "digits", "folder"]),
        ("suites", ["all", "apgd", "autoattack", "corruptions", "lp", "unseen"]),
        ("loggers", ["csv", "mlflow", "tensorboard", "trackio", "wandb"]),
        ("experiments", ["digits/rome-random.yaml", "table1/rome-max-apgd.yaml", "clean 82.5"]),
    ],
)
def test_a_family_is_listed_with_a_sentence_each(family: str, names: list[str], rome: Any) -> None:
    ended = rome("list", family)
    assert (ended.code, ended.err) == (0, "")
    assert all(name in plain(ended.out) for name in names)
    if family != "experiments":
        first = [line.split(maxsplit=1) for line in ended.out.splitlines() if not line.startswith(" ")]
        assert set(names) <= {words[0] for words in first}
        assert all(len(words) == 2 for words in first)


def test_models_are_listed_by_pattern(rome: Any) -> None:
    ended = rome("list", "models", "vit_tiny_patch16_*")
    assert ended.code == 0
    assert "vit_tiny_patch16_224" in ended.out
    assert all(line.startswith("vit_tiny_patch16_") for line in ended.out.splitlines())
    assert rome("list", "models", "no-such-*").code == 2
    assert [line.split()[0] for line in rome("list", "suites", "a*").out.splitlines()] == ["all", "apgd", "autoattack"]
    assert rome("list", "suites", "no-such-*").code == 2
    both = rome("list", "models", "*resnet*18*").out
    lines = [line for line in both.splitlines() if not line.startswith(" ")]
    assert lines[0].startswith("preact_resnet_18"), "own models come first"
    assert "own: Pre-activation ResNet-18" in plain(both)
    assert [line.split()[1] for line in lines if line.split()[0] == "resnet18"] == ["timm"]


def test_experiments_are_listed_with_the_papers_numbers(rome: Any) -> None:
    ended = rome("list", "experiments", "table6/ra*")
    assert ended.code == 0
    lines = [line for line in ended.out.splitlines() if line.strip()]
    assert [line.split()[0] for line in lines] == ["experiments/table6/random.yaml"]
    assert "[paper Table 6, RANDOM: parameters_M 85.15, " in lines[0]
    assert rome("list", "experiments", "table7").code == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["list", "experiment"], "family cannot be 'experiment'. Did you mean 'experiments'? Valid: attacks, data,"),
        (["evaluate", "x", "--routing", "invers"], "--routing cannot be 'invers'. Did you mean 'inverse'?"),
        (["trian"], "no such command 'trian'. Did you mean 'train'? (see rome --help)"),
        (["train"], "missing argument 'config' (see rome train --help)"),
        (["evaluate", "x", "--n", "0"], "invalid value for '--n'"),
        (["table", "--formt", "html"], "there is no option --formt. Did you mean '--format'?"),
    ],
)
def test_wrong_usage_is_answered_like_any_other_mistake(arguments: list[str], message: str, rome: Any) -> None:
    ended = rome(*arguments)
    assert (ended.code, ended.out, ended.err.count("\n")) == (2, "", 1)
    assert ended.err.startswith(f"error: {message}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "."], "a directory"),
        (["--imports", "nowhere"], "nowhere cannot be imported: ModuleNotFoundError: No module"),
    ],
)
def test_a_mistake_with_the_schema_is_one_line(arguments: list[str], message: str, rome: Any) -> None:
    ended = rome("schema", *arguments)
    assert (ended.code, ended.out, ended.err.count("\n")) == (2, "", 1)
    assert message in ended.err


def test_alone_it_helps(rome: Any) -> None:
    ended = rome()
    assert (ended.code, ended.err) == (2, "")
    assert "Usage" in ended.out


# Train


def test_train_leaves_standard_output_to_results(config: Path, rome: Any, tmp_path: Path) -> None:
    ended = rome("train", config, "name=mine")
    assert (ended.code, ended.out) == (0, "")
    assert Run(tmp_path / "runs" / "mine").finished
    assert ended.err.splitlines()[-1] == "next: rome evaluate runs/mine"
    assert re.search(r"mine: epoch 1/1  loss \d\.\d+  L1 .*% L2 .*% Linf .*%  \d+ img/s  0 s left", ended.err)
    again = rome("train", config, "name=mine")
    assert again.code == 2
    assert again.err == "error: runs/mine holds a finished run; choose another --out or pass --overwrite\n"
    assert rome("train", config, "name=mine", "--overwrite").code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.yaml"], "there is no config nowhere.yaml"),
        (["."], "a config is a YAML file; . is a folder with the configs orphan.yaml, tiny.yaml"),
        (["tiny.yaml", "epoch=3"], "epoch: unknown key. Did you mean 'epochs'?"),
        (["tiny.yaml", "epochs"], "write key=value"),
        (["tiny.yaml", "lr=3"], "lr: unknown key. Did you mean attack.lr or optimizer.lr?"),
        (["tiny.yaml", "rank=3"], "rank: unknown key. Did you mean experts.rank?"),
        (["tiny.yaml", "seed=0,1"], "several values make a sweep: rome sweep CONFIG seed=0,1"),
        (["tiny.yaml", "natural_epochs=9"], "natural_epochs: 9 exceeds epochs 1; set both: natural_epochs=0"),
        (["tiny.yaml", "method=rome"], "kind of experts, a separate setting: experts=low-rank. Valid: avg, eat"),
        (["tiny.yaml", "attack=random"], "kind of method, a separate setting: method=random. Valid: apgd"),
        (["tiny.yaml", "--epochs", "3"], "there is no option --epochs; write config settings without dashes: epochs=3"),
        (["tiny.yaml", "--batch-size=3"], "write config settings without dashes: batch_size=3"),
        (["tiny.yaml", "--overwrit"], "there is no option --overwrit. Did you mean '--overwrite'?"),
        (["other.safetensors"], "other.safetensors is a file of weights: rome evaluate other.safetensors, or model.we"),
        (["net.py"], "a config is a YAML file; net.py is a Python file: name its function, net.py:net"),
        (["run"], "run is the folder of a run: rome train --resume run, or rome evaluate run"),
        (["orphan.yaml"], "orphan.yaml:1: extends: there is no config absent.yaml."),
        (["tiny.yaml", "model.name=net.py:nte"], "net.py has no function 'nte'. Did you mean 'net'? Valid: net."),
        (["tiny.yaml", "epochs=[1"], "is not a valid value"),
        (["tiny.yaml", "attack.steps=-1"], "attack.steps: input should be greater than or equal to 0"),
        (["tiny.yaml", "attack=fgsm"], "unknown attack kind 'fgsm'"),
        (["tiny.yaml", "experts.layers=[nothing]"], "no Linear or Conv2d layer matches 'nothing'"),
        (["tiny.yaml", "experts.rank=500"], "experts.rank 500 exceeds layer"),
        (["tiny.yaml", "batch_size=13"], "batch_size 13 exceeds the 12 training examples"),
        (["tiny.yaml", "model.name=vit_tiny_patch16_225"], "Did you mean 'vit_tiny_patch16_224'?"),
        (["tiny.yaml", "model.name=nowhere.py:net"], "cannot be imported"),
        (["tiny.yaml", "model.args.dept=3"], "cannot be built"),
        (["tiny.yaml", "model.args.num_heads=0"], "cannot be built"),
        (["tiny.yaml", "model.args.num_heads=3"], "cannot be built"),
        (["tiny.yaml", "model.args.depth=none"], "cannot be built"),
        (["tiny.yaml", "model.args.patch_size=4"], "patch_size is a setting of the model itself"),
        (["tiny.yaml", "model.img_size=9"], "img_size"),
        (["tiny.yaml", "model.weights=nowhere.safetensors"], "there is no model at nowhere.safetensors"),
        (["tiny.yaml", "model.weights=other.safetensors"], "does not fit the model"),
        (["tiny.yaml", "model.weights=tiny.yaml"], "is not a readable safetensors file"),
        (["tiny.yaml", "model.weights=nowhere.pt"], "there is no checkpoint at nowhere.pt"),
        (
            ["tiny.yaml", "model.weights=words.pt"],
            "words.pt cannot be read (it is not a checkpoint of torch.save)",
        ),
        (["tiny.yaml", "model.drop_head=true"], "model.drop_head drops the last layer of model.weights"),
        (["tiny.yaml", "data={kind: cifar10, path: nowhere}"], "nowhere is not a folder"),
        (["tiny.yaml", "data={kind: folder, path: nowhere}"], "nowhere is not a folder"),
        (["tiny.yaml", "imports=[no_such_module]"], "no_such_module cannot be imported"),
        (["tiny.yaml", "--out", "tiny.yaml"], "it is a file"),
        (["tiny.yaml", "--out", "tiny.yaml/run"], "choose another --out"),
        (["tiny.yaml", "--out", "."], "is not empty and holds no run"),
        (["tiny.yaml", "--out", ".", "--overwrite"], "is not empty and holds no run"),
        (["tiny.yaml", "optimizer.lr=1e30", "data.train_limit=36"], "Lower optimizer.lr"),
    ],
)
def test_a_mistake_ends_train_with_2_and_a_reason(
    arguments: list[str], message: str, config: Path, rome: Any, tmp_path: Path
) -> None:
    save_file({"weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    (tmp_path / "words.pt").write_text("words")
    (tmp_path / "net.py").write_text("def net(num_classes): ...")
    (tmp_path / "net.ckpt").write_bytes(b"PK\x03\x04\x80")
    (tmp_path / "orphan.yaml").write_text("extends: absent.yaml")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    before = config.read_bytes()
    ended = rome("train", *arguments)
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith("error: ")
    assert message in ended.err
    assert config.read_bytes() == before


# Evaluate


def test_evaluate_json_is_one_object_and_a_second_call_returns_it(run: Run, rome: Any) -> None:
    ended = rome("evaluate", run.folder, "--json")
    assert ended.code == 0
    assert ended.out.count("\n") == 1
    result = json.loads(ended.out)
    assert result["n"] == 20
    assert set(result["robust"]) == {"L1", "L2", "Linf"}
    assert 0 <= result["union"] <= min(result["robust"].values()) <= max(result["robust"].values()) <= result["clean"]
    assert result["settings"]["provenance"]["checkpoint"] == "model.safetensors"
    folder = run.folder / "evaluation" / "apgd-20"
    files = {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}
    assert {"settings.json", "matrix.npz", "result.json"} <= {file.name for file in files}
    again = rome("evaluate", run.folder, "--json")
    assert {**json.loads(again.out), "reused": {}} == result
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()} == files
    of_file = json.loads(rome("evaluate", run.model_file, "--json").out)
    assert {**of_file, "reused": {}} == result, "the file stands for its run"


@pytest.mark.slow
def test_options_of_evaluate_replace_the_configs(run: Run, rome: Any, tmp_path: Path) -> None:
    ended = rome("evaluate", run.folder, "--n", 6, "--batch-size", 4, "--out", tmp_path / "result", "--json")
    result = json.loads(ended.out)
    assert (result["n"], result["settings"]["n"], result["settings"]["batch_size"]) == (6, 6, 4)
    assert (tmp_path / "result" / "matrix.npz").exists()
    refused = rome("evaluate", run.folder, "--n", 7, "--out", tmp_path / "result")
    assert refused.code == 2, "the folder holds an evaluation of six examples"
    told = rome("evaluate", run.folder, "--n", 7, "--out", tmp_path / "result", "--overwrite", "--json")
    assert json.loads(told.out)["n"] == 7


def test_columns_may_be_run_one_at_a_time(run: Run, rome: Any) -> None:
    first = json.loads(rome("evaluate", run.folder, "--n", 6, "--cases", "L2", "--json").out)
    assert (list(first["robust"]), first["pending"], first["union"]) == (["L2"], ["L1", "Linf"], None)
    table = rome("evaluate", run.folder, "--n", 6, "--cases", "L1")
    assert "not run yet: Linf" in table.out
    whole = json.loads(rome("evaluate", run.folder, "--n", 6, "--json").out)
    assert (whole["pending"], whole["robust"]["L2"]) == ([], first["robust"]["L2"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="TF32 can be used")
def test_a_search_in_tf32_needs_a_gpu(run: Run, rome: Any) -> None:
    refused = rome("evaluate", run.folder, "--n", 6, "--search-precision", "tf32")
    message = "error: search_precision: tf32 needs a CUDA device, and this evaluation is on cpu; use search_precision: "
    assert (refused.code, refused.out, refused.err) == (2, "", f"{message}fp32 (--search-precision fp32)\n")
    assert not (run.folder / "evaluation").exists()


def test_suites_compose_on_the_command_line(run: Run, rome: Any) -> None:
    refused = rome("evaluate", run.folder, "--n", 6, "--suite", "lp,apgd")
    assert refused.code == 2
    assert "suites 'lp' and 'apgd' both have a column 'L1'" in refused.err
    ended = rome("evaluate", run.folder, "--n", 6, "--suite", "lp", "--json", "--batch-size", "auto")
    assert json.loads(ended.out)["settings"]["suite"] == {"kind": "lp", "steps": 20}
    assert "warning (fewer-attacks, Linf): a quick look" in ended.err
    assert (run.folder / "evaluation" / "lp-6" / "result.json").exists()


def test_without_json_there_is_a_table(run: Run, rome: Any) -> None:
    ended = rome("evaluate", run.folder, "--n", 6)
    assert ended.code == 0
    assert all(word in ended.out.lower() for word in ("tiny", "clean", "l1", "l2", "linf", "union"))
    assert str(run.folder / "evaluation" / "apgd-6") in ended.err


def test_a_failed_case_shows_in_the_exit_code_and_costs_no_result(run: Run, rome: Any) -> None:
    assert ToySuite.kind == "toys"
    suite = "{kind: toys, how: [negative, raise]}"
    for _ in range(2):  # the second call tries again
        ended = rome("evaluate", run.folder, "--n", 6, "--suite", suite, "--json")
        result = json.loads(ended.out)
        assert (ended.code, list(result["robust"]), list(result["failed"])) == (1, ["toy-0"], ["toy-1"])
        assert "1 of 2 cases failed: toy-1; the same command tries them again" in ended.err


@pytest.mark.slow
def test_an_unfinished_run_is_evaluated_by_its_checkpoint(rome: Any, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    stop = watched(lambda n: os.kill(os.getpid(), signal.SIGTERM) if n == 7 else None)
    with pytest.raises(Interrupted):
        train(tiny(), run.folder, progress=stop)
    refused = rome("evaluate", run.folder)
    assert refused.code == 2
    assert "the run is not finished: rome train ... --resume" in refused.err
    ended = rome("evaluate", run.checkpoint_file, "--n", 6, "--json")
    assert ended.code == 0
    assert "is from an unfinished run, after 1 epochs" in ended.err
    settings = json.loads(ended.out)["settings"]
    assert settings["provenance"]["checkpoint"] == "last.pt"
    assert "holds no finished model" in rome("report", run.folder).err
    finished = shutil.copytree(run.folder, tmp_path / "finished")
    train(tiny(), finished, resume=True)
    assert "has no evaluation: run `rome evaluate" in rome("report", finished).err, "that of the checkpoint is another"
    assert rome("evaluate", finished, "--n", 6).code == 0
    assert rome("report", finished, "--out", tmp_path / "report").code == 0
    run.checkpoint_file.rename(run.folder / "other.pt")
    assert "there is no model at" in rome("evaluate", run.folder / "other.pt").err


@pytest.mark.slow
def test_what_the_checkpoint_was_started_from_is_not_needed(rome: Any, tmp_path: Path) -> None:
    """The weights to start from may be gone when a checkpoint is evaluated."""
    plain_run = train(tiny(experts=None, epochs=1, data__train_limit=12), tmp_path / "start")
    stop = watched(lambda n: os.kill(os.getpid(), signal.SIGTERM) if n == 1 else None)
    with pytest.raises(Interrupted):
        train(tiny(model__weights=str(plain_run.folder)), tmp_path / "run", progress=stop)
    shutil.rmtree(plain_run.folder)
    assert rome("evaluate", tmp_path / "run" / "last.pt", "--n", 4, "--json").code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "there is no model at nowhere"),
        (["nowhere/model.safetensors"], "there is no model at"),
        (["nowhere/last.pt"], "there is no model at nowhere/last.pt"),
        (["."], "give a finished run's folder or a .safetensors file"),
        (["runs/tiny", "--suite", "pgd"], "apgd, autoattack"),
        (["runs/tiny", "--n", "41"], "--n 41 exceeds the 40 test examples of digits"),
        (["runs/tiny", "--device", "tpu"], "unknown device 'tpu'"),
        (["other.safetensors"], "holds no config"),
        (["runs/tiny/config.yaml"], "runs/tiny/config.yaml is a config: rome train runs/tiny/config.yaml"),
        (["runs/tiny", "--batch-size", "\N{SUPERSCRIPT TWO}"], "give a positive integer, or auto"),
        (["cut.safetensors"], "is not a readable safetensors file"),
    ],
)
def test_a_mistake_ends_evaluate_with_2_and_a_reason(
    arguments: list[str], message: str, run: Run, rome: Any, tmp_path: Path
) -> None:
    save_file({"weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(run.model_file.read_bytes()[:-50])
    ended = rome("evaluate", *arguments)
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith("error: ")
    assert message in ended.err


NAN = """
import torch
from torch import nn


class Rooted(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.head = nn.Linear(64, num_classes)

    def forward(self, x):
        return self.head(x.flatten(1)) + 0 * (0 * x.sum()).sqrt()  # 0 times an infinite gradient


def build(num_classes):
    torch.manual_seed(0)
    return Rooted(num_classes)
"""


def test_where_every_gradient_is_nan_there_is_one_line_and_no_robustness(rome: Any, tmp_path: Path) -> None:
    (tmp_path / "rooted.py").write_text(NAN)
    ended = rome("evaluate", "--model", "rooted.py:build", "--data", "digits", "--n", 20, "--suite", "lp")
    assert (ended.code, ended.out) == (1, "")
    assert "the gradients of the model are not finite" in ended.err.splitlines()[-1]


def test_a_model_whose_logits_are_not_finite_is_refused(run: Run, rome: Any) -> None:
    from rome.models import read_tensors

    metadata, _ = read_tensors(run.folder)
    tensors = load_file(run.model_file)
    tensors["backbone.head.bias"].fill_(float("nan"))
    save_file(tensors, run.model_file, {"rome": json.dumps(metadata)})
    ended = rome("evaluate", run.folder)
    assert ended.code == 2
    assert "finite" in ended.err


# Cost and report


def test_cost_json_is_one_object(config: Path, rome: Any) -> None:
    ended = rome("cost", config, "--json", "--repeats", 1)
    assert ended.code == 0
    facts = json.loads(ended.out)
    assert {"parameters", "trainable", "experts", "macs", "seconds_per_update", "latency_ms"} <= set(facts)
    table = rome("cost", config, "--no-timing")
    assert table.code == 0
    assert "params (M)" in table.out


def test_cost_layers_says_which_layers_get_experts(config: Path, rome: Any) -> None:
    ended = rome("cost", config, "--layers", "--json")
    assert (ended.code, ended.out.count("\n")) == (0, 1)
    facts = json.loads(ended.out)
    assert {row["name"].rpartition(".")[2] for row in facts["layers"]} == {"qkv", "proj"}
    table = rome("cost", config, "--layers", "model.args.depth=3").out
    assert re.search(r"backbone\.blocks\.1\.attn\.qkv +Linear +16 -> 48 +2 +0\.339 +\d", table)
    assert "with experts: 6 of 14 layers, blocks up to 3; " in table
    assert "without experts: 3 x backbone.blocks.*.mlp.fc1 (Linear 16 -> 64)\n" in table
    assert "without experts: backbone.patch_embed.proj (Conv2d 1 -> 16 4x4)\n" in table
    assert "with experts: none" in rome("cost", config, "--layers", "experts=null").out
    assert "no Linear or Conv2d layer matches 'fc9'" in rome("cost", config, "--layers", "experts.layers=[fc9]").err


def test_a_mistake_ends_cost_with_2(config: Path, rome: Any) -> None:
    assert "unknown key" in rome("cost", config, "sede=1").err
    assert rome("cost", config, "--repeats", 0).code == 2
    assert "unknown model" in rome("cost", config, "model.name=vit_tinny").err


def test_a_path_with_an_equals_sign_is_a_path(config: Path, rome: Any) -> None:
    shutil.copy(config, "a=b.yaml")
    assert "with experts: " in rome("cost", "a=b.yaml", "--layers").out
    assert "'seed=x': seed: input should be a valid integer" in rome("sweep", "a=b.yaml", "seed=x").err


@pytest.mark.slow
def test_a_tilde_in_an_option_is_the_home_folder(
    evaluated: Path, rome: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert rome("report", evaluated, "--out=~/mine").code == 0
    assert (tmp_path / "home" / "mine" / "report.md").is_file()
    assert not Path("~").exists()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_what_an_encoding_lacks_costs_no_result(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr("sys.stdout", out)
    with pytest.raises(SystemExit) as ended:
        main(["table", "1"])
    out.seek(0)
    assert ended.value.code == 0
    assert "AVG" in out.read()


@pytest.mark.parametrize("command", [["train", "tiny.yaml"], ["evaluate", "runs/tiny"]])
@pytest.mark.parametrize(
    ("environment", "message"),
    [({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 without RANK, LOCAL_RANK"), ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two")],
)
def test_half_an_environment_of_several_processes_is_refused(
    command: list[str], environment: dict[str, str], message: str, config: Path, rome: Any, monkeypatch: Any
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    ended = rome(*command)
    assert (ended.code, ended.out, ended.err.count("\n")) == (2, "", 1)
    assert message in ended.err


def test_a_shell_of_slurm_is_one_process(config: Path, rome: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"NTASKS": "4", "JOB_NAME": "job", "JOB_ID": "1", "NODELIST": "n1", "PROCID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    for command in (("train", config), ("evaluate", "runs/tiny")):
        ended = rome(*command)
        assert (ended.code, ended.err.count("\n")) == (2, 1)
        assert "this SLURM job has 4 tasks, but this process would work alone: start it with srun" in ended.err
    assert not Path("runs/tiny").exists()
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert rome("train", config).code == 0


# Several runs


@pytest.mark.slow
def test_several_runs_are_evaluated_each_in_a_process_of_its_own(
    run: Run, evaluated: Path, rome: Any, forked: None
) -> None:
    """One of them anew, one from what is there, one that is none."""
    ended = rome("evaluate", run.folder, evaluated, "nowhere", "--n", "20", "--jobs", "2")
    assert ended.code == 2
    names = [line.split()[0] for line in ended.out.splitlines()]
    assert [name for name in names if "/" in name and not name.endswith(":")] == [str(run.folder), str(evaluated)]
    assert (
        "error: 1 of 3 failed; run the same command again to retry\nnowhere: there is no model at nowhere" in ended.err
    )
    single = rome("evaluate", run.folder, "--n", "20", "--json")
    several = rome("evaluate", run.folder, evaluated, "--n", "20", "--json")
    assert [json.loads(line)["union"] for line in several.out.splitlines()] == [json.loads(single.out)["union"]] * 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a", "b", "--out", "x"], "(rome evaluate RUN ...), without --out and --model"),
        (["a", "b", "--model", "resnet_18"], "(rome evaluate RUN ...), without --out and --model"),
        (["--jobs", "2"], "--jobs, --gpus-per-job and --launcher work only for runs (rome evaluate RUN ...)"),
        (["a", "b", "--launcher", "slurm"], "--launcher: unknown launcher kind 'slurm'"),
        (["a", "--jobs", "0"], "--jobs"),
    ],
)
def test_mistakes_with_several_runs(words: list[str], message: str, rome: Any) -> None:
    ended = rome("evaluate", *words)
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert message in ended.err
    assert not Path("evaluations").exists()


# Paths that cannot be written or read

LONG = "n" * 300


@pytest.mark.parametrize("out", rest_slow(["file", LONG, "file/below", f"{LONG}/below", "locked"], 2))
@pytest.mark.parametrize(
    "command",
    [
        ["train", "tiny.yaml"],
        ["evaluate", "runs/tiny"],
        ["sweep", "tiny.yaml", "seed=0"],
        ["report", "RUN"],
        ["figures", "RUN", "--only", "fig1"],
        ["demo"],
    ],
)
def test_an_out_that_cannot_be_written_is_told_before_the_work(
    command: list[str],
    out: str,
    run: Run,
    evaluated: Path,
    config: Path,
    rome: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Path("file").write_text("mine")
    Path("locked").mkdir()

    def nothing_here(**where: Any) -> Any:  # as for a folder without permission, which root would have
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(where["dir"]))

    if out == "locked":
        monkeypatch.setattr("rome.core.files.TemporaryFile", nothing_here)
    for work in (
        "rome.runs.launchers.local.start_process",
        "rome.report.page._Pictures",
        "rome.report.figures.embeddings.embed",
    ):
        monkeypatch.setattr(work, lambda *_, **__: pytest.fail("work was done"))
    before = sorted(Path().rglob("*"))
    ended = rome(*(str(evaluated) if word == "RUN" else word for word in command), "--out", out)
    assert ended.code == 2
    last = ended.err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert out in last
    assert Path("file").read_text() == "mine"
    assert sorted(path for path in Path().rglob("*") if path not in before and path.is_file()) == []


def test_a_damaged_file_of_a_run_ends_train_with_one_line_and_stays(run: Run, rome: Any, tmp_path: Path) -> None:
    run.model_file.unlink()
    config = write_yaml(tmp_path / "tiny.yaml", changed(name="tiny", loggers=["csv"]))
    for name in ("config.yaml", "origin.json", "log.jsonl", "loggers.json", "metrics.csv"):
        with case(name):
            folder = Path(shutil.copytree(run.folder, tmp_path / name))
            (folder / name).write_text("[1, 2]")
            ended = rome("train", config, "--resume", "--out", folder)
            assert (ended.code, ended.out, ended.err.count("\n")) == (2, "", 1)
            assert ended.err.startswith(f"error: {folder / name} is damaged (")
            assert (folder / name).read_text() == "[1, 2]"


def test_a_damaged_file_of_a_logger_costs_no_evaluation(evaluated: Path, rome: Any, tmp_path: Path) -> None:
    file = Path(shutil.copytree(evaluated, tmp_path / "tiny")) / "metrics.csv"
    file.write_text("[1, 2]")
    ended = rome("evaluate", file.parent, "--loggers", "csv")
    assert ended.code == 0
    assert f"{file} is damaged (its first line is not update,name,value)" in ended.err
    assert file.read_text() == "[1, 2]"


@pytest.mark.parametrize("command", ["train", "evaluate", "sweep", "report", "figures", "cost", "table 1", "table 6"])
def test_a_path_that_cannot_be_read_is_one_line(command: str, rome: Any) -> None:
    ended = rome(*command.split(), f"{LONG}.yaml")
    assert (ended.code, ended.out, ended.err.count("\n")) == (2, "", 1)
    assert LONG in ended.err


def test_a_disk_that_fills_up_meanwhile_is_one_line_and_leaves_what_was_there(
    evaluated: Path, rome: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("out").mkdir()
    (Path("out") / "report.md").write_text("before")

    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("rome.core.files.os.fsync", full)
    monkeypatch.setattr("rome.report.page._Pictures.attempt", lambda *_: None)  # pictures take time
    ended = rome("report", evaluated, "--out", "out")
    assert ended.code == 2
    assert ended.err.endswith("error: out/report.csv: No space left on device: make room\n")
    assert [file.name for file in Path("out").iterdir()] == ["report.md"]
    assert (Path("out") / "report.md").read_text() == "before"


@pytest.mark.parametrize("name", rest_slow(["SIGTERM", "SIGUSR1"], 1))
def test_an_evaluation_leaves_at_once_on_a_signal_and_goes_on(
    name: str, run: Run, evaluated: Path, rome: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    number, written, write = getattr(signal, name), list[str](), Store.write
    before = signal.getsignal(number)

    def struck(store: Store, key: str, unit: Any) -> None:
        write(store, key, unit)
        written.append(key)
        if len(written) == 2:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "write", struck)
        ended = rome("evaluate", run.folder)
    assert (ended.code, ended.out) == (REQUEUE, "")
    assert ended.err.splitlines()[-1] == f"stopped by {name}; finished work is kept"
    assert len(written) == 2
    assert signal.getsignal(number) is before
    report = json.loads(rome("evaluate", run.folder, "--json").out)
    whole = json.loads(rome("evaluate", evaluated, "--json").out)
    assert report["reused"]["batches"] == 2
    assert (report["robust"], report["union"]) == (whole["robust"], whole["union"])


@pytest.mark.parametrize("name", ["../../x", "/etc/x", "a/b", "a\\b", "..", "a\0b", "a\nb", "n" * 151])
def test_a_name_leads_out_of_no_folder(name: str, config: Path, rome: Any) -> None:
    for command in (("train",), ("sweep",)):
        ended = rome(*command, config, f"name={json.dumps(name)}")
        assert ended.code == 2
        assert "name: " in ended.err
    assert [file.name for file in Path().iterdir()] == [config.name]


def test_a_report_needs_evaluated_runs(run: Run, rome: Any) -> None:
    for target in ("nowhere", run.folder):
        ended = rome("report", target)
        assert (ended.code, ended.out) == (2, "")
        assert ended.err.startswith("error: ")
