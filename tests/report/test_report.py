"""Runs side by side: the numbers are the matrix's, only comparable runs are compared, the page stands alone."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from markupsafe import escape
from matplotlib.figure import Figure
from PIL import Image
from scipy.integrate import trapezoid

from helpers.problems import rest_slow
from helpers.small_models import grow, knowing
from rome.core.errors import UserError
from rome.evaluation.evaluate import Report, example_images
from rome.evaluation.named import named_config
from rome.evaluation.run import evaluate_saved
from rome.experts import record_gates, set_routing
from rome.models import build_model, load_model, save_model
from rome.report.columns import Column
from rome.report.compared import findings, gather, headline, outstanding, paired
from rome.report.cost import show_costs
from rome.report.evaluated import Evaluated
from rome.report.figures.densities import kernel_density
from rome.report.figures.style import limits
from rome.report.page import charts, examples, gates, show, tabulate, write_report
from rome.report.routing import routing_numbers
from rome.runs.config import parse

EVIL = "<script>alert('x|y')</script>"
CONFIG: dict[str, Any] = {
    "data": {"kind": "digits"},
    "model": {
        "name": "vit_tiny_patch16_224",
        "img_size": 8,
        "patch_size": 4,
        "args": {"embed_dim": 32, "depth": 2, "num_heads": 2},
    },
    "epochs": 3,
    "natural_epochs": 1,
    "batch_size": 32,
    "device": "cpu",
    "evaluation": {"suite": {"kind": "apgd", "iterations": 5}, "n": 24, "batch_size": 24},
}
EXPERTS = {"kind": "low-rank", "experts": 3, "rank": 4, "layers": ["qkv", "proj"]}


def made_run(folder: Path, settings: dict[str, Any]) -> Path:
    """A run as `rome train` leaves it, of a model that knows the digits, and evaluated."""
    config = parse({**CONFIG, **settings})
    split = config.data.open("train")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_model(config.model, config.experts, classes=10, shape=split.shape)
        knowing(model, model.backbone.head, *split.first(512))
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config.dump(), sort_keys=False))
    events = [
        {"event": "update", "update": 44, "loss": 2.0, "accuracy": {"L1": 0.1}},
        *(
            {
                "event": "epoch",
                "update": 44 * (epoch + 1),
                "epoch": epoch + 1,
                "loss": 2.0 - epoch,
                "cross_entropy": 2.0 - epoch,
                "accuracy": {"L1": 0.2, "L2": 0.3, "Linf": 0.1 * epoch},
            }
            for epoch in range(3)
        ),
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    save_model(model, folder / "model.safetensors", config=config.dump())
    evaluate_saved(folder)
    return folder


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run with a hostile name, and one with experts."""
    root = tmp_path_factory.mktemp("runs")
    plain = made_run(root / "plain", {"name": EVIL.replace("/", ""), "about": EVIL})
    return plain, made_run(root / "experts", {"name": "experts", "experts": EXPERTS})


@pytest.fixture
def runs(made: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    """Copies to spoil."""
    return shutil.copytree(made[0], tmp_path / "a"), shutil.copytree(made[1], tmp_path / "b")


class Written(NamedTuple):
    html: str
    markdown: str
    files: list[str]


@pytest.fixture(scope="session")
def written(made: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Written:
    out = tmp_path_factory.mktemp("out") / "deeper" / "report"
    page = write_report(list(made), out)
    assert page == out / "report.html"
    return Written(page.read_text(), (out / "report.md").read_text(), sorted(file.name for file in out.iterdir()))


def report_of(*columns: list[int], **settings: Any) -> Report:
    """A report with these columns, clean first."""
    matrix = np.array(columns, dtype=bool).T
    return Report(
        correct=matrix,
        cases=("clean", "L1", "L2", "Linf")[: len(columns)],
        labels=np.zeros(len(matrix), dtype=np.int64),
        indices=np.arange(len(matrix)),
        settings={"suite": {"kind": "apgd"}, **settings},
    )


A = report_of([1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 1], [1, 1, 1, 0])
B = report_of([1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 0])


class TestTable:
    def test_numbers_are_those_of_the_matrix(self) -> None:
        columns, ((clean, l1, l2, linf, average, union), _) = tabulate([("a", A), ("b", B)])
        assert columns == ["clean", "L1", "L2", "Linf", "average", "union"]
        assert [cell.percent for cell in (clean, l1, l2, linf, union)] == ["100.0", "50.0", "50.0", "75.0", "25.0"]
        assert average.value == pytest.approx(175 / 300)
        assert average.interval == A.interval("average")
        assert union.interval == A.interval("union")
        assert l1.span == "–".join(f"{100 * end:.1f}" for end in A.interval("L1"))  # noqa: RUF001

    def test_the_best_of_a_column_is_marked_and_equals_share_the_mark(self) -> None:
        _, rows = tabulate([("a", A), ("b", B)])
        assert [cell.best for cell in rows[0]] == [True, True, False, True, True, True]
        assert [cell.best for cell in rows[1]] == [False, True, True, False, True, True]

    def test_one_run_has_no_best(self) -> None:
        assert not any(cell.best for cell in tabulate([("a", A)])[1][0])

    def test_what_failed_has_no_number_and_is_not_best(self) -> None:
        broken = Report(A.correct[:, :3], A.cases[:3], A.labels, A.indices, A.settings, failed={"Linf": "no memory"})
        _, (row, other) = tabulate([("broken", broken), ("b", B)])
        assert math.isnan(row[-1].value)
        assert (row[-1].percent, row[-1].span, row[-1].best) == ("–", "", False)  # noqa: RUF001
        assert other[-1].best

    def test_in_a_pipe_it_fits_80_columns_and_stars_the_best(self, capsys: pytest.CaptureFixture[str]) -> None:
        show([("random", A), ("rome-random", B)])
        text = capsys.readouterr().out
        assert all(len(line) <= 80 for line in text.splitlines())
        assert "\x1b" not in text
        assert text.splitlines()[1].split() == ["random", "*100.0", "*50.0", "50.0", "*75.0", "*58.3", "*25.0"]
        assert "4 test examples, suite apgd;" in text

    def test_in_a_pipe_a_long_name_stays_whole(self, capsys: pytest.CaptureFixture[str]) -> None:
        name = "a-rather-long-name-of-a-run-" * 4
        show([(name, A)])
        assert f"{name} " in capsys.readouterr().out

    def test_on_a_terminal_the_best_is_bold_and_not_starred(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name, value in (("FORCE_COLOR", "1"), ("TERM", "xterm"), ("COLUMNS", "80")):
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("NO_COLOR", raising=False)
        show([("random", A), ("rome-random", B)])
        text = capsys.readouterr().out
        assert re.search(r"\x1b\[1m *100\.0", text)
        assert len(re.findall(r"\x1b\[1m *75\.0", text)) == 2  # L2 and Linf, and not the clean 75.0
        assert "*" not in text
        assert all(len(re.sub(r"\x1b\[[\d;]*m", "", line)) <= 80 for line in text.splitlines())

    def test_names_are_not_markup(self, capsys: pytest.CaptureFixture[str]) -> None:
        show([("[red]x[/red]", A)])
        assert "[red]x[/red]" in capsys.readouterr().out

    def test_cost_in_millions_and_billions(self, capsys: pytest.CaptureFixture[str]) -> None:
        facts = {"name": "vit", "parameters": 88_850_602, "trainable": 88_838_602, "experts": 3_698_592, "macs": 5.6e9}
        show_costs([facts])
        head, row = (line.split("  ") for line in capsys.readouterr().out.splitlines())
        assert [cell.strip() for cell in row if cell] == ["vit", "88.851", "88.839", "3.699", "5.6"]
        assert "s/update" not in head
        times = {"seconds_per_update": 0.5, "latency_ms": 12.345, "latency_one_ms": 23.45}
        times |= {"update_ratio": [1, 1, 1], "latency_ratio": [1, 1, 1], "latency_one_ratio": [1, 1, 1]}
        timed = {**facts, **times, "latency_batch": 64, "batch_size": 64, "device": "cpu"}
        show_costs([timed])
        head, row, note = capsys.readouterr().out.splitlines()
        assert row.split()[-3:] == ["23.4", "12.3", "0.5"]
        assert re.search(r"ms, one image +ms/image +s/update$", head)
        assert note.startswith("updates of 64 examples, forward passes of 64, cpu;")
        show_costs([timed, timed])
        assert capsys.readouterr().out.count("1.00 (1.00\N{EN DASH}1.00)") == 6


class TestDifference:
    def test_closed_form(self) -> None:
        # of 4 examples one is right in the first only, none in the second only: d = 1/4, Agresti-Min centre 1/6
        found = paired(report_of([1, 1, 1, 0]), report_of([1, 1, 0, 0]))
        half = 1.959963984540054 * math.sqrt(1 + 1 - 1 / 6) / 6
        assert found == pytest.approx((0.25, 1 / 6 - half, 1 / 6 + half, 1.0))
        assert not found.clear

    def test_antisymmetric(self) -> None:
        value, low, high, p = paired(A, B)
        assert paired(B, A) == pytest.approx((-value, -high, -low, p))

    def test_many_examples_decide(self) -> None:
        assert paired(report_of([1] * 100), report_of([1] * 50 + [0] * 50)).clear


def named(name: str, report: Report) -> Evaluated:
    return Evaluated(name=name, folder=Path(name), report=report)


class TestWhatStandsOut:
    HIGH = report_of([1] * 100, [1] * 90 + [0] * 10, [1] * 100)
    SAME = report_of([1] * 100, [0] * 8 + [1] * 92, [1] * 100)
    LOW = report_of([1] * 100, [1] * 50 + [0] * 50, [1] * 100)

    @pytest.mark.parametrize(
        ("runs", "base", "expected"),
        [
            ("a", None, "a: 90.0% correct under every attack"),
            ("ab", None, r"No significant difference: b 92.0, a 90.0 (union, %, p = 0.81)"),
            ("ac", None, r"a 90.0 is significantly above c 50.0 (union, %, p < 0.0001)"),
            ("abc", None, r"No significant difference: b 92.0, a 90.0; significantly below: c 50.0 (union, %)"),
            ("cab", 0, r"c 50.0 is significantly below b 92.0, a 90.0 (union, %)"),
            ("acb", 0, r"No significant difference: a 90.0, b 92.0; significantly below: c 50.0 (union, %)"),
        ],
    )
    def test_the_title_is_the_answer(self, runs: str, base: int | None, expected: str) -> None:
        every = [named(run, {"a": self.HIGH, "b": self.SAME, "c": self.LOW}[run]) for run in runs]
        assert headline(every, None if base is None else every[base]) == expected

    def test_without_a_union_the_title_is_the_names(self) -> None:
        clean = report_of([1, 0])
        assert headline([named("a", clean), named("b", clean)]) == "a, b"

    def test_only_what_is_significantly_above_every_other_run_is_bold(self) -> None:
        columns = [Column(title) for title in ("clean", "L1", "L2", "average", "union")]
        assert outstanding([self.HIGH, self.LOW], columns) == {(0, 1), (0, 4)}
        assert outstanding([self.LOW, self.HIGH, self.HIGH], columns) == set(), "two are equally good"
        assert outstanding([self.HIGH], columns) == set()
        # 5 of 100 differ: p = 0.0625 alone; 6: p = 0.031, which the two other columns and their three double and more
        six = report_of([1] * 100, [0] * 6 + [1] * 94)
        best = report_of([1] * 100, [1] * 100)
        assert outstanding([best, six], [Column("L1")]) == {(0, 0)}
        assert outstanding([best, six], [Column("clean"), Column("L1")]) == set()
        assert outstanding([best, six], [Column("clean"), Column("union")]) == {(0, 1)}, "the union by itself"


class TestWhatMayBeCompared:
    def test_a_folder_without_a_run(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"neither run nor config; give folders of runs"):
            write_report([tmp_path], tmp_path / "out")

    def test_a_run_without_an_evaluation_says_which_command(self, runs: tuple[Path, Path], tmp_path: Path) -> None:
        shutil.rmtree(runs[1] / "evaluation")
        with pytest.raises(UserError, match=rf"no evaluation: run `rome evaluate {runs[1]}`"):
            write_report(list(runs), tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_an_unfinished_evaluation(self, runs: tuple[Path, Path]) -> None:
        (runs[0] / "evaluation/apgd-24/result.json").unlink()
        with pytest.raises(UserError, match=r"only an unfinished evaluation: run `rome evaluate"):
            gather(runs)

    @pytest.mark.parametrize(
        ("change", "named"),
        [
            ({"data": {"shape": [24, 1, 8, 8], "sha256": "0"}}, r"data\.sha256"),
            ({"threats": {}}, r"threats"),
            ({"suite": {"kind": "apgd", "iterations": 50, "targets": None}}, r"suite"),
            ({"seed": 7}, r"seed 0 and 7"),
            ({"search_precision": "tf32"}, r"search_precision fp32 and tf32"),
        ],
    )
    def test_other_examples_threats_or_suites(
        self, runs: tuple[Path, Path], change: dict[str, Any], named: str
    ) -> None:
        file = runs[1] / "evaluation/apgd-24/settings.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
        with pytest.raises(UserError, match=rf"evaluated differently \({named}") as caught:
            gather(runs)
        assert "\n" not in str(caught.value)

    def test_networks_that_measure_differ(self, runs: tuple[Path, Path]) -> None:
        """Of a case that both have; one that does not say which it was may be the same."""

        def measured(run: Path, networks: dict[str, str]) -> None:
            file = run / "evaluation/apgd-24/settings.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | {"networks": networks}))

        measured(runs[0], {"L2": "a" * 64, "ppgd": "a"})
        for networks in ({}, {"L2": "a" * 64}, {"Linf": "b", "ppgd": "b"}):
            measured(runs[1], networks)
            assert len(gather(runs)) == 2
        measured(runs[1], {"L2": "b" * 64})
        with pytest.raises(UserError, match=r"evaluated differently \(networks.L2 a+… and b+…: .*--features"):
            gather(runs)

    def test_no_common_evaluation_lists_what_there_is(self, runs: tuple[Path, Path]) -> None:
        file = runs[1] / "evaluation/apgd-24/settings.json"
        settings = json.loads(file.read_text())
        file.write_text(json.dumps(settings | {"suite": settings["suite"] | {"kind": "autoattack"}}))
        with pytest.raises(UserError, match=r"a: apgd-24; .*b: autoattack-24.*same --suite and --n"):
            gather(runs)

    def test_autoattack_goes_first_then_the_most_examples(self, runs: tuple[Path, Path]) -> None:
        for run in runs:
            evaluate_saved(run, n=2)
        first, second = gather(runs)
        assert (first.report.n, second.report.n) == (24, 24)
        assert first.others == ("apgd-2",)
        for run in runs:
            unseen = shutil.copytree(run / "evaluation/apgd-24", run / "evaluation/unseen-24")
            settings = json.loads((unseen / "settings.json").read_text())
            cases = [case | {"group": "perceptual"} for case in settings["cases"]]
            (unseen / "settings.json").write_text(json.dumps(settings | {"suite": {"kind": "unseen"}, "cases": cases}))
        assert [run.folder.name for run in gather(runs)] == ["apgd-24"] * 2, "Lp balls before other threats"
        for run in runs:
            folder = shutil.copytree(run / "evaluation/apgd-2", run / "evaluation/autoattack-2")
            settings = json.loads((folder / "settings.json").read_text())
            settings["suite"]["kind"] = "autoattack"
            (folder / "settings.json").write_text(json.dumps(settings))
        assert [run.folder.name for run in gather(runs)] == ["autoattack-2"] * 2

    def test_a_suite_that_is_asked_for(self, runs: tuple[Path, Path]) -> None:
        for run in runs:
            evaluate_saved(run, n=2)
        assert [run.report.n for run in gather(runs, "apgd")] == [24, 24]
        assert [run.report.n for run in gather(runs, "apgd-2")] == [2, 2]
        with pytest.raises(
            UserError, match=r"no evaluation of suite unseen on the same number of examples .*a: apgd-2, apgd-24;"
        ):
            gather(runs, "unseen")

    def test_an_evaluation_of_other_weights(self, runs: tuple[Path, Path], made: tuple[Path, Path]) -> None:
        shutil.copy(made[1] / "model.safetensors", runs[0])
        with pytest.raises(UserError, match=r"other weights .* --overwrite"):
            gather(runs)

    def test_equal_names_become_folders_and_a_folder_counts_once(
        self, runs: tuple[Path, Path], made: tuple[Path, Path]
    ) -> None:
        assert [run.name for run in gather([runs[0], made[0]])] == ["a", "plain"]
        assert len(gather([runs[0], runs[0].parent / "." / "a"])) == 1


class Page(HTMLParser):
    """Checks nesting; collects ids, addresses, and the text of the headline table's cells."""

    VOID = frozenset({"meta", "img", "br", "link", "hr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.cells: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._see(tag, attrs)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._see(tag, attrs)
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "td":
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "td" in self.open and self.open[-1] in ("td", "b"):
            self.cells[-1] += data

    def _see(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        values = {name: value or "" for name, value in attrs}
        if "id" in values:
            self.ids.append(values["id"])
        self.addresses += [values[name] for name in ("src", "href", "xlink:href") if name in values]


def headline_cells(reports: list[Report]) -> list[str]:
    """The numbers of the first table in the order of its cells."""
    every = [[each.clean, *each.robust.values(), each.average, each.union] for each in reports]
    return [f"{100 * value:.1f}" for row in zip(*every, strict=True) for value in row]


class TestPage:
    def test_is_well_formed_and_has_every_section(self, written: Written) -> None:
        page = Page(written.html)
        assert len(page.ids) == len(set(page.ids))
        assert {"accuracy", "examples", "gates", "training", "provenance"} <= set(page.ids)
        assert {address[1:] for address in page.addresses if address.startswith("#")} >= {"accuracy", "gates"}
        # the numbers of gates; settings at their defaults; two configs
        assert page.tags.count("details") == 1 + 1 + 2
        # gates; cross-entropy and three accuracies; Fig. 7
        assert written.html.count('<svg role="img"') == 1 + 4 + 1
        # up to 4 examples x (clean + 2 runs x 3 threats x 2)
        assert page.tags.count("img") == 4 * (1 + 2 * 3 * 2)

    def test_says_how_the_gates_route_in_numbers(self, made: tuple[Path, Path], written: Written) -> None:
        run = gather([made[1]])[0]
        x, y = run.config.data.open("test").first(24)
        numbers = routing_numbers(gates.collect(load_model(run.run.model_file), x, y, run.threats))
        shown = (f"{numbers.information_mean:.4f}", f"{numbers.between[-1]:.3f}", f"{numbers.usage_mean:.3f}")
        probe = f"{100 * numbers.gates_probe.accuracy:.1f}% ± {100 * numbers.gates_probe.spread:.1f}"
        for text in (written.html, written.markdown):
            table = text[text.index("routing of L1, L2, Linf") :]
            assert all(value in table for value in (*shown, probe, "chance 33.3%"))

    def test_needs_nothing_else(self, written: Written) -> None:
        page = Page(written.html)
        assert page.addresses
        assert all(address.startswith(("data:image/png;base64,", "#")) for address in page.addresses)
        assert {address[1:] for address in page.addresses if address.startswith("#")} <= set(page.ids)
        assert not {"script", "link", "iframe", "metadata"} & set(page.tags)
        assert "@import" not in written.html
        assert not re.search(r"url\((?!#)", written.html)
        assert written.files == ["report.csv", "report.html", "report.md"]

    def test_hostile_names_are_text(self, written: Written) -> None:
        assert "<script" not in written.html
        assert "&lt;script&gt;" in written.html
        assert "<script" not in written.markdown.replace("`", "")
        rows = [line for line in written.markdown.splitlines() if line.startswith("|")]
        assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows[:4]} == {8}

    def test_its_numbers_are_those_of_the_matrix(self, written: Written, made: tuple[Path, Path]) -> None:
        numbers = headline_cells([Report.load(run / "evaluation/apgd-24") for run in made])
        assert [cell.strip() for cell in Page(written.html).cells[: len(numbers)]] == numbers
        for number in numbers:
            assert number in written.markdown

    def test_marks_stand_where_the_numbers_are(self, written: Written, made: tuple[Path, Path]) -> None:
        reports = [Report.load(run / "evaluation/apgd-24") for run in made]
        table = written.html[written.html.index("<tbody>") : written.html.index("</tbody>")]
        marks = [float(each) for each in re.findall(r'<span style="left: ([\d.]+)%">\s*<svg', table)]
        assert marks == pytest.approx([float(number) for number in headline_cells(reports)], abs=0.06)
        low, high = reports[1].interval("union")
        assert f"left: {100 * low:.2f}%; width: {100 * (high - low):.2f}%" in table

    def test_accuracy_by_class(self, written: Written, made: tuple[Path, Path]) -> None:
        table = re.search(r'<table class="plain classes">.*?</table>', written.html, flags=re.DOTALL)
        assert table is not None
        found = [cell.strip() for cell in Page(table[0]).cells]
        reports = [Report.load(run / "evaluation/apgd-24") for run in made]
        labels = sorted(set(reports[0].labels.tolist()))
        expected = []
        for label in labels:
            pairs = [
                (
                    report.correct[report.labels == label, 0].mean(),
                    report.all_correct()[report.labels == label].mean(),
                )
                for report in reports
            ]
            expected += [f"{100 * share:.0f}" for pair in pairs for share in pair]
            difference = round(100 * (pairs[1][1] - pairs[0][1]))
            expected.append(f"{difference:+}".replace("-", "\N{MINUS SIGN}") if difference else "0")
        assert found == expected

    def test_follows_the_reader_s_colours(self, written: Written) -> None:
        assert "color-scheme: light dark" in written.html
        figures = re.search(r'<section id="figures">.*?</section>', written.html, flags=re.DOTALL)
        assert figures is not None  # maps have colours of their own, their text has not
        assert set(re.findall(r"<text[^>]*style=\"[^\"]*fill: ([^;\"]*)", figures[0])) <= {"var(--ink)", "var(--muted)"}
        drawn = "".join(re.findall(r"<svg.*?</svg>", written.html.replace(figures[0], ""), flags=re.DOTALL))
        assert set(re.findall(r"#[0-9a-f]{6}\b", drawn)) <= {"#000000"}
        assert "var(--run-1)" in drawn

    def test_says_how_it_was_made(self, written: Written, made: tuple[Path, Path]) -> None:
        digest = json.loads((made[0] / "evaluation/apgd-24/settings.json").read_text())["provenance"]
        for text in (written.html, written.markdown):
            assert digest["checkpoint_sha256"] in text
            assert torch.__version__.split("+")[0] in text
            assert "rome report" in text
            assert "experts.rank" in text
        assert "embed_dim: 32" in written.html

    def test_without_its_data_it_says_what_is_missing(
        self, runs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def gone(self: object, split: str) -> None:
            raise UserError("the data has gone")

        monkeypatch.setattr("rome.data.memory.Digits.open", gone)
        page = write_report(list(runs), tmp_path / "out")
        assert re.search("No pictures of .*: the data has gone", page.read_text())
        assert Page(page.read_text()).tags.count("img") == 0

    def test_one_run_without_experts_or_log(self, runs: tuple[Path, Path], tmp_path: Path) -> None:
        (runs[0] / "log.jsonl").unlink()
        text = write_report([runs[0]], tmp_path / "out").read_text()
        assert "None of these runs has experts" in text
        assert "no training log" in text
        assert "Bold" not in text

    def test_a_file_in_the_way(self, runs: tuple[Path, Path], tmp_path: Path) -> None:
        (tmp_path / "out").write_text("")
        with pytest.raises(UserError, match="is a file"):
            write_report(list(runs), tmp_path / "out")

    @pytest.mark.parametrize("problem", ["below a file", "unwritable"])
    def test_a_folder_that_cannot_be_written_is_told_before_the_work(
        self,
        made: tuple[Path, Path],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        problem: str,
    ) -> None:
        def refuse(*_: object, **__: object) -> None:
            raise PermissionError(13, "Permission denied")

        out = tmp_path / "out"
        if problem == "below a file":
            out.write_text("")
            out /= "deeper"
        else:  # who is root may write anywhere
            monkeypatch.setattr("os.open", refuse)
        with pytest.raises(UserError, match=rf"nothing can be written in {out} \(.*--out"):
            write_report(list(made), out)
        assert capsys.readouterr().out == ""


NEAREST_MEAN = """
import torch
from rome.data import Digits

def net(num_classes):
    split = Digits().open("train")
    x, y = split.first(len(split))
    means = torch.stack([x[y == c].flatten(1).mean(0) for c in range(num_classes)])
    linear = torch.nn.Linear(64, num_classes)
    linear.weight.data, linear.bias.data = 2 * means, -(means**2).sum(1)
    return torch.nn.Sequential(torch.nn.Flatten(), linear)
"""


class TestBesideARun:
    """A model that no run made, evaluated on what the runs were."""

    @pytest.fixture(scope="class")
    def mine(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        root = tmp_path_factory.mktemp("given")
        (root / "nets.py").write_text(NEAREST_MEAN)
        config = named_config({"model": f"{root / 'nets.py'}:net", "data": "digits"})
        assert config is not None
        suite = "{kind: apgd, iterations: 5}"
        return evaluate_saved(config, suite=suite, n=24, batch_size=24, out=root / "mine")[1]

    @pytest.fixture(scope="class")
    def page(self, made: tuple[Path, Path], mine: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
        return write_report([*made, mine], tmp_path_factory.mktemp("page")).read_text()

    def test_all_have_a_row_and_their_pairs(self, made: tuple[Path, Path], mine: Path, page: str) -> None:
        reports = [Report.load(run / "evaluation/apgd-24") for run in made] + [Report.load(mine)]
        numbers = headline_cells(reports)
        assert [cell.strip() for cell in Page(page).cells[: len(numbers)]] == numbers
        compared = gather([*made, mine])
        told = findings(compared)
        assert len(told) == 5, "the best, two others, how many comparisons, and what no interval covers"
        assert all(str(escape(sentence)) in page for sentence in told)

    def test_only_the_runs_have_configs_and_curves(self, page: str) -> None:
        assert page.count("<summary>Full config") == 2
        differing = page[page.index("Settings that differ") :]
        assert re.findall("<th", differing[: differing.index("</thead>")])[1:] == ["<th"] * 3, "thead, then 1 + 2"
        training = page[page.index('<section id="training">') : page.index('<section id="provenance">')]
        assert training[: training.index("</ul>")].count("<li>") == 2
        assert "nets.py:net" not in training
        assert "<dt>normalisation</dt><dd>none of ours" in page

    def test_pictures_of_what_all_get_right(self, made: tuple[Path, Path], mine: Path, page: str) -> None:
        rows = examples.pick(gather([*made, mine]), 4)
        assert rows
        shown = page[page.index('<section id="examples">') : page.index('<section id="gates">')]
        assert shown.count("<img") == len(rows) * (1 + 3 * 3 * 2)
        assert all(shown.count(f"{escape(each.name)}</div>") == len(rows) for each in gather([*made, mine]))

    def test_an_evaluation_of_a_run_is_no_given_model(self, made: tuple[Path, Path]) -> None:
        with pytest.raises(UserError, match="is an evaluation of a run: give the run's folder"):
            gather([made[0] / "evaluation/apgd-24"])


def pixels(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))


class TestExamples:
    def test_pictures_are_enlarged_by_a_whole_factor(self) -> None:
        image = torch.arange(64).view(1, 8, 8) / 63
        shown = pixels(examples.picture(image))
        assert shown.shape == (96, 96)
        assert np.array_equal(shown[::12, ::12], np.kron(shown, np.ones(1))[11::12, 11::12])
        assert (shown[0, 0], shown[-1, -1]) == (0, 255)
        assert pixels(examples.picture(torch.rand(3, 224, 224))).shape == (224, 224, 3)

    def test_gray_perturbations_diverge_from_white(self) -> None:
        red, white, blue = pixels(examples.diverging(torch.tensor([[[0.1, 0.0, -0.1]] * 3]), 0.1))[0, ::40].astype(int)[
            :3
        ]
        assert red[0] > red[2] + 100
        assert blue[2] > blue[0] + 100
        assert min(white) > 240

    def test_colour_perturbations_diverge_from_gray_in_each_channel(self) -> None:
        delta = torch.zeros(3, 32, 32)
        delta[0], delta[2] = 0.2, -0.4
        assert np.abs(pixels(examples.diverging(delta, 0.4))[0, 0] - np.array([178, 128, 26])).max() <= 1

    def test_picks_what_all_runs_get_right_and_shows_the_saved_images(self, made: tuple[Path, Path]) -> None:
        compared = gather(made)
        rows = examples.pick(compared, 4)
        assert len(rows) == len(set(rows)) == 4
        assert all(run.report.correct[rows, 0].all() for run in compared)
        run = compared[0]
        x, y = run.config.data.open("test").first(run.report.n)
        subject = run.subject(torch.device("cpu"))
        found = examples.adversarial(run, subject, x, y, rows, examples.pictured(compared))
        for column, (case, threat) in enumerate(run.threats.items(), start=1):
            assert bool(threat.contains(found[case], x[rows]).all())
            saved = dict(zip(*example_images(run.folder, case), strict=True))
            for place, row in enumerate(rows):
                if not run.report.correct[row, column]:
                    assert torch.equal(found[case][place], saved[row])
                    assert int(subject.model(found[case][place : place + 1]).argmax()) != int(y[row])

    def test_picks_what_breaks_in_one_run_and_not_in_another_first(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(examples, "pictured", lambda runs: ["L1", "L2"])
        monkeypatch.setattr(examples, "_saved", lambda run, case: None)
        # broken in both; in the second alone, by one and by both; in none; wrong when clean
        one = report_of([1, 1, 1, 1, 0], [0, 1, 1, 1, 0], [0, 1, 1, 1, 0])
        other = report_of([1, 1, 1, 1, 1], [0, 1, 0, 1, 1], [0, 0, 0, 1, 1])
        runs = [named("one", one), named("other", other)]
        assert examples.pick(runs, 2) == [2, 1]
        assert examples.pick(runs, 5) == [2, 1, 0, 3]
        assert examples.pick(runs[:1], 1) == [0]

    def test_a_damaged_batch_is_named_and_its_images_are_made_anew(
        self, runs: tuple[Path, Path], tmp_path: Path
    ) -> None:
        file = next((runs[0] / "evaluation/apgd-24/batches/L1").glob("*.safetensors"))
        file.write_bytes(file.read_bytes()[:-9])
        with pytest.raises(UserError, match=rf"{file.name} is damaged .*overwrite=True"):
            example_images(runs[0] / "evaluation/apgd-24", "L1")
        assert Page(write_report([runs[0]], tmp_path / "out").read_text()).tags.count("img") == 4 * 7

    @pytest.mark.slow
    def test_a_threat_that_a_network_measures_has_pictures_without_a_size(
        self, runs: tuple[Path, Path], tmp_path: Path
    ) -> None:
        shutil.rmtree(runs[0] / "evaluation")
        evaluate_saved(runs[0], suite="unseen", features="self", cases=["jpeg", "ppgd"], n=12)
        assert examples.pictured(gather(runs[:1])) == ["jpeg", "ppgd"]
        text = write_report([runs[0]], tmp_path / "out").read_text()
        assert Page(text).tags.count("img") == 4 * (1 + 2 * 2)
        assert len(re.findall("<p>size ", text)) == 4

    @pytest.mark.parametrize("complete", rest_slow([0, 1], 0))
    def test_a_case_that_some_run_lacks_is_in_no_picture(
        self, runs: tuple[Path, Path], tmp_path: Path, complete: int
    ) -> None:
        lacking = runs[1 - complete]
        shutil.rmtree(lacking / "evaluation")
        evaluate_saved(lacking, cases=["L1", "Linf"])
        text = write_report(list(runs), tmp_path / "out").read_text()
        assert examples.pictured(gather(runs)) == ["L1", "Linf"]
        assert Page(text).tags.count("img") == 4 * (1 + 2 * 2 * 2)

    @pytest.mark.parametrize("routing", rest_slow(["random", "none"], 1))
    def test_the_model_looked_at_is_routed_as_the_one_evaluated(
        self, runs: tuple[Path, Path], routing: Literal["random", "none"]
    ) -> None:
        run = runs[1]
        file = run / "config.yaml"
        config = yaml.safe_load(file.read_text())
        config["evaluation"] |= {"routing": routing, "seed": 3}
        file.write_text(yaml.safe_dump(config))
        model = load_model(run / "model.safetensors")
        grow(model)  # after so short a training the experts change no class
        save_model(model, run / "model.safetensors", config=config)
        report, folder = evaluate_saved(run)
        (found,) = gather([run])
        assert found.folder == folder
        x, _ = found.config.data.open("test").first(report.n)
        seen = found.subject(torch.device("cpu")).model(x)
        assert torch.equal(seen, set_routing(model, routing, seed=3)(x))
        assert (seen.argmax(1).numpy() == report.labels).tolist() == report.correct[:, 0].tolist()
        assert not torch.equal(seen, set_routing(model, "learned")(x))


def sample(*means: list[float], n: int = 5) -> gates.GateSample:
    """One layer in which every image of a group has the same gates."""
    every = np.repeat(np.array(means)[:, None, None], n, axis=2)
    entropy = gates.relative_entropy(torch.tensor(every)).numpy()
    return gates.GateSample(("natural", "L1", "Linf"), ("layer",), every, every, every, entropy)


class TestGates:
    def test_entropy_is_1_for_equal_shares_and_0_for_one_expert(self) -> None:
        weights = torch.tensor([[0.25] * 4, [1.0, 0, 0, 0], [0.5, 0.5, 0, 0]])
        assert gates.relative_entropy(weights).tolist() == pytest.approx([1, 0, 0.5])
        assert gates.relative_entropy(torch.ones(2, 1)).tolist() == [1, 1]

    def test_distance_of_means(self) -> None:
        a = np.array([[[1.0, 0], [0, 1]], [[1, 0], [1, 0]]])  # (L, n, K)
        b = np.array([[[0.0, 1], [1, 0]], [[0, 1], [0, 1]]])
        assert gates.distances(a, b).tolist() == pytest.approx([0, math.sqrt(2)])

    def test_how_often_the_top_expert_differs(self) -> None:
        assert gates.top_differs(np.array([[0.6, 0.4], [0.6, 0.4]]), np.array([[0.9, 0.1], [0.1, 0.9]])) == 0.5

    def test_pairs_of_hand_made_gates(self) -> None:
        found = {pair[:2]: pair for pair in gates.pairs(sample([0.5, 0.5], [0.8, 0.2], [0.2, 0.8]))}
        assert list(found) == [("natural", "L1"), ("natural", "Linf"), ("L1", "Linf")]
        pair = found["L1", "Linf"]
        assert pair[2:6] == pytest.approx([0.6 * math.sqrt(2)] * 4)
        assert pair.top_differs == 1

    def test_the_summary_follows_from_the_numbers(self) -> None:
        verdict, *numbers = gates.summary(sample([0.9, 0.1], [0.5, 0.5], [0.501, 0.499]))
        assert verdict == (
            "The threats are routed nearly identically, natural images differently; weight is spread unevenly over the "
            "experts."
        )
        same = " ".join(numbers)
        assert "L1 and Linf are at most 0.001 (local) and 0.001 (global) apart" in same
        assert "apart, in the only layer with gates; " in same
        assert "The mean gates of natural images are at most 0.566 away from those of a threat." in same
        verdict, *numbers = gates.summary(sample([0.5, 0.5], [1, 0], [0, 1]))
        assert "1.414 (local)" in numbers[0]
        assert verdict.startswith("The threats are routed differently, natural images differently; ")
        assert "changes for at most 100.0% of the images" in numbers[1]
        assert "mostly to one expert" in gates.summary(sample([1, 0], [1, 0], [1, 0]))[0]
        assert "nearly evenly" in gates.summary(sample([0.5, 0.5], [0.5, 0.5], [0.5, 0.5]))[0]

    def test_collects_token_averages_whatever_the_batch(
        self, made: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run = gather([made[1]])[0]
        model = load_model(run.run.model_file)
        x, y = run.config.data.open("test").first(10)
        found = gates.collect(model, x, y, run.threats)
        monkeypatch.setattr("rome.report.subject.BATCH_SIZE", 4)
        again = gates.collect(model, x, y, run.threats)
        assert found.groups == ("natural", "L1", "L2", "Linf")
        assert found.weights.shape == (4, len(found.layers), 10, 3)
        np.testing.assert_allclose(found.weights.sum(axis=-1), 1, atol=1e-5)
        np.testing.assert_allclose(found.weights[0], again.weights[0], atol=1e-5)
        assert not np.allclose(found.weights[0], found.weights[1])
        with torch.no_grad(), record_gates(model) as recorder:
            model(x)
        last = recorder.gates[found.layers[-1]]
        np.testing.assert_allclose(found.weights[0, -1], last.weights.mean(dim=1), atol=1e-6)
        np.testing.assert_allclose(found.global_[0, -1], last.global_, atol=1e-6)


class TestCharts:
    def test_charts_of_training_have_one_range_of_epochs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(charts, "_svg", lambda figure, label: figure)
        natural = [{"epoch": e, "loss": 1.0, "cross_entropy": 1.0, "accuracy": {"clean": 0.5}} for e in (1, 2)]
        attacked = [{"epoch": e, "loss": 1.0, "cross_entropy": 1.0, "accuracy": {"L2": 0.5}} for e in (3, 4)]
        drawn: Any = charts.histories({"a": [*natural, *attacked], "b": natural}, natural=2)
        limits = {figure.axes[0].get_title(loc="left"): figure.axes[0].get_xlim() for figure in drawn}
        assert set(limits) == {"cross entropy", "accuracy without attack, %", "accuracy under L2, %"}
        assert len(set(limits.values())) == 1

    @pytest.mark.parametrize("values", [np.full(9, 0.5), np.linspace(0, 1, 50), np.zeros(3)])
    def test_densities_integrate_to_one(self, values: np.ndarray) -> None:
        grid = np.linspace(0, 1, 4001)
        assert trapezoid(kernel_density(values, grid, least=0.01), grid) == pytest.approx(1, abs=1e-3)

    @pytest.mark.parametrize("values", [np.array([0.25]), np.array([0.0, 0.01]), np.array([1.0]), np.array([0.0, 1.0])])
    def test_limits_hold_the_values_and_do_not_zoom_into_noise(self, values: np.ndarray) -> None:
        low, high = limits(values)
        assert 0 <= low <= values.min() <= values.max() <= high <= 1
        assert high - low >= 0.2 - 1e-9

    def test_labels_are_escaped_and_the_same_input_draws_the_same(self) -> None:
        log = {EVIL: [{"epoch": 1, EVIL: 1.0}]}
        (chart,) = charts.histories(log, natural=0)
        assert [chart] == charts.histories(log, natural=0)
        assert "<script" not in chart
        chart = charts.themed(Figure, '<&">')
        assert chart.startswith('<svg role="img"')
        Page(chart)
