"""Folders, tables, imagefolders and tars: straight in, every fault named."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from data_tools.build import build_store
from data_tools.errors import DataFault, RequestError
from data_tools.sources import SourceOptions, open_source
from data_tools.sources.caption_lines import join_segmented, read_captions
from data_tools.sources.column_names import Columns
from data_tools.store import open_store
from tests.data_tools.samples import picture


def photos(folder: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture(number))
    return folder


def taken(kind: str, place: Path | str, target: Path, options: SourceOptions | None = None, **build) -> list[tuple]:
    """Import the only split and give back its pairs."""
    (source,) = open_source(kind, str(place), options).values()
    build_store(source, target, overwrite=True, progress=False, **build)
    return [(pair.image_id, pair.text_id, pair.text) for pair in open_store(target).pairs()]


def fault_kinds(target: Path) -> list[tuple[str, int | None]]:
    return [
        (fault["kind"], fault["line"])
        for fault in map(json.loads, (target / "faults.jsonl").read_text("utf-8").splitlines())
    ]


CSV = 'image,text\na.jpg,一只狗\nsub/b.jpg,"a cat, asleep"\na.jpg,第二句\n'
WANTED = [("a.jpg", 1, "一只狗"), ("sub/b.jpg", 2, "a cat, asleep"), ("a.jpg", 3, "第二句")]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("captions.csv", CSV.encode()),
        ("captions.csv", b"\xef\xbb\xbf" + CSV.replace("\n", "\r\n").encode()),
        (
            "captions.csv",
            CSV.replace(",", ";")
            .replace("a cat;", "a cat,")
            .encode()[: -len("\n")]
            .replace(b"a cat, asleep", b"a cat, asleep"),
        ),
        ("metadata.csv", CSV.replace("image,text", "file_name,caption").encode()),
        ("captions.tsv", CSV.replace(",", "\t").replace("a cat\t", "a cat,").replace('"', "").encode()),
        (
            "captions.jsonl",
            b"".join(json.dumps({"path": i, "title": t}, ensure_ascii=False).encode() + b"\n" for i, _, t in WANTED),
        ),
        ("captions.txt", "a.jpg\t一只狗\nsub/b.jpg#0\ta cat, asleep\na.jpg#1 第二句\n".encode()),
    ],
)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_folder_with_a_file_of_captions(tmp_path, name: str, data: bytes, workers: int) -> None:
    (photos(tmp_path / "in", "a.jpg", "sub/b.jpg", "unused.png") / name).write_bytes(data)
    assert taken("folder", tmp_path / "in", tmp_path / "s", workers=workers) == WANTED
    store = open_store(tmp_path / "s")
    assert store.image("sub/b.jpg") == picture(1) and store.image_ids == ["a.jpg", "sub/b.jpg"]


def test_a_folder_with_a_text_file_beside_each_image(tmp_path) -> None:
    folder = photos(tmp_path / "in", "a.jpg", "sub/b.PNG", "sub/c.webp", ".hidden.jpg")
    (folder / "a.txt").write_text("一只狗\r\n\r\n第二句\n", encoding="utf-8")
    (folder / "sub/b.txt").write_bytes(b"\xef\xbb\xbfa cat")
    target = tmp_path / "s"
    assert taken("folder", folder, target, on_error="skip") == [
        ("a.jpg", 1, "一只狗"),
        ("a.jpg", 2, "第二句"),
        ("sub/b.PNG", 3, "a cat"),
    ]
    assert fault_kinds(target) == [("missing-caption", None)]
    with pytest.raises(DataFault, match=r"c.webp: image .* has no c.txt beside it"):
        taken("folder", folder, target)
    (folder / "sub/c.txt").write_bytes("一只狗".encode("gb18030") + b"\n\xff\n")
    with pytest.raises(DataFault, match=r"c.txt:1: the line is not UTF-8 \(it reads as GBK: '一只狗'\)"):
        taken("folder", folder, target, SourceOptions(encoding="utf-8"))


def test_a_folder_without_captions_says_what_to_do(tmp_path) -> None:
    with pytest.raises(RequestError, match="no such folder"):
        open_source("folder", str(tmp_path / "nothing"))
    (source,) = open_source("folder", str(tmp_path)).values()
    with pytest.raises(RequestError, match="holds no pictures"):
        source.open()
    photos(tmp_path, "a.jpg")
    with pytest.raises(RequestError, match="no captions. Put captions.csv"):
        source.open()
    for name in ("captions.csv", "captions.tsv"):
        (tmp_path / name).write_text("image,text\n")
    with pytest.raises(RequestError, match="which is it, captions.csv or captions.tsv"):
        open_source("folder", str(tmp_path))


@pytest.mark.parametrize(
    ("rows", "kind", "line"),
    [
        ("missing.jpg,text", "missing-file", 2),
        ("a.jpg,", "empty-text", 2),
        (",text", "bad-field", 2),
        ("a.jpg,b,c", "bad-csv", 2),
        ("a.jpg", "bad-csv", 2),
        ("\n\na.jpg,ok\nnope.jpg,x", "missing-file", 5),
        ("http://a/b.jpg,text", "remote-image", 2),
        ("text.csv,text", "undecodable-image", 2),
        ('a.jpg,"quote "here"', "bad-csv", 2),
        ('a.jpg,"never closed\nb', "bad-csv", 2),
        ("a\0.jpg,text", "missing-file" if sys.version_info >= (3, 11) else "bad-csv", 2),  # 3.10's csv takes no NUL
    ],
)
def test_faults_of_a_table_are_named_by_line(tmp_path, rows: str, kind: str, line: int) -> None:
    photos(tmp_path, "a.jpg")
    (tmp_path / "text.csv").write_text(f"image,text\n{rows}\n", encoding="utf-8")
    with pytest.raises(DataFault) as caught:
        taken("table", tmp_path / "text.csv", tmp_path / "s")
    assert (caught.value.kind, caught.value.line) == (kind, line) and "text.csv" in caught.value.file


def test_a_gbk_table_is_named_where_utf_8_was_told(tmp_path) -> None:
    photos(tmp_path, "a.jpg")
    (tmp_path / "t.csv").write_bytes("image,text\na.jpg,一只狗在跑\na.jpg,ascii\n".encode("gb18030"))
    with pytest.raises(DataFault, match=r"t.csv:2: the line is not UTF-8 \(it reads as GBK: 'a.jpg,一只狗在跑"):
        taken("table", tmp_path / "t.csv", tmp_path / "s", SourceOptions(encoding="utf-8"))
    told = SourceOptions(encoding="utf-8")
    assert taken("table", tmp_path / "t.csv", tmp_path / "s", told, on_error="skip") == [("a.jpg", 1, "ascii")]
    options = SourceOptions(encoding="gb18030")
    assert [text for _, _, text in taken("table", tmp_path / "t.csv", tmp_path / "s", options)] == [
        "一只狗在跑",
        "ascii",
    ]
    with pytest.raises(RequestError, match="--encoding"):
        open_source("table", str(tmp_path / "t.csv"), SourceOptions(encoding="klingon"))[""].open()


def test_columns_are_guessed_named_and_missed(tmp_path) -> None:
    photos(tmp_path / "pictures", "a.jpg", "b.jpg")
    table = tmp_path / "t.csv"
    table.write_text("Nr,Datei,中文,english,lang\n1,a.jpg,狗,dog,zh\n2,b.jpg,猫,cat,\n", encoding="utf-8")
    with pytest.raises(RequestError, match="none of the columns is known to hold the image; there are 'Nr', 'Datei'"):
        open_source("table", str(table))[""].open()
    with pytest.raises(RequestError, match="no column 'nope'.*--text-column"):
        open_source("table", str(table), SourceOptions(columns=Columns("Datei", ("nope",))))[""].open()
    options = SourceOptions(images=tmp_path / "pictures", columns=Columns("Datei", ("中文", "english"), image_id="Nr"))
    assert taken("table", table, tmp_path / "s", options) == [(1, 1, "狗"), (1, 2, "dog"), (2, 3, "猫"), (2, 4, "cat")]
    options = SourceOptions(
        images=tmp_path / "pictures", columns=Columns("Datei", ("中文",), text_id="Nr", language="lang")
    )
    assert taken("table", table, tmp_path / "s2", options) == [("a.jpg", 1, "狗"), ("b.jpg", 2, "猫")]
    assert [pair.language for pair in open_store(tmp_path / "s2").pairs()] == ["zh", "zh"]


def test_jsonl_keeps_ids_as_given_and_takes_lists_of_captions(tmp_path) -> None:
    photos(tmp_path, "a.jpg", "b.jpg")
    rows = [
        {"image": "a.jpg", "id": "7", "captions": ["狗", "a dog"]}, {"image": "b.jpg", "id": 8, "captions": "猫"},
        {"image": "b.jpg", "id": 8, "captions": []}, {"image": "b.jpg", "captions": "x"}, {"image": 5, "id": 9, "captions": "x"}, [1],
    ]  # fmt: skip
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    options = SourceOptions(columns=Columns(image_id="id"))
    assert taken("table", tmp_path / "t.jsonl", tmp_path / "s", options, on_error="skip") == [
        ("7", 1, "狗"),
        ("7", 2, "a dog"),
        (8, 3, "猫"),
    ]
    assert fault_kinds(tmp_path / "s") == [
        ("empty-text", 3),
        ("missing-field", 4),
        ("bad-field", 5),
        ("bad-json", 6),
    ]


def test_one_id_for_two_files_is_a_fault(tmp_path) -> None:
    photos(tmp_path, "a.jpg", "b.jpg")
    (tmp_path / "t.csv").write_text("id,image,text\n1,a.jpg,x\n1,a.jpg,y\n1,b.jpg,z\n", encoding="utf-8")
    options = SourceOptions(columns=Columns(image_id="id"))
    for workers in (0, 2):
        with pytest.raises(DataFault, match=r"t.csv:4: image id 1 stands for two images"):
            taken("table", tmp_path / "t.csv", tmp_path / "s", options, workers=workers)


@pytest.mark.parametrize("form", ["path", "bytes", "huggingface"])
def test_parquet(tmp_path, form: str) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    photos(tmp_path, "a.jpg", "b.jpg")
    cell = {
        "path": lambda k: "ab"[k] + ".jpg",
        "bytes": picture,
        "huggingface": lambda k: {"bytes": picture(k), "path": "ab"[k] + ".jpg"},
    }[form]
    table = pyarrow.table({"image": [cell(0), cell(1)], "caption": ["狗", "猫"], "other": [[1.0] * 50] * 2})
    parquet.write_table(table, tmp_path / "t.parquet")
    pairs = taken("table", tmp_path / "t.parquet", tmp_path / "s")
    names = ["row-1", "row-2"] if form == "bytes" else ["a.jpg", "b.jpg"]
    assert pairs == [(names[0], 1, "狗"), (names[1], 2, "猫")]
    assert open_store(tmp_path / "s").image(names[1]) == picture(1)
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(RequestError, match="not a readable Parquet file"):
        open_source("table", str(tmp_path / "broken.parquet"))[""].open()


def test_imagefolder(tmp_path) -> None:
    for split, name in (("train", "a.jpg"), ("validation", "b.jpg")):
        photos(tmp_path / split, name)
        (tmp_path / split / "metadata.jsonl").write_text(
            json.dumps({"file_name": name, "text": f"句子 {name}"}) + "\n", encoding="utf-8"
        )
    splits = open_source("imagefolder", str(tmp_path))
    assert list(splits) == ["train", "valid"]
    build_store(splits["valid"], tmp_path / "s", progress=False)
    assert [(pair.image_id, pair.text) for pair in open_store(tmp_path / "s").pairs()] == [("b.jpg", "句子 b.jpg")]
    with pytest.raises(RequestError, match="no metadata.csv"):
        open_source("imagefolder", str(tmp_path / "s"))


def tar(file: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(file, "w") as archive:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return file


def test_webdataset(tmp_path) -> None:
    pytest.importorskip("webdataset")
    tar(
        tmp_path / "d-000.tar",
        {
            "1.jpg": picture(1),
            "1.txt": "一只狗\n".encode(),
            "2.png": picture(2, format="PNG"),
            "2.json": json.dumps({"caption": ["two", "第二"]}).encode(),
            "__meta__": b"x",
        },
    )
    tar(
        tmp_path / "d-001.tar",
        {
            "3.txt": b"no image",
            "4.jpg": picture(4),
            "5.jpg": b"no picture",
            "5.txt": b"five",
            "6.jpg": picture(6),
            "6.json": b"{",
            "7.jpg": picture(7),
            "7.txt": b"seven",
        },
    )
    wanted = [("1", 1, "一只狗"), ("2", 2, "two"), ("2", 3, "第二"), ("7", 5, "seven")]
    for place in (tmp_path, tmp_path / "d-*.tar", tmp_path / "d-{000..001}.tar"):
        assert taken("webdataset", place, tmp_path / "s", on_error="skip") == wanted
        kinds = [kind for kind, _ in fault_kinds(tmp_path / "s")]
        assert kinds == ["missing-image", "missing-caption", "undecodable-image", "refused-image", "bad-json"]
    whole = (tmp_path / "d-000.tar").read_bytes()
    (tmp_path / "d-001.tar").write_bytes(whole[:700])
    with pytest.raises(DataFault, match="d-001.tar: '1.jpg' cannot be read .unexpected end of data"):
        taken("webdataset", tmp_path / "d-001.tar", tmp_path / "s2")
    with pytest.raises(RequestError, match="no such tar"):
        open_source("webdataset", str(tmp_path / "nothing-*.tar"))[""].open()


@pytest.mark.parametrize(
    ("kind", "options", "says"),
    [
        ("official", SourceOptions(images=Path("x")), "--images means nothing"),
        ("muge", SourceOptions(encoding="gbk"), "--encoding"),
        ("webdataset", SourceOptions(captions=Path("x")), "--captions"),
        ("table", SourceOptions(captions_from=("zhc",)), "--captions-from"),
        ("flickr8k-cn", SourceOptions(columns=Columns("a")), "-column"),
        ("tables", None, "source 'tables' is not known"),
    ],
)
def test_options_that_mean_nothing_are_refused(tmp_path, kind: str, options, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        open_source(kind, str(tmp_path), options)


def test_segmented_captions_are_joined() -> None:
    assert join_segmented("两:m 只:q 狗:n") == "两只狗"
    assert join_segmented("一 个 男人  在 跑步 ") == "一个男人，在跑步"
    assert join_segmented("12:30:m 的 比赛:vn") == "12:30的比赛"


def test_caption_lines(tmp_path) -> None:
    file = tmp_path / "c.txt"
    file.write_text(
        "a.jpg#zhc#0 一只 狗\nCOCO_val2014_1#3\t句子 二\n77#zhm#1 三\n\nno-sentence\nx y.png\twith spaces\nb.jpg#0\t \n",
        encoding="utf-8",
    )
    found = list(read_captions(file))
    assert [(line.image, line.mark, line.text) for line in found if not isinstance(line, DataFault)] == [
        ("a", "a#zhc#0", "一只 狗"),
        ("COCO_val2014_1", "COCO_val2014_1#3", "句子 二"),
        ("77", "77#zhm#1", "三"),
        ("x y", "x y#6", "with spaces"),
    ]
    assert [(line.kind, line.line) for line in found if isinstance(line, DataFault)] == [
        ("bad-caption-line", 5),
        ("empty-text", 7),
    ]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_sources_hold_no_more_than_they_must(tmp_path) -> None:
    """40,000 rows on one small picture: below 100 MiB in a process of its own (the benchmark imports 100,000 pictures)."""
    photos(tmp_path, "a.jpg")
    with (tmp_path / "t.csv").open("w", encoding="utf-8") as file:
        file.write("image,text\n")
        file.writelines(f"a.jpg,第 {number} 句，一张很小的图\n" for number in range(40_000))
    code = (
        "import re, sys; from data_tools.build import build_store; from data_tools.sources import open_source\n"
        "report = build_store(open_source('table', sys.argv[1])[''], sys.argv[2], progress=False)\n"
        "print(report.pairs, int(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1]) >> 10)"
    )
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "t.csv"), str(tmp_path / "s")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": root},
    )
    assert done.returncode == 0, done.stderr
    pairs, peak = map(int, done.stdout.split())
    assert pairs == 40_000 and peak < 100
