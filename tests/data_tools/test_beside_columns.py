"""Columns of negatives and weights in tables, tars and what is appended go beside the captions of their rows."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest

from data_tools.appending import append_to
from data_tools.build import build_store
from data_tools.errors import DataFault, RequestError
from data_tools.sources import SourceOptions, open_source
from data_tools.sources.column_names import Columns
from data_tools.store import environments
from tests.data_tools.samples import picture
from tests.data_tools.test_beside import told


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    monkeypatch.setattr(environments, "_SYNCHRONOUS", False)
    monkeypatch.setattr(environments, "BATCH_ITEMS", 4)


@pytest.fixture
def shop(tmp_path) -> Path:
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_bytes(picture(number))
    return tmp_path


def imported(file: Path, columns: Columns | None = None, kind: str = "table", **options):
    source = open_source(kind, str(file), SourceOptions(columns=columns or Columns()))[""]
    return build_store(source, file.parent / "store", progress=False, overwrite=True, **options)


TWO = {"猫": {"negatives": ["狗", "a bird"], "weight": 2.5}, "cat": {"weight": 1.0}, "dog": {}}


def write_table(file: Path) -> Path:
    rows = [["0.jpg", "猫", ["狗", "a bird"], 2.5], ["1.jpg", "cat", [], 1.0], ["2.jpg", "dog", [], None]]
    if file.suffix == ".jsonl":
        named = [dict(zip(("image", "text", "negatives", "weight"), row, strict=True)) for row in reversed(rows)]
        del named[0]["negatives"], named[0]["weight"]  # the first row does not speak for all
        file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in named), encoding="utf-8")
    elif file.suffix == ".parquet":
        arrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        cells = dict(zip(("image", "text", "negatives", "weight"), zip(*rows, strict=True), strict=True))
        parquet.write_table(arrow.table({name: list(values) for name, values in cells.items()}), file)
    else:
        mark = "\t" if file.suffix == ".tsv" else ","
        lines = [mark.join(map(str, (a, b, "|".join(c), "" if d is None else d))) for a, b, c, d in rows]
        file.write_text("\n".join([mark.join(("image", "text", "Negatives", "weight")), *lines]), encoding="utf-8")
    return file


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.jsonl", "t.parquet"])
def test_columns_of_negatives_and_weights_go_beside_their_texts(shop, name: str) -> None:
    report = imported(write_table(shop / name))
    assert told(report.store) == TWO and report.store.columns == []
    if name != "t.jsonl":
        assert any("negatives from '" in note and "weights of pairs from 'weight'" in note for note in report.notes)


def test_a_row_of_several_captions_has_one_weight_or_a_list(shop) -> None:
    rows = [
        {"image": "0.jpg", "text": ["a", " ", "b"], "weight": [1, 2, 3], "negatives": [["x"], None, ["y", "z"]]},
        {"image": "1.jpg", "text": ["c", "d"], "weight": "0.5", "negatives": ["x", "x", ""]},
        {"image": "2.jpg", "text": "e", "probability": 0.25, "negatives": "one|text"},
        {"image": "2.jpg", "text": ["f", "g"], "weight": [None], "negatives": [None]},  # lists of nothing say nothing
    ]
    (shop / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert told(imported(shop / "t.jsonl").store) == {
        "a": {"negatives": ["x"], "weight": 1.0},
        "b": {"negatives": ["y", "z"], "weight": 3.0},
        "c": {"negatives": ["x"], "weight": 0.5},
        "d": {"negatives": ["x"], "weight": 0.5},
        "e": {"negatives": ["one|text"], "weight": 0.25},
        "f": {},
        "g": {},
    }


def test_a_weight_of_goods_stays_with_the_picture_where_it_is_named(shop) -> None:
    (shop / "t.csv").write_text("image,text,weight,weight (kg)\n0.jpg,a,500 g,1\n1.jpg,b,2,\n")
    with pytest.raises(DataFault, match=r"t.csv:2: the weight is '500 g', not a number above 0.*--keep-columns"):
        imported(shop / "t.csv")
    store = imported(shop / "t.csv", on_error="skip").store
    assert told(store) == {"b": {"weight": 2.0}} and store.columns == []
    store = imported(shop / "t.csv", Columns(keep=("weight", "weight (kg)"))).store
    assert told(store) == {"a": {}, "b": {}} and store.columns_of("0.jpg") == {"weight": "500 g", "weight (kg)": "1"}
    store = imported(shop / "t.csv", Columns(weight="weight (kg)", keep=())).store
    assert told(store) == {"a": {"weight": 1.0}, "b": {}}
    with pytest.raises(RequestError, match="no column 'nothing'.*--weight-column"):
        imported(shop / "t.csv", Columns(weight="nothing"))


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"weight": -1}, "the weight is -1"),
        ({"weight": [1, 2]}, "2 weights for 1 captions"),
        ({"weight": True}, "True"),
        ({"weight": {"a": 1}}, "not a number"),
        ({"negatives": [1]}, r"the negatives are \[1\]"),
        ({"negatives": [["a"], ["b"]]}, "2 lists of negatives for 1 captions"),
        ({"negatives": {"a": 1}}, "the negatives are {"),
        ({"negatives": ["t", "a"]}, "one of the negatives is the caption itself"),
    ],
)
def test_cells_that_hold_something_else_are_named_by_line(shop, more: dict, why: str) -> None:
    rows = [{"image": "0.jpg", "text": "first"}, {"image": "1.jpg", "text": "t", **more}]
    (shop / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataFault, match=rf"t.jsonl:2: .*{why}") as caught:
        imported(shop / "t.jsonl")
    assert caught.value.kind == "bad-beside"


def test_the_json_of_a_tar_has_them_too(shop) -> None:
    row = {"caption": ["a", "b"], "negatives": ["x"], "weight": [1, 2], "price": 3}
    with tarfile.open(shop / "t.tar", "w") as tar:
        for name, data in (("0.jpg", picture(0)), ("0.json", json.dumps(row).encode())):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    store = imported(shop / "t.tar", kind="webdataset").store
    assert told(store) == {"a": {"negatives": ["x"], "weight": 1.0}, "b": {"negatives": ["x"], "weight": 2.0}}
    assert store.columns == ["price"]


@pytest.mark.parametrize("update", [False, True])
def test_what_is_appended_says_more_of_pairs_that_are_there(shop, update: bool) -> None:
    (shop / "t.csv").write_text("image,text,weight\n0.jpg,a,1\n1.jpg,b,\n")
    imported(shop / "t.csv")
    (shop / "u.csv").write_text("image,text,weight,negatives\n0.jpg,a,2,x|y\n1.jpg,b,,\n2.jpg,c,5,z\n1.jpg,d,1,\n")
    source = open_source("table", str(shop / "u.csv"))[""]
    report = append_to(source, shop / "store", update_columns=update, layout="plain", shard_size=None, progress=False)
    first = {"negatives": ["x", "y"], "weight": 2.0} if update else {"weight": 1.0}
    assert told(report.store) == {"a": first, "b": {}, "c": {"negatives": ["z"], "weight": 5.0}, "d": {"weight": 1.0}}
    said = "took the place of the old" if update else "--update-columns takes the new"
    assert any("1 text that is there has other negatives or weights" in note and said in note for note in report.notes)
