"""A whole JSON file as rows: an array of objects, or COCO's captions (`images` + `annotations`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_tools.annotations import parse_json
from data_tools.errors import DataFault, RequestError
from data_tools.regular import regular

_LARGEST = 4 * 2**30  # bytes; it is read at once
_MEND = "A table in JSON is an array of objects or COCO's captions; JSONL (.jsonl) has an object a line."


def read_json(file: Path) -> tuple[list[str] | None, list[Any]]:
    """(the columns where they are the same for all rows, the rows or faults).

    Raises:
        RequestError: it is neither an array nor COCO's captions.
    """
    regular(file, _LARGEST)
    try:
        content = parse_json(file.read_bytes().removeprefix(b"\xef\xbb\xbf"))
    except DataFault as fault:
        raise RequestError(f"{file}: {fault.problem}. {_MEND}") from None
    except OSError as error:
        raise RequestError(f"{file} cannot be read ({error.strerror})") from None
    if isinstance(content, list):
        return None, content
    if isinstance(content, dict) and all(isinstance(content.get(part), list) for part in ("images", "annotations")):
        return ["image", "text"], _coco(content["images"], content["annotations"])
    found = (
        f"an object with {', '.join(map(repr, list(content)[:6])) or 'nothing'}"
        if isinstance(content, dict)
        else type(content).__name__
    )
    raise RequestError(f"{file} is {found}. {_MEND}")


def _coco(images: list[Any], annotations: list[Any]) -> list[Any]:
    names = {
        image["id"]: image["file_name"]
        for image in images
        if isinstance(image, dict) and isinstance(image.get("id"), (int, str)) and "file_name" in image
    }
    return [_coco_row(annotation, names) for annotation in annotations]


def _coco_row(annotation: Any, names: dict[Any, Any]) -> dict[str, Any] | DataFault:
    if not isinstance(annotation, dict) or "caption" not in annotation:
        return DataFault(
            "the annotation has no caption", mend="Is it the file of captions (captions_….json)?", kind="missing-field"
        )
    image = annotation.get("image_id")
    if not isinstance(image, (int, str)) or image not in names:
        return DataFault(f"it names image {image!r:.60}, which is not among the images", mend="Add the image or drop the caption.",
                         kind="missing-image")  # fmt: skip
    return {"image": names[image], "text": annotation["caption"]}
