"""The demonstration set on disk: the official source files, and stores built from them."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Callable, Collection
from pathlib import Path

from PIL import Image

from data_tools.atomic import whole_file
from data_tools.bars import Bar
from data_tools.errors import RequestError
from data_tools.outputs import json_with, refuse_foreign_file
from data_tools.regular import sha256
from data_tools.scenes.captions import captions
from data_tools.scenes.drawing import Box, draw, draw_with_boxes
from data_tools.scenes.phrases import phrases
from data_tools.scenes.sampling import sample_scenes
from data_tools.scenes.vocabulary import Group, Scene

PHRASES = "phrases"  # the folder of stores with boxes
Things = list[tuple[Group, Box]]
SIZE, MANIFEST = 96, "cnclip-ft-demo.json"
_SMALLEST, _LARGEST = 16, 1024


def draw_demo(
    target_dir: str | Path,
    *,
    train: int = 2000,
    valid: int = 400,
    seed: int = 0,
    size: int = SIZE,
    boxes: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> None:
    """Draw the demonstration set: ``train`` and ``valid`` scenes with three Chinese and two English captions each.

    Writes `{split}_imgs.tsv` and `{split}_texts.jsonl` (the official source files; every text also says its
    ``language``) and builds the stores `<target_dir>/train` and `<target_dir>/valid` from them. The same arguments
    give the same bytes in the source files.

    Args:
        size: side of the pictures in pixels.
        boxes: build `<target_dir>/phrases/train` and `…/valid` as well: the same pictures with phrases for their objects
            (``五个黄色正方形``, ``the red fish``) and the boxes of these.
        overwrite: replace a set that is there: files with the digests that `cnclip-ft-demo.json` names, and stores.

    Raises:
        RequestError: a count below 1, a size outside 16…1024, or other files have these names.
        UserError: the folder cannot be written.
    """
    from data_tools.build import build_split  # scenes can be drawn without a store
    from data_tools.store import refuse_place

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
    for split in ("train", "valid"):
        _refuse_sources(folder, split, overwrite)
        refuse_place(folder / split, overwrite=overwrite)
        if boxes:
            refuse_place(folder / PHRASES / split, overwrite=overwrite)
    for split, count in (("train", train), ("valid", valid)):
        scenes = sample_scenes(count, seed=seed, held_out=split == "valid")
        drawn = write_sources(folder, split, scenes, size=size, boxes=boxes, progress=progress)
        build_split(folder, split, overwrite=overwrite, progress=progress)
        if boxes:
            _build_phrases(folder, split, scenes, drawn)


def write_sources(
    folder: Path, split: str, scenes: list[Scene], *, size: int = SIZE, boxes: bool = False, progress: bool = True
) -> list[Things]:
    """`{split}_imgs.tsv` and `{split}_texts.jsonl` of `scenes`, each whole or not there.

    Image ids count from 1, text ids follow their image: texts 5k−4 … 5k tell of image k.

    Returns:
        The things in every picture, with `boxes`.

    Raises:
        UserError: the folder cannot be written.
    """
    images, texts = _source_files(folder, split)
    with whole_file(images) as image_file, whole_file(texts) as text_file:
        drawn: list[Things] = []
        text_id, digests = 0, (hashlib.sha256(), hashlib.sha256())
        bar = Bar(scenes, desc=f"drawing {split}", unit="scene", shown=progress)
        for image_id, scene in enumerate(bar, start=1):
            picture, things = draw_with_boxes(scene, size) if boxes else (draw(scene, size), [])
            drawn.append(things)
            row = b"%d\t%s\n" % (image_id, base64.b64encode(_encoded(picture)))
            lines = []
            for language, text in captions(scene):
                text_id += 1
                line = {"text_id": text_id, "text": text, "image_ids": [image_id], "language": language}
                lines.append(json.dumps(line, ensure_ascii=False) + "\n")
            for file, digest, data in zip(
                (image_file, text_file), digests, (row, "".join(lines).encode()), strict=True
            ):
                file.write(data)
                digest.update(data)
        # Before the files are there: whenever this is killed, they are known again.
        _note_digests(folder, {file.name: d.hexdigest() for file, d in zip((images, texts), digests, strict=True)})
    return drawn


def _build_phrases(folder: Path, split: str, scenes: list[Scene], drawn: list[Things]) -> None:
    """The store `<folder>/phrases/<split>`: the pictures of `<folder>/<split>` with phrases and boxes, texts numbered from 1."""
    from data_tools.store import StoreWriter, open_store

    pictures = open_store(folder / split)
    (folder / PHRASES).mkdir(exist_ok=True)
    try:
        with StoreWriter(folder / PHRASES / split) as writer:
            number = 0
            for image_id, (scene, things) in enumerate(zip(scenes, drawn, strict=True), start=1):
                writer.add_image(image_id, pictures.image(image_id))
                for phrase in phrases(scene, things):
                    number += 1
                    writer.add_pair(image_id, number, phrase.text, phrase.language, {"boxes": phrase.boxes})
            writer.finish().close()
    finally:
        pictures.close()


def _source_files(folder: Path, split: str) -> tuple[Path, Path]:
    return folder / f"{split}_imgs.tsv", folder / f"{split}_texts.jsonl"


def _read_digests(folder: Path) -> dict[str, list[str]]:
    """File name → sha256 of what was written under it, as `cnclip-ft-demo.json` says; empty where there is none."""
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        return {str(name): list(map(str, digests)) for name, digests in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _note_digests(folder: Path, written: dict[str, str]) -> None:
    known = _read_digests(folder)
    for name, digest in written.items():
        known[name] = list(
            dict.fromkeys([*known.get(name, ()), digest])
        )  # of the file that is there, and the one to come
    with whole_file(folder / MANIFEST, "w") as file:
        json.dump({"about": "demonstration set of cnclip-ft: sha256 of its files", "files": known}, file, indent=1)


def _one_of(sums: Collection[str]) -> Callable[[Path], bool]:
    return lambda place: sha256(place) in sums


def _refuse_sources(folder: Path, split: str, overwrite: bool) -> None:
    known = _read_digests(folder)
    refuse_foreign_file(folder / MANIFEST, json_with("about", "files"), "the list of a demonstration set")
    for file in _source_files(folder, split):
        refuse_foreign_file(
            file,
            _one_of(known.get(file.name, ())),
            "of a demonstration set as `data demo` drew it",
        )
        if file.exists() and not overwrite:
            raise RequestError(
                f"{file} is there already; replace the demonstration set with --overwrite, or choose another folder"
            )


def _encoded(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    # No colour subsampling: at this size it would fray the edges.
    picture.save(buffer, "JPEG", quality=92, subsampling=0)
    return buffer.getvalue()
