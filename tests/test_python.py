"""The package as a Python user meets it: its names, its types, what `load` and the two encoders take."""

from __future__ import annotations

import io
import subprocess
import sys
import tracemalloc
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import cnclip_ft
from cnclip_ft.models.checkpoints import save_checkpoint
from data_tools.errors import DataFault, RequestError
from tests.models.helpers import small

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def model():
    return small()


def photo(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 50, 3), dtype=np.uint8))


def test_what_there_is_is_listed_and_importing_it_is_quick():
    code = (
        "import sys, cnclip_ft; print(dir(cnclip_ft)); cnclip_ft.available_models; "
        "print([name for name in ('torch', 'numpy', 'PIL', 'transformers', 'pydantic') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    listed, heavy = done.stdout.splitlines()
    assert (
        listed == "['__doc__', '__version__', 'available_models', 'clip', 'evaluate', 'load', 'search', 'train']"
        and heavy == "[]"
    )
    for name in dir(cnclip_ft):
        assert getattr(cnclip_ft, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        cnclip_ft.lod  # noqa: B018


def test_type_checkers_see_the_types():
    for package in ("cnclip_ft", "data_tools"):
        assert (resources.files(package) / "py.typed").is_file()
    assert (ROOT / "setup.cfg").read_text(encoding="utf-8").count("    py.typed\n") == 2


def test_load_takes_the_best_device(tmp_path, monkeypatch):
    save_checkpoint(small(), tmp_path / "m", info={})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert cnclip_ft.load(tmp_path / "m", device="auto").device == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    from cnclip_ft.runtime import parse_device

    assert parse_device("auto") == parse_device(None) == torch.device("cuda")
    with pytest.raises(RequestError, match="device 'quantum' cannot be used"):
        cnclip_ft.load(tmp_path / "m", device="quantum")


def test_every_form_of_a_picture_gives_the_same_features(model, tmp_path):
    image, file = photo(), io.BytesIO()
    image.save(file, "PNG")
    (tmp_path / "a.png").write_bytes(file.getvalue())
    pixels = np.asarray(image)
    one = model.encode_images([image])
    assert one.shape == (1, 32)
    chw = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    same = [
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        file.getvalue(),
        memoryview(file.getvalue()),
        bytearray(file.getvalue()),
        image,
        pixels,
        chw,
    ]
    for form in same:
        assert torch.equal(model.encode_images(form), one), type(form)  # by itself
    torch.testing.assert_close(model.encode_images(same), one.expand(len(same), -1), atol=1e-6, rtol=0)
    two = np.stack([pixels, np.asarray(photo(1))])
    expected = model.encode_images([photo(), photo(1)])
    for many in (two, torch.from_numpy(two).permute(0, 3, 1, 2), np.array([str(tmp_path / "a.png")] * 2), tuple(two)):
        found = model.encode_images(many)
        assert found.shape == (2, 32) and torch.allclose(found[0], expected[0], atol=1e-6)
    grey = np.asarray(image.convert("L"))
    for form in (grey, grey[:, :, None], torch.from_numpy(grey.copy())[None]):
        assert torch.equal(model.encode_images(form), model.encode_images(image.convert("L")))


@pytest.mark.parametrize(
    "pixels,said",
    [
        (np.zeros((8, 8, 3), np.float32), r"float32 \[8, 8, 3\], expected uint8 \[h, w, 3\]"),
        (np.zeros((3, 8, 8), np.uint8), r"uint8 \[3, 8, 8\], expected uint8 \[h, w, 3\]"),
        (torch.zeros(8, 9, 3, dtype=torch.uint8), r"uint8 \[8, 9, 3\], expected uint8 \[3, h, w\]"),
        (torch.zeros(2, 3, 8, 8), r"float32 \[3, 8, 8\], expected uint8 \[3, h, w\]"),
    ],
)
def test_pixels_in_another_order_are_told(model, pixels, said):
    with pytest.raises(DataFault, match=said):
        model.encode_images(pixels)


@pytest.mark.parametrize(
    "given,what",
    [
        (None, "NoneType"),
        (3, "int"),
        ([None], "NoneType"),
        ([["a.png"]], "list"),
        (np.zeros(5, np.uint8), "uint8"),
        (io.BytesIO(b"x"), "BytesIO"),
    ],
)
def test_what_is_no_picture_is_told(model, given, what):
    with pytest.raises(
        DataFault, match=f"no picture, but {what}. Give a path, encoded bytes, a Pillow image or uint8 pixels"
    ):
        model.encode_images(given)


@pytest.mark.parametrize(
    "given,what", [(None, "NoneType"), (["a", float("nan")], "float"), (b"a", "bytes"), ([["a"]], "list")]
)
def test_what_is_no_text_is_told(model, given, what):
    for call in (model.encode_texts, cnclip_ft.clip.tokenize, cnclip_ft.clip.CLIP(model).tokenize):
        with pytest.raises(RequestError, match=rf"a text is .*\({what}\); expected str"):
            call(given)


@pytest.mark.parametrize("size", [0, -1, 2.5])
def test_a_batch_of_no_size_is_told(model, size):
    for call in (model.encode_images, model.encode_texts):
        with pytest.raises(RequestError, match=f"batch_size is {size}, expected a whole number from 1"):
            call(["a"], batch_size=size)


def test_a_single_text_gives_one_row(model):
    assert model.encode_texts("一只狗").shape == (1, 32)
    assert torch.equal(model.encode_texts("一只狗"), model.encode_texts(["一只狗"]))
    assert model.encode_texts([]).shape == model.encode_images([]).shape == (0, 32)
    assert (model.encode_texts("一只狗") @ model.encode_images(photo()).T).shape == (1, 1)


def test_generators_are_walked_in_bounded_memory(model):
    """Of 64 pictures of 3 MB each a batch is held at a time."""
    seen = []

    def pictures():
        for number in range(64):
            seen.append(number)
            yield np.full((1000, 1000, 3), number, np.uint8)

    tracemalloc.start()
    features = model.encode_images(pictures(), batch_size=4)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert features.shape == (64, 32) and seen == list(range(64)) and most < 64 * 3e6 / 4
    texts = [f"{'狗' * (n % 7)}{n}" for n in range(300)]
    torch.testing.assert_close(
        model.encode_texts((text for text in texts), batch_size=2), model.encode_texts(texts), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda: cnclip_ft.train("x", 3), "train: overrides is 3 (int); it takes a list of texts"),
        (lambda: cnclip_ft.train("demo", "a=1"), "overrides is 'a=1' (str); it takes a list of texts; write ['a=1']"),
        (lambda: cnclip_ft.train(3), "train: recipe is 3 (int); it takes str or Path or Mapping[str, Any] or Recipe"),
        (lambda: cnclip_ft.evaluate("a", "b", 4), "evaluate: splits is 4 (int); it takes str or Path"),
        (lambda: cnclip_ft.evaluate("a", batch_size="3"), "evaluate: batch_size is '3' (str); it takes int"),
        (lambda: cnclip_ft.search("i", 3), "search: text is 3 (int); it takes str or None"),
        (lambda: cnclip_ft.search("i", "x", top=2.5), "search: top is 2.5 (float); it takes int"),
        (
            lambda: cnclip_ft.search("i", "x", where="a=b"),
            "where is 'a=b' (str); it takes a list of texts; write ['a=b']",
        ),
        (lambda: cnclip_ft.search("nowhere", "x", top=np.int64(3), where=("a=b",)), "nowhere holds no index"),
        (lambda: cnclip_ft.load(None), "load: path is None (NoneType); it takes str or Path"),
        (lambda: cnclip_ft.load("x", dtype="float16"), "load: dtype is 'float16' (str); it takes torch.dtype or None"),
    ],
)
def test_a_value_of_the_wrong_type_is_answered_in_words(call, said):
    with pytest.raises(RequestError) as caught:
        call()
    assert said in str(caught.value)
