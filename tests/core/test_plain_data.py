"""Files of plain data that rome wrote, damaged since."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rome.core.errors import UserError
from rome.core.plain_data import parse_json, parse_yaml, read_plain

DAMAGED = [b"", b"[1, 2]", b"null", b'{"count": ', b'{"count": "3"}', b"\xff\xfe\x00", b"[" * 100]


@pytest.mark.parametrize("content", DAMAGED, ids=range(len(DAMAGED)))
@pytest.mark.parametrize("parse", [parse_json, parse_yaml])
def test_a_damaged_file_is_one_line_with_its_path_and_the_advice(content: bytes, parse: Any, tmp_path: Path) -> None:
    file = tmp_path / "facts"
    file.write_text('{"count": 3}')
    assert read_plain(file, dict[str, int], "restore it", parse) == {"count": 3}
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"^\S+facts is damaged \([^\n]+\): restore it$"):
        read_plain(file, dict[str, int], "restore it", parse)


def test_a_file_that_cannot_be_opened_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"cannot be read \(Is a directory\): restore it$"):
        read_plain(tmp_path, dict[str, int], "restore it")

    def refuse(self: Path, *_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(UserError, match=r"cannot be read \(Permission denied\): restore it$"):
        read_plain(tmp_path / "facts", dict[str, int], "restore it")
