"""Every kind of picture as upright 8-bit RGB, whatever its metadata say, and nothing of them in what is made of it."""

from __future__ import annotations

import io
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin

from data_tools import pictures
from data_tools.errors import DataFault, RequestError
from data_tools.metadata import bare, jpeg_scans, jpeg_start
from data_tools.pictures import Reencoding, decode_check, open_upright, read_file, read_header, reencode, thumbnail
from tests.data_tools.samples import picture
from tests.data_tools.test_pictures import bomb, encoded

SECRET = b"SECRET 31.2304N 121.4737E"


def rgb(data: bytes) -> np.ndarray:
    return np.asarray(open_upright(data)).astype(int)


def grey(values: np.ndarray, mode: str | None = None) -> bytes:
    return encoded(Image.fromarray(values, mode), "TIFF")


RAMP = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)


@pytest.mark.parametrize(
    "data",
    [
        grey(RAMP),
        grey(RAMP * 255),
        grey(RAMP * 65535),
        grey(RAMP * 9e6 - 4e6),
        grey((RAMP * 65535).astype(np.int32)),
        grey((RAMP * 2e9 - 1e9).astype(np.int32)),
        grey((RAMP * 65535).astype(np.uint16)),
        grey((RAMP * 65535).astype(">u2")),
        encoded(Image.fromarray((RAMP * 65535).astype(np.uint16)), "PNG"),
        grey((RAMP * 255).astype(np.uint8)),
        encoded(Image.fromarray((RAMP * 255).astype(np.uint8)), "PPM"),
    ],
)
def test_grey_of_any_depth_keeps_its_steps(data: bytes) -> None:
    found = rgb(data)
    assert found.shape == (16, 16, 3)
    assert np.abs(found[..., 0] - RAMP * 255).max() <= 1


def test_numbers_that_are_none_and_flat_pictures() -> None:
    odd = RAMP.copy()
    odd[0, :3] = np.nan, np.inf, -np.inf
    assert rgb(grey(odd))[0, :3].max() == 3 and rgb(grey(odd)).max() == 255
    for value in (-7.0, 0.0, 1e9):
        assert np.ptp(rgb(grey(np.full((4, 4), value, np.float32)))) == 0


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I", "F"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    image = Image.new("RGB", (9, 7), "white")
    image = image.convert("L").convert(mode) if mode in ("I;16", "I", "F") else image.convert(mode)
    found = pictures.upright(image)
    assert (found.mode, found.size) == ("RGB", (9, 7))


def test_transparency_of_palettes_and_of_deep_grey_lies_on_white() -> None:
    values = np.full((8, 8), 40_000, np.uint16)
    values[:, 4:] = 7
    found = rgb(encoded(Image.fromarray(values), "PNG", transparency=7))
    assert found[0, 0, 0] == 156 and found[0, 7, 0] == 255
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert rgb(encoded(palette, "PNG", transparency=1)).min() == 255
    assert rgb(encoded(palette, "GIF", transparency=1)).min() == 255


def exif_block(*entries: tuple[int, int, int, bytes]) -> bytes:
    at, table, body = 8 + 2 + 12 * len(entries) + 4, b"", b""
    for tag, kind, count, data in entries:
        inside = len(data) <= 4
        table += struct.pack("<HHL", tag, kind, count)
        table += data.ljust(4, b"\0") if inside else struct.pack("<L", at + len(body))
        body += b"" if inside else data
    return b"Exif\0\0II" + struct.pack("<HLH", 42, 8, len(entries)) + table + bytes(4) + body


TURN = (0x0112, 3, 1, struct.pack("<H", 6))
ODD = {
    "rational": exif_block(TURN, (0x011A, 10, 1, struct.pack("<ll", -1, 0))),
    "width": exif_block((0x0100, 2, 6, b"hello\0"), TURN),
    "kind": exif_block(TURN, (0x9999, 77, 3, b"abc")),
    "behind the end": exif_block((0x010E, 2, 2**31, b""), TURN),
    "many": exif_block(*[(tag, 7, 2**20, bytes(5)) for tag in range(1, 0x0112)], TURN),
}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "AVIF"])
def test_one_odd_tag_neither_refuses_a_picture_nor_hides_its_orientation(format: str, odd: str) -> None:
    image = Image.fromarray(np.kron(np.arange(6).reshape(2, 3) * 40, np.ones((20, 20))).astype(np.uint8)).convert("RGB")
    try:
        data = encoded(image, format, exif=ODD[odd])
    except Exception as error:  # noqa: BLE001 - Pillow's AVIF writer reads the tags itself
        pytest.skip(f"Pillow writes none: {error}")
    found = rgb(data)
    assert found.shape == (60, 40, 3)
    assert np.abs(found - np.asarray(image.transpose(Image.Transpose.ROTATE_270)).astype(int)).mean() < 6
    for look in (read_header, decode_check, lambda data: reencode(data, Reencoding(16))):
        look(data)


@pytest.mark.parametrize("turn", range(0, 10))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_the_orientation_is_pillow_s(format: str, turn: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = turn
    data = encoded(Image.open(io.BytesIO(picture(3, (40, 30)))), format, exif=exif)
    theirs = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    assert np.array_equal(rgb(data), theirs)
    lazy, loaded = (Image.open(io.BytesIO(data)) for _ in range(2))  # a TIFF is turned when it is loaded
    loaded.load()
    for image in (lazy, loaded, lazy):
        assert np.array_equal(np.asarray(pictures.upright(image)), theirs)


def test_what_is_damaged_is_called_by_what_it_begins_as() -> None:
    double = struct.pack("<2sHLH", b"II", 42, 8, 1) + struct.pack("<HHLL", 258, 3, 1, 64) + bytes(4)
    for data, said in ((double, "as a TIFF"), (b"\x89PNG\r\n\x1a\n", "as a PNG"), (b"\xff\xd8\xff\xd9", "as a JPEG")):
        with pytest.raises(DataFault, match=said) as fault:
            open_upright(data)
        assert "TIFF, PPM" not in str(fault.value)
    with pytest.raises(DataFault, match="no pixels"):
        pictures.upright(Image.new("RGB", (0, 5)))


def test_an_orientation_in_the_texts_of_a_png() -> None:
    image, profile = Image.new("RGB", (40, 30)), ODD["rational"]
    text = f"\nexif\n{len(profile):8}\n{profile.hex()}\n"
    for key, value, packed in (("Raw profile type exif", text, True), ("Raw profile type exif", text, False)):
        info = PngImagePlugin.PngInfo()
        info.add_text(key, value, zip=packed)
        assert open_upright(encoded(image, "PNG", pnginfo=info)).size == (30, 40)
    for packed in (True, False):
        info = PngImagePlugin.PngInfo()
        info.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="6"/>', zip=packed)
        assert open_upright(encoded(image, "PNG", pnginfo=info)).size == (30, 40)


def with_metadata() -> dict[str, bytes]:
    image, exif = Image.open(io.BytesIO(picture(1, (90, 60)))), Image.Exif()
    exif[0x010E] = SECRET.decode()
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", SECRET.decode())
    text.add_itxt("XML:com.adobe.xmp", SECRET.decode())
    more = {"exif": exif, "xmp": b"<x>" + SECRET, "icc_profile": SECRET}
    return {
        "JPEG": encoded(image, "JPEG", comment=SECRET, **more), "WEBP": encoded(image, "WEBP", **more),
        "PNG": encoded(image, "PNG", pnginfo=text, exif=exif, icc_profile=SECRET),
        "GIF": encoded(image, "GIF", comment=SECRET), "TIFF": encoded(image, "TIFF", exif=exif, icc_profile=SECRET),
        "AVIF": encoded(image, "AVIF", **more),
    }  # fmt: skip


@pytest.mark.parametrize("format", with_metadata())
def test_only_pixels_are_in_what_is_made_of_a_picture(format: str) -> None:
    data = with_metadata()[format]
    assert SECRET in data or format == "GIF"
    for how in (Reencoding(64, 80), Reencoding(4000, 80), Reencoding(64, 80, "webp"), Reencoding(64)):
        assert SECRET not in reencode(data, how)
    small, whole = thumbnail(data, 48), open_upright(data)
    for writer in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "AVIF"):
        assert SECRET not in encoded(small, writer) and SECRET not in encoded(whole, writer)


GIF = picture(1, format="GIF")


def long_gif(megabytes: int) -> bytes:
    data = encoded(Image.new("P", (8, 8), 3), "GIF")
    at = 13 + (3 << (data[10] & 7) + 1)
    block = b"\x21\xfe" + (b"\xff" + b"x" * 255) * (megabytes * 4096) + b"\0"
    return data[:at] + block + data[at:]


def progressive(width: int, height: int, scans: int) -> bytes:
    data = encoded(Image.new("RGB", (width, height), (90, 30, 10)), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * scans + data[-2:]


def png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def with_chunks(*chunks: bytes) -> bytes:
    data = picture(1, format="PNG")
    return data[:33] + b"".join(chunks) + data[33:]


def shared_tags() -> bytes:
    """A TIFF of a MiB whose tags all name the same MiB."""
    entries = b"".join(struct.pack("<HHLL", tag, 7, 2**20, 8) for tag in range(1, 4000))
    return b"II*\0" + struct.pack("<L", 8 + 2**20) + bytes(2**20) + struct.pack("<H", 3999) + entries + bytes(4)


def test_scans_are_counted_and_bounded_before_decoding() -> None:
    assert jpeg_scans(picture(1), jpeg_start(picture(1)), 99) == 1
    for scans in (0, 40):
        data = progressive(300, 200, scans)
        assert jpeg_scans(data, jpeg_start(data), 999) == data.count(b"\xff\xda") == 10 + scans
        assert decode_check(data).width == 300
    # What looks like a scan in a comment, or behind the end (a phone's film), is none.
    assert (
        decode_check(encoded(Image.new("RGB", (30, 20)), "JPEG", progressive=True, comment=b"\xff\xda" * 999)).width
        == 30
    )
    assert decode_check(progressive(30, 20, 0) + b"\xff\xda\0\2" * 999).width == 30
    odd = progressive(300, 200, 200)
    for data in (odd, odd[:2] + b"\xff\x01" + odd[2:], odd[:2] + b"\xff\xff\xff" + odd[2:]):
        for look in (read_header, decode_check, open_upright, lambda data: reencode(data, Reencoding(16))):
            with pytest.raises(DataFault) as caught:
                look(data)
            assert caught.value.kind in ("too-many-scans", "undecodable-image")


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        (lambda: long_gif(16), (8, 8)),
        (lambda: progressive(8000, 8000, 100), "too-many-scans"),
        (lambda: with_chunks(png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**25)))), (32, 24)),
        (lambda: with_chunks(png_chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(2**25)))), (32, 24)),
        (lambda: with_chunks(b"\0\0\0\1tEXta\1\2\3\4"), (32, 24)),  # a wrong checksum, of no pixel
        (shared_tags, "undecodable-image"),
        (lambda: picture(1)[:2] + b"\xff\xec\0\2" * 5_000_000 + picture(1)[2:], "undecodable-image"),
        (lambda: picture(1)[:2] + b"\xff" * 20_000_000 + picture(1)[2:], "undecodable-image"),
        (lambda: progressive(30, 20, 0)[:-2] + b"\xff\xec\0\2" * 5_000_000 + b"\xff\xd9", "too-many-scans"),
        (
            lambda: picture(1, format="PNG")[:33] + png_chunk(b"IDAT", b"") * 1_000_000 + picture(1, format="PNG")[33:],
            "undecodable-image",
        ),
        (lambda: encoded(Image.new("L", (1, 65_000)), "PNG"), (1, 65_000)),
        (lambda: encoded(Image.new("L", (65_000, 1)), "JPEG"), (65_000, 1)),
        (lambda: bomb(100_000_000, 1), "image-too-large"),
        (lambda: encoded(Image.new("1", (1, 70_000)), "TIFF"), "image-too-large"),
        (lambda: GIF[:6] + struct.pack("<HH", 20_000, 9_000) + GIF[10:], "image-too-large"),
        (
            lambda: encoded(
                Image.new("P", (9, 9)),
                "GIF",
                save_all=True,
                append_images=[Image.new("P", (9, 9), n) for n in range(250)],
            ),
            (9, 9),
        ),
    ],
)
def test_what_is_made_to_cost_costs_little(data, wanted) -> None:
    content = data()
    began = time.process_time()
    if isinstance(wanted, str):
        with pytest.raises(DataFault) as caught:
            open_upright(content)
        assert caught.value.kind == wanted
    else:
        assert open_upright(content).size == wanted
        small = thumbnail(content, 112, enlarge=True)
        assert max(small.size) == 112 and min(small.size) >= 1
    assert time.process_time() - began < 3  # seconds or minutes without the limits


def test_the_first_of_several_frames_is_the_picture() -> None:
    frames = [Image.new("RGB", (30, 20), colour) for colour in ("red", "blue", "lime")]
    for format in ("GIF", "PNG", "WEBP", "TIFF", "AVIF", "MPO"):
        data = encoded(frames[0], format, save_all=True, append_images=frames[1:])
        red, green, blue = rgb(data)[10, 10]
        assert red > 200 and green < 60 and blue < 60, format


def test_bare_leaves_pixels_alone() -> None:
    for format, data in with_metadata().items():
        plain, _ = bare(data)
        assert np.array_equal(
            np.asarray(Image.open(io.BytesIO(plain)).convert("RGB")),
            np.asarray(Image.open(io.BytesIO(data)).convert("RGB")),
        )
        assert SECRET not in plain or format in ("WEBP", "TIFF", "AVIF")  # these are opened as they are
    for end in range(0, 700, 3):
        for data in (picture(1), picture(1, format="PNG"), picture(1, format="GIF"), *ODD.values()):
            bare(data[:end])


def test_files_that_are_none_are_not_opened(tmp_path) -> None:
    import os

    os.mkfifo(tmp_path / "pipe.jpg")
    os.symlink("/dev/zero", tmp_path / "zero.jpg")
    for name in ("pipe.jpg", "zero.jpg", "gone.jpg", ".", "a\0b"):
        with pytest.raises(DataFault, match="cannot be read") as caught:
            read_file(f"{tmp_path}/{name}")
        assert caught.value.kind == "missing-file"


def test_limits_are_set_by_the_environment(monkeypatch) -> None:
    monkeypatch.setenv("CNCLIP_FT_PIXEL_LIMIT", "1_000")
    assert pictures._limit("CNCLIP_FT_PIXEL_LIMIT", 5) == 1000
    for wrong in ("0", "-1", "many", "1e9", "9" * 5000):
        monkeypatch.setenv("CNCLIP_FT_PIXEL_LIMIT", wrong)
        with pytest.raises(RequestError, match="CNCLIP_FT_PIXEL_LIMIT="):
            pictures._limit("CNCLIP_FT_PIXEL_LIMIT", 5)


def test_a_higher_limit_is_higher_than_pillow_s(monkeypatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
    data = picture(1, (40, 30), "PNG")
    with pytest.raises(DataFault, match="too large"):
        open_upright(data, pixel_limit=600)
    assert open_upright(data, pixel_limit=1200).size == (40, 30)
