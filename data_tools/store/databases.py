"""The LMDB files of a store being written: one pair of them, or a pair per shard."""

from __future__ import annotations

import json
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from data_tools.errors import RequestError
from data_tools.store import environments
from data_tools.store.beside import KINDS, Beside, beside_json
from data_tools.store.checksum import Checksum
from data_tools.store.environments import GrowingWriter
from data_tools.store.layouts import (
    BESIDE,
    COLUMNS,
    FORMAT,
    LONE,
    META,
    PLAIN,
    PROGRESS,
    VERSION,
    WITH_BESIDE,
    Id,
    Layout,
    Value,
)
from data_tools.store.shard import SHARD

_MOST_SAMPLED = 256  # images a file that are read back at the end
MOST_SHARDS = 400  # every shard's pairs stay open while texts come in: files a process may hold


class Database:
    """One LMDB file being written, and how far it goes: items of the source, entries, sum of hashes."""

    def __init__(self, folder: Path, layout: Layout) -> None:
        self._writer, self._layout = GrowingWriter(folder), layout
        state = json.loads(self._writer.get(PROGRESS) or b"{}")
        self.position, self.count, self.lone = state.get("items", 0), state.get("count", 0), state.get("lone", 0)
        self.sums = Checksum(state.get("sums", ("0", "0")))
        self.sample: dict[str, str] = state.get("sample", {})  # some of the images: key → hash, for reading back
        self.names: dict[str, None] = dict.fromkeys(state.get("names", ()))  # of kept columns, in order
        self.beside = Counter[str](state.get("beside", {}))  # pairs that have something beside their text, by kind
        self._every = 1
        self._images: list[tuple[Id, bytes]] = []
        self._entries: list[tuple[bytes, bytes]] = []

    def put_image(self, image_id: Id, data: bytes) -> None:
        self._images.append((image_id, data))
        self.count += 1

    def put(self, key: bytes, value: bytes) -> None:
        self._entries.append((key, value))

    @property
    def waiting(self) -> bool:
        return bool(self._images or self._entries)

    def take(self, position: int) -> Callable[[], None]:
        """The work of writing what waits, to be done elsewhere; every item before `position` is in it or before it."""
        images, entries = self._images, self._entries
        state = {"items": position, "count": self.count, "lone": self.lone, "names": list(self.names)}
        state |= {"beside": dict(self.beside)} if self.beside else {}
        pair_sum = self.sums.sums[1]  # that of images is counted below, this one goes on meanwhile
        self._images, self._entries, self.position = [], [], position

        def write() -> None:
            for image_id, data in images:
                key = self._layout.image_key(image_id)
                self._remember(key, self.sums.image(image_id, data))
                entries.append((key, self._layout.write_image(data)))
            sums = (self.sums.sums[0], pair_sum)
            entries.append((PROGRESS, json.dumps(state | {"sums": sums, "sample": self.sample}).encode()))
            self._writer.write(entries)

        return write

    def _remember(self, key: bytes, digest: bytes) -> None:
        """Keep some images for reading back: every one at first, then every second, fourth, … of their keys."""
        if zlib.crc32(key) % self._every == 0:
            self.sample[key.hex()] = digest.hex()
            if len(self.sample) > _MOST_SAMPLED:
                self._every *= 2
                self.sample = {
                    name: kept
                    for name, kept in self.sample.items()
                    if zlib.crc32(bytes.fromhex(name)) % self._every == 0
                }

    def seal(self) -> None:
        """Forget the progress: the file is finished."""
        self._writer.write([], drop=PROGRESS)

    def close(self) -> None:
        self._writer.close()


class Databases:
    """All files under `folder`. Images fill one shard after the other; pairs go to the shard of their image.

    On opening, what an interrupted build left is taken over. Every call names its item, the position in the source:
    items that a file holds already are not written again.
    """

    def __init__(self, folder: Path, layout: Layout, shard_size: int | None) -> None:
        self.folder, self.layout, self.shard_size = folder, layout, shard_size
        found = sorted(folder.glob("shard-*"))
        self._images: list[Database] = []
        self._pairs: dict[int, Database] = {}
        self._columns: dict[int, Database] = {}  # of the shards that have any
        # Hashing, copying and waiting for the disk need no interpreter: they go on while the next items are read.
        self._background = ThreadPoolExecutor(1, thread_name_prefix="store")
        self._under_way: Future[None] | None = None
        self._bytes = self._items = 0  # waiting
        for number in range(max(len(found), 1)):
            self._open_images(number)
            if (self._shard(number) / "pairs").exists():
                self._pairs[number] = Database(self._shard(number) / "pairs", self.layout)
            if (self._shard(number) / COLUMNS).exists():
                self._columns[number] = Database(self._shard(number) / COLUMNS, self.layout)
                if number < len(found) - 1:  # complete: what comes again of it is known by its position
                    self._columns[number].close()

    def _shard(self, number: int) -> Path:
        return self.folder if self.shard_size is None else self.folder / SHARD.format(number)

    def _open_images(self, number: int) -> None:
        if self._images:
            self._images[-1].close()
        if number >= MOST_SHARDS:
            raise RequestError(f"more than {MOST_SHARDS} shards; choose a --shard-size above {self.shard_size:,}")
        self._images.append(Database(self._shard(number) / "imgs", self.layout))

    @property
    def images(self) -> int:
        return sum(database.count for database in self._images)

    @property
    def pairs(self) -> int:
        return sum(database.count for database in self._pairs.values())

    @property
    def lone(self) -> int:
        return sum(database.lone for database in self._pairs.values())

    @property
    def large(self) -> bool:
        """Enough is waiting to be worth a transaction."""
        return self._bytes > environments.BATCH_BYTES or self._items >= environments.BATCH_ITEMS

    def has_image(self, item: int) -> bool:
        """Whether the image that item `item` brings was written before the interruption."""
        return item < max(database.position for database in self._images)

    @property
    def full(self) -> bool:
        """The next image begins a new shard: flush what waits, then `begin_shard`."""
        return self.shard_size is not None and self._images[-1].count >= self.shard_size

    def begin_shard(self) -> None:
        """Close the full shard and begin the next; everything before is written then."""
        self.wait()
        if self.shard in self._columns:
            self._columns[self.shard].close()
        self._open_images(len(self._images))

    @property
    def shard(self) -> int:
        """The shard that images go to."""
        return len(self._images) - 1

    def add_image(self, image_id: Id, data: bytes) -> None:
        """Put an image under `image_id` into the current shard."""
        self._images[-1].put_image(image_id, data)
        self._bytes += len(data)
        self._items += 1

    def add_columns(self, item: int, shard: int, image_id: Id, columns: Mapping[str, Value]) -> None:
        """Keep what the source says of an image beside its texts."""
        if shard not in self._columns:
            self._columns[shard] = Database(self._shard(shard) / COLUMNS, self.layout)
        database = self._columns[shard]
        if item >= database.position:
            value = json.dumps(columns, ensure_ascii=False).encode()
            database.put(self.layout.image_key(image_id), value)
            database.names.update(dict.fromkeys(columns))
            database.count += 1
            self._items += 1
            self._bytes += len(value)

    def _pairs_of(self, shard: int) -> Database:
        if shard not in self._pairs:
            self._pairs[shard] = Database(self._shard(shard) / "pairs", self.layout)
        return self._pairs[shard]

    def add_pair(
        self,
        item: int,
        shard: int,
        image_id: Id,
        text_id: Id,
        text: str,
        language: str | None,
        beside: Beside | None = None,
    ) -> None:
        database = self._pairs_of(shard)
        if item >= database.position:
            database.put(
                self.layout.pair_key(database.count), self.layout.write_pair(image_id, text_id, text, language)
            )
            if beside:
                value = beside_json(beside).encode()
                database.put(BESIDE + PLAIN.pair_key(database.count), value)
                database.beside.update(("pairs", *beside))
                self._bytes += len(value)
            database.count += 1
            self._items += 1
            database.sums.pair(image_id, text_id, text, beside)

    def add_lone(self, item: int, text_id: Id, text: str, language: str | None) -> None:
        database = self._pairs_of(0)
        if item >= database.position:
            database.put(
                LONE + PLAIN.pair_key(database.lone), json.dumps([text_id, text, language], ensure_ascii=False).encode()
            )
            database.lone += 1
            self._items += 1
            database.sums.pair(None, text_id, text)

    def wait(self) -> None:
        """Until everything flushed is on the disk.

        Raises:
            UserError: it could not be written.
        """
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            under_way.result()

    def flush(self, position: int) -> None:
        """Begin to write what waits; every item before `position` is complete. One flush at a time."""
        self.wait()
        written = (self._images[-1], *self._columns.values(), *self._pairs.values())
        work = [each.take(position) for each in written if each.waiting]
        self._bytes = self._items = 0
        self._under_way = self._background.submit(_do_all, work)

    def finish(self, position: int, about: dict[str, Any]) -> None:
        """What waits, counts, what the store says `about` its build, format and checksums into every shard; all of it is on the disk then. May be repeated."""
        self.wait()
        for number in range(len(self._images)):
            images, pairs = self._opened(number), self._pairs_of(number)
            if self.layout.pair_count_key and self.layout.image_count_key:
                pairs.put(self.layout.pair_count_key, b"%d" % pairs.count)
                images.put(self.layout.image_count_key, b"%d" % images.count)
            images.take(position)()
            sums = Checksum(images.sums.sums)
            sums.add(pairs.sums.sums)
            meta = {
                "format": FORMAT, "version": VERSION, "layout": self.layout.name, "pairs": pairs.count, "images": images.count,
                "lone_texts": pairs.lone, "sums": sums.sums, "shard": number, "shards": len(self._images), **about,
            }  # fmt: skip
            if number in self._columns:
                columns = self._opened(number, self._columns)
                columns.take(position)()
                meta |= {"columns": list(columns.names), "described": columns.count}
            if pairs.beside:
                meta |= {"version": WITH_BESIDE, "beside": {name: pairs.beside[name] for name in ("pairs", *KINDS)}}
            pairs.put(META, json.dumps(meta, ensure_ascii=False).encode())
            pairs.take(position)()
            self._leave(number)

    def _opened(self, number: int, others: dict[int, Database] | None = None) -> Database:
        """The images (or columns) of a shard; all but the last one are closed while nothing is written to them."""
        opened: Any = self._images if others is None else others
        if number < len(self._images) - 1:
            opened[number] = Database(self._shard(number) / ("imgs" if others is None else COLUMNS), self.layout)
        return opened[number]

    def _leave(self, number: int) -> None:
        if number < len(self._images) - 1:
            self._images[number].close()
            if number in self._columns:
                self._columns[number].close()

    def seal(self) -> None:
        """Remove the records of progress and close. May be repeated."""
        self._background.shutdown()
        for number in range(len(self._images)):
            columns = [self._opened(number, self._columns)] if number in self._columns else []
            for database in (self._opened(number), self._pairs_of(number), *columns):
                database.seal()
                database.close()

    def samples(self) -> dict[int, dict[str, str]]:
        """Shard → key → hash of some of its images."""
        return {number: database.sample for number, database in enumerate(self._images)}

    def close(self) -> None:
        """Close without finishing; what is being written is written."""
        self._background.shutdown()
        last = [self._columns[self.shard]] if self.shard in self._columns else []
        for database in (self._images[-1], *last, *self._pairs.values()):
            database.close()


def _do_all(work: list[Callable[[], None]]) -> None:
    for write in work:
        write()
