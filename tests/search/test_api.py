"""The server: answers, pictures by number, and many askers at once."""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import shutil
import threading

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("fastapi", reason="not installed: pip install 'cnclip-ft[serve]'")
pytest.importorskip("httpx", reason="not installed: pip install 'cnclip-ft[test]'")

from fastapi.testclient import TestClient

from cnclip_ft.grounding.finder import How, decode
from cnclip_ft.models.heads import new_heads
from cnclip_ft.search.engine.engine import open_engine
from cnclip_ft.search.engine.query import Question, vectors
from cnclip_ft.search.web import decoders
from cnclip_ft.search.web.api import Limits, make_app
from cnclip_ft.search.web.batcher import Batcher, Busy
from cnclip_ft.search.web.gate import content_policy
from cnclip_ft.search.web.thumbnails import SIZES
from tests.evaluation import tiny
from tests.search.server import LOCAL, problem


def test_an_answer_is_the_engines(client, engine):
    (found,) = engine.ask([Question("一只狗", without="车", top=5)])
    answer = client.post("/api/search", json={"text": "一只狗", "not": "车", "top": 5}).json()
    assert [(hit["number"], hit["id"]) for hit in answer["results"]] == [(hit.number, hit.key) for hit in found]
    assert answer["results"][0]["score"] == pytest.approx(found[0].score, abs=1e-5) and answer["milliseconds"] > 0
    (like,) = engine.ask([Question(like=3, top=4)])
    answer = client.post("/api/search", json={"like": 3, "top": 4}).json()
    assert [hit["number"] for hit in answer["results"]] == [hit.number for hit in like]


def test_a_picture_finds_itself(client, engine, photos_once):
    for number in (0, 7):
        data = (photos_once / engine.gallery.index.key(number)).read_bytes()
        answer = client.post("/api/search/image", files={"image": ("a.png", data)}, data={"top": "3"}).json()
        assert answer["results"][0]["number"] == number and answer["results"][0]["score"] == pytest.approx(1, abs=1e-3)
        mixed = client.post("/api/search/image", files={"image": data}, data={"text": "狗", "image_share": "0"}).json()
        words = client.post("/api/search", json={"text": "狗"}).json()
        assert [hit["number"] for hit in mixed["results"]] == [hit["number"] for hit in words["results"]]


def test_where_a_question_is_met_is_the_model_s_own_map(client, engine, photos_once):
    question = {"text": "一只狗", "not": "车"}
    heat = client.post("/api/images/7/heat", json=question).json()
    picture = decode(engine.model, photos_once / engine.gallery.index.key(7))
    expected = engine.heat(Question("一只狗", without="车"), picture)
    assert heat["part"] == list(expected.part) and heat["score"] == pytest.approx(expected.score, abs=1e-4)
    low, high = expected.values.min(), expected.values.max()
    assert np.allclose(heat["values"], (expected.values - low) / (high - low), atol=0.02)
    tower, vector = engine.model, vectors(engine.model, [Question("一只狗", without="车")], None)[0]
    with torch.inference_mode():
        patches = tower.patch_features(picture.pixels[None], How().method_of(tower)).features[0]
    assert np.allclose(expected.values.ravel(), (patches @ vector).numpy(), atol=1e-5)
    assert client.get("/api/index").json()["heat"] is True
    like = client.post("/api/images/3/heat", json={"like": 7}).json()
    assert len(like["values"]) == len(heat["values"]) and like["values"] != heat["values"]


def test_a_model_with_learnt_boxes_shows_the_same_map(client, engine, monkeypatch):
    """A question is any vector, of texts and pictures; learnt heads know phrases."""
    before = client.post("/api/images/7/heat", json={"text": "一只狗"}).json()
    monkeypatch.setattr(engine.model, "heads", new_heads(engine.model.image_tower))
    assert client.post("/api/images/7/heat", json={"text": "一只狗"}).json() == before


def test_where_nothing_can_be_met_is_refused_in_words(client, engine, monkeypatch):
    assert problem(client.post("/api/images/7/heat", json={}), 422)
    assert "there are 20" in problem(client.post("/api/images/20/heat", json={"text": "狗"}), 404)["detail"]
    assert "there are 20" in problem(client.post("/api/images/7/heat", json={"like": 20}), 422)["detail"]
    assert problem(client.post("/api/images/7/heat", json={"text": "x" * 5000}), 422)
    assert problem(client.post("/api/images/7/heat", json={"text": "狗", "top": 3}), 422)
    monkeypatch.setattr(type(engine.model.image_tower), "patch_methods", ())
    assert "a ViT" in problem(client.post("/api/images/7/heat", json={"text": "狗"}), 422)["detail"]
    assert client.get("/api/index").json()["heat"] is False


def test_the_index_and_its_limits_are_told(client):
    about = client.get("/api/index").json()
    assert (
        about["images"] == 20 and about["threshold"] == 0.25 and about["exact"] and about["max_upload_bytes"] == 2**20
    )


def test_the_description_covers_the_api(client):
    description = client.get("/openapi.json").json()
    paths = description["paths"]
    assert set(paths) == {
        "/api/index", "/api/search", "/api/search/image", "/api/images/{number}", "/api/images/{number}/heat"
    }  # fmt: skip
    routes = {route["operationId"]: route for methods in paths.values() for route in methods.values()}
    assert set(routes) == {"get_index", "search", "search_image", "get_image", "get_heat"}
    always, asked = {"401", "403", "405", "421"}, {"400", "408", "413", "422", "503"}
    assert set(routes["get_index"]["responses"]) == {"200", *always}
    assert set(routes["search"]["responses"]) == {"200", *always, *asked}
    assert set(routes["search_image"]["responses"]) == {"200", "415", *always, *asked}
    assert set(routes["get_image"]["responses"]) == {"200", "304", "404", "422", "503", *always}
    assert set(routes["get_heat"]["responses"]) == {"200", "404", *always, *asked}
    for route in routes.values():
        for status, response in route["responses"].items():
            if status not in ("200", "304"):
                assert response["content"]["application/json"]["schema"]["$ref"].endswith("/Problem"), status
    form = description["components"]["schemas"]["Body_search_image"]["properties"]
    assert form["image"]["type"] == "string" and form["image"]["format"] == "binary" and "not" in form
    assert not any("anyOf" in field for field in form.values())  # a form cannot carry null
    image = routes["get_image"]["responses"]["200"]["content"]
    assert image == {"image/jpeg": {"schema": {"type": "string", "format": "binary"}}}
    assert {given["name"].lower() for given in routes["get_image"]["parameters"]} == {"number", "size", "if-none-match"}
    assert "HTTPValidationError" not in description["components"]["schemas"] and description["servers"][0]["url"] == "/"
    assert client.get("/docs").status_code == 404  # it would load scripts from the network


def test_the_page_needs_nothing_else(client):
    response = client.get("/")
    page, policy = response.text, response.headers["content-security-policy"]
    assert not re.findall(r"""(?:src|href|url\(|@import)\s*=?\s*["'(]*\s*(?:https?:)?//""", page)
    assert not re.findall(r"<(?:link|script|iframe)\s[^>]*(?:src|href)", page)
    assert "default-src 'none'" in policy and "unsafe" not in policy and policy == content_policy(page)
    assert len(re.findall("sha256-", policy)) == 2
    assert response.headers["x-content-type-options"] == "nosniff" and response.headers["x-frame-options"] == "DENY"
    words = {
        language: set(re.findall(r"^    (\w+):|, (\w+): (?=[\"n(v])", body, re.MULTILINE))
        for language, body in re.findall(r"^  (en|zh): \{(.*?)^  \},", page, re.MULTILINE | re.DOTALL)
    }
    assert words["en"] == words["zh"] and len(words["en"]) > 15


def test_thumbnails_are_small_upright_and_known_again(make, checkpoint, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    picture = Image.new("RGB", (900, 600), "blue")
    picture.paste("red", (0, 0, 900, 100))  # the upper edge; turned by 90° it becomes the right one
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(folder / "turned.jpg", exif=exif)
    Image.new("RGBA", (40, 40), (0, 0, 0, 0)).save(folder / "clear.png")
    make(checkpoint, folder, tmp_path / "i")
    with TestClient(make_app(open_engine(tmp_path / "i", device="cpu")), LOCAL) as client:
        response = client.get("/api/images/1")
        small = Image.open(io.BytesIO(response.content))
        assert response.headers["content-type"] == "image/jpeg" and small.format == "JPEG"
        assert small.size == (240, 360) == (SIZES["small"].max_side * 2 // 3, SIZES["small"].max_side)
        assert small.getpixel((230, 180))[0] > 200 and small.getpixel((20, 180))[2] > 200
        assert not small.getexif()
        assert Image.open(io.BytesIO(client.get("/api/images/1?size=large").content)).size == (600, 900)
        again = client.get("/api/images/1", headers={"If-None-Match": response.headers["etag"]})
        assert again.status_code == 304 and not again.content
        white = Image.open(io.BytesIO(client.get("/api/images/0").content))
        assert white.size == (40, 40) and min(white.getpixel((20, 20))) > 250


def test_pictures_that_are_gone_or_changed(make, checkpoint, photos, tmp_path):
    make(checkpoint, photos, tmp_path / "i")
    engine = open_engine(tmp_path / "i", device="cpu")
    secret = tmp_path / "secret.txt"
    secret.write_text("top secret")
    (photos / engine.gallery.index.key(0)).unlink()
    (photos / engine.gallery.index.key(1)).write_text("no picture any more")
    (photos / engine.gallery.index.key(2)).unlink()
    (photos / engine.gallery.index.key(2)).symlink_to(secret)
    (photos / engine.gallery.index.key(5)).unlink()
    os.mkfifo(photos / engine.gallery.index.key(5))
    (photos / engine.gallery.index.key(6)).write_bytes(tiny.png(99))
    with TestClient(make_app(engine), LOCAL) as client:
        for number in (0, 1, 2, 5, 6):
            content = problem(client.get(f"/api/images/{number}"), 404)
            assert content["code"] == "gone" and "secret" not in content["detail"]
        assert client.get("/api/images/3").status_code == 200
        shutil.rmtree(photos)
        assert problem(client.get("/api/images/4"), 404)["code"] == "gone"
        assert client.get("/api/images/3").status_code == 200  # kept
        assert len(client.post("/api/search", json={"text": "狗"}).json()["results"]) == 20


def test_a_store_behind_the_server_may_go_too(make, checkpoint, store, tmp_path):
    shutil.copytree(store, tmp_path / "s")
    make(checkpoint, tmp_path / "s", tmp_path / "i")
    with TestClient(make_app(open_engine(tmp_path / "i", device="cpu")), LOCAL) as client:
        assert client.get("/api/images/0").status_code == 200
        assert client.post("/api/search", json={"text": "狗"}).json()["results"][0]["id"].isdigit()
    shutil.rmtree(tmp_path / "s")
    with TestClient(make_app(open_engine(tmp_path / "i", device="cpu")), LOCAL) as client:
        assert problem(client.get("/api/images/0"), 404)["code"] == "gone"


@pytest.mark.skipif(os.name != "posix" or os.uname().sysname == "Darwin", reason="names are text on this system")
def test_a_file_name_that_is_no_text(make, checkpoint, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / os.fsdecode(b"caf\xe9.png")).write_bytes(tiny.png(1))
    make(checkpoint, folder, tmp_path / "i")
    with TestClient(make_app(open_engine(tmp_path / "i", device="cpu")), LOCAL) as client:
        assert client.post("/api/search", json={"text": "狗"}).json()["results"][0]["id"] == r"caf\udce9.png"
        assert client.get("/api/images/0").status_code == 200


TRAVERSAL = [
    "/api/images/../../../etc/passwd", "/api/images/..%2f..%2fetc%2fpasswd", "/..%2f..%2f..%2fetc/passwd", "/etc/passwd",
    "/api/images/%2e%2e/index.json", "/api/images/0.png", "/api/images/dogs/00.png", "/api/images/0%00", "/api/images/-1",
    "/api/images/20", "/api/images/99999999999999999999", "/api/images/" + "9" * 5000, "/api/images/1?size=../large",
    "/api/images/1/..;/2", "/page.html", "/guard.py", "/api/images/0x1", "/api/images/１", "/api/images/1e1",
]  # fmt: skip


@pytest.mark.parametrize("path", TRAVERSAL, ids=lambda path: path[:40])
def test_only_numbers_of_the_index_are_served(client, path):
    response = client.get(path)
    assert response.status_code in (404, 422) or path.endswith("１"), response.text
    assert b"root:" not in response.content


def test_who_finds_the_server_busy_is_told_when_to_come_again(engine, monkeypatch):
    async def busy(*_):
        raise Busy

    monkeypatch.setattr(Batcher, "ask", busy)
    with TestClient(make_app(engine), LOCAL) as client:
        response = client.post("/api/search", json={"text": "狗"})
        assert problem(response, 503)["code"] == "busy" and int(response.headers["retry-after"]) >= 1
        response = client.put("/api/search")
        assert problem(response, 405)["code"] == "method" and response.headers["allow"] == "POST"


def test_an_upload_that_holds_a_decoder_is_ended(engine, monkeypatch):
    code = "import sys; sys.path[:] = sys.argv[3:]; import time, cnclip_ft.search.web.decoder as d\n"
    code += "d._JOBS['fit'] = lambda data, how, pixels: time.sleep(60)\nd.main(int(sys.argv[1]), float(sys.argv[2]))"
    monkeypatch.setattr(decoders, "_CODE", code)
    with TestClient(make_app(engine, limits=Limits(decoders=1, decode_seconds=0.5)), LOCAL) as client:
        answer = {}
        upload = threading.Thread(
            target=lambda: answer.update(it=client.post("/api/search/image", files={"image": tiny.png(1)}))
        )
        upload.start()
        assert client.get("/api/images/1").status_code == 200
        assert client.post("/api/search", json={"text": "狗"}).status_code == 200
        upload.join()
        assert "--max-decode-seconds" in problem(answer["it"], 413)["detail"]


def test_waiting_questions_go_together():
    """The first group holds one; while it is answered five gather; two threads halve what waits."""
    groups: list[int] = []
    started, go_on = threading.Event(), threading.Event()

    def answer(questions):
        groups.append(len(questions))
        started.set()
        go_on.wait(10)
        return [[question.text] for question in questions]

    async def scene(threads: int, waiting: int = 256) -> list:
        async with Batcher(answer, threads, waiting) as batcher:
            first = [asyncio.create_task(batcher.ask(Question("first"))) for _ in range(threads)]
            while len(groups) < threads:
                await asyncio.sleep(0.005)
            rest = [asyncio.create_task(batcher.ask(Question(str(number)))) for number in range(6)]
            await asyncio.sleep(0.02)
            go_on.set()
            await asyncio.gather(*first)
            return await asyncio.gather(*rest, return_exceptions=True)

    assert asyncio.run(scene(1)) == [[str(number)] for number in range(6)] and groups == [1, 6]
    groups.clear()
    go_on.clear()
    assert asyncio.run(scene(2)) == [[str(number)] for number in range(6)]
    assert groups[:2] == [1, 1] and sum(groups) == 8 and len(groups) < 8
    groups.clear()
    go_on.clear()
    answers = asyncio.run(scene(1, waiting=4))
    assert [isinstance(answer, Busy) for answer in answers] == [False] * 4 + [True] * 2


def test_a_group_that_fails_takes_nobody_with_it():
    def answer(questions):
        if questions[0].text == "bad":
            raise RuntimeError("broken")
        return [["good"] for _ in questions]

    async def scene() -> list:
        async with Batcher(answer) as batcher:
            bad = await asyncio.gather(batcher.ask(Question("bad")), return_exceptions=True)
            return [*bad, await batcher.ask(Question("good"))]

    bad, good = asyncio.run(scene())
    assert isinstance(bad, RuntimeError) and good == ["good"]


def test_many_at_once_get_their_own_answers(client, engine):
    texts = [f"第{number}只狗" for number in range(24)]
    expected = {
        text: [hit.number for hit in found]
        for text, found in zip(texts, engine.ask([Question(text, top=5) for text in texts]), strict=True)
    }
    found: dict[str, list[int]] = {}

    def ask(text: str) -> None:
        results = client.post("/api/search", json={"text": text, "top": 5}).json()["results"]
        found[text] = [hit["number"] for hit in results]

    threads = [threading.Thread(target=ask, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected


def test_answers_are_json_without_what_was_sent(client):
    """A refusal never repeats the request: it may be large, or no text at all."""
    for body in ({"text": "机密" * 2500}, {"text": "a", "top": "机密"}):
        assert "机密" not in json.dumps(client.post("/api/search", json=body).json(), ensure_ascii=False)
