"""What stands before the application: who may ask by which name, how much may be sent, what a browser is told.

* **Host.** A page elsewhere can point a name of its own at this server and then read it as if it were its own (DNS
  rebinding). So only known names are answered: those of this machine, and those that were allowed. An address is no
  name, so it is safe where the server is meant to be reached by it.
* **Origin.** A page elsewhere can have its visitor's browser send requests here without reading the answers: uploads,
  questions, pictures, all of which cost. Browsers say so in ``Sec-Fetch-Site`` or ``Origin``; programs send neither.
* **Bytes and time.** A body is counted as it arrives and cut off at its limit, whatever its length claims, and at its
  deadline. Few large ones are taken in at a time.
* **Headers.** The page may load nothing but itself and this server's pictures, and may not be framed.
"""

from __future__ import annotations

import base64
import hashlib
import ipaddress
import json
import re
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import anyio
from starlette.exceptions import HTTPException

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

_PATIENCE = 2.0  # seconds
_LARGE = 32  # bodies of the larger limits at a time
LOOPBACK = frozenset(("localhost", "127.0.0.1", "::1"))
ANY = "*"
RETRY = (b"retry-after", b"2")  # seconds
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


def names_of(host: str) -> frozenset[str]:
    """The names a server that listens on `host` answers to by itself."""
    if is_loopback(host):
        return LOOPBACK
    own = socket.gethostname().lower()
    return LOOPBACK | {host.lower(), own, f"{own}.local"}


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


class Gate:
    """ASGI middleware (module docstring).

    Args:
        names: host names it answers to. addresses: and to any address. origins: names of other sites whose pages may ask.
        limit: bytes of a body, by path; `other` for paths that are not named.
        seconds: that a body may take to arrive.
    """

    def __init__(
        self,
        app: Any,
        names: frozenset[str],
        addresses: bool,
        origins: frozenset[str],
        limit: dict[str, int],
        other: int,
        seconds: float,
    ) -> None:
        self.app, self.names, self.addresses, self.origins, self.seconds = app, names, addresses, origins, seconds
        self.limit, self.other = limit, other
        self._large = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        limit = self.limit.get(scope["path"], self.other)
        if not self._known(host_name(headers.get(b"host", b"").decode("latin-1"))):
            await _refuse(send, 421, "host", "this server does not answer to this name (allow one: --allow-host NAME)")
        elif self._foreign(headers) and not _is_a_visit(scope):
            await _refuse(
                send, 403, "foreign", "this was sent by a page of another site (allow one: --allow-host NAME)"
            )
        elif _claims(headers) > limit:
            with anyio.move_on_after(_PATIENCE):
                await _drain(receive, 4 * limit)
            await _refuse(send, 413, "too-large", _too_large(limit))
        elif scope["path"] not in self.limit:
            await self.app(scope, self._bounded(receive, limit), _secured(send))
        elif self._large >= _LARGE:
            await _refuse(send, 503, "busy", "too many pictures are being sent; ask again in a moment")
        else:
            self._large += 1
            try:
                await self.app(scope, self._bounded(receive, limit), _secured(send))
            finally:
                self._large -= 1

    def _known(self, name: str) -> bool:
        return ANY in self.names or name in self.names or (self.addresses and _is_address(name))

    def _foreign(self, headers: dict[bytes, bytes]) -> bool:
        origin = headers.get(b"origin", b"").decode("latin-1").lower()
        _, _, place = origin.partition("://")
        if host_name(place) in self.origins:
            return False
        # A browser's own word goes first: a proxy may have changed the host, so that no origin fits.
        site = headers.get(b"sec-fetch-site")
        if site is not None:
            return site not in (b"same-origin", b"none")
        host = headers.get(b"host", b"").decode("latin-1").lower()
        return bool(origin) and _without_port(origin) != _without_port(f"{origin.partition('://')[0]}://{host}")

    def _bounded(self, receive: Receive, limit: int) -> Receive:
        got, whole, end = 0, False, anyio.current_time() + self.seconds

        async def bounded() -> MutableMapping[str, Any]:
            nonlocal got, whole
            if whole:  # what comes now is that the client has gone
                return await receive()
            with anyio.move_on_after(end - anyio.current_time()) as time:
                message = await receive()
            if time.cancelled_caught:
                raise HTTPException(
                    408, f"the request has not arrived within {self.seconds:g} s", {"connection": "close"}
                )
            got += len(message.get("body", b""))
            if got > limit:
                raise HTTPException(413, _too_large(limit), {"connection": "close"})
            whole = not message.get("more_body", False)
            return message

        return bounded


def _is_a_visit(scope: Scope) -> bool:
    """Somebody follows a link to the page, or a program of another site reads the description: both cost nothing."""
    return scope["method"] in ("GET", "HEAD") and not scope["path"].startswith("/api")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _without_port(origin: str) -> str:
    scheme, _, place = origin.partition("://")
    return f"{scheme}://{place.removesuffix({'http': ':80', 'https': ':443'}.get(scheme, ':'))}"


def _secured(send: Send) -> Send:
    async def secured(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", []), *_SECURITY]
        await send(message)

    return secured


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
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
        *([RETRY] if status == 503 else []),
        *_SECURITY,
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
