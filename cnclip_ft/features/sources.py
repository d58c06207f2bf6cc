"""What can be encoded: a store, a folder of images, a file of texts."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cnclip_ft.features.encode import SplitTexts, read_texts
from data_tools.annotations import check_id, check_text, parse_json
from data_tools.errors import DataFault, RequestError
from data_tools.items import located
from data_tools.shards import is_pairs, open_pairs
from data_tools.store import PairSource, is_store, stores_below
from data_tools.text_files import TextFile
from data_tools.walk import walk


@dataclass
class Source:
    """Images and texts to encode. `read` gives an image's bytes or path; `checksum` tells this content from another.

    `notes` say what was passed over.
    """

    name: str
    path: Path
    kind: str  # "store" | "images" | "texts"
    split: SplitTexts
    read: Callable[[Any], Any]  # never called for texts: they have no images
    checksum: str
    notes: list[str] = field(default_factory=list)


class FolderReader:
    """Image id (path below the folder, with forward slashes) → path. A class, so that workers can be sent it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, image_id: str) -> Path:
        return self.folder / image_id


def open_source(path: str | Path) -> Source:
    """A SPLIT argument → what to encode.

    Raises:
        RequestError: nothing there can be encoded.
        DataFault: a line of the text file is broken.
    """
    path = Path(path)
    if is_store(path):
        return store_source(path)
    if path.is_dir():
        found = walk(path)
        if found.pictures:
            listing = "\n".join(f"{name}\t{size}\t{changed}" for name, size, changed in found.pictures)
            return Source(
                path.resolve().name,
                path,
                "images",
                SplitTexts(list[int | str](found.names()), [], [], [], torch.empty(0, 2, dtype=torch.int64)),
                FolderReader(path),
                hashlib.sha256(listing.encode("utf-8", "surrogateescape")).hexdigest(),
                found.lines(),
            )
        if is_pairs(path) or stores_below(path):
            return store_source(path)  # which names the splits to choose from
        raise RequestError(
            f"{path} is neither a store (see `cnclip-ft data build`) nor a folder with images: {found.nothing()}"
        )
    if is_pairs(path):
        return store_source(path)
    if path.is_file():
        split = SplitTexts([], *_read_text_file(path), torch.empty(0, 2, dtype=torch.int64))
        return Source(
            path.stem, path, "texts", split, FolderReader(path.parent), hashlib.sha256(path.read_bytes()).hexdigest()
        )
    raise RequestError(f"{path}: no such store, folder or file")


def store_source(path: str | Path) -> Source:
    """A store, or shards, and nothing else; with the texts that an official one has no place for, where their file lies beside it.

    Raises:
        RequestError: it is not a store.
        DataFault: a line of that file is broken.
    """
    store = open_pairs(path)
    split, checksum = read_texts(store), store.checksum()
    file = _official_texts(store)
    if file is not None:
        known, before = set(split.text_ids), len(split.texts)
        for text_id, text, language in zip(*_read_text_file(file), strict=True):
            if text_id not in known:
                split.text_ids.append(text_id)
                split.texts.append(text)
                split.languages.append(language)
        lone = repr(list(zip(split.text_ids[before:], split.texts[before:], strict=True)))
        checksum = hashlib.sha256((checksum + lone).encode()).hexdigest() if len(split.texts) > before else checksum
    return Source(store.name, Path(path), "store", split, store.image, checksum, store.notes)


def _official_texts(store: PairSource) -> Path | None:
    """``<set>/<split>_texts.jsonl`` of ``<set>/lmdb/<split>`` as the official script writes it: pairs alone, so that texts whose
    picture is not told (MUGE's test split) are in the file only."""
    place = store.path.resolve()
    file = place.parent.parent / f"{place.name}_texts.jsonl"
    return file if "foreign" in store.about and place.parent.name == "lmdb" and file.is_file() else None


def _read_text_file(path: Path) -> tuple[list[Any], list[str], list[str | None]]:
    """``.jsonl``: `text` and, where there, `text_id` and `language`; anything else: one text a line, numbered from 0."""
    ids: list[Any] = []
    texts: list[str] = []
    languages: list[str | None] = []
    with TextFile(path, None) as file:
        for number, line in file.lines():
            try:
                if isinstance(line, DataFault):
                    raise line
                value = {"text": line.strip()} if path.suffix.lower() != ".jsonl" else parse_json(line)
                if not isinstance(value, dict) or "text" not in value:
                    raise DataFault(
                        "the line is not a JSON object with a 'text'",
                        kind="bad-json",
                        mend='Write {"text_id": …, "text": "…"} on each line.',
                    )
                texts.append(check_text(value["text"]))
                ids.append(check_id(value.get("text_id", len(ids)), "text_id"))
                languages.append(value.get("language"))
            except DataFault as fault:
                raise located(fault, path, number) from None
    if not texts:
        raise RequestError(f"{path} holds no texts")
    if len(set(ids)) != len(ids):
        repeated = next(name for name, times in Counter(ids).items() if times > 1)
        raise DataFault(
            f"text id {repeated!r} stands on several lines",
            mend="Give each text its own id.",
            kind="duplicate-id",
            file=path,
        )
    return ids, texts, languages
