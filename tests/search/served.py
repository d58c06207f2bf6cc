"""A live search page for a browser, and what stands on it."""

from __future__ import annotations

import contextlib
import socket
import threading

import uvicorn

from cnclip_ft.search.web.api import Limits, make_app
from tests.browser import until


@contextlib.contextmanager
def served(engine, password: str | None = None):
    """A live server in a thread; a picture of more than 3,000 bytes is too large for it."""
    listener = socket.create_server(("127.0.0.1", 0))
    app = make_app(engine, threshold=0.25, limits=Limits(upload_bytes=3000), password=password)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
    server.should_exit = True
    thread.join(20)


def shown(driver) -> list[str]:
    return driver.execute_script("return [...document.querySelectorAll('.card .name')].map(e => e.textContent)")


def settled(driver) -> list[str]:
    until(
        driver,
        "return document.querySelector('#grid').getAttribute('aria-busy') === 'false' && document.querySelector('.card')",
    )
    return shown(driver)
