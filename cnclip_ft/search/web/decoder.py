"""A process of its own that decodes for the server: it can be ended, and what breaks in it breaks alone.

`decoders` starts it and talks to it through its standard streams, in frames: two lengths, a JSON object, bytes. It
imports no torch, so that it starts in a fraction of a second, and ends when the server does.
"""

from __future__ import annotations

import json
import os
import signal
import stat
import struct
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from data_tools.errors import DataFault, UserError
from data_tools.patch_grid import patch_grid
from data_tools.pictures import Reencoding, middle, open_upright, reencode

LENGTHS = struct.Struct(">IQ")  # of the JSON object, of the bytes
SIDES = struct.Struct(">II")  # height and width of a fitted picture, before its pixels
GONE = "gone"
_CHANGED = "the picture has changed since it was indexed"
_ELSEWHERE = "the picture is not where it was"


def frame(about: dict[str, Any], body: bytes = b"") -> bytes:
    head = json.dumps(about).encode("ascii")
    return LENGTHS.pack(len(head), len(body)) + head + body


def main(memory: int, seconds: float) -> None:
    """Answer frames until the stream ends.

    Args:
        memory: bytes this process may take, where the system can bound it.
        seconds: after which a job ends the process, in case the server no longer can.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's; this stream ends when the server does
    _bound(memory)
    incoming, outgoing = sys.stdin.buffer, sys.stdout.buffer
    _send(outgoing, frame({}))
    while lengths := incoming.read(LENGTHS.size):
        head, body = LENGTHS.unpack(lengths)
        job, data = json.loads(incoming.read(head)), incoming.read(body)
        if hasattr(signal, "setitimer"):  # by default this signal ends the process, also inside a decoder
            signal.setitimer(signal.ITIMER_REAL, seconds)
        _send(outgoing, _answer(job, data))
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)


def _send(stream: BinaryIO, data: bytes) -> None:
    stream.write(data)
    stream.flush()


def _bound(memory: int) -> None:
    with suppress(ImportError, OSError, ValueError):  # Windows has none of it, macOS not all
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        # Not the address space: a store is mapped as a whole.
        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))


def _answer(job: dict[str, Any], data: bytes) -> bytes:
    try:
        return frame({}, _JOBS[job.pop("do")](data, **job))
    except DataFault as error:
        return frame({"problem": error.problem, "kind": error.kind})
    except MemoryError:
        return frame({"problem": "the picture needs too much memory to decode", "kind": "image-too-large"})
    except Exception as error:  # noqa: BLE001 - damaged pictures fail in many ways
        kind = type(error).__name__
        return frame({"problem": f"the picture cannot be decoded ({kind})", "kind": "undecodable-image"})


def _fit(data: bytes, how: dict[str, Any], pixels: int) -> bytes:
    """As `Preprocessing.fitting` says, by Pillow, the official way: the indexed pictures' stays within 1/255 of it."""
    return _fitted(open_upright(data, pixel_limit=pixels), how)


def _fitted(picture: Image.Image, how: dict[str, Any]) -> bytes:
    filter = Image.Resampling[how["resample"].upper()]
    if "budget" in how:
        patch = how["patch"]
        rows, columns = patch_grid(picture.height, picture.width, patch, how["budget"])
        fitted = picture.resize((columns * patch, rows * patch), filter)
    elif how["fit"] != "squash":
        fitted = middle(picture, how["size"], filter, even=how["fit"] == "crop_even")
    else:
        fitted = picture.resize((how["size"], how["size"]), filter)
    return SIDES.pack(fitted.height, fitted.width) + fitted.tobytes()


def _fit_indexed(_: bytes, kind: str, path: str, key: int | str, stamp: str, how: dict[str, Any], pixels: int) -> bytes:
    """`SIDES` of the upright picture, then as `_fit`."""
    data = _indexed(kind, path, key, stamp)
    picture = open_upright(data, pixel_limit=pixels)
    return SIDES.pack(picture.height, picture.width) + _fitted(picture, how)


def _indexed(kind: str, path: str, key: int | str, stamp: str) -> bytes:
    return _of_folder(path, str(key), stamp) if kind == "folder" else _of_store(path, key, stamp)


def _thumbnail(_: bytes, kind: str, path: str, key: int | str, stamp: str, how: dict[str, Any], pixels: int) -> bytes:
    return reencode(_indexed(kind, path, key, stamp), Reencoding(**how), pixel_limit=pixels)


_JOBS: dict[str, Callable[..., bytes]] = {"fit": _fit, "fit_indexed": _fit_indexed, "thumbnail": _thumbnail}


def _gone(problem: str) -> DataFault:
    return DataFault(problem, mend="Bring the index up to date.", kind=GONE)


def _of_folder(folder: str, key: str, stamp: str) -> bytes:
    """The bytes of the file that was indexed and of no other: whatever stands there now is not waited for."""
    if Path(key).is_absolute() or ".." in Path(key).parts:
        raise _gone("outside of the folder")
    path = Path(folder, key)
    try:
        _check(path.stat(), stamp)  # before it is opened: to open some devices does something
        # A pipe that came in between is opened without waiting for its other end.
        file = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with open(file, "rb") as opened:
            return opened.read(_check(os.fstat(opened.fileno()), stamp))
    except (OSError, ValueError):
        raise _gone(_ELSEWHERE) from None


def _check(found: os.stat_result, stamp: str) -> int:
    """Its bytes."""
    if not stat.S_ISREG(found.st_mode):
        raise _gone("there is no file any more where the picture was")
    if f"{found.st_size}-{found.st_mtime_ns}" != stamp:
        raise _gone(_CHANGED)
    return found.st_size


@lru_cache(1)
def _store(path: str) -> Any:
    from data_tools.shards import open_pairs

    return open_pairs(path)


def _of_store(path: str, key: int | str, stamp: str) -> bytes:
    try:
        data = _store(path).image(key)
    except (KeyError, OSError, UserError):
        raise _gone(_ELSEWHERE) from None
    if blake2b(data, digest_size=16).hexdigest() != stamp:
        raise _gone(_CHANGED)
    return data
