"""Any Pillow picture as 8-bit RGB, the way up it is to be seen, on white: the one such conversion there is."""

from __future__ import annotations

from typing import Any

from PIL import Image

from data_tools.metadata import orientation_in

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}  # fmt: skip
_TRANSPARENT = ("RGBA", "LA", "PA", "RGBa", "La")


def orientation_of(image: Image.Image) -> int:
    """1 to 8, by EXIF, else by XMP. One odd tag among them does not matter."""
    info = image.info
    if "exif" in info or "xmp" in info:
        exif, xmp = (info.get(key) or b"" for key in ("exif", "xmp"))
        return orientation_in(exif if isinstance(exif, bytes) else b"", xmp if isinstance(xmp, bytes) else b"")
    try:
        found = image.getexif().get(0x0112, 1)
    except Exception:  # noqa: BLE001 - tags can be anything
        return 1
    return found if found in range(1, 9) else 1


def to_rgb(image: Image.Image, orientation: int | None = None) -> Image.Image:
    """Upright, transparency on white, palette and CMYK as colours, and grey of 16 bits and more as 8.

    Grey of 16 bits keeps its upper eight. Floats and 32-bit numbers say nothing of their range, so the values decide:
    0 to 1 (floats only), 0 to 255 and 0 to 65,535 are taken for that; anything else is spread from least to greatest.

    Args:
        orientation: as in EXIF; None looks it up.
    """
    turn = _TURNS.get(orientation_of(image) if orientation is None else orientation)
    if turn is not None:
        image = image.transpose(turn)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _eight_bits(image).convert("RGB")
    if image.mode in _TRANSPARENT or "transparency" in image.info:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(ground, image).convert("RGB")
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    import numpy as np

    values: Any = np.asarray(image)
    transparent = image.info.get("transparency")
    if image.mode.startswith("I;16") or image.format == "PNG":  # a PNG's grey has 16 bits, whatever Pillow calls it
        grey = (values >> 8).astype(np.uint8)
        if isinstance(transparent, int):
            grey[values == transparent] = 255
        return Image.fromarray(grey)
    values = values.astype(np.float32)
    finite = np.isfinite(values)
    if not finite.all():
        values = np.where(finite, values, values[finite].min() if finite.any() else 0)
    least, most = float(values.min()), float(values.max())
    if least < 0 or most > 65535:
        values, most = values - least, most - least
        top = most or 1.0
    else:
        top = 1.0 if most <= 1 and image.mode == "F" else 255.0 if most <= 255 else 65535.0
    return Image.fromarray((values * (255 / top) + 0.5).astype(np.uint8))
