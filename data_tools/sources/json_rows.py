"""A whole JSON file as rows: an array of objects, COCO's captions (`images` + `annotations`), or Karpathy's splits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_tools.annotations import parse_json
from data_tools.errors import DataFault, RequestError
from data_tools.regular import regular
from data_tools.text_files import AUTO, decode_text

_LARGEST = 4 * 2**30  # bytes; it is read at once
_MEND = "A table in JSON is an array of objects or COCO's captions, or Karpathy's splits; JSONL (.jsonl) has an object a line."


def read_json(file: Path, encoding: str = AUTO) -> tuple[list[str] | None, list[Any], str]:
    """(the columns where they are the same for all rows, the rows or faults, the encoding for people).

    Raises:
        RequestError: it is none of these.
    """
    regular(file, _LARGEST)
    try:
        text, read_as = decode_text(file.read_bytes(), encoding)
        content = parse_json(text)
    except DataFault as fault:
        raise RequestError(f"{file}: {fault.problem}. {_MEND}") from None
    except OSError as error:
        raise RequestError(f"{file} cannot be read ({error.strerror})") from None
    if isinstance(content, list):
        return None, content, read_as
    if isinstance(content, dict) and all(isinstance(content.get(part), list) for part in ("images", "annotations")):
        return ["image", "text"], _coco(content["images"], content["annotations"]), read_as
    if isinstance(content, dict) and isinstance(content.get("images"), list):
        return None, [_karpathy_row(image) for image in content["images"]], read_as
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


def _karpathy_row(image: Any) -> dict[str, Any] | DataFault:
    """``{"filepath": "val2014", "filename": "a.jpg", "split": "test", "sentences": [{"raw": "…"}]}`` (Karpathy and Fei-Fei, 2015)."""
    if not isinstance(image, dict) or not isinstance(image.get("sentences"), list) or "filename" not in image:
        return DataFault(
            "the image has no filename or no sentences",
            mend="Is it a file like dataset_coco.json?",
            kind="missing-field",
        )
    path = f"{image['filepath']}/{image['filename']}" if image.get("filepath") else image["filename"]
    texts = [sentence.get("raw") if isinstance(sentence, dict) else sentence for sentence in image["sentences"]]
    others = {
        name: value for name, value in image.items() if name not in ("filepath", "filename", "sentences", "sentids")
    }
    return {"image": path, "text": texts, **others}


def _coco_row(annotation: Any, names: dict[Any, Any]) -> dict[str, Any] | DataFault:
    if not isinstance(annotation, dict) or "caption" not in annotation:
        return DataFault(
            "the annotation has no caption", mend="Is it the file of captions (captions_….json)?", kind="missing-field"
        )
    image = annotation.get("image_id")
    if not isinstance(image, (int, str)) or image not in names:
        return DataFault(
            f"it names image {image!r:.60}, which is not among the images",
            mend="Add the image or drop the caption.",
            kind="missing-image",
        )
    return {"image": names[image], "text": annotation["caption"]}
