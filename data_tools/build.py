"""Records → store: every fault named, the store put in its place only when it is whole."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from data_tools.annotations import Id, TextRecord, parse_image_line, parse_text_line, read_lines
from data_tools.errors import DataFault, RequestError, UserError
from data_tools.pictures import check_picture, shrink
from data_tools.store import Layout, StoreWriter

OnError = Literal["fail", "skip"]


@dataclass
class BuildSummary:
    """What went in and what did not."""

    target: Path
    images: int = 0
    pairs: int = 0
    texts: int = 0
    lone_texts: int = 0
    images_without_text: int = 0
    faults: Counter[str] = field(default_factory=Counter)

    def lines(self) -> list[str]:
        lines = [f"{self.target}: {self.images:,} images, {self.texts:,} texts, {self.pairs:,} pairs"]
        if self.lone_texts:
            lines.append(f"  {self.lone_texts:,} texts name no image: kept as queries without known answer")
        if self.images_without_text:
            lines.append(f"  {self.images_without_text:,} images have no text: they stand in the pool, but do not train")
        for kind, count in self.faults.most_common():
            lines.append(f"  {count:,} left out: {kind} (see faults.jsonl)")
        return lines


class FaultLog:
    """What to do with a fault: stop at the first, or note it beside the target and go on up to a limit."""

    def __init__(self, target: Path, on_error: OnError, max_faults: int | None, counts: Counter[str]) -> None:
        self.path = target.with_name(f"{target.name}.faults.jsonl")
        self.on_error, self.max_faults, self.counts = on_error, max_faults, counts
        self.path.unlink(missing_ok=True)

    def take(self, fault: DataFault) -> None:
        if self.on_error == "fail":
            raise fault
        self.counts[fault.kind] += 1
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(fault.as_dict(), ensure_ascii=False) + "\n")
        if self.max_faults is not None and self.counts.total() > self.max_faults:
            raise UserError(f"{self.counts.total()} faults, more than --max-faults {self.max_faults}; the last: {fault}\nAll: {self.path}")


@dataclass(frozen=True)
class ImageRecord:
    """One encoded image and where it stands, for messages."""

    image_id: Id
    data: bytes
    file: str
    line: int | None = None


def build_store(
    images: Iterable[ImageRecord | DataFault],
    texts: Iterable[TextRecord | DataFault],
    target: Path,
    *,
    texts_file: Path,
    layout: Layout = "plain",
    on_error: OnError = "fail",
    max_faults: int | None = None,
    max_side: int | None = None,
    quality: int = 90,
    progress: bool = True,
) -> BuildSummary:
    """Write one split.

    Args:
        images, texts: records, or the faults of lines that gave none. Images come first, so that a text naming an
            image that is not there is found where it stands.
        max_side: re-encode pictures to JPEG of at most this many pixels a side.

    Raises:
        DataFault: the first fault, with ``on_error="fail"``.
        UserError: too many faults, an empty split, a full disk. What was at `target` before is untouched.
    """
    target = Path(target)
    summary = BuildSummary(target)
    target.parent.mkdir(parents=True, exist_ok=True) if not target.parent.exists() else None
    log = FaultLog(target, on_error, max_faults, summary.faults)
    hidden = None if progress else True
    with StoreWriter(target, layout=layout) as writer:
        known: dict[Id, bool] = {}  # image id → has a text
        for record in tqdm(images, desc=f"{target.name}: images", unit="image", disable=hidden):
            try:
                _add_image(writer, record, known, max_side, quality)
            except DataFault as fault:
                log.take(fault)
        seen: dict[Id, int] = {}
        for record in tqdm(texts, desc=f"{target.name}: texts", unit="text", disable=hidden):
            try:
                _add_text(writer, record, known, seen, summary, texts_file)
            except DataFault as fault:
                log.take(fault)
        if writer.pairs == 0 and summary.lone_texts == 0:
            raise UserError(f"{texts_file}: no usable text in it, so {target} would be empty. Nothing was written.")
        summary.images, summary.pairs = writer.images, writer.pairs
        summary.images_without_text = sum(not used for used in known.values())
        writer.finish()
    return summary


def _add_image(writer: StoreWriter, record: ImageRecord | DataFault, known: dict[Id, bool], max_side, quality) -> None:
    if isinstance(record, DataFault):
        raise record
    where = {"file": record.file, "line": record.line, "item_id": record.image_id}
    if record.image_id in known:
        raise DataFault(f"image id {record.image_id!r} stands twice", mend="Give every image an id of its own.",
                        kind="duplicate-image-id", **where)  # fmt: skip
    check_picture(record.data, decode=max_side is not None, **where)
    writer.add_image(record.image_id, shrink(record.data, max_side, quality) if max_side else record.data)
    known[record.image_id] = False


def _add_text(writer, record: TextRecord | DataFault, known, seen, summary: BuildSummary, file: Path) -> None:
    if isinstance(record, DataFault):
        raise record
    if record.text_id in seen:
        raise DataFault(f"text id {record.text_id!r} stands in line {seen[record.text_id]} already", kind="duplicate-text-id",
                        mend="Give every text an id of its own.", file=file, line=record.line, item_id=record.text_id)  # fmt: skip
    missing = [image_id for image_id in record.image_ids if image_id not in known]
    if missing:
        raise DataFault(f"text {record.text_id!r} names image {missing[0]!r}, which is not among the images", kind="missing-image",
                        mend="Add the image, or take its id out of the line.", file=file, line=record.line,
                        item_id=record.text_id)  # fmt: skip
    seen[record.text_id] = record.line
    summary.texts += 1
    if not record.image_ids:
        writer.add_lone_text(record.text_id, record.text, record.language)
        summary.lone_texts += 1
    for image_id in record.image_ids:
        writer.add_pair(image_id, record.text_id, record.text, record.language)
        known[image_id] = True


def official_images(path: Path) -> Iterator[ImageRecord | DataFault]:
    """Records of a ``{split}_imgs.tsv``."""
    for number, line in read_lines(path):
        if isinstance(line, DataFault):
            yield line
        elif line.strip():
            try:
                image_id, data = parse_image_line(line, path, number)
                yield ImageRecord(image_id, data, str(path), number)
            except DataFault as fault:
                yield fault


def official_texts(path: Path) -> Iterator[TextRecord | DataFault]:
    """Records of a ``{split}_texts.jsonl``."""
    for number, line in read_lines(path):
        if isinstance(line, DataFault):
            yield line
        elif line.strip():
            try:
                yield parse_text_line(line, path, number)
            except DataFault as fault:
                yield fault


def build_split(folder: str | Path, split: str, *, output: str | Path | None = None, **options) -> BuildSummary:
    """``folder/{split}_imgs.tsv`` + ``folder/{split}_texts.jsonl`` → ``output/{split}`` (default: in `folder`).

    Raises:
        RequestError: a source file is missing.
        As `build_store`.
    """
    folder = Path(folder)
    images, texts = folder / f"{split}_imgs.tsv", folder / f"{split}_texts.jsonl"
    for path in (images, texts):
        if not path.is_file():
            there = sorted(p.name.removesuffix("_texts.jsonl") for p in folder.glob("*_texts.jsonl")) if folder.is_dir() else []
            hint = f" Splits found there: {', '.join(there)}." if there else ""
            raise RequestError(f"{path}: no such file; a split needs {split}_imgs.tsv and {split}_texts.jsonl.{hint}")
    target = Path(output or folder) / split
    return build_store(official_images(images), official_texts(texts), target, texts_file=texts, **options)
