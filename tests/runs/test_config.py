"""A YAML file and overrides become one validated config; every mistake is told at once, with its place."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import rome
from helpers.problems import case
from helpers.tiny_runs import TINY, tiny
from rome.attacks import APGD, PGD, Attack
from rome.core.errors import UserError
from rome.core.files import flatten
from rome.methods import Average, Random
from rome.models import ModelSettings
from rome.runs.config import Config, load, parse
from rome.runs.experiments import files
from rome.runs.optim import AdamW
from rome.threats import CIFAR10, DIGITS, IMAGENET, LpBall

BASE = """\
data: {kind: digits}
model:
  name: vit_tiny_patch16_224
  args: {depth: 3, num_heads: 4}
attack: {kind: pgd, steps: {L1: 5, L2: 6, Linf: 7}, step_size: 8/255}
experts: {kind: low-rank, experts: 3}
optimizer: {kind: adamw, lr: 2e-3}
batch_size: 32
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "base.yaml").write_text(BASE)
    return tmp_path


def child(folder: Path, text: str, name: str = "child.yaml") -> Path:
    file = folder / name
    file.write_text(text)
    return file


def merged(folder: Path, text: str, *overrides: str) -> Config:
    return load(child(folder, f"extends: base.yaml\n{text}"), overrides)


def refused(file: Path, *overrides: str) -> list[str]:
    """The lines of the message."""
    with pytest.raises(UserError) as error:
        load(file, overrides)
    return str(error.value).splitlines()


# One parent


def test_without_changes_a_child_is_its_parent_but_for_the_name(folder: Path) -> None:
    child, parent = merged(folder, ""), load(folder / "base.yaml")
    assert child.model_copy(update={"name": "base"}) == parent
    assert (child.name, parent.name) == ("child", "base")


def test_a_name_in_the_file_wins_and_an_empty_one_does_not(folder: Path) -> None:
    assert merged(folder, "name: mine").name == "mine"
    assert merged(folder, "name: ''").name == "child"


def test_mappings_merge_at_every_depth(folder: Path) -> None:
    config = merged(folder, "model: {args: {depth: 9}}\nattack: {random_start: false, steps: {L2: 1}}")
    assert config.model.name == "vit_tiny_patch16_224"
    assert config.model.args == {"depth": 9, "num_heads": 4}
    assert config.attack == PGD(steps={"L1": 5, "L2": 1, "Linf": 7}, step_size=8 / 255, random_start=False)


def test_another_model_takes_no_arguments_of_its_parents(folder: Path) -> None:
    parent = load(folder / "base.yaml").model
    other = merged(folder, "model: {name: resnet_18}").model
    assert parent.args
    assert (other.name, other.args, other.img_size) == ("resnet_18", {}, parent.img_size)
    assert load(folder / "base.yaml", ["model.name=my.py:net", "model.args.width=3"]).model.args == {"width": 3}


def test_another_kind_replaces_the_whole_mapping(folder: Path) -> None:
    assert merged(folder, "attack: {kind: apgd}").attack == APGD()
    assert merged(folder, "attack: {kind: pgd}").attack == load(folder / "base.yaml").attack
    assert merged(folder, "attack: apgd").attack == APGD()


def test_lists_and_values_replace(folder: Path) -> None:
    child(folder, "extends: base.yaml\nthreats: [{norm: L2, eps: 1}, {norm: L1, eps: 3}]", "middle.yaml")
    config = load(child(folder, "extends: middle.yaml\nthreats: [{norm: Linf, eps: 1/4}]"))
    assert config.threats == (LpBall(norm="Linf", eps=0.25),)


def test_null_removes(folder: Path) -> None:
    assert load(folder / "base.yaml").experts is not None
    assert merged(folder, "experts: null").experts is None
    assert merged(folder, "", "experts=null").experts is None
    assert merged(folder, "attack: {step_size: null}").attack.step_size is None  # type: ignore[attr-defined]


def test_parents_form_a_chain_and_the_nearest_wins(folder: Path) -> None:
    (folder / "sub").mkdir()
    child(folder, "extends: base.yaml\nseed: 1\nepochs: 7\nattack: {steps: 1}", "middle.yaml")
    config = load(child(folder / "sub", "extends: ../middle.yaml\nseed: 2"))
    assert (config.seed, config.epochs, config.batch_size) == (2, 7, 32)
    assert config.attack == PGD(steps=1, step_size=8 / 255)


def test_files_that_extend_each_other_are_refused(folder: Path) -> None:
    child(folder, "extends: b.yaml", "a.yaml")
    child(folder, "extends: a.yaml", "b.yaml")
    (line,) = refused(folder / "a.yaml")
    assert line.endswith("a.yaml extends itself: a.yaml -> b.yaml -> a.yaml")


def test_a_missing_parent_answers_with_the_nearest_file(folder: Path) -> None:
    (line,) = refused(child(folder, "extends: bass.yaml"))
    assert "there is no config" in line
    assert f"Did you mean '{folder / 'base.yaml'}'?" in line


def test_a_parent_is_one_file(folder: Path) -> None:
    for parent in ["[base.yaml]", "5", "{a: b}"]:
        with case(parent):
            (line,) = refused(child(folder, f"\nextends: {parent}"))
            assert line.startswith(f"{folder / 'child.yaml'}:2: extends: name one parent file")


# Overrides and short forms


def test_overrides_come_last_and_in_order(folder: Path) -> None:
    config = merged(folder, "epochs: 3", "epochs=4", "epochs=5", "model.args.depth=6", "attack.steps=2", "about=a b=c")
    assert (config.epochs, config.model.args["depth"], config.about) == (5, 6, "a b=c")
    assert config.attack == PGD(steps=2, step_size=8 / 255)


def test_overrides_are_yaml(folder: Path) -> None:
    config = merged(folder, "", "threats=[{norm: inf, eps: 1/8}]", "compile=true", "optimizer.lr=1/2", "seed=0x10")
    assert config.threats == (LpBall(norm="Linf", eps=0.125),)
    assert (config.compile, config.optimizer.lr, config.seed) == (True, 0.5, 16)


def test_an_override_of_the_kind_replaces_then_merges(folder: Path) -> None:
    assert merged(folder, "", "attack.kind=apgd", "attack.steps=3").attack == APGD(steps=3)
    assert merged(folder, "", "attack=apgd", "attack.steps=3").attack == APGD(steps=3)


def test_overrides_of_a_kind_and_its_settings_stand_in_any_order(folder: Path) -> None:
    """``attack=pgd`` stands for a mapping of its own; ``attack.kind=pgd`` changes nothing where the file says so."""
    for overrides, expected in [
        (["attack.steps=3", "attack.kind=apgd"], APGD(steps=3)),
        (["attack.steps=3", "attack=apgd"], APGD(steps=3)),
        (["attack.kind=apgd", "attack.steps=3"], APGD(steps=3)),
        (["attack.steps=3", "attack=apgd", "attack=pgd"], PGD(steps=3)),
        (["attack=pgd", "attack.steps=3"], PGD(steps=3)),
        (["attack.steps=3", "attack.kind=pgd"], PGD(steps=3, step_size=8 / 255)),
    ]:
        with case(overrides, expected):
            assert merged(folder, "", *overrides).attack == expected


def test_arguments_and_name_of_a_model_stand_in_any_order(folder: Path) -> None:
    pair = ["model.args.depth=6", "model.name=vit_small_patch16_224"]
    one, other = (merged(folder, "", *overrides).model for overrides in (pair, pair[::-1]))
    assert one == other
    assert one.args == {"depth": 6}


def test_no_threats_at_all_are_refused_and_not_replaced(folder: Path) -> None:
    (line,) = refused(child(folder, "extends: base.yaml\nthreats: []"))
    assert "threats:" in line


def test_an_override_is_key_and_value(folder: Path) -> None:
    for text in ["epochs", "=5", ".epochs=5", "attack..steps=5", "attack.=5", ""]:
        with case(text):
            (line,) = refused(folder / "base.yaml", text)
            assert line.startswith(f"override {text!r}: write key=value")


def test_an_override_that_is_no_yaml_is_refused(folder: Path) -> None:
    for value in ["[1", "{a: b", "2024-13-45", "!!int five", "'"]:
        with case(value):
            (line,) = refused(folder / "base.yaml", f"about={value}")
            assert "is not a valid value (" in line


def test_a_comment_in_an_override_is_refused_and_not_lost(folder: Path) -> None:
    for value in ["runs/a #1", "#1", "[a] # b", "'a' #b"]:
        with case(value):
            (line,) = refused(folder / "base.yaml", f"about={value}")
            assert "would be a comment; quote the value" in line
            assert load(folder / "base.yaml", ['about="runs/a #1"']).about == "runs/a #1"
            assert load(folder / "base.yaml", ["about=a#1"]).about == "a#1"


def test_true_and_false_are_no_numbers_and_no_names(folder: Path) -> None:
    for value in ["yes", "no", "true", "Off"]:
        for key in ["epochs", "seed", "optimizer.lr", "name", "evaluation.batch_size"]:
            with case(value, key):
                (line,) = refused(folder / "base.yaml", f"{key}={value}")
                assert f"{key}: cannot be true or false" in line


def test_true_and_false_are_no_numbers_in_lists_and_in_python() -> None:
    with pytest.raises(UserError, match="betas: cannot be true or false"):
        AdamW(betas=(True, 0.9))  # type: ignore[arg-type]
    assert PGD(random_start=False).random_start is False


def test_numbers_that_versions_of_yaml_read_differently_are_refused(folder: Path) -> None:
    for text, number in [("010", "8"), ("1:30", "90"), ("-0_7", "-7"), ("1:30.5", "90.5")]:
        with case(text, number):
            for lines in (
                refused(folder / "base.yaml", f"seed={text}"),
                refused(child(folder, f"extends: base.yaml\nseed: {text}")),
            ):
                assert f"{text} is {number} in this version of YAML" in lines[0]
            assert load(folder / "base.yaml", [f"about='{text}'", "seed=0", "optimizer.lr=0.5"]).about == text


def test_seeds_are_those_that_generators_take(folder: Path) -> None:
    assert load(folder / "base.yaml", [f"seed={2**63 - 1}"]).seed == 2**63 - 1
    for key in ("seed", "evaluation.seed"):
        for value in (-1, 2**63):
            assert f"{key}: input should be" in refused(folder / "base.yaml", f"{key}={value}")[0]


def test_a_mistake_in_an_override_is_told_as_such(folder: Path) -> None:
    lines = refused(folder / "base.yaml", "attack.stepz=5", "epochs=0")
    key, epochs = sorted(lines)
    assert key.startswith("override 'attack.stepz=5': attack.stepz: unknown key. Did you mean 'steps'?")
    assert epochs == "override 'epochs=0': epochs: input should be greater than or equal to 1, not 0"


def test_a_name_is_short_for_a_kind(folder: Path) -> None:
    config = merged(folder, "attack: apgd\nmethod: avg\nevaluation: {suite: autoattack}\noptimizer: sgd")
    assert (config.attack, config.method) == (APGD(), Average())
    assert (config.evaluation.suite.kind, config.optimizer.kind) == ("autoattack", "sgd")


def test_budgets_have_names_and_the_data_has_its_own() -> None:
    for threats, expected in [("cifar10", CIFAR10), ("imagenet", IMAGENET), ("digits", DIGITS), (None, DIGITS)]:
        with case(threats, expected):
            assert parse({**TINY, "threats": threats}).threats == tuple(expected)


def test_the_budgets_follow_the_kind_of_data() -> None:
    for data, expected in [
        ("cifar10", CIFAR10),
        ({"kind": "cifar10"}, CIFAR10),
        ({"kind": "folder", "path": "x"}, IMAGENET),
    ]:
        with case(data, expected):
            assert parse({**TINY, "data": data}).threats == tuple(expected)


# Mistakes


def test_all_mistakes_are_told_at_once_with_file_line_and_nearest_name(folder: Path) -> None:
    file = child(
        folder,
        """\
extends: base.yaml
epoch: 3
batch_size: many
attack:
  stepz: 4
  percentile: 101
method: randm
model: {name: 3, args: {depth: 1}}
threats:
  - {norm: L2, eps: 1/0}
  - {norm: L7, eps: 1}
optimizer: {lr: -1}
precision: fp8
""",
    )
    at = {
        message.split(": ")[1]: (message.split(": ")[0], message.split(": ", 2)[2])
        for message in refused(file, "seed=x")
    }
    places = {key: place.rpartition(":")[2] for key, (place, _) in at.items() if place.startswith(str(file))}
    assert places == {
        "epoch": "2",
        "batch_size": "3",
        "attack.stepz": "5",
        "attack.percentile": "6",
        "method": "7",
        "model.name": "8",
        "threats.0.eps": "10",
        "threats.1.norm": "11",
        "optimizer.lr": "12",
        "precision": "13",
    }
    assert at["seed"][0] == "override 'seed=x'"
    assert at["epoch"][1].startswith("unknown key. Did you mean 'epochs'?")
    assert at["attack.stepz"][1].startswith("unknown key. Did you mean 'steps'?")
    assert at["method"][1].startswith("unknown method kind 'randm'. Did you mean 'random'?")
    assert at["threats.0.eps"][1] == "'1/0' is not a fraction such as 8/255"
    assert at["batch_size"][1].endswith(', not "many"')


def test_a_mistake_in_the_parent_names_the_parent(folder: Path) -> None:
    child(folder, "extends: base.yaml\n\nepochs: -1", "middle.yaml")
    (line,) = refused(child(folder, "extends: middle.yaml\nseed: 1"))
    assert line.startswith(f"{folder / 'middle.yaml'}:3: epochs: ")


def test_any_text_can_be_an_unknown_key(folder: Path) -> None:
    for key in ["batch-size", "Batch size", "int", "", "a.b", "1"]:
        with case(key):
            (line,) = refused(child(folder, f'extends: base.yaml\n"{key}": 1'))
            assert line.startswith(f"{folder / 'child.yaml'}:2: {key}: unknown key.")


def test_keys_that_are_missing_are_named(tmp_path: Path) -> None:
    lines = refused(child(tmp_path, "epochs: 1"))
    assert [line.rpartition(".yaml:1: ")[2] for line in lines] == ["data: is missing", "model: is missing"]


def test_a_key_given_twice_is_refused_with_its_line(tmp_path: Path) -> None:
    for text, key, line in [
        ("epochs: 1\nseed: 2\nepochs: 3\n", "epochs", 3),
        ("attack:\n  kind: pgd\n  steps: 1\n  kind: apgd\n", "kind", 4),
        ("threats:\n- norm: L2\n  norm: L1\n", "norm", 3),
    ]:
        with case(text, key, line):
            file = child(tmp_path, text)
            assert refused(file) == [f"{file}:{line}: {key!r} is given twice; keep one"]


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"epochs: [1\nseed: 2", 2),
        (b"epochs: 1\n  seed: 2", 2),
        (b"about: \xff\xfe", None),
        (b"about: !!int five", None),
        (b"a: 1\nabout: !!python/name:os.system ''", 2),
        (b"about: 2024-13-45", None),
        (b"about: *nobody", 1),
        (b"about: a\x00b", None),
    ],
)
def test_what_is_no_yaml_is_refused(content: bytes, line: int | None, tmp_path: Path) -> None:
    file = tmp_path / "broken.yaml"
    file.write_bytes(content)
    (message, *_) = refused(file)
    assert message.startswith(f"{file}:{line}: not valid YAML" if line else f"{file}: not valid YAML")


def test_a_config_is_a_mapping(tmp_path: Path) -> None:
    for text in ["", "# nothing", "- a\n- b", "just words", "5"]:
        with case(text):
            file = child(tmp_path, text)
            assert refused(file) == [f"{file}: a config must be a mapping of keys to values"]


def test_a_missing_config_answers_with_the_nearest_file(folder: Path) -> None:
    (line,) = refused(folder / "basse.yaml")
    assert line.startswith(f"there is no config {folder / 'basse.yaml'}. Did you mean '{folder / 'base.yaml'}'?")
    (line,) = refused(folder / "nowhere" / "base.yaml")
    assert line == f"there is no config {folder / 'nowhere' / 'base.yaml'}."
    (line,) = refused(folder)
    assert line == f"a config is a YAML file; {folder} is a folder with the configs base.yaml"


# What must fit together


def test_settings_that_contradict_each_other_are_all_told(folder: Path) -> None:
    for overrides, messages in [
        (["batch_size=10", "accumulate=3"], ["accumulate: 3 does not divide batch_size 10"]),
        (["epochs=4", "natural_epochs=5"], ["natural_epochs: 5 exceeds epochs 4"]),
        (["threats=[{norm: L2, eps: 1}, {norm: L2, eps: 1}]"], ["threats: L2-1, L2-1 are not distinct"]),
        (["epochs=2", "natural_epochs=5", "accumulate=7"], ["accumulate: 7 does not", "natural_epochs: 5 exceeds"]),
    ]:
        with case(overrides, messages):
            lines = refused(folder / "base.yaml", *overrides)
            assert len(lines) == len(messages)
            for line, message in zip(lines, messages, strict=True):
                assert line.startswith("override ")
                assert message in line


def test_data_without_budgets_of_its_own_needs_threats() -> None:
    class Nothing(rome.data.Digits):
        kind = "nothing"

    with pytest.raises(UserError, match="threats: is missing; data kind 'nothing' has no default budgets"):
        parse({**TINY, "data": {"kind": "nothing"}})
    assert parse({**TINY, "data": {"kind": "nothing"}, "threats": "digits"}).threats == tuple(DIGITS)


# Imports


def test_imports_register_what_a_module_defines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    (tmp_path / "my_attack_for_a_test.py").write_text(
        "from rome.attacks import PGD\n\n\nclass Weak(PGD):\n    kind = 'weak'\n    softness: float = 0.5\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    text = "attack: {kind: weak, steps: 2, softness: 0.1}\n"
    (line,) = refused(child(folder, f"extends: base.yaml\n{text}"))
    assert "unknown attack kind 'weak'" in line
    config = merged(folder, text + "imports: [my_attack_for_a_test]")
    assert isinstance(config.attack, PGD)
    assert config.attack.kind == "weak"
    assert config.attack.dump()["softness"] == 0.1
    assert "weak" in Attack.members()
    assert parse(config.dump()) == config
    del sys.modules["my_attack_for_a_test"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "broken_import_of_a_test cannot be imported: ModuleNotFoundError"),
        ("def (", "broken_import_of_a_test cannot be imported: SyntaxError"),
        ("1 / 0", "broken_import_of_a_test cannot be imported: ZeroDivisionError: division by zero"),
    ],
)
def test_a_module_that_cannot_be_imported_is_named(
    content: str | None, message: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if content is not None:
        (folder / "broken_import_of_a_test.py").write_text(content)
    monkeypatch.syspath_prepend(folder)
    (line,) = refused(child(folder, "extends: base.yaml\nimports: [broken_import_of_a_test]"))
    assert line.startswith(f"{folder / 'child.yaml'}:2: imports: {message}")


def test_imports_are_a_list_of_names(folder: Path) -> None:
    for value in ["os", "5", "{a: b}", "[3]"]:
        with case(value):
            (line, *_) = refused(child(folder, f"extends: base.yaml\nimports: {value}"))
            assert line.startswith(f"{folder / 'child.yaml'}:2: imports")


# Round trips


def test_every_experiment_reads_back_from_its_dump() -> None:
    for file in files():
        config = load(file)
        again = parse(json.loads(json.dumps(config.dump())))
        assert again == config, file
        assert again.dump() == config.dump(), file


shares = st.floats(0, 1, exclude_min=True, exclude_max=True)
finite = st.floats(allow_nan=False, allow_infinity=False)
norms = st.sampled_from(["L1", "L2", "Linf"])
further = st.text().filter(lambda key: key not in ModelSettings.model_fields)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**40),
    epochs=st.integers(2, 10**6),
    about=st.text(),
    lr=st.floats(1e-12, 1e6),
    betas=st.tuples(shares, shares),
    eps=st.floats(0, 1e6),
    steps=st.one_of(st.none(), st.integers(0, 99), st.dictionaries(norms, st.integers(0, 9))),
    args=st.dictionaries(
        st.text().filter(lambda key: key not in ModelSettings.model_fields), st.one_of(st.integers(), finite, st.text())
    ),
    middle=shares,
    layers=st.lists(st.text(min_size=1), min_size=1),
)
def test_any_settings_read_back_from_their_yaml(
    seed: int,
    epochs: int,
    about: str,
    lr: float,
    betas: Any,
    eps: float,
    steps: Any,
    args: Any,
    middle: float,
    layers: Any,
) -> None:
    config = tiny(
        seed=seed,
        epochs=epochs,
        about=about,
        optimizer={"lr": lr, "betas": betas},
        threats=[{"norm": "L2", "eps": eps}],
        attack={"kind": "pgd", "steps": steps},
        model__args=args,
        schedule={"points": [[0, 0], [middle, 1], [1, 0]]},
        experts={"layers": layers},
    )
    assert parse(yaml.safe_load(yaml.safe_dump(config.dump()))) == config


def test_defaults_are_the_papers() -> None:
    config = parse({"data": "cifar10", "model": {"name": "vit_tiny_patch16_224"}})
    assert (config.epochs, config.batch_size, config.optimizer.lr) == (20, 64, 1e-3)
    assert (config.method, config.attack, config.threats) == (Random(), PGD(), tuple(CIFAR10))
    assert config.experts is None


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(Exception, match="frozen"):
        tiny().seed = 3  # type: ignore[misc]


def test_flatten_gives_dotted_keys() -> None:
    assert flatten({"a": {"b": 1, "c": {"d": [2]}}, "e": None, "f": {}}) == {"a.b": 1, "a.c.d.0": 2, "e": None, "f": {}}
