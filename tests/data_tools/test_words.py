"""Sentences in two languages: English as any text, Chinese where it is asked for; and which language that is."""

from __future__ import annotations

import ast
import copy
import json
import pickle
import re
from pathlib import Path

import pytest

from data_tools.errors import RequestError
from data_tools.words import Said, joined, labelled, language_of, said_in


def test_a_sentence_is_its_english_and_knows_its_chinese() -> None:
    inner = Said("a {colour} car", "一辆{colour}车", colour=Said("red", "红"))
    said = Said(
        "{what}: {count:,} of {place}", "{place} 中有 {count:,} 个：{what}", what=inner, count=1234, place="{x}/%s"
    )
    assert said == "a red car: 1,234 of {x}/%s" and said_in(said, "en") == said
    assert said_in(said, "zh") == "{x}/%s 中有 1,234 个：一辆红车"
    assert json.dumps([said]) == json.dumps([str(said)]) and type(str(said)) is str
    for again in (copy.deepcopy(said), pickle.loads(pickle.dumps(said))):
        assert (again, again.zh) == (said, said.zh) and isinstance(again, Said)
    assert said_in("runs/mine", "zh") == "runs/mine" and said_in(7, "zh") == 7


def test_sentences_are_joined_and_labelled() -> None:
    both = joined([Said("one", "一"), "2"], ", ", "，")
    assert both == "one, 2" and both.zh == "一，2" and joined([Said("{{}}", "{{}}"), "{"]).zh == "{}\n{"
    line = labelled(Said("  device", "  设备"), 10, Said("cpu", "处理器"))
    assert line == "  device  cpu" and line.zh == "  设备    处理器"  # two columns a character


def test_both_languages_say_the_same_values() -> None:
    """Every sentence of the code: what is put into one is put into the other, and the Chinese one has Chinese in it."""
    found = 0
    for file in [path for room in ("cnclip_ft", "data_tools") for path in Path(room).rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Said" and len(node.args) == 2:
                texts = [each.value for each in node.args if isinstance(each, ast.Constant)]
                if len(texts) == 2:
                    names = [sorted(re.findall(r"(?<!{){(\w+)", text)) for text in texts]
                    assert names[0] == names[1], f"{file}: {texts}"
                    assert re.search("[\u4e00-\u9fff\uff08：，]", texts[1]) or names[1], f"{file}: {texts}"
                    found += 1
    assert found > 80


def test_the_language_is_the_given_one_or_the_systems(monkeypatch) -> None:
    for names, wanted in (
        ({"LC_ALL": "zh_CN.UTF-8", "LANG": "en_US"}, "zh"),
        ({"LANG": "zh_TW"}, "zh"),
        ({"LANG": "C"}, "en"),
        ({"LC_MESSAGES": "en_GB", "LANG": "zh_CN"}, "en"),
    ):
        for name in ("LC_ALL", "LC_MESSAGES", "LANG"):
            monkeypatch.delenv(name, raising=False)
        for name, value in names.items():
            monkeypatch.setenv(name, value)
        assert language_of(None) == wanted and language_of("zh") == "zh"
    with pytest.raises(RequestError, match="zh or en"):
        language_of("fr")
