"""The store: one split's pairs and pictures in two LMDB files. Reader and writer."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import lmdb

from data_tools.errors import RequestError


@dataclass(frozen=True, slots=True)
class Pair:
    image_id: int | str
    text_id: int | str
    text: str
    language: str | None = None


def _key(number: int) -> bytes:
    return struct.pack(">Q", number)


class PairStore:
    def __init__(self, path: Path) -> None:
        self.path, self.name = Path(path), Path(path).name
        self._pid, self._envs = -1, ()

    def __getstate__(self):
        return {"path": self.path}

    def __setstate__(self, state):
        self.__init__(state["path"])

    def _open(self):
        if self._pid != os.getpid():
            options = {"readonly": True, "lock": False, "readahead": False, "max_readers": 1}
            for env in self._envs:
                env.close()
            self._envs = tuple(lmdb.open(str(self.path / part), **options) for part in ("pairs", "imgs"))
            self._pairs, self._images = (env.begin(buffers=True) for env in self._envs)
            self._pid = os.getpid()
        return self._pairs, self._images

    @cached_property
    def _meta(self) -> dict:
        return json.loads(bytes(self._open()[0].get(b"meta")))

    def __len__(self) -> int:
        return self._meta["pairs"]

    def __getitem__(self, i: int) -> Pair:
        value = self._open()[0].get(_key(i))
        if value is None:
            raise IndexError(i)
        return Pair(*json.loads(bytes(value)))

    def pairs(self) -> Iterator[Pair]:
        return (self[i] for i in range(len(self)))

    def image(self, image_id) -> bytes:
        value = self._open()[1].get(json.dumps(image_id, ensure_ascii=False).encode())
        if value is None:
            raise KeyError(image_id)
        return bytes(value)

    @cached_property
    def image_ids(self) -> list:
        return [json.loads(bytes(k)) for k in self._open()[1].cursor().iternext(values=False)]

    @property
    def lone_texts(self) -> list:
        return [tuple(t) for t in self._meta["lone_texts"]]

    def checksum(self) -> str:
        return self._meta["checksum"]


def open_store(path: str | Path) -> PairStore:
    path = Path(path)
    if not (path / "pairs" / "data.mdb").is_file():
        raise RequestError(f"{path} is not a store: it holds no pairs/data.mdb. Build one with `cnclip-ft data build`.")
    return PairStore(path)


class StoreWriter:
    def __init__(self, target: Path) -> None:
        self.target = Path(target)
        self.beside = self.target.with_name(self.target.name + ".building")
        shutil.rmtree(self.beside, ignore_errors=True)
        self.beside.mkdir(parents=True)
        self._p = lmdb.open(str(self.beside / "pairs"), map_size=1 << 32)
        self._i = lmdb.open(str(self.beside / "imgs"), map_size=1 << 34)
        self._pt, self._it = self._p.begin(write=True), self._i.begin(write=True)
        self.count, self.digest, self.lone = 0, hashlib.sha256(), []

    def __enter__(self):
        return self

    def __exit__(self, *error):
        shutil.rmtree(self.beside, ignore_errors=True)

    def add_image(self, image_id, data: bytes) -> None:
        self._it.put(json.dumps(image_id, ensure_ascii=False).encode(), data)
        self.digest.update(data)

    def add_pair(self, image_id, text_id, text, language=None) -> None:
        value = json.dumps([image_id, text_id, text, language], ensure_ascii=False).encode()
        self._pt.put(_key(self.count), value)
        self.digest.update(value)
        self.count += 1

    def add_lone_text(self, text_id, text, language=None) -> None:
        self.lone.append([text_id, text, language])

    def finish(self) -> None:
        meta = {"pairs": self.count, "lone_texts": self.lone, "checksum": self.digest.hexdigest()}
        self._pt.put(b"meta", json.dumps(meta).encode())
        self._pt.commit(), self._it.commit()
        self._p.close(), self._i.close()
        shutil.rmtree(self.target, ignore_errors=True)
        os.replace(self.beside, self.target)
