"""Robustness and routing of runs side by side, one row per config, averaged over seeds.

    rome sweep experiments/digits/study/[a-z]*.yaml seed=0,1,2 --out runs/study
    python benchmarks/routing.py runs/study/*/ --json routing.json

How to read it: ``union`` is from the runs' own evaluations, mean and standard deviation over seeds; ``over`` is the
difference from the first config named (or ``--base``) with the same seeds, mean (minimum to maximum). The others are
the numbers of :mod:`rome.report.routing` on the first ``--n`` test images under APGD. ``information`` is the mutual
information of threat and expert as a share of its maximum, ``distance`` the Jensen-Shannon distance between two
threats' mean gates, both averaged over layers. ``probe`` is the accuracy of a linear classifier that predicts the
threat from all gates, ``features`` the same from the features of all blocks, which models without experts have too.
``load`` is 1 if all experts have equal shares.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import MARKDOWN
from rich.table import Table

import common
from rome.experts import expert_layers
from rome.report.compared import gather
from rome.report.features import image_means
from rome.report.page import gates
from rome.report.routing import linear_probe, routing_numbers
from rome.report.subject import NATURAL, Subject, open_subjects

NUMBERS = ("information", "distance", "probe", "features", "load")


def main(options: Sequence[str] | None = None) -> None:
    """Measure the runs and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="evaluated runs: the same suite and images for all")
    parser.add_argument("--base", help="config that the others are compared with; the first run's by default")
    parser.add_argument("--n", type=int, default=128, help="test images for the routing numbers")
    parser.add_argument("--json", metavar="FILE", help="write every single number to FILE")
    arguments = parser.parse_args(options)
    runs = [each for each in arguments.runs if (each / "model.safetensors").exists()]
    reports = {each.run.folder: each.report for each in gather(runs)}
    lines = []
    for subject in open_subjects(runs):
        report = reports[subject.run.folder]
        line = {"config": subject.config.name, "seed": subject.config.seed, "clean": report.clean}
        lines.append({**line, "union": report.union, **routing(subject, arguments.n)})
        print(json.dumps(lines[-1]), flush=True)
    common.CONSOLE.print(table(lines, arguments.base or lines[0]["config"]))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"n": arguments.n, "runs": lines}, indent=1))


def routing(subject: Subject, n: int) -> dict[str, Any]:
    """Return the run's routing numbers; for a model without experts only the probe of its features."""
    groups = subject.attacked(n)
    features = image_means(subject.model, groups)
    if not expert_layers(subject.model):
        return {"features": linear_probe(features[[name != NATURAL for name in groups]]).accuracy}
    numbers = routing_numbers(gates.read(subject.model, groups), features=features)
    assert numbers.features_probe is not None
    values = (
        numbers.information_share,
        numbers.distance_mean,
        numbers.gates_probe.accuracy,
        numbers.features_probe.accuracy,
        numbers.usage_mean,
    )
    return dict(zip(NUMBERS, values, strict=True))


def table(lines: Sequence[dict[str, Any]], base: str) -> Table:
    """Make a table with one row per config, in percent except for ``distance`` and ``load``."""
    against = {line["seed"]: line["union"] for line in lines if line["config"] == base}
    shown = Table(box=MARKDOWN)
    for title in ("config", "seeds", "clean", "union", f"over {base}", *NUMBERS):
        shown.add_column(title, no_wrap=True)
    for name in dict.fromkeys(line["config"] for line in lines):
        rows = [line for line in lines if line["config"] == name]
        gains = [100 * (row["union"] - against[row["seed"]]) for row in rows if row["seed"] in against]
        over = f"{statistics.fmean(gains):+.1f} ({min(gains):+.1f} to {max(gains):+.1f})" if gains else ""
        cells = [name, str(len(rows)), f"{100 * statistics.fmean(row['clean'] for row in rows):.1f}"]
        cells += [_spread([100 * row["union"] for row in rows]), "" if name == base else over]
        for number in NUMBERS:
            values = [row[number] for row in rows if number in row]
            scaled = [100 * value for value in values] if number in ("information", "probe", "features") else values
            digits = 3 if number in ("distance", "load") else 2 if number == "information" else 1
            cells.append(f"{statistics.fmean(scaled):.{digits}f}" if scaled else "")
        shown.add_row(*cells)
    return shown


def _spread(values: Sequence[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{deviation}"


if __name__ == "__main__":
    main()
