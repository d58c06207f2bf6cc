"""Headers, limits and re-encoding of pictures."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from data_tools.errors import DataFault, RequestError
from data_tools.pictures import Header, Reencoding, decode_check, plain_jpeg, read_header, reencode
from tests.data_tools.samples import picture


def encoded(image: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few hundred bytes that says it has many pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_headers_of_the_usual_formats(format: str) -> None:
    header = read_header(picture(1, (40, 30), format))
    assert (header.format, header.width, header.height) == (format, 40, 30)
    assert decode_check(picture(1, (40, 30), format)) == header


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"quality": 30, "subsampling": 2}, {"comment": b"\xff\xd9" * 99}]
)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_the_quick_look_at_a_jpeg_says_what_pillow_says(mode: str, options) -> None:
    image = Image.new(mode, (123, 45))
    exif = Image.Exif()
    exif[0x010E] = "a long description " * 500
    for data in (encoded(image, "JPEG", **options), encoded(image, "JPEG", exif=exif, **options)):
        found = plain_jpeg(data)
        assert (found is None) == (mode == "CMYK")
        with Image.open(io.BytesIO(data)) as opened:
            assert read_header(data) == Header(opened.format, *opened.size, opened.mode)
        assert read_header(data) == Header("JPEG", 123, 45, mode)


@pytest.mark.parametrize("at", range(0, 700, 7))
def test_the_quick_look_never_sees_what_pillow_does_not(at: int) -> None:
    """With one byte changed: either they agree, or the quick one leaves it to Pillow."""
    data = bytearray(picture(3, (123, 45)))
    data[at % len(data)] ^= 0x5A
    found = plain_jpeg(bytes(data))
    if found is not None:
        try:
            with Image.open(io.BytesIO(data)) as opened:
                assert found.width * found.height == opened.width * opened.height
        except OSError:
            assert at > 2  # a damaged table: found by decoding, as Pillow would find it there
    for cut in (at, len(data) - 1):
        plain_jpeg(bytes(data[:cut]))


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"", "undecodable-image"),
        (b"text, no picture", "undecodable-image"),
        (picture(1)[:200], "undecodable-image"),
        (picture(1, format="PNG")[:-30], "undecodable-image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "undecodable-image"),
        (bomb(30_000, 30_000), "image-too-large"),
        (bomb(300_000, 300_000), "image-too-large"),
    ],
)
def test_what_is_refused(data: bytes, kind: str) -> None:
    for look in (read_header, decode_check, lambda data: reencode(data, Reencoding(64))):
        with pytest.raises(DataFault) as caught:
            look(data)
        assert caught.value.kind == kind


def test_the_pixel_limit_can_be_chosen() -> None:
    assert read_header(picture(1, (40, 30)), pixel_limit=1200).width == 40
    with pytest.raises(DataFault, match="40×30"):
        read_header(picture(1, (40, 30)), pixel_limit=1199)


def test_a_picture_with_something_behind_its_end_is_whole() -> None:
    assert read_header(picture(1) + b"made by a camera" * 1000).format == "JPEG"


@pytest.mark.parametrize("format", ["jpeg", "webp"])
def test_large_pictures_become_small(format: str) -> None:
    image = Image.open(io.BytesIO(reencode(picture(1, (900, 600)), Reencoding(96, 80, format))))
    assert (image.format, image.size, image.mode) == (format.upper(), (96, 64), "RGB")


def test_shrinking_keeps_what_is_seen() -> None:
    ramp = np.linspace(0, 255, 800, dtype=np.uint8)[None, :, None].repeat(400, 0).repeat(3, 2)
    small = np.asarray(
        Image.open(io.BytesIO(reencode(encoded(Image.fromarray(ramp), "JPEG", quality=95), Reencoding(80, 95))))
    )
    wanted = np.linspace(0, 255, 80)[None, :, None]
    assert small.shape == (40, 80, 3) and np.abs(small - wanted).mean() < 3


def test_what_is_small_enough_stays_as_it_came() -> None:
    data = picture(1, (60, 40))
    assert reencode(data, Reencoding(64)) is data
    assert reencode(data, Reencoding(64, quality=30)) != data
    assert reencode(data, Reencoding(64, format="webp"))[:4] == b"RIFF"


def test_exif_orientation_is_applied() -> None:
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:, :30] = 255  # left half white
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter clockwise to see it upright: the left side comes to the top
    turned = np.asarray(
        Image.open(io.BytesIO(reencode(encoded(Image.fromarray(pixels), "JPEG", exif=exif), Reencoding(64))))
    )
    assert turned.shape == (60, 40, 3)
    assert turned[:25].mean() > 240 and turned[-25:].mean() < 15


def test_transparency_lies_on_white() -> None:
    pixels = np.zeros((32, 32, 4), np.uint8)  # black, invisible
    pixels[:16, :, 3] = 255
    for data in (encoded(Image.fromarray(pixels), "PNG"), encoded(Image.fromarray(pixels).quantize(8), "PNG")):
        image = np.asarray(Image.open(io.BytesIO(reencode(data, Reencoding(64, 95)))))
        assert image[:12].mean() < 10 and image[20:].mean() > 245


def test_cmyk_palette_and_deep_grey_become_rgb() -> None:
    red = Image.new("RGB", (32, 32), (200, 30, 30))
    for image, format in ((red.convert("CMYK"), "JPEG"), (red.quantize(8), "PNG"), (red.quantize(8), "GIF")):
        found = np.asarray(Image.open(io.BytesIO(reencode(encoded(image, format), Reencoding(64, 95)))))
        assert found.shape == (32, 32, 3) and np.abs(found.mean((0, 1)) - (200, 30, 30)).max() < 12
    grey = encoded(Image.fromarray(np.full((32, 32), 40_000, np.uint16)), "PNG")
    assert abs(np.asarray(Image.open(io.BytesIO(reencode(grey, Reencoding(64, 95))))).mean() - 156) < 3


@pytest.mark.parametrize(
    "wrong", [{"max_side": 8}, {"quality": 0}, {"quality": 101}, {"max_side": 64, "format": "png"}]
)
def test_senseless_requests_are_refused(wrong) -> None:
    with pytest.raises(RequestError):
        Reencoding(**wrong)
