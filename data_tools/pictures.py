"""What an encoded picture is (header only), and how it is made smaller for fast training."""

from __future__ import annotations

import io
import struct
import warnings
from dataclasses import dataclass

from PIL import Image, ImageOps

from data_tools.errors import DataFault, RequestError

PIXEL_LIMIT = 178_956_970  # Pillow's own bound for a decompression bomb: half a GiB of RGB
# What cameras, browsers and phones write. Others are refused: some of Pillow's readers start programs (EPS).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "MPO", "PPM", "AVIF")
_ORIENTATION = 0x0112
_JPEG_END, _TAIL = b"\xff\xd9", 4096
_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended, progressive: what is met
_WITHOUT_LENGTH = frozenset((0x01, 0xFF, *range(0xD0, 0xDA)))
_FRAME = struct.Struct(">HBHHB")


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


def _fault(problem: str, mend: str, kind: str) -> DataFault:
    return DataFault(problem, mend=mend, kind=kind)


def _opened(data: bytes, pixel_limit: int) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of large pictures; here they are refused
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise _too_large(str(error), pixel_limit) from None
    except Exception as error:  # noqa: BLE001 - damaged headers fail in many ways
        what = f"it begins with {data[:12]!r}" if "cannot identify" in str(error) else str(error)
        if not data:
            what = "it is empty"
        raise _fault(f"no readable image: {what}", f"Use {', '.join(FORMATS)}.", "undecodable-image") from None
    if image.width * image.height > pixel_limit:
        raise _too_large(f"{image.width}×{image.height} pixels", pixel_limit)
    return image


def _too_large(what: str, limit: int) -> DataFault:
    return _fault(f"the image is too large ({what}; limit {limit:,})", "Shrink it or leave it out.", "image-too-large")


def _decoded(image: Image.Image) -> None:
    try:
        image.load()
    except Exception as error:  # noqa: BLE001 - damaged data fails in many ways
        raise _fault(
            f"the image cannot be decoded ({error})", "Replace it or leave it out.", "undecodable-image"
        ) from None


def _jpeg_header(data: bytes) -> Header | None:
    """The header of an ordinary JPEG, walked from marker to marker: a tenth of Pillow's time. None: ask Pillow."""
    if data[:2] != b"\xff\xd8":
        return None
    at, end = 2, len(data) - 10
    while at < end and data[at] == 0xFF:
        marker = data[at + 1]
        if marker in _FRAMES:
            length, depth, height, width, components = _FRAME.unpack_from(data, at + 2)
            if depth != 8 or not (width and height) or length != 8 + 3 * components or components not in (1, 3):
                return None
            return Header("JPEG", width, height, "RGB" if components == 3 else "L")
        if marker in _WITHOUT_LENGTH:
            return None
        at += 2 + (data[at + 2] << 8 | data[at + 3])
    return None


def read_header(data: bytes, *, pixel_limit: int = PIXEL_LIMIT) -> Header:
    """Format, size and mode, without decoding.

    A picture without its proper end is decoded nevertheless: it may be cut off.

    Raises:
        DataFault: no picture, cut off, or of more than `pixel_limit` pixels.
    """
    header = _jpeg_header(data)
    if header is not None and header.width * header.height <= pixel_limit and _JPEG_END in data[-_TAIL:]:
        return header
    image = _opened(data, pixel_limit)
    ends = image.format in ("JPEG", "MPO") and _JPEG_END not in data[-_TAIL:]
    if ends or (image.format == "PNG" and b"IEND" not in data[-_TAIL:]):
        _decoded(image)
    return Header(image.format or "?", image.width, image.height, image.mode)


def decode_check(data: bytes, *, pixel_limit: int = PIXEL_LIMIT) -> Header:
    """As `read_header`, having decoded everything (a JPEG at an eighth of its scale: every bit is read all the same)."""
    image = _opened(data, pixel_limit)
    header = Header(image.format or "?", image.width, image.height, image.mode)
    if image.format == "JPEG":
        image.draft(image.mode, (1, 1))
    _decoded(image)
    return header


def to_rgb(image: Image.Image) -> Image.Image:
    """Upright by its EXIF tag, transparency on white, 16-bit grey to 8, CMYK and palette to RGB."""
    if image.getexif().get(_ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode == "RGB":
        return image
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(ground, image).convert("RGB")
    if image.mode.startswith("I;16"):
        return image.convert("I").point(lambda value: value / 256).convert("L").convert("RGB")
    return image.convert("RGB")


def reencode(data: bytes, how: Reencoding, *, pixel_limit: int = PIXEL_LIMIT) -> bytes:
    """The picture as `how` says, encoded.

    Raises:
        DataFault: it cannot be decoded, or has more than `pixel_limit` pixels.
    """
    image = _opened(data, pixel_limit)
    longest = max(image.size)
    small = how.max_side is None or longest <= how.max_side
    if small and how.quality is None and image.format == how.format.upper() and image.mode == "RGB":
        if image.getexif().get(_ORIENTATION, 1) == 1:
            _decoded(image)
            return data
    if not small and image.format == "JPEG":
        image.draft(
            "RGB", (how.max_side * 2, how.max_side * 2)
        )  # decodes at 1/2, 1/4, 1/8: never below twice the target
    _decoded(image)
    image = to_rgb(image)
    if how.max_side is not None and max(image.size) > how.max_side:
        scale = how.max_side / max(image.size)
        size = tuple(max(1, round(side * scale)) for side in image.size)
        image = image.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)
    buffer = io.BytesIO()
    image.save(buffer, how.format.upper(), quality=85 if how.quality is None else how.quality)
    return buffer.getvalue()
