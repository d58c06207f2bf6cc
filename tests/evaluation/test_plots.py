from __future__ import annotations

import sys

import pytest
import torch

from cnclip_ft.evaluation import plots
from data_tools.errors import RequestError


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(RequestError, match=r"pip install 'cnclip-ft\[plots\]'"):
        plots.require_matplotlib()


def test_pictures_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    plots.confusion_picture(torch.tensor([[3, 1], [0, 0]]), ["猫", "dog"], tmp_path / "new" / "c.png")
    plots.precision_recall_picture(
        torch.tensor([0.1, 1.0]), torch.tensor([1.0, 0.4]), (0.1, 1.0), "x", tmp_path / "p.svg"
    )
    assert (tmp_path / "new" / "c.png").read_bytes().startswith(b"\x89PNG") and b"<svg" in (
        tmp_path / "p.svg"
    ).read_bytes()
    with pytest.raises(RequestError, match=r"ending in .png"):
        plots.confusion_picture(torch.eye(2).long(), ["a", "b"], tmp_path / "c.word")


def test_chinese_names_are_written_in_a_chinese_font_or_numbered_and_said(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    import matplotlib
    from matplotlib import font_manager
    from PIL import ImageFont

    note = plots.confusion_picture(torch.eye(2).long(), ["cat", "dog"], tmp_path / "a.png")
    assert note is None
    monkeypatch.setattr("data_tools.contact_sheet.font_folders", list)
    first = plots.confusion_picture(torch.eye(2).long(), ["猫", "狗"], tmp_path / "b.png")
    assert "no font with Chinese glyphs" in first and "numbered in the order of the list of classes" in first
    file = font_manager.findfont("DejaVu Serif")
    monkeypatch.setattr(plots, "find_font", lambda *_, **__: ImageFont.truetype(file))
    assert plots.confusion_picture(torch.eye(2).long(), ["猫", "狗"], tmp_path / "c.png") is None
    assert matplotlib.rcParams["font.sans-serif"] == ["DejaVu Sans", "DejaVu Serif"]
