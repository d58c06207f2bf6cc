"""What can be encoded: stores, folders of images, texts; and what is refused."""

from __future__ import annotations

import shutil
import time

import pytest

from cnclip_ft.features.sources import open_source
from data_tools.errors import DataFault, RequestError
from tests.evaluation.tiny import png


def test_a_store(store):
    source = open_source(store)
    assert (source.kind, source.name, len(source.split.image_ids)) == ("store", "valid", 12)
    assert source.read(100) == png(0)


def test_a_folder_of_images(tmp_path):
    (tmp_path / "子").mkdir()
    (tmp_path / "子" / "一.PNG").write_bytes(png(1))
    (tmp_path / "note.txt").write_text("x", encoding="utf-8")
    source = open_source(tmp_path)
    assert source.kind == "images" and source.split.image_ids == ["子/一.PNG"]
    assert source.read("子/一.PNG").read_bytes() == png(1)
    (tmp_path / "b.png").write_bytes(png(2))
    assert open_source(tmp_path).checksum != source.checksum


@pytest.mark.parametrize("name", ["imgs", "pairs", "shards", "shard-00000"])
def test_a_sub_folder_called_like_a_store_s_makes_no_store(tmp_path, name):
    for file in (f"{name}/a.png", "other/b.png"):
        (tmp_path / file).parent.mkdir()
        (tmp_path / file).write_bytes(png(1))
    (tmp_path / "c.heic").write_bytes(b"x")
    source = open_source(tmp_path)
    assert source.kind == "images" and len(source.split.image_ids) == 2
    assert source.notes == [
        "passed over: 1 of formats that are not read (.heic 1; c.heic; convert them to JPEG or PNG)"
    ]


def test_a_store_without_a_part_is_still_a_store_and_a_folder_of_stores_names_them(store, tmp_path):
    shutil.copytree(store, tmp_path / "all" / "valid")
    with pytest.raises(RequestError, match="name a split: .*valid"):
        open_source(tmp_path / "all")
    shutil.rmtree(tmp_path / "all" / "valid" / "pairs")
    with pytest.raises(RequestError, match="data.mdb is missing"):
        open_source(tmp_path / "all" / "valid")


def test_texts_with_and_without_ids(tmp_path):
    (tmp_path / "w.txt").write_text("\ufeff猫\r\n\r\n 狗 \n", encoding="utf-8")
    assert open_source(tmp_path / "w.txt").split.texts == ["猫", "狗"]
    (tmp_path / "w.jsonl").write_text(
        '{"text_id": "a", "text": "猫", "language": "zh"}\n{"text": "dog"}\n', encoding="utf-8"
    )
    split = open_source(tmp_path / "w.jsonl").split
    assert (split.text_ids, split.languages) == (["a", 1], ["zh", None])


@pytest.mark.parametrize(
    "content, said",
    [
        (b'{"text": "a"}\n{"txt": 1}\n', ":2: the line is not"),
        (b'{"text_id": 1, "text": "a"}\n' * 2, "stands on several lines"),
    ],
)
def test_broken_text_files_are_named(tmp_path, content, said):
    (tmp_path / "w.jsonl").write_bytes(content)
    with pytest.raises(DataFault) as caught:
        open_source(tmp_path / "w.jsonl")
    assert said in str(caught.value)


def test_what_cannot_be_encoded_is_refused(tmp_path):
    (tmp_path / "w.txt").write_bytes("一只猫在跑".encode("gbk"))
    (tmp_path / "empty.txt").write_text("\n", encoding="utf-8")
    (tmp_path / "nothing").mkdir()
    for name, said in (
        ("w.txt", "not UTF-8"),
        ("empty.txt", "no texts"),
        ("nothing", "neither a store"),
        ("none", "no such"),
    ):
        with pytest.raises((RequestError, DataFault), match=said):
            open_source(tmp_path / name)


def test_an_id_that_comes_again_late_is_found_at_once(tmp_path):
    lines = [f'{{"text_id": {min(i, 29_998)}, "text": "a"}}\n' for i in range(30_000)]
    (tmp_path / "texts.jsonl").write_text("".join(lines), encoding="utf-8")
    began = time.perf_counter()
    with pytest.raises(DataFault, match="text id 29998 stands on several lines"):
        open_source(tmp_path / "texts.jsonl")
    assert time.perf_counter() - began < 5  # looking for every id among all would take half a minute
