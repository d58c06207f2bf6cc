"""A YOLO folder: ``images/…`` and ``labels/…`` with a text file a picture, classes in ``data.yaml`` or a file of names."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from data_tools.errors import DataFault, RequestError
from data_tools.items import located
from data_tools.regular import regular
from data_tools.sources.boxes.annotated import CENTRE, CORNERS, Annotated, Notes, Phrase, RawBox
from data_tools.text_files import AUTO, TextFile
from data_tools.walk import is_picture, walk

CLASS_FILES = ("classes.txt", "obj.names", "names.txt", "classes.names")
SPLITS = {"train": "train", "val": "valid", "valid": "valid", "validation": "valid", "test": "test"}
_LARGEST = 16 * 2**20  # bytes of a description
_WHOLE = re.compile("[0-9]{1,9}")


class Yolo:
    """Lines ``class x y width height`` (the centre, in shares of the upright picture) or ``class x y x y x y …`` (an outline).

    Args:
        root: the folder that everything lies below. wanted: folders, lists or pictures of one split, below it; none: all.
    """

    def __init__(self, root: Path, classes: dict[int, str], described: Path, wanted: list[str]) -> None:
        self.root, self._classes, self._wanted = root, classes, wanted
        self._names = list(dict.fromkeys(name for place in wanted or [""] for name in self._pictures_of(place)))
        labels = [file for name in self._names if (file := self._labels_of(name)) is not None]
        self.files, self.total = [described, *labels], len(self._names)

    def _pictures_of(self, place: str) -> list[str]:
        path = self.root / place
        if not _inside(self.root, path):
            raise RequestError(
                f"{place!r:.200} lies outside of {self.root}; name the folder of all pictures with --images"
            )
        if path.suffix == ".txt" and os.path.isfile(path):
            with TextFile(path, AUTO) as text:
                lines = [line.strip() for _, line in text.lines() if isinstance(line, str)]
            return [line.replace("\\", "/").removeprefix("./") for line in lines if line]
        if not os.path.isdir(path):
            raise RequestError(f"{path}: no such folder of pictures, and no list of them")
        prefix = f"{place.strip('/')}/" if place.strip("./") else ""
        return [f"{prefix}{found.name}" for found in walk(path).pictures]

    def _labels_of(self, name: str) -> Path | None:
        """The file of a picture's lines: in ``labels`` where the picture lies in ``images``, else beside it."""
        if not PurePosixPath(name).name or name.endswith(".."):
            return None
        parts = list(PurePosixPath(name).with_suffix(".txt").parts)
        if "images" in parts[:-1]:
            at = len(parts) - 2 - parts[-2::-1].index("images")
            file = self.root.joinpath(*parts[:at], "labels", *parts[at + 1 :])
            if os.path.isfile(file):
                return file
        file = self.root.joinpath(*parts)
        if os.path.isfile(file):
            return file
        file = self.root.joinpath("labels", *parts)
        return file if os.path.isfile(file) else None

    def pictures(self, notes: Notes) -> Iterator[Annotated | DataFault]:
        for name in self._names:
            file = self._labels_of(name)
            found: dict[str, list[RawBox]] = {}
            if file is not None:
                with TextFile(file) as text:
                    for line, content in text.lines():
                        try:
                            if isinstance(content, DataFault):
                                raise content
                            label, box = self._line(content, line)
                            found.setdefault(label, []).append(box)
                        except DataFault as fault:
                            yield located(fault, file, line, name[:500])
            phrases = [Phrase([(label, None)], boxes) for label, boxes in found.items()]
            yield Annotated(name, file or self.files[0], phrases, relative=True)

    def _line(self, content: str, line: int) -> tuple[str, RawBox]:
        try:
            cells = content.split()
            number, numbers = int(cells[0]), list(map(float, cells[1:]))
            if not all(map(math.isfinite, numbers)) or not (
                len(numbers) == 4 or (len(numbers) >= 6 and len(numbers) % 2 == 0)
            ):
                raise ValueError
        except (ValueError, IndexError):
            mend = (
                "A line is: class x y width height, in shares of the picture (or class and the corners of an outline)."
            )
            raise DataFault(f"the line is {content!r:.60}", mend=mend, kind="bad-annotation") from None
        if number not in self._classes:
            known = f"0 to {max(self._classes)}" if self._classes else "none"
            raise DataFault(
                f"class {number} has no name (there are {known})",
                mend=f"Name it in {self.files[0]}.",
                kind="bad-annotation",
            )
        if len(numbers) == 4:
            return self._classes[number], RawBox(numbers, CENTRE, line)
        across, down = numbers[::2], numbers[1::2]
        return self._classes[number], RawBox([min(across), min(down), max(across), max(down)], CORNERS, line)


def description_in(folder: Path) -> Path | None:
    """``data.yaml`` (any .yaml that names classes) or a file of names in a folder."""
    for file in sorted(
        [*folder.glob("*.yaml"), *folder.glob("*.yml")], key=lambda file: (file.stem != "data", file.name)
    ):
        content = _loaded(file)
        if isinstance(content, dict) and isinstance(content.get("names"), (list, dict)):
            return file
    return next((folder / name for name in CLASS_FILES if os.path.isfile(folder / name)), None)


def open_yolo(described: Path, images: Path | None) -> dict[str, Yolo]:
    """The splits that a description names; one without a name where it names none.

    Raises:
        RequestError: no class is named, or a folder is missing.
    """
    root = images or described.parent
    if described.suffix not in (".yaml", ".yml"):
        with TextFile(described, AUTO) as text:
            names = [line.strip() for _, line in text.lines() if isinstance(line, str)]
        return {"": Yolo(root, dict(enumerate(names)), described, [])}
    content = _loaded(described)
    named = content.get("names") if isinstance(content, dict) else None
    pairs: Any = enumerate(named) if isinstance(named, list) else named.items() if isinstance(named, dict) else ()
    classes = {
        int(number): str(name).strip() for number, name in pairs if _WHOLE.fullmatch(str(number)) and str(name).strip()
    }
    if not classes:
        raise RequestError(f"{described}: names is no list of classes; write names: [person, dog]")
    base = str(content.get("path") or "").strip()
    if images is None and base and os.path.isdir(described.parent / base):
        root = described.parent / base
        if not _inside(described.parent, root):
            raise RequestError(f"{described}: its path leads to {root}; name that folder with --images if it is meant")
    splits: dict[str, list[str]] = {}
    for key, name in SPLITS.items():
        places = content.get(key)
        for place in places if isinstance(places, list) else [places]:
            if isinstance(place, str) and place.strip():
                splits.setdefault(name, []).append(_below(root, place))
    return {name: Yolo(root, classes, described, places) for name, places in splits.items()} or {
        "": Yolo(root, classes, described, [])
    }


def _below(root: Path, place: str) -> str:
    """A place of a description below `root`: those written for another folder (``../train/images``) are looked for by their last parts."""
    place = place.replace("\\", "/").removeprefix("./")
    parts = [part for part in PurePosixPath(place).parts if part not in ("..", "/")]
    if not place.startswith(("/", "..")) and os.path.exists(root / place):
        return place
    for start in range(len(parts)):
        tail = "/".join(parts[start:])
        if os.path.exists(root / tail):
            return tail
    return place


def _inside(root: Path, path: Path) -> bool:
    try:
        top = os.path.realpath(root)
        return os.path.commonpath([os.path.realpath(path), top]) == top
    except (OSError, ValueError):  # a NUL in the name, or another drive of Windows
        return False


def _loaded(file: Path) -> Any:
    regular(file, _LARGEST)
    try:
        return yaml.safe_load(file.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, UnicodeError, RecursionError, OSError, ValueError) as error:
        said = " ".join(str(error).split())[:200]
        raise RequestError(f"{file} is no YAML that can be read ({said})") from None


def looks_like_labels(folder: Path) -> bool:
    """Whether pictures and text files of numbers lie in it, as YOLO's tools leave them."""
    return os.path.isdir(folder / "labels") and any(is_picture(found.name) for found in walk(folder).pictures[:1])
