"""Pictures of what was found: boxes over the picture, and a heat map for every phrase, with a legend."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from cnclip_ft.grounding.finder import Grounded
from cnclip_ft.grounding.heat import Heat, Region
from data_tools.atomic import whole_file
from data_tools.contact_sheet import HAN, find_font
from data_tools.errors import RequestError

MAKER = "cnclip-ft ground"
# Okabe and Ito's colours, which the colour-blind tell apart, without the black.
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
_HEAT = np.array([(13, 8, 135), (126, 3, 168), (204, 71, 120), (248, 149, 64), (240, 249, 33)], np.float32)  # plasma
SIDE, _GAP, _LINE, _COLUMNS = 320, 12, 22, 4
MOST_MAPS, MOST_PICTURES = 15, 40  # a phrase or a picture more is left out, and that is said


def heat_over(picture: Image.Image, heat: Heat) -> Image.Image:
    """The picture under its heat map: the hotter a place, the more of the colour; grey where the tower sees nothing."""
    values = heat.over(*picture.size)
    seen = ~np.isnan(values)
    share = np.nan_to_num(values)[..., None]
    colours = np.stack([np.interp(share[..., 0], np.linspace(0, 1, len(_HEAT)), _HEAT[:, c]) for c in range(3)], 2)
    given = np.asarray(picture.convert("RGB"), np.float32)
    strength = 0.25 + 0.5 * share
    mixed = given * (1 - strength) + colours * strength
    grey = given.mean(2, keepdims=True) * 0.5 + 64
    return Image.fromarray(np.where(seen[..., None], mixed, grey).round().astype(np.uint8))


def check_name(output: str | Path) -> None:
    """
    Raises:
        RequestError: `output` is no name of a PNG.
    """
    if Path(output).suffix.lower() != ".png":
        raise RequestError(f"{output}: the picture is written as PNG; use a name ending in .png")


def draw(
    given: Iterable[tuple[Image.Image, Sequence[Grounded]]],
    output: str | Path,
    *,
    font: Path | None = None,
    pictures: int | None = None,
) -> list[str]:
    """One PNG: for every picture its boxes, then a heat map a phrase, each under its legend.

    Args:
        given: pictures, upright RGB, and what was found in each.
        font: for the legend; None: one of the system's that has the letters.
        pictures: how many there are, where not all are given.

    Returns:
        What is to be said of it: phrases that are numbered, because no font has their letters, or are left out.

    Raises:
        RequestError: `output` is no name of a PNG.
    """
    check_name(output)
    notes: list[str] = []
    known = [(picture, list(found)) for picture, found in given]
    pictures = len(known) if pictures is None else pictures
    phrases = list(dict.fromkeys(one.phrase for _, found in known for one in found))
    chinese = any(HAN.search(phrase) for phrase in phrases)
    try:
        letters = find_font(font, chinese=chinese)
    except RequestError as error:
        if font is not None:
            raise
        letters = find_font(None, chinese=False)
        notes.append(f"{output}: phrases are numbered, in the order of --json: {str(error).split('. ')[0]}")
    shown = [f"#{number}" if notes and HAN.search(phrase) else phrase for number, phrase in enumerate(phrases, 1)]
    if len(phrases) > MOST_MAPS:
        notes.append(f"{output}: the first {MOST_MAPS} of {len(phrases):,} phrases are drawn; all are in --json")
    if pictures > MOST_PICTURES:
        notes.append(f"{output}: the first {MOST_PICTURES} of {pictures:,} pictures are drawn; all are in --json")
    names = dict(zip(phrases, shown, strict=True))
    colours = {phrase: COLOURS[number % len(COLOURS)] for number, phrase in enumerate(phrases)}
    blocks = [_block(picture, found[:MOST_MAPS], names, colours, letters) for picture, found in known[:MOST_PICTURES]]
    width = max(block.width for block in blocks)
    sheet = Image.new("RGB", (width, sum(block.height for block in blocks)), "white")
    top = 0
    for block in blocks:
        sheet.paste(block, (0, top))
        top += block.height
    said = PngInfo()
    said.add_text("Software", MAKER)
    with whole_file(output, advice="Choose another file.") as file:
        sheet.save(file, "PNG", pnginfo=said)
    return notes


def _block(
    picture: Image.Image,
    found: Sequence[Grounded],
    names: dict[str, str],
    colours: dict[str, str],
    letters: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> Image.Image:
    scale = min(SIDE / picture.width, SIDE / picture.height)
    small = picture.resize(
        (max(1, round(picture.width * scale)), max(1, round(picture.height * scale))), Image.Resampling.BICUBIC
    )
    cells: list[tuple[Image.Image, list[tuple[str, str]]]] = []
    boxed = small.copy()
    for one in found:  # the best of each; all of them stand over the phrase's own map
        _draw_boxes(boxed, one.boxes[:1], colours[one.phrase])
    cells.append((boxed, []))
    for one in found:
        heat = heat_over(small, one.heat)
        _draw_boxes(heat, one.boxes, colours[one.phrase])
        cells.append((heat, [(colours[one.phrase], f"{one.score:.2f}  {names[one.phrase]}")]))
    rows = -(-len(cells) // _COLUMNS)
    columns = min(len(cells), _COLUMNS)
    tall = small.height + 2 * _LINE + _GAP
    block = Image.new("RGB", (columns * (SIDE + _GAP) + _GAP, rows * tall + _GAP), "white")
    pen = ImageDraw.Draw(block)
    for number, (cell, legend) in enumerate(cells):
        left, top = _GAP + number % _COLUMNS * (SIDE + _GAP), _GAP + number // _COLUMNS * tall
        block.paste(cell, (left, top))
        for line, (colour, text) in enumerate(legend):
            at = top + cell.height + 4 + line * _LINE
            pen.rectangle((left, at + 2, left + 13, at + 15), fill=colour)
            pen.text((left + 20, at - 1), _cut(text, letters, SIDE - 24), fill="black", font=letters)
    return block


def _draw_boxes(picture: Image.Image, regions: Sequence[Region], colour: str) -> None:
    pen = ImageDraw.Draw(picture)
    for region in regions:
        x, y, width, height = region.box
        corners = (
            round(x * picture.width),
            round(y * picture.height),
            round((x + width) * picture.width) - 1,
            round((y + height) * picture.height) - 1,
        )
        corners = (*corners[:2], max(corners[0], corners[2]), max(corners[1], corners[3]))
        # White beside the colour: it is seen on every ground.
        pen.rectangle(corners, outline="white", width=4)
        pen.rectangle(corners, outline=colour, width=2)


def _cut(text: str, letters: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    if letters.getlength(text) <= width:
        return text
    while text and letters.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
