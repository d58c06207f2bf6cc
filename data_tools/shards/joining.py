"""The parts of all shards → one index: arrays on the disk that a reader maps, pictures sorted by id, pairs in the shards' order.

A picture keeps the id of its sample; another picture that has this id in a later place becomes ``<id>~<12 digits>``, the same
picture is one: as `data import` does it. Ids are sorted in blocks, so memory does not grow with their number.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.bars import Bar
from data_tools.errors import DataFault
from data_tools.shards.part import Part
from data_tools.store.checksum import Checksum, Order, image_digest
from data_tools.store.seen import other_image_id

META = "index.json"
FORMAT, VERSION = "cnclip-ft-shards", 1
PLACE = np.dtype([("shard", "<i4"), ("offset", "<i8"), ("length", "<i8")])
_STEP, _BLOCK = 1024, 2**20  # every so many ids one is looked at to cut; ids sorted at once

ReadPart = Callable[[int], Part]
ReadPicture = Callable[[int, int, int], bytes]  # shard, offset, length


class Columns:
    """Arrays written piece by piece: raw files, and what they are in the description."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._files, self._kinds = folder, dict[str, Any](), dict[str, np.dtype]()

    def add(self, name: str, values: np.ndarray) -> None:
        if name not in self._files:
            self._files[name] = (self.folder / name).open("wb")
            self._kinds[name] = values.dtype
        self._files[name].write(np.ascontiguousarray(values, self._kinds[name]).data)

    def close(self) -> dict[str, list[Any]]:
        """name → [type, numbers in it]."""
        found = {}
        for name, file in self._files.items():
            kind = self._kinds[name]
            size = file.tell()
            file.close()
            found[name] = [kind.descr if kind.names else kind.str, size // kind.itemsize]
        return found


class Behind:
    """A column of values of any length behind one another, and where each begins."""

    def __init__(self, columns: Columns, name: str) -> None:
        self.columns, self.name, self.end = columns, name, 0
        columns.add(name, np.empty(0, np.uint8))
        columns.add(f"{name}_starts", np.zeros(1, np.int64))

    def add(self, content: np.ndarray, starts: np.ndarray) -> None:
        """`starts`: one more than there are values, from 0."""
        self.columns.add(self.name, content)
        self.columns.add(f"{self.name}_starts", starts[1:] + self.end)
        self.end += int(starts[-1])


@dataclass
class _Ids:
    """Ids of one part, sorted, and whose they are."""

    keys: np.ndarray  # S
    numbers: np.ndarray  # int64: of the pictures among all of all parts

    @classmethod
    def of(cls, keys: np.ndarray, first: int) -> _Ids:
        order = np.argsort(keys, kind="stable")
        return cls(keys[order], order + first)

    def between(self, low: bytes | None, high: bytes | None) -> slice:
        start = 0 if low is None else int(np.searchsorted(self.keys, np.bytes_(low)))
        stop = len(self.keys) if high is None else int(np.searchsorted(self.keys, np.bytes_(high)))
        return slice(start, stop)


def in_order(count: int, ids_of: Callable[[int], _Ids], block: int = _BLOCK) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(ids, numbers) of all parts in ascending order of (id, number), about `block` at once; equal ids stand in one block."""
    looked_at, ends = [], []
    for number in range(count):
        keys = ids_of(number).keys
        looked_at += keys[:: min(_STEP, max(block // 4, 1))].tolist()
        ends.append((keys[0], keys[-1]) if len(keys) else (b"", b""))
    looked_at.sort()
    cuts = sorted(set(looked_at[:: max(block // _STEP, 4)][1:]))
    for low, high in zip([None, *cuts], [*cuts, None], strict=True):
        pieces = []
        for number in range(count):
            if (low is None or ends[number][1] >= low) and (high is None or ends[number][0] < high):
                ids = ids_of(number)
                piece = ids.between(low, high)
                if piece.start < piece.stop:
                    pieces.append((ids.keys[piece], ids.numbers[piece]))
        if pieces:
            keys = np.concatenate([keys for keys, _ in pieces])
            numbers = np.concatenate([numbers for _, numbers in pieces])
            order = np.argsort(keys, kind="stable")
            yield keys[order], numbers[order]


_SUM = np.dtype("V32")


def join(parts: int, read: ReadPart, picture: ReadPicture, names: Sequence[str], folder: Path, shown: str) -> None:
    """Write the index of `parts` shards into `folder`, its description last.

    Args:
        read: the part of a shard. picture: bytes of a picture, asked for where another has its id.
        names: of the shards as they are kept. shown: what the progress bar says.

    Raises:
        DataFault: two pictures have one id even with the digits that tell them apart.
    """
    content, order, columns = Checksum(), Order(), Columns(folder)
    images = _Images(parts, read, folder)
    others = images.rename(picture)
    images.sort(others, columns, content, order, shown)
    pairs = _Pairs(columns, images, content, order)
    with Bar(total=parts, desc=f"{shown}: pairs", unit="shard", delay=2.0) as bar:
        for shard in range(parts):
            pairs.take(read(shard), int(images.starts[shard]), others.get(shard, {}))
            bar.update()
    arrays = columns.close() | pairs.close()
    images.close()
    about = images.about
    meta = {
        "format": FORMAT,
        "version": VERSION,
        "images": images.count,
        "pairs": pairs.count,
        "sums": content.sums,
        "checksum": content.hexdigest(),
        "order": order.hexdigest(),
        "shards": [
            {"name": name, "kind": one["kind"], "stamp": one["stamp"]} for name, one in zip(names, about, strict=True)
        ],
        "image_columns": [one.get("image") for one in about] if any("image" in one for one in about) else [],
        "group_bytes": max((one.get("group_bytes", 0) for one in about), default=0),
        "columns": list(dict.fromkeys(name for one in about for name in one["columns"])),
        "beside": dict(sum((Counter(one["beside"]) for one in about), Counter())),
        "faults": dict(sum((Counter(one["faulty"]) for one in about), Counter())),
        "arrays": arrays,
    }
    (folder / META).write_text(json.dumps(meta, ensure_ascii=False), encoding="utf-8")


class _Images:
    """Pictures of all parts, first as they come (files that are gone at the end), then sorted by id, each once.

    Attributes:
        starts: of each part among all. position: of every picture as it comes, among the sorted ones. again: whether it came before.
        count: of the sorted ones. about: what each part says of itself, without its faults: they are listed in a file.
    """

    def __init__(self, parts: int, read: ReadPart, folder: Path) -> None:
        self.parts, self.read, self.folder, self.count = parts, read, folder, 0
        self.starts = np.zeros(parts + 1, np.int64)
        self.about: list[dict[str, Any]] = []
        raw = Columns(folder)
        kinds = {"raw_places": PLACE, "raw_sums": _SUM, "raw_digests": _SUM}
        for name, kind in kinds.items():
            raw.add(name, np.empty(0, kind))
        with (folder / "faults.jsonl").open("w", encoding="utf-8", newline="\n", errors="backslashreplace") as file:
            for shard in range(parts):
                part = read(shard)
                arrays = part.arrays
                self.starts[shard + 1] = self.starts[shard] + len(arrays["offsets"])
                places = np.empty(len(arrays["offsets"]), PLACE)
                places["shard"], places["offset"], places["length"] = shard, arrays["offsets"], arrays["lengths"]
                raw.add("raw_places", places)
                raw.add("raw_sums", _rows(arrays["sums"]))
                raw.add("raw_digests", _rows(arrays["digests"]))
                file.writelines(f"{json.dumps(fault, ensure_ascii=False)}\n" for fault in part.about["faults"])
                self.about.append({name: value for name, value in part.about.items() if name != "faults"})
        raw.close()
        total = int(self.starts[-1])
        self._places, self._sums, self._digests = (
            mapped(folder / name, kind, total, "r+") for name, kind in kinds.items()
        )
        self.position = mapped(folder / "raw_position", np.dtype(np.int64), total, "w+")
        self.again = mapped(folder / "raw_again", np.dtype(bool), total, "w+")

    def rename(self, picture: ReadPicture) -> dict[int, dict[int, str]]:
        """shard → number of a picture in its part → the id it gets because another picture has its own."""
        others: dict[int, dict[int, str]] = {}
        for keys, numbers in in_order(self.parts, lambda shard: self._ids(shard, {})):
            for at in (np.flatnonzero(keys[1:] == keys[:-1]) + 1).tolist():
                first = int(np.searchsorted(keys, keys[at]))
                digest = self._digests[numbers[at]].tobytes()
                if digest != self._digests[numbers[first]].tobytes():
                    shard = int(np.searchsorted(self.starts, numbers[at], "right")) - 1
                    own = other_image_id(keys[at].decode(), digest.hex())
                    others.setdefault(shard, {})[int(numbers[at] - self.starts[shard])] = own
        for shard, renamed in others.items():
            for number, own in renamed.items():
                place = self._places[self.starts[shard] + number]
                data = picture(shard, int(place["offset"]), int(place["length"]))
                self._sums[self.starts[shard] + number] = np.void(image_digest(own, data))
        return others

    def _ids(self, shard: int, others: dict[int, str]) -> _Ids:
        return _Ids.of(_final(self.read(shard).arrays["ids"], others), int(self.starts[shard]))

    def sort(
        self, others: dict[int, dict[int, str]], columns: Columns, content: Checksum, order: Order, shown: str
    ) -> None:
        """Write ids, places and digests in the order of the ids."""
        ids = Behind(columns, "ids")
        columns.add("places", self._places[:0])
        columns.add("digests", self._digests[:0])
        with Bar(total=len(self.position), desc=f"{shown}: ids", unit="image", delay=2.0) as bar:
            for keys, numbers in in_order(self.parts, lambda shard: self._ids(shard, others.get(shard, {}))):
                first = np.ones(len(keys), bool)
                first[1:] = keys[1:] != keys[:-1]
                placed, kept, own = np.cumsum(first) - 1, numbers[first], keys[first].tolist()
                self._refuse_two(keys, self._digests[numbers] != self._digests[kept][placed])
                self.position[numbers], self.again[numbers] = placed + self.count, ~first
                self.count += len(own)
                lengths = np.fromiter(map(len, own), np.int64, len(own))
                ids.add(np.frombuffer(b"".join(own), np.uint8), np.concatenate([[0], np.cumsum(lengths)]))
                columns.add("places", self._places[kept])
                columns.add("digests", self._digests[kept])
                for digest in self._sums[kept].tolist():
                    content.add_image(digest)
                for image_id in own:
                    order.image(image_id.decode())
                bar.update(len(keys))

    def _refuse_two(self, keys: np.ndarray, differ: np.ndarray) -> None:
        if differ.any():
            wrong = keys[differ][0].decode()
            raise DataFault(
                f"picture {wrong!r} stands for two pictures",
                mend="Give every picture a name of its own.",
                kind="duplicate-image-id",
                item_id=wrong,
            )

    def close(self) -> None:
        """Remove what is needed no more."""
        del self._places, self._sums, self._digests, self.position, self.again
        for name in ("raw_places", "raw_sums", "raw_digests", "raw_position", "raw_again"):
            (self.folder / name).unlink(missing_ok=True)


class _Pairs:
    """Pairs of one part after another, their pictures by position, their texts numbered on."""

    def __init__(self, columns: Columns, images: _Images, content: Checksum, order: Order) -> None:
        self.columns, self.images, self.content, self.order = columns, images, content, order
        self.count = self.numbers = 0
        self.texts, self.beside, self.kept = (Behind(columns, name) for name in ("texts", "beside", "columns"))
        self.described = 0
        described = images.count if any(one["columns"] for one in images.about) else 0
        # position of a picture → which of the kept columns are its own
        self.column_at = mapped(images.folder / "column_at", np.dtype(np.int64), described, "w+")
        self.column_at[:] = -1
        for name in ("pair_images", "pair_texts", "beside_pairs"):
            columns.add(name, np.empty(0, np.int64))
        columns.add("languages", np.empty(0, np.uint8))

    def take(self, part: Part, first: int, others: dict[int, str]) -> None:
        """`first`: number of the part's first picture among all as they come."""
        arrays, columns = part.arrays, self.columns
        columns.add("pair_images", self.images.position[first + arrays["pair_images"]])
        columns.add("pair_texts", arrays["pair_texts"] + self.numbers)
        columns.add("languages", arrays["languages"])
        columns.add("beside_pairs", arrays["beside_pairs"] + self.count)
        self.texts.add(arrays["texts"], arrays["texts_starts"])
        self.beside.add(arrays["beside"], arrays["beside_starts"])
        self.kept.add(arrays["columns"], arrays["columns_starts"])
        described = first + arrays["column_images"]
        new = np.flatnonzero(~self.images.again[described])  # of a picture that came before what was said then stays
        if len(new):
            self.column_at[self.images.position[described[new]]] = self.described + new
        self.described += len(described)
        self._sum_up(arrays, _final(arrays["ids"], others).tolist())
        self.count += len(arrays["pair_images"])
        self.numbers += part.about["numbers"]

    def _sum_up(self, arrays: dict[str, np.ndarray], ids: list[bytes]) -> None:
        texts, starts = arrays["texts"].tobytes(), arrays["texts_starts"].tolist()
        beside, ends = arrays["beside"].tobytes(), arrays["beside_starts"].tolist()
        found = {
            number: json.loads(beside[ends[at] : ends[at + 1]])
            for at, number in enumerate(arrays["beside_pairs"].tolist())
        }
        names = [image_id.decode() for image_id in ids]
        numbers = (arrays["pair_texts"] + self.numbers).tolist()
        for at, (image, number) in enumerate(zip(arrays["pair_images"].tolist(), numbers, strict=True)):
            text = texts[starts[at] : starts[at + 1]].decode()
            self.content.pair(names[image], number, text, found.get(at))
            self.order.pair(names[image], number, text)

    def close(self) -> dict[str, list[Any]]:
        """name → [type, numbers in it] of what was written here itself."""
        count, kind = len(self.column_at), self.column_at.dtype.str
        del self.column_at
        return {"column_at": [kind, count]} if count else {}


def _final(keys: np.ndarray, others: dict[int, str]) -> np.ndarray:
    """Ids of a part as they are in the index."""
    if not others:
        return keys
    keys = keys.astype(f"S{max(keys.dtype.itemsize, *(len(own.encode()) for own in others.values()))}")
    for at, own in others.items():
        keys[at] = own.encode()
    return keys


def _rows(digests: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(digests).view("V32").reshape(len(digests))


def mapped(file: Path, kind: np.dtype, count: int, mode: Any = "r") -> np.ndarray:
    """An array of a file; one of nothing cannot be mapped."""
    if not count:
        return np.empty(0, kind)
    return np.memmap(file, kind, mode, shape=(count,))
