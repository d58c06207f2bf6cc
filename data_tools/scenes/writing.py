"""The demonstration set on disk: the official source files, and stores built from them."""

from __future__ import annotations

import base64
import io
import json
import os
from pathlib import Path

from tqdm import tqdm

from data_tools.errors import RequestError, UserError
from data_tools.scenes.captions import captions
from data_tools.scenes.drawing import draw
from data_tools.scenes.sampling import sample_scenes
from data_tools.scenes.vocabulary import Scene

SIZE = 96
_SMALLEST, _LARGEST = 16, 1024


def draw_demo(
    target_dir: str | Path,
    *,
    train: int = 2000,
    valid: int = 400,
    seed: int = 0,
    size: int = SIZE,
    progress: bool = True,
) -> None:
    """Draw the demonstration set: ``train`` and ``valid`` scenes with three Chinese and two English captions each.

    Writes `{split}_imgs.tsv` and `{split}_texts.jsonl` (the official source files; every text also says its
    ``language``) and builds the stores `<target_dir>/train` and `<target_dir>/valid` from them. The same arguments
    give the same bytes in the source files.

    Args:
        size: side of the pictures in pixels.

    Raises:
        RequestError: a count below 1, or a size outside 16…1024.
        UserError: the folder cannot be written.
    """
    from data_tools.build import build_split  # scenes can be drawn without a store

    for name, number, low, high in (
        ("train", train, 1, None),
        ("valid", valid, 1, None),
        ("size", size, _SMALLEST, _LARGEST),
    ):
        if number < low or (high is not None and number > high):
            raise RequestError(
                f"{name} is {number}; it must be at least {low}" + (f" and at most {high}" if high else "")
            )
    folder = Path(target_dir)
    for split, count in (("train", train), ("valid", valid)):
        scenes = sample_scenes(count, seed=seed, held_out=split == "valid")
        write_sources(folder, split, scenes, size=size, progress=progress)
        build_split(folder, split, progress=progress)


def write_sources(folder: Path, split: str, scenes: list[Scene], *, size: int = SIZE, progress: bool = True) -> None:
    """`{split}_imgs.tsv` and `{split}_texts.jsonl` of `scenes`, each whole or not there.

    Image ids count from 1, text ids follow their image: texts 5k−4 … 5k tell of image k.

    Raises:
        UserError: the folder cannot be written.
    """
    images, texts = folder / f"{split}_imgs.tsv", folder / f"{split}_texts.jsonl"
    beside = [path.with_name(f"{path.name}.part") for path in (images, texts)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (
            beside[0].open("w", encoding="ascii", newline="\n") as image_file,
            beside[1].open("w", encoding="utf-8", newline="\n") as text_file,
        ):
            text_id = 0
            bar = tqdm(scenes, desc=f"drawing {split}", unit="scene", disable=None if progress else True)
            for image_id, scene in enumerate(bar, start=1):
                image_file.write(f"{image_id}\t{base64.b64encode(_encoded(scene, size)).decode('ascii')}\n")
                for language, text in captions(scene):
                    text_id += 1
                    row = {"text_id": text_id, "text": text, "image_ids": [image_id], "language": language}
                    text_file.write(json.dumps(row, ensure_ascii=False) + "\n")
        for part, path in zip(beside, (images, texts), strict=True):
            os.replace(part, path)
    except OSError as error:
        raise UserError(
            f"{folder}: the demonstration set cannot be written ({error}). Choose another folder."
        ) from None
    finally:
        for part in beside:
            if folder.is_dir():
                part.unlink(missing_ok=True)


def _encoded(scene: Scene, size: int) -> bytes:
    buffer = io.BytesIO()
    # No colour subsampling: at this size it would fray the edges.
    draw(scene, size).save(buffer, "JPEG", quality=92, subsampling=0)
    return buffer.getvalue()
