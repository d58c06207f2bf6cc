"""The contact sheet, with and without a font for its captions."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFont

from data_tools import contact_sheet
from data_tools.contact_sheet import draw_sheet, find_font
from data_tools.errors import RequestError, UserError
from data_tools.store import StoreWriter
from tests.data_tools.samples import picture


def store(target, texts):
    with StoreWriter(target) as writer:
        for number, text in enumerate(texts):
            writer.add_image(number, picture(number, (300, 100)) if number else b"no picture")
            writer.add_pair(number, number, text)
        return writer.finish()


def test_english_captions_need_no_font(tmp_path) -> None:
    split = store(tmp_path / "s", [f"a caption of some length about picture number {k}, which wraps" for k in range(8)])
    assert draw_sheet(split, tmp_path / "out" / "sheet.png", columns=3, rows=2) == 6
    sheet = np.asarray(Image.open(tmp_path / "out" / "sheet.png"))
    assert sheet.shape == (12 + 2 * 296, 12 + 3 * 236, 3)
    assert draw_sheet(split, tmp_path / "all.png", columns=5, rows=5, seed=None) == 8
    first = np.asarray(Image.open(tmp_path / "all.png"))[12:236, 12:236]
    assert (first[0, 5] == (255, 0, 0)).all()  # the one that cannot be decoded is a red frame
    picture_rows = np.asarray(Image.open(tmp_path / "all.png"))[12 + 75 : 12 + 149, 12 + 236 : 12 + 460]
    assert picture_rows.std() > 20  # a picture, in the middle of its cell
    captions = np.asarray(Image.open(tmp_path / "all.png"))[12 + 226 : 12 + 280, 12:236]
    assert (captions < 100).any() and (captions > 250).any()


def test_chinese_captions_without_a_font_say_what_to_do(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(contact_sheet, "font_folders", lambda: [tmp_path / "no fonts"])
    split = store(tmp_path / "s", ["一只狗", "a dog"])
    with pytest.raises(RequestError, match="no font with Chinese glyphs is installed.*--font"):
        draw_sheet(split, tmp_path / "sheet.png")
    assert not (tmp_path / "sheet.png").exists()


def test_a_font_that_is_none_or_lacks_the_glyphs_is_refused(tmp_path) -> None:
    (tmp_path / "x.ttf").write_bytes(b"not a font")
    with pytest.raises(RequestError, match="not a readable font"):
        find_font(tmp_path / "x.ttf", chinese=False)
    latin = ImageFont.load_default(16)
    (tmp_path / "latin.ttf").write_bytes(latin.font_bytes if hasattr(latin, "font_bytes") else latin.path.getvalue())
    with pytest.raises(RequestError, match="has no Chinese glyphs"):
        find_font(tmp_path / "latin.ttf", chinese=True)
    assert find_font(tmp_path / "latin.ttf", chinese=False).getlength("abc") > 0


def test_an_installed_font_is_found_by_its_glyphs(tmp_path, monkeypatch) -> None:
    """Fonts that cannot be read or draw no Chinese are passed over."""
    latin = ImageFont.load_default(16)
    (tmp_path / "NotoSansCJK-broken.ttf").write_bytes(b"not a font")
    (tmp_path / "wqy-zenhei.ttf").write_bytes(latin.path.getvalue())
    monkeypatch.setattr(contact_sheet, "_draws_chinese", lambda font: True)
    assert find_font(None, chinese=True, folders=[tmp_path]).getname()[0]
    monkeypatch.setattr(contact_sheet, "_draws_chinese", lambda font: False)
    with pytest.raises(RequestError, match="no font"):
        find_font(None, chinese=True, folders=[tmp_path])


def test_nothing_to_draw_and_nowhere_to_write(tmp_path) -> None:
    with StoreWriter(tmp_path / "s") as writer:
        writer.add_lone_text(1, "alone")
        empty = writer.finish()
    with pytest.raises(RequestError, match="no pairs to draw"):
        draw_sheet(empty, tmp_path / "sheet.png")
    with pytest.raises(RequestError, match="0×3"):
        draw_sheet(empty, tmp_path / "sheet.png", columns=0, rows=3)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        draw_sheet(store(tmp_path / "t", ["one"]), tmp_path / "file" / "sheet.png")
