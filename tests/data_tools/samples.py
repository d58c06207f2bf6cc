"""Small pictures and source files, shared by the tests of the data tools."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_tools.store import PairStore


@lru_cache(maxsize=512)
def picture(seed: int, size: tuple[int, int] = (32, 24), format: str = "JPEG", mode: str = "RGB") -> bytes:
    """A noise picture; the seed makes it unlike all others."""
    channels = {"RGB": 3, "RGBA": 4, "CMYK": 4, "L": 1}[mode]
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, channels), dtype=np.uint8)
    image = Image.fromarray(noise[..., 0] if mode == "L" else noise, mode if mode == "CMYK" else None)
    file = io.BytesIO()
    image.resize(size).save(file, format)
    return file.getvalue()


def text_row(text_id: Any, text: Any, image_ids: Any, **more: Any) -> bytes:
    return json.dumps({"text_id": text_id, "text": text, "image_ids": image_ids, **more}, ensure_ascii=False).encode()


def write_official(
    folder: Path, split: str = "train", images: int = 12, captions: int = 3, start: int = 1, seed: int = 0
) -> Path:
    """`{split}_imgs.tsv` and `{split}_texts.jsonl`: image k has the captions captions·k … as ids."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{split}_imgs.tsv").open("wb") as file:
        for image_id in range(start, start + images):
            file.write(b"%d\t%s\n" % (image_id, base64.b64encode(picture(seed * 100_000 + image_id))))
    with (folder / f"{split}_texts.jsonl").open("wb") as file:
        for image_id in range(start, start + images):
            for number in range(captions):
                text = f"第{image_id}张图的第{number}句" if number % 2 == 0 else f"picture {image_id}, caption {number}"
                file.write(text_row(image_id * captions + number, f"{text} {seed}", [image_id]) + b"\n")
    return folder


def write_lines(file: Path, lines: Sequence[bytes]) -> Path:
    file.write_bytes(b"".join(line + b"\n" for line in lines))
    return file


def content(store: PairStore) -> tuple[dict[Any, bytes], list[Any], list[Any]]:
    """Everything a store holds."""
    return {image_id: store.image(image_id) for image_id in store.image_ids}, list(store.pairs()), store.lone_texts
