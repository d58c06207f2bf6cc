"""A store in another form (`forms`): written beside the output, read back by the importer of that form, compared, put in place."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_tools.atomic import sync_file
from data_tools.bars import Bar
from data_tools.columns import refuse_unknown
from data_tools.errors import DataFault, RequestError, UserError
from data_tools.forms import FORMS, Exported, Form
from data_tools.items import ImageItem
from data_tools.outputs import EMPTY, refuse_overlap
from data_tools.scratch import Scratch, real_place
from data_tools.selection import Selection
from data_tools.shards import open_pairs
from data_tools.store import Id, PairSource
from data_tools.store.beside import beside_json
from data_tools.store.layouts import Value

_OURS = ("image_id", "captions", "language", "text", "file_name", "image")  # fields that no kept column may be called


def export_store(
    path: Path,
    output: Path,
    to: str,
    *,
    chosen: Selection | None = None,
    shard_size: int | None = None,
    progress: bool = True,
) -> Exported:
    """Write the store `path`, or a part of it, to the new folder `output` in form `to`.

    Args:
        shard_size: pictures in a tar or Parquet file (5,000), or in a shard of a store (none: one piece).

    Raises:
        RequestError: an unknown form, an output that is there, or a part that is empty.
        UserError: it reads back differently, or the disk is full; nothing is at `output` then.
    """
    chosen = chosen or Selection()
    if to not in FORMS:
        raise RequestError(f"--to {to!r}: one of {', '.join(FORMS)}")
    refuse_overlap(output, [path])
    store = open_pairs(path)
    chosen.where.check(store.columns, path)
    refuse_unknown(chosen.columns or (), store.columns, path)
    form = FORMS[to]
    clashing = [name for name in chosen.names(store) if name in _OURS]
    if clashing and not form.alone:
        raise RequestError(
            f"the kept column {clashing[0]!r} is called like a field of this form; leave it out with --keep-columns"
        )
    EMPTY.refuse_other(output)
    scratch = Scratch(real_place(output), "exporting", "writing this export")
    try:
        scratch.clear()
        folder = scratch.folder / "new"
        folder.mkdir()
        done = form.write(store, chosen, folder, shard_size, progress)
        if store.beside_counts and not form.beside:
            listed = ", ".join(f"{name} {count:,}" for name, count in store.beside_counts.items() if count)
            done.notes.append(
                f"this form has no place for what stands beside texts ({listed}); store and official have"
            )
        _compare(store, chosen, form, folder, progress)
        for file in folder.rglob("*"):
            if file.is_file():
                sync_file(file)
        EMPTY.refuse_other(output)  # hours may have gone by
        scratch.swap_in(folder, EMPTY)
        return done
    except OSError as error:
        raise UserError(
            f"{output} cannot be written ({error.strerror or error}). Free some space or choose another place."
        ) from None
    finally:
        scratch.remove()


def _compare(store: PairSource, chosen: Selection, form: Form, folder: Path, progress: bool) -> None:
    """Read the export back and compare what it holds with what was to be in it, in any order, by sums of hashes.

    Raises:
        UserError: something differs.
    """

    def picture(own: bytes, kept: Mapping[str, Value]) -> int:
        said = sorted((name, str(value)) for name, value in kept.items() if form.columns and name not in _OURS)
        return _sum(own + json.dumps(said).encode())

    def text(own: bytes, said: str, beside: Mapping[str, Any] | None) -> int:
        more = beside_json(beside) if form.beside and beside else ""
        return _sum(own + said.encode() + more.encode())

    wanted, known = [0, 0], dict[Id, bytes]()
    for image_id in chosen.pictures(store, not form.alone or bool(chosen.languages)):
        known[image_id] = hashlib.sha256(store.image(image_id)).digest()
        wanted[0] += picture(known[image_id], chosen.columns_of(store, image_id))
    for pair, beside in store.pairs_and_beside():
        if pair.image_id in known and chosen.keeps_pair(pair):
            wanted[1] += text(known[pair.image_id], pair.text, beside)
    for _, lone, _ in store.lone_texts if form.alone and chosen.whole else ():
        wanted[1] += text(b"", lone, None)
    there, hashes = [0, 0], dict[Id, bytes]()
    stream = form.read(folder).open()
    for item in Bar(stream.items, desc="reading back", unit="item", shown=progress, delay=1.0):
        if isinstance(item, DataFault):
            raise UserError(f"the export reads back with a fault ({item}); the disk may be failing")
        if isinstance(item, ImageItem):
            hashes[item.image_id] = hashlib.sha256(item.read()).digest()
            there[0] += picture(hashes[item.image_id], item.columns or {})
        else:
            for own in [hashes[image_id] for image_id in item.image_ids] or [b""]:
                there[1] += text(own, item.text, item.beside)
    if wanted != there:
        what = " and ".join(name for name, a, b in zip(("pictures", "texts"), wanted, there, strict=True) if a != b)
        raise UserError(
            f"the {what} of the export read back differently; the disk may be failing. Nothing was put in place"
        )


def _sum(data: bytes) -> int:
    return int.from_bytes(hashlib.sha256(data).digest(), "big")
