"""Pictures as towers take them, within one of 255 of Pillow and of the processors of others."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from cnclip_ft.models.preprocessing import OPENAI_MEAN, OPENAI_STD, SquarePicture, normalise
from data_tools.errors import DataFault


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    # Hard edges on purpose: they overshoot between the two resampling passes.
    noise = np.random.default_rng(seed).integers(0, 2, (height // 4 + 1, width // 4 + 1, 3)) * 255
    return Image.fromarray(np.kron(noise, np.ones((4, 4, 1)))[:height, :width].astype(np.uint8))


def decode(source, size: int, **options) -> torch.Tensor:
    return SquarePicture(size).decode(source, **options)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    "size", [(500, 375), (333, 500), (206, 294), (100, 60), (224, 224), (224, 500), (900, 224), (61, 640)]
)
def test_squash_is_within_one_of_pillow(size):
    image = picture(*size)
    theirs = torch.from_numpy(np.array(image.resize((224, 224), Image.Resampling.BICUBIC))).permute(2, 0, 1)
    ours = decode(encoded(image), 224)
    assert ours.shape == (3, 224, 224) and ours.dtype == torch.uint8
    assert (ours.int() - theirs.int()).abs().max() <= 1


@pytest.mark.parametrize("shape", [(300, 100), (100, 300), (64, 64), (500, 65)])
def test_channels_lie_together_in_memory(shape):
    for kind in ("PNG", "JPEG"):
        assert decode(encoded(picture(*shape), kind), 64).permute(1, 2, 0).is_contiguous()


CROPPED = [
    (500, 375),
    (333, 501),
    (206, 295),
    (60, 101),
    (224, 224),
    (900, 225),
    (61, 640),
    (1, 7),
    (9000, 3),
    (4, 6001),
]


@pytest.mark.parametrize("size", CROPPED)
@pytest.mark.parametrize("side", [224, 33])
def test_crop_is_within_one_of_pillow(size, side):
    """The shorter side to `side`, then the middle, as transformers' CLIPImageProcessor rounds both."""
    image, (width, height) = picture(*size), size
    wide, tall = (side, side * height // width) if width <= height else (side * width // height, side)
    left, top = (wide - side) // 2, (tall - side) // 2
    whole = image.resize((wide, tall), Image.Resampling.BICUBIC)
    theirs = torch.from_numpy(np.array(whole.crop((left, top, left + side, top + side)))).permute(2, 0, 1)
    ours = SquarePicture(side, "crop").decode(encoded(image))
    assert ours.shape == (3, side, side) and ours.permute(1, 2, 0).is_contiguous()
    assert (ours.int() - theirs.int()).abs().max() <= 1


def test_crop_takes_the_pixels_of_the_clip_processor():
    from transformers import CLIPImageProcessor

    image = picture(301, 200)
    theirs = CLIPImageProcessor(
        size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}, do_normalize=False, do_rescale=False
    )(image, return_tensors="pt")["pixel_values"][0]
    assert (SquarePicture(64, "crop").decode(image).int() - theirs.int()).abs().max() <= 1


@pytest.mark.parametrize("size", [(1000, 230), (230, 1000), (900, 460)])
def test_a_reduced_picture_still_fills_the_crop(monkeypatch, size):
    """A side below the square would be enlarged again."""
    seen = []
    monkeypatch.setattr(
        "cnclip_ft.models.preprocessing.crop", lambda pixels, side, _, even: seen.append(pixels.shape[1:])
    )
    for side in (224, 100):
        SquarePicture(side, "crop").decode(encoded(picture(*size), "JPEG"), reduced=True)
        assert min(seen[-1]) >= side
    assert min(seen[-1]) < min(size)


def test_what_decides_the_pixels_is_described():
    kinds = [
        SquarePicture(32),
        SquarePicture(33),
        SquarePicture(32, "crop"),
        SquarePicture(32, "crop_even"),
        SquarePicture(32, mean=(0.5,) * 3),
        SquarePicture(32, std=(0.5,) * 3),
        SquarePicture(32, input="uint8"),
    ]
    assert len({json.dumps(kind.describe()) for kind in kinds}) == len(kinds)
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert SquarePicture(32, input="uint8").normalise(pixels) is pixels
    assert torch.equal(SquarePicture(32).normalise(pixels), normalise(pixels, OPENAI_MEAN, OPENAI_STD))


def test_all_sources_agree(tmp_path):
    image = picture(80, 60)
    (tmp_path / "a.png").write_bytes(encoded(image))
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), image):
        assert torch.equal(decode(source, 32), decode(encoded(image), 32))


def test_modes_become_rgb():
    red = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert decode(encoded(red), 8)[:, 0, 0].tolist() == [255, 255, 255]  # transparent is white
    assert decode(encoded(Image.new("L", (8, 8), 7)), 8)[:, 0, 0].tolist() == [7, 7, 7]
    grey16 = Image.fromarray(np.full((8, 8), 51400, dtype=np.uint16))
    assert decode(encoded(grey16), 8)[:, 0, 0].tolist() == [200, 200, 200]
    for mode in ("P", "1", "LA", "CMYK"):
        kind = "TIFF" if mode == "CMYK" else "PNG"
        assert decode(encoded(Image.new("RGB", (8, 8), "blue").convert(mode), kind), 8).shape == (3, 8, 8)


def test_exif_orientation_is_applied():
    image = Image.new("RGB", (40, 20), "red")
    image.paste("blue", (0, 0, 40, 5))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    pixels = decode(encoded(image, "PNG", exif=exif), 20)
    assert pixels[2, 0, 10] < 60 < 200 < pixels[2, 19, 10]


def test_reduced_decoding_never_goes_below_the_target():
    image = Image.fromarray(np.tile(np.linspace(0, 255, 1000, dtype=np.uint8)[None, :, None], (800, 1, 3)))
    data = encoded(image, "JPEG", quality=95)
    full, reduced = decode(data, 224), decode(data, 224, reduced=True)
    assert (full.int() - reduced.int()).abs().max() <= 3
    small = encoded(picture(300, 300), "JPEG")
    assert torch.equal(decode(small, 224), decode(small, 224, reduced=True))


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
XMP_ELEMENT = b"<x:xmpmeta><tiff:Orientation>%d</tiff:Orientation></x:xmpmeta>"


@pytest.mark.parametrize(
    "options",
    [
        {"subsampling": 0},
        {"subsampling": 2},
        {"progressive": True},
        {"quality": 5},
        {"restart_marker_rows": 1},
        {"xmp": XMP},
        *({"exif": turned(n)} for n in range(1, 10)),
        {"exif": Image.Exif()},
        {"exif": b"Exif\0\0II*\0"},
        {"exif": turned(1), "xmp": XMP},
        {"exif": turned(6), "comment": b"\xff\xda before it"},
        {"comment": b"Exif\0\0 in words"},
        {"icc_profile": bytes(70_000), "exif": turned(8)},
        {"xmp": b"<x:xmpmeta/>"},
        {"exif": Image.Exif(), "xmp": XMP},
        *({"xmp": XMP_ELEMENT % n} for n in (0, 3, 5, 9, 12)),
        {"exif": turned(9), "xmp": XMP},
        {"exif": b"Exif\0\0II*\0", "xmp": XMP},
    ],
)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_the_fast_decoder_gives_pillow_s_pixels(monkeypatch, mode, options):
    """Extra `fast`: an installation without it computes the same."""
    pytest.importorskip("simplejpeg")
    data = encoded(picture(101, 77).convert(mode), "JPEG", **options)
    fast = decode(data, 48)
    assert torch.equal(decode(memoryview(data), 48), fast)
    monkeypatch.setattr("cnclip_ft.models.preprocessing.simplejpeg", None)
    assert torch.equal(fast, decode(memoryview(data), 48))


def test_a_photo_from_a_picture_editor_is_decoded_fast(monkeypatch):
    pytest.importorskip("simplejpeg")
    data = encoded(picture(64, 48), "JPEG", exif=turned(6), xmp=XMP)
    upright = decode(data, 32)
    monkeypatch.setattr(Image, "open", None)
    assert torch.equal(decode(data, 32), upright)


def test_exif_in_two_parts_is_one(monkeypatch):
    data = encoded(picture(64, 48), "JPEG", exif=turned(1))
    at, end = data.index(b"\xff\xe1"), data.index(b"\xff\xdb")
    twice = data[:end] + data[at:end] + data[end:]
    fast = decode(twice, 32)
    monkeypatch.setattr("cnclip_ft.models.preprocessing.simplejpeg", None)
    assert torch.equal(fast, decode(twice, 32))


def test_filling_before_a_marker_hides_no_orientation():
    data = encoded(picture(64, 64), "JPEG", exif=turned(3))
    at = data.index(b"\xff\xe1")
    assert torch.equal(decode(data[:at] + b"\xff\xff" + data[at:], 32), decode(data, 32))
    assert not torch.equal(decode(data, 32), decode(encoded(picture(64, 64), "JPEG"), 32))


def test_a_torn_jpeg_is_a_fault_for_both_decoders(monkeypatch):
    data = encoded(picture(200, 200), "JPEG")
    for end in (len(data) // 2, len(data) - 200):
        with pytest.raises(DataFault, match="cannot be decoded"):
            decode(data[:end], 48)
    monkeypatch.setattr("cnclip_ft.models.preprocessing.simplejpeg", None)
    with pytest.raises(DataFault, match="cannot be decoded"):
        decode(data[: len(data) // 2], 48)


@pytest.mark.parametrize("data", [b"", b"no image", encoded(picture(50, 50), "JPEG")[:400]])
def test_broken_bytes_are_a_fault(data):
    with pytest.raises(DataFault, match="no readable image"):
        decode(data, 32)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataFault, match="gone.jpg"):
        decode(tmp_path / "gone.jpg", 32)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", None])
def test_bombs_are_refused(kind):
    image = picture(10, 10)
    with pytest.raises(DataFault, match="10×10 pixels"):
        decode(encoded(image, kind) if kind else image, 32, pixel_limit=99)


def test_normalise_equals_the_plain_formula():
    pixels = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (OPENAI_MEAN, OPENAI_STD))
    torch.testing.assert_close(
        normalise(pixels, OPENAI_MEAN, OPENAI_STD), (pixels / 255 - mean) / std, atol=1e-6, rtol=0
    )
    assert normalise(pixels, OPENAI_MEAN, OPENAI_STD, torch.bfloat16).dtype == torch.bfloat16
