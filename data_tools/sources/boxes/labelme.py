"""LabelMe: a ``.json`` a picture with ``shapes``, ``imagePath`` and perhaps the picture itself."""

from __future__ import annotations

import base64
import binascii
import math
import os
import posixpath
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_tools.annotations import parse_json
from data_tools.errors import DataFault
from data_tools.items import located
from data_tools.regular import regular
from data_tools.sources.boxes.annotated import CORNERS, Annotated, Notes, Phrase, RawBox, place_of, size_of
from data_tools.text_files import decode_text
from data_tools.walk import ENDINGS

_LARGEST = 512 * 2**20  # bytes; it may hold the picture
_AREAS = ("polygon", "rectangle", "circle", "mask", "rotation", "oriented_rectangle")


class LabelMe:
    """Phrases are labels, each with the boxes around all its shapes in a picture; points and lines have no area and are passed over."""

    def __init__(self, folder: Path, files: list[Path], images: Path | None) -> None:
        self.files, self.root, self._images, self.total = files, images or folder, images, len(files)

    def pictures(self, notes: Notes) -> Iterator[Annotated | DataFault]:
        for file in self.files:
            try:
                regular(file, _LARGEST)
                content = parse_json(decode_text(file.read_bytes(), "auto")[0])
                if not isinstance(content, dict) or not isinstance(content.get("shapes"), list):
                    raise DataFault("there are no shapes in it", mend="Is it a file of LabelMe?", kind="bad-annotation")
                found = self._picture(content, file)
            except DataFault as fault:
                yield located(fault, file)
                continue
            labels: dict[str, list[RawBox]] = {}
            for number, shape in enumerate(content["shapes"], start=1):
                called = f"shape {number}"
                try:
                    label, box = _shape(shape, called)
                except DataFault as fault:
                    yield located(fault, file, None, called)
                    continue
                if box is None:
                    notes.add("shape", place_of(file, None, called))
                else:
                    labels.setdefault(label, []).append(box)
            found.phrases = [Phrase([(label, None)], boxes) for label, boxes in labels.items()]
            yield found

    def _picture(self, content: dict[str, Any], file: Path) -> Annotated:
        named, data = content.get("imagePath"), content.get("imageData")
        named = named.replace("\\", "/") if isinstance(named, str) and named.strip() else None
        size = size_of(content, "imageWidth", "imageHeight")
        below = "" if self._images else file.parent.relative_to(self.root).as_posix().removeprefix(".")
        names = [posixpath.normpath(posixpath.join(below, named))] if named else []
        names += [posixpath.join(below, posixpath.basename(named))] if named else []
        names += [posixpath.join(below, file.stem + ending) for ending in ENDINGS]
        there = next((name for name in names if os.path.isfile(self.root / name)), None)
        if there is not None:
            return Annotated(there, file, [], size=size)
        if isinstance(data, str):
            try:
                picture = base64.b64decode(data, validate=True)
            except (binascii.Error, ValueError):
                raise DataFault(
                    "imageData is not base64", mend="Save it again with LabelMe.", kind="bad-base64"
                ) from None
            return Annotated(
                posixpath.normpath(names[0]).lstrip("./") or file.stem, file, [], size=size, content=picture
            )
        if named is None:
            raise DataFault(
                "it names no picture (imagePath), and holds none",
                mend="Save it again with LabelMe.",
                kind="missing-field",
            )
        return Annotated(names[0], file, [], size=size)


def _shape(shape: Any, called: str) -> tuple[str, RawBox | None]:
    """Label and box of a shape; None: it has no area."""
    if not isinstance(shape, dict) or not isinstance(shape.get("label"), str) or not shape["label"].strip():
        raise _fault("the shape has no label")
    kind, points = shape.get("shape_type", "polygon"), shape.get("points")
    if kind not in _AREAS:
        return shape["label"].strip(), None
    if not isinstance(points, list) or len(points) < 2 or not all(map(_is_point, points)):
        raise _fault(f"the points are {points!r:.60}")
    across, down = ([float(point[axis]) for point in points] for axis in (0, 1))
    if kind == "circle":
        radius = math.dist(*points[:2])
        return shape["label"].strip(), RawBox(
            [across[0] - radius, down[0] - radius, across[0] + radius, down[0] + radius], CORNERS, called=called
        )
    return shape["label"].strip(), RawBox([min(across), min(down), max(across), max(down)], CORNERS, called=called)


def _is_point(point: Any) -> bool:
    return isinstance(point, list) and len(point) == 2 and all(type(one) in (int, float) for one in point)


def _fault(problem: str) -> DataFault:
    return DataFault(problem, mend="Mend the shape in LabelMe.", kind="bad-annotation")
