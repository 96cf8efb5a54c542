"""The bar of a training on a terminal."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console
from rich.text import Text

from helpers.tiny_runs import tiny
from rome.training import progress
from rome.training.log import Update


def update(number: int, **accuracy: float) -> Update:
    return Update(number, number / 5, 1.234, {}, accuracy, 1e-3, 1234.5)


@pytest.mark.parametrize("width", [80, 100])
def test_the_bar_fits_and_forgets_the_natural_epochs(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def console(**_: Any) -> Console:
        return Console(file=io.StringIO(), force_terminal=True, width=width)

    monkeypatch.setattr(progress, "Console", console)
    config = tiny(name="rome-random-with-a-long-name", epochs=30, natural_epochs=10)
    with progress.show_training(config, 100_000, 0) as shown:

        def lines() -> list[str]:
            with (measured := console()).capture() as seen:
                measured.print(shown.bar.get_renderable())
            return [line for each in seen.get().splitlines() if (line := Text.from_ansi(each).plain).strip()]

        shown.update(update(1, clean=0.5))
        assert "clean 50.0%" in lines()[1]
        for number in range(51_000, 51_010):
            shown.update(update(number, L1=0.51, L2=0.62, Linf=0.4))
        first, second = lines()
        assert first.startswith("rome-random-with-a-long… ")
        assert "51009/100000 updates" in first
        assert first.rstrip().endswith("left")
        assert second.startswith("epoch ")
        assert "loss 1.234 · L1 51.0% L2 62.0% Linf 40.0% · 1234 img/s" in second
        assert max(map(len, (first, second))) <= width
