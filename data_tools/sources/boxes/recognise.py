"""Which form a place is in, by what it holds; and the table of translations."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_tools.errors import DataFault, RequestError
from data_tools.items import Source
from data_tools.regular import regular
from data_tools.sources.boxes.annotated import CORNERS, SIDES, Form
from data_tools.sources.boxes.coco import Coco, folder_of
from data_tools.sources.boxes.entities import ANNOTATIONS, SENTENCES, open_entities
from data_tools.sources.boxes.labelme import LabelMe
from data_tools.sources.boxes.rows import Rows
from data_tools.sources.boxes.source import BoxesSource
from data_tools.sources.boxes.yolo import description_in, looks_like_labels, open_yolo
from data_tools.sources.options import SourceOptions
from data_tools.sources.table import TableSource
from data_tools.text_files import AUTO, TextFile, decode_text
from data_tools.walk import natural

_LARGEST = 4 * 2**30  # bytes of a JSON file; it is read at once
_HEADS = ("name", "class", "label", "phrase", "en", "english", "类别", "名称", "英文")
KNOWN = (
    "COCO's instances (.json) or captions, a YOLO folder or its data.yaml, a folder of LabelMe, Flickr30k Entities (Sentences and "
    'Annotations), or JSONL with {"image", "phrase", "boxes"}'
)


def open_boxes(place: Path, options: SourceOptions) -> Mapping[str, Source]:
    """The splits of a place; one without a name where it has none.

    Raises:
        RequestError: it is in none of the forms, or something it needs is missing.
    """
    if options.box_format not in ("", SIDES, CORNERS):
        raise RequestError(
            f"--box-format {options.box_format!r}: {SIDES} (corner and sides) or {CORNERS} (two corners)"
        )
    translations = {} if options.names is None else read_names(options.names)
    forms = _forms(place, options)
    if options.box_format and not any(isinstance(form, Rows) for form in forms.values()):
        raise RequestError(f"--box-format is for rows that do not say it; {place} does")
    return {
        name: form
        if isinstance(form, TableSource)
        else BoxesSource(form, translations, options.names, options.allow_outside)
        for name, form in forms.items()
    }


def _forms(place: Path, options: SourceOptions) -> Mapping[str, Form | TableSource]:
    images, form = options.images, options.box_format or SIDES
    if os.path.isdir(place):
        if os.path.isdir(place / SENTENCES) and os.path.isdir(place / ANNOTATIONS):
            return open_entities(place, images)
        described = description_in(place)
        if described is not None:
            return open_yolo(described, images)
        if looks_like_labels(place):
            raise RequestError(
                f"{place} has labels, and nothing names their classes: write data.yaml or classes.txt, a name a line"
            )
        rows = sorted(place.glob("*.jsonl"), key=lambda file: natural(file.name))
        if len(rows) == 1:
            return {"": Rows(rows[0], images, form)}
        files = sorted(place.rglob("*.json"), key=lambda file: natural(file.relative_to(place).as_posix()))
        labelled = [file for file in files if _begins_like_labelme(file)]
        if labelled:
            return {"": LabelMe(place, labelled, images)}
        named = ", ".join(file.relative_to(place).as_posix() for file in [*files, *rows][:5])
        raise RequestError(
            f"{place}: {f'name one of its files ({named})' if named else f'nothing of {KNOWN} is in it'}"
        )
    regular(place, _LARGEST)
    ending = place.suffix.lower()
    if ending in (".yaml", ".yml") or place.name in ("classes.txt", "obj.names"):
        return open_yolo(place, images)
    if ending in (".jsonl", ".ndjson"):
        return {"": Rows(place, images, form)}
    if ending != ".json":
        raise RequestError(f"{place} is none of {KNOWN}")
    content = _json(place)
    if isinstance(content, list):
        return {"": Rows(place, images, form)}
    if isinstance(content, dict) and isinstance(content.get("shapes"), list):
        return {"": LabelMe(place.parent, [place], images)}
    if isinstance(content, dict) and all(isinstance(content.get(part), list) for part in ("images", "annotations")):
        if any(isinstance(one, dict) and "caption" in one for one in content["annotations"][:100]):
            names = [one.get("file_name") for one in content["images"][:1] if isinstance(one, dict)]
            captions = TableSource(place, root=images or folder_of(place, names), outside=options.allow_outside)
            return {"": captions}
        return {"": Coco(place, content, images)}
    raise RequestError(f"{place} is none of {KNOWN}")


def _json(file: Path) -> Any:
    """A whole JSON file; outlines of things, which are most of COCO's, are let go while it is read."""
    try:
        text, _ = decode_text(file.read_bytes(), AUTO)
        return json.loads(
            text, object_pairs_hook=lambda pairs: {name: one for name, one in pairs if name != "segmentation"}
        )
    except DataFault as fault:
        raise RequestError(f"{file}: {fault.problem}. {fault.mend}") from None
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{file} is no JSON that can be read ({str(error)[:200]})") from None
    except OSError as error:
        raise RequestError(f"{file} cannot be read ({error.strerror})") from None


def _begins_like_labelme(file: Path) -> bool:
    """By its first part: these are thousands of files, with pictures in them."""
    try:
        with file.open("rb") as handle:
            start = handle.read(4096)
    except OSError:
        return False
    return b'"shapes"' in start or b'"imagePath"' in start or (b'"flags"' in start and b'"version"' in start)


def read_names(file: Path) -> dict[str, str]:
    """Phrase in lower case → its translation, from lines ``name<TAB>translation``; a first line of headings is passed over.

    Raises:
        RequestError: a line is something else, or a name stands twice with two translations.
    """
    found: dict[str, str] = {}
    with TextFile(file, AUTO) as text:
        for line, content in text.lines():
            cells = [cell.strip() for cell in content.split("\t")] if isinstance(content, str) else []
            if len(cells) != 2 or not all(cells):
                raise RequestError(f"{file}:{line}: {content!r:.80} is not name<TAB>translation")
            name, translation = cells[0].casefold(), cells[1]
            if not found and line == 1 and name in _HEADS:
                continue
            if found.setdefault(name, translation) != translation:
                raise RequestError(f"{file}:{line}: {cells[0]!r} stands for {found[name]!r} and {translation!r}")
    if not found:
        raise RequestError(f"{file} is empty: a line is name<TAB>translation")
    return found
