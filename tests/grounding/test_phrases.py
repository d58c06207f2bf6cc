"""Sentences → phrases, by small rules in two languages."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cnclip_ft.grounding.phrases import listed, phrases_of, unique


@pytest.mark.parametrize(
    "sentence,phrases",
    [
        ("红色的伞", ["红色的伞"]),
        ("a red umbrella", ["a red umbrella"]),
        ("狗", ["狗"]),
        ("五个黄色正方形", ["五个黄色正方形"]),
        ("the red fish", ["the red fish"]),
        (
            "a man in a red shirt is holding a red umbrella near the bus",
            ["a man", "a red shirt", "a red umbrella", "the bus"],
        ),
        ("Two dogs are running through the snow", ["Two dogs", "the snow"]),
        ("a group of people sitting around a wooden table", ["a group of people", "a wooden table"]),
        ("a swimming pool next to a building", ["a swimming pool", "a building"]),
        ("A brown dog jumps over a fallen tree.", ["A brown dog", "a fallen tree"]),
        ("a cat, a dog and a bird", ["a cat", "a dog", "a bird"]),
        ("一只狗在雪地里奔跑", ["一只狗", "雪地"]),
        ("穿着红色衣服的男人站在公交车旁边", ["红色衣服", "男人", "公交车"]),
        ("一个男孩踢足球", ["一个男孩", "足球"]),
        ("在草地上，一个女人牵着一只白色的狗和一匹马", ["草地", "一个女人", "一只白色的狗", "一匹马"]),
        ("两个黄色圆形之间有一条红色的鱼", ["两个黄色圆形", "一条红色的鱼"]),
        ("和平鸽", ["和平鸽"]),
        ("海边", ["海边"]),
        ("一只狗 and a cat", ["一只狗", "a cat"]),
        ("running", ["running"]),
        ("他", ["他"]),
    ],
)
def test_a_sentence_is_cut_between_what_it_names(sentence, phrases):
    assert phrases_of(sentence) == phrases


@given(st.text(max_size=200))
def test_any_text_gives_phrases_that_can_be_asked(text):
    found = phrases_of(text)
    assert bool(found) == bool(text.split()) and found == unique(found) and all(phrase.strip() for phrase in found)


def test_phrases_that_are_listed_stand_as_they_are():
    assert listed("a dog running in the snow, 红色的伞、bus；人") == [
        "a dog running in the snow",
        "红色的伞",
        "bus",
        "人",
    ]
    assert listed("a dog, brown\n红色的伞\n\na dog, brown\n") == ["a dog, brown", "红色的伞"]
