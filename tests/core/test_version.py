"""What a tag is compared with by the workflow that publishes: the version stands in three places."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from rome.core.version import __version__

ROOT = Path(__file__).parents[2]


def test_version_changelog_and_citation_agree() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    newest = re.search(r"^## (\S+) \((\S+)\)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert newest.groups() == (citation["version"], str(citation["date-released"]))
    assert __version__ == citation["version"]
