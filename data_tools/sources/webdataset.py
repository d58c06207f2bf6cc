"""WebDataset tars: files that share a name up to the first dot are one sample, ``0001.jpg`` and ``0001.txt`` or ``.json``."""

from __future__ import annotations

import glob
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_tools.annotations import check_id, check_text, decode_line, parse_json
from data_tools.errors import DataFault, RequestError
from data_tools.items import ImageItem, Item, Stream, TextItem, fingerprint_of, located
from data_tools.walk import ENDINGS

_IMAGES = tuple(ending.removeprefix(".") for ending in ENDINGS)
_TEXTS = ("txt", "text", "caption")
_FIELDS = ("caption", "text", "captions", "texts", "title")


class WebDatasetSource:
    """One or many local tars. Ids are the samples' keys; a .txt is one caption, a .json holds one or a list.

    Args:
        pattern: a tar, a folder of tars, or a pattern (``data-*.tar``, ``data-{0000..0012}.tar``).
        text_fields: names of the caption in the .json.

    Raises (on `open`):
        RequestError: no tar, or webdataset is not installed.
    """

    kind = "webdataset"

    def __init__(self, pattern: str | Path, text_fields: tuple[str, ...] = ()) -> None:
        self.pattern, self.text_fields = str(pattern), text_fields or _FIELDS

    def tars(self) -> list[Path]:
        place = Path(self.pattern)
        if place.is_dir():
            found = sorted(place.glob("*.tar"))
        elif "{" in self.pattern:
            found = [Path(name) for name in _library().braceexpand.braceexpand(self.pattern)]
        else:
            found = [Path(name) for name in sorted(glob.glob(self.pattern))]
        missing = [str(file) for file in found if not file.is_file()]
        if missing or not found:
            raise RequestError(f"{', '.join(missing[:3]) or self.pattern}: no such tar")
        return found

    def open(self) -> Stream:
        library, tars = _library(), self.tars()
        done = [0]
        total = sum(file.stat().st_size for file in tars)
        return Stream(self._items(library, tars, done), total=total, unit="B", tell=lambda: done[0])

    def _items(self, library: Any, tars: list[Path], done: list[int]) -> Iterator[Item]:
        numbers = iter(range(1, 2**62))
        for tar in tars:
            before = done[0]
            with tar.open("rb") as handle:
                faults: list[DataFault] = []

                def handler(error: Exception, tar: Path = tar, faults: list[DataFault] = faults) -> bool:
                    faults.append(_tar_fault(str(error.args[0] if error.args else error), tar))
                    return True

                samples = library.group_by_keys(
                    {"__url__": str(tar), **member} for member in library.tar_file_iterator(handle, handler=handler)
                )
                while True:
                    try:
                        sample = next(samples, None)
                    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
                        yield _tar_fault(str(error.args[0] if error.args else error), tar)
                        break
                    yield from faults
                    faults.clear()
                    if sample is None:
                        break
                    done[0] = before + handle.tell()
                    yield from self._sample(sample, tar, numbers)
            done[0] = before + tar.stat().st_size

    def _sample(self, sample: dict[str, Any], tar: Path, numbers: Iterator[int]) -> Iterator[Item]:
        key = sample["__key__"]
        try:
            image_id = check_id(key, "the sample's name")
            data = next((sample[ending] for ending in _IMAGES if ending in sample), None)
            if data is None:
                raise DataFault(
                    f"no image ({', '.join(name for name in sample if not name.startswith('__')) or 'nothing'} is there)",
                    mend=f"A sample has one of .{', .'.join(_IMAGES)}.", kind="missing-image",
                )  # fmt: skip
        except DataFault as fault:
            yield located(fault, tar, None, key)
            return
        yield ImageItem(image_id, data, tar)
        try:
            captions, language = self._captions(sample)
        except DataFault as fault:
            yield located(fault, tar, None, key)
            return
        for caption in captions:
            number = next(numbers)
            try:
                yield TextItem(number, check_text(caption), (image_id,), language, tar)
            except DataFault as fault:
                yield located(fault, tar, None, key)

    def _captions(self, sample: dict[str, Any]) -> tuple[list[Any], str | None]:
        for ending in _TEXTS:
            if ending in sample:
                return [decode_line(sample[ending]).strip()], None
        if "json" in sample:
            row = parse_json(sample["json"])
            name = next((name for name in self.text_fields if isinstance(row, dict) and name in row), None)
            if name is not None:
                found = row[name] if isinstance(row[name], list) else [row[name]]
                return found, row.get("language") if row.get("language") in ("zh", "en", "mixed") else None
            fields = ", ".join(map(json.dumps, row)) if isinstance(row, dict) else type(row).__name__
            raise DataFault(
                f"no caption in the .json ({fields})", mend="Name its field with --text-column.", kind="missing-caption"
            )
        raise DataFault("no caption", mend="A sample has a .txt or a .json beside its image.", kind="missing-caption")

    def fingerprint(self) -> dict[str, Any]:
        return {"files": fingerprint_of(*self.tars())}

    def expected(self) -> dict[str, int]:
        return {}


def _tar_fault(problem: str, tar: Path) -> DataFault:
    return DataFault(
        f"the tar cannot be read on ({problem})", mend="Fetch or write it again.", kind="bad-tar", file=tar
    )


def _library() -> Any:
    try:
        # Imported when needed only: it loads torch where that is installed.
        from webdataset import tariterators
    except ImportError:
        raise RequestError("WebDataset tars need webdataset: pip install 'cnclip-ft[webdataset]'") from None
    return tariterators
