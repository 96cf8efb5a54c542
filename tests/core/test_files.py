"""Files on a disk that other machines share: their clocks differ, and their processes may have the same number."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from rome.core.files import make_folder, replace_file, replace_with


@pytest.mark.parametrize("ahead", [86400, -86400])
def test_what_another_machine_is_writing_stays_whatever_this_clock_says(
    ahead: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = tmp_path / ".a.json.1.partial"
    partial.touch()
    present = time.time()
    monkeypatch.setattr("time.time", lambda: present + ahead)
    make_folder(tmp_path)
    assert partial.exists()


def test_processes_of_one_number_write_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the first processes of two containers."""
    monkeypatch.setattr("os.getpid", lambda: 1)

    def write(partial: Path) -> None:
        partial.write_bytes(b"mine")
        replace_file(tmp_path / "file", b"theirs")

    replace_with(tmp_path / "file", write)
    assert (tmp_path / "file").read_bytes() == b"mine"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
