"""What a finished store's files are, kept beside them: any byte that changes is found, and named by its picture or pair.

manifest.json              build, checksum, order; for every data.mdb its size and the sum of its list
pairs/data.crc32 …         CRC-32 of each 4,096 bytes of the data.mdb beside it, u32 little-endian
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.bars import Bar
from data_tools.errors import DataFault, RequestError
from data_tools.store.layouts import COLUMNS
from data_tools.store.pages import MEND

MANIFEST, LIST, DATA = "manifest.json", "data.crc32", "data.mdb"
FORMAT, VERSION = "cnclip-ft-manifest", 1
BLOCK = 4096
_AT_ONCE, _SAMPLED = 2**20, 16
MEANT = f"{MEND} If you changed it yourself, remove {MANIFEST} from the store's folder."


@dataclass(frozen=True)
class Manifest:
    """`files`: path below the store, with forward slashes → (bytes, sha256 of its list in hex)."""

    build: str
    checksum: str
    order: str
    files: dict[str, tuple[int, str]]


def data_files(place: Path, folders: Sequence[Path]) -> dict[str, Path]:
    """Every data.mdb of a store by its name in the manifest."""
    files = [folder / part / DATA for folder in folders for part in ("pairs", "imgs")]
    files += [file for folder in folders if (file := folder / COLUMNS / DATA).is_file()]
    return {file.relative_to(place).as_posix(): file for file in files}


def write_manifest(place: Path, files: dict[str, Path], *, build: str, checksum: str, order: str) -> None:
    """Sum up the finished files and write the manifest; all of it is on the disk then."""
    sizes = sum(file.stat().st_size for file in files.values())
    found: dict[str, tuple[int, str]] = {}
    with Bar(total=sizes, desc="sums of the finished files", unit="B", unit_scale=True, delay=2.0) as bar:
        for name, file in files.items():
            sums = _sums(file, bar).tobytes()
            _write(file.with_name(LIST), sums)
            found[name] = file.stat().st_size, hashlib.sha256(sums).hexdigest()
    content = {"format": FORMAT, "version": VERSION, **asdict(Manifest(build, checksum, order, found))}
    _write(place / MANIFEST, json.dumps(content, indent=1).encode())


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sums(file: Path, bar: Any) -> np.ndarray:
    sums = array("I")
    with file.open("rb", buffering=0) as handle:
        buffer = bytearray(_AT_ONCE)
        view = memoryview(buffer)
        while count := handle.readinto(buffer):
            sums.extend(zlib.crc32(view[at : min(at + BLOCK, count)]) for at in range(0, count, BLOCK))
            bar.update(count)
    return np.array(sums, dtype="<u4")


def read_manifest(place: Path) -> Manifest | None:
    """The manifest of a store; None where it has none (older stores, the official code's, copies without it).

    Raises:
        RequestError: it is damaged, or of a version that is not known here.
    """
    path = place / MANIFEST
    try:
        content = json.loads(path.read_bytes())
        if content["format"] == FORMAT and content["version"] != VERSION:
            raise RequestError(
                f"{path}: version {content['version']} is not known here (known: {VERSION}). Use a newer cnclip-ft."
            )
        files = {str(name): (int(size), str(sums)) for name, (size, sums) in content["files"].items()}
        build, checksum, order = (content[name] for name in ("build", "checksum", "order"))
        if content["format"] != FORMAT or not files or not all(type(word) is str for word in (build, checksum, order)):
            raise ValueError
        return Manifest(build, checksum, order, files)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RequestError(f"{path} cannot be read ({error.strerror}). {MEND}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise RequestError(f"{path} is damaged. {MEND}") from None


def sample(file: Path) -> dict[int, int]:
    """CRC-32 of some blocks of a file, the first ones, the last one and others between: number → sum."""
    size = file.stat().st_size
    last = max(0, -(-size // BLOCK) - 1)
    numbers = sorted({0, min(1, last), *(last * part // _SAMPLED for part in range(_SAMPLED + 1))})
    found = {}
    with file.open("rb", buffering=0) as handle:
        for number in numbers:
            handle.seek(number * BLOCK)
            found[number] = zlib.crc32(handle.read(BLOCK))
    return found


def compare_sizes(manifest: Manifest, place: Path, files: dict[str, Path]) -> None:
    """Which files there are, and how long.

    Raises:
        DataFault: others than the manifest speaks of.
    """
    if manifest.files.keys() != files.keys():
        away = ", ".join(sorted(manifest.files.keys() ^ files.keys())[:3])
        raise DataFault(f"{MANIFEST} and the folder differ in {away}", mend=MEANT, kind="damaged-store", file=place)
    for name, file in files.items():
        size, expected = file.stat().st_size, manifest.files[name][0]
        if size != expected:
            raise other_file(file, f"it has {size:,} bytes, the store was finished with {expected:,}")


def compare_samples(manifest: Manifest, place: Path, files: dict[str, Path]) -> None:
    """Sizes and some blocks: what tells a file from that of another store, in a moment.

    Raises:
        DataFault: another file than the manifest speaks of.
    """
    compare_sizes(manifest, place, files)
    for file in files.values():
        sums = _list(file)
        if sums is None:
            continue
        for number, found in sample(file).items():
            if sums[number] != found:
                raise other_file(
                    file, f"its bytes from {number * BLOCK:,} on are not those the store was finished with"
                )


def other_file(file: Path, what: str) -> DataFault:
    """The fault of a file that is not the one the manifest speaks of."""
    return DataFault(f"the file is damaged: {what}", mend=MEANT, kind="damaged-store", file=file)


def _list(file: Path) -> np.ndarray | None:
    """The list beside `file`, mapped; None where it is not there or cut (the full comparison says so)."""
    path = file.with_name(LIST)
    if not path.is_file() or path.stat().st_size != 4 * -(-file.stat().st_size // BLOCK):
        return None
    return np.memmap(path, "<u4", "r")


def damaged_blocks(manifest: Manifest, name: str, file: Path, bar: Any) -> list[int]:
    """Numbers of the blocks of `file` that are not what they were; reads all of it.

    Raises:
        DataFault: the list of sums itself is damaged.
    """
    _, expected = manifest.files[name]
    path = file.with_name(LIST)
    kept = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(kept).hexdigest() != expected:
        raise other_file(path, "it is missing, or not the list the store was finished with")
    return np.flatnonzero(_sums(file, bar) != np.frombuffer(kept, "<u4")).tolist()
