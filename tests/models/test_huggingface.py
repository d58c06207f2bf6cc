"""transformers' folders: both layouts in, and what its processor makes of ours."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cnclip_ft.models.checkpoints import load, save_checkpoint
from cnclip_ft.models.families.chinese_clip.wordpiece import TextTokenizer
from cnclip_ft.models.preprocessing import normalise
from data_tools.errors import RequestError
from tests.models.helpers import equal, features, small, tensors
from tests.official import requires_official, run_official

PHOTOS = Path(os.environ.get("CNCLIP_FT_REAL_DATA") or "no-real-data") / "photos"


@pytest.fixture
def folder(tmp_path):
    save_checkpoint(small(), tmp_path / "a", info={})
    (tmp_path / "a" / "cnclip_ft.json").unlink()
    return tmp_path / "a"


def test_transformers_5_layout(folder, tmp_path):
    from transformers import ChineseCLIPModel

    ChineseCLIPModel.from_pretrained(folder).save_pretrained(tmp_path / "theirs")
    back = load(tmp_path / "theirs")  # no vocabulary in it: the packaged one
    ours, theirs = tensors(small()), tensors(back)
    for found in (ours, theirs):  # transformers clears the embedding of [PAD], which attention never sees
        found["text_model.embeddings.word_embeddings.weight"][0] = 0
    assert equal(theirs, ours)
    torch.testing.assert_close(features(back), features(small()), atol=1e-6, rtol=0)


def test_transformers_4_layout(folder):
    """`pytorch_model.bin`, numbers of positions among the weights, a pooler, repeated and shortened configurations."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weights |= {
        "text_model.embeddings.position_ids": torch.arange(512)[None],
        "vision_model.embeddings.position_ids": torch.arange(17)[None],
        "text_model.pooler.dense.weight": torch.zeros(64, 64),
        "text_model.pooler.dense.bias": torch.zeros(64),
    }
    torch.save(weights, folder / "pytorch_model.bin")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = {key: config[key] for key in ("model_type", "text_config", "vision_config", "projection_dim")} | {
        "architectures": ["ChineseCLIPModel"],
        "torch_dtype": "float32",
        "transformers_version": "4.23.0.dev0",
        "text_config_dict": None,
        "vision_config_dict": None,
        "logit_scale_init_value": 2.6592,
    }
    for key in ("hidden_act", "layer_norm_eps", "type_vocab_size"):  # transformers' defaults
        del config["text_config"][key]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert equal(tensors(load(folder)), tensors(small())) and torch.equal(features(load(folder)), features(small()))


def test_norms_as_transformers_5_0_saves_them(folder):
    weights = load_file(folder / "model.safetensors")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
        for name, t in weights.items()
    }
    assert old.keys() != weights.keys()
    save_file(old, folder / "model.safetensors")
    assert equal(tensors(load(folder)), tensors(small()))


def test_incomplete_and_other_folders(folder):
    weights = load_file(folder / "model.safetensors")
    save_file(
        {name: tensor for name, tensor in weights.items() if "text_projection" not in name},
        folder / "model.safetensors",
    )
    with pytest.raises(RequestError, match="incomplete, no 'text_projection.weight'"):
        load(folder)
    save_file(weights | {"extra": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(RequestError, match="1 unexpected \\(extra\\)"):
        load(folder)
    (folder / "config.json").write_text('{"model_type": "blip"}', encoding="utf-8")
    with pytest.raises(RequestError, match="a model of type 'blip'; whole models.*chinese_clip.*model.start="):
        load(folder)


# ---- pixels and ids -------------------------------------------------------------------------------------------------

LETTERS = "".join(
    map(
        chr,
        (
            *range(0x20, 0x7F),
            *range(0xC0, 0x17F),
            *range(0x4E00, 0x4F00),
            *range(0x3041, 0x3097),
            *range(0xFF01, 0xFF5F),
        ),
    )
)
RANGES = [
    (0x01, 0x530), (0x2000, 0x2060), (0x20A0, 0x20BE), (0x2100, 0x218B), (0x2190, 0x23FA), (0x2460, 0x2770), (0x3000, 0x3100),
    (0x3105, 0x312D), (0x3131, 0x318E), (0x3220, 0x32FE), (0x3400, 0x4DB5), (0x4E00, 0x9FD5), (0xAC00, 0xD7A3), (0xE000, 0xF8FF),
    (0xF900, 0xFA6D), (0xFE10, 0xFE19), (0xFE30, 0xFE6B), (0xFF01, 0xFFEE), (0x1F300, 0x1F64F), (0x20000, 0x2A6D6), (0xF0000, 0xF0100),
]  # fmt: skip
PIECES = [
    "一只狗在雪地里奔跑", "两个孩子", "“引号”", "‘单引号’", "「书名」", "《红楼梦》", "a red CAR", "Hello, World!", "iPhone 15 Pro", "don't",
    "ＡＢＣ１２３", "㈱㎏①", "🐶", "🏳️‍🌈", "👨‍👩‍👧‍👦", "👍🏽", "𠮷野家", "㐀㐁", "Ünïcödé", "É\u0301tude", "İstanbul", "ﬁne", "ß",
    "\u200b", "\u00a0", "\u3000", "\t", "\n", "\r", "\ufeff", "\ufffd", "\x00", "\x07", "[CLS]", "[MASK]", "##ing", "x" * 120, "1" * 210,
    "…", "——", "·", "※", "…。", "3.14", "https://example.com/a?b=c", "#标签#", "@某人", "ไทย", "한국어", "العربية", "हिन्दी", "русский",
]  # fmt: skip


def many_texts(count=5200):
    """Chinese, English, mixed, emoji, full width, rare, quotes, empty, very long; the same ones every time."""
    draw = random.Random(0)
    texts = ["", " ", "　", *PIECES, "很长的句子" * 400, "long words " * 300]
    while len(texts) < count:
        kind = draw.randrange(4)
        if kind == 0:
            texts.append("".join(chr(draw.randrange(0x4E00, 0x9FFF)) for _ in range(draw.randrange(1, 60))))
        elif kind == 1:
            texts.append("".join(draw.choice(LETTERS) for _ in range(draw.randrange(1, 90))))
        elif kind == 2:
            texts.append(draw.choice(["", " ", "，"]).join(draw.choices(PIECES, k=draw.randrange(1, 8))))
        else:  # anything in the scripts of Unicode 9; later ones are in some tables and not in others
            points = (draw.choice(RANGES) for _ in range(draw.randrange(1, 30)))
            texts.append("".join(chr(draw.randrange(*points_of)) for points_of in points))
    return texts


@requires_official
def test_ids_equal_those_of_the_official_tokenizer(tmp_path):
    texts = many_texts()
    (tmp_path / "texts.json").write_text(json.dumps(texts), encoding="utf-8")
    code = """
import json, numpy as np, cn_clip.clip as clip
texts = json.load(open(sys.argv[1], encoding="utf-8"))
# the data set's own preparation comes before its tokenizer
ready = [t.lower().replace("\\u201c", "\\"").replace("\\u201d", "\\"") for t in texts]
np.save(sys.argv[2], clip.tokenize(ready, context_length=52).numpy())
"""
    run_official(code, tmp_path / "texts.json", tmp_path / "ids.npy")
    tokenizer = TextTokenizer()
    ours = tokenizer.pad(tokenizer.encode(texts), length=52)[0].numpy()
    theirs = np.load(tmp_path / "ids.npy")
    assert len(texts) >= 5000
    differ = [texts[row] for row in np.flatnonzero((ours != theirs).any(1))]
    assert not differ, (len(differ), [text.encode("unicode_escape")[:200] for text in differ[:5]])


def test_ids_equal_those_of_the_processor_on_a_checkpoint(tmp_path):
    from transformers import ChineseCLIPProcessor

    save_checkpoint(small(), tmp_path / "a", info={})
    processor = ChineseCLIPProcessor.from_pretrained(tmp_path / "a")
    texts = many_texts()
    theirs = processor(text=texts, truncation=True, max_length=52)["input_ids"]
    ours = TextTokenizer().encode(texts)
    differ = [text for text, a, b in zip(texts, ours, theirs, strict=True) if a != b]
    assert not differ, (len(differ), [text.encode("unicode_escape")[:200] for text in differ[:5]])


def noise_pictures():
    from PIL import Image

    draw = np.random.default_rng(0)
    for height, width in ((300, 500), (500, 300), (32, 32), (20, 90), (700, 640)):
        coarse = Image.fromarray(draw.integers(0, 256, (9, 9, 3), dtype=np.uint8)).resize((width, height))
        yield coarse
        yield Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8))


def same_pixels(pictures, folder):
    """Our pixels against the processor's, which resizes with Pillow: at most 1 of 255 apart, and hardly ever that."""
    from transformers import ChineseCLIPProcessor

    processor = ChineseCLIPProcessor.from_pretrained(folder)
    tower = load(folder).image_tower
    for picture in pictures:
        theirs = processor(images=picture, return_tensors="pt")["pixel_values"][0]
        ours = normalise(tower.preprocessing.decode(picture)[None], tower.preprocessing.mean, tower.preprocessing.std)[
            0
        ]
        assert theirs.shape == ours.shape  # a square, nothing cropped
        difference = (theirs - ours).abs() * torch.tensor(tower.preprocessing.std).view(3, 1, 1) * 255
        assert difference.max() < 1.01 and difference.mean() < 0.05


def test_pixels_equal_those_of_the_processor(tmp_path):
    save_checkpoint(small(), tmp_path / "a", info={})
    same_pixels(noise_pictures(), tmp_path / "a")


@pytest.mark.skipif(not PHOTOS.is_dir(), reason="CNCLIP_FT_REAL_DATA names no folder with photos/")
def test_pixels_equal_those_of_the_processor_on_photos(tmp_path):
    from PIL import Image

    save_checkpoint(small(), tmp_path / "a", info={})
    save_checkpoint(load(tmp_path / "a", image_size=224), tmp_path / "b", info={})
    photos = sorted(PHOTOS.glob("*.jpg"))
    assert len(photos) >= 60
    same_pixels((Image.open(photo) for photo in photos), tmp_path / "b")
