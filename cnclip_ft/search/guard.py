"""What stands before the application: who may ask by which name, how much may be sent, what a browser is told.

* **Host.** A page elsewhere can point a name of its own at 127.0.0.1 and then read this server as if it were its own
  (DNS rebinding). So a server on a loopback address answers only to loopback names.
* **Bytes.** A body is counted as it arrives and cut off at its limit, whatever its length claims.
* **Headers.** The page may load nothing but itself and this server's pictures, and may not be framed.
"""

from __future__ import annotations

import base64
import hashlib
import ipaddress
import json
import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import anyio
from starlette.exceptions import HTTPException

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

_PATIENCE = 2.0  # seconds
LOOPBACK = frozenset(("localhost", "127.0.0.1", "::1"))
_SECURITY = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"x-frame-options", b"DENY"),
]


def is_loopback(host: str) -> bool:
    """Can only this machine reach a server that listens on `host`?"""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def host_name(header: str) -> str:
    """``127.0.0.1:8000`` → ``127.0.0.1``; ``[::1]:8000`` → ``::1``."""
    found = re.fullmatch(r"\[([^\]]*)\](?::\d*)?|([^:]*)(?::\d*)?", header.strip())
    return ((found[1] or found[2] or "") if found else "").lower()


def content_policy(page: str) -> str:
    """Content-Security-Policy of a page whose script and style stand in it: they run by their hashes, nothing else does."""

    def hashes(tag: str) -> str:
        bodies = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = (base64.b64encode(hashlib.sha256(body.encode()).digest()).decode() for body in bodies)
        return " ".join(f"'sha256-{digest}'" for digest in digests)

    return (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; img-src 'self' blob: data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


class Guard:
    """ASGI middleware (module docstring).

    Args:
        names: host names it answers to; None: all.
        limit: bytes of a body, by path; `other` for paths that are not named.
    """

    def __init__(self, app: Any, names: frozenset[str] | None, limit: dict[str, int], other: int) -> None:
        self.app, self.names, self.limit, self.other = app, names, limit, other

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        limit = self.limit.get(scope["path"], self.other)
        name = host_name(headers.get(b"host", b"").decode("latin-1"))
        if self.names is not None and name not in self.names:
            await _refuse(send, 421, "host", "this server answers to localhost only")
            return
        if _claims(headers) > limit:
            with anyio.move_on_after(_PATIENCE):
                await _drain(receive, 4 * limit)
            await _refuse(send, 413, "too-large", _too_large(limit))
            return
        got = 0

        async def counted() -> MutableMapping[str, Any]:
            nonlocal got
            message = await receive()
            got += len(message.get("body", b""))
            if got > limit:
                raise HTTPException(413, _too_large(limit))
            return message

        async def secured(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *_SECURITY]
            await send(message)

        await self.app(scope, counted, secured)


def _claims(headers: dict[bytes, bytes]) -> int:
    value = headers.get(b"content-length", b"0")
    return int(value) if value.isdigit() and len(value) < 20 else 0


async def _drain(receive: Receive, most: int) -> None:
    """Take in and forget a body, up to a bound: who is still sending when the answer comes sees only a broken line.

    The caller bounds the time: what a length promises may never come.
    """
    while most > 0:
        message = await receive()
        most -= len(message.get("body", b""))
        if message["type"] != "http.request" or not message.get("more_body"):
            return


def _too_large(limit: int) -> str:
    return f"more than {limit / 2**20:.1f} MiB were sent"


async def _refuse(send: Send, status: int, code: str, detail: str) -> None:
    body = json.dumps({"code": code, "detail": detail}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()),
               (b"connection", b"close"), *_SECURITY]  # fmt: skip
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
