"""Pages of results without end, and how many pictures of the index there are for a question."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("fastapi", reason="not installed: pip install 'cnclip-ft[serve]'")
pytest.importorskip("httpx", reason="not installed: pip install 'cnclip-ft[test]'")

from fastapi.testclient import TestClient

from cnclip_ft.retrieval import exact
from cnclip_ft.search.engine.engine import open_engine
from cnclip_ft.search.engine.local import LocalGallery
from cnclip_ft.search.engine.query import DEEPEST, Question
from cnclip_ft.search.web.api import make_app
from data_tools.columns import parse_where
from tests.evaluation import tiny
from tests.search.server import LOCAL, problem
from tests.search.test_vectors import unit

WOMEN = parse_where(["类目=女装"])


@pytest.fixture(scope="module")
def engine(shop):
    return open_engine(shop, device="cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_count_is_brute_force(monkeypatch, dtype):
    gallery, queries = unit(700).to(dtype), unit(4, seed=1)
    gallery[100:140] = gallery[300]
    scores = queries.double() @ gallery.double().T
    search = exact.ExactSearch(gallery, float(gallery.double().norm(dim=1).max()))
    rows = torch.arange(0, 700, 3)
    for least in (
        scores[:, 300],
        scores[:, 300] + 1e-9,
        scores[:, 5] - 1e-9,
        scores.amax(1),
        scores.new_full((4,), -1),
    ):
        for size in (exact._CONVERTED, 4096):
            monkeypatch.setattr(exact, "_CONVERTED", size)
            # One product may add up in another order: a score that is the limit itself is asked for from below.
            limit = least - 1e-13
            assert torch.equal(search.count(queries, limit), (scores >= limit[:, None]).sum(1))
            assert torch.equal(search.count(queries, limit, rows), (scores[:, rows] >= limit[:, None]).sum(1))


@pytest.mark.parametrize("where", [parse_where([]), WOMEN], ids=["all", "some"])
@pytest.mark.parametrize("like", [None, 4])
def test_pages_joined_are_one_long_answer(engine, where, like):
    def ask(**more):
        (found,) = engine.ask([Question(None if like else "狗", like=like, where=where, **more)])
        return found

    everything = ask(top=1000)
    there = 130 if not where else 86
    assert len(everything) == everything.matches == there - (like == 4)
    pages = [ask(top=30, skip=skip) for skip in range(0, 180, 30)]
    assert [hit.key for page in pages for hit in page] == [hit.key for hit in everything]
    assert {page.matches for page in pages} == {everything.matches} and pages[-1] == []
    limit = (everything[40].score + everything[41].score) / 2
    best = ask(top=1000, at_least=limit)
    assert best.matches == 41 and best == everything[:41]
    assert ask(top=30, skip=30, at_least=limit) == everything[30:41]
    assert ask(top=5, at_least=1.0).matches == 0


def test_questions_of_all_kinds_in_one_group(engine, monkeypatch):
    asked = [
        Question("狗", top=5),
        Question("猫", top=5, where=WOMEN),
        Question("狗", top=5, skip=4),
        Question(like=7, top=5),
        Question("猫", top=5, where=WOMEN, at_least=-1.0),
        Question("鸟", top=1000, skip=3),
        Question("", top=5),
    ]
    together = engine.ask(asked)
    alone = [engine.ask([question])[0] for question in asked]
    keys = [
        [[hit.key for hit in a] if isinstance(a, list) else str(a) for a in answers] for answers in (together, alone)
    ]
    assert keys[0] == keys[1]
    assert [getattr(a, "matches", None) for a in together] == [130, 86, 130, 129, 86, 130, None]
    widths: list[int] = []
    real = engine.gallery.finder.search
    monkeypatch.setattr(engine.gallery.finder, "search", lambda q, k: widths.append((len(q), k)) or real(q, k))
    engine.ask([Question("狗"), Question("猫", top=1000, skip=100), Question("鸟")])
    assert widths == [(2, 20), (1, 1100)]  # the deep one by itself


def test_an_approximate_index_does_not_count(shop, monkeypatch):
    engine = open_engine(shop, device="cpu")
    monkeypatch.setattr(LocalGallery, "exact", False)
    counted, least, chosen = engine.ask(
        [Question("狗"), Question("狗", at_least=-1.0), Question("狗", where=WOMEN, at_least=-1.0)]
    )
    assert (counted.matches, least.matches, chosen.matches) == (130, None, 86) and len(least) == 20


def test_over_http(engine):
    with TestClient(make_app(engine), LOCAL) as client:
        whole = client.post("/api/search", json={"text": "狗", "top": 130}).json()
        part = client.post("/api/search", json={"text": "狗", "top": 20, "skip": 60, "where": ["价格>=1"]}).json()
        assert whole["matches"] == 130 and part["matches"] == 129 and len(part["results"]) == 20
        limit = whole["results"][9]["score"] - 1e-5
        few = client.post("/api/search", json={"text": "狗", "top": 5, "at_least": limit}).json()
        assert few["matches"] >= 10 and few["results"] == whole["results"][:5]
        fields = {"top": "7", "skip": "10", "at_least": "-1"}
        sent = client.post("/api/search/image", files={"image": tiny.png(3)}, data=fields).json()
        assert sent["matches"] == 130 and len(sent["results"]) == 7
        for wrong in ({"skip": -1}, {"skip": DEEPEST + 1}, {"at_least": 2}, {"at_least": "nan"}, {"skip": 1.5}):
            problem(client.post("/api/search", json={"text": "狗", **wrong}), 422)
        assert client.get("/api/index").json()["folder"] is None  # a store has no files


def test_the_folder_is_told_on_this_machine_alone(index):
    opened = open_engine(index, device="cpu")
    for more, told in (({}, True), ({"addresses": True}, False), ({"allowed": frozenset(["proxy.example"])}, False)):
        with TestClient(make_app(opened, **more), LOCAL) as client:
            folder = client.get("/api/index").json()["folder"]
            assert folder == (opened.gallery.index.info["source"]["path"] if told else None)
