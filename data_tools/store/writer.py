"""Writing a store: built beside its place (`place`), verified by reading back, and put there in one step.

Every batch is one synchronous transaction that also says how far it goes, so a killed build loses a batch at most.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_tools.atomic import sync_file
from data_tools.errors import DataFault, RequestError
from data_tools.language import LANGUAGES, read_language
from data_tools.store.beside import checked_beside
from data_tools.store.databases import Databases
from data_tools.store.environments import write_error
from data_tools.store.layouts import LAYOUTS, OFFICIAL, Id, Value, is_id, is_text
from data_tools.store.opening import open_store
from data_tools.store.place import NUMBERS_FILE, Workplace
from data_tools.store.reader import PairStore
from data_tools.store.seen import REFUSED, Seen, SeenImage, check_id, origin_hash, text_hash
from data_tools.store.verify import verify


class StoreWriter:
    """Builds a store at `target`. Use as a context manager and call `finish`; else nothing is left behind.

    Args:
        layout: ``plain`` (ours) or ``official`` (cn_clip's, where images with string ids are numbered from 1).
        shard_size: images a shard; None keeps everything in one piece.
        request: what is built from what, as JSON. Given, an interrupted build is kept and can be continued.
        resume: go on with an interrupted build of the same request; its first `done` items need not come again.
        overwrite: replace the store that is there; the commands ask for it (`--overwrite`). Anything but a store is
            never replaced.
        part: which part of what it is, for its `meta` record (docs/store-format.md).

    Raises:
        RequestError: the place is taken, another process builds here, or the interrupted build was of something else.
        UserError: the disk is full or not writable. What was at `target` before is untouched.
    """

    def __init__(
        self,
        target: str | Path,
        *,
        layout: str = "plain",
        shard_size: int | None = None,
        request: dict[str, Any] | None = None,
        resume: bool = False,
        overwrite: bool = True,
        part: Mapping[str, Any] | None = None,
    ) -> None:
        if shard_size is not None and shard_size < 1:
            raise RequestError(f"shard size {shard_size}: a shard holds at least one image")
        self.target, self._part = Path(target), part
        self._layout, self._shard_size = LAYOUTS[layout], shard_size
        self._numbering: bool | None = None  # official layout: whether images have words for ids, and are numbered
        request = json.loads(json.dumps(request))  # as it will be read back
        self._keep = request is not None
        self._work = Workplace(self.target, request, resume=resume, overwrite=overwrite)
        self.building, self._folder = self._work.folder, self._work.store
        self.in_place, self._closed = self._work.in_place, False
        try:
            if not self.in_place:
                self._seen, self._databases = (
                    Seen(self.building / "seen"),
                    Databases(self._folder, self._layout, shard_size),
                )
                if self._work.finished:
                    self._take_place()
                    self.in_place = True
        except BaseException as error:
            self._closed = True
            self._work.leave()
            if isinstance(error, OSError):
                raise write_error(self.building, error) from None
            raise
        if self.in_place:
            self._closed = True
            self._work.remove()
            return
        self.done = self._seen.safe["items"]  # items that are written and need not come again
        self.faults_bytes = self._seen.safe["faults"]  # length of the list of faults at that point; kept by its owner
        # Of the items so far: named again (not stored a second time), and left out.
        self.again, self.left_out = self._seen.safe.get("again", 0), self._seen.safe.get("left", 0)
        self._item = self.done

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if self._closed:
            return
        keep = self._keep and kind is not None and not issubclass(kind, DataFault)
        # What waits is not written: the item at hand may be half done. It comes again.
        self._closed = True
        try:
            self._databases.close()
            self._seen.close()
        finally:
            self._work.leave() if keep else self._work.remove()

    @property
    def images(self) -> int:
        return self._databases.images

    @property
    def pairs(self) -> int:
        return self._databases.pairs

    @property
    def lone(self) -> int:
        return self._databases.lone

    def _begin(self, item: int | None) -> int:
        """The position of the item at hand. Every item before it is complete, its faults listed: time to write what waits."""
        self._item = self._item if item is None else item
        if self._databases.large or self._seen.large:
            self._flush()
        return self._item

    def remember_fault(self, place: int, line: bytes) -> None:
        """Keep a line of the list of faults with the build: going on does not need the file."""
        self._seen.add_fault(place, line)

    def faults(self) -> Iterator[bytes]:
        """The lines of the list of faults that stand where an interrupted build goes on."""
        return self._seen.faults(self.faults_bytes)

    def own_id(self, image_id: Id, item: int, origin: str | None) -> Id:
        """As `Seen.own_id`."""
        return self._seen.own_id(image_id, item, origin)

    def wrote_image(self, image_id: Id, item: int) -> bool:
        """Whether this very item was written, by the interrupted build, as `image_id`."""
        known = self._seen.image(image_id)
        return known is not None and known.item == item

    def refused_image(self, image_id: Id) -> bool:
        known = self._seen.image(image_id)
        return known is not None and known.refused

    def wants_image(self, image_id: Id, item: int, origin: str | None = None) -> bool:
        """Whether the image of this item is still to be looked at: not if an interrupted build wrote it, or for a repetition.

        Raises:
            DataFault: another image has this id. Images of equal `origin` (their file) are the same image.
        """
        known = self._seen.image(image_id)
        if known is None:
            return True
        if known.item == item:
            return known.refused or not self._databases.has_image(item)
        if origin is not None and known.origin == origin_hash(origin):
            return False
        raise DataFault(
            f"image id {image_id!r} stands for two images",
            mend="Give every image an id of its own.",
            kind="duplicate-image-id",
            item_id=image_id,
        )

    def refuse_image(self, image_id: Id, item: int, origin: str | None = None) -> None:
        """Remember a faulty image, so that the texts on it are not reported as lacking one.

        Where another image had this id before, texts that name no more than the id are refused: they may mean either.
        """
        if not is_id(image_id):
            return
        known = self._seen.image(image_id)
        if known is None:
            self._seen.add_image(image_id, SeenImage(item, REFUSED, 0, origin_hash(origin)))
        elif known.item != item:
            self._seen.add_clash(image_id)

    def add_image(
        self,
        image_id: Id,
        data: bytes,
        *,
        item: int | None = None,
        origin: str | None = None,
        columns: Mapping[str, Value] | None = None,
    ) -> None:
        """Add an encoded image file. `item` is its position in the source, ascending over all calls.

        Args:
            columns: what else is known of it, kept with it (a price, a category).

        Raises:
            DataFault: an id that is none, or that another image has.
        """
        item = self._begin(item)
        check_id(image_id, "image")
        if self.wants_image(image_id, item, origin):
            number = self._number_for(image_id)
            if self._databases.full:
                self._flush()
                self._databases.begin_shard()
            self._databases.add_image(number or image_id, data)
            self._seen.add_image(image_id, SeenImage(item, self._databases.shard, number, origin_hash(origin)))
            self.add_columns(image_id, columns, item)
        elif not self.wrote_image(image_id, item):
            self.again += 1
        self._item = item + 1

    def add_columns(self, image_id: Id, columns: Mapping[str, Value] | None, item: int) -> None:
        """Keep columns with the image that item `item` brought."""
        known = self._seen.image(image_id)
        if columns and known is not None:
            self._databases.add_columns(item, known.shard, known.number or image_id, columns)

    def _number_for(self, image_id: Id) -> int:
        """The official readers take whole numbers only: words are numbered, and the list laid beside the store."""
        if self._layout is not OFFICIAL:
            return 0
        words = isinstance(image_id, str)
        if self._numbering is None:
            first = next(self._seen.images(), None)
            self._numbering = words if first is None else isinstance(first[0], str)
        if words != self._numbering:
            raise DataFault(
                f"image id {image_id!r} is a {'word' if words else 'number'}, others are not; the official layout needs numbers",
                mend="Give all images whole numbers, or all of them words (they are then numbered).",
                kind="mixed-ids",
                item_id=image_id,
            )
        return self._databases.images + 1 if words else 0

    def add_text(
        self,
        text_id: Id,
        text: str,
        image_ids: Sequence[Id],
        language: str | None = None,
        *,
        item: int | None = None,
        origin: str | None = None,
        beside: Mapping[str, Any] | None = None,
    ) -> list[DataFault]:
        """Add a text on several images (one pair each) or on none (searched with, never trained on).

        With `origin` it stands on the image of that origin only, not on another that has its id.

        Args:
            beside: what each of its pairs has beside the text: ``negatives``, ``weight``, ``boxes`` (`PairStore.beside`).

        Returns:
            One fault for each image that is not there; the pairs with the others are written.

        Raises:
            DataFault: not a text, not an id, an id that another text has, a language that is none of ours, or a `beside`
                that is none.
        """
        item = self._begin(item)
        check_id(text_id, "text")
        if not text.strip() or not is_text(text):
            raise DataFault(
                "the text is empty or no valid text",
                mend="Write a caption or drop it.",
                kind="bad-text",
                item_id=text_id,
            )
        if language is not None and language not in LANGUAGES:
            language = read_language(language)
        found = None if beside is None else checked_beside(beside, text, text_id)
        if found is not None and len(image_ids) != 1 and (not image_ids or "boxes" in found):
            raise DataFault(
                f"the text stands on {len(image_ids)} pictures, and has {', '.join(found)} beside it",
                mend="Boxes belong to a text on one picture, negatives and a weight to one on a picture.",
                kind="bad-beside",
                item_id=text_id,
            )
        digest = text_hash(text)
        known = self._seen.text(text_id)
        if known is not None and known[0] > item:  # an interrupted build met it further on
            known = None
        if known is not None and known[1] != digest:
            raise DataFault(
                f"text id {text_id!r} stands for two different texts",
                mend="Give every text an id of its own.",
                kind="duplicate-text-id",
                item_id=text_id,
            )
        places, faults = [], []
        for image_id in image_ids:
            seen = self._seen.find_image(image_id, item, origin)
            if isinstance(seen, DataFault):
                seen.item_id = text_id
                faults.append(seen)
            else:
                places.append(seen)
        if places or not image_ids:
            if known is None:
                self._seen.add_text(text_id, item, digest)
            for image_id, image in places:
                self._databases.add_pair(item, image.shard, image.number or image_id, text_id, text, language, found)
            if not image_ids and (known is None or known[0] == item):
                self._databases.add_lone(item, text_id, text, language)
        else:
            self.left_out += 1
        self._item = item + 1
        return faults

    def add_pair(
        self,
        image_id: Id,
        text_id: Id,
        text: str,
        language: str | None = None,
        beside: Mapping[str, Any] | None = None,
    ) -> None:
        """Add one text on one image that was added before, with what the pair has beside it (as `add_text`).

        Raises:
            DataFault: as `add_text`, or the image is not there.
        """
        for fault in self.add_text(text_id, text, [image_id], language, beside=beside):
            raise fault

    def add_lone_text(self, text_id: Id, text: str, language: str | None = None) -> None:
        """A text no image is known for: searched with, never trained on."""
        self.add_text(text_id, text, [], language)

    def _flush(self) -> None:
        self._databases.wait()  # what `safe` speaks of is on the disk
        self._seen.flush()  # first: ids that are known too early are harmless, pictures that are not known would be lost
        self._databases.flush(self._item)
        self._seen.safe = {
            "items": self._item,
            "faults": self.faults_bytes,
            "again": self.again,
            "left": self.left_out,
        }

    def finish(self, extra: Sequence[Path] = ()) -> PairStore:
        """Write counts, verify by reading back, bring it to the disk, and put it in its place.

        Args:
            extra: files in the building folder that move into the store.

        Raises:
            UserError: it reads back differently, or cannot take its place (on Windows: a program has the old one open).
        """
        self._databases.wait()
        self._seen.flush()
        self._databases.finish(self._item, self._work.about | ({"part": dict(self._part)} if self._part else {}))
        done = False
        try:
            for file in extra:  # copied: should this be interrupted, it is needed again
                copy = shutil.copyfile(file, self.building / f"copy-of-{file.name}")
                sync_file(copy)
                os.replace(copy, self._folder / file.name)
            self._work.finish()
            self._take_place()
            done = True
        except OSError as error:
            raise write_error(self.building, error) from None
        finally:
            self._closed = True
            self._work.remove() if done or not self._keep else self._work.leave()
        place = self._work.place
        # `.` is still the folder that was replaced.
        there = self.target.exists() and os.path.samefile(self.target, place)
        return open_store(self.target if there else place)

    def _take_place(self) -> None:
        self._databases.seal()
        try:
            self._write_numbers()
            self.texts = self._seen.count_texts()
            verify(self._folder, self._seen, self._databases.samples())
        finally:
            self._seen.close()
        self._work.take_place()

    def _write_numbers(self) -> None:
        numbered = ((seen.number, image_id) for image_id, seen in self._seen.images() if seen.number)
        first = next(numbered, None)
        if first is not None:
            with (self._folder / NUMBERS_FILE).open("w", encoding="utf-8", newline="\n") as file:
                for number, image_id in (first, *numbered):
                    file.write(f"{number}\t{image_id}\n")
