"""Encoded image → uint8 square tensor in the worker; normalised per batch on the device.

The square squash, bicubic filter and mean/std are the official ones (cn_clip 1.6.0). Resizing runs
on uint8, which is several times faster than Pillow's and within 1/255 of it; turning each image
into floats in the worker would cost more than decoding it.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from PIL import Image, ImageOps

from data_tools.errors import DataFault

try:
    import simplejpeg
except ImportError:  # Pillow decodes the same pixels, a third slower (extra `fast`)
    simplejpeg = None

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
PIXEL_LIMIT = 178_956_970  # Pillow's own bound for a decompression bomb
DECODER = "simplejpeg" if simplejpeg else "pillow"  # they choose their reduced scales differently
_ORIENTATION = 0x0112
_XMP = b"http://ns.adobe.com/xap/1.0/\0"
# Since version 13 Pillow resamples down before across where the height shrinks by more than twice as much.
_PILLOW_TALL_FIRST = int(PIL.__version__.split(".")[0]) >= 13


def _to_rgb(image: Image.Image) -> Image.Image:
    """RGB, upright by its EXIF tag, transparency laid on white (as a browser shows it)."""
    if image.getexif().get(_ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode == "RGB":
        return image
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(ground, image).convert("RGB")
    if image.mode.startswith("I;16"):
        # Pillow would clip 16-bit grey at 255; keep its range instead.
        return Image.fromarray((np.asarray(image, dtype=np.uint16) >> 8).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def decode(source: bytes | memoryview | str | Path | Image.Image, size: int, *, reduced: bool = False) -> torch.Tensor:
    """Decode one picture and squash it to a square.

    Args:
        source: encoded bytes, a path, or a Pillow image.
        size: side of the square in pixels.
        reduced: let a JPEG decode at a half of its scale or less, never below `size`. Much faster for
            large photos and no longer within 1/255 of the full decoding: for training, not for evaluation.

    Returns:
        uint8 ``[3, size, size]``, RGB; in memory the channels lie together.

    Raises:
        DataFault: it cannot be decoded, or has more than 179 million pixels.
    """
    try:
        encoded = isinstance(source, (bytes, memoryview))
        pixels = _decode_plain_jpeg(source, size, reduced) if encoded and simplejpeg else None
        if pixels is not None:
            return resize(torch.from_numpy(pixels).permute(2, 0, 1), size)
        if isinstance(source, Image.Image):
            image = source
        else:
            image = Image.open(io.BytesIO(source) if encoded else source)
        if image.width * image.height > PIXEL_LIMIT:
            raise DataFault(
                f"the image has {image.width}×{image.height} pixels, more than {PIXEL_LIMIT:,}",
                mend="Shrink it or leave it out.", kind="image-too-large", file=_name(source),
            )  # fmt: skip
        if reduced and image.format == "JPEG":
            image.draft("RGB", (size, size))
        pixels = np.array(_to_rgb(image))
    except DataFault:
        raise
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise DataFault(
            f"the image cannot be decoded ({error})", mend="Replace it or leave it out.",
            kind="undecodable-image", file=_name(source),
        ) from None  # fmt: skip
    return resize(torch.from_numpy(pixels).permute(2, 0, 1), size)


def _decode_plain_jpeg(data: bytes | memoryview, size: int, reduced: bool) -> np.ndarray | None:
    """uint8 ``[h, w, 3]``, upright, of a grey or colour JPEG, whole the very pixels Pillow gives; None leaves it to Pillow."""
    try:
        orientation = _jpeg_orientation(data) if data[:3] == b"\xff\xd8\xff" else None
        if orientation is None:
            return None
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if height * width > PIXEL_LIMIT or colours not in ("YCbCr", "Gray"):
            return None
        # Scales between 1/2 and 1 would take longer than all of it: they have no vector code.
        scaled = {"min_height": size, "min_width": size, "min_factor": 2} if reduced else {}
        return _upright(simplejpeg.decode_jpeg(data, **scaled), orientation)
    except (ValueError, IndexError, SyntaxError, struct.error):  # damaged: Pillow says how
        return None


def _jpeg_orientation(data: bytes | memoryview) -> int | None:
    """The orientation (1…8, EXIF 2.3) in the segments before the picture; None where only Pillow may know."""
    at, exif, xmp = 2, None, None
    while data[at] == 0xFF:
        marker, length = data[at + 1], data[at + 2] << 8 | data[at + 3]
        if marker == 0xDA:  # the picture itself
            return _orientation(exif, xmp)
        segment = bytes(data[at + 4 : at + 2 + length]) if marker == 0xE1 else b""
        if segment.startswith(b"Exif\0\0"):
            if exif is not None:  # in parts
                return None
            exif = segment
        elif segment.startswith(_XMP):
            xmp = segment
        filling = marker == 0xFF  # any number of these may stand before a marker
        at += 1 if filling else 2 + length
    return None


def _orientation(exif: bytes | None, xmp: bytes | None) -> int | None:
    """What EXIF says goes before what XMP says, as with Pillow."""
    found: Any = None
    if exif is not None:
        tags = Image.Exif()
        tags.load(exif)
        found = tags.get(_ORIENTATION)
    if found is None and xmp is not None and (match := re.search(rb'tiff:Orientation(?:="|>)([0-9])', xmp)):
        found = int(match[1])
    if found is None:
        return 1
    return found if found in range(1, 9) else None


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    if orientation == 1:
        return pixels
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def _name(source: object) -> str | None:
    return str(source) if isinstance(source, (str, Path)) else None


def resize(pixels: torch.Tensor, size: int) -> torch.Tensor:
    """uint8 ``[3, h, w]`` → uint8 ``[3, size, size]``, antialiased bicubic, within 1/255 of Pillow's."""
    height, width = pixels.shape[1:]
    if (height, width) == (size, size):
        return pixels
    # Not `pixels.unsqueeze(0)`: by its strides torch would take it for planes, and lay out what it returns as such.
    batch = pixels.permute(1, 2, 0).unsqueeze(0).permute(0, 3, 1, 2)
    if _PILLOW_TALL_FIRST and height - size > 2 * max(width - size, 0):
        # Between the two passes values are cut to 0…255, so their order shows (up to 8/255): take Pillow's.
        batch = _interpolate(batch, (size, width))
    return _interpolate(batch, (size, size))[0]


def _interpolate(batch: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return torch.nn.functional.interpolate(batch, size=size, mode="bicubic", antialias=True)


def normalise(
    pixels: torch.Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """uint8 ``[n, 3, h, w]`` → `dtype`, ``(x / 255 − mean) / std`` per channel, on the tensor's device.

    One multiplication and one addition: the division by 255 is folded into both.
    """
    scale = torch.tensor([1 / (255 * s) for s in std], device=pixels.device).view(1, 3, 1, 1)
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=pixels.device).view(1, 3, 1, 1)
    return torch.addcmul(shift, pixels.to(torch.float32), scale).to(dtype).contiguous()
