"""The experiments are usable from a wheel: found under their path, and copied with what they extend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers.tiny_runs import write_yaml
from rome.core.errors import UserError
from rome.runs.config import load
from rome.runs.experiments import copy_to, files
from rome.runs.shipped import folder, located

RANDOM = "experiments/digits/random.yaml"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_an_experiment_is_found_from_any_folder_unless_the_user_has_one_of_that_name() -> None:
    assert located(RANDOM) == folder() / "digits" / "random.yaml"
    assert load(RANDOM) == load(folder() / "digits" / "random.yaml")
    Path(RANDOM).parent.mkdir(parents=True)
    write_yaml(Path(RANDOM), {"extends": "experiments/digits/max.yaml", "epochs": 1, "natural_epochs": 0})
    assert located(RANDOM) == Path(RANDOM)
    assert (load(RANDOM).name, load(RANDOM).epochs, load(RANDOM).method.kind) == ("random", 1, "max")
    for other in ("elsewhere/digits/random.yaml", "digits/random.yaml", "experiments/digits/nothing.yaml"):
        assert located(other) == Path(other)


def test_a_path_that_no_experiment_has_is_answered_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"no config experiments/digits/randm\.yaml\. Did you mean 'experiments/"):
        load("experiments/digits/randm.yaml")


@pytest.mark.parametrize("pattern", ["table4", "literal/wrn", RANDOM])
def test_copies_load_as_the_originals_do(pattern: str) -> None:
    copies = copy_to(Path("mine"), [pattern])
    chosen = files(pattern)
    named = {copy for copy in copies if not copy.name.startswith("_")}
    assert {Path("mine") / file.relative_to(folder()) for file in chosen} <= named
    for copy in copies:  # whatever each extends is there too
        parent = yaml.safe_load(copy.read_text()).get("extends")
        assert parent is None or (copy.parent / parent).is_file()
    assert load(Path("mine") / chosen[0].relative_to(folder())) == load(chosen[0])


def test_copying_replaces_nothing_of_the_users(rome: Any) -> None:
    assert rome("init", "mine", "digits/max").code == 0
    mine = Path("mine/digits/max.yaml")
    assert rome("init", "mine", "digits/max").code == 0, "what is the same may be there"
    mine.write_text("epochs: 1\n")
    ended = rome("init", "mine", "digits")
    assert (ended.code, mine.read_text()) == (2, "epochs: 1\n")
    assert ended.err == "error: mine/digits/max.yaml would be replaced; choose another folder or pass --overwrite\n"
    assert not Path("mine/digits/random.yaml").exists(), "all of it or nothing"
    assert rome("init", "mine", "digits/max", "--overwrite").code == 0
    assert mine.read_text() != "epochs: 1\n"
    assert "no experiment matches 'tabel1'" in rome("init", "mine", "tabel1").err
