"""Files that are whole or not there, on file systems that fail for a moment, know no locks, or have another clock."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path
from typing import Any

import pytest

from rome.core import files
from rome.core.files import remove_partials, replace_file


def failing(monkeypatch: pytest.MonkeyPatch, code: int, times: int, *, does_it: bool = False) -> None:
    """Make so many renames fail with that code, having done their work or not."""
    replace, left = os.replace, [times]

    def rename(source: Any, target: Any) -> None:
        if left[0]:
            left[0] -= 1
            if does_it:
                replace(source, target)
            raise OSError(code, os.strerror(code))
        replace(source, target)

    monkeypatch.setattr(os, "replace", rename)
    monkeypatch.setattr(files, "PAUSES", (0.001, 0.001, 0.001))


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_a_rename_that_fails_for_a_moment_is_tried_again(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_bytes(b"old")
    failing(monkeypatch, code, 3)
    replace_file(tmp_path / "a", b"new")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"a": b"new"}


def test_a_rename_that_was_done_and_answered_with_an_error_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS sends a request again whose answer was lost, and finds no source."""
    (tmp_path / "a").write_bytes(b"old")
    failing(monkeypatch, errno.ENOENT, 1, does_it=True)
    replace_file(tmp_path / "a", b"new")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"a": b"new"}


@pytest.mark.parametrize(("code", "times"), [(errno.EIO, 9), (errno.ENOENT, 1), (errno.ENOSPC, 1)])
def test_a_rename_that_goes_on_failing_leaves_what_was_there(
    code: int, times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_bytes(b"old")
    failing(monkeypatch, code, times)
    with pytest.raises(OSError, match=os.strerror(code)) as failed:
        replace_file(tmp_path / "a", b"new")
    assert failed.value.filename == str(tmp_path / "a")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"a": b"old"}


def test_a_folder_that_cannot_be_synchronised_does_not_lose_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync = os.fsync

    def fsync(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    replace_file(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"


def test_new_files_have_the_permissions_of_their_folder_and_nobody_s_umask_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It belongs to the whole process: changed in one thread, another's files would be anyone's to write."""
    before = os.umask(0o027)
    try:
        monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("it changed the umask"))
        replace_file(tmp_path / "a", b"new")
        assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640
    finally:
        monkeypatch.undo()
        os.umask(before)


@pytest.mark.parametrize("ahead", [-86400.0, 86400.0])
def test_what_is_being_written_stays_whatever_this_machine_s_clock_says(
    ahead: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = tmp_path / ".a.json.1.partial", tmp_path / ".b.json.2.partial"
    for file in (old, new):
        file.touch()
    present = time.time()
    os.utime(old, (present - 700, present - 700))
    monkeypatch.setattr(time, "time", lambda: present + ahead)
    remove_partials(tmp_path)
    assert list(tmp_path.iterdir()) == [new]
    remove_partials(tmp_path, age=0)
    assert list(tmp_path.iterdir()) == []
