"""Checking and re-encoding pictures while a store is built."""

from __future__ import annotations

import io
from typing import NamedTuple

from PIL import Image, ImageOps

from data_tools.errors import DataFault

PIXEL_LIMIT = 178_956_970
# A header that Pillow reads may stand before a torn body; a JPEG or PNG that ends as it should is taken as whole.
_ENDINGS = {"JPEG": (b"\xff\xd9",), "PNG": (b"IEND\xaeB`\x82",)}


class Header(NamedTuple):
    kind: str
    width: int
    height: int


def check_picture(data: bytes, *, decode: bool = False, **where) -> Header:
    """Format and size from the header; `decode` reads every pixel too.

    Raises:
        DataFault: it is no image, is torn, or has more pixels than fit (`where` names file, line and id).
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            header = Header(image.format or "?", image.width, image.height)
            if header.width * header.height > PIXEL_LIMIT:
                raise DataFault(f"the image has {header.width}×{header.height} pixels", kind="image-too-large",
                                mend=f"Shrink it below {PIXEL_LIMIT:,} pixels or leave it out.", **where)  # fmt: skip
            endings = _ENDINGS.get(header.kind)
            if decode or (endings and not data.rstrip(b"\0").endswith(endings)):
                image.load()
            return header
    except DataFault:
        raise
    except Image.DecompressionBombError as error:
        raise DataFault(str(error), kind="image-too-large", mend="Shrink it or leave it out.", **where) from None
    except Exception as error:  # noqa: BLE001 - decoders fail in many ways, each means the same to the user
        said = "it is empty" if not data else str(error).split(" <")[0]
        raise DataFault(f"not a readable image ({said})", kind="undecodable-image",
                        mend="Replace the picture or leave it out.", **where) from None  # fmt: skip


def shrink(data: bytes, max_side: int, quality: int = 90) -> bytes:
    """JPEG of at most `max_side` pixels a side: upright by its EXIF tag, transparency on white. Never enlarged."""
    with Image.open(io.BytesIO(data)) as image:
        if image.format == "JPEG":
            image.draft("RGB", (max_side, max_side))
        image = ImageOps.exif_transpose(image)
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
        image = image.convert("RGB")
        image.thumbnail((max_side, max_side), Image.Resampling.BICUBIC)
        out = io.BytesIO()
        image.save(out, "JPEG", quality=quality)
        return out.getvalue()
