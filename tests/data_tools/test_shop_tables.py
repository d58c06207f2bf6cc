"""Tables as shops and data sets export them: encodings found, Excel, names of columns, tables without a header, other columns kept."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest

from data_tools.build import build_store
from data_tools.columns import parse_where
from data_tools.errors import DataFault, RequestError
from data_tools.items import TextItem
from data_tools.sources import SourceOptions, open_source
from data_tools.sources.column_names import Columns
from data_tools.sources.table import TableSource
from data_tools.store import environments
from data_tools.text_files import TextFile, decode_text
from tests.data_tools.samples import picture

HEAD = ["主图", "商品标题", "类目", "价格(元)", "链接"]
ROWS = [
    [
        f"女装/裙子/商品 {n}.jpg",
        f"红色连衣裙第{n}款",
        "女装" if n < 4 else "男装",
        str(90 + n),
        f"https://x.example/{n}",
    ]
    for n in range(6)
]


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    monkeypatch.setattr(environments, "_SYNCHRONOUS", False)


@pytest.fixture
def shop(tmp_path) -> Path:
    for number, (name, *_) in enumerate(ROWS):
        (tmp_path / "图片" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "图片" / name).write_bytes(picture(number))
    return tmp_path


def table(separator: str = ",", rows: list[list[str]] | None = None) -> str:
    return "".join(separator.join(row) + "\r\n" for row in [HEAD, *(ROWS if rows is None else rows)])


def built(place: Path, target: Path, kind: str = "table", **options):
    (source,) = open_source(kind, str(place), SourceOptions(**options)).values()
    return build_store(source, target, overwrite=True, progress=False)


@pytest.mark.parametrize(
    ("name", "encoding", "separator", "said"),
    [
        ("a.csv", "utf-8", ",", "UTF-8"),
        ("a.csv", "utf-8-sig", ",", "UTF-8 with a byte order mark"),
        ("a.csv", "gb18030", ",", "GB18030 (GBK)"),
        ("a.csv", "utf-16", "\t", "UTF-16"),
        ("a.csv", "utf-16-le", ",", "UTF-16-LE"),
        ("a.csv", "utf-16-be", ",", "UTF-16-BE"),
        ("a.tsv", "gb18030", "\t", "GB18030 (GBK)"),
        ("a.csv", "gb18030", "|", "GB18030 (GBK)"),
    ],
)
def test_a_shop_export_is_read_as_it_is(shop, name: str, encoding: str, separator: str, said: str) -> None:
    (shop / name).write_bytes(table(separator).encode(encoding))
    report = built(shop / name, shop / "s", images=shop / "图片")
    assert [pair.text for pair in report.store.pairs()] == [row[1] for row in ROWS]
    assert report.store.columns == ["类目", "价格(元)", "链接"]
    assert report.store.columns_of(ROWS[4][0]) == dict(zip(HEAD[2:], ROWS[4][2:], strict=True))
    (line,) = [line for line in report.lines() if "picture from" in line]
    assert line.startswith(f"  {name}: {said}; picture")
    assert "picture from '主图', text from '商品标题'; kept with the picture: 类目, 价格(元), 链接" in line


@pytest.mark.parametrize(
    ("encoding", "said"),
    [("utf-8", "UTF-8"), ("utf-8-sig", "UTF-8 with a byte order mark"), ("gb18030", "GB18030 (GBK)")],
)
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.txt", "beside", "a.tar"])
def test_every_text_says_its_encoding(shop, name: str, encoding: str, said: str) -> None:
    rows, options = [{"image": row[0], "text": row[1]} for row in ROWS], {"images": shop / "图片"}
    place, kind = shop / name, "table"
    if name == "a.json":
        place.write_bytes(json.dumps(rows, ensure_ascii=False).encode(encoding))
    elif name == "a.jsonl":
        place.write_bytes("\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode(encoding))
    elif name == "a.txt":
        place.write_bytes("".join(f"{row[0]}\t{row[1]}\n" for row in ROWS).encode(encoding))
        place, kind, options = shop / "图片", "folder", {"captions": shop / "a.txt"}
    elif name == "beside":
        for row in ROWS:
            (shop / "图片" / row[0]).with_suffix(".txt").write_bytes(row[1].encode(encoding))
        place, kind, options = shop / "图片", "folder", {}
    else:
        with tarfile.open(place, "w") as tar:
            for number, row in enumerate(ROWS):
                for ending, data in (("png", picture(number)), ("txt", row[1].encode(encoding))):
                    member = tarfile.TarInfo(f"{number:03}.{ending}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        kind, options = "webdataset", {}
    report = built(place, shop / "s", kind, **options)
    assert len(list(report.store.pairs())) == len(ROWS)
    wanted = {"beside": f"{len(ROWS)} .txt are {said}", "a.tar": f"{len(ROWS)} captions are {said}"}
    assert any(
        line.strip() in (wanted.get(name), f"{name} is {said}") or f"{name}: {said};" in line for line in report.lines()
    )


def test_an_excel_file(shop) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    book.active.title = "空表"
    sheet = book.create_sheet("商品")
    sheet.append([*HEAD, None])
    for number, row in enumerate(ROWS):
        sheet.append([*row[:3], 90.0 + number, None])
        sheet.append([None] * 5)
    book.create_sheet("备注").append(["x"])
    book.save(shop / "商品.xlsx")
    report = built(shop / "商品.xlsx", shop / "s", images=shop / "图片")
    assert [pair.text for pair in report.store.pairs()] == [row[1] for row in ROWS]
    assert report.store.columns_of(ROWS[1][0]) == {"类目": "女装", "价格(元)": "91"}
    assert "sheet '商品' is read, 1 others are not ('备注')" in "\n".join(report.lines())
    (shop / "b.xlsx").write_bytes(b"PK nonsense")
    with pytest.raises(RequestError, match="b.xlsx is not a readable .xlsx"):
        built(shop / "b.xlsx", shop / "s")
    (shop / "b.xls").write_bytes(b"")
    with pytest.raises(RequestError, match="save it as .xlsx or CSV"):
        built(shop / "b.xls", shop / "s")


def test_a_file_of_no_known_encoding_is_refused_with_line_and_byte(shop) -> None:
    (shop / "a.csv").write_bytes("image,text\nx.jpg,d\xe9j\xe0 vu\n".encode("latin-1"))
    with pytest.raises(DataFault, match=r"a.csv:2: the line is not UTF-8 \(it reads as GBK|byte 8 is 0xe9"):
        built(shop / "a.csv", shop / "s")
    # One bad line does not turn the others into something else.
    good = "".join(f"第{n}行的文字\n" for n in range(40))
    for encoding in ("utf-8", "gb18030"):
        (shop / "t.txt").write_bytes(good.encode(encoding) + b"\xff\xfe\x80\n")
        with TextFile(shop / "t.txt", "auto") as text:
            found = [line for _, line in text.lines()]
        assert (text.found, found[:40]) == (encoding, good.splitlines()) and isinstance(found[40], DataFault)
        assert "byte 1 is 0xff" in str(found[40])
    for word in ("联通", "红", "café", "naïve Straße"):
        assert decode_text(word.encode(), "auto") == (word, "UTF-8")
    assert decode_text("红色 dress 连衣裙".encode("gbk"), "auto") == ("红色 dress 连衣裙", "GB18030 (GBK)")


@pytest.mark.parametrize(
    ("image", "text"),
    [
        ("图片", "标题"),
        ("商品主图", "商品名称"),
        ("图片链接", "宝贝标题"),
        ("图片路径", "描述"),
        ("* 主图URL（必填）", "商品 标题"),
        ("Image Path", "Product Name"),
        ("image_url", "Title"),
    ],
)
def test_names_of_columns(shop, image: str, text: str) -> None:
    (shop / "a.csv").write_text(f"编号,{text},{image}\n7,一只狗,{ROWS[0][0]}\n", encoding="utf-8")
    report = built(shop / "a.csv", shop / "s", images=shop / "图片")
    assert report.store[0].text == "一只狗" and report.store.columns_of(ROWS[0][0]) == {"编号": "7"}


def test_a_path_goes_before_a_link_and_a_link_finds_its_file(shop) -> None:
    (shop / "图片" / "a b.jpg").write_bytes(picture(1))
    head = "图片链接,图片路径,标题,描述"
    (shop / "a.csv").write_text(f"{head}\nhttps://x.example/1.jpg,a b.jpg,短,长\n", encoding="utf-8")
    store = built(shop / "a.csv", shop / "s", images=shop / "图片").store
    assert store[0].text == "短" and store.columns_of("a b.jpg") == {
        "图片链接": "https://x.example/1.jpg",
        "描述": "长",
    }
    (shop / "b.csv").write_text("图片链接,标题\nhttps://x.example/i/a%20b.jpg?w=9,短\n", encoding="utf-8")
    assert built(shop / "b.csv", shop / "s", images=shop / "图片").store.image_ids == ["a b.jpg"]
    (shop / "b.csv").write_text("图片链接,标题\nhttps://x.example/c.jpg,短\n", encoding="utf-8")
    with pytest.raises(DataFault, match="Nothing is fetched"):
        built(shop / "b.csv", shop / "s", images=shop / "图片")


def test_a_table_without_header_says_which_flags(shop) -> None:
    for cells in (f"短,{ROWS[0][0]}", "短,nowhere.jpg"):
        (shop / "a.csv").write_text(cells + "\n", encoding="utf-8")
        with pytest.raises(RequestError, match="--no-header --image-column 2 --text-column 1"):
            built(shop / "a.csv", shop / "s", images=shop / "图片")


def test_files_of_data_sets(shop) -> None:
    folder = shop / "P"
    folder.mkdir()
    for number in range(2):
        (folder / f"{number}.jpg").write_bytes(picture(number))
    karpathy = {
        "dataset": "x",
        "images": [
            {
                "filepath": "P",
                "filename": f"{n}.jpg",
                "split": ["train", "val"][n],
                "cocoid": n,
                "sentences": [{"raw": "Two."}, {"raw": "Men."}],
            }
            for n in range(2)
        ],
    }
    (shop / "dataset.json").write_text(json.dumps(karpathy))
    store = built(shop / "dataset.json", shop / "s").store
    assert len(store) == 4 and store.columns_of("P/1.jpg") == {"split": "val", "cocoid": 1}
    (folder / "results.token").write_text("0.jpg#0\tTwo guys .\n1.jpg#1\tMen .\n")
    (folder / "notes.md").write_text("x")
    report = built(folder, shop / "s", "folder")
    assert [pair.text for pair in report.store.pairs()] == ["Two guys .", "Men ."]
    said = "\n".join(report.lines())
    assert "results.token is UTF-8" in said and "passed over: 1 of other endings (.md 1)" in said
    (folder / "results.token").unlink()
    (folder / "captions.txt").write_text("image_name| comment_number| comment\n0.jpg| 0| Two guys .\n")
    assert built(folder, shop / "s", "folder").store.columns_of("0.jpg") == {"comment_number": "0"}


def test_which_columns_are_kept(shop) -> None:
    rows = [
        {
            "image": ROWS[0][0],
            "text": "a",
            "n": 3,
            "ok": True,
            "list": [1],
            "nothing": None,
            "blank": " ",
            "long": "x" * 5000,
        },
        {"image": ROWS[1][0], "text": "b", "later": 0.5},
    ]
    (shop / "a.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    store = built(shop / "a.jsonl", shop / "s", images=shop / "图片").store
    assert [store.columns_of(row[0]) for row in ROWS[:2]] == [{"n": 3, "ok": True}, {"later": 0.5}]
    only = Columns(keep=("n",))
    assert built(shop / "a.jsonl", shop / "s", images=shop / "图片", columns=only).store.columns == ["n"]
    assert built(shop / "a.jsonl", shop / "s", images=shop / "图片", columns=Columns(keep=())).store.columns == []
    with pytest.raises(RequestError, match="--keep-columns"):
        built(shop / "a.jsonl", shop / "s", images=shop / "图片", columns=Columns(keep=("m",)))


def test_conditions_on_columns() -> None:
    columns = {"类目": "女装", "价格": "99.0", "n": 3}
    for given, holds in (
        (["类目=女装"], True),
        (["类目=男装"], False),
        (["类目=男装", "类目=女装"], True),
        (["价格<100", "n>=3"], True),
        (["价格>99"], False),
        (["价格=99"], True),
        (["名称=x"], False),
        (["类目<5"], False),
        ([], True),
    ):
        assert parse_where(given).holds(columns) is holds, given
    signs = {"价格<元>": 80, "a=b": "c", 'say "x"': "y", "plain": "z"}
    for condition, holds in (
        ('"价格<元>"<100', True),
        ('"价格<元>">=100', False),
        ('"a=b"=c', True),
        ("a=b=c", False),  # a column `a`
        ('"say ""x"""=y', True),
        ('"plain" = z', True),
    ):
        met = parse_where([condition])
        assert met.holds(signs) is holds and parse_where([str(met)]) == met, condition
        assert condition == "a=b=c" or met.check(list(signs), "s") is None
    for wrong in ("类目", "=x", "价格<x", "", '""=x'):
        with pytest.raises(RequestError, match="is no condition; write it like"):
            parse_where([wrong])
    with pytest.raises(RequestError, match="did you mean '类目'"):
        parse_where(["类目名=x"]).check(list(columns), "s")


def test_of_a_workbook_the_sheet_with_pictures_is_read_hidden_ones_last(tmp_path) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    book.active.append(["本店商品表，2026 年"])
    for title, state, name in (("旧", "hidden", "b.jpg"), ("商品", "visible", "a.jpg")):
        sheet = book.create_sheet(title)
        sheet.sheet_state = state
        sheet.append(["主图", "商品标题"])
        sheet.append([name, title])
    book.save(tmp_path / "t.xlsx")
    stream = TableSource(tmp_path / "t.xlsx").open()
    assert [item.text for item in stream.items if isinstance(item, TextItem)] == ["商品"]
    assert any("'商品' is read, 2 others" in note for note in stream.notes)


def test_what_stops_a_build_says_how_to_build_without_it(tmp_path) -> None:
    (tmp_path / "t.csv").write_text("主图,标题\n没有.jpg,一\n", encoding="utf-8")
    with pytest.raises(DataFault, match="--on-error skip"):
        build_store(TableSource(tmp_path / "t.csv"), tmp_path / "s", progress=False)


def test_an_empty_table_is_called_empty(tmp_path) -> None:
    (tmp_path / "t.csv").write_bytes(b"")
    with pytest.raises(RequestError, match="is empty"):
        TableSource(tmp_path / "t.csv").open()
