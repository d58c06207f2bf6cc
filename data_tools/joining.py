"""`data join`: a description over stores that are one data set, and what has to be true of them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from data_tools.atomic import whole_file
from data_tools.bars import Bar
from data_tools.errors import RequestError
from data_tools.outputs import refuse_overlap
from data_tools.store import PairStore, open_store
from data_tools.store.joined import ENDINGS, FORMAT, JoinedStores, is_joined, shared_ids
from data_tools.words import many

_NAMED = 5


def join(places: Sequence[str | Path], output: str | Path, *, overwrite: bool = False) -> tuple[PairStore, list[str]]:
    """Write the description `output` over stores, and read it back; with it what is to be said.

    Parts that `--part` made have to be all of one source, each once. Others have to hold no id that means two things.

    Raises:
        RequestError: they are no data set, or the place is taken.
        DataFault: a store is damaged.
    """
    output = Path(output)
    if output.suffix.lower() not in ENDINGS:
        raise RequestError(f"--output {output}: the description is a file that ends in {', '.join(ENDINGS)}")
    if os.path.lexists(output) and not (overwrite and is_joined(output)):
        hint = "; replace it with --overwrite" if is_joined(output) else " and is no description over stores"
        raise RequestError(f"{output} is there{hint}")
    refuse_overlap(output, list(places), inside=False)
    stores = [open_store(place) for place in places]
    joined = next((store for store in stores if isinstance(store, JoinedStores)), None)
    if joined is not None:
        raise RequestError(f"{joined.path} is a description over stores itself; name the stores that it names")
    twice = _twice([store.path.resolve() for store in stores])
    if twice:
        raise RequestError(f"{stores[twice[1]].path} stands twice; name every store once")
    stores, dealt = _in_order(stores)
    shared = 0 if dealt else _shared_pictures(stores)
    if not dealt:
        _refuse_other_texts(stores)
    content = {
        "joined": FORMAT,
        "stores": [
            {
                "path": Path(os.path.relpath(store.path.resolve(), output.resolve().parent)).as_posix(),
                "generation": store.generation,
                "pairs": len(store),
                "images": store.image_count,
            }
            for store in stores
        ],
        "shared": shared,
    }
    with whole_file(output, "w", advice="Choose another --output.") as file:
        yaml.safe_dump(content, file, sort_keys=False, allow_unicode=True)
    found = open_store(output)
    lines = [f"{output}: {many(len(stores), 'store')}, {many(found.image_count, 'image')}, {many(len(found), 'pair')}"]
    if shared:
        lines.append(f"  {many(shared, 'picture')} in more than one of them, each is one picture")
    return found, lines


def _twice(values: Sequence[object]) -> list[int]:
    """Places of the first two that are equal; none."""
    seen: dict[object, int] = {}
    for place, value in enumerate(values):
        if value in seen:
            return [seen[value], place]
        seen[value] = place
    return []


def _in_order(stores: list[PairStore]) -> tuple[list[PairStore], bool]:
    """Parts by their numbers, and whether they were dealt by pictures: then no id can be in two."""
    parts: list[dict[str, Any]] = [store.about.get("part") or {} for store in stores]
    if not any(parts):
        return stores, False
    whole = next((store for store, part in zip(stores, parts, strict=True) if not part), None)
    if whole is not None:
        raise RequestError(
            f"{whole.path} is no part of anything, others are; join either parts of one source or whole stores"
        )
    if len({(part["source"], part["of"], part["by"]) for part in parts}) > 1:
        other = next(
            n for n, part in enumerate(parts) if part["source"] != parts[0]["source"] or part["of"] != parts[0]["of"]
        )
        raise RequestError(
            f"{stores[other].path} is part {parts[other]['number']}/{parts[other]['of']} of another source than {stores[0].path} "
            f"({parts[0]['number']}/{parts[0]['of']}), or of one that changed meanwhile (files are told by name and size)"
        )
    numbers, of = [part["number"] for part in parts], parts[0]["of"]
    twice = _twice(numbers)
    if twice:
        first, second = (stores[place].path for place in twice)
        raise RequestError(f"{first} and {second} are both part {numbers[twice[0]]}/{of}; name every part once")
    missing = sorted({*range(1, of + 1)} - {*numbers})
    if missing:
        named = ", ".join(f"{number}/{of}" for number in missing[:_NAMED]) + (", …" if len(missing) > _NAMED else "")
        raise RequestError(
            f"{many(len(missing), 'part')} of {of} are missing: {named}; build them with --part and name them too"
        )
    ordered = [store for _, store in sorted(zip(numbers, stores, strict=True), key=lambda each: each[0])]
    return ordered, parts[0]["by"] == "pictures"


def _shared_pictures(stores: list[PairStore]) -> int:
    """How many pictures lie in several stores under one id.

    Raises:
        RequestError: an id is another picture in another store.
    """
    shared = 0
    for image_id, numbers in shared_ids([store.image_ids for store in stores]):
        first, *others = (stores[number] for number in numbers)
        for other in others:
            if other.image(image_id) != first.image(image_id):
                raise RequestError(
                    f"image {image_id!r} of {other.path} is another picture than in {first.path}: one data set needs one id a "
                    "picture. Train on them as a list (data.train: [A, B]), where ids of several stores never meet; or give "
                    "ids of their own (--image-id-column)"
                )
        shared += 1
    return shared


def _refuse_other_texts(stores: list[PairStore]) -> None:
    """Refuse an id that is another text in another store; 16 bytes a pair."""
    total = sum(map(len, stores)) + sum(len(store.lone_texts) for store in stores)
    ids, both, at = np.empty(total, np.uint64), np.empty(total, np.uint64), 0
    with Bar(total=total, desc="texts", unit=" texts", delay=2.0) as bar:
        for store in stores:
            for _, text_id, text in store.texts():
                ids[at], both[at] = _hash(repr(text_id)), _hash(f"{text_id!r} {text}")
                at += 1
            bar.update(len(store))
    order = np.lexsort((both, ids))
    ids, both = ids[order], both[order]
    unlike = np.flatnonzero((ids[1:] == ids[:-1]) & (both[1:] != both[:-1]))
    if not len(unlike):
        return
    wanted, known = int(ids[unlike[0]]), dict[str, tuple[str, Path]]()
    for store in stores:
        for _, text_id, text in store.texts():
            if _hash(repr(text_id)) == wanted:
                before = known.setdefault(repr(text_id), (text, store.path))
                if before[0] != text:
                    raise RequestError(
                        f"text {text_id!r} is {before[0][:40]!r} in {before[1]} and {text[:40]!r} in {store.path}: one data set "
                        "needs one id a text. Train on them as a list (data.train: [A, B]), where ids of several stores never "
                        "meet; or build them as parts of one source (--part)"
                    )


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")
