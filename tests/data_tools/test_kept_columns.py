"""Columns kept in a store: through shards, both layouts, interruptions, damage and copies."""

from __future__ import annotations

import pytest

from data_tools import build as building
from data_tools.build import build_store
from data_tools.errors import DataFault, UserError
from data_tools.sources import open_source
from data_tools.sources.stored import StoreSource
from data_tools.store import StoreWriter, environments, open_store
from data_tools.store.damage import refuse_damage
from tests.data_tools.samples import content, picture


@pytest.fixture
def table(tmp_path, monkeypatch):
    monkeypatch.setattr(environments, "_SYNCHRONOUS", False)
    monkeypatch.setattr(environments, "BATCH_ITEMS", 4)
    lines = ["image,text,price,late"]
    for number in range(12):
        (tmp_path / f"{number:02}.jpg").write_bytes(picture(number))
        lines.append(f"{number:02}.jpg,t{number},{number if number % 2 else ''},{'x' if number > 8 else ''}")
    (tmp_path / "t.csv").write_text("\n".join(lines) + "\n")
    return tmp_path / "t.csv"


def wanted(number: int) -> dict:
    return ({"price": str(number)} if number % 2 else {}) | ({"late": "x"} if number > 8 else {})


def source(table):
    return open_source("table", str(table))[""]


@pytest.mark.parametrize("options", [{}, {"shard_size": 5}, {"layout": "official", "shard_size": 5}, {"workers": 2}])
@pytest.mark.parametrize("after", [1, 9, 11, 23])
def test_columns_survive_an_interruption(table, monkeypatch, options: dict, after: int) -> None:
    take = building._Build._take

    def stopping(self, position, item, data) -> None:
        if position >= after:
            raise KeyboardInterrupt
        take(self, position, item, data)

    with monkeypatch.context() as patch:
        patch.setattr(building._Build, "_take", stopping)
        with pytest.raises(KeyboardInterrupt):
            build_store(source(table), table.parent / "s", progress=False, resume=True, **options)
    store = build_store(source(table), table.parent / "s", progress=False, resume=True, **options).store
    first = 1 if "layout" in options else 0
    ids = [n + first for n in range(12)] if first else [f"{n:02}.jpg" for n in range(12)]
    assert [store.columns_of(image_id) for image_id in ids] == [wanted(n) for n in range(12)]
    assert sorted(store.columns) == ["late", "price"]
    refuse_damage(store, progress=False)
    # Through a copy in the other layout and back, all of it is the same.
    copy = build_store(StoreSource(store.path), table.parent / "copy", layout="official", progress=False).store
    back = build_store(StoreSource(copy.path), table.parent / "back", progress=False).store
    assert [back.columns_of(f"{n:02}.jpg") for n in range(12)] == [wanted(n) for n in range(12)]
    assert first or back.checksum() == store.checksum()
    assert [pair.text for pair in back.pairs()] == [pair.text for pair in store.pairs()]


def test_a_store_without_columns_has_no_file_of_them(table) -> None:
    with StoreWriter(table.parent / "s") as writer:
        writer.add_image("a", picture(1))
        writer.add_pair("a", 1, "t")
        writer.finish()
    store = open_store(table.parent / "s")
    assert (store.columns, store.columns_of("a"), store.columns_of("none")) == ([], {}, {})
    assert sorted(path.name for path in store.path.iterdir()) == ["imgs", "manifest.json", "pairs"]


def test_damaged_columns_are_named(table) -> None:
    store = build_store(source(table), table.parent / "s", progress=False).store
    before = content(store)
    store.close()
    file = table.parent / "s/columns/data.mdb"
    file.write_bytes(file.read_bytes().replace(b'{"price": "11"', b'{"price": "12"'))
    with pytest.raises(DataFault, match="columns of image '.*' .* differ from what was written"):
        refuse_damage(open_store(table.parent / "s", sample=False), progress=False)
    assert content(open_store(table.parent / "s", sample=False)) == before
    file.unlink()
    with pytest.raises(UserError, match="columns/data.mdb cannot be read"):
        len(open_store(table.parent / "s"))
