"""The scripts of `examples/`, run with small random models."""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from cnclip_ft.export.run import export_checkpoint
from cnclip_ft.models.checkpoints import save_checkpoint
from cnclip_ft.models.start import build_start
from tests.families import cards
from tests.models.helpers import small
from tests.official import FOLDER, requires_open_clip

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def run(monkeypatch, capsys, script: str, *arguments: object) -> dict[str, float]:
    """What it printed: a share a text."""
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    lines = [line.rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    return {text: float(share) for text, share in lines}


@pytest.fixture
def picture(tmp_path):
    Image.radial_gradient("L").convert("RGB").save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def test_chinese_clip(monkeypatch, capsys, picture, tmp_path):
    save_checkpoint(small(), tmp_path / "model", info={})
    shares = run(monkeypatch, capsys, "chinese_clip.py", picture, "--model", tmp_path / "model")
    assert list(shares) == ["杰尼龟", "妙蛙种子", "小火龙", "皮卡丘"]
    assert abs(sum(shares.values()) - 1) < 1e-3 and len(set(shares.values())) == 4
    assert run(monkeypatch, capsys, "chinese_clip.py", picture, "--model", tmp_path / "model", "--texts", "狗") == {
        "狗": 1
    }


def as_script(notebook: Path) -> str:
    """The code of a notebook in order; a line for the shell is run by one, and must succeed."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    lines = ["import subprocess"]
    for line in "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code").splitlines():
        lines.append(f"subprocess.run({line[1:]!r}, shell=True, check=True)" if line.startswith("!") else line)
    return "\n".join(lines)


@pytest.mark.slow
def test_the_commands_of_the_guide_run_in_their_order(tmp_path):
    docs = EXAMPLES.parent / "docs"
    done = subprocess.run(
        [sys.executable, docs / "make_guide.py", "--into", tmp_path],
        env=os.environ | {"PYTHONPATH": str(EXAMPLES.parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert {file.name for file in tmp_path.iterdir()} == {file.name for file in (docs / "guide").iterdir()}
    assert "data/test" in (tmp_path / "import.svg").read_text(encoding="utf-8")


def test_letters_of_a_drawn_terminal_lie_in_their_cells(tmp_path):
    drawing = runpy.run_path(str(EXAMPLES.parent / "docs" / "make_guide.py"))["picture"]
    drawing("x", "ab商品cd\nab1234cd\n", tmp_path / "x.svg")
    drawn = (tmp_path / "x.svg").read_text(encoding="utf-8")
    places = [(text, float(x)) for x, text in re.findall(r'x="([\d.]+)"[^>]*>(ab1234cd|ab|商品|cd)<', drawn)]
    cell = float(re.search(r'textLength="([\d.]+)"[^>]*>ab1234cd', drawn)[1]) / 8
    assert [(text, round(x / cell, 1)) for text, x in places] == [("ab", 0), ("商品", 2), ("cd", 6), ("ab1234cd", 0)]


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path):
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "cnclip-ft"
    command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m cnclip_ft "$@"\n', encoding="utf-8")
    command.chmod(0o755)
    script = as_script(EXAMPLES / "own_pictures.ipynb") + '\nbest("a blue star").save("found.png")\n'
    env = os.environ | {"PYTHONPATH": str(EXAMPLES.parent), "PATH": f"{command.parent}:{os.environ['PATH']}"}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert Image.open(tmp_path / "found.png").size == (500, 96)
    judged = json.loads((tmp_path / "runs/mine/contrast/best/cnclip_ft.json").read_text(encoding="utf-8"))
    assert judged["mean_recall"] > 40, judged["mean_recall"]  # chance is 7.5


ENGLISH = ["a diagram", "a dog", "a cat"]


def test_openai_clip(monkeypatch, capsys, picture, tmp_path):
    cards.CARDS["clip"].write(tmp_path / "clip")
    shares = run(monkeypatch, capsys, "openai_clip.py", picture, "--model", tmp_path / "clip")
    assert list(shares) == ENGLISH and abs(sum(shares.values()) - 1) < 1e-3 and len(set(shares.values())) == 3


@requires_open_clip
def test_openclip(monkeypatch, capsys, picture, tmp_path):
    """A folder of open_clip, whose byte pairs lie in its package; both scripts put the texts in the same order."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(FOLDER)])
    image = {"kind": "vit", "hidden": 64, "layers": 1, "heads": 1, "patch": 8, "image_size": 32}
    text = {"kind": "clip_text", "hidden": 64, "layers": 1, "heads": 1}
    save_checkpoint(build_start({"image": image, "text": text, "projection": 32})[0], tmp_path / "ours", info={})
    export_checkpoint(tmp_path / "ours", "open_clip", tmp_path / "openclip")
    shares, first = (
        run(monkeypatch, capsys, script, picture, "--model", tmp_path / "openclip")
        for script in ("openclip.py", "openai_clip.py")
    )
    assert list(shares) == ENGLISH and abs(sum(shares.values()) - 1) < 1e-3 and len(set(shares.values())) == 3
    assert sorted(ENGLISH, key=first.__getitem__) == sorted(ENGLISH, key=shares.__getitem__)


def test_the_published_name_is_the_default(monkeypatch, capsys, picture):
    asked = []
    monkeypatch.setattr("cnclip_ft.models.hub._repository", lambda name, source: asked.append(name) or picture)
    for script in ("openai_clip.py", "openclip.py"):
        with pytest.raises(Exception, match="picture.png"):
            run(monkeypatch, capsys, script, picture)
    assert asked == ["openai/clip-vit-base-patch32", "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"]
