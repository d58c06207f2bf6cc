"""Parts of a source built one by one, and `data join`: the same data set as the store that was built at once."""

from __future__ import annotations

import io
import pickle
import shutil
import tarfile

import pytest

from data_tools.build import build_store
from data_tools.errors import DataFault, RequestError
from data_tools.items import ImageItem, Stream, TextItem
from data_tools.joining import join
from data_tools.sources import SourceOptions, open_source
from data_tools.sources.share import Share, ShareOf
from data_tools.store import StoreWriter, open_store, stores_below
from data_tools.store.joined import is_joined
from tests.evaluation import tiny


class Made:
    """Pictures with two captions each, a text on two pictures, a lone text, two faults; `order` shuffles nothing it says."""

    kind = "made"

    def __init__(self, images: int = 40, damaged: int = 3) -> None:
        self.images, self.damaged = images, damaged

    def open(self):
        return Stream(self._items())

    def _items(self):
        for n in range(self.images):
            name = n if n % 2 else f"图/{n}"
            data = b"no picture" if n == self.damaged else tiny.png(n)
            yield ImageItem(name, data, columns={"n": n} if n % 3 else None)
        number = 0
        for n in range(self.images):
            name = n if n % 2 else f"图/{n}"
            for text in (f"东西 {n}", f"thing {n}"):
                number += 1
                yield TextItem(
                    number, text, (name,), own_number=True, beside={"weight": n + 0.5} if n % 5 == 0 else None
                )
            if n % 4 == 0 and n + 2 < self.images:
                number += 1
                yield TextItem(number, f"both {n}", (name, f"图/{n + 2}"), own_number=True)
        yield TextItem(10_000, "没有图", ())

    def fingerprint(self):
        return {"made": self.images}

    def expected(self):
        return {}


def records(store):
    return {
        "images": {image_id: (store.image(image_id), store.columns_of(image_id)) for image_id in store.image_ids},
        "pairs": sorted((str(p.image_id), p.text_id, p.text, str(b)) for p, b in store.pairs_and_beside()),
        "lone": store.lone_texts,
    }


@pytest.fixture
def parts(tmp_path):
    return [build(ShareOf(Made(), Share(k, 4)), tmp_path / f"part-{k}") for k in (1, 2, 3, 4)]


def build(source, place):
    return build_store(source, place, on_error="skip", progress=False).store.path


@pytest.mark.parametrize("given", ["", "3", "0/4", "5/4", "a/b", "1/0", "-1/4", "1/4/2"])
def test_shares_that_are_none(given):
    with pytest.raises(RequestError, match="like 3/64"):
        Share.parse(given)


def test_parts_joined_are_the_store_built_at_once(parts, tmp_path):
    whole = open_store(build(Made(), tmp_path / "whole"))
    joined, lines = join([parts[2], parts[0], parts[3], parts[1]], tmp_path / "all.yaml")  # in any order
    assert records(joined) == records(whole) and lines == [f"{tmp_path}/all.yaml: 4 stores, 39 images, 98 pairs"]
    assert joined.checksum() == whole.checksum() and joined.checksum() == joined.stated_checksum
    assert list(joined.image_ids) == list(whole.image_ids) and joined.image_ids[3:7] == whole.image_ids[3:7]
    assert joined.image_ids[-1] == whole.image_ids[-1] and len(joined.image_ids) == joined.image_count
    assert joined.beside_counts == whole.beside_counts and joined.columns == ["n"]
    assert dict(joined.all_beside()) == {n: joined.beside(n) for n in range(len(joined)) if joined.beside(n)}
    assert [joined[n] for n in range(len(joined))] == list(joined.pairs())
    assert 1 in joined and 999 not in joined
    with pytest.raises(KeyError):
        joined.image(999)
    with pytest.raises(IndexError):
        joined[len(joined)]
    assert all(0 < len(open_store(part)) < len(whole) for part in parts)
    for each in (pickle.loads(pickle.dumps(joined)), open_store(tmp_path / "all.yaml")):
        assert each.generation == joined.generation and records(each) == records(whole)


def test_the_description_moves_with_its_stores(parts, tmp_path):
    place = tmp_path / "set"
    place.mkdir()
    for part in parts:
        shutil.move(part, place / part.name)
    join([place / part.name for part in parts], place / "all.json")
    assert is_joined(place / "all.json")
    assert stores_below(place) == [place / part.name for part in parts]  # the splits of a folder are folders
    place.rename(tmp_path / "moved")
    assert open_store(tmp_path / "moved" / "all.json").image_count == 39


def test_what_is_no_data_set_is_refused(parts, tmp_path):
    other = build(ShareOf(Made(images=20), Share(2, 4)), tmp_path / "other")
    whole = build(Made(), tmp_path / "whole")
    copy = shutil.copytree(parts[1], tmp_path / "copy")
    for given, problem in (
        (parts[:3], "1 part of 4 are missing: 4/4"),
        ([*parts, parts[0]], "stands twice"),
        ([*parts, copy], "are both part 2/4"),
        ([*parts[:1], other, *parts[2:]], "part 2/4 of another source"),
        ([*parts, whole], "is no part of anything"),
        ([tmp_path], "is not a store"),
    ):
        with pytest.raises(RequestError, match=problem):
            join(given, tmp_path / "all.yaml")
    with pytest.raises(RequestError, match="ends in"):
        join(parts, tmp_path / "all")
    (tmp_path / "notes.yaml").write_text("mine: 1\n")
    for overwrite in (False, True):
        with pytest.raises(RequestError, match="is no description"):
            join(parts, tmp_path / "notes.yaml", overwrite=overwrite)
    join(parts, tmp_path / "all.yaml")
    with pytest.raises(RequestError, match="--overwrite"):
        join(parts, tmp_path / "all.yaml")
    join(parts, tmp_path / "all.yaml", overwrite=True)


def test_a_part_that_is_gone_or_another_is_named(parts, tmp_path):
    join(parts, tmp_path / "all.yaml")
    build_store(ShareOf(Made(), Share(2, 4)), parts[1], on_error="skip", overwrite=True, progress=False)
    with pytest.raises(DataFault, match="store 2 of 4, .*part-2, is another one than was joined"):
        open_store(tmp_path / "all.yaml")
    shutil.rmtree(parts[1])
    with pytest.raises(RequestError, match="part-2: no such folder"):
        open_store(tmp_path / "all.yaml")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("joined: 2\nstores: []\n", "joined"),
        ("joined: 1\nstores: []\n", "stores"),
        ("joined: 1\nstores: [{path: a}]\n", "generation"),
        ("joined: 1\nstores: [\n", "not readable"),
        ("joined: 1\nstores: x\nmore: 1\n", "stores"),
    ],
)
def test_descriptions_that_are_none(tmp_path, content, problem):
    (tmp_path / "a.yaml").write_text(content)
    assert is_joined(tmp_path / "a.yaml")
    with pytest.raises(RequestError, match=problem):
        open_store(tmp_path / "a.yaml")
    assert not is_joined(tmp_path / "b.yaml") and not is_joined(tmp_path)


def plain(place, *, pictures, texts):
    with StoreWriter(place) as writer:
        for image_id, seed in pictures.items():
            writer.add_image(image_id, tiny.png(seed))
        for text_id, (image_id, text) in texts.items():
            writer.add_pair(image_id, text_id, text, "zh")
        writer.finish()
    return place


def test_whole_stores_whose_ids_mean_one_thing(tmp_path):
    a = plain(tmp_path / "a", pictures={1: 1, 2: 2}, texts={1: (1, "红"), 2: (2, "绿")})
    b = plain(tmp_path / "b", pictures={2: 2, 3: 3}, texts={3: (2, "green"), 4: (3, "blue"), 1: (3, "红")})
    joined, lines = join([a, b], tmp_path / "all.yaml")
    assert list(joined.image_ids) == [1, 2, 3] and joined.image_count == 3 and len(joined) == 5
    assert "1 picture in more than one of them" in lines[1]
    other = plain(tmp_path / "c", pictures={2: 99}, texts={9: (2, "x")})
    with pytest.raises(RequestError, match="image 2 of .*c is another picture than in .*a"):
        join([a, other], tmp_path / "no.yaml")
    texts = plain(tmp_path / "d", pictures={7: 7}, texts={2: (7, "蓝")})
    with pytest.raises(RequestError, match="text 2 is '绿' in .*a and '蓝' in .*d"):
        join([a, texts], tmp_path / "no.yaml")
    assert not (tmp_path / "no.yaml").exists()


def tars(folder, count=5):
    folder.mkdir()
    for shard in range(count):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for n in range(4):
                for ending, data in (("png", tiny.png(shard * 4 + n)), ("txt", f"东西 {shard * 4 + n}".encode())):
                    member = tarfile.TarInfo(f"{shard * 4 + n:09d}.{ending}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return folder


def test_whole_files_where_there_are_enough(tmp_path):
    place = tars(tmp_path / "shards")
    whole = open_store(build(open_source("webdataset", str(place))[""], tmp_path / "whole"))
    ways = [str(place), [str(file) for file in sorted(place.iterdir(), reverse=True)]]
    stores = []
    for k in (1, 2, 3):
        source = ShareOf(open_source("webdataset", ways[k % 2], SourceOptions())[""], Share(k, 3))
        assert source.by == "files" and source.part["by"] == "files"
        stores.append(build(source, tmp_path / f"p{k}"))
    assert [open_store(store).image_count for store in stores] == [8, 8, 4]
    joined, _ = join(stores, tmp_path / "all.yaml")
    found, wanted = records(joined), records(whole)
    assert found["images"] == wanted["images"]
    # Counted numbers of texts are others: no number is two texts.
    assert sorted((i, t) for i, _, t, _ in found["pairs"]) == sorted((i, t) for i, _, t, _ in wanted["pairs"])
    assert len({pair[1] for pair in found["pairs"]}) == 20
