"""Tables and caption files as programs write them: the texts come back as they were, or the message says what to type."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from data_tools.build import build_store
from data_tools.errors import DataFault, RequestError, UserError
from data_tools.sources import SourceOptions, open_source
from data_tools.sources.column_names import Columns
from data_tools.store import open_store
from data_tools.text_files import TextFile
from tests.data_tools.samples import picture

ODD = [
    'a "red" car',
    '"quoted"',
    "一\u2028二",
    "一\x85二",
    "一\x0b二\x0c三",
    "tab\there",
    "two\nlines",
    "x" * 200_000,
    "'",
    ' "',
]


def taken(kind: str, place: Path, options: SourceOptions | None = None, **build) -> list[str]:
    target = place.parent / "store"
    (source,) = open_source(kind, str(place), options).values()
    build_store(source, target, progress=False, overwrite=True, **build)
    return [pair.text for pair in open_store(target).pairs()]


def written(rows: list[list[str]], **how) -> str:
    text = io.StringIO()
    csv.writer(text, **how).writerows(rows)
    return text.getvalue()


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "P").mkdir()
    for number in range(12):
        (tmp_path / f"P/{number}.jpg").write_bytes(picture(number))
    return tmp_path / "P"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "gb18030"])
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"delimiter": ";"},
        {"delimiter": "\t", "suffix": ".tsv"},
        {"delimiter": "\t"},
        {"delimiter": "\t", "quoting": csv.QUOTE_ALL, "suffix": ".tsv"},
        {"lineterminator": "\n"},
        {"delimiter": "|"},
    ],
)
def test_tables_come_back_as_they_were(folder, encoding: str, how: dict) -> None:
    how = dict(how)
    file = folder / f"t{how.pop('suffix', '.csv')}"
    texts = [text for text in ODD if how.get("delimiter") != "|" or not text.startswith(" ")]
    file.write_bytes(
        written([["image", "text"], *([f"{n}.jpg", t] for n, t in enumerate(texts))], **how).encode(encoding)
    )
    options = SourceOptions(encoding=encoding if encoding in ("gb18030", "utf-16-le") else "utf-8")
    assert taken("table", file, options) == texts


def test_a_tsv_with_bare_quotation_marks_keeps_them(folder) -> None:
    texts = ['a "red" car', '"quoted"', '"open', 'close"', '5" disc', "plain", '5" disc, again']
    (folder / "t.tsv").write_text("image\ttext\n" + "".join(f"{n}.jpg\t{t}\n" for n, t in enumerate(texts)))
    assert taken("table", folder / "t.tsv") == texts


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("form", ["captions.txt", "0.txt", "t.csv", "t.tsv", "t.jsonl", "train_texts.jsonl"])
def test_line_ends_and_separators_inside(folder, form: str, end: str) -> None:
    texts = ["一\u2028二", "一\x85二", "一\x0b二", "\x1c三\x1e"]
    row = {
        "captions.txt": "0.jpg\t{}",
        "0.txt": "{}",
        "t.csv": "0.jpg,{}",
        "t.tsv": "0.jpg\t{}",
        "t.jsonl": '{{"image": "0.jpg", "text": {}}}',
    }.get(form)
    if row is None:
        if end == "\r":
            pytest.skip("the official files end their lines with LF")
        import base64

        (folder / "train_imgs.tsv").write_bytes(b"1\t" + base64.b64encode(picture(0)))
        row = '{{"text_id": {}, "text": {}, "image_ids": [1]}}'
    json_text = [json.dumps(t, ensure_ascii=False).replace("\x1c", "") for t in texts] if "json" in form else texts
    lines = [row.format(*([n, t] if "texts" in form else [t])) for n, t in enumerate(json_text)]
    header = {"t.csv": ["image,text"], "t.tsv": ["image\ttext"]}.get(form, [])
    (folder / form).write_bytes(end.join([*header, *lines, ""]).encode())
    for number in range(1, 12):
        (folder / f"{number}.jpg").unlink()
    kind, place = (
        ("official", folder) if "train" in form else ("table", folder / form) if form[0] == "t" else ("folder", folder)
    )
    if "official" in kind:
        (source,) = open_source(kind, str(place)).values()
        build_store(source, folder.parent / "store", progress=False)
        found = [pair.text for pair in open_store(folder.parent / "store").pairs()]
    else:
        found = taken(kind, place)
    assert [text.strip("\x1c\x1e") for text in found] == [text.strip("\x1c\x1e") for text in texts]


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("t.csv", b"0.jpg,a\n1.jpg,b\n", "--no-header --image-column 1 --text-column 2"),
        ("t.csv", b"A1,0.jpg,a red dress\nA2,1.jpg,b\n", "--no-header --image-column 2 --text-column 3"),
        ("t.tsv", b"a\t0.jpg\n", "--image-column 2 --text-column 1"),
        ("t.csv", b'"image,text\n0.jpg,a\n', "line has to name the columns"),
        ("t.csv", b'"image","te"xt"\n0.jpg,a\n', "name the columns"),
        ("t.tsv", b"im\rage\ttext\n0.jpg\ta\n", "name the columns"),
        ("t.csv", b"image,text,text\n0.jpg,a,b\n", "2 columns are called 'text'"),
        ("t.csv", b"", "is empty: its first line has to name the columns"),
        ("t.json", b'{"a": 1}', "an array of objects or COCO"),
        ("t.json", b"[", "an array of objects or COCO"),
        ("t.csv", "image,文本\n0.jpg,一张图片\n".encode("gb18030"), "Add --encoding gb18030"),
        (
            "t.jsonl",
            json.dumps({"image": "0.jpg", "text": "一张图片"}, ensure_ascii=False).encode("gb18030"),
            "Add --encoding gb18030",
        ),
        ("t.csv", "image,text\n0.jpg,图\n".encode("utf-16-le"), "add --encoding utf-16-le"),
        ("t.jsonl", b'{"image": "0.jpg", "text": "a", "text": "b"}', "'text' stands twice"),
        ("t.jsonl", b'{"image": "0.jpg", "text": ' + b"9" * 6000 + b"}", "6,000 digits"),
        ("t.jsonl", b'{"image": "0.jpg", "text": null}', "the text is empty"),
        ("t.jsonl", b'{"image": "0.jpg", "text": []}', "list of texts is empty"),
        ("t.jsonl", b'{"image": "0.jpg", "text": [" ", null]}', "the text is empty"),
        ("t.parquet", b"no", "not a readable Parquet"),
    ],
)
def test_what_is_said(folder, name: str, data: bytes, says: str) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (folder / name).write_bytes(data)
    with pytest.raises(UserError, match=says):
        taken("table", folder / name, SourceOptions(encoding="utf-8" if "encoding" in says else "auto"))


def test_an_encoding_is_obeyed_everywhere_or_refused(folder) -> None:
    gbk = SourceOptions(encoding="gb18030")
    (folder / "0.txt").write_bytes("红".encode("gb18030"))
    for number in range(1, 12):
        (folder / f"{number}.jpg").unlink()
    with pytest.raises(DataFault, match="Add --encoding gb18030"):
        taken("folder", folder, SourceOptions(encoding="utf-8"))
    assert taken("folder", folder, gbk) == ["红"]
    (folder / "0.txt").write_bytes("红".encode("utf-16"))
    assert taken("folder", folder) == ["红"]
    (folder / "captions.txt").write_bytes("0.jpg\t绿\n".encode("gb18030"))
    assert taken("folder", folder, gbk) == ["绿"]
    (folder / "captions.txt").write_bytes("0.jpg\t绿色的草地\n".encode())
    with pytest.raises(DataFault, match="not gb18030 .it reads as UTF-8.*Leave out --encoding"):
        taken("folder", folder, gbk)
    for kind in ("official", "muge", "flickr8k-cn"):
        with pytest.raises(RequestError, match="--encoding means nothing"):
            open_source(kind, str(folder), gbk)
    (folder / "t.parquet").write_text("[]")
    for encoding, says in (
        ("gb18030", "--encoding means nothing"),
        ("klingon", "not known"),
        ("base64", "not known"),
        ("a\0b", "not known"),
    ):
        file = "t.parquet" if encoding == "gb18030" else "captions.txt"
        with pytest.raises(RequestError, match=says):
            taken(
                "table" if file == "t.parquet" else "folder",
                folder / file if file == "t.parquet" else folder,
                SourceOptions(encoding=encoding),
            )


def test_tables_without_header(folder) -> None:
    (folder / "t.csv").write_text("x,0.jpg,red\ny,1.jpg,blue\n")
    options = SourceOptions(columns=Columns("2", ("3", "1")), header=False)
    assert sorted(taken("table", folder / "t.csv", options)) == ["blue", "red", "x", "y"]
    (folder / "captions.csv").write_text("0.jpg,red\n1.jpg,blue\n")
    assert taken("folder", folder, SourceOptions(header=False)) == ["red", "blue"]
    for kind, name in (("table", "t.jsonl"), ("folder", "captions.txt")):
        (folder / "captions.csv").unlink(missing_ok=True)
        (folder / name).write_text('{"image": "0.jpg", "text": "a"}' if kind == "table" else "0.jpg\ta")
        with pytest.raises(RequestError, match="--no-header is for"):
            taken(kind, folder / name if kind == "table" else folder, SourceOptions(header=False))


def test_blank_captions_beside_others_are_counted(folder) -> None:
    (folder / "t.csv").write_text("image,zh,en\n0.jpg,红,\n1.jpg, ,blue\n2.jpg,,\n")
    (source,) = open_source("table", str(folder / "t.csv"), SourceOptions(columns=Columns(text=("zh", "en")))).values()
    report = build_store(source, folder.parent / "s", progress=False, on_error="skip")
    assert report.faults == {"empty-text": 1} and "2 blank captions" in "\n".join(report.lines())
    assert report.read == report.left_out + 5 and report.left_out == 1


def test_well_known_files(folder) -> None:
    for name, text in {
        "results.token": "0.jpg#0\tTwo guys .\n0.jpg#1\tMen .\n",
        "captions.txt": 'image,caption\n0.jpg,Two guys .\n0.jpg,"Men ."\n',
        "r.csv": "image_name| comment_number| comment\n0.jpg| 0| Two guys .\n0.jpg| 1| Men .\n",
        "c.json": json.dumps(
            {
                "images": [{"id": 9, "file_name": "0.jpg"}],
                "annotations": [
                    {"id": 1, "image_id": 9, "caption": "Two guys ."},
                    {"id": 2, "image_id": 9, "caption": "Men ."},
                ],
            }
        ),
        "a.json": json.dumps([{"image": "0.jpg", "text": "Two guys ."}, {"image": "0.jpg", "text": "Men ."}]),
    }.items():
        (folder / name).write_text(text)
        assert taken("folder", folder, SourceOptions(captions=folder / name)) == ["Two guys .", "Men ."], name


def test_broken_units_of_utf_16_cost_their_line(tmp_path) -> None:
    good = "一行\n".encode("utf-16-le")
    (tmp_path / "t.txt").write_bytes(b"\xff\xfe" + good + b"\x00\xd8" + good + good + b"\x01")
    lines = [line for _, line in TextFile(tmp_path / "t.txt").lines()]
    assert [getattr(line, "kind", line) for line in lines] == ["一行", "not-utf8", "一行", "not-utf8"]
