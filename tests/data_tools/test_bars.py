"""The bar moves while one item takes long, and is drawn on a terminal alone, by one of many processes."""

from __future__ import annotations

import io
import time

from data_tools.bars import Bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def drawn(**settings) -> int:
    terminal = Terminal()
    with Bar(total=4, desc="a: pictures", unit="picture", file=terminal, **settings) as bar:
        time.sleep(1.7)  # one picture that takes long
        bar.update()
    said = terminal.getvalue()
    assert not said or "a: pictures" in said
    return said.count("pictures:")


def test_it_moves_every_second_unless_it_is_to_wait(monkeypatch):
    assert drawn() >= 3 and drawn(delay=5.0) == 0
    monkeypatch.setenv("RANK", "1")
    assert drawn() == 0
    file = io.StringIO()
    assert not list(Bar([], file=file)) and not file.getvalue()
