"""A source → a store: every image looked at, every fault named, whole or not there, to be continued after any stop."""

from __future__ import annotations

import contextlib
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from data_tools.bars import Bar
from data_tools.errors import DataFault, printable
from data_tools.faults import FILE_NAME, FaultList, OnError, read_faults
from data_tools.items import ImageItem, Item, Source, Stream, located
from data_tools.language import detect_language
from data_tools.outputs import refuse_overlap
from data_tools.parallel import is_parallel, read_parallel
from data_tools.pictures import PIXEL_LIMIT, Reencoding
from data_tools.preparation import Preparation
from data_tools.sources.official import OfficialSource
from data_tools.sources.share import ShareOf
from data_tools.store import Id, PairStore, StoreWriter, open_store
from data_tools.store.layouts import VERSION
from data_tools.words import many

_PROGRESS_EVERY = 16  # items
_SKIP = " Or go on without what is faulty, and list it: --on-error skip."


@dataclass
class BuildReport:
    """What a build did."""

    store: PairStore
    images: int
    pairs: int
    texts: int
    lone_texts: int
    faults: dict[str, int] = field(default_factory=dict)
    differences: list[str] = field(default_factory=list)  # from the published counts
    continued: int = 0  # items an interrupted build had written
    notes: list[str] = field(default_factory=list)  # what the source passed over
    # Pictures, texts and faults that the source gave = stored + named again + left out; 0: built before it was continued.
    read: int = 0
    again: int = 0
    left_out: int = 0

    def lines(self) -> list[str]:
        """For people."""
        lone = f", {self.lone_texts:,} texts without a known image" if self.lone_texts else ""
        lines = [
            f"{self.store.path}: {many(self.images, 'image')}, {many(self.texts, 'text')}, {many(self.pairs, 'pair')}{lone}"
        ]
        if is_parallel(self.store):
            told = ", ".join(f"{language} {rows:,}" for language, rows in read_parallel(self.store).languages.items())
            lines = [f"{self.store.path}: parallel text, {self.texts:,} texts (rows by language: {told})"]
        if self.continued:
            lines.append(f"  went on behind {many(self.continued, 'item')} of the interrupted build")
        if self.faults:
            listed = ", ".join(f"{count:,} {kind}" for kind, count in self.faults.items())
            lines.append(f"  left out: {listed} (each in {self.store.path / FILE_NAME})")
        if self.read:
            again = f", {many(self.again, 'picture')} named again" if self.again else ""
            stored = self.read - self.again - self.left_out
            lines.insert(
                1, f"  read {self.read:,} pictures and texts: {stored:,} stored{again}, {self.left_out:,} left out"
            )
        return [printable(line) for line in lines + [f"  {said}" for said in (*self.differences, *self.notes)]]


def build_store(
    source: Source,
    target: str | Path,
    *,
    layout: str = "plain",
    shard_size: int | None = None,
    reencoding: Reencoding | None = None,
    pixel_limit: int = PIXEL_LIMIT,
    language: str = "detect",
    on_error: OnError = "fail",
    max_faults: int = 1000,
    resume: bool = False,
    overwrite: bool = False,
    workers: int = 0,
    progress: bool = True,
    faults_before: Sequence[Path] = (),
) -> BuildReport:
    """Build the store `target` from `source`.

    Args:
        layout: ``plain`` or ``official`` (what cn_clip reads).
        shard_size: images a shard; None: one piece.
        reencoding: None keeps the image bytes as they come.
        language: of texts that do not say: ``zh``, ``en``, ``mixed``, or ``detect``.
        on_error: ``fail`` stops at the first fault; ``skip`` lists it in the store's ``faults.jsonl``.
        resume: go on with an interrupted build of the same source and settings.
        overwrite: replace the store that is there; anything but a store is never replaced.
        workers: threads that read, check and re-encode images; 0 does it in the main one.
        faults_before: lists of faults of what `source` was made of; they go into the store, before those that are found.

    Raises:
        RequestError: a file of the source is missing, the interrupted build was of something else, or the place is taken.
        DataFault: a fault, with ``fail``.
        UserError: too many faults, nothing to store, or the disk is full. The old store is untouched.
    """
    settings = {
        "version": VERSION, "layout": layout, "shard_size": shard_size, "pixel_limit": pixel_limit, "language": language, "on_error": on_error,
        "reencoding": reencoding.as_dict() if reencoding else None,
    }  # fmt: skip
    stream = source.open()
    request: dict[str, Any] = {"source": source.kind, **source.fingerprint(), **settings}
    target = Path(target)
    refuse_overlap(target, _read_places(request))
    with StoreWriter(
        target,
        layout=layout,
        shard_size=shard_size,
        request=request,
        resume=resume,
        overwrite=overwrite,
        part=source.part if isinstance(source, ShareOf) else None,
    ) as writer:
        if writer.in_place:
            return _report(source, stream, open_store(target), _listed_faults(target), 0, None)
        continued = writer.done
        with contextlib.closing(
            FaultList(
                writer.building / FILE_NAME,
                on_error,
                max_faults,
                writer.faults(),
                writer.remember_fault,
                "" if source.kind == "store" else _SKIP,  # what is made of a store has no such flag
            )
        ) as faults:
            build = _Build(writer, faults, language, Preparation(reencoding, pixel_limit))
            build.run(stream, workers, progress=progress, name=target.name)
            if not writer.pairs and not writer.lone:
                problem = faults.summary() or "the source is empty"
                raise DataFault(
                    f"nothing to store: no usable text ({problem})",
                    mend="Look at the source files.",
                    kind="empty-split",
                    file=target,
                )
        store = writer.finish([faults.file] if faults.join(faults_before) else [])
        report = _report(source, stream, store, dict(faults.kinds.most_common()), continued, writer.texts)
        report.read, report.again, report.left_out = build.read, writer.again, writer.left_out
        return report


def _read_places(request: dict[str, Any]) -> list[str]:
    """Files and folders that a source's fingerprint names."""
    files = [entry[0] for entry in request.get("files") or () if isinstance(entry, list)]
    files += [place for part in request.get("parts") or () for place in _read_places(part)]
    return files + ([request["folder"]] if "folder" in request else [])


def _listed_faults(store: Path) -> dict[str, int]:
    """Kind → number of what a finished store's build left out."""
    return dict(Counter(str(fault["kind"]) for fault in read_faults(store)).most_common())


def _report(
    source: Source, stream: Stream, store: PairStore, faults: dict[str, int], continued: int, texts: int | None
) -> BuildReport:
    if texts is None:
        texts = len({text_id for _, text_id, _ in store.texts()})  # one may stand on an image and on none
    report = BuildReport(
        store,
        store.image_count,
        len(store),
        texts,
        len(store.lone_texts),
        faults,
        continued=continued,
        notes=stream.notes,
    )
    if store.path.is_symlink():
        report.notes.append(f"{store.path} is a link: the store lies in {store.path.resolve()}")
    found = {"images": report.images, "texts": report.texts}
    for what, count in source.expected().items():
        if found[what] != count:
            report.differences.append(
                f"differs from the published split: {count:,} {what} expected, {found[what]:,} found"
            )
    return report


def build_split(folder: str | Path, split: str, target: str | Path | None = None, **options: Any) -> BuildReport:
    """Build `target` (``folder/split``) from ``{split}_imgs.tsv`` and ``{split}_texts.jsonl``; options as `build_store`."""
    return build_store(OfficialSource(Path(folder), split), target or Path(folder) / split, **options)


class _Build:
    def __init__(self, writer: StoreWriter, faults: FaultList, language: str, prepare: Preparation) -> None:
        self.writer, self.faults, self.language, self.prepare = writer, faults, language, prepare
        self.read = writer.done

    def run(self, stream: Stream, workers: int, *, progress: bool, name: str) -> None:
        bar = Bar(
            total=stream.total,
            unit=stream.unit,
            unit_scale=stream.unit == "B",
            unit_divisor=1024,
            desc=name,
            shown=progress,
            delay=1.0,
            smoothing=0.05,
        )
        with bar, contextlib.closing(self._prepared(stream.items, workers)) as items:
            for position, item, data in items:
                self.read = position + 1
                try:
                    self._take(position, item, data)
                except DataFault as fault:
                    self.writer.left_out += 1
                    self._fault(located(fault, getattr(item, "file", None), getattr(item, "line", None)))
                if position % _PROGRESS_EVERY == 0:
                    bar.update(stream.tell() - bar.n)
            bar.update(stream.tell() - bar.n)

    def _fault(self, fault: DataFault) -> None:
        self.faults.add(fault)
        self.writer.faults_bytes = self.faults.bytes

    def _take(self, position: int, item: Item, data: bytes | DataFault | None) -> None:
        if isinstance(item, DataFault):
            raise item
        if isinstance(item, ImageItem):
            image_id = self._id(position, item)
            if isinstance(data, DataFault):
                self.writer.refuse_image(image_id, position, item.origin)
                raise data
            if data is not None:
                self.writer.add_image(image_id, data, item=position, origin=item.origin, columns=item.columns)
            elif not self.writer.wrote_image(image_id, position):
                if self.writer.refused_image(image_id) and not isinstance(item.content, Path):
                    raise item.fault("it is an image again that was refused", "refused-image", "Mend it or drop it.")
                self.writer.again += 1
            else:
                self.writer.add_columns(image_id, item.columns, position)
            return
        language = item.language
        if language is None:
            language = detect_language(item.text) if self.language == "detect" else self.language
        for fault in self.writer.add_text(
            item.text_id, item.text, item.image_ids, language, item=position, origin=item.origin, beside=item.beside
        ):
            self._fault(located(fault, item.file, item.line))

    def _prepared(self, items: Iterable[Item], workers: int) -> Generator[tuple[int, Item, bytes | DataFault | None]]:
        """Every item with its position and, for an image that is still to be written, its bytes; in order."""
        numbered = enumerate(items)
        next(islice(numbered, self.writer.done, self.writer.done), None)  # written before the interruption
        if workers <= 0:
            for position, item in numbered:
                yield position, item, self._now(position, item)
            return
        with ThreadPoolExecutor(workers, thread_name_prefix="images") as pool:
            try:
                yield from self._in_threads(numbered, pool, 4 * workers)
            finally:
                pool.shutdown(cancel_futures=True)

    def _now(self, position: int, item: Item) -> bytes | DataFault | None:
        if not isinstance(item, ImageItem):
            return None
        wanted = self._wanted(position, item)
        return self.prepare(item) if wanted is True else wanted or None

    def _id(self, position: int, item: ImageItem) -> Id:
        return self.writer.own_id(item.image_id, position, item.origin) if item.own_name else item.image_id

    def _wanted(self, position: int, item: ImageItem) -> bool | DataFault:
        try:
            return self.writer.wants_image(self._id(position, item), position, item.origin)
        except DataFault as fault:
            return located(fault, item.file, item.line)

    def _in_threads(
        self, numbered: Iterator[tuple[int, Item]], pool: ThreadPoolExecutor, window: int
    ) -> Iterator[tuple[int, Item, bytes | DataFault | None]]:
        waiting: deque[tuple[int, Item, Future[bytes | DataFault] | None]] = deque()
        on_the_way: Counter[Id] = Counter()  # names of the pictures that wait
        for position, item in numbered:
            future = None
            # A repetition is not read again; what it is worth shows when its turn has come, behind the first one.
            if isinstance(item, ImageItem):
                if not on_the_way[item.image_id] and self._wanted(position, item) is True:
                    future = pool.submit(self.prepare, item)
                on_the_way[item.image_id] += 1
            waiting.append((position, item, future))
            if len(waiting) > window:
                yield self._turn(*waiting[0])
                _, done, _ = waiting.popleft()
                if isinstance(done, ImageItem):
                    on_the_way[done.image_id] -= 1
                    if not on_the_way[done.image_id]:
                        del on_the_way[done.image_id]
        while waiting:
            yield self._turn(*waiting.popleft())

    def _turn(
        self, position: int, item: Item, future: Future[bytes | DataFault] | None
    ) -> tuple[int, Item, bytes | DataFault | None]:
        if not isinstance(item, ImageItem):
            return position, item, None
        if future is None:
            return position, item, self._now(position, item)
        return position, item, future.result()
