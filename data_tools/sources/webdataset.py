"""WebDataset tars: files that share a name up to the first dot are one sample, ``0001.jpg`` and ``0001.txt`` or ``.json``."""

from __future__ import annotations

import glob
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_tools.annotations import check_id, check_text, parse_json
from data_tools.columns import kept_columns
from data_tools.errors import DataFault, RequestError
from data_tools.items import ImageItem, Item, Stream, TextItem, fingerprint_of, located
from data_tools.sources.beside_cells import NEGATIVES, WEIGHT, beside_of, usual
from data_tools.sources.patterns import expand
from data_tools.sources.places import readable
from data_tools.sources.tar_members import LARGEST_MEMBER, Member, TarMembers
from data_tools.store.layouts import Value
from data_tools.text_files import AUTO, decode_text
from data_tools.walk import ENDINGS

_IMAGES = tuple(ending.removeprefix(".") for ending in ENDINGS)
_TEXTS = ("txt", "text", "caption")
_FIELDS = ("caption", "text", "captions", "texts", "title")
_LARGEST_TEXT = 16 * 2**20  # bytes
_NAME = re.compile(r"((?:.*/|)[^./][^./]*)\.([^/]*)", re.DOTALL)
_OF_LIBRARIES = re.compile(r"__[^/]*__($|/)")


@dataclass(slots=True)
class _Sample:
    key: str
    parts: dict[str, bytes] = field(default_factory=dict)
    places: dict[str, int] = field(default_factory=dict)
    fault: DataFault | None = None
    size: int = 0

    def add(self, ending: str, member: Member) -> None:
        content = member.content
        if isinstance(content, bytes):
            self.size += len(content)
            if self.parts.get(ending, content) != content:
                content = _bad(f"{member.name!r} stands twice, with other bytes", "Keep one of them.")
            elif self.size > LARGEST_MEMBER:
                content = _bad(f"the sample has more than {LARGEST_MEMBER >> 20} MiB", "Shrink it.")
                self.parts.clear()
        if isinstance(content, bytes):
            self.parts[ending], self.places[ending] = content, member.place
        else:
            self.fault = self.fault or content


class WebDatasetSource:
    """One or many local tars. A .txt is one caption, a .json holds one or a list.

    Ids are the samples' keys; another picture of a key gets its own (`ImageItem.own_name`), the same picture is one.

    Args:
        pattern: a tar, a folder of tars, or a pattern (``data-*.tar``, ``data-{0000..0012}.tar``).
        text_fields: names of the caption in the .json.
        encoding: of the .txt.

    Raises (on `open`):
        RequestError: no tar, or braces in the pattern and webdataset is not installed.
    """

    kind = "webdataset"

    def __init__(self, pattern: str | Path, text_fields: tuple[str, ...] = (), encoding: str = AUTO) -> None:
        self.pattern, self.text_fields, self.encoding = str(pattern), text_fields or _FIELDS, encoding

    def tars(self) -> list[Path]:
        place = Path(self.pattern)
        if place.is_dir():
            found = sorted(place.glob("*.tar"))
        elif place.is_file():  # its name may hold marks of patterns
            found = [place]
        elif "{" in self.pattern:
            found = [Path(name) for name in expand(self.pattern)]
        else:
            found = [Path(name) for name in sorted(glob.glob(self.pattern))]
        missing = [str(file) for file in found if not file.is_file()]
        if missing or not found:
            raise RequestError(f"{', '.join(missing[:3]) or self.pattern}: no such tar")
        return found

    def open(self) -> Stream:
        tars = [TarMembers(file) for file in self.tars()]
        done, notes, given = [0], list[str](), [0]
        total = sum(tar.size for tar in tars)
        return Stream(
            self._items(tars, done, notes, given),
            total=total,
            unit="B",
            tell=lambda: done[0],
            notes=notes,
            counted=lambda: given[0],
        )

    def _items(self, tars: list[TarMembers], done: list[int], notes: list[str], given: list[int]) -> Iterator[Item]:
        numbers, passed, encodings = _counting(given), [0], Counter[str]()
        for tar in tars:
            before = done[0]
            for sample in self._samples(tar, passed):
                done[0] = before + tar.tell()
                if isinstance(sample, DataFault):
                    yield located(sample, tar.file)
                else:
                    yield from self._sample(sample, tar.file, numbers, encodings)
            done[0] = before + tar.size
        notes += [f"{count:,} captions are {encoding}" for encoding, count in encodings.most_common()]
        if passed[0]:
            notes.append(
                f"passed over: {passed[0]:,} members that belong to no sample (their names have no dot, or begin with one)"
            )

    def _samples(self, tar: TarMembers, passed: list[int]) -> Iterator[_Sample | DataFault]:
        sample: _Sample | None = None
        for member in tar:
            if isinstance(member, DataFault):
                yield member
                continue
            name = _NAME.fullmatch(member.name)
            if name is None or _OF_LIBRARIES.match(member.name):
                passed[0] += 1
                continue
            if sample is None or sample.key != name[1]:
                if sample is not None:
                    yield sample
                sample = _Sample(name[1])
            sample.add(name[2].lower(), member)
        if sample is not None:
            yield sample

    def _sample(self, sample: _Sample, tar: Path, numbers: Iterator[int], encodings: Counter[str]) -> Iterator[Item]:
        try:
            image_id = check_id(readable(sample.key), "the sample's name")
            if sample.fault is not None:
                raise sample.fault
            images = [ending for ending in _IMAGES if ending in sample.parts]
            if not images:
                raise DataFault(
                    f"no image ({', '.join(sample.parts) or 'nothing'} is there)",
                    mend=f"A sample has one of .{', .'.join(_IMAGES)}.",
                    kind="missing-image",
                )
            if len(images) > 1 and len({sample.parts[ending] for ending in images}) > 1:
                raise _bad(
                    f"the sample has {len(images)} images (.{', .'.join(images)})", "Give each a name of its own."
                )
        except DataFault as fault:
            yield located(fault, tar, None, readable(sample.key)[:500])
            return
        row = _row(sample.parts)
        others = self._others(row) if isinstance(row, dict) else None
        image = ImageItem(image_id, sample.parts[images[0]], tar, own_name=True, columns=others)
        image.place = sample.places[images[0]]
        yield image
        try:
            captions, language = self._captions(sample.parts, row, encodings)
            cells = row if isinstance(row, dict) else {}
            negatives, weight = (cells.get(usual(list(cells), names)) for names in (NEGATIVES, WEIGHT))
            beside = beside_of(negatives, weight, len(captions), untyped=False)
        except DataFault as fault:
            yield located(fault, tar, None, image_id)
            return
        for caption, found in zip(captions, beside, strict=True):
            try:
                number, text = next(numbers), check_text(caption)
                yield TextItem(number, text, (image_id,), language, tar, None, image.origin, True, found)
            except DataFault as fault:
                yield located(fault, tar, None, image_id)

    def _others(self, row: dict[Any, Any]) -> dict[str, Value] | None:
        """What else the .json says, to be kept with the picture."""
        used = (*self.text_fields, "language", usual(list(row), NEGATIVES), usual(list(row), WEIGHT))
        return kept_columns(row, [name for name in row if name not in used]) or None

    def _captions(self, parts: dict[str, bytes], row: Any, encodings: Counter[str]) -> tuple[list[Any], str | None]:
        for ending in (*_TEXTS, "json"):
            if len(parts.get(ending, b"")) > _LARGEST_TEXT:
                raise _bad(f"the .{ending} has more than {_LARGEST_TEXT >> 20} MiB", "It holds a caption; shorten it.")
        for ending in _TEXTS:
            if ending in parts:
                text, read_as = decode_text(parts[ending], self.encoding)
                encodings[read_as] += 1
                return [text.strip()], None
        if "json" in parts:
            if isinstance(row, DataFault):
                raise row
            name = next((name for name in self.text_fields if isinstance(row, dict) and name in row), None)
            if name is not None:
                found = row[name] if isinstance(row[name], list) else [row[name]]
                if not found:
                    raise DataFault(
                        f"the list {name!r} in the .json is empty", mend="Write a caption.", kind="empty-text"
                    )
                language = row.get("language")
                return found, language if language in ("zh", "en", "mixed") else None
            fields = ", ".join(map(json.dumps, row)) if isinstance(row, dict) else type(row).__name__
            raise DataFault(
                f"no caption in the .json ({fields[:200]})",
                mend="Name its field with --text-column.",
                kind="missing-caption",
            )
        raise DataFault("no caption", mend="A sample has a .txt or a .json beside its image.", kind="missing-caption")

    def fingerprint(self) -> dict[str, Any]:
        return {"files": fingerprint_of(*self.tars()), "reading": [self.encoding, list(self.text_fields)]}

    def expected(self) -> dict[str, int]:
        return {}


def _bad(problem: str, mend: str) -> DataFault:
    return DataFault(problem, mend=mend, kind="bad-member")


def _counting(given: list[int]) -> Iterator[int]:
    """1, 2, …; `given` says how many were taken."""
    while True:
        given[0] += 1
        yield given[0]


def _row(parts: dict[str, bytes]) -> Any:
    """What the .json holds, nothing where there is none; a fault, where it cannot be read, is one of the captions."""
    if len(parts.get("json", b"{}")) > _LARGEST_TEXT:
        return {}
    try:
        return parse_json(parts.get("json", b"{}"))
    except DataFault as fault:
        return fault
