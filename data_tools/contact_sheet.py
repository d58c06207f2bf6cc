"""A contact sheet: pictures of a store with their captions, as one PNG."""

from __future__ import annotations

import os
import random
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from data_tools.atomic import whole_file
from data_tools.columns import EVERYTHING, Where, shown
from data_tools.errors import DataFault, RequestError
from data_tools.outputs import begins, holds
from data_tools.pictures import thumbnail
from data_tools.store import Pair, PairSource

HAN = re.compile("[\u3000-\u30ff\u3400-\u9fff\uf900-\uffef]")
# Names of fonts with Chinese glyphs, as systems and distributions ship them.
_FONT_NAMES = (
    "NotoSansCJK", "NotoSansSC", "NotoSerifCJK", "SourceHanSans", "wqy-microhei", "wqy-zenhei", "DroidSansFallback",
    "msyh", "simhei", "simsun", "Deng", "PingFang", "Hiragino Sans GB", "STHeiti", "Songti", "Arial Unicode", "uming", "ukai",
)  # fmt: skip
_SOFTWARE = "cnclip-ft data show"
_CELL, _GAP, _LINES, _FONT_SIZE = 224, 12, 3, 16
_FRAME, _ASIDE = (("black", 3), ("yellow", 2)), 2  # drawn around what is in the box
_KEPT_LINES = 2  # of other columns, where the store keeps any


def font_folders() -> list[Path]:
    """Where this system keeps its fonts."""
    home = Path.home()
    if sys.platform == "win32":
        return [Path(os.environ.get("WINDIR", "C:/Windows")) / "Fonts", home / "AppData/Local/Microsoft/Windows/Fonts"]
    if sys.platform == "darwin":
        return [Path("/System/Library/Fonts"), Path("/Library/Fonts"), home / "Library/Fonts"]
    return [Path("/usr/share/fonts"), Path("/usr/local/share/fonts"), home / ".fonts", home / ".local/share/fonts"]


def _draws_chinese(font: ImageFont.FreeTypeFont) -> bool:
    """A font without a glyph draws the same box for every missing character."""
    return bytes(font.getmask("中")) != bytes(font.getmask("\U0010fffd")) and bytes(font.getmask("中")) != bytes(
        font.getmask("国")
    )


def find_font(
    given: Path | None, *, chinese: bool, folders: list[Path] | None = None
) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The font to write captions with.

    Raises:
        RequestError: the given font cannot be read or lacks Chinese glyphs, or none is installed.
    """
    if given is not None:
        try:
            font = ImageFont.truetype(str(given), _FONT_SIZE)
        except OSError as error:
            raise RequestError(
                f"{given} is not a readable font ({error}); name a .ttf, .ttc or .otf file with --font"
            ) from None
        if chinese and not _draws_chinese(font):
            raise RequestError(f"{given} has no Chinese glyphs; name another font with --font")
        return font
    if not chinese:
        return ImageFont.load_default(_FONT_SIZE)
    for file in _font_files(font_folders() if folders is None else folders):
        try:
            font = ImageFont.truetype(str(file), _FONT_SIZE)
        except OSError:
            continue
        if _draws_chinese(font):
            return font
    raise RequestError(
        "no font with Chinese glyphs is installed. Install one (for example fonts-noto-cjk or fonts-wqy-microhei), or name a file "
        "with --font."
    )


def _font_files(folders: list[Path]) -> list[Path]:
    files = [file for folder in folders if folder.is_dir() for file in sorted(folder.rglob("*.[to]t[cf]"))]
    wanted = [name.lower() for name in _FONT_NAMES]
    return sorted(
        files, key=lambda file: not any(name in file.name.lower() for name in wanted)
    )  # the likely ones first


def draw_sheet(
    store: PairSource,
    output: Path,
    *,
    columns: int = 6,
    rows: int = 4,
    seed: int | None = 0,
    font: Path | None = None,
    where: Where = EVERYTHING,
    boxes: bool = False,
) -> int:
    """Draw up to ``columns × rows`` pairs, random ones, or the first with `seed` None. Returns how many.

    Args:
        boxes: pairs that have boxes alone, each with its boxes drawn.

    Raises:
        RequestError: no pairs to draw, or no font for their captions.
        UserError: the picture cannot be written.
    """
    if columns < 1 or rows < 1:
        raise RequestError(f"a sheet of {columns}×{rows}: at least one picture is needed")
    if not len(store):
        raise RequestError(f"{store.path} holds no pairs to draw")
    there: Sequence[int] = range(len(store))
    if where:
        where.check(store.columns, store.path)
        there = [number for number, pair in enumerate(store.pairs()) if where.holds(store.columns_of(pair.image_id))]
        if not there:
            raise RequestError(f"{store.path}: no picture meets {where}")
    if boxes:
        boxed = {number for number, found in store.all_beside() if "boxes" in found}
        there = [number for number in there if number in boxed]
        if not there:
            raise RequestError(f"{store.path}: no pair {f'that meets {where} ' if where else ''}has boxes to draw")
    count = min(columns * rows, len(there))
    chosen = there[:count] if seed is None else sorted(random.Random(seed).sample(there, count))
    pairs = [store[index] for index in chosen]
    kept = [shown(store.columns_of(pair.image_id)) for pair in pairs]
    letters = find_font(font, chinese=any(HAN.search(text) for text in (*(pair.text for pair in pairs), *kept)))
    line = _FONT_SIZE + 4
    width, height = _CELL + _GAP, _CELL + (_LINES + (_KEPT_LINES if any(kept) else 0)) * line + _GAP
    sheet = Image.new("RGB", (columns * width + _GAP, -(-count // columns) * height + _GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for number, pair in enumerate(pairs):
        left, top = _GAP + number % columns * width, _GAP + number // columns * height
        drawn = store.beside(chosen[number]).get("boxes", []) if boxes else []
        _draw_picture(sheet, pen, store, pair, left, top, drawn)
        lines = [(text, "black") for text in _wrapped(pair.text, letters, _LINES)]
        lines += [(text, "dimgrey") for text in _wrapped(kept[number], letters, _KEPT_LINES)]
        for index, (text, colour) in enumerate(lines):
            pen.text((left, top + _CELL + 2 + index * line), text, fill=colour, font=letters)
    said = PngInfo()
    said.add_text("Software", _SOFTWARE)
    with whole_file(output) as file:
        sheet.save(file, "PNG", pnginfo=said)
    return count


def is_sheet(file: Path) -> bool:
    """Whether the file was written by `draw_sheet`."""
    return begins(b"\x89PNG")(file) and holds(b"Software\0" + _SOFTWARE.encode())(file)


def _draw_picture(
    sheet: Image.Image,
    pen: ImageDraw.ImageDraw,
    store: PairSource,
    pair: Pair,
    left: int,
    top: int,
    boxes: Sequence[Sequence[float]],
) -> None:
    try:
        picture = thumbnail(store.image(pair.image_id), _CELL)
    except (DataFault, KeyError):
        pen.rectangle((left, top, left + _CELL, top + _CELL), outline="red", width=2)
        return
    left, top = left + (_CELL - picture.width) // 2, top + (_CELL - picture.height) // 2
    sheet.paste(picture, (left, top))
    for x, y, width, height in boxes:
        across, down = ((left, picture.width), (top, picture.height))
        corners = [
            start + min(side - 1, max(0, round(share * side) + aside))
            for (start, side), share, aside in (
                (across, x, -_ASIDE),
                (down, y, -_ASIDE),
                (across, x + width, _ASIDE),
                (down, y + height, _ASIDE),
            )
        ]
        for colour, thick in _FRAME:  # a light line inside a dark one is seen on any picture
            pen.rectangle(corners, outline=colour, width=thick)


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, most: int) -> list[str]:
    """At most `most` lines of a cell's width; Chinese breaks anywhere, English between words where it can."""
    text = " ".join(text.split())
    lines: list[str] = []
    while text and len(lines) < most:
        end = len(text)
        while end > 1 and font.getlength(text[:end]) > _CELL:
            end -= max(1, (end - 1) // 8) if font.getlength(text[:end]) > 2 * _CELL else 1
        if end < len(text) and text[end - 1 : end + 1].isascii() and " " in text[:end]:
            end = text[:end].rindex(" ") + 1
        lines.append(text[:end].strip())
        text = text[end:].lstrip()
    if text and lines:
        lines[-1] = lines[-1][:-1] + "…"
    return lines
