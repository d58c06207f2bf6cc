"""The check: every number against one counted by hand, and what hurts."""

from __future__ import annotations

import html
import json
import random
import re
from pathlib import Path

import pytest

from data_tools.build import build_store
from data_tools.check import judge, measure
from data_tools.check import words as wording
from data_tools.check.looking import Images
from data_tools.check.measure import _Pairs
from data_tools.check.numbers import Spread
from data_tools.check.page import BEGINS, write_page
from data_tools.check.tables import in_words
from data_tools.outputs import begins
from data_tools.sources import open_source
from data_tools.store import PairStore, StoreWriter
from tests.data_tools.samples import picture


def store(target: Path, images: dict, pairs: list[tuple], lone: tuple = (), size: int | None = None) -> PairStore:
    with StoreWriter(target, shard_size=size) as writer:
        for image_id, data in images.items():
            writer.add_image(image_id, data)
        for text_id, (image_id, text) in enumerate(pairs):
            writer.add_pair(image_id, text_id, text)
        for number, text in enumerate(lone):
            writer.add_lone_text(f"lone {number}", text)
        return writer.finish()


def lengths(texts) -> list[int]:
    return [len(text) + 2 for text in texts]


@pytest.fixture
def split(tmp_path) -> PairStore:
    images = {
        1: picture(1),
        2: picture(2, format="PNG"),
        3: picture(1),
        4: picture(4, (80, 40)),
        5: b"no picture",
        6: picture(6),
    }
    pairs = [(1, "一只狗"), (1, "a dog"), (2, "A  Dog"), (3, "猫"), (4, "猫" * 60), (5, "nike 鞋"), (4, "123")]
    return store(tmp_path / "train", images, pairs, ("搜索",))


def test_everything_is_counted(split) -> None:
    check = measure(split, lengths=lengths, progress=False)
    assert (check.images, check.pairs, check.texts, check.lone_texts) == (6, 7, 8, 1)
    assert check.pairs_per_image == Spread(1, 1, 2, 2, 1.4)
    assert (check.images_without_text, check.missing_images, check.undecodable) == (1, 0, 1)
    assert check.repeated_images == 2 and check.examples["repeated_images"] == [[1, 3]]
    assert check.repeated_texts == 2 and check.examples["repeated_texts"] == [
        ["a dog", 2]
    ]  # equal up to case and spaces
    assert check.languages == {"zh": 4, "en": 2, "mixed": 1, "none": 1}
    assert check.formats == {"JPEG": 4, "PNG": 1} and check.modes == {"RGB": 5}
    assert (check.widths.least, check.widths.most, check.heights.most) == (32, 80, 40)
    assert (check.token_lengths.most, check.cut) == (62, 0.125) and check.examples["longest"][0][0] == 62
    assert check.examples["undecodable"][0][0] == 5 and check.examples["without_text"] == [6]
    assert check.bytes == sum(len(split.image(k)) for k in split.image_ids)
    assert measure(split, lengths=lengths, workers=3, progress=False).as_dict() == check.as_dict()
    assert json.loads(json.dumps(check.as_dict()))["false_negatives"] == {"128": None, "1024": None, "8192": None}


def test_headers_alone_see_less(tmp_path) -> None:
    cut = picture(1, (200, 200))
    cut = cut[:1500] + b"\0" * 200 + b"\xff\xd9"  # has an end, and nothing good before it
    split = store(
        tmp_path / "s", {1: cut, 2: picture(2, (80, 80), "PNG")[:600] + b"IEND" + bytes(8)}, [(1, "a"), (2, "b")]
    )
    assert measure(split, decode=False, progress=False).undecodable == 0
    assert measure(split, progress=False).undecodable >= 1


@pytest.mark.parametrize("size", [None, 10])
def test_the_rate_of_false_negatives_is_that_of_random_batches(tmp_path, size) -> None:
    """Against 4,000 batches of 21 drawn at random; and the larger the batch the higher, up to a certainty."""
    draw = random.Random(1)
    images = {k: picture(k // 2 if k < 12 else k) for k in range(40)}  # twelve images of six contents
    texts = [draw.choice(["same text", "another one", *(f"text {n} {k}" for k in range(4))]) for n in range(200)]
    split = store(tmp_path / "s", images, [(n % 40, text) for n, text in enumerate(texts)], size=size)
    looked = Images(split, decode=False, workers=0, progress=False)
    counted = _Pairs(split, looked.numbers, looked.groups, progress=False)
    pairs, met = [(split.image(pair.image_id), pair.text) for pair in split.pairs()], 0
    for _ in range(4000):
        first, *others = draw.sample(pairs, 21)
        met += any(other[0] == first[0] or other[1] == first[1] for other in others)
    assert abs(counted.false_negatives(21) - met / 4000) < 0.025
    assert (
        counted.false_negatives(1) == 0 and counted.false_negatives(200) == 1 and counted.false_negatives(201) is None
    )
    assert (
        counted.false_negatives(21) < counted.false_negatives(40) < measure(split, progress=False).false_negatives[128]
    )


def test_pairs_that_share_nothing_are_no_false_negatives(tmp_path) -> None:
    split = store(tmp_path / "s", {k: picture(k) for k in range(130)}, [(k, f"text {k}") for k in range(130)])
    assert measure(split, progress=False).false_negatives == {128: 0.0, 1024: None, 8192: None}


def test_leakage_between_splits_is_found_by_content(tmp_path) -> None:
    train = store(
        tmp_path / "train", {k: picture(k) for k in range(10)}, [(k, f"train {k}") for k in range(9)] + [(9, "一只狗")]
    )
    valid = store(tmp_path / "valid", {"a": picture(3), "b": picture(77)}, [("a", "valid a"), ("b", " 一只狗")])
    report = judge([measure(s, lengths=lengths, progress=False) for s in (train, valid)])
    (leak,) = report.leakage
    assert (leak.first, leak.second, leak.images, leak.texts) == ("train", "valid", 1, 1)
    assert leak.image_examples == [[3, "a"]] and leak.text_examples == ["一只狗"]
    assert report.hurts and "pictures are in both splits" in report.findings[0].problem


@pytest.mark.parametrize(
    ("images", "pairs", "hurts", "says"),
    [
        ({1: b"x", 2: picture(2)}, [(1, "a"), (2, "b")], True, "1 images cannot be decoded"),
        (
            {1: picture(1), 2: picture(1)},
            [(1, "a"), (2, "b")],
            True,
            "2 images (100.0%) have the content of another id",
        ),
        ({1: picture(1)}, [(1, "a" * 60)], True, "100.0% of the captions are longer than 52 tokens"),
        ({1: picture(1)}, [(1, "a" * 60)] + [(1, f"b{k}") for k in range(20)], False, "4.8% of the captions"),
        ({1: picture(1), 2: picture(2)}, [(1, "a")], False, "1 images have no text"),
        ({1: picture(1, (1500, 1200))}, [(1, "a")], False, "the pictures are large"),
        ({1: picture(1)}, [(1, "a")], False, ""),
    ],
)
def test_what_hurts_and_what_does_not(tmp_path, images, pairs, hurts: bool, says: str) -> None:
    report = judge([measure(store(tmp_path / "s", images, pairs), lengths=lengths, progress=False)])
    assert report.hurts is hurts
    assert any(says in finding.problem for finding in report.findings) if says else not report.findings


def test_a_split_without_answers_is_no_fault(tmp_path) -> None:
    report = judge(
        [measure(store(tmp_path / "test", {1: picture(1)}, [], ("一", "二")), lengths=lengths, progress=False)]
    )
    assert not report.hurts and "without answers" in report.findings[0].problem


def test_the_tables_and_the_page(tmp_path, split) -> None:
    nasty = store(
        tmp_path / "nasty",
        {"<b>": picture(1), 2: picture(50)},
        [("<b>", "<script>alert(1)</script>"), (2, "[red]标记[/red]")],
    )
    report = judge([measure(s, lengths=lengths, progress=False) for s in (split, nasty)])
    out = in_words(report)
    for words in (
        "4 JPEG, 1 PNG",
        "12.50%",
        "split is smaller",
        "hurts: train: 1 images cannot be decoded",
        "train / nasty: 1 pictures",
    ):
        assert words in out
    write_page(report, {"train": split, "nasty": nasty}, tmp_path / "sub" / "page.html")
    page = (tmp_path / "sub" / "page.html").read_text("utf-8")
    assert page.count("<img") > 5 and "data:image/jpeg;base64," in page and "http" not in page
    assert "<script>" not in page and html.escape("<script>alert(1)</script>") in page and "一只狗" in page


def test_what_the_build_left_out_and_what_is_kept(tmp_path) -> None:
    (tmp_path / "a.jpg").write_bytes(picture(1))
    (tmp_path / "b.jpg").write_bytes(picture(2))
    rows = ["图片,标题,类目", "a.jpg,一只狗,宠物", "b.jpg,一只猫,宠物", "没有.jpg,<b>,x"]
    (tmp_path / "t.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    split = build_store(
        open_source("table", str(tmp_path / "t.csv"))[""], tmp_path / "s", on_error="skip", progress=False
    ).store
    listed = (split.path / "faults.jsonl").read_text("utf-8")
    assert "没有.jpg" in listed and "\\u" not in listed  # readable as it is
    report = judge([measure(split, lengths=lengths, progress=False)])
    check = report.splits[0]
    assert check.skipped == {"missing-file": 1, "refused-image": 1} and not report.hurts
    assert json.loads(json.dumps(report.as_dict()))["splits"][0]["kept"] == {
        "类目": {"images": 2, "values": 1, "most": [["宠物", 2]]}
    }
    english, chinese = in_words(report, 80), in_words(report, 80, "zh")
    assert "the build left out 2 items (1 missing-file, 1 refused-image)" in " ".join(english.split())
    assert "构建时略过了 2 项（图片文件不存在 1，图片被拒收 1）" in chinese.replace("\n", "") and "宠物 2" in chinese
    assert (
        "smallest / median / 95 % are no larger / largest" in " ".join(english.split()) and "最小 / 中位数" in chinese
    )
    for language in ("en", "zh"):
        write_page(report, {"s": split}, tmp_path / f"{language}.html", language=language)
        page = (tmp_path / f"{language}.html").read_text("utf-8")
        assert "没有.jpg" in page and "<b>" not in page.replace("<br>", "") and "宠物" in page
        assert ("数据检查" in page, "Data check" in page) == (language == "zh", language == "en")
        assert begins(*BEGINS)(tmp_path / f"{language}.html")


def test_every_word_is_there_in_both_languages() -> None:
    for table in (wording._ROWS, wording._PIECES, wording._FINDINGS):
        for name, texts in table.items():
            for first, second in zip(texts[::2], texts[1::2], strict=True):
                names = [set(re.findall(r"{(\w+)", text)) for text in (first, second)]
                assert bool(first) == bool(second) and names[0] == names[1], name
