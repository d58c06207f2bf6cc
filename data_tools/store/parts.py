"""The LMDB files of a store being written: one pair of them, or a pair per shard."""

from __future__ import annotations

import json
from pathlib import Path

from data_tools.errors import RequestError
from data_tools.store.environments import GrowingWriter
from data_tools.store.layouts import FORMAT, LONE, META, PLAIN, PROGRESS, VERSION, Id, Layout
from data_tools.store.reader import SHARD, Checksum

MOST_SHARDS = 400  # every shard's pairs stay open while texts come in: files a process may hold


class Part:
    """One LMDB file being written, and how far it goes: items of the source, entries, sum of hashes."""

    def __init__(self, folder: Path) -> None:
        self._writer = GrowingWriter(folder)
        state = json.loads(self._writer.get(PROGRESS) or b"{}")
        self.position, self.count, self.lone = state.get("items", 0), state.get("count", 0), state.get("lone", 0)
        self.sums = Checksum(state.get("sums", ("0", "0")))
        self.put = self._writer.put

    @property
    def waiting(self) -> bool:
        return self._writer.waiting > 0

    @property
    def large(self) -> bool:
        return self._writer.large

    def flush(self, position: int) -> None:
        self.position = position
        state = {"items": position, "count": self.count, "lone": self.lone, "sums": self.sums.sums}
        self._writer.flush((PROGRESS, json.dumps(state).encode()))

    def seal(self) -> None:
        """Forget the progress: the file is finished."""
        self._writer.flush(drop=PROGRESS)

    def close(self) -> None:
        self._writer.close()


class Parts:
    """All files under `folder`. Images fill one shard after the other; pairs go to the shard of their image.

    On opening, what an interrupted build left is taken over. Every call names its item, the position in the source:
    items that a file holds already are not written again.
    """

    def __init__(self, folder: Path, layout: Layout, shard_size: int | None) -> None:
        self.folder, self.layout, self.shard_size = folder, layout, shard_size
        found = sorted(folder.glob("shard-*"))
        self._images: list[Part] = []
        self._pairs: dict[int, Part] = {}
        for number in range(max(len(found), 1)):
            self._open_images(number)
            if (self._shard(number) / "pairs").exists():
                self._pairs[number] = Part(self._shard(number) / "pairs")

    def _shard(self, number: int) -> Path:
        return self.folder if self.shard_size is None else self.folder / SHARD.format(number)

    def _open_images(self, number: int) -> None:
        if self._images:
            self._images[-1].close()
        if number >= MOST_SHARDS:
            raise RequestError(f"more than {MOST_SHARDS} shards; choose a --shard-size above {self.shard_size:,}")
        self._images.append(Part(self._shard(number) / "imgs"))

    @property
    def images(self) -> int:
        return sum(part.count for part in self._images)

    @property
    def pairs(self) -> int:
        return sum(part.count for part in self._pairs.values())

    @property
    def lone(self) -> int:
        return sum(part.lone for part in self._pairs.values())

    @property
    def large(self) -> bool:
        return self._images[-1].large or any(part.large for part in self._pairs.values())

    def has_image(self, item: int) -> bool:
        """Whether the image that item `item` brings was written before the interruption."""
        return item < max(part.position for part in self._images)

    def next_shard(self, item: int) -> int:
        """The shard for the next image; a full one is written out and a new one begun."""
        current = self._images[-1]
        if self.shard_size is not None and current.count >= self.shard_size:
            current.flush(item)
            self._open_images(len(self._images))
        return len(self._images) - 1

    def add_image(self, image_id: Id, data: bytes) -> bytes:
        """Write an image under `image_id` into the current shard; returns its 32-byte digest."""
        part = self._images[-1]
        part.put(self.layout.image_key(image_id), self.layout.write_image(data))
        part.count += 1
        return part.sums.image(image_id, data)

    def _pairs_of(self, shard: int) -> Part:
        if shard not in self._pairs:
            self._pairs[shard] = Part(self._shard(shard) / "pairs")
        return self._pairs[shard]

    def add_pair(self, item: int, shard: int, image_id: Id, text_id: Id, text: str, language: str | None) -> None:
        part = self._pairs_of(shard)
        if item >= part.position:
            part.put(self.layout.pair_key(part.count), self.layout.write_pair(image_id, text_id, text, language))
            part.count += 1
            part.sums.pair(image_id, text_id, text)

    def add_lone(self, item: int, text_id: Id, text: str, language: str | None) -> None:
        part = self._pairs_of(0)
        if item >= part.position:
            value = json.dumps([text_id, text, language], ensure_ascii=False, separators=(",", ":"))
            part.put(LONE + PLAIN.pair_key(part.lone), value.encode("utf-8"))
            part.lone += 1
            part.sums.pair(None, text_id, text)

    def flush(self, position: int) -> None:
        """Write what waits; every item before `position` is complete."""
        self._images[-1].flush(position)
        for part in self._pairs.values():
            if part.waiting:
                part.flush(position)

    def finish(self, position: int) -> None:
        """What waits, counts, format and checksums into every shard; all of it is on the disk then. May be repeated."""
        for number, images in enumerate(self._images):
            if number < len(self._images) - 1:
                images = self._images[number] = Part(self._shard(number) / "imgs")
            pairs, sums = self._pairs_of(number), Checksum(images.sums.sums)
            sums.add(pairs.sums.sums)
            meta = {
                "format": FORMAT, "version": VERSION, "layout": self.layout.name, "pairs": pairs.count, "images": images.count,
                "lone_texts": pairs.lone, "sums": sums.sums, "shard": number, "shards": len(self._images),
            }  # fmt: skip
            pairs.put(META, json.dumps(meta).encode())
            if self.layout.pair_count_key and self.layout.image_count_key:
                pairs.put(self.layout.pair_count_key, b"%d" % pairs.count)
                images.put(self.layout.image_count_key, b"%d" % images.count)
            pairs.flush(position)
            images.flush(position)

    def seal(self) -> None:
        """Remove the records of progress and close. May be repeated."""
        for part in (*self._images, *self._pairs.values()):
            part.seal()
            part.close()

    def close(self) -> None:
        """Close without finishing."""
        self._images[-1].close()
        for part in self._pairs.values():
            part.close()
