"""Connections that send half a request, nothing, or take nothing: none is kept, and nobody else waits for them."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import signal
import socket
import threading
import time

import pytest

pytest.importorskip("uvicorn", reason="not installed: pip install 'cnclip-ft[serve]'")

import uvicorn

from cnclip_ft.search.web import patience
from cnclip_ft.search.web.patience import PatientProtocol

ASK = b"GET / HTTP/1.1\r\nHost: a\r\n"


async def app(scope, receive, send):
    if scope["type"] == "http":
        body = b"x" * (30_000_000 if scope["path"] == "/large" else 2)
        if scope["path"] == "/never":
            await asyncio.sleep(60)
        await send(
            {"type": "http.response.start", "status": 200, "headers": [(b"content-length", str(len(body)).encode())]}
        )
        await send({"type": "http.response.body", "body": body})


@contextlib.asynccontextmanager
async def serving(most=100):
    listener = socket.create_server(("127.0.0.1", 0))
    protocol = functools.partial(PatientProtocol, waiting={}, most=most)
    config = uvicorn.Config(
        app, http=protocol, ws="none", lifespan="off", log_level="critical", timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    task = asyncio.create_task(server._serve([listener]))
    while not server.started:
        await asyncio.sleep(0.01)
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        await task


async def until_closed(port: int, first: bytes, each: bytes) -> float:
    """Seconds until the server hangs up on a client that sends `first` and then `each` ten times a second."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    began = time.monotonic()
    with contextlib.suppress(ConnectionError):
        writer.write(first)
        while not reader.at_eof() and time.monotonic() - began < 10:
            writer.write(each)
            await writer.drain()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(reader.read(2**16), 0.1)
    writer.transport.abort()
    return time.monotonic() - began


@pytest.mark.parametrize(
    "first, each",
    [
        (b"", b""),
        (b"GET / HT", b""),
        (ASK, b"X: y\r\n"),
        (ASK + b"Content-Length: 9999\r\n\r\n", b"x"),
        (b"\r\n", b"\r\n"),
        (ASK + b"\r\n", b""),
        (ASK + b"\r\n" + ASK, b""),
        (b"GET /never HTTP/1.1\r\nHost: a\r\n\r\n", b""),
    ],
    ids=[
        "silence",
        "half a line",
        "headers without end",
        "a body without end",
        "empty lines",
        "idle after an answer",
        "a half request behind a whole one",
        "an answer that never comes",
    ],
)
def test_no_connection_outlives_its_deadline(first, each, monkeypatch):
    monkeypatch.setattr(patience, "HEADER_SECONDS", 0.6)
    monkeypatch.setattr(patience, "REQUEST_SECONDS", 0.9)

    async def scene():
        async with serving() as port:
            taken = await until_closed(port, first, each)
            assert taken < 4, taken

    asyncio.run(scene())


def test_an_answer_that_is_not_taken_is_not_kept(monkeypatch):
    monkeypatch.setattr(patience, "REQUEST_SECONDS", 0.5)

    async def scene():
        loop = asyncio.get_running_loop()
        async with serving() as port:
            with socket.create_connection(("127.0.0.1", port)) as client:
                client.setblocking(False)
                await loop.sock_sendall(client, b"GET /large HTTP/1.1\r\nHost: a\r\n\r\n")
                await asyncio.sleep(1.2)
                taken, part = 0, b" "
                with contextlib.suppress(ConnectionError):
                    while part:
                        part = await asyncio.wait_for(loop.sock_recv(client, 2**20), 10)
                        taken += len(part)
                assert taken < 20_000_000  # what lay in the system's buffers

    asyncio.run(scene())


def test_more_connections_than_there_may_be_push_out_the_longest_waiting():
    async def ask(port: int) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(ASK + b"Connection: close\r\n\r\n")
        answer = await asyncio.wait_for(reader.read(), 10)
        writer.close()
        return answer

    async def scene():
        async with serving(most=8) as port:
            held = [await asyncio.open_connection("127.0.0.1", port) for _ in range(30)]
            for _, writer in held:
                with contextlib.suppress(ConnectionError):
                    writer.write(b"GET / HT")
            for _ in range(3):
                assert (await ask(port)).endswith(b"xx")
            await asyncio.sleep(0.1)
            closed = [reader.at_eof() or reader.exception() is not None for reader, _ in held]
            assert all(closed[:20]) and not all(closed), closed
            for _, writer in held:
                writer.transport.abort()

    asyncio.run(scene())


def test_a_request_after_another_has_its_own_time(monkeypatch):
    monkeypatch.setattr(patience, "HEADER_SECONDS", 0.8)

    async def scene():
        async with serving() as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            for _ in range(4):  # 1.6 s in all
                writer.write(ASK + b"\r\n")
                assert (await asyncio.wait_for(reader.readuntil(b"xx"), 5)).startswith(b"HTTP/1.1 200")
                await asyncio.sleep(0.4)
            writer.close()

    asyncio.run(scene())


@pytest.mark.skipif(os.name != "posix", reason="signals are sent as POSIX sends them")
def test_a_second_interruption_does_not_break_off_the_end(capfd):
    from fastapi import FastAPI

    from cnclip_ft.search.web.serve import run

    ended = []

    @contextlib.asynccontextmanager
    async def lifespan(_):
        def interrupt():
            for _ in range(2):  # the second before the loop's next look, a tenth of a second
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.02)

        timer = threading.Timer(0.5, interrupt)
        timer.start()
        yield
        timer.join()
        ended.append(True)

    run(FastAPI(lifespan=lifespan), socket.create_server(("127.0.0.1", 0)))
    assert ended and not capfd.readouterr().err
