"""The public sets as their authors distribute them, in small: splits, texts, published counts."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_tools.build import build_store
from data_tools.errors import DataFault, RequestError
from data_tools.sources import SourceOptions, open_source
from data_tools.store import open_store
from tests.data_tools.samples import picture, write_lines, write_official


def lines(file: Path, *text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_lines(file, [line.encode() for line in text])


def photo(file: Path, seed: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(picture(seed))


@pytest.fixture
def flickr8k(tmp_path) -> Path:
    for number, split in enumerate(("train", "val", "test")):
        lines(tmp_path / "data" / f"flickr8k{split}.txt", f"100{number}_ab", f"200{number}_cd")
        for name in (f"100{number}_ab", f"200{number}_cd"):
            photo(tmp_path / "Flicker8k_Dataset" / f"{name}.jpg", number)
    names = [f"{k}00{number}_{end}.jpg" for number in range(3) for k, end in ((1, "ab"), (2, "cd"))]
    for mark, sentence in (("zhc", "人写的 句子"), ("zhb", "机器翻译"), ("enc", "A sentence .")):
        lines(
            tmp_path / "data" / f"flickr8k{mark}.caption.txt",
            *(f"{name}#{mark}#{k} {sentence} {k}" for name in names for k in range(2)),
        )
    lines(tmp_path / "data" / "flickr8kzhmtest.captions.txt", *(f"{name}#zhm#0 人工翻译" for name in names[4:]))
    return tmp_path


def test_flickr8k_cn(flickr8k, tmp_path) -> None:
    splits = open_source("flickr8k-cn", str(flickr8k))
    assert list(splits) == ["train", "valid", "test"]
    report = build_store(splits["valid"], tmp_path / "s", progress=False)
    store = open_store(tmp_path / "s")
    assert store.image_ids == ["1001_ab", "2001_cd"]
    assert [(p.image_id, p.text_id, p.text, p.language) for p in store.pairs()][:2] == [
        ("1001_ab", "1001_ab#zhc#0", "人写的 句子 0", "zh"),
        ("1001_ab", "1001_ab#zhc#1", "人写的 句子 1", "zh"),
    ]
    assert report.differences == [
        "differs from the published split: 1,000 images expected, 2 found",
        "differs from the published split: 5,000 texts expected, 4 found",
    ]
    assert {split: source.expected() for split, source in splits.items()} == {
        "train": {"images": 6000, "texts": 30000},
        "valid": {"images": 1000, "texts": 5000},
        "test": {"images": 1000, "texts": 5000},
    }


def test_flickr8k_cn_with_other_captions(flickr8k, tmp_path) -> None:
    both = open_source("flickr8k-cn", str(flickr8k), SourceOptions(captions_from=("zhb", "enc")))
    build_store(both["train"], tmp_path / "s", progress=False)
    assert [(p.language, p.text) for p in open_store(tmp_path / "s").pairs()][3:5] == [
        ("zh", "机器翻译 1"),
        ("en", "A sentence . 0"),
    ]
    assert list(open_source("flickr8k-cn", str(flickr8k), SourceOptions(captions_from=("zhmtest",)))) == ["test"]
    with pytest.raises(RequestError, match="Flickr8k-CN has zhc"):
        open_source("flickr8k-cn", str(flickr8k), SourceOptions(captions_from=("written",)))
    (flickr8k / "data" / "flickr8ktest.txt").unlink()
    with pytest.raises(RequestError, match="the list of test photos: none of flickr8ktest.txt"):
        open_source("flickr8k-cn", str(flickr8k))


def test_a_missing_photo_and_an_uncaptioned_one_are_named(flickr8k, tmp_path) -> None:
    lines(flickr8k / "data" / "flickr8kval.txt", "1001_ab", "3001_ef", "4001_gh")
    photo(flickr8k / "Flicker8k_Dataset" / "4001_gh.jpg", 9)
    source = open_source("flickr8k-cn", str(flickr8k))["valid"]
    with pytest.raises(DataFault, match=r"flickr8kval.txt:2: image file .*3001_ef.jpg' cannot be read"):
        build_store(source, tmp_path / "s", progress=False)
    report = build_store(source, tmp_path / "s", on_error="skip", progress=False)
    assert report.faults == {"missing-file": 1, "missing-caption": 2} and report.images == 2


def test_flickr30k_cn_in_the_authors_folders(tmp_path) -> None:
    for name, ids, caption in (
        ("flickr30kzhbbosontrain", (10, 20), "一 个 男人  在 跑步"),
        ("flickr30kzhbbosonval", (30,), "两 只 狗"),
        ("flickr30kzhmbosontest", (40,), "一:m 只:q 猫:n"),
    ):
        lines(tmp_path / name / "ImageSets" / f"{name}.txt", *map(str, ids))
        mark = "zhm" if "zhm" in name else "zhb"
        lines(
            tmp_path / name / "TextData" / f"seg.{name}.caption.txt",
            *(f"{k}#{mark}#{n} {caption}" for k in ids for n in range(5)),
        )
        for k in ids:
            photo(tmp_path / "flickr30k-images" / f"{k}.jpg", k)
    splits = open_source("flickr30k-cn", str(tmp_path))
    texts = {}
    for split, source in splits.items():
        build_store(source, tmp_path / "out" / split, progress=False)
        store = open_store(tmp_path / "out" / split)
        texts[split] = (store.image_ids, {pair.text for pair in store.pairs()}, len(store))
    assert texts == {
        "train": ([10, 20], {"一个男人，在跑步"}, 10),
        "valid": ([30], {"两只狗"}, 5),
        "test": ([40], {"一只猫"}, 5),
    }
    assert splits["test"].expected() == {"images": 1000, "texts": 5000}
    assert splits["train"].expected() == {"images": 29783, "texts": 148915}


@pytest.mark.parametrize(("kind", "counts"), [("flickr30k-cn", (1000, 5000)), ("muge", (29806, 5008))])
def test_the_distributed_files(tmp_path, kind: str, counts: tuple[int, int]) -> None:
    write_official(tmp_path, "valid", images=3)
    splits = open_source(kind, str(tmp_path))
    report = build_store(splits["valid"], tmp_path / "s", progress=False)
    assert (report.images, report.pairs) == (3, 9)
    assert report.differences[0] == f"differs from the published split: {counts[0]:,} images expected, 3 found"
    assert splits["valid"].expected() == {"images": counts[0], "texts": counts[1]}
    with pytest.raises(RequestError, match="test_imgs.tsv: no such file"):
        splits["test"].open()


@pytest.fixture
def coco(tmp_path) -> Path:
    captions = tmp_path / "coco-cn-version1805v1.1"
    names = {
        "train": ["COCO_train2014_000000000101", "COCO_val2014_000000000102"],
        "val": ["COCO_val2014_000000000103"],
        "test": ["COCO_train2014_000000000104"],
    }
    for split, inside in names.items():
        lines(captions / f"coco-cn_{split}.txt", *inside)
        for number, name in enumerate(inside):
            photo(tmp_path / "images" / name.split("_")[1] / f"{name}.jpg", number)
    everything = [name for inside in names.values() for name in inside]
    lines(
        captions / "imageid.human-written-caption.txt",
        *(f"{name}#0\t写的句子 {name[-3:]}" for name in everything),
        f"{everything[-1]}#1\t又一句",
    )
    lines(captions / "imageid.manually-translated-caption.txt", *(f"{everything[-1]}#{k}\t翻译 {k}" for k in range(5)))
    return tmp_path


def test_coco_cn(coco, tmp_path) -> None:
    splits = open_source("coco-cn", str(coco / "coco-cn-version1805v1.1"))
    report = build_store(splits["test"], tmp_path / "s", progress=False)
    store = open_store(tmp_path / "s")
    assert [(p.image_id, p.text_id, p.text) for p in store.pairs()] == [
        ("COCO_train2014_000000000104", "COCO_train2014_000000000104#0", "写的句子 104"),
        ("COCO_train2014_000000000104", "COCO_train2014_000000000104#1", "又一句"),
    ]
    assert report.differences[1] == "differs from the published split: 1,053 texts expected, 2 found"
    assert {split: tuple(source.expected().values()) for split, source in splits.items()} == {
        "train": (18341, 20065),
        "valid": (1000, 1100),
        "test": (1000, 1053),
    }
    build_store(splits["train"], tmp_path / "t", progress=False)
    assert open_store(tmp_path / "t").image_count == 2


def test_coco_cn_translations_are_another_test_set(coco, tmp_path) -> None:
    options = SourceOptions(images=coco / "images", captions_from=("translated",))
    splits = open_source("coco-cn", str(coco / "coco-cn-version1805v1.1"), options)
    assert list(splits) == ["test"] and "texts" not in splits["test"].expected()
    assert build_store(splits["test"], tmp_path / "s", progress=False).pairs == 5
    with pytest.raises(RequestError, match="COCO-CN has written, translated"):
        open_source("coco-cn", str(coco), SourceOptions(captions_from=("zhc",)))


def test_nothing_there_says_what_is_missing(tmp_path) -> None:
    for kind, says in (
        ("flickr8k-cn", "the photos of Flickr8k"),
        ("flickr30k-cn", "neither {split}_imgs.tsv nor"),
        ("coco-cn", "MS-COCO 2014"),
    ):
        with pytest.raises(RequestError) as caught:
            open_source(kind, str(tmp_path))
        assert says in str(caught.value)
    with pytest.raises(RequestError, match="unpack it first"):
        open_source("muge", str(tmp_path / "MUGE.zip"))
