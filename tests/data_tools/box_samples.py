"""Two pictures with phrases and boxes, written in every form that is read."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.build import build_store
from data_tools.sources import SourceOptions, open_source
from tests.data_tools.samples import picture

WIDTH, HEIGHT = 100, 80


def drawn(number: int) -> bytes:
    return picture(number, (WIDTH, HEIGHT))


# Two pictures: two dogs and a red umbrella on the first, a dog on the second; in pixels, corner and sides.
TRUTH = {
    "a.jpg": {"dog": [[10, 20, 30, 40], [50, 8, 25, 16]], "red umbrella": [[0, 0, 100, 80]]},
    "b.jpg": {"dog": [[90, 40, 10, 40]]},
}
SHARES = {
    name: {
        phrase: [[x / WIDTH, y / HEIGHT, w / WIDTH, h / HEIGHT] for x, y, w, h in boxes]
        for phrase, boxes in found.items()
    }
    for name, found in TRUTH.items()
}
CLASSES = ["dog", "red umbrella"]


def photos(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(TRUTH):
        (folder / name).write_bytes(drawn(number))
    return folder


def coco_content() -> dict[str, Any]:
    images = [{"id": 7 + n, "file_name": name, "width": WIDTH, "height": HEIGHT} for n, name in enumerate(TRUTH)]
    annotations = [
        {
            "id": 0,
            "image_id": 7 + n,
            "category_id": CLASSES.index(phrase),
            "bbox": box,
            "iscrowd": 0,
            "segmentation": [[1, 2]],
        }
        for n, found in enumerate(TRUTH.values())
        for phrase, boxes in found.items()
        for box in boxes
    ]
    for number, annotation in enumerate(annotations, start=1):
        annotation["id"] = number
    categories = [{"id": n, "name": name} for n, name in enumerate(CLASSES)]
    return {"images": images, "annotations": annotations, "categories": categories}


def write_coco(folder: Path) -> Path:
    photos(folder / "val2017")
    (folder / "annotations").mkdir()
    file = folder / "annotations" / "instances_val2017.json"
    file.write_text(json.dumps(coco_content()))
    return file


def write_yolo(folder: Path) -> Path:
    photos(folder / "images" / "train")
    (folder / "labels" / "train").mkdir(parents=True)
    for name, found in SHARES.items():
        lines = [f"{CLASSES.index(p)} {x + w / 2} {y + h / 2} {w} {h}" for p, bs in found.items() for x, y, w, h in bs]
        (folder / "labels" / "train" / name).with_suffix(".txt").write_text("\n".join(lines))
    (folder / "classes.txt").write_text("\n".join(CLASSES))
    return folder


def write_outlines(folder: Path) -> Path:
    write_yolo(folder)
    for name, found in SHARES.items():
        lines = [
            f"{CLASSES.index(p)} {x} {y + h / 2} {x + w / 2} {y} {x + w} {y + h / 2} {x + w / 2} {y + h}"
            for p, bs in found.items()
            for x, y, w, h in bs
        ]
        (folder / "labels" / "train" / name).with_suffix(".txt").write_text("\n".join(lines))
    return folder


def labelme_content(name: str, corner: bool = False) -> dict[str, Any]:
    shapes = [
        {
            "label": phrase,
            "shape_type": "rectangle",
            "points": [[x + w, y], [x, y + h]] if corner else [[x, y], [x + w, y + h]],
        }
        for phrase, boxes in TRUTH[name].items()
        for x, y, w, h in boxes
    ]
    size = {"imageHeight": HEIGHT, "imageWidth": WIDTH}
    return {"version": "5.4.1", "flags": {}, "shapes": shapes, "imagePath": f"..\\x\\{name}", "imageData": None, **size}


def write_labelme(folder: Path) -> Path:
    photos(folder)
    for name in TRUTH:
        content = labelme_content(name, corner=name == "b.jpg")
        if name == "a.jpg":
            (folder / name).unlink()  # it stands in the file alone
            content["imageData"] = base64.b64encode(drawn(0)).decode()
        (folder / name).with_suffix(".json").write_text(json.dumps(content))
    return folder


def write_entities(folder: Path) -> Path:
    for part in ("Sentences", "Annotations"):
        (folder / part).mkdir(parents=True)
    photos(folder / "flickr30k-images")
    numbers = {"dog": ["11", "12"], "red umbrella": ["13"]}
    for name, found in TRUTH.items():
        objects = [
            f"<object><name>{numbers[phrase][n]}</name><bndbox><xmin>{x + 1}</xmin><ymin>{y + 1}</ymin><xmax>{x + w + 1}</xmax>"
            f"<ymax>{y + h + 1}</ymax></bndbox></object>"
            for phrase, boxes in found.items()
            for n, (x, y, w, h) in enumerate(boxes)
        ]
        objects.append("<object><name>99</name><scene>1</scene><nobox>1</nobox></object>")
        size = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height></size>"
        xml = f"<annotation><filename>{name}</filename>{size}{''.join(objects)}</annotation>"
        (folder / "Annotations" / name).with_suffix(".xml").write_text(xml)
        marks = {
            phrase: [f"[/EN#{number}/animals {phrase}]" for number in numbers[phrase][: len(boxes)]]
            for phrase, boxes in found.items()
        }
        lines = [f"A {mark} in [/EN#99/scene the park] ." for found in marks.values() for mark in found]
        (folder / "Sentences" / name).with_suffix(".txt").write_text("\n".join(lines))
    return folder


def write_rows(folder: Path) -> Path:
    photos(folder / "images")
    rows = [
        {"image": f"images/{name}", "phrase": phrase, "boxes": boxes, "relative": True}
        for name, found in SHARES.items()
        for phrase, boxes in found.items()
    ]
    (folder / "boxes.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "boxes.jsonl"


def write_expressions(folder: Path) -> Path:
    """As referring expressions come: a box a row in pixels, sentences as objects; rows of one picture lie apart."""
    photos(folder)
    rows = [
        {"file_name": name, "sentences": [{"raw": phrase}], "bbox": box, "width": WIDTH, "height": HEIGHT, "ref_id": n}
        for name, found in TRUTH.items()
        for phrase, boxes in found.items()
        for n, box in enumerate(boxes)
    ]
    (folder / "refs.json").write_text(json.dumps(rows[::2] + rows[1::2]))
    return folder / "refs.json"


FORMS: dict[str, Callable[[Path], Path]] = {
    "coco": write_coco, "yolo": write_yolo, "outlines": write_outlines, "labelme": write_labelme, "entities": write_entities,
    "rows": write_rows, "expressions": write_expressions,
}  # fmt: skip


def imported(place: Path, target: Path, options: SourceOptions | None = None, **more):
    return build_store(open_source("boxes", str(place), options)[""], target, progress=False, **more)


def told(store) -> dict[str, dict[str, list[list[float]]]]:
    """Name of the picture → phrase → boxes."""
    found: dict[str, dict[str, list[list[float]]]] = {}
    for pair, beside in store.pairs_and_beside():
        own = found.setdefault(Path(str(pair.image_id)).name, {})
        assert pair.text not in own
        own[pair.text] = beside.get("boxes", [])
    return found


def close(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name].keys() == expected[name].keys()
        for phrase, boxes in expected[name].items():
            assert np.abs(np.array(sorted(found[name][phrase])) - np.array(sorted(boxes))).max() < 2e-6
