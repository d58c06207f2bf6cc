"""What a store holds as numbers: a checksum of its content that no order changes, and a digest of the order."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from data_tools.store.beside import beside_json
from data_tools.store.layouts import Id, id_key, json_pair

_WAITING = 4096


class Checksum:
    """Sums of sha256 values, so that neither order nor sharding shows, and a sum can be saved and gone on with."""

    def __init__(self, sums: tuple[str, str] = ("0", "0")) -> None:
        self._images, self._pairs = (int(value, 16) for value in sums)

    @property
    def sums(self) -> tuple[str, str]:
        return f"{self._images:064x}", f"{self._pairs:064x}"

    def add(self, sums: tuple[str, str]) -> None:
        self._images = (self._images + int(sums[0], 16)) % 2**256
        self._pairs = (self._pairs + int(sums[1], 16)) % 2**256

    def image(self, image_id: Id, data: bytes) -> bytes:
        """Add an image; returns the 32 bytes added."""
        return self.add_image(image_digest(image_id, data))

    def add_image(self, digest: bytes) -> bytes:
        self._images = (self._images + int.from_bytes(digest, "big")) % 2**256
        return digest

    def pair(self, image_id: Id | None, text_id: Id, text: str, beside: Mapping[str, Any] | None = None) -> None:
        more = f",{beside_json(beside)}" if beside else ""
        value = f"[{json_pair(image_id, text_id, text)}{more}]".encode("utf-8", "replace")
        self._pairs = (self._pairs + int.from_bytes(hashlib.sha256(value).digest(), "big")) % 2**256

    def hexdigest(self) -> str:
        return hashlib.sha256("".join(self.sums).encode()).hexdigest()


def image_digest(image_id: Id, data: bytes) -> bytes:
    """The 32 bytes an image adds to the checksum."""
    sha = hashlib.sha256(id_key(image_id) + b"\0")
    sha.update(data)
    return sha.digest()


def written(ids: Sequence[Any], write: Callable[[Any], str]) -> Iterator[bytes]:
    """``[a, b, …]`` in pieces, as `write` (`repr`, `json.dumps`) would give of the whole list, which need not be one."""
    yield b"["
    for start in range(0, len(ids), _WAITING):
        some = ", ".join(map(write, ids[start : start + _WAITING]))
        yield (f", {some}" if start else some).encode()
    yield b"]"


class Order:
    """Digest over ids of images as they are stored, then pairs and texts without image by their number.

    A line each, as JSON; the same content in another order, which `Checksum` does not tell, gives another digest.
    """

    def __init__(self) -> None:
        self._sha = hashlib.sha256()
        self._lines: list[str] = []

    def image(self, image_id: Id) -> None:
        self._line(str(image_id) if type(image_id) is int else json.dumps(image_id))

    def pair(self, image_id: Id | None, text_id: Id, text: str) -> None:
        self._line(json_pair(image_id, text_id, text))

    def plain_pair(self, value: bytes) -> None:
        """As `pair`, of a record of the plain layout: it is that text between a bracket and the language."""
        self._line(value[1 : value.rfind(b",")].decode("utf-8", "replace"))

    def _line(self, line: str) -> None:
        self._lines.append(line)
        if len(self._lines) >= _WAITING:
            self._take()

    def _take(self) -> None:
        self._sha.update("".join(f"{line}\n" for line in self._lines).encode("utf-8", "replace"))
        self._lines.clear()

    def hexdigest(self) -> str:
        self._take()
        return self._sha.hexdigest()
