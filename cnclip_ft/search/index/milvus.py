"""A Milvus collection as the place of an index: `milvus:PATH.db` is milvus-lite in this process, `milvus:http://…` a server.

The token of a server comes from the environment (`CNCLIP_FT_MILVUS_TOKEN`) and goes nowhere but to the server.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import re
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from data_tools.circles import no_search_for_circles
from data_tools.errors import RequestError

PREFIX, TOKEN, NAME = "milvus:", "CNCLIP_FT_MILVUS_TOKEN", "pictures"
MISSING = "an index in Milvus needs pymilvus: pip install 'cnclip-ft[milvus]'"
_PATIENCE = 60.0  # seconds a call may take
_COLLECTION = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,199}")


class Away(RequestError):
    """The Milvus server cannot be reached, or refuses; what was written stays."""


@dataclass(frozen=True)
class MilvusPlace:
    """Where a collection lies: a path that ends in .db or the address of a server, and the collection's name."""

    uri: str
    name: str = NAME

    def __str__(self) -> str:
        return f"{PREFIX}{self.uri}" + ("" if self.name == NAME else f"#{self.name}")

    @property
    def embedded(self) -> bool:
        return self.uri.endswith(".db")


def milvus_place(place: str | Path) -> MilvusPlace | None:
    """What `milvus:PATH.db`, `milvus:http://HOST:19530`, each with `#COLLECTION` or without, name; None: a folder.

    Raises:
        RequestError: it begins with `milvus:` and is neither, or carries a password.
    """
    if not str(place).startswith(PREFIX):
        return None
    uri, _, name = str(place)[len(PREFIX) :].partition("#")
    parts = urlsplit(uri)
    web = parts.scheme in ("http", "https")
    if web and "@" in parts.netloc:
        raise RequestError(
            f"milvus:{parts.scheme}://…@{parts.netloc.rpartition('@')[2]}: an address with a name and a password would be "
            f"written into logs; give it without, and the token (or user:password) in the environment variable {TOKEN}"
        )
    if not web and not uri.endswith(".db"):
        raise RequestError(
            f"{place}: expected milvus:PATH.db (milvus-lite, in this process) or milvus:http://HOST:19530 (a server)"
        )
    if name and not _COLLECTION.fullmatch(name):
        raise RequestError(f"{place}: {name!r} is no name of a collection: letters, digits and _, no digit first")
    return MilvusPlace(uri if web else str(Path(uri).resolve()), name or NAME)


class Milvus:
    """A connection to the place of a collection.

    Raises (in every method):
        Away: the server cannot be reached or refuses. RequestError (at the start): pymilvus is missing.
    """

    def __init__(self, place: MilvusPlace) -> None:
        self.place, self._token = place, os.environ.get(TOKEN, "")
        needed = ["pymilvus", *(["milvus_lite"] if place.embedded else [])]
        if any(importlib.util.find_spec(module) is None for module in needed):
            raise RequestError(MISSING)
        if place.embedded and not Path(place.uri).parent.is_dir():
            raise RequestError(f"{place}: there is no folder {Path(place.uri).parent}")
        import pymilvus

        for name in ("pymilvus", "milvus_lite", "grpc"):  # they print tracebacks of what is said here in words
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)
        self._errors = pymilvus.exceptions.MilvusException
        try:
            self.client: Any = pymilvus.MilvusClient(place.uri, token=self._token, timeout=_PATIENCE)
            self.client.has_collection(place.name)  # connections are shared: only an answer tells whether one lives
        except self._errors as error:
            raise self._away(error) from None

    def __enter__(self) -> Milvus:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave a server; an embedded one ends, so that other processes may open its files."""
        self.client.close()
        if self.place.embedded:
            from milvus_lite.server_manager import server_manager_instance

            server_manager_instance.release_server(self.place.uri)

    def ask(self, method: str, *given: Any, **options: Any) -> Any:
        """What `MilvusClient.method` answers."""
        try:
            return getattr(self.client, method)(*given, **options)
        except self._errors as error:
            raise self._away(error) from None

    def writing(self) -> AbstractContextManager[None]:
        """Around calls that put rows: milvus-lite makes Python lists of all vectors, in this process."""
        return no_search_for_circles() if self.place.embedded else nullcontext()

    def following(self, iterator: Any) -> list[dict[str, Any]]:
        """The next rows of a `query_iterator`; empty at its end."""
        try:
            return iterator.next()
        except self._errors as error:
            raise self._away(error) from None

    def _away(self, error: Exception) -> Away:
        said = str(getattr(error, "message", "") or error)
        if self._token:
            said = said.replace(self._token, "…")
        said = " ".join(said.split())[:300]
        if said == "Open local milvus failed":
            return Away(
                f"{self.place} cannot be opened: another process has it open (stop its `search serve` or `search index`), or "
                "it is no database of this milvus-lite. Several at once are what a Milvus server is for"
            )
        return Away(
            f"{self.place}: Milvus cannot be reached or refuses ({said}); look at the server, its address and {TOKEN}"
        )
