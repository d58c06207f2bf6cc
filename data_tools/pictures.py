"""Encoded bytes → header, upright pixels, or smaller bytes. The one place where Pillow decodes, and where it may fail."""

from __future__ import annotations

import contextlib
import io
import os
import stat
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from PIL import Image, features

from data_tools.errors import DataFault, RequestError
from data_tools.metadata import JpegStart, bare, jpeg_scans, jpeg_start, tiff_weight
from data_tools.upright import orientation_of, to_rgb

LONG = 16  # sides of the square that a picture to be cropped may be long


def _limit(name: str, default: int) -> int:
    value = os.environ.get(name, "").replace("_", "").replace(",", "") or str(default)
    if not value.isascii() or not value.isdigit() or not 0 < int(value[:20]) < 2**40:
        raise RequestError(f"{name}={os.environ[name]}: a number of pixels above 0 is needed, for example {default}")
    return int(value)


# Pillow's own bound for a decompression bomb: half a GiB of RGB. It holds wherever pictures are decoded.
PIXEL_LIMIT = _limit("CNCLIP_FT_PIXEL_LIMIT", 178_956_970)
MISSING = "missing-file"  # kind of a fault that may be over next time: rights, a network drive
SIDE_LIMIT = 65_535  # what a JPEG can have; a line of a hundred million pixels needs GiBs to resize
BYTE_LIMIT = 2**30
# Every scan of a JPEG is a walk over all its pixels, and may cost a few bytes. Encoders write 3 to 14 of them.
_SCANS, _SURE_SCANS, _SCANNED_PIXELS = 100, 16, 2_000_000_000
_TIFF_WEIGHT = 64 * 2**20
# What cameras, browsers and phones write. Others are refused: some of Pillow's readers start programs (EPS).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "AVIF")
_HEADS = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n": "PNG",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"GIF8": "GIF",
    b"BM": "BMP",
}
JPEG_END, TAIL = b"\xff\xd9", 4096
# Of large pictures, which are refused here, and of odd tags. For good: `catch_warnings` is not made for threads.
warnings.filterwarnings("ignore", module=r"PIL\.")


@dataclass(frozen=True, slots=True)
class Header:
    """What the first bytes of a picture say."""

    format: str
    width: int
    height: int
    mode: str


@dataclass(frozen=True, slots=True)
class Reencoding:
    """Pictures for fast training: the longer side at most `max_side` pixels, `quality` 1 to 100.

    Turned upright by the EXIF tag, transparency on white, RGB. A picture that already is all that stays as it came,
    unless a quality is asked for.
    """

    max_side: int | None = None
    quality: int | None = None
    format: str = "jpeg"

    def __post_init__(self) -> None:
        if self.max_side is not None and self.max_side < 16:
            raise RequestError(f"--max-side {self.max_side}: at least 16 pixels are needed")
        if self.quality is not None and not 1 <= self.quality <= 100:
            raise RequestError(f"--quality {self.quality}: it lies between 1 and 100")
        if self.format not in ("jpeg", "webp"):
            raise RequestError(f"--image-format {self.format!r}: jpeg and webp are known")

    def as_dict(self) -> dict[str, int | str | None]:
        return {"max_side": self.max_side, "quality": self.quality, "format": self.format}


def read_file(path: str | Path) -> bytes:
    """The bytes of a picture's file; a pipe or a device is not opened.

    Raises:
        DataFault: it is gone, no ordinary file, may not be read, or is larger than a GiB.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            what = (
                "it is a folder" if stat.S_ISDIR(status.st_mode) else "it is no ordinary file, but a pipe or a device"
            )
            raise _fault(f"image file {str(path)!r} cannot be read ({what})", "Name a picture.", MISSING)
        if status.st_size > BYTE_LIMIT:
            raise _fault(f"image {str(path)!r} has more than {BYTE_LIMIT >> 20} MiB", "Shrink it.", "file-too-large")
        with open(path, "rb") as file:
            return file.read(BYTE_LIMIT + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise _fault(
            f"image file {str(path)!r} cannot be read ({reason})", "Put it there, or correct the path.", MISSING
        ) from None


def _fault(problem: str, mend: str, kind: str) -> DataFault:
    return DataFault(problem, mend=mend, kind=kind)


def _too_large(what: str, limit: int) -> DataFault:
    return _fault(f"the image is too large ({what}; limit {limit:,})", "Shrink it or leave it out.", "image-too-large")


def _check_size(width: int, height: int, pixel_limit: int) -> None:
    if min(width, height) < 1:
        raise _fault(f"the image has no pixels ({width}×{height})", "Replace it or leave it out.", "undecodable-image")
    if width * height > pixel_limit:
        raise _too_large(f"{width}×{height} pixels", pixel_limit)
    if max(width, height) > SIDE_LIMIT:
        raise _too_large(f"{width}×{height}, a side of more than {SIDE_LIMIT:,} pixels", SIDE_LIMIT)


def _allowed_scans(width: int, height: int) -> int:
    return max(_SURE_SCANS, min(_SCANS, _SCANNED_PIXELS // max(1, width * height)))


def _check_jpeg(data: bytes | memoryview, start: JpegStart, pixel_limit: int) -> None:
    _check_size(start.width, start.height, pixel_limit)
    allowed = _allowed_scans(start.width, start.height)
    if jpeg_scans(data, start, allowed + 1) > allowed:
        raise _too_many_scans(allowed)


def _too_many_scans(allowed: int) -> DataFault:
    return _fault(
        f"the JPEG has more than {allowed} scans, which hold a decoder for long",
        "Save it anew, or leave it out.",
        "too-many-scans",
    )


@lru_cache(maxsize=1)
def _formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow has a reader for: AVIF depends on how it was built."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@contextlib.contextmanager
def _told(data: bytes | None, doing: str) -> Iterator[None]:
    """Every failure of a decoder as a fault. They raise anything: struct.error, TypeError, RuntimeError, MemoryError …"""
    try:
        yield
    except DataFault:
        raise
    except Image.DecompressionBombError as error:
        raise _fault(f"the image is too large ({error})", "Shrink it or leave it out.", "image-too-large") from None
    except MemoryError:
        raise _fault(f"{doing}: memory is short", "Shrink it or leave it out.", "undecodable-image") from None
    except Exception as error:  # noqa: BLE001
        what = str(error) or type(error).__name__
        mend = "Replace it or leave it out."
        if data is not None and "cannot identify" in what:
            what, mend = _unknown(data)
        raise _fault(f"{doing} ({what})", mend, "undecodable-image") from None


def _unknown(data: bytes) -> tuple[str, str]:
    if not data:
        return "it is empty", "Replace it or leave it out."
    if data[4:8] == b"ftyp" and data[8:12] in (b"avif", b"avis") and not features.check("avif"):
        return "an AVIF, which this Pillow cannot read", "Install a newer one: pip install -U pillow."
    if data[4:8] == b"ftyp" and data[8:12] in (b"heic", b"heix", b"hevc", b"hevx", b"mif1", b"msf1", b"heim", b"heis"):
        return "a HEIC", "Convert it to JPEG or PNG."
    known = next((name for head, name in _HEADS.items() if data.startswith(head)), None)
    if known is not None:
        return (
            f"it begins as a {known}, and is damaged or of a kind that Pillow cannot read",
            "Save it anew with 8 bits a channel, or leave it out.",
        )
    return f"it begins with {data[:12]!r}", f"Use {', '.join(FORMATS)}."


def _opened(data: bytes, pixel_limit: int) -> tuple[Image.Image, int | None]:
    """The picture, its header read and held against the limits, and its orientation (None: `orientation_of` knows)."""
    if len(data) > BYTE_LIMIT:
        raise _too_large(f"{len(data):,} bytes", BYTE_LIMIT)
    if (start := jpeg_start(data)) is not None:
        _check_jpeg(data, start, pixel_limit)
    if tiff_weight(data) > len(data) + _TIFF_WEIGHT:
        raise _fault("the TIFF's tags share their content a thousandfold", "Save it anew.", "undecodable-image")
    if pixel_limit > 2 * (Image.MAX_IMAGE_PIXELS or pixel_limit):
        Image.MAX_IMAGE_PIXELS = pixel_limit  # Pillow's own bound would refuse what the user has allowed
    with _told(data, "no readable image"):
        plain, orientation = bare(data)
        image = Image.open(io.BytesIO(plain), formats=_formats())
    _check_size(image.width, image.height, pixel_limit)
    if image.format == "JPEG" and start is None and data.count(b"\xff\xda") > (most := _allowed_scans(*image.size)):
        raise _too_many_scans(most)
    return image, orientation


def _decoded(image: Image.Image) -> Image.Image:
    with _told(None, "the image cannot be decoded"):
        image.load()
    return image


def open_upright(data: bytes, *, pixel_limit: int = PIXEL_LIMIT, at_least: int | None = None) -> Image.Image:
    """Encoded bytes → a decoded picture, upright, 8-bit RGB, transparency on white, without any metadata.

    The first frame of several. Limits are held against the header, before anything is decoded.

    Args:
        at_least: a JPEG may be decoded at 1/2, 1/4 or 1/8, with both sides no smaller than this.

    Raises:
        DataFault: no picture of a known format, damaged, or above a limit; nothing else, whatever a decoder does.
    """
    image, orientation = _opened(data, pixel_limit)
    with _told(None, "the image cannot be decoded"):
        if at_least is not None and image.format == "JPEG":
            image.draft("RGB", (at_least, at_least))
        image.load()
        return _bare_rgb(image, orientation)


def thumbnail(data: bytes, side: int, *, enlarge: bool = False, pixel_limit: int = PIXEL_LIMIT) -> Image.Image:
    """As `open_upright`, with `side` pixels at most on the longer side; nothing but pixels.

    Raises:
        DataFault: as there.
    """
    image = open_upright(data, pixel_limit=pixel_limit, at_least=2 * side)
    return _fitted(image, side) if enlarge or max(image.size) > side else image


def _fitted(image: Image.Image, side: int) -> Image.Image:
    scale = side / max(image.size)
    width, height = (max(1, round(own * scale)) for own in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0)


def _bare_rgb(image: Image.Image, orientation: int | None) -> Image.Image:
    rgb = to_rgb(image, orientation)
    rgb.info = {}  # writers put a comment and a profile of the old picture into the new one
    return rgb


def upright(image: Image.Image, pixel_limit: int = PIXEL_LIMIT) -> Image.Image:
    """As `open_upright`, of a Pillow picture, which stays as it is."""
    _check_size(image.width, image.height, pixel_limit)
    with _told(None, "the image cannot be decoded"):
        image.load()  # which turns a TIFF by itself, and its tag with it
        return to_rgb(image)


def plain_jpeg(data: bytes | memoryview, *, pixel_limit: int = PIXEL_LIMIT) -> JpegStart | None:
    """The beginning of an ordinary grey or colour JPEG, in a tenth of Pillow's time; None: ask Pillow.

    Raises:
        DataFault: it is above a limit.
    """
    start = jpeg_start(data)
    if start is None or start.frame not in (0xC0, 0xC1, 0xC2) or start.depth != 8 or not start.plain:
        return None
    if not (start.width and start.height) or start.components not in (1, 3) or len(data) > BYTE_LIMIT:
        return None
    _check_jpeg(data, start, pixel_limit)
    return start


def read_header(data: bytes, *, pixel_limit: int = PIXEL_LIMIT) -> Header:
    """Format, size and mode, without decoding.

    A picture without its proper end is decoded nevertheless: it may be cut off.

    Raises:
        DataFault: no picture, cut off, or above a limit.
    """
    start = plain_jpeg(data, pixel_limit=pixel_limit)
    if start is not None and JPEG_END in data[-TAIL:]:
        return Header("JPEG", start.width, start.height, "RGB" if start.components == 3 else "L")
    image, _ = _opened(data, pixel_limit)
    ends = image.format == "JPEG" and JPEG_END not in data[-TAIL:]
    if ends or (image.format == "PNG" and b"IEND" not in data[-TAIL:]):
        _decoded(image)
    return Header(image.format or "?", image.width, image.height, image.mode)


def read_size(data: bytes, *, pixel_limit: int = PIXEL_LIMIT) -> tuple[int, int, int]:
    """Width and height as the picture is stored, and the orientation that turns it upright (1 to 8, as in EXIF).

    Raises:
        DataFault: no picture, or above a limit.
    """
    image, orientation = _opened(data, pixel_limit)
    if image.format == "TIFF":  # Pillow turns it by itself while it decodes
        _decoded(image)
        return image.width, image.height, 1
    return image.width, image.height, orientation_of(image) if orientation is None else orientation


def decode_check(data: bytes, *, pixel_limit: int = PIXEL_LIMIT) -> Header:
    """As `read_header`, having decoded everything (a JPEG at an eighth of its scale: every bit is read all the same)."""
    image, orientation = _opened(data, pixel_limit)
    header = Header(image.format or "?", image.width, image.height, image.mode)
    with _told(None, "the image cannot be decoded"):
        if image.format == "JPEG":
            image.draft(image.mode, (1, 1))
        image.load()
        to_rgb(image, orientation)
    return header


def reencode(data: bytes, how: Reencoding, *, pixel_limit: int = PIXEL_LIMIT) -> bytes:
    """The picture as `how` says, encoded; where it is encoded anew, only pixels are in it.

    Raises:
        DataFault: as `open_upright`.
    """
    image, orientation = _opened(data, pixel_limit)
    longest = max(image.size)
    small = how.max_side is None or longest <= how.max_side
    same = image.format == how.format.upper() and image.mode == "RGB" and how.quality is None
    if small and same and (orientation_of(image) if orientation is None else orientation) == 1:
        _decoded(image)
        return data
    with _told(None, "the image cannot be decoded"):
        if how.max_side is not None and not small and image.format == "JPEG":
            # Decodes at 1/2, 1/4, 1/8: never below twice the target.
            image.draft("RGB", (how.max_side * 2, how.max_side * 2))
        image.load()
        image = _bare_rgb(image, orientation)
        if how.max_side is not None and max(image.size) > how.max_side:
            image = _fitted(image, how.max_side)
        buffer = io.BytesIO()
        image.save(buffer, how.format.upper(), quality=85 if how.quality is None else how.quality)
    return buffer.getvalue()


def middle_of(width: int, height: int, size: int, *, even: bool = False) -> tuple[int, int, int, int]:
    """Height and width of a picture with its shorter side at `size` pixels; top and left of its middle, as in `middle`."""
    short = min(height, width)
    tall, wide = size * height // short, size * width // short
    top, left = (round(rest / 2) if even else rest // 2 for rest in (tall - size, wide - size))
    return tall, wide, top, left


def middle(
    image: Image.Image, size: int, filter: Image.Resampling = Image.Resampling.BICUBIC, *, even: bool = False
) -> Image.Image:
    """The middle, `size` × `size`, of the picture with its shorter side at `size` pixels.

    Both roundings go down, as in transformers; with `even`, half a pixel at the edge goes to the even number, as in
    torchvision's CenterCrop, which OpenAI's code and open_clip use.
    """
    width, height = image.size
    tall, wide, top, left = middle_of(width, height, size, even=even)
    if max(tall, wide) <= LONG * size:
        resized = image.resize((wide, tall), filter)
        return resized.crop((left, top, left + size, top + size))
    down, across = height / tall, width / wide  # a line: whole it would take gigabytes
    box = left * across, top * down, min((left + size) * across, width), min((top + size) * down, height)
    return image.resize((size, size), filter, box)
