"""The index of shards: made once, by many if they like, kept, and made anew where a shard changed."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
from pathlib import Path

import pytest

from data_tools.errors import DataFault, RequestError, UserError
from data_tools.shards import ShardSource, open_pairs
from data_tools.shards.index import FOLDER, Shards
from data_tools.shards.part import index_shard
from tests.data_tools.shard_samples import everything, samples, write_tar

pytestmark = pytest.mark.usefixtures("own_cache")


def _changed(tars: Path, how: str) -> None:
    one, two = tars / "00001.tar", tars / "00002.tar"
    if how == "cut":
        os.truncate(one, one.stat().st_size // 2)
    elif how == "replaced":
        write_tar(one, samples(70, 5, captions=2))
    else:
        one.rename(tars / "x")
        two.rename(one)
        (tars / "x").rename(two)


@pytest.mark.parametrize("how", ["cut", "replaced", "reordered"])
def test_a_changed_shard_is_named_and_indexed_anew(tars, how, capsys) -> None:
    before = open_pairs(tars)
    known = before.checksum(), before.order(), before.generation
    _changed(tars, how)
    with pytest.raises(UserError, match="00001.tar is not the shard whose index is read"):
        pickle.loads(pickle.dumps(before)).image("000000")
    capsys.readouterr()
    after = open_pairs(tars)
    said = capsys.readouterr().err
    assert "00001.tar is not the shard it was" in said and "made anew" in said
    assert ("00002.tar is not" in said) == (how == "reordered")
    now = after.checksum(), after.order(), after.generation
    assert now[1] != known[1] and now[2] != known[2]
    for image_id in after.image_ids:
        after.image(image_id)
    assert len(list((tars / FOLDER).glob("joined-*"))) == 1


def test_a_missing_shard_is_named(tars) -> None:
    open_pairs(tars)
    (tars / "00001.tar").unlink()
    for place in (tars, f"{tars}/*.tar"):
        with pytest.raises(RequestError, match="00001.tar is gone, and was there when the index was made"):
            open_pairs(place)
    os.unlink(tars / FOLDER / "00001.tar.part.npz")
    assert len(open_pairs(tars)) == 20


def test_a_shard_that_is_cut_while_it_is_read(tars) -> None:
    source = open_pairs(tars)
    first, last = source.image_ids[0], source.image_ids[4]
    source.image(first)
    os.truncate(tars / "00001.tar", 2000)
    with pytest.raises(DataFault, match="00001.tar: the picture cannot be read"):
        source.image(last)


def test_an_index_is_made_once_and_goes_along_with_a_copy(tars, tmp_path, monkeypatch) -> None:
    generation = open_pairs(tars).generation
    monkeypatch.setattr("data_tools.shards.index.index_shard", None)  # never again
    monkeypatch.setattr("data_tools.shards.index.join", None)
    assert open_pairs(tars).generation == generation
    shutil.copytree(tars, tmp_path / "copy", copy_function=shutil.copyfile)  # other times
    assert open_pairs(tmp_path / "copy").generation == generation
    tars.rename(tmp_path / "moved")
    moved = open_pairs(tmp_path / "moved")
    assert moved.generation == generation and moved.image(moved.image_ids[3])


def test_a_part_of_another_version_or_a_damaged_one_is_made_again(tars) -> None:
    open_pairs(tars)
    home = tars / FOLDER
    for joined in home.glob("joined-*"):
        (joined / "texts").write_bytes(b"x")
    part = home / "00001.tar.part.npz"
    part.write_bytes(part.read_bytes()[:-100])
    (home / "00002.tar.part.npz").write_bytes(b"")
    source = open_pairs(tars)
    assert len(list(source.pairs())) == 30 and all(source.image(image_id) for image_id in source.image_ids)


def test_where_shards_lie_that_cannot_be_written(tars, monkeypatch) -> None:
    if os.geteuid() == 0:  # to whom every folder can be written
        monkeypatch.setattr("data_tools.shards.index.os.access", lambda place, _: tars not in Path(place).parents)
    else:
        tars.chmod(0o555)
    source = open_pairs(tars)
    assert source.image(source.image_ids[0])
    assert isinstance(source, ShardSource) and Path(os.environ["CNCLIP_FT_CACHE"]) in source.folder.parents
    assert everything(open_pairs(tars)) == everything(source)


def test_many_processes_share_the_work(tmp_path) -> None:
    for number in range(8):
        write_tar(tmp_path / "t" / f"{number:05d}.tar", samples(number * 3, 3))
    alone = Shards(tmp_path / "t")
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        folders = pool.map(_index, [tmp_path / "t"] * 3)
    assert set(folders) == {alone.index()}
    assert sorted(os.listdir(tmp_path / "t" / FOLDER)) == sorted(
        [f"{n:05d}.tar.part.npz" for n in range(8)] + [folders[0].name]
    )


def _index(place: Path) -> Path:
    return Shards(place).index()


def test_workers_of_one_process(tars) -> None:
    folder = Shards(tars).index(workers=2)
    shutil.move(tars / FOLDER, tars.parent / "with-workers")
    assert Shards(tars).index().name == folder.name


@pytest.mark.parametrize("block", [1, 4, 1000])
def test_ids_are_sorted_in_blocks(block) -> None:
    import numpy as np

    from data_tools.shards.joining import _Ids, in_order

    generator = np.random.default_rng(0)
    parts = [
        np.array([f"{n:x}".encode() for n in generator.integers(0, 300, size)], dtype=f"S{size % 5 + 3}")
        for size in (0, 50, 1, 37, 80, 3)
    ]
    starts = np.cumsum([0, *map(len, parts)])
    known = list(in_order(len(parts), lambda at: _Ids.of(parts[at], int(starts[at])), block))
    found = [
        (key, number) for keys, numbers in known for key, number in zip(keys.tolist(), numbers.tolist(), strict=True)
    ]
    wanted = sorted(
        (key, int(start) + at)
        for start, part in zip(starts, parts, strict=False)
        for at, key in enumerate(part.tolist())
    )
    assert found == wanted
    for before, after in zip(known, known[1:], strict=False):
        assert before[0][-1] < after[0][0]


def test_a_shard_that_grows_while_it_is_read(tars, monkeypatch) -> None:
    from data_tools.shards import part

    def grow(self, item):
        with (tars / "00000.tar").open("ab") as file:
            file.write(b"\0" * 512)

    monkeypatch.setattr(part._Collected, "take", grow)
    with pytest.raises(RequestError, match="00000.tar changes while it is read"):
        index_shard(tars / "00000.tar")
