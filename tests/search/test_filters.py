"""What a store keeps of its pictures, in the index and in answers: filters, updates, older indexes, the command and the API."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from cnclip_ft.retrieval.exact import ExactSearch
from cnclip_ft.retrieval.recall import topk
from cnclip_ft.search.engine.engine import open_engine
from cnclip_ft.search.engine.query import Question
from cnclip_ft.search.index.facets import Facets
from cnclip_ft.search.index.folder import Index
from data_tools.columns import parse_where
from data_tools.errors import RequestError
from data_tools.store import StoreWriter
from tests.evaluation import tiny

KINDS = ("女装", "男装", "家居")


def goods(target, prices: int = 0):
    """Thirty pictures: three categories, a price, a link; every seventh has nothing beside its text."""
    with StoreWriter(target) as writer:
        for n in range(30):
            columns = (
                {} if n % 7 == 6 else {"类目": KINDS[n % 3], "价格": n * 10 + prices, "链接": f"https://x.example/{n}"}
            )
            writer.add_image(n, tiny.png(n), columns=columns)
            writer.add_pair(n, n, f"一张图 {n}", "zh")
        writer.finish()
    return target


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return goods(tmp_path_factory.mktemp("goods") / "valid")


@pytest.fixture(scope="module")
def kept_index(make, checkpoint, kept, tmp_path_factory):
    folder = tmp_path_factory.mktemp("index") / "goods.index"
    make(checkpoint, kept, folder)
    return folder


@pytest.fixture(scope="module")
def goods_engine(kept_index):
    return open_engine(kept_index, device="cpu")


def test_columns_whose_names_hold_signs_are_asked_for_and_offered():
    rows = [{"价格<元>": n, "a=b": "cd"[n % 2]} for n in range(10)]

    facets = Facets(rows, len(rows))
    assert "a=b" in facets.offered()
    assert facets.select(parse_where(['"价格<元>"<3', '"a=b"=d'])).tolist() == [1]


def ask(engine, *where: str, **question):
    (answer,) = engine.ask([Question(text="一张图", where=parse_where(where), **question)])
    if isinstance(answer, RequestError):
        raise answer
    return answer


def test_a_filter_gives_the_best_of_what_meets_it(goods_engine) -> None:
    everything = ask(goods_engine, top=30)
    for where in (["类目=女装"], ["类目=女装", "类目=家居"], ["价格<100"], ["类目=男装", "价格>=100"], ["价格=50"]):
        met = parse_where(where)
        found = ask(goods_engine, *where, top=30)
        wanted = [hit for hit in everything if met.holds(hit.columns)]
        assert [hit.number for hit in found] == [hit.number for hit in wanted] and found, where
        assert np.allclose([hit.score for hit in found], [hit.score for hit in wanted])
        assert [hit.number for hit in ask(goods_engine, *where, top=2)] == [hit.number for hit in wanted[:2]]
    assert ask(goods_engine, "价格>1000") == []
    like = ask(goods_engine, "类目=女装", like=0, top=3)
    assert len(like) == 3 and 0 not in [hit.number for hit in like] and like[0].columns["类目"] == "女装"
    with pytest.raises(RequestError, match="keeps no column '品类'; there are 类目, 价格, 链接, caption"):
        ask(goods_engine, "品类=女装")
    # Several questions at once, with conditions and without.
    questions = [Question(text="一张图", top=4, where=parse_where(w)) for w in ([], ["类目=女装"], ["类目=男装"], [])]
    together = goods_engine.ask(questions)
    assert [[hit.number for hit in one] for one in together] == [
        [hit.number for hit in goods_engine.ask([question])[0]] for question in questions
    ]


def test_chosen_rows_are_searched_exactly() -> None:
    features = torch.nn.functional.normalize(torch.randn(500, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    features[100:120] = features[100]  # ties keep the order of the index
    queries = torch.cat([features[100:101], features[7:9]])
    rows = torch.arange(0, 500, 3)
    scores, numbers = ExactSearch(features, 1.0001).search_among(rows, queries, 12)
    wanted = topk(queries, features[rows], 12)
    assert torch.equal(numbers, rows[wanted[1]]) and torch.allclose(scores, wanted[0])
    assert ExactSearch(features.half(), 1.01).search_among(rows[:3], queries, 12)[1].shape == (3, 3)


def test_what_is_offered_for_choosing(goods_engine, index) -> None:
    facets = goods_engine.gallery.facets
    assert facets.names == ["类目", "价格", "链接", "caption"] and facets.offered()["类目"][0][1] >= 8
    assert dict(facets.offered()["类目"]) == {
        kind: sum(n % 3 == k and n % 7 != 6 for n in range(30)) for k, kind in enumerate(KINDS)
    }
    assert Facets.of(Index(index)).names == []


def test_new_values_reach_the_index_without_encoding(make, checkpoint, kept, kept_index, tmp_path) -> None:
    said = make(checkpoint, kept, kept_index)
    assert "nothing has changed" in said
    store, folder = tmp_path / "valid", tmp_path / "i"
    goods(store)
    make(checkpoint, store, folder)
    goods(store, prices=5)
    said = make(checkpoint, store, folder)
    assert "30 as they were" in said and "to encode" not in said
    assert (
        Index(folder).described(3)[1]["价格"] == 35
        and json.loads((folder / "index.json").read_text("utf-8"))["format"] == 2
    )


def test_an_index_without_columns_is_as_before(make, checkpoint, store, tmp_path) -> None:
    make(checkpoint, store, tmp_path / "i")
    info = json.loads((tmp_path / "i" / "index.json").read_text("utf-8"))
    assert info["format"] == 1 and Index(tmp_path / "i").described(0) == (Index(tmp_path / "i").key(0), {})
    del info["columns"]  # as versions before wrote it
    (tmp_path / "i" / "index.json").write_text(json.dumps(info), "utf-8")
    assert "nothing has changed" in make(checkpoint, store, tmp_path / "i")


def test_a_damaged_entry_is_named(kept_index, tmp_path) -> None:
    shutil.copytree(kept_index, tmp_path / "i")
    items = next((tmp_path / "i").glob("items-*.jsonl"))
    items.write_bytes(items.read_bytes().replace(b'{"\\u7c7b', b'["\\u7c7b', 1))
    with pytest.raises(RequestError, match="the index is damaged"):
        Index(tmp_path / "i").described(0)


def test_the_command(kept_index) -> None:
    from typer.testing import CliRunner

    from cnclip_ft.cli import app

    def run(*arguments: str):
        return CliRunner().invoke(
            app, ["search", "query", str(kept_index), "一张图", *arguments], env={"COLUMNS": "100"}
        )

    lines = [
        json.loads(line) for line in run("--where", "类目=男装", "--where", "价格<100", "--json").stdout.splitlines()
    ]
    assert {line["columns"]["类目"] for line in lines} == {"男装"} and {line["id"] for line in lines} == {1, 4, 7}
    table = run("--where", "类目=男装", "--top", "3").output
    assert "类目" in table and "价格" in table and "x.example" not in table
    assert "no picture meets the conditions" in run("--where", "价格>9999").output
    assert isinstance(run("--where", "价格").exception, RequestError)


def test_the_api(goods_engine) -> None:
    pytest.importorskip("fastapi")
    from fastapi.testclient import TestClient

    from cnclip_ft.search.web.api import make_app
    from tests.search.server import LOCAL

    with TestClient(make_app(goods_engine), LOCAL) as client:
        about = client.get("/api/index").json()
        assert about["columns"] == ["类目", "价格", "链接", "caption"] and about["facets"][0]["column"] == "类目"
        found = client.post("/api/search", json={"text": "图", "where": ["类目=女装"]}).json()["results"]
        assert (
            found
            and {hit["columns"]["类目"] for hit in found} == {"女装"}
            and found[0]["columns"]["价格"] == found[0]["number"] * 10
        )
        sent = {"image": ("a.png", tiny.png(3))}
        found = client.post("/api/search/image", files=sent, data={"where": ["类目=女装", "价格<100"]}).json()[
            "results"
        ]
        assert {hit["number"] for hit in found} == {0, 3, 9}
        assert [hit["columns"]["caption"] for hit in found] == [f"一张图 {hit['number']}" for hit in found]
        for wrong, says in (
            (["x=1"], "keeps no column"),
            (["价格<"], "where: '价格<' is no condition"),
            (["a"] * 51, "at most 50"),
        ):
            answer = client.post("/api/search", json={"text": "图", "where": wrong})
            assert answer.status_code == 422 and says in answer.json()["detail"], answer.text
