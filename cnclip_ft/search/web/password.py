"""A password before everything: HTTP basic authentication, asked of pages, programs and pictures alike.

Whoever asks is refused before a byte of the request's body is taken in, by the frameworks' own parts: Starlette's
middleware, FastAPI's reader of the header. Any user name will do.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import secrets
import stat
from pathlib import Path

from fastapi import FastAPI
from fastapi.security import HTTPBasic
from starlette.authentication import AuthCredentials, AuthenticationBackend, AuthenticationError, BaseUser, SimpleUser
from starlette.exceptions import HTTPException
from starlette.middleware.authentication import AuthenticationMiddleware
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse, Response

from data_tools.errors import RequestError

_MOST = 1024  # bytes of the file
_PAUSE = 1.0  # seconds before a wrong password is refused: who guesses gets few guesses
_ASK = {"WWW-Authenticate": 'Basic realm="picture search"'}


def read_password(file: Path) -> str:
    """The first line of `file`, which holds nothing else.

    Raises:
        RequestError: it cannot be read, is empty or not ASCII, or others on this machine may read it.
    """
    try:
        mode, content = file.stat().st_mode, file.read_bytes()[: _MOST + 1]
        password = content.decode("ascii").rstrip("\r\n")
    except OSError as error:
        raise RequestError(f"--password-file {file} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise RequestError(
            f"--password-file {file} holds other than ASCII, which browsers send in different ways; choose another password"
        ) from None
    if not password.strip() or "\n" in password or len(content) > _MOST:
        raise RequestError(f"--password-file {file}: the password is to be its only line, at most {_MOST:,} bytes")
    if os.name == "posix" and mode & (stat.S_IRGRP | stat.S_IROTH):
        raise RequestError(f"--password-file {file} can be read by others on this machine: chmod 600 {file}")
    return password


class _Password(AuthenticationBackend):
    def __init__(self, password: str) -> None:
        self._digest, self._header = _digest(password), HTTPBasic(auto_error=False)

    async def authenticate(self, conn: HTTPConnection) -> tuple[AuthCredentials, BaseUser]:
        try:
            given = await self._header(Request(conn.scope))
        except HTTPException:  # a header that is none
            given = None
        if given is None:
            raise AuthenticationError("the server asks for its password (any user name)")
        if not secrets.compare_digest(_digest(given.password), self._digest):
            await asyncio.sleep(_PAUSE)
            raise AuthenticationError("this is not the password")
        return AuthCredentials(), SimpleUser(given.username)


def _digest(password: str) -> bytes:
    """Of one length whatever the password's, so that comparing takes the same time for all."""
    return hashlib.sha256(password.encode("utf-8")).digest()


def _refuse(_: HTTPConnection, error: Exception) -> Response:
    return JSONResponse({"code": "password", "detail": str(error)}, 401, _ASK)


def protect(app: FastAPI, password: str) -> None:
    """Answer nothing without the password; the description at /openapi.json says so too."""
    app.add_middleware(AuthenticationMiddleware, backend=_Password(password), on_error=_refuse)
    describe = app.openapi

    def described() -> dict[str, object]:
        schema = describe()
        schema.setdefault("components", {}).setdefault("securitySchemes", {})["password"] = {
            "type": "http",
            "scheme": "basic",
            "description": "Any user name.",
        }
        schema["security"] = [{"password": []}]
        return schema

    app.openapi = described  # type: ignore[method-assign]  # FastAPI's own way to extend a description
