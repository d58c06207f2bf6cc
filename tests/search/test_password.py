"""A password before everything: what is refused, how it is asked for, and what the command says."""

from __future__ import annotations

import base64
import os
import socket
import time

import pytest

pytest.importorskip("fastapi", reason="not installed: pip install 'cnclip-ft[serve]'")
pytest.importorskip("httpx", reason="not installed: pip install 'cnclip-ft[test]'")

from fastapi.testclient import TestClient
from rich.cells import cell_len
from typer.testing import CliRunner

from cnclip_ft.commands.search import app
from cnclip_ft.search.web import password as passwords
from cnclip_ft.search.web import serve as web
from cnclip_ft.search.web.api import make_app
from cnclip_ft.search.web.password import read_password
from data_tools.errors import RequestError
from tests.evaluation import tiny
from tests.search.server import LOCAL, problem

SECRET = "snow on:hill"


@pytest.fixture
def client(engine, monkeypatch):
    monkeypatch.setattr(passwords, "_PAUSE", 0.0)
    with TestClient(make_app(engine, password=SECRET), LOCAL) as client:
        yield client


def basic(text: str | bytes) -> dict[str, str]:
    data = text.encode() if isinstance(text, str) else text
    return {"Authorization": "Basic " + base64.b64encode(data).decode()}


PLACES = [
    ("GET", "/"),
    ("GET", "/api/index"),
    ("GET", "/api/images/1"),
    ("GET", "/openapi.json"),
    ("GET", "/favicon.ico"),
    ("GET", "/nothing"),
    ("POST", "/api/search"),
    ("POST", "/api/search/image"),
    ("DELETE", "/api/search"),
]
REFUSED = [
    {},
    basic("anyone:"),
    basic(f"anyone:{SECRET} "),
    basic("anyone:snow on"),
    basic(":"),
    basic(SECRET),
    basic(b"\xff\xfe:\xff"),
    basic(""),
    {"Authorization": "Basic"},
    {"Authorization": "Basic %%%"},
    {"Authorization": "Bearer " + SECRET.encode().hex()},
    {"Authorization": "basic " + "A" * 8000},
    {"Cookie": "password=x"},
]


@pytest.mark.parametrize("method, path", PLACES)
def test_nothing_is_answered_without_it(client, method, path):
    for headers in REFUSED:
        response = client.request(method, path, headers=headers)
        assert problem(response, 401)["code"] == "password", headers
        assert response.headers["www-authenticate"].startswith("Basic realm=")
        assert response.headers["x-frame-options"] == "DENY"


def test_with_it_everything_is_answered(client):
    headers = basic(f"anyone:{SECRET}")
    assert (
        client.get("/", headers=headers).status_code == client.get("/api/images/1", headers=headers).status_code == 200
    )
    assert len(client.post("/api/search", json={"text": "狗"}, headers=headers).json()["results"]) == 20
    assert client.post("/api/search/image", files={"image": tiny.png(1)}, headers=headers).status_code == 200
    assert client.get("/nothing", headers=headers).status_code == 404
    foreign = {"Sec-Fetch-Site": "cross-site"}  # a browser would send the password along
    assert client.get("/api/index", headers=headers | foreign).status_code == 403
    description = client.get("/openapi.json", headers=headers).json()
    assert description["security"] == [{"password": []}]
    assert description["components"]["securitySchemes"]["password"]["scheme"] == "basic"


def test_a_body_is_not_taken_in(client):
    taken: list[int] = []

    def endless():
        for number in range(400):
            taken.append(number)
            yield b"x" * 65536

    headers = {"Content-Type": "multipart/form-data; boundary=e"}
    assert client.post("/api/search/image", content=endless(), headers=headers).status_code == 401


def test_guessing_is_slow(engine, monkeypatch):
    monkeypatch.setattr(passwords, "_PAUSE", 0.2)
    with TestClient(make_app(engine, password=SECRET), LOCAL) as client:
        began = time.monotonic()
        assert client.get("/", headers=basic("a:b")).status_code == 401
        assert time.monotonic() - began >= 0.2


def test_the_file(tmp_path):
    file = tmp_path / "password"
    for content, said in (
        (b"", "only line"),
        (b"\n", "only line"),
        (b"a\nb\n", "only line"),
        ("雪".encode(), "ASCII"),
        (b"a" * 1025, "1,024"),
        (None, "cannot be read"),
    ):
        file.unlink(missing_ok=True)
        if content is not None:
            file.write_bytes(content)
            file.chmod(0o600)
        with pytest.raises(RequestError, match=said):
            read_password(file)
    file.write_text(f"{SECRET}\r\n", encoding="utf-8", newline="")
    file.chmod(0o600)
    assert read_password(file) == SECRET
    if os.name == "posix":
        file.chmod(0o644)
        with pytest.raises(RequestError, match="chmod 600"):
            read_password(file)


@pytest.mark.parametrize(
    "host, given, said",
    [("127.0.0.1", False, ""), ("0.0.0.0", False, "WARNING"), ("0.0.0.0", True, "https"), ("127.0.0.1", True, "")],
)
def test_the_command_warns_beyond_this_machine(index, tmp_path, monkeypatch, host, given, said):
    served = []
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(web, "run", lambda app, listener: served.append(app) or listener.close())
    file = tmp_path / "password"
    file.write_text("geheim\n")
    file.chmod(0o600)
    more = ["--password-file", str(file)] if given else []
    result = CliRunner().invoke(app, ["serve", str(index), "--host", host, "--port", "0", "--device", "cpu", *more])
    assert result.exit_code == 0, result.output
    told = result.stderr
    assert result.stdout and all(cell_len(line) <= 80 for line in (*told.splitlines(), *result.stdout.splitlines()))
    assert said in told and ("WARNING" in told) == (said == "WARNING") and (said or "note:" not in told)
    with TestClient(served[0], LOCAL) as client:
        assert client.get("/api/index").status_code == (401 if given else 200)
        assert client.get("/api/index", headers=basic("a:geheim")).status_code == 200


def test_an_index_is_served_where_it_is_told(checkpoint, photos_once, tmp_path, monkeypatch):
    served = []
    monkeypatch.setattr(web, "run", lambda app, listener: served.append(listener.getsockname()) or listener.close())
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = [
            "index",
            str(checkpoint),
            str(photos_once),
            "--output",
            str(tmp_path / "i"),
            "--device",
            "cpu",
            "--serve",
        ]
        refused = CliRunner().invoke(app, [*line, "--port", str(port)])
        assert "another --port" in str(refused.exception) and not (tmp_path / "i").exists()
    result = CliRunner().invoke(app, [*line, "--port", str(port)])
    assert result.exit_code == 0 and served == [("127.0.0.1", port)], result.output
