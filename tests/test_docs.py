"""Every command and snippet of README and docs: the quick tests check that it is valid, the slow ones run it."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from helpers.pages import PAGES, ROOT, blocks, commands, furnish, run_python, run_shell
from rome.cli.app import app
from rome.report.sweep import points
from rome.runs.config import files_and_changes, load

RUNS = {
    "docs/concepts.md": ["RUN"],
    "docs/figures.md": ["RUN"],
    "docs/explore.md": ["runs/rome-random-pgd"],
    "docs/own-models.md": ["runs/rome-random-pgd"],
}
"""Runs that a page takes to be there."""
ALL = ["runs/random-pgd", "runs/rome-random-pgd"]
SWEPT = [f"runs/sweep/rome-experts.rank={rank}" for rank in (2, 4)]
WITH_BLOCKS = [page for page in PAGES if any(block.language in ("sh", "python", "yaml") for block in blocks(page))]


@functools.cache
def group() -> Any:
    """The command line, with all its commands."""
    from rome.cli.app import main

    with pytest.raises(SystemExit):
        main(["--version"])
    return typer.main.get_command(app)


def check(arguments: list[str], files: set[str]) -> None:
    """The command exists, takes these options, and the configs load with these changes."""
    if arguments[0].startswith("--"):
        group().make_context("rome", [*arguments, "list"], resilient_parsing=True)
        return
    name, *rest = arguments
    command = group().commands[name]
    parameters = command.make_context(name, rest).params
    if name == "train" and not parameters["resume"] and "*" not in str(parameters["config"]):
        if not set(parameters["overrides"] or ()) & {f"imports=[{Path(file).stem}]" for file in files}:
            load(parameters["config"], parameters["overrides"] or ())
    elif name in ("sweep", "cost"):
        paths, changes = files_and_changes(parameters["configs"])
        paths = [path for path in paths if "*" not in path]
        points(paths, changes, Path("out")) if name == "sweep" else [load(path, changes) for path in paths]


@pytest.mark.parametrize("page", WITH_BLOCKS)
def test_commands_and_snippets_are_valid(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    files = {block.about for block in blocks(page) if block.mark == "file"}
    for block in blocks(page):
        where = f"{page}:{block.line}"
        assert block.mark in ("", "not run", "fails", "file"), where
        if block.language == "python":
            ast.parse(block.text)
        elif block.language == "yaml":
            settings = {"data": "digits", "model": {"name": "resnet_18"}} | yaml.safe_load(block.text)
            Path("snippet.yaml").write_text(yaml.safe_dump(settings))
            load("snippet.yaml")
        elif block.language == "sh":
            if "rome init" in block.text:  # copies what the next lines use
                monkeypatch.setattr("rome.runs.reading.located", lambda path, beside=Path(): _copied(path, beside))
            for arguments in commands(block, tmp_path):
                try:
                    check(arguments, files)
                except Exception as error:
                    raise AssertionError(f"{where}: rome {' '.join(arguments)}: {error}") from error
            monkeypatch.undo()
            monkeypatch.chdir(tmp_path)


def _copied(path: str | Path, beside: Path) -> Path:
    """Where a copy in ``mine`` was copied from."""
    from rome.runs.shipped import located

    text = str(path)
    return located(f"experiments/{text.removeprefix('mine/')}" if text.startswith("mine/") else path, beside)


def trains(text: str, run: str) -> bool:
    return bool(re.search(rf"train \S*/{Path(run).name}\.yaml", text))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", WITH_BLOCKS)
def test_commands_and_snippets_run(page: str, tmp_path: Path) -> None:
    """Those of a page one after the other in one folder; README is no course, so there each block stands alone."""
    done = ""
    for number, block in enumerate(blocks(page)):
        folder = tmp_path / (str(number) if page == "README.md" else "page")
        if block.mark == "not run" or block.language not in ("sh", "python"):
            continue
        if not folder.exists():
            runs = RUNS.get(page, []) if page != "README.md" else [run for run in ALL if not trains(block.text, run)]
            runs = [*runs, *SWEPT] if page == "README.md" and "runs/sweep/*" in block.text else runs
            furnish(folder, page, runs)
        if block.mark == "file":
            (folder / block.about).write_text(block.text)
        if block.language == "python":
            done += block.text
            ended = run_python(done, folder)
        else:
            ended = run_shell(block, folder)
        said = f"{page}:{block.line}\n{block.text}\n{ended.stdout[-2000:]}{ended.stderr[-3000:]}"
        assert ended.returncode == (2 if block.mark == "fails" else 0), said


def test_the_notebooks_are_programs_with_a_title() -> None:
    found = sorted((ROOT / "docs" / "notebooks").glob("plot_*.py"))
    assert len(found) >= 4
    for file in found:
        title, under, *_ = (ast.get_docstring(ast.parse(file.read_text())) or "").splitlines()
        assert under == "=" * len(title), file
