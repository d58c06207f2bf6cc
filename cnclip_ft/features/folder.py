"""A folder of features: filled in blocks that survive an interruption, read memory-mapped.

::

    faults.jsonl             a line for every picture that was left out, where there are any
    features.json            format, dim, dtype, counts, and every setting they were made with
    image_features.npy       [images, dim]      image_ids.jsonl   an id a line, in the same order
    text_features.npy        [texts, dim]       texts.jsonl       {"text_id", "text", "image_ids"[, "language"]} a line

While it is being written, its arrays lie in ``parts/`` (`features.rows`) beside a plan that says what they belong to.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cnclip_ft.features.encode import SplitFeatures, SplitTexts
from cnclip_ft.features.official_files import IdFeatures, parse_json, write_json, write_text
from cnclip_ft.features.rows import Rows
from data_tools.atomic import LEFTOVER
from data_tools.errors import RequestError, UserError
from data_tools.faults import FILE_NAME
from data_tools.outputs import FolderKind, folder_with
from data_tools.scratch import real_place

FORMAT = 1
INFO = "features.json"
PART = {"image": 4096, "text": 65536}  # items a block: what an interruption can cost
FAULTS = FILE_NAME
_IDS = {"image_features.npy": ("image", "image_ids.jsonl"), "text_features.npy": ("text", "texts.jsonl")}


_FINISHED = folder_with(INFO, "format", "dim", "settings")
_BEGUN = folder_with("parts/plan.json", "format", "part", "settings")


def _is_ours(folder: Path) -> bool:
    return _FINISHED(folder) or _BEGUN(folder)


_ROW_FILES = r"(image|text)_((features|done)\.(npy|new)|damaged-block-\d+\.jsonl)|cnclip-ft\.lock"
_OLD_FILES = r"(image|text)-\d{6}(\.npy|\.faults\.jsonl|\.\d+\.writing)|plan\.json\.writing"  # of version 0.1.0
_PART_FILES = rf"plan\.json|{_ROW_FILES}|{_OLD_FILES}|{LEFTOVER}"
_PARTS = FolderKind("folder of parts", lambda folder: _is_ours(folder.parent), re.compile(_PART_FILES))
FEATURES = FolderKind(
    "folder of features",
    _is_ours,
    re.compile(
        rf"{re.escape(INFO)}|(image|text)_features\.npy|image_ids\.jsonl|texts\.jsonl|faults\.jsonl|[^/]+\.(img|txt)_feat\.jsonl|{LEFTOVER}"
        r"|(features\.json|image_ids\.jsonl|texts\.jsonl|(image|text)_features\.npy)\.writing"
        rf"|parts/({_PART_FILES})"
    ),
)


class FeatureWriter:
    """Rows in, a finished folder out (module docstring).

    Args:
        settings: what the features depend on. Those of other settings are never mixed in.
        dim: values of a feature.
        renew: what is there of another request is replaced; what is finished of this one is taken (`finished`).
        main: whether this process makes the folder; the others wait until it has.

    Attributes:
        rows: what is to be filled: ``image``, ``text``, or both.

    Raises:
        RequestError: the folder holds finished features, or the beginning of another request, and `overwrite` is off.
        UserError: the disk has no room for them.
    """

    def __init__(
        self,
        folder: str | Path,
        split: SplitTexts,
        settings: dict[str, Any],
        *,
        dim: int,
        half: bool,
        overwrite: bool = False,
        renew: bool = False,
        main: bool = True,
    ) -> None:
        self.folder, self.split, self.settings, self.dim = Path(folder), split, settings, dim
        self.dtype = np.dtype(np.float16 if half else np.float32)
        self.parts_folder = self.folder / "parts"
        counts = {"image": len(split.image_ids), "text": len(split.text_ids)}
        self.rows = {
            kind: Rows(self.parts_folder, count, PART[kind], dtype=self.dtype, name=f"{kind}_")
            for kind, count in counts.items()
            if count
        }
        self._digest = rows_digest(split)
        if main and not (renew and self.finished):
            self._prepare(overwrite or (renew and not self._begun))
            for rows in self.rows.values():
                rows.create(dim)
            self._take_old_parts()

    @property
    def finished(self) -> bool:
        """Whether the folder holds whole features of this very request."""
        file = self.folder / INFO
        return file.is_file() and parse_json(file.read_bytes()).items() >= self._plan().items()

    @property
    def _begun(self) -> bool:
        file = self.parts_folder / "plan.json"
        return file.is_file() and parse_json(file.read_bytes()) == self._plan()

    def _prepare(self, overwrite: bool) -> None:
        plan = self._plan()
        FEATURES.refuse_other(self.folder)
        if overwrite and self.folder.is_dir():
            FEATURES.clear(real_place(self.folder), first=INFO)
        if (self.folder / INFO).exists():
            raise RequestError(f"{self.folder} holds finished features; choose another --output or say --overwrite")
        if (self.parts_folder / "plan.json").exists():
            if not self._begun:
                raise RequestError(
                    f"{self.folder} holds the beginning of another request (other weights, data or settings); "
                    "choose another --output or say --overwrite"
                )
            return
        try:
            (real_place(self.folder) / "parts").mkdir(
                parents=True, exist_ok=True
            )  # a link may lead to what was cleared
        except OSError as error:
            raise RequestError(f"{self.folder} cannot be written ({error.strerror}); choose another --output") from None
        write_json(self.parts_folder / "plan.json", plan)

    def _plan(self) -> dict[str, Any]:
        plan = {
            "format": FORMAT, "dtype": self.dtype.name, "images": len(self.split.image_ids),
            "texts": len(self.split.text_ids), "part": PART, "settings": self.settings,
            "rows": self._digest,
        }  # fmt: skip
        return parse_json(json.dumps(plan))  # as it will be read again: tuples become lists

    def _take_old_parts(self) -> None:
        """Version 0.1.0 wrote a file for each block."""
        for kind, rows in self.rows.items():
            for block in rows.missing():
                file = self.parts_folder / f"{kind}-{block.number:06d}.npy"
                told = file.with_suffix(".faults.jsonl")
                with suppress(OSError, ValueError, EOFError):  # not whole: computed again
                    features = np.load(file)
                    if features.shape != (len(block), self.dim):
                        continue
                    rows.write(block, features, dict(map(parse_json, _read(told))) if told.exists() else None)
                    file.unlink()

    def finish(self, extra: dict[str, Any]) -> dict[int, dict[str, Any]]:
        """Put the arrays in their place; the folder counts as finished from the moment `features.json` is there.

        Gives the pictures that were left out: position among the image ids → fault.
        """
        faults = self.rows["image"].faults() if "image" in self.rows else {}
        image_ids = [image_id for at, image_id in enumerate(self.split.image_ids) if at not in faults]
        if faults and not image_ids:
            raise UserError(f"none of the {len(faults):,} pictures can be used; the first: {faults[0]['problem']}")
        for kind, rows in self.rows.items():
            rows.finish(self.folder / f"{kind}_features.npy", faults if kind == "image" else ())
        if image_ids:
            write_text(self.folder / "image_ids.jsonl", map(json.dumps, image_ids))
        if faults:
            write_text(self.folder / FAULTS, (json.dumps(fault) for fault in faults.values()))
        if self.split.text_ids:
            write_text(self.folder / "texts.jsonl", text_lines(self.split))
        counts = {"images": len(image_ids), "left_out": len(faults)}
        write_json(self.folder / INFO, self._plan() | counts | {"dim": self.dim if self.rows else 0} | extra)
        _PARTS.clear(self.parts_folder)
        return faults


def rows_digest(split: SplitTexts) -> str:
    """sha256 over which image and which text stands in which row: a source's checksum may not tell its order."""
    digest = hashlib.sha256(json.dumps(split.image_ids).encode())
    for text_id, text in zip(split.text_ids, split.texts, strict=True):
        digest.update(f"\n{json.dumps(text_id)} {json.dumps(text)}".encode())
    return digest.hexdigest()


def text_lines(split: SplitTexts) -> Iterator[str]:
    """The split's texts in the official answers format, with their languages where known."""
    images: list[list[Any]] = [[] for _ in split.text_ids]
    for image, text in split.positives.tolist():
        images[text].append(split.image_ids[image])
    for text_id, text, language, ids in zip(split.text_ids, split.texts, split.languages, images, strict=True):
        line = {"text_id": text_id, "text": text, "image_ids": ids}
        yield json.dumps(line | ({"language": language} if language else {}), ensure_ascii=False)


def is_feature_folder(path: str | Path) -> bool:
    return (Path(path) / INFO).is_file()


def read_info(folder: str | Path) -> dict[str, Any]:
    """`features.json`.

    Raises:
        RequestError: the folder holds no finished features.
    """
    path = Path(folder) / INFO
    try:
        info = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        unfinished = (Path(folder) / "parts" / "plan.json").exists()
        hint = "they are unfinished: give the `encode` command again" if unfinished else f"{error}"
        raise RequestError(f"{folder} holds no finished features ({hint})") from None
    if info.get("format") != FORMAT:
        raise RequestError(
            f"{path}: format {info.get('format')!r} is not known here (known: {FORMAT}); use a newer cnclip-ft"
        )
    return info


def _map(path: Path) -> torch.Tensor:
    # Copy on write: torch wants memory it may write to; nothing here does.
    return torch.from_numpy(np.load(path, mmap_mode="c"))


def mapped(folder: str | Path) -> tuple[torch.Tensor, torch.Tensor]:
    """The features of images and of texts, without their ids; they stay on disk until they are used."""
    return _map(Path(folder) / "image_features.npy"), _map(Path(folder) / "text_features.npy")


def read_split(folder: str | Path) -> SplitFeatures:
    """The folder as a split; features stay on disk until they are used.

    Raises:
        RequestError: not finished, or without images or texts.
    """
    folder = Path(folder)
    read_info(folder)
    missing = [name for name in _IDS if not (folder / name).is_file()]
    if missing:
        raise RequestError(
            f"{folder} has no {missing[0]}: recall needs images and texts. Encode a store, which has both"
        )
    images, texts = mapped(folder)
    image_ids = [parse_json(line) for line in _read(folder / "image_ids.jsonl")]
    lines = [parse_json(line) for line in _read(folder / "texts.jsonl")]
    at = {image_id: number for number, image_id in enumerate(image_ids)}
    pairs = [
        (at[image_id], number) for number, line in enumerate(lines) for image_id in line["image_ids"] if image_id in at
    ]
    return SplitFeatures(
        image_ids=image_ids,
        text_ids=[line["text_id"] for line in lines],
        texts=[line["text"] for line in lines],
        languages=[line.get("language") for line in lines],
        positives=torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2),
        image_features=images,
        text_features=texts,
    )


def _read(path: Path) -> list[bytes]:
    return [line for line in path.read_bytes().split(b"\n") if line]


def read_set(path: str | Path, kind: str) -> IdFeatures:
    """One set of features for a search: an official JSONL, one of the folder's ``.npy``, or any ``.npy`` ``[n, dim]``.

    Ids of a foreign ``x.npy`` stand in ``x.ids.jsonl`` (an id a line); without it rows are numbered from 0 and
    `kind` says what they are.

    Raises:
        RequestError: not such a file, or ids and rows differ in number.
        DataFault: a broken line of a JSONL.
    """
    from cnclip_ft.features.official_files import read_features

    path = Path(path)
    if path.is_dir() and (path / f"{kind}_features.npy").is_file():
        path = path / f"{kind}_features.npy"
    if not path.is_file():
        raise RequestError(
            f"{path}: no such file; give a .npy, a .jsonl of features, or a folder written by `cnclip-ft encode`"
        )
    if path.suffix != ".npy":
        return read_features(path)
    try:
        features = _map(path)
    except (ValueError, TypeError, OSError) as error:
        raise RequestError(f"{path} is not a readable .npy of numbers ({error})") from None
    if features.ndim != 2 or not features.is_floating_point():
        raise RequestError(f"{path} is {features.dtype} {list(features.shape)}; expected floats [n, dim]")
    own_kind, ids_name = _IDS.get(path.name, (kind, f"{path.stem}.ids.jsonl"))
    ids: Sequence[Any] = range(len(features))
    ids_file = path.with_name(ids_name)
    if ids_file.is_file():
        values = [parse_json(line) for line in _read(ids_file)]
        ids = [value["text_id"] if isinstance(value, dict) else value for value in values]
    if len(ids) != len(features):
        raise RequestError(f"{ids_file} names {len(ids):,} ids for {len(features):,} rows of {path.name}")
    return IdFeatures(own_kind, list(ids), features)
