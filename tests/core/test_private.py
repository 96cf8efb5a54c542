"""What leaves this machine names neither its folders nor itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.problems import case
from rome.core.private import cleaner

TEXTS = {
    "/home/ann/x": "PATH",
    "read /home/ann/data (2 files)": "read PATH (2 files)",
    "/home/ann/nets.py:build": "nets.py:build",
    "from '/home/ann/my own/best.pt', 3": "from 'best.pt', 3",
    "PosixPath('/srv/a b/c d')": "PosixPath('PATH')",
    "~/runs/a": "PATH",
    "~ann/runs": "PATH",
    "file:///home/ann/x": "PATH",
    r"C:\Users\ann\x": "PATH",
    r"\\server\share\x.pt": "x.pt",
    "/data/with blanks/of mine/test": "PATH",
    "../up here/set and more": "PATH and more",
    "8/255, L1/L2, and/or": "8/255, L1/L2, and/or",
    "https://example.org/a/b": "https://example.org/a/b",
    "hf://root/net@main": "hf://root/net@main",
    "runs/net": "runs/net",
    "a / b, </p>": "a / b, </p>",
    "on gpu-7.lab it ran": "on HOST it ran",
}


def test_paths_and_the_machine_are_taken_out_of_every_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "gpu-7")
    monkeypatch.setattr("socket.getfqdn", lambda: "gpu-7.lab")
    monkeypatch.setattr(Path, "home", lambda: Path("/root"))
    clean = cleaner(["/data/with blanks/of mine", "../up here/set"])
    for text, expected in TEXTS.items():
        with case(text):
            assert clean(text) == expected
            assert clean({"a": [text, {text: (text,)}]}) == {"a": [expected, {expected: [expected]}]}


def test_what_is_no_text_stays_and_a_path_goes_whole() -> None:
    plain = {"n": 3, "share": 0.5, "none": None, "yes": True}
    assert cleaner()(plain) == plain
    assert cleaner()({"path": "cifar10", "inner": {"path": None}}) == {"path": "PATH", "inner": {"path": None}}


def test_a_plain_word_for_a_host_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine called ``rome`` must not rename the package."""
    for function in ("gethostname", "getfqdn"):
        monkeypatch.setattr(f"socket.{function}", lambda: "rome")
    assert cleaner()("rome evaluate") == "rome evaluate"
