"""A share of a source for one job of an array (`--part 3/64`): every item goes into exactly one share, the same every time.

A source of so many files gives whole files; any other is dealt picture by picture, by a hash of the picture's id: its
captions go with it, and a text on several pictures goes with each.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data_tools.errors import DataFault, RequestError
from data_tools.items import ImageItem, Item, Source, Stream, TextItem
from data_tools.sources.joined import Joined
from data_tools.sources.webdataset import WebDatasetSource
from data_tools.store import Id

_COUNTED = 2**40  # counted numbers of texts that a share may give: those of another one begin behind them


@dataclass(frozen=True)
class Share:
    """The `number`-th (from 1) of `of`."""

    number: int
    of: int

    @classmethod
    def parse(cls, given: str) -> Share:
        """``3/64``.

        Raises:
            RequestError: it is no share.
        """
        found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", given)
        if found is None or not 1 <= int(found[1]) <= int(found[2]):
            raise RequestError(
                f"--part {given!r}: expected a number and how many there are, like 3/64; the first is 1/64"
            )
        return cls(int(found[1]), int(found[2]))

    def has(self, item_id: Id) -> bool:
        name = json.dumps(item_id).encode()
        return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big") % self.of == self.number - 1


class ShareOf:
    """The items of `source` that belong to a share; `part` is what the store says of it (docs/store-format.md)."""

    def __init__(self, source: Source, share: Share) -> None:
        self.share, self.kind = share, source.kind
        source = _by_tar(source, share)
        self.by = "pictures"
        if isinstance(source, Joined):
            # By their names, whatever the order in which they were given.
            source = Joined(sorted(source.sources, key=lambda each: _source_key(each.fingerprint())))
        whole = _source_key(source.fingerprint())
        if isinstance(source, Joined) and len(source.sources) >= share.of:
            self.by = "files"
            source = Joined(source.sources[share.number - 1 :: share.of], (share.number - 1) * _COUNTED)
        self.source = source
        digest = hashlib.sha256(whole.encode()).hexdigest()
        self.part = {"number": share.number, "of": share.of, "by": self.by, "source": digest}

    def open(self) -> Stream:
        stream = self.source.open()
        return stream if self.by == "files" else replace(stream, items=self._items(stream.items))

    def _items(self, items: Iterator[Item]) -> Iterator[Item]:
        for item in items:
            if isinstance(item, TextItem):
                own = [image_id for image_id in item.image_ids if self.share.has(image_id)]
                if own or (not item.image_ids and self.share.has(item.text_id)):
                    yield item if len(own) == len(item.image_ids) else replace(item, image_ids=own)
            elif self.share.has(_name(item)):
                yield item

    def fingerprint(self) -> dict[str, Any]:
        return {**self.source.fingerprint(), "part": self.part}

    def expected(self) -> dict[str, int]:
        return {}


def _by_tar(source: Source, share: Share) -> Source:
    """Tars one by one, where there are enough of them."""
    if not isinstance(source, WebDatasetSource) or len(tars := source.tars()) < share.of:
        return source
    return Joined([WebDatasetSource(tar, source.text_fields, source.encoding) for tar in tars])


def _name(item: ImageItem | DataFault) -> Id:
    if isinstance(item, ImageItem):
        return item.image_id
    return item.item_id if item.item_id is not None else f"{Path(str(item.file)).name}:{item.line}"


def _source_key(fingerprint: Any) -> str:
    """The same on every machine: files by name and size, without their folders and times."""
    return json.dumps(_named(fingerprint), sort_keys=True, ensure_ascii=False)


def _named(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _named(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        if len(value) == 3 and isinstance(value[0], str) and type(value[1]) is int and type(value[2]) is int:
            return [Path(value[0]).name, value[1]]
        return [_named(inner) for inner in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
