"""Building from the official source files: what is kept, what is refused, what is said."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from data_tools.build import build_split
from data_tools.errors import DataFault, RequestError, UserError
from data_tools.language import detect_language
from data_tools.pictures import Reencoding, read_header
from data_tools.store import Pair, open_store
from tests.data_tools.samples import content, picture, text_row, write_lines, write_official


def image_row(image_id: object, data: bytes) -> bytes:
    return f"{image_id}\t{base64.b64encode(data).decode()}".encode()


@pytest.mark.parametrize(
    "options", [{}, {"workers": 3}, {"shard_size": 5}, {"shard_size": 5, "workers": 2}, {"layout": "official"}]
)
def test_a_split_becomes_a_store(tmp_path, options) -> None:
    report = build_split(write_official(tmp_path), "train", progress=False, **options)
    images, pairs, lone = content(open_store(tmp_path / "train"))
    assert images == {k: picture(k) for k in range(1, 13)} and not lone
    assert sorted(pair.text_id for pair in pairs) == list(range(3, 39))
    assert (report.images, report.texts, report.pairs, report.faults) == (12, 36, 36, {})
    assert {pair.language for pair in pairs} == ({None} if options.get("layout") else {"zh", "en"})
    assert not list(tmp_path.glob("*building*"))


def test_one_text_on_several_images_and_texts_without_any(tmp_path) -> None:
    write_lines(tmp_path / "test_imgs.tsv", [image_row(name, picture(k)) for k, name in enumerate((1, 2, "a.jpg"))])
    write_lines(
        tmp_path / "test_texts.jsonl",
        [
            text_row(10, "两只猫", [2, "a.jpg", 1]),
            text_row("q", "query", []),
            text_row(11, "T恤 nike", ["1"], language="zh-CN"),
        ],
    )
    build_split(tmp_path, "test", progress=False)
    store = open_store(tmp_path / "test")
    assert list(store.pairs()) == [
        Pair(2, 10, "两只猫", "zh"),
        Pair("a.jpg", 10, "两只猫", "zh"),
        Pair(1, 10, "两只猫", "zh"),
        Pair(1, 11, "T恤 nike", "zh"),
    ]
    assert store.lone_texts == [("q", "query", "en")]


def test_a_test_split_without_answers_is_kept(tmp_path) -> None:
    write_lines(tmp_path / "test_imgs.tsv", [image_row(1, picture(1))])
    write_lines(tmp_path / "test_texts.jsonl", [text_row(k, f"搜索 {k}", []) for k in range(5)])
    report = build_split(tmp_path, "test", progress=False)
    assert (report.pairs, report.lone_texts, report.images) == (0, 5, 1)


@pytest.mark.parametrize(
    ("images", "texts", "kind", "where"),
    [
        ([b"1 no tab"], [], "bad-tsv", "imgs.tsv:1"),
        ([image_row(1, picture(1)), image_row(1, picture(2))], [], "duplicate-image-id", "imgs.tsv:2"),
        ([image_row(1, b"no picture")], [], "undecodable-image", "imgs.tsv:1"),
        ([image_row(1, picture(1)[:300])], [], "undecodable-image", "imgs.tsv:1"),
        ([b"1\t!!!!"], [], "bad-base64", "imgs.tsv:1"),
        (
            [image_row(1, picture(1))],
            [text_row(1, "a", [1]), text_row(2, "b", [1, 7])],
            "missing-image",
            "texts.jsonl:2",
        ),
        (
            [image_row(1, picture(1))],
            [text_row(1, "a", [1]), b"", text_row(1, "b", [1])],
            "duplicate-text-id",
            "texts.jsonl:3",
        ),
        ([image_row(1, picture(1))], [b"{oops"], "bad-json", "texts.jsonl:1"),
        ([image_row(1, picture(1))], [], "empty-split", "train"),
        ([], [], "empty-split", "train"),
    ],
)
def test_faults_are_named_and_the_old_store_stays(tmp_path, images, texts, kind: str, where: str) -> None:
    build_split(write_official(tmp_path, images=3), "train", progress=False)
    before = open_store(tmp_path / "train").checksum()
    write_lines(tmp_path / "train_imgs.tsv", images)
    write_lines(tmp_path / "train_texts.jsonl", texts)
    with pytest.raises(DataFault) as caught:
        build_split(tmp_path, "train", overwrite=True, progress=False)
    assert caught.value.kind == kind and where in str(caught.value) and caught.value.exit_code == 1
    assert open_store(tmp_path / "train").checksum() == before
    assert not list(tmp_path.glob("*building*"))


@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_faults_are_listed_and_counted(tmp_path, workers: int) -> None:
    write_lines(
        tmp_path / "train_imgs.tsv",
        [
            image_row(1, picture(1)),
            image_row(2, b"no picture"),
            b"no tab",
            image_row(1, picture(3)),
            image_row(4, picture(4)),
        ],
    )
    write_lines(
        tmp_path / "train_texts.jsonl",
        [
            text_row(1, "good", [1]),
            text_row(2, "on a refused one", [2]),
            text_row(3, "half", [4, 9]),
            b"{",
            text_row(5, "x", [8]),
        ],
    )
    report = build_split(tmp_path, "train", on_error="skip", workers=workers, progress=False)
    assert report.faults == {
        "undecodable-image": 1,
        "bad-tsv": 1,
        "duplicate-image-id": 1,
        "refused-image": 2,
        "missing-image": 2,
        "bad-json": 1,
    }
    listed = [json.loads(line) for line in (tmp_path / "train" / "faults.jsonl").read_text("utf-8").splitlines()]
    assert [(Path(fault["file"]).name, fault["line"], fault["id"]) for fault in listed] == [
        ("train_imgs.tsv", 2, 2),
        ("train_imgs.tsv", 3, None),
        ("train_imgs.tsv", 4, 1),
        ("train_texts.jsonl", 1, 1),
        ("train_texts.jsonl", 2, 2),
        ("train_texts.jsonl", 3, 3),
        ("train_texts.jsonl", 4, None),
        ("train_texts.jsonl", 5, 5),
    ]
    store = open_store(tmp_path / "train")
    assert store.image_ids == [1, 4] and [(pair.image_id, pair.text) for pair in store.pairs()] == [(4, "half")]
    assert (report.read, report.again, report.left_out) == (10, 0, 7)  # a text with one of two images is stored
    assert any("2 missing-image" in line for line in report.lines())
    again = build_split(tmp_path, "train", on_error="skip", workers=workers, progress=False, resume=True)
    assert again.faults == report.faults and again.texts == report.texts  # finished: nothing is done, all is said


def test_a_store_behind_a_link_is_said_to_lie_there(tmp_path) -> None:
    write_official(tmp_path)
    build_split(tmp_path, "train", tmp_path / "real", progress=False)
    (tmp_path / "train").symlink_to("real")
    report = build_split(tmp_path, "train", progress=False, overwrite=True)
    assert (
        f"the store lies in {tmp_path.resolve() / 'real'}" in report.lines()[-1] and (tmp_path / "train").is_symlink()
    )


def test_too_many_faults_stop_the_build(tmp_path) -> None:
    write_official(tmp_path, images=2)
    write_lines(tmp_path / "train_texts.jsonl", [b"{"] * 5)
    with pytest.raises(UserError, match=r"more than 3 faults \(4 bad-json\).*--max-faults"):
        build_split(tmp_path, "train", on_error="skip", max_faults=3, progress=False)
    assert not (tmp_path / "train").exists()


def test_pictures_are_reencoded_in_threads_as_in_line(tmp_path) -> None:
    write_lines(tmp_path / "train_imgs.tsv", [image_row(k, picture(k, (300, 200), "PNG")) for k in range(9)])
    write_lines(tmp_path / "train_texts.jsonl", [text_row(k, f"text {k}", [k]) for k in range(9)])
    sums = set()
    for workers in (0, 3):
        build_split(
            tmp_path, "train", tmp_path / f"w{workers}", reencoding=Reencoding(64, 70), workers=workers, progress=False
        )
        store = open_store(tmp_path / f"w{workers}")
        sums.add(store.checksum())
        assert {read_header(store.image(k)).width for k in store.image_ids} == {64}
        assert {read_header(store.image(k)).format for k in store.image_ids} == {"JPEG"}
    assert len(sums) == 1


def test_pictures_above_the_limit_are_refused_by_name(tmp_path) -> None:
    write_lines(tmp_path / "train_imgs.tsv", [image_row("huge", picture(1, (64, 64)))])
    write_lines(tmp_path / "train_texts.jsonl", [text_row(1, "a", ["huge"])])
    with pytest.raises(DataFault, match=r"imgs.tsv:1: the image is too large \(64×64") as caught:
        build_split(tmp_path, "train", pixel_limit=4000, progress=False)
    assert caught.value.item_id == "huge"


def test_missing_files_are_a_wrong_request(tmp_path) -> None:
    with pytest.raises(RequestError, match="no such folder"):
        build_split(tmp_path / "nothing", "train")
    write_official(tmp_path, "valid", images=1)
    with pytest.raises(RequestError, match="train_imgs.tsv: no such file. Splits in .*: valid"):
        build_split(tmp_path, "train")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        build_split(tmp_path, "valid", tmp_path / "file" / "valid", progress=False)


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("一只狗", "zh"),
        ("A dog runs", "en"),
        ("nike运动鞋", "mixed"),
        ("T恤 男", "zh"),
        ("123 😀", None),
        ("カメラ", None),
        ("Ünïcödé wörd", "en"),
        ("𠮷野家", "zh"),
        ("", None),
    ],
)
def test_languages_are_told_apart(text: str, language: str | None) -> None:
    assert detect_language(text) == language


def test_a_language_can_be_given_for_all(tmp_path) -> None:
    build_split(write_official(tmp_path, images=2), "train", language="mixed", progress=False)
    assert {pair.language for pair in open_store(tmp_path / "train").pairs()} == {"mixed"}
