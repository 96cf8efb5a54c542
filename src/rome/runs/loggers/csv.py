"""The logger for a CSV file in the run's folder, with one number per line."""

from __future__ import annotations

import csv
from collections.abc import Mapping

from rome.core.files import csv_text, replace_file
from rome.runs.loggers.base import Logger, Status, Tracked, Writer

FILE = "metrics.csv"


class Csv(Logger):
    """The file metrics.csv in the run's folder, with the columns update, name and value."""

    kind = "csv"

    def open(self, run: Tracked) -> Writer:
        return _CsvWriter(run)


class _CsvWriter(Writer):
    def __init__(self, run: Tracked) -> None:
        path, columns = run.folder / FILE, ("update", "name", "value")
        if not path.exists():
            replace_file(path, (",".join(columns) + "\n").encode())
        else:
            with path.open(newline="", encoding="utf-8") as file:
                complete = [line for line in file if line.endswith("\n")]  # a kill may cut the last line short
            rows = [row for row in csv.DictReader(complete) if run.after is None or int(row["update"]) <= run.after]
            replace_file(path, (csv_text(rows) if rows else ",".join(columns) + "\n").encode())
        self.file = path.open("a", newline="", encoding="utf-8")
        self.rows = csv.writer(self.file, lineterminator="\n")

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        self.rows.writerows((step, name, value) for name, value in values.items())
        self.file.flush()

    def close(self, status: Status) -> None:
        self.file.close()
