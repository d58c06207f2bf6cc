"""A reader holds what it opened: in this process, in workers, behind a fork, sent elsewhere."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
from pathlib import Path

import pytest

from data_tools.errors import UserError
from data_tools.store import StoreWriter, open_store


def build(target: Path, order: range, **options) -> Path:
    with StoreWriter(target, **options) as writer:
        for number in range(8):
            writer.add_image(number, b"picture %d" % order[number])
        for number in order:
            writer.add_pair(number, number, f"picture {order[number]}")
        writer.finish().close()
    return target


def agree(store) -> bool:
    return all(store.image(pair.image_id).decode() == pair.text for pair in store.pairs())


def _read(data: bytes, answers) -> None:
    try:
        store = pickle.loads(data)
        answers.put(("read", agree(store), store.generation))
    except UserError as error:
        answers.put(("refused", str(error), None))


def asked(store, way: str) -> tuple:
    context = multiprocessing.get_context(way)
    answers = context.Queue()
    process = context.Process(target=_read, args=(pickle.dumps(store), answers))
    process.start()
    answer = answers.get(timeout=60)
    process.join()
    return answer


@pytest.mark.parametrize("shard_size", [None, 3])
@pytest.mark.parametrize("layout", ["plain", "official"])
def test_a_replaced_store_is_held_here_and_refused_elsewhere(tmp_path, layout, shard_size) -> None:
    target = build(tmp_path / "s", range(8), layout=layout, shard_size=shard_size)
    store = open_store(target)
    before, sent = store.generation, pickle.dumps(store)
    assert pickle.loads(sent).generation == before and agree(pickle.loads(sent))
    build(target, range(7, -1, -1), layout=layout, shard_size=shard_size)
    assert agree(store) and store.image(0) == b"picture 0"  # as it was opened
    assert open_store(target).image(0) == b"picture 7"
    with pytest.raises(UserError, match="replaced while it was being read"):
        pickle.loads(sent)[0]
    if hasattr(os, "fork") and layout == "plain":
        kind, said, _ = asked(store, "fork")
        assert kind == "refused" and "replaced" in said
    shutil.rmtree(target)
    assert agree(store) or os.name == "nt"
    with pytest.raises(UserError, match="cannot be opened any more"):
        pickle.loads(sent)[0]


def test_a_spawned_process_is_told(tmp_path) -> None:
    store = open_store(build(tmp_path / "s", range(8)))
    assert asked(store, "spawn") == ("read", True, store.generation)
    build(tmp_path / "s", range(8))  # of equal content, but another build
    kind, said, _ = asked(store, "spawn")
    assert kind == "refused" and "Start again" in said


def test_generation_checksum_and_order_tell_builds_content_and_rows(tmp_path) -> None:
    store = open_store(build(tmp_path / "s", range(8)))
    copy = open_store(shutil.copytree(tmp_path / "s", tmp_path / "copy"))
    again = open_store(build(tmp_path / "again", range(8)))
    sharded = open_store(build(tmp_path / "sharded", range(8), shard_size=3))
    turned = open_store(build(tmp_path / "turned", range(8), layout="official"))
    assert copy.generation == store.generation != again.generation
    assert store.checksum() == again.checksum() == sharded.checksum() == turned.checksum()
    assert store.order() == again.order() == copy.order() == sharded.order()
    other = tmp_path / "other"
    with StoreWriter(other) as writer:
        for number in range(8):
            writer.add_image(number, b"picture %d" % number)
        for number in reversed(range(8)):
            writer.add_pair(number, number, f"picture {number}")
        writer.finish().close()
    assert open_store(other).checksum() == store.checksum() and open_store(other).order() != store.order()
    (tmp_path / "copy" / "manifest.json").unlink()
    assert open_store(tmp_path / "copy").order() == store.order()  # computed


def test_closing_one_reader_leaves_another_open(tmp_path) -> None:
    target = build(tmp_path / "s", range(8))
    first, second = open_store(target), open_store(target)
    first.close()
    assert agree(second) and agree(first)
