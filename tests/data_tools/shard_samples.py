"""The same pairs as tars and as Parquet files, for the tests of shards."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from data_tools.build import build_store
from data_tools.sources import open_source
from data_tools.store import PairSource, PairStore
from tests.data_tools.samples import picture

Sample = tuple[str, dict[str, bytes]]  # key, ending → content


def samples(first: int, count: int, captions: int = 1) -> list[Sample]:
    """Pictures with captions in a .txt, or several in a .json with other columns."""
    found = []
    for number in range(first, first + count):
        texts = [f"第{number}张图 {k}" if k % 2 == 0 else f"picture {number}, {k}" for k in range(captions)]
        parts = {"jpg": picture(number)}
        if captions == 1:
            parts["txt"] = texts[0].encode()
        parts["json"] = json.dumps({"caption": texts, "price": number * 2, "url": f"x/{number}"}).encode()
        found.append((f"{number:06d}", parts))
    return found


def write_tar(file: Path, wanted: Iterable[Sample], format: int = tarfile.PAX_FORMAT) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w", format=format) as tar:
        for key, parts in wanted:
            for ending, data in parts.items():
                member = tarfile.TarInfo(f"{key}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return file


def three_tars(folder: Path) -> Path:
    """Of five pictures each, with one caption, two and three; ids are not in the order of the shards."""
    for number, first in enumerate((10, 0, 20)):
        write_tar(folder / f"{number:05d}.tar", samples(first, 5, captions=1 + number))
    return folder


def write_parquet(file: Path, rows: Iterable[Mapping[str, Any]], **how: Any) -> Path:
    import pyarrow
    from pyarrow import parquet

    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(list(rows)), file, **how)
    return file


def rows(wanted: Iterable[Sample], named: bool = True) -> list[dict[str, Any]]:
    """As Hugging Face has them: bytes and path; the path is the sample's name, so ids are equal to those of tars."""
    found = []
    for key, parts in wanted:
        about = json.loads(parts["json"])
        image: Any = {"bytes": parts["jpg"], "path": key} if named else parts["jpg"]
        found.append({"image": image, "text": about["caption"], "price": about["price"], "url": about["url"]})
    return found


def imported(kind: str, place: Path | str, target: Path) -> PairStore:
    return build_store(open_source(kind, str(place))[""], target, progress=False).store


def everything(source: PairSource) -> dict[str, Any]:
    """All that a source of pairs says, in its order."""
    return {
        "ids": list(source.image_ids),
        "pictures": [source.image(image_id) for image_id in source.image_ids],
        "columns": [source.columns_of(image_id) for image_id in source.image_ids],
        "names": source.columns,
        "pairs": list(source.pairs_and_beside()),
        "by number": [source[number] for number in range(len(source))],
        "beside": [source.beside(number) for number in range(len(source))],
        "counts": {name: count for name, count in source.beside_counts.items() if count},
        "texts": list(source.texts()),
        "sums": (source.checksum(), source.order(), source.image_count, len(source)),
    }
