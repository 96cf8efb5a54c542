"""Pages generated from the package when the site is built: experiments, the paper's tables, settings, the API."""

from __future__ import annotations

import functools
import importlib
import inspect
import posixpath
import re
import textwrap
import typing
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from sphinx.pycode import ModuleAnalyzer

import rome
from rome.core.component import Component, Settings
from rome.core.errors import short
from rome.report.tables.paper_rows import TABLES
from rome.report.tables.paper_tables import fill
from rome.report.tables.table_formats import render
from rome.runs.config import Config, load
from rome.runs.experiments import files, path_of

ROOT = Path(__file__).parents[1]
_load = functools.cache(load)
PACKAGES = {
    "data": "Images and labels",
    "threats": "Allowed perturbations",
    "attacks": "Searches inside a threat",
    "attacks.suites": "Attacks of an evaluation",
    "experts": "Experts, gates and their losses",
    "models": "Building, saving and loading models",
    "methods": "Training objectives",
    "runs": "Configs, optimizers, folders",
    "training": "Training",
    "evaluation": "Evaluation",
    "report": "Figures and the explorer",
    "core": "Errors and versions",
}
"""Package -> title of its page."""
ALSO = {
    "runs": [
        "runs.folder.Run",
        "runs.config.Evaluation",
        "runs.config.Validation",
        "runs.optim.AdamW",
        "runs.optim.SGD",
    ],
    "evaluation": [
        *(f"evaluation.{name}" for name in ("evaluate.Report", "run.evaluate_saved", "store.example_images")),
        *(f"evaluation.statistics.{name}" for name in ("wilson", "mcnemar", "holm", "paired_difference")),
    ],
    "report": [
        *("report.page.write_report", "report.subject.Subject", "report.figures.write_figures"),
        *("report.figures.PaperFigure", "report.explore.open_explorers", "report.explore.Explorer"),
    ],
}
"""Names that are on the pages although no package's ``__init__`` exports them."""


MISSING = "\N{EN DASH} / "
"""Text before the paper's number in cells without a number of ours."""
AT_ROOT = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md", "SECURITY.md": "security.md"}
"""Files of the repository's root -> their pages."""


def write(out: Path) -> None:
    """Write all pages to ``out``; unchanged files keep their date, so that they are not built again."""
    pages = {**_experiments(), **_api(), **_root_files(), "settings.rst": _settings()}
    for name, text in pages.items():
        page = out / name
        page.parent.mkdir(parents=True, exist_ok=True)
        if not page.exists() or page.read_text(encoding="utf-8") != text:
            page.write_text(text, encoding="utf-8")
    for page in [*out.glob("experiments/*"), *out.glob("api/*")]:
        if str(page.relative_to(out)) not in pages:
            page.unlink()


def _root_files() -> dict[str, str]:
    """Pages of the files in the repository's root, with their links made relative to the page."""
    return {
        page: (ROOT / file).read_text(encoding="utf-8").replace("](docs/", "](../").replace("](docs)", "](../index.md)")
        for file, page in AT_ROOT.items()
    }


# Experiments and the paper's tables


def _experiments() -> dict[str, str]:
    groups = defaultdict[str, list[Path]](list)
    for file in files():
        groups[path_of(file.parent).removeprefix("experiments/")].append(file)
    pages = {f"experiments/{_slug(name)}.md": _group(name, found) for name, found in groups.items()}
    rows = [f"| [{name}]({_slug(name)}.md) | {len(found)} | {_about(found)} |" for name, found in groups.items()]
    tables = "\n".join(
        f"## Table {number}\n\n{render('', fill(number, []), 'markdown').partition(chr(10))[2].replace(MISSING, '')}\n"
        for number in TABLES
        if number != "6"
    )
    pages["experiments/index.md"] = _page(
        "Experiments",
        "Every row of the paper's tables has a config that comes with the package, and so have versions for a CPU.\n"
        "`rome train experiments/...` finds them from any folder, `rome init` copies them, `rome list experiments`\n"
        "lists them. This page and those below it are generated from the configs.\n\n"
        "| folder | configs | |\n| --- | --- | --- |\n" + "\n".join(rows),
        _tree(f"{_slug(name)}" for name in groups),
    )
    pages["experiments/paper.md"] = _page(
        "The paper's tables",
        "The paper's numbers (percent), from the configs. `rome table 1 RUN...` shows yours beside them; the\n"
        "differences between the paper's text and these configs are [listed](../../decisions/paper-differences.md).\n"
        "Table 6, whose costs are measured without training, is on the page of its [experiments](table6.md).",
        tables,
    )
    return pages


def _group(name: str, found: Iterable[Path]) -> str:
    return _page(f"experiments/{name}", *(_experiment(file) for file in found))


def _experiment(file: Path) -> str:
    config = _load(file)
    parts = [f"## {file.stem}", config.about or "", f"```sh\nrome train {path_of(file)}\n```"]
    if config.paper is not None:
        numbers = config.paper.numbers
        parts.append(f"The paper, {config.paper.table}, row {config.paper.row}:")
        parts += [_numbers(list(numbers.items())[start : start + 8]) for start in range(0, len(numbers), 8)]
    text = file.read_text(encoding="utf-8").strip()
    parts.append(f"The file{_parent(file)}:\n\n```yaml\n{text}\n```")
    whole = yaml.safe_dump(config.dump() | {"paper": None}, sort_keys=False, width=100)
    folded = whole.replace("&", "&amp;").replace("<", "&lt;")
    parts.append(f"<details><summary>All settings</summary><pre>{folded.replace(chr(10) * 2, chr(10))}</pre></details>")
    return "\n\n".join(parts)


def _numbers(some: list[tuple[str, float]]) -> str:
    names, values = zip(*((name, f"{value:g}") for name, value in some), strict=True)
    return f"| {' | '.join(names)} |\n|{' --- |' * len(some)}\n| {' | '.join(values)} |"


def _parent(file: Path) -> str:
    parent = yaml.safe_load(file.read_text(encoding="utf-8")).get("extends")
    if parent is None:
        return ""
    base = (file.parent / parent).resolve()
    if base.name.startswith("_"):
        return f", which extends `{path_of(base)}`"
    page = _slug(path_of(base.parent).removeprefix("experiments/"))
    return f", which extends [{base.stem}]({page}.md#{base.stem.lower()})"


def _about(found: list[Path]) -> str:
    papers = [_load(file).paper for file in found]
    tables = sorted({paper.table for paper in papers if paper is not None})
    return "; ".join(tables) if len(tables) <= 2 else f"{tables[0]} and others"


# Settings


def _settings() -> str:
    importlib.import_module("rome.cli.app")
    whole = "\n\n".join(_config_part(part) for part in _parts(Config))
    families = "\n\n".join(_family(name, base) for name, base in sorted(_families().items()))
    about = "All keys of a config and all kinds of components, with their defaults."
    return f"{_title('Settings', '=')}\n\n{about}\n\n{whole}\n\n{families}\n"


def _families() -> dict[str, type[Component]]:
    for name in PACKAGES:
        importlib.import_module(f"rome.{name}")
    return {family.__name__: family for family in Component.__subclasses__() if family.__module__.startswith("rome.")}


def _parts(top: type[Settings]) -> list[type[Settings]]:
    """A config, and its groups of settings that are not components."""
    parts = [top]
    for field in top.model_fields.values():
        for kind in (field.annotation, *typing.get_args(field.annotation)):
            if inspect.isclass(kind) and issubclass(kind, Settings) and not issubclass(kind, Component):
                parts.append(kind)
    return parts


def _config_part(part: type[Settings]) -> str:
    return f"{_title(part.__name__, '-')}\n\n{inspect.getdoc(part)}\n\n{_table(part)}"


def _family(name: str, base: type[Component]) -> str:
    members = "\n\n".join(
        f"{_title(kind, '~')}\n\n{inspect.getdoc(member)}\n\n{_table(member)}"
        for kind, member in base.members().items()
    )
    return f"{_title(name, '-')}\n\n{inspect.getdoc(base)}\n\n{members}"


def _table(part: type[Settings]) -> str:
    if not part.model_fields:
        return ""
    rows = "\n".join(
        f"   * - ``{name}``\n     - {_default(field)}\n     - {_described(part, name)}"
        for name, field in part.model_fields.items()
    )
    return f".. list-table::\n   :header-rows: 1\n   :widths: 18 22 60\n\n   * - key\n     - default\n     -\n{rows}\n"


def _value(field: Any) -> str:
    value = field.get_default(call_default_factory=True)
    return f"{type(value).__name__}()" if isinstance(value, Settings) else repr(value)


def _default(field: Any) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    value = value.kind if isinstance(value, Component) else "" if isinstance(value, Settings) else value
    return f"``{short(value, 40)}``" if value != "" else ""


def _described(part: type, name: str) -> str:
    for owner in part.__mro__:
        if name in inspect.get_annotations(owner):
            found = ModuleAnalyzer.for_module(owner.__module__).find_attr_docs().get((owner.__qualname__, name))
            return textwrap.indent("\n".join(found or ()), " " * 7).strip()
    return ""


# API


def _api() -> dict[str, str]:
    done, pages = set[int](), {}
    for name, about in PACKAGES.items():
        package = importlib.import_module(f"rome.{name}")
        own = [getattr(rome, each) for each in rome.__all__]
        offered = [
            each for each in own if getattr(each, "__module__", "").startswith(f"rome.{name.partition('.')[0]}.")
        ]
        offered += vars(package).values()
        offered += [_named(path) for path in ALSO.get(name, [])]
        blocks = []
        for value in offered:
            module = getattr(value, "__module__", "")
            if not (inspect.isclass(value) or inspect.isfunction(value)) or not inspect.getdoc(value):
                continue
            if id(value) in done or not module.startswith(f"rome.{name}."):
                continue
            done.add(id(value))
            public = f"rome.{value.__name__}" if value in own else f"{_home(package, value)}.{value.__name__}"
            kind = "class" if inspect.isclass(value) else "function"
            blocks.append(
                f".. auto{kind}:: {public}\n"
                + ("   :members:\n   :exclude-members: model_config\n" if kind == "class" else "")
            )
        title = f"rome.{name}: {about[0].lower()}{about[1:]}"
        pages[f"api/{name}.rst"] = f"{_title(title, '=')}\n\n{_offers(package)}\n\n" + "\n".join(blocks)
    pages["api/index.md"] = _page(
        "Python API",
        "Names that `import rome` offers are listed as `rome.NAME`, all others under their package. Keys of configs\n"
        "have a page of their own: [settings](../settings.rst).",
        _tree(PACKAGES),
    )
    return pages


def _offers(package: Any) -> str:
    """A package's docstring without the paragraph on its allowed imports, which is for contributors."""
    return "\n\n".join(
        part for part in (inspect.getdoc(package) or "").split("\n\n") if not part.startswith(("May ", "Imports "))
    )


def _named(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(f"rome.{module}"), name)


def _home(package: Any, value: Any) -> str:
    return package.__name__ if getattr(package, value.__name__, None) is value else value.__module__


def signature(app: Any, what: str, name: str, value: Any, options: Any, text: str | None, returns: str | None) -> Any:
    """Show settings with their keys and defaults as signature; pydantic's includes validators."""
    if inspect.isclass(value) and issubclass(value, Settings):
        keys = [key if field.is_required() else f"{key}={_value(field)}" for key, field in value.model_fields.items()]
        return f"({', '.join(['*', *keys]) if keys else ''})", None
    return None


# Text


def outside(app: Any, page: str, source: list[str]) -> None:
    """Replace links to files of the repository that are not pages of the site by their text."""
    here = posixpath.dirname(f"docs/{page}")

    def resolved(link: re.Match[str]) -> str:
        target, hash_, anchor = link[2].partition("#")
        path = posixpath.normpath(posixpath.join(here, target))
        if "://" in target or not target or ((ROOT / path).is_file() and path.startswith("docs/")):
            return link[0]
        linked = next((f"docs/generated/{at}" for file, at in AT_ROOT.items() if path in (file, f"docs/{file}")), "")
        if path in ("README.md", "docs/README.md"):
            linked = "docs/index.md"
        elif (ROOT / path / "README.md").is_file():
            linked = f"{path}/README.md"
        return f"[{link[1]}]({posixpath.relpath(linked, here)}{hash_}{anchor})" if linked else link[1]

    if app.env.doc2path(page).suffix == ".md":
        source[0] = re.sub(r"(?<!!)\[([^\]\n]*)\]\(([^)\s]+)\)", resolved, source[0])
    if page == "decisions/README":
        source[0] += "\n```{toctree}\n:hidden:\n:glob:\n\n*\n```\n"


def _page(title: str, *parts: str) -> str:
    return f"# {title}\n\n" + "\n\n".join(parts) + "\n"


def _title(text: str, under: str) -> str:
    return f"{text}\n{under * len(text)}"


def _slug(name: str) -> str:
    return name.replace("/", "-")


def _tree(pages: Iterable[str]) -> str:
    return "```{toctree}\n:hidden:\n\n" + "\n".join(pages) + "\n```"
