"""The store: what is written is read, in both layouts, in one piece or in shards, in any process."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import lmdb
import pytest

from data_tools.errors import DataFault, RequestError
from data_tools.store import Pair, StoreWriter, open_store
from data_tools.store.environments import GrowingWriter
from data_tools.store.layouts import canonical_id, id_key, key_id
from tests.data_tools.samples import content

IDS = [-(2**63), -1, 0, 7, 10, 2**63 - 1]


def fill(target: Path, images: int = 10, **options) -> Path:
    with StoreWriter(target, **options) as writer:
        for image_id in range(images):
            writer.add_image(image_id, b"picture %d" % image_id * 50)
        for text_id in range(3 * images):
            writer.add_pair(text_id % images, text_id, f"句子 {text_id}", "zh" if text_id % 2 else None)
        writer.add_text("both", "on two images", [1, 2], "en")
        writer.add_lone_text("lone", "搜索用的词", "zh")
        writer.finish().close()
    return target


@pytest.mark.parametrize("shard_size", [None, 3, 10, 100])
@pytest.mark.parametrize("layout", ["plain", "official"])
def test_what_is_written_is_read(tmp_path, layout: str, shard_size: int | None) -> None:
    store = open_store(fill(tmp_path / "train", layout=layout, shard_size=shard_size))
    images, pairs, lone = content(store)
    assert images == {image_id: b"picture %d" % image_id * 50 for image_id in range(10)}
    assert all(type(images[n]) is bytes and store.image_view(n) == images[n] for n in range(10))
    with pytest.raises(KeyError):
        store.image_view(10)
    told = {(n % 10, n, f"句子 {n}", "zh" if n % 2 else None) for n in range(30)} | {
        (1, "both", "on two images", "en"),
        (2, "both", "on two images", "en"),
    }
    if layout == "official":
        told = {(image_id, text_id, text, None) for image_id, text_id, text, _ in told}
    assert {(p.image_id, p.text_id, p.text, p.language) for p in pairs} == told
    assert (len(store), len(pairs), store.image_count) == (32, 32, 10)
    assert pairs == [store[index] for index in range(32)]
    assert lone == [("lone", "搜索用的词", "zh")]
    assert store.shards == {None: 1, 3: 4, 10: 1, 100: 1}[shard_size]
    assert (store.name, store.layout) == ("train", layout)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train"]


@pytest.mark.parametrize("how", ["missing", "damaged", "not utf-8"])
def test_a_wrong_pair_of_a_run_is_named(tmp_path, how) -> None:
    folder = fill(tmp_path / "train")
    environment = lmdb.open(str(folder / "pairs"), map_size=2**24)
    with environment.begin(write=True) as transaction:
        key = (5).to_bytes(8, "big")
        if how == "missing":  # and another in its place, so that the count is right
            transaction.delete(key)
            transaction.put((2**40).to_bytes(8, "big"), b'[0,0,"x",null]')
        else:
            transaction.put(key, b"[1,2]" if how == "damaged" else b'[1,2,"\xff",null]')
    environment.close()
    (folder / "manifest.json").unlink()  # the file's size is another
    store = open_store(folder)
    said = {"missing": "pair 5 of 32 is missing", "damaged": "pair 5 is not \\[", "not utf-8": "pair 5 is not JSON"}[
        how
    ]
    for start, stop in [(0, 32), (5, 6), (3, 9), (5, 32), (0, 6)]:
        with pytest.raises(DataFault, match=said):
            store.fields(start, stop)
    assert [len(store.fields(start, stop)) for start, stop in [(0, 5), (6, 32)]] == [5, 26]


def test_the_checksum_is_of_the_content_alone(tmp_path) -> None:
    sums = {
        open_store(fill(tmp_path / str(number), layout=layout, shard_size=size)).checksum()
        for number, (layout, size) in enumerate([("plain", None), ("plain", 4), ("official", None), ("official", 3)])
    }
    assert len(sums) == 1
    store = open_store(tmp_path / "0")
    store._open()[0].meta.pop("sums")  # as if the official code had written it: computed from the content
    assert {store.checksum()} == sums
    assert {open_store(fill(tmp_path / "other", images=9)).checksum()} != sums


def test_ids_are_kept_as_given(tmp_path) -> None:
    ids = [*IDS, "7", "a/b.jpg", "图 片", "x" * 500]
    with StoreWriter(tmp_path / "s") as writer:
        for number, image_id in enumerate(ids):
            writer.add_image(image_id, b"%d" % number)
            writer.add_pair(image_id, image_id, f"text {number}")
        store = writer.finish()
    assert store.image_ids == IDS + sorted(ids[len(IDS) :], key=lambda name: name.encode())
    assert [store.image(image_id) for image_id in ids] == [b"%d" % number for number in range(len(ids))]
    assert [(pair.image_id, pair.text_id) for pair in store.pairs()] == [(image_id, image_id) for image_id in ids]
    with pytest.raises(KeyError):
        store.image(8)
    with pytest.raises(IndexError):
        store[len(ids)]
    with pytest.raises(IndexError):
        store[-1]


@pytest.mark.parametrize("item_id", [*IDS, "7", "图"])
def test_keys_give_their_ids_back(item_id) -> None:
    assert key_id(id_key(item_id)) == item_id


@pytest.mark.parametrize(
    ("name", "item_id"),
    [
        ("7", 7),
        ("-7", -7),
        ("0", 0),
        ("007", "007"),
        ("-0", "-0"),
        ("7.0", "7.0"),
        ("٣", "٣"),
        ("9" * 19, "9" * 19),
        ("", ""),
    ],
)
def test_decimal_words_are_numbers_only_in_their_one_spelling(name, item_id) -> None:
    assert canonical_id(name) == item_id and type(canonical_id(name)) is type(item_id)


@pytest.mark.parametrize("bad", [True, 1.5, None, "", "x" * 501, 2**63, "\ud83d"])
def test_what_is_no_id_is_refused(tmp_path, bad) -> None:
    with StoreWriter(tmp_path / "s") as writer, pytest.raises(DataFault, match="id"):
        writer.add_image(bad, b"x")
    assert not list(tmp_path.iterdir())


def test_two_images_or_texts_of_one_id_and_texts_without_image_are_refused(tmp_path) -> None:
    with StoreWriter(tmp_path / "s") as writer:
        writer.add_image(1, b"one")
        writer.add_pair(1, 1, "a")
        for wrong, kind in (
            (lambda: writer.add_image(1, b"other"), "duplicate-image-id"),
            (lambda: writer.add_pair(1, 1, "b"), "duplicate-text-id"),
            (lambda: writer.add_pair(2, 2, "c"), "missing-image"),
            (lambda: writer.add_pair(1, 3, " "), "bad-text"),
            (lambda: writer.add_pair(1, 4, "\ud83d"), "bad-text"),
            (lambda: writer.add_pair(1, 5, "d", 'a"b'), "bad-language"),
        ):
            with pytest.raises(DataFault) as caught:
                wrong()
            assert caught.value.kind == kind
        store = writer.finish()
    assert list(store.pairs()) == [Pair(1, 1, "a")]


def test_the_official_layout_numbers_words_and_keeps_the_list(tmp_path) -> None:
    with StoreWriter(tmp_path / "s", layout="official", shard_size=2) as writer:
        for name in ("b.jpg", "a.jpg", "c.jpg"):
            writer.add_image(name, name.encode())
        writer.add_pair("a.jpg", "t", "text")
        with pytest.raises(DataFault, match="number"):
            writer.add_image(5, b"")
        store = writer.finish()
    assert store.image_ids == [1, 2, 3] and [store.image(k) for k in (1, 2, 3)] == [b"b.jpg", b"a.jpg", b"c.jpg"]
    assert list(store.pairs()) == [Pair(2, "t", "text")]
    assert (tmp_path / "s" / "image_ids.tsv").read_text("utf-8").splitlines() == ["2\ta.jpg", "1\tb.jpg", "3\tc.jpg"]


def test_a_writer_that_fails_leaves_the_old_store_and_nothing_else(tmp_path) -> None:
    fill(tmp_path / "s")
    before = open_store(tmp_path / "s").checksum()
    with pytest.raises(ZeroDivisionError), StoreWriter(tmp_path / "s") as writer:
        writer.add_image(1, b"x")
        raise ZeroDivisionError
    assert open_store(tmp_path / "s").checksum() == before
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_a_new_store_takes_the_place_of_an_open_one(tmp_path) -> None:
    old = open_store(fill(tmp_path / "s"))
    assert old[0].text == "句子 0"
    with StoreWriter(tmp_path / "s") as writer:
        writer.add_image(99, b"new")
        writer.add_pair(99, 1, "new")
        new = writer.finish()
    assert [pair.text for pair in new.pairs()] == ["new"]
    assert open_store(tmp_path / "s").image_ids == [99]
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_replacing_in_two_steps_never_loses_the_old_store(tmp_path, monkeypatch) -> None:
    from data_tools import atomic

    monkeypatch.setattr(atomic, "_exchange", lambda *_: False)
    before = open_store(fill(tmp_path / "s", images=4)).checksum()
    renamed, rename = [], os.rename

    def dies_between(*names) -> None:
        if renamed:
            raise KeyboardInterrupt
        renamed.append(names)
        rename(*names)

    monkeypatch.setattr(os, "rename", dies_between)
    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path / "s", images=5, request={"what": "new"})
    assert not (tmp_path / "s").exists()
    assert open_store(tmp_path / "s").checksum() == before  # found where it waits
    monkeypatch.setattr(os, "rename", rename)
    after = open_store(fill(tmp_path / "s", images=6)).checksum()
    assert after != before and [path.name for path in tmp_path.iterdir()] == ["s"]


def test_two_builds_of_one_place_do_not_meet(tmp_path) -> None:
    with StoreWriter(tmp_path / "s"):
        code = f"from data_tools.store import StoreWriter; StoreWriter({str(tmp_path / 's')!r})"
        root = Path(__file__).resolve().parents[2]
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(root)}
        )
    assert done.returncode == 1 and "another process is building" in done.stderr


def test_the_map_grows_and_the_file_is_no_larger_than_its_content(tmp_path) -> None:
    writer = GrowingWriter(tmp_path / "x")
    for number in range(0, 60, 5):  # 60 MiB into a map of 16
        writer.write([(b"%03d" % k, bytes([k]) * 2**20) for k in range(number, number + 5)])
    writer.close()
    assert (tmp_path / "x" / "data.mdb").stat().st_size < 62 * 2**20
    with lmdb.open(str(tmp_path / "x"), readonly=True, lock=False) as environment, environment.begin() as transaction:
        assert all(transaction.get(b"%03d" % number) == bytes([number]) * 2**20 for number in range(60))


def test_a_value_larger_than_the_map_is_written(tmp_path) -> None:
    with StoreWriter(tmp_path / "s") as writer:
        writer.add_image(1, b"x" * (40 * 2**20))
        writer.add_pair(1, 1, "large")
        store = writer.finish()
    assert len(store.image(1)) == 40 * 2**20


def test_a_store_goes_to_other_processes(tmp_path) -> None:
    store = open_store(fill(tmp_path / "s", shard_size=4))
    assert pickle.loads(pickle.dumps(store))[3] == store[3]
    code = "import pickle, sys; store = pickle.load(sys.stdin.buffer); print(store[5].text_id, len(store.image(5)), store.name)"
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=pickle.dumps(store),
        capture_output=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert done.stdout.split()[1:] == [b"450", b"s"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_store_opened_before_a_fork_is_opened_anew_behind_it(tmp_path) -> None:
    code = f"""
import os
from data_tools.store import open_store
store = open_store({str(fill(tmp_path / "s"))!r})
first, image = store[3], store.image(4)
for _ in range(3):
    child = os.fork()
    if child == 0:
        shards = store._shards
        ok = store[3] == first and store.image(4) == image and store._shards is not shards
        os._exit(0 if ok else 1)
    assert os.waitpid(child, 0)[1] == 0
assert store[3] == first and store.image(4) == image
"""
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(root)}, timeout=60)


def test_an_unknown_version_is_refused(tmp_path) -> None:
    target = fill(tmp_path / "s")
    with (
        lmdb.open(str(target / "pairs"), map_size=2**24, lock=False) as environment,
        environment.begin(write=True) as transaction,
    ):
        meta = json.loads(transaction.get(b"meta"))
        transaction.put(b"meta", json.dumps({**meta, "version": 99}).encode())
    with pytest.raises(RequestError, match="version 99"):
        open_store(target)


def test_what_is_not_a_store_is_said(tmp_path) -> None:
    with pytest.raises(RequestError, match="no such folder"):
        open_store(tmp_path / "nothing")
    fill(tmp_path / "data" / "train")
    with pytest.raises(RequestError, match=r"name a split: .*train"):
        open_store(tmp_path / "data")
    (tmp_path / "half" / "pairs").mkdir(parents=True)
    with pytest.raises(RequestError, match="data.mdb is missing"):
        open_store(tmp_path / "half")
    broken = fill(tmp_path / "broken")
    (broken / "imgs" / "data.mdb").write_bytes(b"not lmdb" * 2000)
    with pytest.raises(RequestError, match="not a readable LMDB file"):
        open_store(broken)
    sharded = fill(tmp_path / "sharded", shard_size=4)
    (sharded / "shard-00002").rename(tmp_path / "away")
    with pytest.raises(RequestError, match="2 shards are there, the store has 3"):
        open_store(sharded)


class _Opens:
    """A pickle that would run a program."""

    def __reduce__(self):
        return os.system, ("touch should-not-exist",)


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (pickle.dumps(_Opens()), "import"),
        (pickle.dumps([1, 2, "x"]), "list"),
        (pickle.dumps((1, 2)), "tuple"),
        (pickle.dumps((1, 2, 3)), "tuple"),
        (pickle.dumps((True, 2, "x")), "tuple"),
        (pickle.dumps((1, 2.0, "x")), "tuple"),
        (b"", "refused"),
        (b"\x80\x04", "refused"),
        (pickle.dumps((1, 2, "x"))[:-3], "refused"),
        (b"garbage", "refused"),
    ],
)
def test_pickles_of_anything_but_a_plain_pair_are_refused_with_their_key(
    tmp_path, monkeypatch, value: bytes, why: str
) -> None:
    monkeypatch.chdir(tmp_path)
    target = fill(tmp_path / "s", layout="official")
    with (
        lmdb.open(str(target / "pairs"), map_size=2**24, lock=False) as environment,
        environment.begin(write=True) as transaction,
    ):
        transaction.put(b"5", value)
    (target / "manifest.json").unlink()  # the file is another one now
    store = open_store(target)
    assert store[4].text_id == 4
    with pytest.raises(DataFault, match=f"key 5.*{why}") as caught:
        store[5]
    assert caught.value.item_id == "5" and not (tmp_path / "should-not-exist").exists()
