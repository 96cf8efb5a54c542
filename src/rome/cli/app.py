"""The command line: demo, train, evaluate, sweep, report, explore, cost, list."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from rome.cli import options
from rome.cli.list import Family, choices
from rome.core.errors import Incomplete, Interrupted, UserError, printable
from rome.core.files import explain
from rome.core.trust import opens_files

app = typer.Typer(
    help="Train, evaluate and compare image classifiers that are robust to several perturbations at once.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


class RoutingName(StrEnum):
    """Gate weights at inference."""

    learned = "learned"
    random = "random"
    inverse = "inverse"
    inverse_unscaled = "inverse-unscaled"
    none = "none"


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for runs and report.")] = Path("runs/demo"),
    overwrite: options.Overwrite = False,
) -> None:
    """Train RANDOM and RoME+RANDOM on real digits, attack both under L1, L2 and Linf, set them side by side."""
    from rome.cli.demo import run_demo

    run_demo(out, overwrite=overwrite)


@app.command()
@opens_files
def train(
    config: Annotated[Path, typer.Argument(help="YAML file, such as experiments/digits/rome-random.yaml.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[key=value]...", help="Changes to the config, such as attack.steps=5."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The run's folder; runs/NAME if not given.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the folder's checkpoint.")] = False,
    overwrite: options.Overwrite = False,
    trust_code: options.TrustCode = False,
) -> None:
    """Train a model as a config says. Under torchrun, on as many processes as it starts."""
    from rome.runs.config import load
    from rome.training.loop import train as run_training
    from rome.training.progress import show_training

    spec = load(config, overrides or ())
    run = run_training(
        spec, out or Path("runs") / spec.name, resume=resume, overwrite=overwrite, progress=show_training
    )
    if os.environ.get("RANK", "0") == "0":  # torchrun numbers its processes
        _say(f"{run.model_file}\nnext: rome evaluate {run.folder}")


@app.command()
@options.names_model
@opens_files
def evaluate(
    named: dict[str, Any],
    target: Annotated[Path | None, typer.Argument(help="A run's folder or a model.safetensors of ours.")] = None,
    suite: Annotated[
        str | None,
        typer.Option(
            help="apgd, autoattack, lp, unseen, corruptions, all; several: apgd,unseen; or settings as in a config: "
            "'{kind: corruptions, path: CIFAR-10-C}'."
        ),
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(help="The network that measures for PPGD and LPA: a run, a file, or self; runs/alexnet."),
    ] = None,
    cases: Annotated[str | None, typer.Option(help="Run only these columns of the suite now: L2,Linf.")] = None,
    n: Annotated[int | None, typer.Option(min=1, help="First N test examples; the config's if not given.")] = None,
    batch_size: Annotated[
        str | None, typer.Option(help="Examples at a time; auto halves them where memory does not suffice.")
    ] = None,
    device: options.Device = None,
    routing: Annotated[
        RoutingName | None, typer.Option(help="Gate weights: the learned ones, or those of the paper's Table 5.")
    ] = None,
    checks: Annotated[
        bool | None,
        typer.Option("--checks/--no-checks", help="Look for masked gradients; if not given, where that costs little."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the result; beside the model if not given.")] = None,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
    trust_code: options.TrustCode = False,
) -> None:
    """Attack a model under every threat; goes on where an earlier call was killed.

    Under torchrun, on as many processes as it starts, with the same result.
    """
    from rome.core.team import launched

    with launched() as team:  # first: whatever fails now fails in every process
        from rome.evaluation.any_data import batch_size_of
        from rome.evaluation.given import Given
        from rome.evaluation.memory import enough_memory
        from rome.evaluation.run import evaluate_given, evaluate_saved

        shared: dict[str, Any] = {
            "suite": suite,
            "features": features,
            "n": n,
            "cases": None if cases is None else _names(cases),
            "batch_size": batch_size_of(batch_size),
            "device": device,
            "checks": checks,
            "out": out,
            "overwrite": overwrite,
            "team": team,
        }
        data = named.pop("data") if target is not None and named["model"] is None else None
        given = Given.asked(named, target)
        if target is not None and given is None:
            with enough_memory():
                shared["routing"] = None if routing is None else routing.value
                report, folder = evaluate_saved(target, data=data, **shared)
            name = report.settings["provenance"]["config"]["name"]
        elif given is not None and target is None and routing is None:
            with enough_memory():
                report, folder = evaluate_given(given, **shared)
            name = report.settings["provenance"]["model"]["name"]
        else:
            raise UserError(
                "name what to evaluate: either a run's folder (rome evaluate RUN), or any model and its data "
                "(rome evaluate --model NAME --data DATA, without --routing)"
            )
    if not team.leads:
        return
    for warning in report.warnings:
        _say(f"warning ({', '.join(filter(None, (warning['check'], warning['case'])))}): {warning['message']}")
    if as_json:
        print(json.dumps(report.to_json()))
    else:
        from rome.report.page import show

        show([(name, report)])
        _say(f"saved in {folder}")
    report.require_complete()


@app.command()
@opens_files
def sweep(
    configs: Annotated[list[str], typer.Argument(metavar="CONFIG... [key=a,b,c]...", help="YAML files, then axes.")],
    out: Annotated[Path, typer.Option(help="Folder for the runs and sweep.csv.")] = Path("runs/sweep"),
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time, each in a process of its own.")] = 1,
    trust_code: options.TrustCode = False,
) -> None:
    """Train and evaluate every combination of configs and values, one after the other; goes on where it was stopped."""
    from rome.cli import sweep as grid

    files, axes = options.files_and_changes(configs)
    if not files:
        raise UserError("name at least one config, such as experiments/digits/random.yaml seed=0,1,2")
    chosen = grid.points(files, axes, out)
    failed = grid.sweep(chosen, jobs=jobs)
    rows = grid.gather_rows(chosen)
    if rows:
        grid.show_rows(rows)
        _say(f"saved in {grid.save_rows(rows, out)}")
    if failed:
        told = "\n".join(f"{folder}: {reason}" for folder, reason in failed.items())
        raise UserError(f"{len(failed)} of {len(chosen)} runs failed; the same command tries them again\n{told}")


@app.command()
@opens_files
def report(
    runs: Annotated[list[Path], typer.Argument(help="Evaluated runs, and folders of evaluations of other models.")],
    out: Annotated[Path, typer.Option(help="Folder for report.md and report.html.")] = Path("report"),
    suite: Annotated[
        str | None, typer.Option(help="Which evaluation, where there are several: unseen, or unseen-500.")
    ] = None,
    union: Annotated[
        list[str] | None, typer.Option(help="A further column: the union over these cases, L1,Linf. Repeatable.")
    ] = None,
    base: Annotated[
        Path | None, typer.Option(help="The run that all others are compared with; the best if not given.")
    ] = None,
    robustbench: Annotated[
        bool, typer.Option("--robustbench", help="Also write RobustBench's model_info JSON files.")
    ] = False,
    trust_code: options.TrustCode = False,
) -> None:
    """Compare evaluated runs and models: a table here, Markdown, and an HTML page with pictures."""
    from rome.report.page import write_report

    unions = [_names(names) for names in union or ()]
    _say(f"open {write_report(runs, out, suite=suite, unions=unions, robustbench=robustbench, base=base)}")


class TableFormat(StrEnum):
    """How a table is written."""

    text = "text"
    markdown = "markdown"
    latex = "latex"
    html = "html"


@app.command()
@opens_files
def table(
    number: Annotated[str, typer.Argument(help="1 to 6 or A1 to A5, as in the paper.")],
    runs: Annotated[
        list[str] | None,
        typer.Argument(
            help="Evaluated runs or models; seeds of a row are joined. For 6: configs or runs, then key=value."
        ),
    ] = None,
    form: Annotated[TableFormat, typer.Option("--format", help="Of what is printed.")] = TableFormat.text,
    timing: Annotated[bool, typer.Option(help="Table 6: measure seconds per update and latency too.")] = True,
    repeats: Annotated[int, typer.Option(min=1, help="Table 6: timed updates; the median counts.")] = 3,
    trust_code: options.TrustCode = False,
) -> None:
    """Print one of the paper's tables with the numbers of runs beside the paper's.

    Table 6 is measured now, for all that are named in turn: rome table 6 experiments/table6/*.yaml device=cuda
    """
    from rome.report.tables.cost_table import fill_costs, named_configs
    from rome.report.tables.paper_tables import fill
    from rome.report.tables.table_formats import render

    about = ""
    if number == "6":
        lines, about = fill_costs(named_configs(runs or []), repeats=repeats, timing=timing)
    else:
        lines = fill(number, [Path(run) for run in runs or []])
    if not runs:
        what = "configs or runs to measure, such as experiments/table6/*.yaml" if number == "6" else "evaluated runs"
        _say(f"these are the paper's numbers alone; name {what}: rome table {number} ...")
    print(render(f"Table {number.upper()}", lines, form.value, about=about), end="")


@app.command()
@options.names_model
@opens_files
def figures(
    named: dict[str, Any],
    runs: Annotated[list[Path] | None, typer.Argument(help="Finished runs; each is a row or a curve.")] = None,
    only: Annotated[str | None, typer.Option(help="These alone, fig3,figA4; else all there is data for.")] = None,
    form: Annotated[str, typer.Option("--format", help="pdf, png, svg, or several: pdf,png.")] = "pdf,png",
    out: Annotated[Path, typer.Option(help="Folder for pictures and their data.")] = Path("figures"),
    n: Annotated[int, typer.Option(min=8, help="Test images, each natural and under every threat.")] = 256,
    layer: Annotated[str | None, typer.Option(help="Look at the layer whose name holds this; else the last.")] = None,
    image: Annotated[int, typer.Option(min=0, help="Number of the test image in figures of one image.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Of t-SNE and of linear probes.")] = 0,
    device: options.Device = None,
    trust_code: options.TrustCode = False,
) -> None:
    """The paper's figures for runs of any method and for any model, each with its data as JSON and CSV beside it."""
    from rome.evaluation.given import Given
    from rome.report.figures import Options, write_figures
    from rome.report.subject import open_given

    given = Given.asked(named, *(runs or ())[:1])
    shown = [*(runs or ()), *([] if given is None else [open_given(given, device)])]
    chosen = Options(n=n, seed=seed, layer=layer, image=image)
    for picture in write_figures(shown, out, only=_names(only), formats=_names(form), options=chosen, device=device):
        print(picture)


@app.command()
@opens_files
def explore(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN [RUN2]", help="A finished run, or two to compare.")],
    host: Annotated[str, typer.Option(help="Address to listen on; others than this one let other machines in.")] = (
        "127.0.0.1"
    ),
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port to listen on; the first free one from 7860 if not given.")
    ] = None,
    device: options.Device = None,
    trust_code: options.TrustCode = False,
) -> None:
    """Look at a run in the browser: attack an image, see prediction, perturbation, expert maps and gates."""
    from rome.report.explore import open_explorers
    from rome.report.explore.page import serve

    serve(open_explorers(runs, device), host, port, _say)


@app.command()
@opens_files
def cost(
    configs: Annotated[list[str], typer.Argument(metavar="CONFIG... [key=value]...", help="YAML files, then changes.")],
    timing: Annotated[bool, typer.Option(help="Measure seconds per update and latency too.")] = True,
    repeats: Annotated[int, typer.Option(min=1, help="Timed updates; the median counts.")] = 3,
    layers: Annotated[bool, typer.Option("--layers", help="Only say which layers get experts; a dry run.")] = False,
    as_json: options.Json = False,
    trust_code: options.TrustCode = False,
) -> None:
    """Parameters, multiply-accumulates, seconds per update and latency of configs (paper Table 6), timed in turn."""
    from rome.report.cost import compare, show_cost, show_costs
    from rome.report.plan import plan, show_plan
    from rome.runs.config import load

    files, overrides = options.files_and_changes(configs)
    if not files or (layers and len(files) > 1):
        raise UserError("name one config, such as experiments/table1/rome-random-pgd.yaml, or several to compare")
    loaded = [load(file, overrides) for file in files]
    if layers:
        found = plan(loaded[0])
        print(json.dumps(found)) if as_json else show_plan(found)
        return
    facts = compare(loaded, repeats=repeats, timing=timing)
    if as_json:
        print(json.dumps(facts if len(facts) > 1 else facts[0]))
        return
    show_cost(facts[0]) if len(facts) == 1 else show_costs(facts)


@app.command("list")
def list_(
    family: Annotated[Family, typer.Argument(help="What to list.")],
    pattern: Annotated[str, typer.Argument(help="Only names like 'vit_*'; of experiments a part, 'table4'.")] = "*",
    cost: Annotated[
        bool, typer.Option("--cost", help="Experiments: with parameters and multiply-accumulates to train.")
    ] = False,
) -> None:
    """List what configs can name."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from rome.core.console import print_table

    table = Table(box=None, show_header=False, pad_edge=False)
    for name, text in choices(family, pattern, cost=cost):
        table.add_row(Text(name, style="bold"), Text(text))  # Text: brackets are no markup
    console = Console()
    print_table(table, console)


def _names(text: str | None) -> list[str]:
    """The names in ``a,b``."""
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def _say(text: str) -> None:
    """To standard error, so that standard output holds results only."""
    print(text, file=sys.stderr)


def main(arguments: list[str] | None = None) -> Any:
    """Entry point. Exit codes: 0 done, 1 done but for cases that failed, 2 a mistake the message explains, 130 or 143
    stopped by a signal."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # "?" where an encoding lacks a sign, and not the end of a report
            stream.reconfigure(errors="backslashreplace" if stream is sys.stderr else "replace")
    with exiting():
        app(list(map(_at_home, sys.argv[1:] if arguments is None else arguments)), prog_name="rome")


def _at_home(argument: str) -> str:
    """``--out=~/x`` like ``--out ~/x``, the only one of the two in which a shell replaces the tilde."""
    option, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    return f"{option}{equals}{os.path.expanduser(value)}"


@contextmanager
def exiting() -> Iterator[None]:
    """Turn what ends a command into one line and its exit code."""
    try:
        yield
    except UserError as error:
        _say(f"error: {printable(str(error))}")
        sys.exit(2)
    except OSError as error:
        line = explain(error)
        if line is None:
            raise
        _say(f"error: {line}")
        sys.exit(2)
    except (Incomplete, FloatingPointError) as failed:  # the latter where every case met gradients that are NaN
        _say(f"error: {failed}")
        sys.exit(1)
    except Interrupted as stopped:
        _say(str(stopped))
        sys.exit(stopped.code)
    except KeyboardInterrupt:
        _say("stopped")
        sys.exit(130)


if __name__ == "__main__":
    main()
