"""What strangers send and who may ask: never more than a refusal, never waited for without end."""

from __future__ import annotations

import asyncio
import json
import socket
from random import Random

import pytest

pytest.importorskip("fastapi", reason="not installed: pip install 'cnclip-ft[serve]'")
pytest.importorskip("httpx", reason="not installed: pip install 'cnclip-ft[test]'")

from fastapi.testclient import TestClient

from cnclip_ft.search.web import gate
from cnclip_ft.search.web.api import Limits, make_app
from cnclip_ft.search.web.gate import host_name, is_loopback
from tests.evaluation import tiny
from tests.search.server import LOCAL, png, problem

QUESTIONS = [
    {}, {"text": ""}, {"text": "   "}, {"text": None}, {"text": 5}, {"text": ["狗"]}, {"text": "狗", "top": 0}, {"text": "狗", "top": -3},
    {"text": "狗", "top": 1001}, {"text": "狗", "top": 10**40}, {"text": "狗", "top": "many"}, {"text": "狗", "top": 1.5},
    {"like": 20}, {"like": -1}, {"like": "../1"}, {"like": 10**30}, {"text": "狗", "unknown": 1}, {"text": "狗", "image_share": 2},
    {"text": "狗", "not": "狗", "not_weight": 1}, {"not": "狗"}, {"text": "雪" * 4001}, [], "狗", 7, None,
]  # fmt: skip


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda question: str(question)[:30])
def test_wrong_questions(client, question):
    problem(client.post("/api/search", json=question), 422)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[" * 9000,
        b"\xff\xfe",
        b'{"text": "\\ud83d"}',
        b'{"text": "a", "not_weight": NaN}',
        b'{"\\ud83d": 1}',
        b'{"text": "a", "top": 1e999}',
        b'{"text": "a", "top": ' + b"9" * 9000 + b"}",
        b'{"text": "\x00"}',
    ],
    ids=lambda body: str(body[:30]),
)
def test_broken_bodies(client, body):
    response = client.post("/api/search", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code in (400, 422), response.text
    assert response.json()["detail"] and len(response.content) < 2000


@pytest.mark.parametrize(
    "text", ["🐕‍🦺👩‍👩‍👧‍👦🇨🇳", "a\x00b", "‮abc", "\ufeff", "x" * 4000, "雪" * 4000, "<script>alert(1)</script>", "𠮷"]
)
def test_unusual_words_are_words(client, text):
    assert len(client.post("/api/search", json={"text": text, "top": 20}).json()["results"]) == 20


def test_a_hundred_kilobytes_of_text(client):
    assert problem(client.post("/api/search", json={"text": "雪" * 33_400}), 413)["code"] == "too-large"
    response = client.post("/api/search/image", files={"image": tiny.png(1)}, data={"text": "a" * 100_000})
    problem(response, 422)


UPLOADS = [
    (b"", 415), (b"GIF89a", 415), (b"%!PS-Adobe-3.0 EPSF-3.0\n", 415), (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 415),
    (Random(0).randbytes(2000), 415), (tiny.png(3)[:70], 415), (tiny.png(3)[:-300], 415), (b"\xff\xd8\xff\xe0" + bytes(400), 415),
    (png(2001, 2000), 413), (png(60_000, 60_000, "1"), 413), (bytes(2**20 + 1), 413), (bytes(4 * 2**20), 413),
]  # fmt: skip


@pytest.mark.parametrize("data, status", UPLOADS, ids=lambda value: str(value)[:24])
def test_uploads_that_are_refused(client, data, status):
    content = problem(client.post("/api/search/image", files={"image": ("a.jpg", data)}), status)
    assert content["code"] == ("too-large" if status == 413 else "no-picture")


def test_a_body_is_counted_whatever_it_claims(client):
    def endless():
        for _ in range(400):
            yield b"x" * 65536

    headers = {"Content-Type": "multipart/form-data; boundary=e"}
    response = client.post("/api/search/image", content=endless(), headers=headers)  # chunked: no length at all
    assert response.status_code in (400, 413)
    assert problem(client.post("/api/search", content=endless()), 413)


def test_a_body_that_never_comes_is_not_waited_for(monkeypatch):
    async def nobody(*_):
        raise AssertionError("the application was asked")

    async def silence():
        await asyncio.sleep(60)

    sent: list[dict] = []

    async def send(message):
        sent.append(message)

    monkeypatch.setattr(gate, "_PATIENCE", 0.05)
    scope = {
        "type": "http",
        "path": "/api/search",
        "headers": [(b"host", b"localhost"), (b"content-length", b"99999999")],
    }
    asyncio.run(
        asyncio.wait_for(gate.Gate(nobody, gate.LOOPBACK, False, frozenset(), {}, 1000, 5.0)(scope, silence, send), 10)
    )
    assert sent[0]["status"] == 413


@pytest.mark.parametrize("fields", [{"top": "x"}, {"top": "0"}, {"image_share": "nan"}, {"not_weight": "-1"}], ids=str)
def test_wrong_fields_beside_a_picture(client, fields):
    problem(client.post("/api/search/image", files={"image": tiny.png(1)}, data=fields), 422)
    problem(client.post("/api/search/image", data=fields), 422)


def test_only_localhost_is_answered_unless_asked_for(engine, client):
    for host in ("evil.example", "127.0.0.1.evil.example", "10.0.0.8:8000", "", "[::2]:80", "localhost.evil"):
        assert client.get("/api/index", headers={"Host": host}).status_code == 421, host
    for host in ("localhost", "LOCALHOST:80", "127.0.0.1:8000", "[::1]:8000"):
        assert client.get("/api/index", headers={"Host": host}).status_code == 200, host
    with TestClient(make_app(engine, allowed=frozenset((gate.ANY,))), "http://search.example") as open_to_all:
        assert open_to_all.get("/api/index").status_code == 200
    assert [host_name(name) for name in ("a:1", "[::1]", "::1", "")] == ["a", "::1", "", ""]
    assert is_loopback("127.3.2.1") and is_loopback("::1") and not is_loopback("0.0.0.0") and not is_loopback("my.host")


FOREIGN = [
    {"Origin": "http://evil.example"}, {"Origin": "null"}, {"Origin": "http://127.0.0.1:3000"},
    {"Origin": "http://127.0.0.1.evil.example"}, {"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-site"},
    {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}, {"Sec-Fetch-Site": "nonsense"}, {"Origin": "evil"},
]  # fmt: skip
OWN = [
    {}, {"Origin": "http://127.0.0.1"}, {"Origin": "http://127.0.0.1:80"}, {"Origin": "https://127.0.0.1"}, {"Sec-Fetch-Site": "same-origin"},
    {"Sec-Fetch-Site": "none"}, {"Origin": "https://photos.example", "Sec-Fetch-Site": "same-origin"},
    {"Origin": "https://friend.example:8443", "Sec-Fetch-Site": "cross-site"},
]  # fmt: skip


@pytest.mark.parametrize("headers, status", [(h, 403) for h in FOREIGN] + [(h, 200) for h in OWN], ids=str)
def test_pages_of_other_sites_may_not_ask(headers, status, engine):
    with TestClient(make_app(engine, allowed=frozenset(("friend.example",))), LOCAL) as client:
        answers = [
            client.post("/api/search", json={"text": "狗"}, headers=headers),
            client.get("/api/index", headers=headers),
            client.get("/api/images/1", headers=headers),
            client.post("/api/search/image", files={"image": tiny.png(1)}, headers=headers),
        ]
        assert [answer.status_code for answer in answers] == [status] * 4
        assert not any(name.startswith("access-control") for answer in answers for name in answer.headers)
        assert client.get("/", headers=headers).status_code == 200  # a link to the page
        assert client.get("/api/index", headers={"Host": "friend.example"}).status_code == 200


def test_a_server_for_others_answers_to_addresses_and_its_own_names(engine):
    names = gate.names_of("0.0.0.0")
    with TestClient(make_app(engine, names=names, addresses=True), "http://10.0.0.8:8000") as client:
        for host in ("10.0.0.8:8000", "[fe80::1]:8000", "localhost", socket.gethostname()):
            assert client.get("/api/index", headers={"Host": host}).status_code == 200, host
        for host in ("rebound.example", "10.0.0.8.example", ""):
            assert "--allow-host" in problem(client.get("/api/index", headers={"Host": host}), 421)["detail"], host
    assert gate.names_of("127.0.0.1") == gate.LOOPBACK


def test_a_body_that_trickles_is_given_up(engine):
    async def scene() -> list[dict]:
        sent, app = [], make_app(engine, limits=Limits(body_seconds=0.3))

        async def receive() -> dict:
            await asyncio.sleep(0.1)
            return {"type": "http.request", "body": b" ", "more_body": True}

        async def send(message) -> None:
            sent.append(message)

        scope = {
            "type": "http",
            "method": "POST",
            "path": "/api/search",
            "raw_path": b"/api/search",
            "query_string": b"",
            "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
            "scheme": "http",
            "client": None,
            "server": None,
            "http_version": "1.1",
            "root_path": "",
        }
        await asyncio.wait_for(app(scope, receive, send), 10)
        return sent

    sent = asyncio.run(scene())
    assert sent[0]["status"] == 408 and json.loads(sent[1]["body"])["code"] == "too-slow"
