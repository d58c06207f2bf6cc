"""The picture under its heat map, and the sheet: what is hot, what is grey, where boxes and colours stand."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageColor

from cnclip_ft.grounding import drawing
from cnclip_ft.grounding.finder import Grounded
from cnclip_ft.grounding.heat import Heat, Region
from data_tools.errors import RequestError

HOT, COLD = np.array([240, 249, 33]), np.array([13, 8, 135])


def test_hot_is_bright_cold_is_blue_and_what_is_not_seen_is_grey():
    white = Image.new("RGB", (90, 30), "white")
    values = np.array([[0, 1]], np.float32)
    drawn = np.asarray(drawing.heat_over(white, Heat(values, (1 / 3, 0, 1 / 3, 1))), float)
    assert drawn[15, 59] == pytest.approx(255 * 0.25 + HOT * 0.75, abs=2)
    assert drawn[15, 30] == pytest.approx(255 * 0.75 + COLD * 0.25, abs=2)
    outside = drawn[:, [0, 10, 29, 60, 89]]
    assert np.ptp(outside, axis=2).max() == 0 and outside.max() < 200


def test_boxes_and_legend_have_the_phrase_s_colour(tmp_path):
    picture = Image.new("RGB", (100, 100), "black")
    heat = Heat(np.eye(4, dtype=np.float32))
    found = [Grounded(name, heat, [Region((0.25, 0.25, 0.5, 0.5), 1.0)]) for name in ("dog", "cat")]
    assert drawing.draw([(picture, found)], tmp_path / "a.png") == []
    sheet = np.asarray(Image.open(tmp_path / "a.png").convert("RGB"))
    gap, side = drawing._GAP, drawing.SIDE
    for number, colour in enumerate(drawing.COLOURS[:2], 1):
        wanted = ImageColor.getrgb(colour)
        left = gap + number * (side + gap)
        own = sheet[:, left : left + side]
        assert tuple(own[gap + side // 4, side // 2]) == wanted  # the box's upper edge
        assert tuple(own[gap + side + 10, 5]) == wanted  # the legend's swatch
        other = ImageColor.getrgb(drawing.COLOURS[2 - number])
        assert not (own == other).all(2).any()
    # over the picture itself the last phrase's box lies above
    assert tuple(sheet[gap + side // 4, gap + side // 2]) == ImageColor.getrgb(drawing.COLOURS[1])


def test_more_than_is_drawn_is_said(tmp_path):
    heat = Heat(np.eye(2, dtype=np.float32))
    found = [Grounded(f"thing {n}", heat, heat.regions(0.5)) for n in range(drawing.MOST_MAPS + 5)]
    few = [(Image.new("RGB", (9, 9)), found)] * 2
    notes = drawing.draw(few, tmp_path / "a.png", pictures=99)
    assert [note.split(": ", 1)[1] for note in notes] == [
        "the first 15 of 20 phrases are drawn; all are in --json",
        "the first 40 of 99 pictures are drawn; all are in --json",
    ]
    with pytest.raises(RequestError, match=r"a name ending in \.png"):
        drawing.draw(few, tmp_path / "a.jpg")
