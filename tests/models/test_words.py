"""Texts tokenised word by word have the ids that the tokenizer gives of the whole text."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cnclip_ft.models.families.chinese_clip.words as words_module
from cnclip_ft.models.families.chinese_clip.wordpiece import PACKAGED_VOCABULARY, TextTokenizer

PIECES = [
    *"一只狗在雪地里跑，。！？、“”‘’《》（）【】…—·〇々ヶㇰ㍿ｱＡ１ ",
    *(
        "dog",
        "Snow",
        "T恤",
        "2024",
        "3.5",
        "iPhone15",
        "don't",
        "x" * 201,
        "é",
        "E\u0301",
        "ÅΣΣ",
        "ΟΔΟΣ",
        "İ",
        "ß",
        "ﬁ",
    ),
    *("\u0301", "\u302e", "\u200b", "\u200d", "\ufe0f", "\ufeff", "\ufffd", "\0", "\x07", "\x85", "\u2028", "\u3000"),
    *(
        "\t",
        "\n",
        "\r\n",
        "\xa0",
        "\xad",
        "🐶",
        "🏳️‍🌈",
        "👍🏽",
        "𠀀",
        "𝔘",
        "\ud83d",
        "\udc36",
        "\ue000",
        "ᚠ",
        "한국",
        "ひら",
        "عربي",
    ),
    *("≠", "≮", "\u037e", "①", "㈠", "½", "豈", "\uf900", "[CLS]", "[UNK]", "##a", "a", "A"),
]


def agrees(tokenizer: TextTokenizer, texts: list[str]) -> bool:
    ready, ids = tokenizer.prepared(texts)
    found, flat, lengths = tokenizer.packed(texts)
    assert flat.dtype == lengths.dtype == np.int64 and len(lengths) == len(texts)
    ends = np.cumsum(lengths)
    return found == ready and [flat[a:b].tolist() for a, b in zip(ends - lengths, ends, strict=True)] == ids


def test_every_character_of_the_basic_plane():
    """Between letters, digits, accents, Chinese and itself, at the beginning and at the end."""
    characters = list(map(chr, range(2**16)))
    texts = [f"{c}x{c}1\u0301{c}{c}一{c}" for c in characters]
    assert agrees(TextTokenizer(context_length=300), texts)


@pytest.mark.parametrize("length", [3, 4, 7, 52])
def test_mixtures(length):
    chance, tokenizer = random.Random(length), TextTokenizer(context_length=length)
    texts = ["".join(chance.choices(PIECES, k=chance.randint(0, 12))) for _ in range(3000)]
    assert agrees(tokenizer, texts) and agrees(tokenizer, texts[::-1])  # all of them known by then
    assert agrees(tokenizer, [text.replace("\n", " ").replace("\r", "") for text in texts])
    assert agrees(tokenizer, []) and agrees(tokenizer, [""]) and agrees(tokenizer, ["", "", "\n"])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text() | st.lists(st.sampled_from(PIECES)).map("".join), max_size=4))
def test_any_texts(texts):
    assert agrees(KEPT, texts)


KEPT = TextTokenizer(context_length=9)


def test_it_holds_no_more_words_than_it_says(monkeypatch):
    monkeypatch.setattr(words_module, "_MOST_WORDS", 5)
    monkeypatch.setattr(words_module, "_AT_ONCE", 2)
    tokenizer = TextTokenizer()
    assert agrees(tokenizer, [f"dog {number} 只 cat{number % 3}" for number in range(40)])
    assert len(tokenizer._words._words) <= 5 + 2 * 3


def test_a_vocabulary_of_ones_own(tmp_path):
    """Without the letter that characters are looked at between, without the comma, with a word of two Chinese characters."""
    file = tmp_path / "vocab.txt"
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "狗", "雪地", "雪", "##地", "b", "##b", "bb", "!", "##a"]
    file.write_text("\n".join(tokens), encoding="utf-8")
    assert agrees(TextTokenizer(file), ["狗在雪地!", "bb b,bbb!狗b", "a狗a", "aa ba ab", ",,!!", "雪 地地"])
    assert agrees(TextTokenizer(PACKAGED_VOCABULARY), ["狗在雪地!"])
