"""One import into several stores: pictures are dealt over the splits, like ones together, texts follow their pictures.

Everything is imported once into a store beside the output; its pictures are compared (`alike`), dealt, and each split is
built from it. With stores that are there already (`--append`) a picture like one of theirs goes where that one is.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_tools import alike
from data_tools.appending import append_to
from data_tools.atomic import whole_file
from data_tools.build import BuildReport, build_store
from data_tools.errors import DataFault, RequestError
from data_tools.faults import FILE_NAME
from data_tools.items import Source
from data_tools.scratch import Scratch, real_place
from data_tools.sources.joined import Joined
from data_tools.sources.stored import StoreSource
from data_tools.store import Id, PairStore, is_store, open_store, stores_below
from data_tools.words import many

NAMES = ("train", "valid", "test")
_DEALT = "dealt.json"  # in the working folder: a part may be in its place already when the others are gone on with
_WORDS = {
    "validation": "valid",
    "val": "valid",
    "dev": "valid",
    "restval": "train",
    "training": "train",
    "testing": "test",
    "训练": "train",
    "训练集": "train",
    "验证": "valid",
    "验证集": "valid",
    "测试": "test",
    "测试集": "test",
}


@dataclass(frozen=True)
class Shares:
    """How much of the pictures each split gets: ``0.8,0.1,0.1`` is train, valid, test; ``train=0.9,test=0.1`` names them."""

    sizes: Mapping[str, float]
    seed: int = 0

    @classmethod
    def parse(cls, given: str, seed: int = 0) -> Shares:
        """Raises:
        RequestError: no shares, or they do not add up to 1.
        """
        words = [word.strip() for word in given.split(",") if word.strip()]
        try:
            named = ["=" in word for word in words]
            if not 2 <= len(words) or (not any(named) and len(words) > len(NAMES)) or any(named) != all(named):
                raise ValueError
            pairs = [word.split("=", 1) for word in words] if any(named) else list(zip(NAMES, words, strict=False))
            sizes = {name.strip(): float(share) for name, share in pairs}
            if len(sizes) < len(words) or any(not 0 < share < 1 for share in sizes.values()):
                raise ValueError
        except ValueError:
            raise RequestError(
                f"--split {given!r}: write 0.9,0.1 (train, valid), 0.8,0.1,0.1 (train, valid, test) or train=0.9,test=0.1"
            ) from None
        if abs(sum(sizes.values()) - 1) > 1e-6:
            raise RequestError(f"--split {given!r}: the shares add up to {sum(sizes.values()):g}, not to 1")
        _check_names(sizes)
        return cls(sizes, seed)


def _check_names(names: Mapping[str, Any]) -> None:
    for name in names:
        if not name or name in (".", "..") or any(mark in name for mark in "/\\\0"):
            raise RequestError(f"{name!r} is no name of a split; it becomes the name of a folder")


def build_splits(
    source: Source,
    output: Path,
    how: Shares | str,
    *,
    append: bool = False,
    update_columns: bool = False,
    layout: str = "plain",
    shard_size: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    workers: int = 0,
    progress: bool = True,
    **options: Any,
) -> list[str]:
    """Import `source` into ``output/<split>``.

    Args:
        how: shares, or the name of a kept column that says each picture's split.
        append: to the stores that are there; else they must not be, or `overwrite`. update_columns: as `append_to`.
        options: of `build_store`, for what is read.

    Returns:
        What was done, in lines for people.

    Raises:
        RequestError, DataFault, UserError: as `build_store`; or pictures without a split.
    """
    if is_store(output):
        raise RequestError(
            f"{output} is a store itself; --split makes a folder with a store for each part. Choose another --output"
        )
    scratch = Scratch(real_place(output), "splitting", "importing into these splits")
    keep = False
    try:
        if not resume:
            scratch.clear()
        old = {path.name: open_store(path) for path in stores_below(output)} if append else {}
        settings = source.fingerprint() | {"split": [how if isinstance(how, str) else [dict(how.sizes), how.seed]]}
        asked = json.loads(json.dumps([settings, repr(options)]))
        before = _read_dealt(scratch.folder / _DEALT, asked) if resume else {}
        after = before.get("after", max((_largest_number(store) for store in old.values()), default=0))
        imported = scratch.folder / "all"
        again = imported.exists() and not resume
        whole = build_store(
            Joined([source], after),
            imported,
            resume=resume,
            overwrite=again or resume,
            workers=workers,
            progress=progress,
            **options,
        )
        store = whole.store
        lines = [
            f"{output}: {many(whole.images, 'image')}, {many(whole.texts, 'text')}, {many(whole.pairs, 'pair')} {'came' if old else 'in all'}",
            *whole.lines()[1:],
        ]
        lines = [line.replace(str(imported / FILE_NAME), str(output / "…" / FILE_NAME)) for line in lines]
        if isinstance(how, Shares):
            if before.get("generation") == store.generation:
                parts, said = dict(zip(store.image_ids, before["parts"], strict=True)), before["said"]
            else:
                parts, said = _deal(store, old, how, workers, progress)
            lines.append(said)
        else:
            parts = _by_column(store, how)
        dealt = set(parts.values())
        known = how.sizes if isinstance(how, Shares) else [name for name in NAMES if name in dealt]
        names = list(dict.fromkeys([*known, *parts.values()]))
        empty = [name for name in names if name not in dealt and name not in old]
        if empty:
            raise RequestError(f"{store.image_count:,} pictures are too few: nothing is left for {', '.join(empty)}")
        faults = [imported / FILE_NAME] if (imported / FILE_NAME).is_file() else []
        if isinstance(how, Shares):
            with whole_file(scratch.folder / _DEALT, "w") as file:
                note = {"asked": asked, "after": after, "generation": store.generation, "said": said}
                note["parts"] = [parts[image_id] for image_id in store.image_ids]
                json.dump(note, file, ensure_ascii=False)
        for number, name in enumerate(names):
            report = _build_part(
                imported,
                output / name,
                name,
                parts,
                settings,
                number == 0,
                faults if number == 0 else [],
                {"update_columns": update_columns} if name in old else None,
                layout=layout,
                shard_size=shard_size,
                resume=resume,
                overwrite=overwrite,
                progress=progress,
            )
            lines += [line for line in report.lines() if not line.startswith("  read ")]
        if faults:
            lines = [line.replace(str(output / "…" / FILE_NAME), str(output / names[0] / FILE_NAME)) for line in lines]
        return lines
    except BaseException as error:
        # What can be gone on with stays: after Ctrl-C, on a full disk, where --continue was asked with another flag.
        keep = not isinstance(error, (DataFault, RequestError)) or (resume and isinstance(error, RequestError))
        raise
    finally:
        scratch.release() if keep else scratch.remove()


def _build_part(
    imported: Path,
    target: Path,
    name: str,
    parts: Mapping[Id, str],
    settings: dict[str, Any],
    lone: bool,
    faults: Sequence[Path],
    append: dict[str, Any] | None,
    **options: Any,
) -> BuildReport:
    part = StoreSource(imported, keep=lambda image_id: parts[image_id] == name, lone=lone, part=[name, settings])
    if append is None:
        return build_store(part, target, faults_before=faults, **options)
    return append_to(part, target, faults_before=faults, **append, **options)


def _read_dealt(file: Path, asked: Any) -> dict[str, Any]:
    """What an interrupted import of the same had dealt; empty: nothing."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if found["asked"] == asked else {}


def _largest_number(store: PairStore) -> int:
    return max((text_id for _, text_id, _ in store.texts() if isinstance(text_id, int)), default=0)


def _by_column(store: PairStore, column: str) -> dict[Id, str]:
    if column not in store.columns:
        there = ", ".join(store.columns) or "none"
        raise RequestError(f"--split-column {column!r}: no such column; beside picture and text there are {there}")
    found = {image_id: str(store.columns_of(image_id).get(column, "")).strip() for image_id in store.image_ids}
    without = [image_id for image_id, name in found.items() if not name]
    if without:
        raise DataFault(
            f"{len(without):,} pictures have no value in column {column!r} (the first: {without[0]!r})",
            mend="Fill it, or deal them with --split 0.8,0.1,0.1.",
            kind="no-split",
        )
    parts = {image_id: _WORDS.get(name.casefold(), name) for image_id, name in found.items()}
    names = Counter(parts.values())
    _check_names(names)
    if len(names) > 20:
        raise RequestError(f"--split-column {column!r} has {len(names):,} values; it names a split for each picture")
    return parts


def _deal(
    store: PairStore, old: Mapping[str, PairStore], shares: Shares, workers: int, progress: bool
) -> tuple[dict[Id, str], str]:
    """Image id → split, and what is to be said."""
    found = [alike.copies_of(one, workers, progress) for one in (*old.values(), store)]
    copies, contents = (np.concatenate(part) for part in zip(*found, strict=True))
    groups = alike.group(copies, contents)
    names, fixed, at = list(shares.sizes), dict[int, str](), 0
    for name, one in old.items():
        for number in groups[at : at + one.image_count].tolist():
            fixed.setdefault(number, name)
        at += one.image_count
    own = groups[at:]
    drawn = dict(fixed)
    sizes, least = Counter(own.tolist()), dict[int, int]()
    for number, content in zip(own.tolist(), contents[at:].tolist(), strict=True):
        least[number] = min(content, least.get(number, content))
    free = [number for number in sizes if number not in fixed]
    # By content and seed alone, so that neither names nor the order of rows matter; crowds first, single pictures even it out.
    free.sort(
        key=lambda number: (
            -sizes[number],
            hashlib.blake2b(f"{shares.seed} {least[number]}".encode(), digest_size=8).digest(),
        )
    )
    total = sum(sizes[number] for number in free)
    left = {name: shares.sizes[name] * total for name in names}
    for number in free:
        name = max(names, key=lambda name: left[name] / shares.sizes[name])
        drawn[number] = name
        left[name] -= sizes[number]
    like = [count for count in sizes.values() if count > 1]
    said = (
        f"  {sum(like):,} pictures are like others, in {len(like):,} groups: each group is in one split"
        if like
        else "  no two pictures are alike"
    )
    pinned = sum(sizes[number] for number in sizes if number in fixed)
    if old:
        said += f"; {pinned:,} are like pictures that are there, and go where those are"
    return {image_id: drawn[number] for image_id, number in zip(store.image_ids, own.tolist(), strict=True)}, said
