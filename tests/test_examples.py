"""The scripts of `examples/`, run with small random models."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image

from cnclip_ft.models.checkpoints import save_checkpoint
from tests.models.helpers import small

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
