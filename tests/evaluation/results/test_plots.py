"""Pictures of results: drawn, with Chinese names, or the extra is named."""

from __future__ import annotations

import sys

import pytest
import torch

from cnclip_ft.evaluation.results import plots
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


def write_font(file, letters: str) -> None:
    """A font of these letters alone, each a box of its own width."""
    from fontTools.fontBuilder import FontBuilder
    from fontTools.pens.ttGlyphPen import TTGlyphPen

    names, builder = [f"g{number}" for number in range(len(letters))], FontBuilder(1000)
    builder.setupGlyphOrder([".notdef", *names])
    builder.setupCharacterMap(dict(zip(map(ord, letters), names, strict=True)))
    glyphs = {}
    for number, name in enumerate([".notdef", *names]):
        pen = TTGlyphPen(None)
        pen.moveTo((0, 0))
        for point in ((0, 800), (300 + 50 * number, 800), (300 + 50 * number, 0)):
            pen.lineTo(point)
        pen.closePath()
        glyphs[name] = pen.glyph()
    builder.setupGlyf(glyphs)
    builder.setupHorizontalMetrics(dict.fromkeys(glyphs, (1000, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": f"Letters {letters}", "styleName": "Regular"})
    builder.setupOS2(sTypoAscender=800, usWinAscent=800, usWinDescent=200)
    builder.setupPost()
    file.parent.mkdir(parents=True)
    builder.save(file)


def test_chinese_names_are_written_in_a_font_that_is_found_or_numbered_and_said(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    folder, numbers = tmp_path / "home" / ".local/share/fonts", torch.eye(2).long()
    monkeypatch.setattr("data_tools.contact_sheet.font_folders", lambda: [folder])
    assert plots.confusion_picture(numbers, ["cat", "dog"], tmp_path / "a.png") is None
    first = plots.confusion_picture(numbers, ["猫", "狗"], tmp_path / "numbered.png")
    assert "no font with Chinese glyphs" in first and "numbered in the order of the list of classes" in first
    write_font(folder / "wqy-microhei.ttf", "中国猫狗")
    for kind in ("png", "svg", "pdf"):
        assert plots.confusion_picture(numbers, ["猫", "狗"], tmp_path / f"found.{kind}") is None
    assert (tmp_path / "found.svg").read_text(encoding="utf-8").count("<!-- 猫 -->") == 2
    said = plots.confusion_picture(numbers, ["猫", "狗鲸"], tmp_path / "lacking.png")
    assert "lack letters of the classes" in said
