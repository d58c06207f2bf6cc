"""A store as a source: what is in it, as it is, all of it or a part; and a store with another source behind it."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.errors import DataFault, RequestError
from data_tools.items import ImageItem, Item, Source, Stream, TextItem, content_origin, located
from data_tools.sources.joined import Joined
from data_tools.store import Id, Pair, PairSource, PairStore, open_store
from data_tools.store.beside import MOST, beside_problem, checked_beside
from data_tools.store.layouts import Value
from data_tools.store.seen import other_image_id
from data_tools.words import many

_NUMBERS = "image_ids.tsv"


class StoreSource:
    """Pictures in stored order, then pairs, then texts without picture. Pictures go in as they are.

    Args:
        keep: whether a picture (by its id here) is taken; pairs follow their pictures.
        keep_pair: whether a pair is. lone: whether texts without picture are taken.
        columns: the kept columns that are taken; None: all.
        add_negatives: more negatives of a pair, behind those that stand beside it.
        open_place: opens what is at `path`: a store, or what else keeps pairs as one does.
        part: what `keep` and `keep_pair` choose, for whoever asks whether a build is still the same.
    """

    kind = "store"

    def __init__(
        self,
        path: Path,
        *,
        keep: Callable[[Id], bool] | None = None,
        keep_pair: Callable[[Pair], bool] | None = None,
        lone: bool = True,
        columns: tuple[str, ...] | None = None,
        add_negatives: Callable[[Pair], Sequence[str]] | None = None,
        part: Any = None,
        open_place: Callable[[Path], PairSource] = open_store,
    ) -> None:
        self.open_place = open_place
        self.path, self.keep, self.keep_pair, self.lone, self.part = path, keep, keep_pair, lone, part
        self.columns, self.add_negatives = columns, add_negatives
        self._words = _words(path)

    def name(self, image_id: Id) -> Id:
        """Its id in the source the store was built from: the official layout numbers images that have words for ids."""
        return self._words.get(image_id, image_id)

    def open(self) -> Stream:
        store = self.open_place(self.path)
        done = [0]
        total = store.image_count + len(store) + len(store.lone_texts)
        return Stream(self._items(store, done), total, "item", lambda: done[0])

    def _items(self, store: PairSource, done: list[int]) -> Iterator[Item]:
        keep = self.keep
        try:
            for image_id in store.image_ids:
                done[0] += 1
                if keep is None or keep(image_id):
                    data, columns = store.image(image_id), store.columns_of(image_id)
                    if self.columns is not None:
                        columns = {name: columns[name] for name in self.columns if name in columns}
                    yield ImageItem(self.name(image_id), data, self.path, columns=columns or None, ready=True)
            for pair, found in store.pairs_and_beside():
                done[0] += 1
                if (keep is None or keep(pair.image_id)) and (self.keep_pair is None or self.keep_pair(pair)):
                    more = () if self.add_negatives is None else self.add_negatives(pair)
                    if more:
                        found = {**found, "negatives": list(dict.fromkeys([*found.get("negatives", ()), *more]))[:MOST]}
                    image_ids = (self.name(pair.image_id),)
                    yield TextItem(pair.text_id, pair.text, image_ids, pair.language, self.path, beside=found or None)
            for text_id, text, language in store.lone_texts if self.lone else ():
                done[0] += 1
                yield TextItem(text_id, text, (), language, self.path)
        finally:
            store.close()  # it may be replaced by what is made of it

    def fingerprint(self) -> dict[str, Any]:
        return {"store": [str(self.path.resolve()), self.open_place(self.path).generation], "part": self.part}

    def expected(self) -> dict[str, int]:
        return {}


def _words(path: Path) -> dict[Id, str]:
    file = path / _NUMBERS
    if not file.is_file():
        return {}
    rows = (line.rstrip("\n").split("\t", 1) for line in file.open(encoding="utf-8", newline="\n"))
    return {int(number): word for number, word in rows}


class Appended:
    """`old`, and behind it what `new` has beyond it.

    A picture of a known name is the same one where its bytes are, once prepared as `prepare` does it; else it is another
    of that name. What stands there already (the same text on the same picture) is counted and passed over. So is what a column says
    otherwise of a picture that is there; with `update_columns` the new values take the place of the old ones.
    """

    kind = "append"

    def __init__(
        self,
        old: StoreSource,
        new: Source,
        prepare: Callable[[ImageItem], bytes | DataFault],
        *,
        update_columns: bool = False,
    ) -> None:
        self.old, self.new, self.prepare, self.update_columns = old, new, prepare, update_columns

    def open(self) -> Stream:
        self._generation = open_store(self.old.path).generation
        before, after = self.old.open(), self.new.open()
        done, notes = [0], list(after.notes)
        known_total = after.total if after.unit == "item" else None
        total = None if known_total is None else (before.total or 0) + known_total
        return Stream(self._items(before, done, notes), total, "item", lambda: done[0], notes)

    def _items(self, before: Stream, done: list[int], notes: list[str]) -> Iterator[Item]:
        # Looked at again where nobody else may write the store any more: another may have added to it in between.
        if open_store(self.old.path).generation != self._generation:
            raise RequestError(f"{self.old.path} was replaced by another process just now: give the command again")
        seen, most = array("Q"), 0
        changed, renewed = self._changed() if self.update_columns else ({}, {})
        for item in before.items:
            done[0] += 1
            if isinstance(item, TextItem):
                seen.extend(_key(image_id, item.text) for image_id in item.image_ids or (None,))
                most = max(most, item.text_id) if isinstance(item.text_id, int) else most
                if renewed and len(item.image_ids) == 1:
                    newer = renewed.get(_key(item.image_ids[0], item.text))
                    item = item if newer is None else replace(item, beside=newer)
            elif isinstance(item, ImageItem) and item.image_id in changed:
                item = replace(item, columns={**(item.columns or {}), **changed[item.image_id]})
            yield item
        store, again = open_store(self.old.path), 0
        try:
            known = _Known(store, self.old, self.prepare, np.unique(np.frombuffer(seen, np.uint64)))
            stream = Joined([self.new], most).open()
            for item in stream.items:
                done[0] += 1
                if isinstance(item, ImageItem):
                    item = known.image(item)
                elif isinstance(item, TextItem):
                    item, there = known.text(item)
                    if there:
                        again += 1
                        if item.beside:
                            try:
                                checked_beside(item.beside, item.text, item.text_id)
                            except DataFault as fault:
                                yield located(fault, item.file, item.line)
                        continue
                yield item
        finally:
            store.close()
        notes[:] = stream.notes
        if again:
            notes.append(
                f"{many(again, 'text')} {'stands' if again == 1 else 'stand'} there already on the same picture"
            )
        kept = "the old ones were kept; --update-columns takes the new ones"
        if known.renewed:
            count = len(known.renewed)
            one = f"{many(count, 'text')} that {'is there has' if count == 1 else 'are there have'}"
            taken = "they took the place of the old ones" if renewed else kept
            notes.append(f"{one} other negatives or weights or boxes: {taken}")
        if known.changed:
            columns = Counter(name for values in known.changed.values() for name in values)
            told = ", ".join(f"{name} {count:,}" for name, count in columns.most_common())
            notes.append(
                f"{len(known.changed):,} pictures that are there have new values of columns ({told}): "
                + ("they took the place of the old ones" if changed else kept)
            )

    def _changed(self) -> tuple[dict[Id, dict[str, Value]], dict[int, dict[str, Any]]]:
        """What the new source says otherwise of what is there: name of a picture → columns; key of a pair → beside its text."""
        store = open_store(self.old.path)
        try:
            own = (_key(self.old.name(pair.image_id), pair.text) for pair in store.pairs())
            known = _Known(store, self.old, self.prepare, np.unique(np.fromiter(own, np.uint64)))
            for item in self.new.open().items:
                if isinstance(item, ImageItem):
                    known.image(item)
                elif isinstance(item, TextItem) and item.beside:
                    known.text(item)
            return known.changed, known.renewed
        finally:
            store.close()

    def fingerprint(self) -> dict[str, Any]:
        said = {"old": self.old.fingerprint(), "parts": [{"source": self.new.kind, **self.new.fingerprint()}]}
        return said | ({"update_columns": True} if self.update_columns else {})

    def expected(self) -> dict[str, int]:
        return {}


class _Known:
    """What of the new items is in the old store."""

    def __init__(
        self, store: PairStore, old: StoreSource, prepare: Callable[[ImageItem], bytes | DataFault], texts: np.ndarray
    ) -> None:
        self.store, self.prepare, self.texts = store, prepare, texts
        self.there = {old.name(image_id): image_id for image_id in store.image_ids}
        self.origins: dict[
            tuple[Id, str | None], tuple[str, bool]
        ] = {}  # → of its bytes, and whether they are the old ones
        self.changed: dict[
            Id, dict[str, Value]
        ] = {}  # name of a picture → columns that say something else of it than before
        self.beside = {
            _key(old.name(pair.image_id), pair.text): found for pair, found in store.pairs_and_beside() if found
        }
        self.renewed: dict[int, dict[str, Any]] = {}  # key of a pair → what stands beside it now
        self._told: set[Id] = set()  # names of pictures whose first row was looked at: the others' columns do not count

    def image(self, item: ImageItem) -> ImageItem:
        if item.image_id not in self.there:
            return item
        asked = item.image_id, item.origin
        if asked not in self.origins:
            data = self.prepare(item)
            if isinstance(data, DataFault):
                return item
            stored = self.store.image(self.there[item.image_id])
            # What the store has was prepared before: its own bytes are its origin.
            self.origins[asked] = content_origin(data), data == stored
        if self.origins[asked][1] and item.image_id not in self._told:
            self._told.add(item.image_id)
            before = self.store.columns_of(self.there[item.image_id])
            other = {name: value for name, value in (item.columns or {}).items() if before.get(name) != value}
            if other:
                self.changed[item.image_id] = other
        return replace(item, origin=self.origins[asked][0])

    def text(self, item: TextItem) -> tuple[TextItem, bool]:
        """The item as it refers to its image now, and whether it stands there already."""
        if not item.image_ids:
            return item, self._there(None, item)
        if item.origin is None:
            known = [image_id in self.there and self._there(image_id, item) for image_id in item.image_ids]
            return item, all(known)
        image_id = item.image_ids[0]
        if (image_id, item.origin) not in self.origins:
            return item, False
        origin, same = self.origins[image_id, item.origin]
        return replace(item, origin=origin), self._there(image_id if same else other_image_id(image_id, origin), item)

    def _there(self, image_id: Id | None, item: TextItem) -> bool:
        """Whether the text stands there on this picture; what the new source says otherwise beside it is noted."""
        key = _key(image_id, item.text)
        there = self._has(key)
        if there and item.beside and beside_problem(item.beside, item.text) is None:
            before = self.beside.get(key, {})
            if any(before.get(name) != value for name, value in item.beside.items()):
                self.renewed[key] = {**before, **item.beside}
        return there

    def _has(self, key: int) -> bool:
        at = int(np.searchsorted(self.texts, np.uint64(key)))
        return at < len(self.texts) and int(self.texts[at]) == key


def _key(image_id: Id | None, text: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{image_id!r}\0{text}".encode(), digest_size=8).digest(), "little")
