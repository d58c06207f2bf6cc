"""WordPiece: the official rules, ids equal to the official tokenizer's."""

from __future__ import annotations

import json
import pickle

import pytest
import torch

from cnclip_ft.models.families.chinese_clip.wordpiece import TextTokenizer
from data_tools.errors import RequestError
from tests.official import requires_official, run_official

SAMPLES = [
    "一只“狗”在Snow里",
    "",
    "Hello, World!",
    "全角ＡＢＣ１２３",
    "emoji 🐶🏳️‍🌈",
    "x" * 300,
    "很长" * 100,
    "É\u0301tude",
    "\u200b零宽",
]


def test_prepare_follows_the_official_rules():
    assert TextTokenizer().prepare("“Big” Dog") == '"big" dog'
    assert TextTokenizer().prepare("半\ud83d个") == "半\ufffd个"


def test_ids_are_framed_and_cut():
    tokenizer = TextTokenizer(context_length=10)
    short, long = tokenizer.encode(["狗", "狗" * 50])
    assert short == [101, 4318, 102]
    assert len(long) == 10 and (long[0], long[-1]) == (101, 102)
    assert tokenizer.lengths(["狗" * 50]) == [52]


def test_padding_goes_to_the_longest_only():
    tokenizer = TextTokenizer()
    ids, mask = tokenizer.pad(tokenizer.encode(["狗", "两只狗"]))
    assert ids.shape == mask.shape == (2, 5)
    assert mask.sum(1).tolist() == [3, 5] and ids[0, 3:].tolist() == [0, 0]
    assert ids.dtype == mask.dtype == torch.int64
    assert tokenizer.pad([[101, 102]], length=52)[0].shape == (1, 52)


def test_pickles_and_works_on_the_other_side():
    tokenizer = pickle.loads(pickle.dumps(TextTokenizer(context_length=20)))
    assert tokenizer.context_length == 20 and tokenizer.encode(["狗"]) == [[101, 4318, 102]]


def test_saved_tokenizer_gives_the_same_ids_in_transformers(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = TextTokenizer()
    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(SAMPLES, truncation=True, max_length=52)["input_ids"] == tokenizer.encode(SAMPLES)


def test_bad_vocabularies_are_named(tmp_path):
    with pytest.raises(RequestError, match="cannot be read"):
        TextTokenizer(tmp_path / "none.txt").vocab_size  # noqa: B018
    (tmp_path / "v.txt").write_text("a\nb\n", encoding="utf-8")
    with pytest.raises(RequestError, match=r"no \[PAD\], \[UNK\]"):
        TextTokenizer(tmp_path / "v.txt").encode(["a"])
    with pytest.raises(RequestError, match="at least 3 tokens"):
        TextTokenizer(context_length=2)


@requires_official
def test_ids_equal_the_official_tokenizer(tmp_path):
    texts = [text for text in SAMPLES if "\ud83d" not in text] + [
        "。，！？「」“引号”",
        "Ünïcödé mixed 中文 text-123",
        "\t\n 空白 ",
    ]
    (tmp_path / "texts.json").write_text(json.dumps(texts), encoding="utf-8")
    code = """
import json, cn_clip.clip as clip
texts = json.load(open(sys.argv[1], encoding="utf-8"))
# the data set's own preparation comes before its tokenizer
ready = [t.lower().replace("\\u201c", "\\"").replace("\\u201d", "\\"") for t in texts]
print(json.dumps(clip.tokenize(ready, context_length=52).tolist()))
"""
    theirs = json.loads(run_official(code, tmp_path / "texts.json").splitlines()[-1])
    tokenizer = TextTokenizer()
    ours = tokenizer.pad(tokenizer.encode(texts), length=52)[0].tolist()
    assert ours == theirs
