"""What pairs have beside their texts: through both layouts, shards, interruptions, copies, parts, exports and damage."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from pathlib import Path

import lmdb
import pytest

from data_tools import build as building
from data_tools.build import build_store
from data_tools.check import judge, measure
from data_tools.errors import DataFault, RequestError
from data_tools.exporting import export_store
from data_tools.items import ImageItem, Stream, TextItem
from data_tools.selection import Selection
from data_tools.sources.stored import StoreSource
from data_tools.splitting import Shares, build_splits
from data_tools.store import StoreWriter, environments, open_store
from data_tools.store.damage import refuse_damage
from tests.data_tools.samples import picture
from tests.data_tools.test_store import fill

FORMS = [{}, {"shard_size": 5}, {"layout": "official"}, {"layout": "official", "shard_size": 5}]


def wanted(number: int) -> dict:
    """What text `number` has beside it."""
    found: dict = {}
    if number % 3 == 0:
        found["boxes"] = [[0.1, 0.2, 0.25, 0.5], [0.0, 0.0, 1.0, (number + 1) / 40]]
    if number % 4 == 0:
        found["negatives"] = [f"另一句 {number}", "another"]
    if number % 5 == 0:
        found["weight"] = number + 0.5
    return found


class Source:
    """12 pictures, 36 texts."""

    kind = "test"

    def open(self) -> Stream:
        pictures = [ImageItem(number, picture(number), "f", number) for number in range(12)]
        texts = [TextItem(n, f"句子 {n}", (n % 12,), None, "f", n, beside=wanted(n) or None) for n in range(36)]
        return Stream(iter([*pictures, *texts]), 48)

    def fingerprint(self) -> dict:
        return {"test": 1}

    def expected(self) -> dict:
        return {}


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    monkeypatch.setattr(environments, "_SYNCHRONOUS", False)
    monkeypatch.setattr(environments, "BATCH_ITEMS", 4)


def build(target: Path, **options):
    return build_store(Source(), target, progress=False, **options).store


def told(store) -> dict:
    """Text → what stands beside it, read by number and in one sweep: both the same."""
    swept = list(store.pairs_and_beside())
    assert [pair for pair, _ in swept] == list(store.pairs())
    assert [found for _, found in swept] == [store.beside(number) for number in range(len(store))]
    assert list(store.all_beside()) == [(number, found) for number, (_, found) in enumerate(swept) if found]
    return {pair.text: found for pair, found in swept}


EXPECTED = {f"句子 {number}": wanted(number) for number in range(36)}


@pytest.mark.parametrize("options", FORMS)
@pytest.mark.parametrize("after", [None, 3, 14, 29, 46])
def test_it_is_kept_through_an_interruption(tmp_path, monkeypatch, options: dict, after: int | None) -> None:
    take = building._Build._take

    def stopping(self, position, item, data) -> None:
        if position >= after:
            raise KeyboardInterrupt
        take(self, position, item, data)

    if after is not None:
        with monkeypatch.context() as patch:
            patch.setattr(building._Build, "_take", stopping)
            with pytest.raises(KeyboardInterrupt):
                build(tmp_path / "s", resume=True, **options)
    store = build(tmp_path / "s", resume=True, **options)
    assert told(store) == EXPECTED
    assert store.beside_counts == {"pairs": 22, "boxes": 12, "negatives": 9, "weight": 8}
    assert store.about["version"] == 2
    refuse_damage(store, progress=False)
    found = measure(store, progress=False)
    assert found.checksum == store.checksum() == build(tmp_path / "straight").checksum()
    assert found.beside == {"boxes": 12, "negatives": 9, "weight": 8} and not judge([found]).hurts
    assert told(pickle.loads(pickle.dumps(store))) == EXPECTED
    with pytest.raises(IndexError):
        store.beside(36)


def test_it_goes_through_layouts_exports_and_parts(tmp_path) -> None:
    store = build(tmp_path / "s", shard_size=5)
    official = build_store(StoreSource(store.path), tmp_path / "o", layout="official", progress=False).store
    back = build_store(StoreSource(official.path), tmp_path / "b", progress=False).store
    assert told(official) == told(back) == EXPECTED and store.checksum() == official.checksum() == back.checksum()
    for form in ("store", "official"):
        done = export_store(store.path, tmp_path / form, form, progress=False)
        assert told(open_store(tmp_path / form)) == EXPECTED and not done.notes
    done = export_store(store.path, tmp_path / "tars", "webdataset", progress=False)
    assert "no place for what stands beside texts (pairs 22, boxes 12" in done.notes[0]
    build_splits(StoreSource(store.path), tmp_path / "parts", Shares.parse("0.5,0.5"), progress=False)
    parts = [told(open_store(tmp_path / "parts" / name)) for name in ("train", "valid")]
    assert parts[0] | parts[1] == EXPECTED and all(len(part) == 18 for part in parts)
    one = Selection(languages=("zh",))
    assert export_store(store.path, tmp_path / "zh", "store", chosen=one, progress=False).pairs == 36


def test_an_export_that_lost_something_is_found(tmp_path, monkeypatch) -> None:
    from data_tools.errors import UserError
    from data_tools.store.writer import StoreWriter as Writer

    store, add = build(tmp_path / "s"), Writer.add_text

    def losing(self, text_id, *others, beside=None, **named):
        return add(self, text_id, *others, beside=None if text_id == 12 else beside, **named)

    monkeypatch.setattr(Writer, "add_text", losing)
    with pytest.raises(UserError, match="texts of the export read back differently"):
        export_store(store.path, tmp_path / "out", "store", progress=False)
    assert not (tmp_path / "out").exists()


def test_another_record_is_another_store(tmp_path) -> None:
    sums = set()
    for number, more in enumerate([None, {"weight": 2}, {"weight": 3.0}, {"negatives": ["a"]}, {"negatives": ["b"]}]):
        with StoreWriter(tmp_path / str(number)) as writer:
            writer.add_image(1, b"one")
            writer.add_pair(1, 1, "text", "en", more)
            store = writer.finish()
        assert store.beside(0) == (more or {})
        sums.add(store.checksum())
        store._open()[0].meta.pop("sums")
        del store.stated_checksum
        del store.__dict__["_checksum"]
        assert store.checksum() in sums  # computed anew
    assert len(sums) == 5


def test_a_pair_with_nothing_beside_it_costs_no_reading(tmp_path) -> None:
    store = open_store(fill(tmp_path / "s"))

    class Refusing:
        def get(self, key: bytes) -> bytes:
            raise AssertionError(key)

    store._open()[0].pairs = Refusing()
    assert [store.beside(number) for number in range(len(store))] == [{}] * 32
    assert store.beside_counts == {} and list(store.all_beside()) == []


def records(target: Path) -> str:
    """Of every key and value, but for the number drawn for the build."""
    sha = hashlib.sha256()
    for file in sorted(target.rglob("data.mdb")):
        with lmdb.open(str(file.parent), readonly=True, lock=False) as environment, environment.begin() as transaction:
            for key, value in transaction.cursor():
                if key == b"meta":
                    value = json.dumps({n: one for n, one in json.loads(value).items() if n != "build"}).encode()
                sha.update(b"%d %d " % (len(key), len(value)) + key + value)
    return sha.hexdigest()[:16]


@pytest.mark.parametrize(
    ("layout", "shard_size", "content", "order"),
    [
        ("plain", None, "6420520e87bd7438", "4c5f61956b1495bf"),
        ("plain", 4, "c305796c5cb89913", "de319ba61dd6073d"),
        ("official", None, "359909c7af50e8cf", "4c5f61956b1495bf"),
        ("official", 3, "a341965cfbd922c0", "8d75418765733336"),
    ],
)
def test_stores_where_no_pair_has_any_are_what_they_were(
    tmp_path, layout, shard_size, content: str, order: str
) -> None:
    target = fill(tmp_path / "s", layout=layout, shard_size=shard_size)
    assert records(target) == content
    store = open_store(target)
    assert (store.checksum()[:16], store.order()[:16]) == ("9cb01b0a9366d2d3", order)


WRONG = [
    ({}, "nothing in it"),
    ({"other": 1}, "'other' is none of boxes, negatives, weight"),
    ({"weight": 0}, "weight is 0, not a number above 0"),
    ({"weight": True}, "True"),
    ({"weight": "2"}, "'2'"),
    ({"weight": float("nan")}, "nan"),
    ({"weight": float("inf")}, "inf"),
    ({"negatives": "text"}, "not a list of 1 to 1000 texts"),
    ({"negatives": []}, r"\[\]"),
    ({"negatives": ["a", " "]}, "' ' is no text"),
    ({"negatives": ["\ud83d"]}, "no text"),
    ({"negatives": [3]}, "3 is no text"),
    ({"negatives": ["a\0"]}, "no text"),
    ({"negatives": ["x" * 70_000]}, "70,000 characters"),
    ({"negatives": ["caption"]}, "is the caption itself"),
    ({"negatives": ["长" * 60_000 for _ in range(10)]}, "more than 1,024 KiB"),
    ({"boxes": []}, "not a list of 1 to 1000 boxes"),
    ({"boxes": [[0, 0, 1]]}, r"not \[x, y, width, height\]"),
    ({"boxes": [[0, 0, 1, "1"]]}, "in numbers"),
    ({"boxes": [[0, 0, 0, 1]]}, "is empty"),
    ({"boxes": [[0, 0, float("nan"), 1]]}, "is empty"),
    ({"boxes": [[0.5, 0, 0.6, 1]]}, "leads out of the picture"),
    ({"boxes": [[-0.1, 0, 0.6, 1]]}, "leads out of the picture"),
    ({"boxes": [[0, 0, 1, 1]] * 1001}, "1 to 1000"),
]


@pytest.mark.parametrize(("found", "why"), WRONG)
def test_what_is_none_is_refused_in_words(tmp_path, found: dict, why: str) -> None:
    with StoreWriter(tmp_path / "s") as writer:
        writer.add_image(1, b"one")
        with pytest.raises(DataFault, match=why) as caught:
            writer.add_pair(1, "t", "caption", beside=found)
        assert (caught.value.kind, caught.value.item_id) == ("bad-beside", "t")
        writer.add_pair(1, "t", "caption", beside={"weight": 1})  # nothing of the refused one is there
        store = writer.finish()
    assert len(store) == 1 and store.beside(0) == {"weight": 1.0}


def test_boxes_belong_to_one_picture(tmp_path) -> None:
    with StoreWriter(tmp_path / "s") as writer:
        for number in (1, 2):
            writer.add_image(number, b"%d" % number)
        with pytest.raises(DataFault, match="stands on 2 pictures, and has boxes"):
            writer.add_text(1, "both", [1, 2], beside={"boxes": [[0, 0, 1, 1]]})
        with pytest.raises(DataFault, match="stands on 0 pictures, and has weight"):
            writer.add_text(1, "none", [], beside={"weight": 2})
        writer.add_text(1, "both", [1, 2], beside={"weight": 2})
        store = writer.finish()
    assert [store.beside(number) for number in (0, 1)] == [{"weight": 2.0}] * 2


def change(store: Path, key: bytes, value: bytes | None) -> None:
    with lmdb.open(str(store / "pairs"), map_size=2**24, lock=False) as environment, environment.begin(write=True) as t:
        t.put(key, value) if value is not None else t.delete(key)


def key_of(number: int) -> bytes:
    return b"beside" + number.to_bytes(8, "big")


DAMAGES = {
    "no record": (lambda s: change(s, key_of(3), b"[]"), "what stands beside pair 3 is no record"),
    "another kind": (lambda s: change(s, key_of(3), b'{"boxes":[[0,0,2,1]]}'), "pair 3 is no record"),
    "not UTF-8": (lambda s: change(s, key_of(3), b'{"negatives":["\xff"]}'), "pair 3 is no record"),
    "deep": (lambda s: change(s, key_of(3), b"[" * 100_000), "pair 3 is no record"),
    "one is gone": (lambda s: change(s, key_of(3), None), "are there, the store says"),
    "one too many": (lambda s: change(s, key_of(1), b'{"weight":1.0}'), "are there, the store says"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_and_named(tmp_path, damage: str) -> None:
    build(tmp_path / "s").close()
    spoil, why = DAMAGES[damage]
    spoil(tmp_path / "s")
    with pytest.raises(DataFault):
        open_store(tmp_path / "s")  # another file than the manifest speaks of
    (tmp_path / "s" / "manifest.json").unlink()
    with pytest.raises(DataFault, match=why):
        measure(open_store(tmp_path / "s"), progress=False)


def test_a_number_of_no_pair_is_found(tmp_path) -> None:
    build(tmp_path / "s").close()
    change(tmp_path / "s", key_of(3), None)
    change(tmp_path / "s", key_of(99), b'{"weight":1.0}')
    (tmp_path / "s" / "manifest.json").unlink()
    with pytest.raises(DataFault, match="beside pair 99, which is not there"):
        measure(open_store(tmp_path / "s"), progress=False)


def test_a_flipped_bit_names_the_pair(tmp_path) -> None:
    with StoreWriter(tmp_path / "s") as writer:
        writer.add_image(1, b"one")
        for number in range(9):  # some 9 kB: on pages of its own
            writer.add_pair(1, number, f"text {number}", beside={"negatives": [f"no {number} " + "x" * 9000]})
        writer.finish().close()
    file = tmp_path / "s" / "pairs" / "data.mdb"
    data = file.read_bytes()
    file.write_bytes(data.replace(b"no 7 xx", b"no 6 xx"))
    with pytest.raises(DataFault, match=r"what stands beside pair 7 \(1 in all\) differ from what was written"):
        refuse_damage(open_store(tmp_path / "s", sample=False), progress=False)


def test_another_version_and_meta_without_counts_are_refused(tmp_path) -> None:
    for number, (changes, why) in enumerate(
        [({"version": 3}, "version 3"), ({"beside": None}, "meta"), ({"beside": {"pairs": 22}}, "meta")]
    ):
        target = tmp_path / str(number)
        build(target).close()
        (target / "manifest.json").unlink()
        with lmdb.open(str(target / "pairs"), map_size=2**24, lock=False) as environment, environment.begin() as t:
            meta = json.loads(t.get(b"meta"))
        change(target, b"meta", json.dumps(meta | changes).encode())
        with pytest.raises((RequestError, DataFault), match=why):
            open_store(target)
    shutil.rmtree(tmp_path / "0")
