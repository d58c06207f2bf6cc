"""An index in Milvus (milvus-lite in this process): pictures, scores, filters of one in a folder; renewed, refused, interrupted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pymilvus", reason="not installed: pip install 'cnclip-ft[milvus]'")
pytest.importorskip("milvus_lite", reason="not installed: pip install 'cnclip-ft[milvus]'")

from cnclip_ft.search.engine.engine import open_engine, open_gallery
from cnclip_ft.search.engine.query import Question
from cnclip_ft.search.index import renewal
from cnclip_ft.search.index.collection import Collection, key_of, open_collection, row_id
from cnclip_ft.search.index.expressions import expression
from cnclip_ft.search.index.milvus import Milvus, milvus_place
from data_tools.columns import parse_where
from data_tools.errors import RequestError
from data_tools.store import StoreWriter
from tests.evaluation import tiny
from tests.search.encoded import counted
from tests.search.milvus_rows import equal, held

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "place", ["milvus:http://u:secret@host:1", "milvus:photos", "milvus:ftp://x/a.db2", "milvus:a.db#1-2"]
)
def test_places_that_are_none(place):
    with pytest.raises(RequestError) as error:
        milvus_place(place)
    assert "secret" not in str(error.value)


def test_places(tmp_path):
    assert milvus_place("photos.index") is None and milvus_place(Path("milvus.db")) is None
    place = milvus_place(f"milvus:{tmp_path}/a.db#goods")
    assert (place.uri, place.name, place.embedded) == (f"{tmp_path}/a.db", "goods", True)
    assert str(milvus_place("milvus:http://host:19530")) == "milvus:http://host:19530"


@pytest.mark.parametrize("key", [17, -3, "17", "-3", '"a"', "狗/雪 地.png", "a\nb", "\udcff.png", "", "damaged:1"])
def test_no_two_keys_have_one_id(key):
    assert key_of(row_id(key)) == key and row_id(17) != row_id("17")
    row_id(key).encode("utf-8")


def test_only_what_changed_is_encoded(make, checkpoint, photos, tmp_path, monkeypatch):
    place = f"milvus:{tmp_path}/i.db"
    (photos / "bad.png").write_bytes(b"no picture")
    said = make(checkpoint, photos, place)
    assert "20 pictures, 32 values each" in said and "bad.png: no readable image" in said
    before = held(place)
    seen = counted(monkeypatch)
    assert "nothing has changed" in make(checkpoint, photos, place) and seen == []
    (photos / "new.png").write_bytes(tiny.png(77))
    (photos / "bad.png").write_bytes(tiny.png(78))
    (photos / "dogs" / "00.png").write_bytes(tiny.png(88, size=50))
    (photos / "dogs" / "02.png").unlink()
    (photos / "dogs" / "04.png").write_bytes(b"hurt")
    said = make(checkpoint, photos, place)
    assert "17 as they were, 2 changed, 1 gone; 4 to encode" in said and "dogs/04.png: no readable image" in said
    assert sorted(seen) == ["bad.png", "dogs/00.png", "dogs/04.png", "new.png"]
    after = held(place)
    assert set(after) == set(before) - {"dogs/02.png", "dogs/04.png"} | {"new.png", "bad.png"}
    make(checkpoint, photos, f"milvus:{tmp_path}/fresh.db")
    assert equal(after, held(f"milvus:{tmp_path}/fresh.db"))
    seen.clear()
    assert "nothing has changed" in make(checkpoint, photos, place) and seen == []


def test_what_nobody_can_look_at_is_kept(make, checkpoint, photos, tmp_path):
    """As in a folder's index: a drive that is away has not lost its pictures."""
    place = f"milvus:{tmp_path}/i.db"
    (photos / "dogs").rename(tmp_path / "drive")
    (photos / "dogs").symlink_to(tmp_path / "drive")
    make(checkpoint, photos, place)
    before = held(place)
    (tmp_path / "drive").rename(tmp_path / "away")
    said = make(checkpoint, photos, place)
    assert "20 as they were, 0 changed, 0 gone" in said and "10 pictures of the index lie where nobody" in said
    assert equal(before, held(place))
    (photos / "dogs").unlink()  # now they are gone indeed
    assert "10 gone" in make(checkpoint, photos, place) and len(held(place)) == 10


@pytest.mark.parametrize("how", ["gone", "hurt", "killed"])
def test_the_number_of_a_picture_that_is_gone_is_never_given_again(
    make, checkpoint, photos, tmp_path, how, monkeypatch
):
    """A page that was served asks by number."""

    def numbers() -> dict:
        gallery = open_gallery(place)
        rows = [row for some in gallery._collection.walk(["id", "number"], 100) for row in some]
        gallery._collection.server.close()
        return {row["id"]: row["number"] for row in rows}

    place = f"milvus:{tmp_path}/i.db"
    make(checkpoint, photos, place)
    last = max(numbers(), key=numbers().get)
    (photos / last).write_bytes(b"hurt") if how == "hurt" else (photos / last).unlink()
    if how == "killed":
        monkeypatch.setattr(Collection, "forget_damaged", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            make(checkpoint, photos, place)
        monkeypatch.undo()
        assert len(numbers()) == 19
    else:
        make(checkpoint, photos, place)
    (photos / "new.png").write_bytes(tiny.png(77))
    make(checkpoint, photos, place)
    after = numbers()
    assert last not in after and after["new.png"] == 20


def test_names_that_are_let_go_of_meanwhile_are_asked_for_again(goods, monkeypatch):
    monkeypatch.setattr("cnclip_ft.search.engine.remote._KNOWN", 5)
    gallery = open_gallery(goods[1])
    for numbers in ([*range(6)], [0, 7], [1, *range(20, 40)]):
        assert [key for key, _ in gallery.described(numbers)] == numbers


CONDITIONS = [
    ["类目=女装"], ["类目=女装", "类目=鞋"], ["价格<100"], ["价格>=1,050"], ["价格=7"], ["价格<=1e2", "类目=鞋"], ["新=True"], ["n=14"],
    ["n>3", "n<9.5"], ["句=a\"b\\c"], ["价格=￥12"], ["类目=没有"], ["caption=东西 3"],
]  # fmt: skip


@pytest.fixture(scope="module")
def goods(make, checkpoint, tmp_path_factory):
    """A folder index and a collection of the same store, whose columns have all kinds of values."""
    folder = tmp_path_factory.mktemp("goods")
    with StoreWriter(folder / "valid") as writer:
        for n in range(60):
            kept = {
                "类目": "女装" if n % 3 else "鞋",
                "价格": f"￥{n * 100:,}" if n % 2 else n,
                "新": n % 4 == 0,
                "n": n,
            }
            writer.add_image(n, tiny.png(n % 50), columns=kept | ({"句": 'a"b\\c'} if n == 5 else {}))
            writer.add_pair(n, n, f"东西 {n}", "zh")
        writer.finish()
    make(checkpoint, folder / "valid", folder / "index")
    place = f"milvus:{folder}/goods.db"
    make(checkpoint, folder / "valid", place)
    return folder / "index", place


@pytest.fixture(scope="module")
def both(goods):
    return [open_engine(place, device="cpu") for place in goods]


def test_conditions_are_met_by_the_same_pictures(both):
    for where in CONDITIONS:
        question = Question("一张图", top=100, where=parse_where(where))
        local, remote = ({hit.key for hit in engine.ask([question])[0]} for engine in both)
        assert local == remote, where
        counts = [engine.ask([question])[0].matches for engine in both]
        assert counts == [len(local)] * 2
    for unsayable in ('"a\'b"=1', '"a[0]"=1'):
        with pytest.raises(RequestError, match="Milvus cannot be asked"):
            expression(parse_where([unsayable]))
    (unknown,) = both[1].ask([Question("图", where=parse_where(["品类=鞋"]))])
    assert "keeps no column '品类'; there are 类目, 价格, 新, n" in str(unknown)


def test_answers_are_those_of_a_folder(both):
    ways = [
        Question("狗", top=10),
        Question("一张图", without="车", top=25, skip=5),
        Question(like=7, top=10),
        Question("猫", like=3, top=59, where=parse_where(["类目=女装"])),
        Question(like=3, top=5, where=parse_where(["类目=女装"])),
        Question("狗", top=10, at_least=0.0),
    ]
    for question, local, remote in zip(ways, *(engine.ask(ways) for engine in both), strict=True):
        assert [hit.score for hit in local] == pytest.approx([hit.score for hit in remote], abs=2e-6)
        # Ten pictures are there twice: equal scores come in the order of the index in both.
        assert [(hit.key, hit.columns) for hit in local] == [(hit.key, hit.columns) for hit in remote]
        assert remote.matches == (None if question.at_least is not None else local.matches)
    assert both[1].exact and both[0].gallery.offered() == both[1].gallery.offered()
    (none,) = both[1].ask([Question(like=60)])
    assert "no picture 60: there are 60" in str(none)
    (deep,) = both[1].ask([Question("狗", skip=16_380)])
    assert "best 16,367 of a question" in str(deep)


def test_over_http(both):
    pytest.importorskip("httpx", reason="not installed: pip install 'cnclip-ft[test]'")
    from fastapi.testclient import TestClient

    from cnclip_ft.search.web.api import make_app
    from tests.search.server import LOCAL, problem

    with TestClient(make_app(both[1]), LOCAL, raise_server_exceptions=False) as client:
        about = client.get("/api/index").json()
        assert about["images"] == 60 and about["exact"] and about["columns"][:2] == ["类目", "价格"]
        assert {facet["column"] for facet in about["facets"]} >= {"类目", "新"}
        found = client.post("/api/search", json={"text": "狗", "where": ["类目=鞋"]}).json()["results"]
        assert len(found) == 20 and {hit["columns"]["类目"] for hit in found} == {"鞋"}
        assert client.get(f"/api/images/{found[0]['number']}").headers["content-type"] == "image/jpeg"
        heat = client.post(f"/api/images/{found[0]['number']}/heat", json={"text": "狗"})
        assert heat.status_code == 200 and heat.json()["values"]
        problem(client.get("/api/images/60"), 404)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hnsw", "ivf"])
def test_an_approximate_index_finds_what_the_exact_one_finds(make, checkpoint, goods, tmp_path, kind):
    place, store = f"milvus:{tmp_path}/i.db", goods[0].parent / "valid"
    said = make(checkpoint, store, place, approximate=kind)
    assert f"{kind}: recall@10 1.000 against exact search" in said
    make(checkpoint, store, place)  # as it was
    engine, exact = (open_engine(where, device="cpu") for where in (place, goods[0]))
    assert not engine.exact
    questions = [Question(like=number, top=10) for number in range(60)]
    found, truth = (
        [{hit.key % 50 for hit in answer} for answer in searched.ask(questions)] for searched in (engine, exact)
    )  # ten pictures are there twice: either will do
    assert sum(a == b for a, b in zip(found, truth, strict=True)) >= 59
    with pytest.raises(RequestError, match="--approximate none"):
        open_engine(place, device="cpu", exact=True)
    before = held(place)
    make(checkpoint, store, place, approximate="none")
    assert open_engine(place, device="cpu").exact and equal(held(place), before)


def test_values_that_changed_reach_the_collection_without_encoding(make, checkpoint, tmp_path, monkeypatch):
    def store(price: int) -> Path:
        with StoreWriter(tmp_path / "valid", overwrite=True) as writer:
            for n in range(9):
                writer.add_image(n, tiny.png(n), columns={"价格": n * price})
                writer.add_pair(n, n, f"东西 {n}", "zh")
            writer.finish()
        return tmp_path / "valid"

    place = f"milvus:{tmp_path}/i.db"
    make(checkpoint, store(1), place)
    before, seen = held(place), counted(monkeypatch)
    make(checkpoint, store(5), place)
    after = held(place)
    assert seen == [] and {key: row[1]["价格"] for key, row in after.items()} == {n: 5 * n for n in range(9)}
    assert all(np.allclose(after[key][2], before[key][2]) for key in before)


@pytest.mark.slow
def test_another_model_source_and_collection_are_refused(make, checkpoint, photos, index, tmp_path):
    place = f"milvus:{tmp_path}/i.db"
    make(checkpoint, photos, place)
    other = tiny.make_checkpoint(tmp_path / "other", seed=5)
    with pytest.raises(RequestError, match="another checkpoint"):
        make(other, photos, place)
    with pytest.raises(RequestError, match="made by another model"):
        open_engine(place, checkpoint=other, device="cpu")
    with pytest.raises(RequestError, match="is the index of"):
        make(checkpoint, photos / "dogs", place)
    with pytest.raises(RequestError, match="--half is for an index in a folder"):
        make(checkpoint, photos, place, half=True)
    with pytest.raises(RequestError, match="holds no index"):
        open_gallery(f"{place}#other")
    make(other, photos, place, rebuild=True)
    assert open_engine(place, device="cpu").model is not None
    photos.rename(tmp_path / "moved")
    make(other, tmp_path / "moved", place, moved=True)
    assert open_gallery(place).info["source"]["path"] == str(tmp_path / "moved")
    with Milvus(milvus_place(f"{place}#theirs")) as server:
        server.client.create_collection("theirs", dimension=4)
    with pytest.raises(RequestError, match="was not made by cnclip-ft"):
        make(other, tmp_path / "moved", f"{place}#theirs")


def test_interrupted_it_is_unfinished_and_goes_on(make, checkpoint, photos, tmp_path, monkeypatch):
    place, real = f"milvus:{tmp_path}/i.db", renewal.encode_pictures

    def interrupted(*arguments, **options):
        for number, batch in enumerate(real(*arguments, **options)):
            if number == 3:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(renewal, "encode_pictures", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make(checkpoint, photos, place, batch_size=4)
    with pytest.raises(RequestError, match="unfinished"):
        open_collection(milvus_place(place))
    monkeypatch.setattr(renewal, "encode_pictures", real)
    seen = counted(monkeypatch)
    assert "12 were encoded before the interruption; 8 to encode" in make(checkpoint, photos, place)
    assert len(seen) == 8 and len(held(place)) == 20
