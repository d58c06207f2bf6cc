"""What `ground` is given: which arguments are pictures and which are words."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from cnclip_ft.grounding.phrases import listed, phrases_of, unique
from data_tools.errors import DataFault, RequestError
from data_tools.pictures import read_file

_PICTURE = re.compile(r"\.(?:jpe?g|png|webp|bmp|gif|tiff?|avif|heic)$", re.IGNORECASE)


def told_apart(what: Sequence[str], exactly: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Files, and phrases: sentences among `what` are split, `exactly` stands as it is.

    A file that is there is a picture, whatever it is called; what ends like a picture and is not there is a mistake and no
    phrase; a folder could be meant either way. All else is words.

    Raises:
        RequestError: no picture, or an argument that could be either.
    """
    files: list[Path] = []
    found: list[str] = []
    for one in what:
        path = Path(one)
        try:
            there, folder = path.is_file() or path.is_fifo(), path.is_dir()
        except (OSError, ValueError):  # longer than a file's name may be
            there = folder = False
        if there:
            files.append(path)
        elif folder and one.strip():
            raise RequestError(
                f"{one} is a folder here. For the pictures in it write {path}/*.jpg; if it is meant as words: --phrases {one!r}"
            )
        elif _PICTURE.search(one.strip()):
            raise RequestError(f"{one}: there is no such picture; if it is meant as words: --phrases {one!r}")
        else:
            found += phrases_of(one)
    for one in exactly:
        found += _exactly(one)
    if not files:
        raise RequestError(
            f"no picture among {', '.join(map(repr, what[:4]))}: name the file of one, then what is looked for: "
            'cnclip-ft ground CHECKPOINT photo.jpg "红色的伞"'
        )
    return list(dict.fromkeys(files)), unique(found)


def _exactly(one: str) -> list[str]:
    path = Path(one)
    try:
        text = path.read_text(encoding="utf-8-sig") if path.is_file() else None
    except (OSError, ValueError) as error:
        if isinstance(error, UnicodeDecodeError):
            raise RequestError(f"--phrases {one} is not UTF-8; save it as UTF-8, a phrase a line") from None
        text = None
    if text is None and one.strip().lower().endswith(".txt"):
        raise RequestError(f"--phrases {one}: there is no such file; phrases stand in one as UTF-8, a phrase a line")
    return listed(one) if text is None else unique(text.splitlines())


def read_pictures(files: Sequence[Path]) -> Iterator[tuple[Path, bytes | DataFault]]:
    """Each file's bytes, or what is wrong with it."""
    for file in files:
        try:
            yield file, read_file(file)
        except DataFault as fault:
            yield file, fault
