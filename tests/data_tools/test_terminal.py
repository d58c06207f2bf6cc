"""Nothing that is printed steers a terminal, and JSON stays the value it was."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tqdm import tqdm

from data_tools.errors import DataFault
from data_tools.terminal import PlainStream, plain

ROOT = Path(__file__).resolve().parents[2]
STEERING = [
    "\x1b]0;owned\x07", "\x1b[2K", "\x1b[31m", "\x9b31m", "\x00", "\x7f", "\x85", "\r", "\v", "\f", "\u202e", "\u2066",
    "\u2028", "\u200f", "\ufeff", "\udce9", "\ud83d",
]  # fmt: skip


@pytest.mark.parametrize("text", STEERING, ids=ascii)
def test_what_steers_is_shown(text):
    shown = plain(f"a{text}b")
    assert shown.isprintable() and shown.startswith("a\\u") and plain(shown) == shown
    shown.encode("utf-8")
    line = json.dumps({"id": f"a{text}b"}, ensure_ascii=False)
    assert json.loads(plain(line)) == json.loads(line)


@pytest.mark.parametrize("text", ["雪地\t里\n的狗", "café", "👩‍👩‍👧", "𠮷", "\\u001b", ""])
def test_words_stay(text):
    assert plain(text) == text


def test_a_name_forges_no_line():
    assert plain("a\nerror: b\tc", lines=False) == "a\\u000aerror: b\\u0009c"
    fault = DataFault("broken", mend="Mend it.", file="a\nerror: all is lost\x1b[2K.jpg", line=3)
    assert str(fault) == "a\\u000aerror: all is lost\\u001b[2K.jpg:3: broken. Mend it."
    assert fault.file == "a\nerror: all is lost\x1b[2K.jpg"  # what is written to files is exact


def test_progress_bars_are_drawn_and_names_in_them_are_not_obeyed():
    out = io.StringIO()
    stream = PlainStream(out, bars=True)
    with (
        tqdm(total=2, desc="a\x1b[2Jb", file=stream, ascii=True) as outer,
        tqdm(total=1, file=stream, ascii=True) as inner,
    ):
        inner.update()
        outer.update(2)
    drawn = out.getvalue()
    assert "\ra\\u001b[2Jb: 100%" in drawn and "\x1b[2J" not in drawn and "\x1b[A" in drawn
    assert stream.isatty() is False and stream.write("x\ry") == 3 and out.getvalue().endswith("x\\u000dy")


NAME = b"a\x1b]0;owned\x07\xe9\nerror: gone"


@pytest.mark.skipif(os.name != "posix" or sys.platform == "darwin", reason="names are text on this system")
@pytest.mark.parametrize(
    "arguments, encoding",
    [(("data", "check", NAME), "ascii"), ((b"\x1b[31m",), "utf-8")],
    ids=ascii,
)
def test_messages_of_the_command(arguments, encoding, tmp_path):
    environment = dict(os.environ, PYTHONPATH=str(ROOT), PYTHONIOENCODING=encoding, LANG="C", HF_HUB_OFFLINE="1")
    done = subprocess.run(
        [sys.executable, "-c", "from cnclip_ft.cli import main; main()", *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        timeout=120,
    )
    said = done.stdout + done.stderr
    assert done.returncode in (1, 2) and b"Traceback" not in said, said
    assert b"\x1b" not in said and b"\x07" not in said and "\x9b" not in said.decode("utf-8"), said
