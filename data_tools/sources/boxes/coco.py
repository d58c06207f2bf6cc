"""COCO's instances: ``{"images": […], "annotations": [{"image_id", "category_id", "bbox"}], "categories": […]}``; LVIS has the same form."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from data_tools.errors import DataFault, RequestError
from data_tools.sources.boxes.annotated import Annotated, Notes, Phrase, RawBox, place_of, size_of


class Coco:
    """Phrases are the names of categories, each with all its boxes in a picture; crowds are passed over.

    Args:
        content: the parsed file.
    """

    def __init__(self, file: Path, content: dict[str, Any], images: Path | None) -> None:
        self.files, self._content = [file], content
        self._pictures = {
            image["id"]: image
            for image in content["images"]
            if isinstance(image, dict) and type(image.get("id")) in (int, str)
        }
        self.root = images or folder_of(file, [_name(image) for image in self._pictures.values()])
        self.total = len(self._pictures)

    def pictures(self, notes: Notes) -> Iterator[Annotated | DataFault]:
        file = self.files[0]
        categories = self._content.get("categories")
        classes = {
            one["id"]: one["name"]
            for one in (categories if isinstance(categories, list) else ())
            if isinstance(one, dict) and type(one.get("id")) in (int, str) and isinstance(one.get("name"), str)
        }
        if not classes:
            raise RequestError(f"{file}: categories names no class; is it the file of instances (instances_….json)?")
        found: dict[Any, dict[str, list[RawBox]]] = {}
        for number, annotation in enumerate(self._content["annotations"], start=1):
            called = f"annotation {annotation.get('id', number) if isinstance(annotation, dict) else number}"
            problem = self._problem(annotation, classes)
            if problem:
                yield DataFault(
                    problem, mend="Mend the annotation or drop it.", kind="bad-annotation", file=file, item_id=called
                )
            elif annotation.get("iscrowd"):
                notes.add("crowd", place_of(file, None, called))
            else:
                own = found.setdefault(annotation["image_id"], {}).setdefault(classes[annotation["category_id"]], [])
                own.append(RawBox(annotation["bbox"], called=called))
        for image_id, image in self._pictures.items():
            phrases = [Phrase([(name, None)], boxes) for name, boxes in found.get(image_id, {}).items()]
            name = _name(image)
            if name is None:
                problem = f"image {image_id!r:.60} has no file_name"
                yield DataFault(
                    problem,
                    mend="Every image needs one.",
                    kind="missing-field",
                    file=file,
                    item_id=f"image {image_id!r:.60}",
                )
            else:
                yield Annotated(name, file, phrases, size=size_of(image))

    def _problem(self, annotation: Any, classes: dict[Any, str]) -> str | None:
        if not isinstance(annotation, dict):
            return f"the annotation is {type(annotation).__name__}, not an object"
        image, category = annotation.get("image_id"), annotation.get("category_id")
        if type(image) not in (int, str) or image not in self._pictures:
            return f"it names image {image!r:.60}, which is not among the images"
        if type(category) not in (int, str) or category not in classes:
            return f"its category {category!r:.60} is not among the categories"
        return None if "bbox" in annotation else "it has no bbox"


def _name(image: dict[str, Any]) -> str | None:
    name = image.get("file_name")
    if not isinstance(name, str) and isinstance(image.get("coco_url"), str):  # LVIS: val2017/000000397133.jpg
        name = PurePosixPath(image["coco_url"]).name
    return name if isinstance(name, str) and name.strip() else None


def folder_of(file: Path, names: list[str | None]) -> Path:
    """Where the pictures of a COCO file lie: beside it, or in a folder named as COCO does (``instances_val2017.json``: ``val2017``)."""
    split = file.stem.rpartition("_")[2]
    above = file.parent.parent
    places = [
        file.parent,
        file.parent / "images",
        file.parent / split,
        above / split,
        above / "images" / split,
        above / "images",
        above,
    ]
    name = next((name for name in names if name), None)
    if name is not None:
        for place in places:
            if os.path.isfile(place / name):
                return place
    return file.parent
