"""Tables and lines as wide as the terminal: Chinese names, numbers that stay whole, files at full width."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.cells import cell_len

from data_tools.tables import fitted, table, terminal_width

HEADS = ["", *(f"{way} R@{k}" for way in ("t2i", "i2t") for k in (1, 5, 10)), "mean recall", "t2i median", "i2t median"]
NAMES = ["验证集一号", "  验证集一号 · 中文", "  published · Flickr30K-CN ViT-B-16 fine-tuned", "x" * 50]
ROWS = [[name, *(f"{1000 * row + column}.5" for column in range(9))] for row, name in enumerate(NAMES)]


def test_without_a_width_every_row_is_one_line():
    lines = table(HEADS, ROWS).split("\n")
    assert len(lines) == 2 + len(ROWS) and len({cell_len(line) for line in lines}) == 1
    assert [line.split()[-9:] for line in lines[2:]] == [row[1:] for row in ROWS]


@pytest.mark.parametrize("width", [80, 60, 33])
def test_a_narrow_table_fits_and_tears_no_number(width):
    text = table(HEADS, ROWS, width=width)
    assert max(map(cell_len, text.split("\n"))) <= width
    numbers = [cell for row in ROWS for cell in row[1:]]
    assert sorted(re.findall(r"\d+\.5", text)) == sorted(numbers)
    assert "".join(text.split()).count("".join(NAMES[0].split())) >= text.count("\n\n") + 1  # in every block
    assert all(word in text for word in ("median", "recall"))


def test_what_is_folded_stays_behind_its_indent():
    lines = table(["", "n"], [["    eins zwei drei vier", "1"]], width=20).split("\n")
    assert [line[:8] for line in lines[2:]] == ["    eins", "    drei"]


def test_a_name_cannot_forge_a_line():
    assert table(["", "n"], [["a\nb 100.0\x1b[31m", "1"]]).count("\n") == 2


def test_long_lines_are_broken_behind_their_label():
    line = "  training     6,000 pairs, 2,000 images (data/train); captions 12.2 tokens on average"
    lines = fitted(line + "\nshort", 40).split("\n")
    assert lines[0].startswith("  training     6,000") and lines[1].startswith(" " * 15) and lines[-1] == "short"
    assert max(map(cell_len, lines)) <= 40 and " ".join(" ".join(lines[:-1]).split()) == " ".join(line.split())
    assert fitted(line, None) == line
    long = fitted("    contrastive objective; other pairs with the same image or text: exclude (0.00 in a batch)", 40)
    assert [len(part) - len(part.lstrip()) for part in long.split("\n")] == [
        4,
        4,
        4,
    ]  # a label too long: the indent alone
    point = fitted("  * The stage ended with its start: no validation beat it", 40)
    assert point == "  * The stage ended with its start: no\n    validation beat it"
    told = fitted("Stopped. Continue with: cnclip-ft train 'a folder/recipe.yaml' --continue --trust-import", 40)
    assert (
        told == "Stopped. Continue with:\n  cnclip-ft train 'a folder/recipe.yaml' --continue --trust-import"
    )  # to copy
    chinese = fitted("图片" * 40, 30).split("\n")
    assert max(map(cell_len, chinese)) <= 30 and "".join(chinese) == "图片" * 40


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_the_terminal_is_asked_and_a_pipe_has_no_width(monkeypatch):
    monkeypatch.setenv("COLUMNS", "70")  # where it is set, it is meant for every place
    assert terminal_width() == 70
    monkeypatch.setenv("COLUMNS", "")
    code = "from data_tools.tables import terminal_width; print(terminal_width())"
    root = Path(__file__).resolve().parents[2]
    piped = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert piped.stdout.strip() == "None"
    import fcntl
    import struct
    import termios

    first, second = os.openpty()
    fcntl.ioctl(second, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 60, 0, 0))
    subprocess.run([sys.executable, "-c", code], cwd=root, stdout=second, check=True)
    assert os.read(first, 100).strip() == b"60"
    os.close(first)
    os.close(second)
