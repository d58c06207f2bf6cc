"""A store in other forms, whole and in part, and what other readers make of them."""

from __future__ import annotations

import json
import shutil
import tarfile
from dataclasses import replace

import pytest

from data_tools.build import build_store
from data_tools.columns import parse_where
from data_tools.errors import RequestError, UserError
from data_tools.exporting import export_store
from data_tools.forms import FORMS, Exported
from data_tools.selection import Selection
from data_tools.sources import open_source
from data_tools.store import StoreWriter, environments, open_store
from tests.commands.test_data import call
from tests.data_tools.samples import content, picture


@pytest.fixture
def store(tmp_path, monkeypatch):
    """Names that are paths, numbers and neither; one to three texts; a picture without text; columns."""
    monkeypatch.setattr(environments, "_SYNCHRONOUS", False)
    with StoreWriter(tmp_path / "s") as writer:
        for number, name in enumerate(["女装/a.jpg", "b.png", "坏:名.jpg", "no ending", "../up.jpg", "空.jpg"]):
            data = picture(number, format="PNG" if name == "b.png" else "JPEG")
            writer.add_image(name, data, columns={"类目": "女装" if number % 2 else "男装", "价格": number * 10})
            for text in range(number % 3 + 1 if name != "空.jpg" else 0):
                writer.add_pair(name, 10 * number + text, f"图 {number}\n第 {text} 句", "en" if text else "zh")
        writer.add_lone_text(99, "没有图")
        writer.finish()
    return tmp_path / "s"


def pairs(place) -> list:
    found = open_store(place)
    return sorted((found.image(pair.image_id), pair.text) for pair in found.pairs())


def kept(place) -> list:
    found = open_store(place)
    wanted = ("类目", "价格")
    return sorted((found.image(i), [str(found.columns_of(i).get(name)) for name in wanted]) for i in found.image_ids)


IMPORTS = {
    "webdataset": ("webdataset", "."),
    "imagefolder": ("imagefolder", "."),
    "parquet": ("table", "00000.parquet"),
    "tsv": ("official", "."),
}


@pytest.mark.parametrize("to", ["webdataset", "imagefolder", "parquet", "tsv", "official", "store"])
@pytest.mark.parametrize("part", ["whole", "where", "languages"])
def test_there_and_back(store, to: str, part: str) -> None:
    if to == "parquet":
        pytest.importorskip("pyarrow")
    chosen = {
        "whole": Selection(),
        "where": Selection(parse_where(["类目=男装"])),
        "languages": Selection(languages=("zh",)),
    }[part]
    done = export_store(store, store.parent / "out", to, chosen=chosen, progress=False)
    source = open_store(store)
    met = {i for i in source.image_ids if chosen.keeps(source, i)}
    wanted = sorted(
        (source.image(p.image_id), p.text) for p in source.pairs() if p.image_id in met and chosen.keeps_pair(p)
    )
    place = store.parent / "out"
    if to in IMPORTS:
        kind, name = IMPORTS[to]
        place = store.parent / "back"
        (again,) = open_source(kind, str(store.parent / "out" / name)).values()
        build_store(again, place, progress=False)
    assert pairs(place) == wanted and done.pairs == len(wanted)
    if to != "tsv":
        there = {data for data, _ in kept(place)}
        assert kept(place) == [row for row in kept(store) if row[0] in there]
    assert sorted(p.name for p in store.parent.iterdir() if p.name.startswith("cnclip-ft")) == []


def test_layouts_and_shards(store) -> None:
    before = content(open_store(store))
    export_store(store, store.parent / "o", "official", shard_size=2, progress=False)
    export_store(store.parent / "o", store.parent / "p", "store", progress=False)
    official, back = open_store(store.parent / "o"), open_store(store.parent / "p")
    assert (official.layout, official.shards, back.layout, back.shards) == ("official", 3, "plain", 1)
    assert content(back)[0] == before[0] and back.columns_of("b.png") == {"类目": "女装", "价格": 10}
    texts = [sorted(str((p.image_id, p.text_id, p.text)) for p in found) for found in (content(back)[1], before[1])]
    assert texts[0] == texts[1]  # shards order pairs by their picture
    assert [text[:2] for text in back.lone_texts] == [(99, "没有图")]


def test_other_readers(store, tmp_path) -> None:
    only = Selection(parse_where(["价格<=10"]), ("zh",))
    export_store(store, tmp_path / "w", "webdataset", chosen=only, shard_size=1, progress=False)
    assert sorted(file.name for file in (tmp_path / "w").iterdir()) == ["00000.tar", "00001.tar"]
    with tarfile.open(tmp_path / "w" / "00000.tar") as tar:
        assert tar.getnames() == ["000000000.png", "000000000.json", "000000000.txt"]
    webdataset = pytest.importorskip("webdataset")
    samples = list(webdataset.WebDataset([str(tmp_path / "w" / "00001.tar")], shardshuffle=False))
    assert samples[0]["txt"].decode() == "图 0\n第 0 句" and json.loads(samples[0]["json"])["价格"] == 0
    export_store(store, tmp_path / "i", "imagefolder", progress=False)
    rows = [json.loads(line) for line in (tmp_path / "i" / "metadata.jsonl").read_text("utf-8").splitlines()]
    names = [row["file_name"] for row in rows]
    assert "images/女装/a.jpg" in names and all((tmp_path / "i" / name).is_file() for name in names)
    assert not any(":" in name or ".." in name for name in names) and all(isinstance(row["text"], list) for row in rows)
    parquet = pytest.importorskip("pyarrow.parquet")
    export_store(store, tmp_path / "p", "parquet", progress=False)
    table = parquet.read_table(tmp_path / "p" / "00000.parquet")
    assert table.column_names == ["image", "text", "image_id", "language", "类目", "价格"] and table.num_rows == 5


def spoil_tar(folder) -> None:
    file = folder / "00000.tar"
    file.write_bytes(file.read_bytes().replace("第 1 句".encode(), "第 7 句".encode()))


def spoil_store(folder) -> None:
    other = folder.parent / "other"
    with StoreWriter(other) as writer:
        writer.add_image("b.png", picture(1, format="PNG"))
        writer.add_pair("b.png", 1, "一句")
        writer.finish()
    shutil.rmtree(folder)
    other.rename(folder)


@pytest.mark.parametrize(
    ("to", "spoil", "what"),
    [
        ("imagefolder", lambda folder: (folder / "images/b.png").write_bytes(picture(77, format="PNG")), "pictures and texts"),
        ("webdataset", spoil_tar, "texts"),
        ("store", spoil_store, "pictures and texts"),
        ("official", spoil_store, "pictures and texts"),
    ],
)  # fmt: skip
def test_what_reads_back_differently_is_not_put_in_place(store, monkeypatch, to, spoil, what) -> None:
    form = FORMS[to]

    def failing(store, chosen, folder, *how) -> Exported:
        done = form.write(store, chosen, folder, *how)
        spoil(folder)
        return done

    monkeypatch.setitem(FORMS, to, replace(form, write=failing))
    with pytest.raises(UserError, match=f"the {what} of the export read back differently"):
        export_store(store, store.parent / "out", to, progress=False)
    assert [path.name for path in store.parent.iterdir()] == ["s"]


def test_what_came_to_the_place_meanwhile_stays(store, monkeypatch) -> None:
    form, mine = FORMS["imagefolder"], store.parent / "out" / "mine.txt"
    mine.parent.mkdir()
    (mine.parent / ".DS_Store").touch()

    def slow(*how) -> Exported:
        mine.write_text("mine")
        return form.write(*how)

    monkeypatch.setitem(FORMS, "imagefolder", replace(form, write=slow))
    with pytest.raises(RequestError, match="out is no empty folder .it holds"):
        export_store(store, mine.parent, "imagefolder", progress=False)
    assert mine.read_text() == "mine" and sorted(path.name for path in store.parent.iterdir()) == ["out", "s"]
    mine.unlink()
    monkeypatch.setitem(FORMS, "imagefolder", form)
    export_store(store, mine.parent, "imagefolder", progress=False)
    assert sorted(path.name for path in mine.parent.iterdir()) == ["images", "metadata.jsonl"]


def test_requests_that_are_refused(store, tmp_path) -> None:
    for arguments, says in (
        (("--to", "zip"), "--to 'zip': one of webdataset"),
        (("--to", "tsv", "--where", "类=x"), "keeps no column '类'; did you mean"),
        (("--to", "parquet", "--keep-columns", "x"), "keeps no column 'x'"),
        (("--to", "webdataset", "--where", "类目=x"), "no picture with a text is chosen by 类目=x"),
        (("--to", "tsv", "--where", "类目=x"), "no pair is chosen"),
        (("--to", "store", "--languages", "mixed"), "no pair is chosen"),
    ):
        code, out = call("export", store, "--output", tmp_path / "out", *arguments)
        assert code == 2 and says in out, out
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob("cnclip-ft*"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    for to in ("webdataset", "store"):
        assert call("export", store, "--output", tmp_path / "out", "--to", to)[0] == 2
    assert call("export", store, "--output", store / "x", "--to", "tsv")[0] == 2
    code, out = call("export", store, "--output", tmp_path / "new", "--to", "imagefolder", "--keep-columns", "none")
    assert (
        code == 0
        and "5 images, 9 pairs, read back and compared" in out
        and "1 texts without a picture are left out" in out
    )
    assert "类目" not in (tmp_path / "new" / "metadata.jsonl").read_text("utf-8")
