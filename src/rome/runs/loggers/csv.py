"""The logger for a CSV file in the run's folder, with one number per line."""

from __future__ import annotations

import csv
from collections.abc import Mapping

from rome.core.files import csv_text, replace_file
from rome.core.plain_data import read_plain
from rome.runs.loggers.base import Logger, Status, Tracked, Writer

FILE, COLUMNS = "metrics.csv", ("update", "name", "value")


class Csv(Logger):
    """The file metrics.csv in the run's folder, with the columns update, name and value."""

    kind = "csv"

    def open(self, run: Tracked) -> Writer:
        return _CsvWriter(run)


class _CsvWriter(Writer):
    def __init__(self, run: Tracked) -> None:
        path, header = run.folder / FILE, ",".join(COLUMNS) + "\n"
        if not path.exists():
            replace_file(path, header.encode())
        else:
            advice = "restore it, or remove it to start a new one"
            rows = read_plain(path, list[tuple[int, str, str]], advice, _parse)
            kept = [dict(zip(COLUMNS, row, strict=True)) for row in rows if run.after is None or row[0] <= run.after]
            replace_file(path, (csv_text(kept) if kept else header).encode())
        self.file = path.open("a", newline="", encoding="utf-8")
        self.rows = csv.writer(self.file, lineterminator="\n")

    def log_scalars(self, values: Mapping[str, float], step: int) -> None:
        self.rows.writerows((step, name, value) for name, value in values.items())
        self.file.flush()

    def close(self, status: Status) -> None:
        self.file.close()


def _parse(text: str) -> list[tuple[int, str, str]]:
    """The rows of the file without the last line, if a kill cut it short.

    Raises:
        ValueError: the text is not such a file.
    """
    header, *rows = csv.reader(text[: text.rfind("\n") + 1].splitlines() or [text])
    if header != list(COLUMNS):
        raise ValueError(f"its first line is not {','.join(COLUMNS)}")
    return [(int(update), name, value) for update, name, value in rows]
