"""Stores of the photos of Flickr8k with captions in Chinese and English, for the benchmarks on real photos."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


def photos(source: Path, split: str) -> dict[int, Path]:
    """Image id → file. `source`: the folder ``flickr8k-cn`` of ``$CNCLIP_FT_REAL_DATA``."""
    rows = [line.split("\t") for line in (source / "images.tsv").read_text("utf-8").splitlines()[1:]]
    return {int(image_id): source / file for image_id, file, where in rows if where == split}


def captions(source: Path, split: str, language: str) -> Iterator[dict[str, Any]]:
    """``text_id``, ``text``, ``image_ids`` of every caption."""
    return map(json.loads, (source / f"{split}_texts.{language}.jsonl").read_text("utf-8").splitlines())


def write_photos(
    source: Path,
    target: Path,
    split: str,
    languages: Sequence[str],
    chosen: Collection[int] | None = None,
    translated: Mapping[str, str] | None = None,
) -> None:
    """A store of the split's photos, or of those `chosen`, with their captions; left alone where it is there.

    Args:
        translated: captions → what is written instead, in Chinese.
    """
    from data_tools.store import StoreWriter

    if target.exists():
        return
    files = photos(source, split)
    wanted = files.keys() if chosen is None else set(chosen)
    with StoreWriter(target, overwrite=True) as writer:
        for image_id, file in files.items():
            if image_id in wanted:
                writer.add_image(image_id, file.read_bytes())
        for number, language in enumerate(languages):
            for text in captions(source, split, language):
                other = (translated or {}).get(text["text"].strip())
                for image_id in text["image_ids"]:
                    if image_id in wanted:
                        writer.add_pair(
                            image_id,
                            text["text_id"] + number * 10**7,
                            other or text["text"],
                            "zh" if other else language,
                        )
        writer.finish()
