"""Write a checkpoint in another format: refuse early, write beside, compare features, put in place."""

from __future__ import annotations

import importlib
import os
import re
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from cnclip_ft.export.card import CARD, card_of_file, hub_metadata, is_card, write_card
from cnclip_ft.export.parity import difference, require
from cnclip_ft.export.settings import ExportSettings
from cnclip_ft.features.encode import encode_source
from cnclip_ft.features.sources import Source, store_source
from cnclip_ft.models.checkpoints import INFO, WEIGHTS_SUM, load, read_info
from cnclip_ft.models.dual_encoder import DualEncoder
from cnclip_ft.models.registry import family_of
from cnclip_ft.retrieval.recall import RetrievalScores, recall
from data_tools.bars import Bar
from data_tools.errors import RequestError, UserError
from data_tools.outputs import FolderKind, is_empty, refuse_foreign_file, refuse_overlap
from data_tools.scratch import Scratch, real_place
from data_tools.store.layouts import is_text

# Name → module with `KIND` (of folder it writes; None: a file, which its `is_export(file)` knows again), `DTYPES` (name → dtype the
# weights are loaded as), `check(model)`, `write(model, target, order)`, `read_features(target, pixels, texts)`,
# `open_encoder(target)` (for recall) and `advice(model, output)`.
FORMATS = {
    "huggingface": "cnclip_ft.export.huggingface",
    "cn_clip": "cnclip_ft.export.cn_clip",
    "open_clip": "cnclip_ft.export.open_clip",
    "onnx": "cnclip_ft.export.onnx",
}


@dataclass(frozen=True)
class Exported:
    """What was written: the largest difference of unit features to the source, how to use it, and where a split was
    given recall on it of source and export; `at_size` says the image size as the card does, where it is not
    the one that the checkpoint was judged at."""

    output: Path
    difference: float
    advice: str
    recall: tuple[RetrievalScores, RetrievalScores] | None = None
    at_size: dict[str, Any] = field(default_factory=dict)


def export_checkpoint(
    checkpoint: str | Path,
    to: str,
    output: str | Path,
    *,
    dtype: str = "float32",
    overwrite: bool = False,
    source: str = "huggingface",
    calibrate: str | Path | None = None,
    verify: str | Path | None = None,
    license_name: str | None = None,
    trust_import: bool = False,
    image_size: int | None = None,
    dimensions: int | None = None,
) -> Exported:
    """Write `checkpoint` (anything `load` reads) in the format `to`.

    Args:
        to: a name of `FORMATS`.
        dtype: of the written weights, one of the format's. In float32 the features must agree within 1e-4; fewer bits
            cost accuracy, and for those the difference is bounded more widely (`parity.TOLERANCES`).
        overwrite: replace an earlier export at `output`.
        source: where a published name comes from.
        calibrate: a store whose pictures and texts settle the ranges of int8 beforehand (onnx).
        verify: a store on which recall of source and export are compared.
        license_name: for the card, which lies in a folder, and beside a file.
        trust_import, image_size, dimensions: as for `load`.

    Raises:
        RequestError: unknown format, an output that is there, or towers the format has no place for.
        UserError: it cannot be written, or its features are not those of the source; nothing is left at `output`.
    """
    output = Path(output)
    if to not in FORMATS:
        raise RequestError(f"--to is {to!r}; use {', '.join(FORMATS)}")
    writer = importlib.import_module(FORMATS[to])
    if dtype not in writer.DTYPES:
        raise RequestError(f"--dtype is {dtype!r}; --to {to} has {', '.join(writer.DTYPES)}")
    if calibrate is not None and dtype != "int8":
        raise RequestError("--calibrate settles the ranges of 8-bit numbers: it goes with --to onnx --dtype int8 only")
    if not is_text(str(output.absolute())):
        raise RequestError(
            f"{output}: neither safetensors nor ONNX Runtime opens a path that is not UTF-8; choose another --output"
        )
    alone = writer.KIND is None
    _refuse_output(output, alone, overwrite, [path for path in (checkpoint, calibrate, verify) if path is not None])
    calibration = None if calibrate is None else _split(calibrate)
    judge = None if verify is None else _split(verify)
    open_source = partial(
        load, checkpoint, source=source, trust_import=trust_import, image_size=image_size, dimensions=dimensions
    )
    model = open_source()
    history = _history(checkpoint, model)
    at_size = {key: history[key] for key in ("image_size",) if key in history}
    order = ExportSettings(history, dtype, calibration)
    exports = family_of(model.text_tower).exports
    if to not in exports:
        raise RequestError(
            f"--to {to}: a text tower of kind {model.text_tower.kind} has no place there; use {', '.join(exports)}"
        )
    writer.check(model)
    scratch = Scratch(real_place(output), "exporting", "exporting to this place")
    beside = scratch.folder / "new"
    bar = Bar(total=2 + (judge is not None), desc=f"{output.name}: written, compared", unit="step")
    try:
        scratch.mend()
        scratch.clear()
        try:
            weights = writer.DTYPES[dtype]
            writer.write(
                model if weights == model.dtype else open_source(dtype=weights),
                beside,
                order,
            )
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"{output} could not be written ({error}); free some space or choose another --output"
            ) from None
        bar.update()
        found = difference(model, lambda pixels, texts: writer.read_features(beside, pixels, texts))
        require(found, output, dtype)
        bar.update()
        scores = None if judge is None else _recall_of_both(model, writer, beside, judge)
        card = (scratch.folder if alone else beside) / CARD
        write_card(
            card,
            output.name,
            to,
            order.info,
            metadata=hub_metadata(model, to, beside, order.info, str(checkpoint), dtype, license_name),
            dtype=dtype,
            difference=found,
            advice=writer.advice(model, beside).replace(str(beside), output.name),
            recall=scores,
        )
        kind = _refuse_output(output, alone, overwrite, [])  # minutes have gone by
        try:
            scratch.swap_in(beside, kind)
            if alone:
                os.replace(card, card_of_file(real_place(output)))
        except OSError as error:
            raise UserError(f"{output} could not be written ({error})") from None
    finally:
        bar.close()
        scratch.remove()
    return Exported(output, found, writer.advice(model, output), scores, at_size)


def _split(path: str | Path) -> Source:
    """A store with pictures and texts in it."""
    split = store_source(path)
    if not split.split.image_ids or not split.split.texts:
        raise RequestError(f"{path}: no pictures or no texts in it")
    return split


def _recall_of_both(
    model: DualEncoder, writer: ModuleType, target: Path, judge: Source
) -> tuple[RetrievalScores, RetrievalScores]:
    """Recall of the source and of what was written."""
    before, after = (
        recall(encode_source(encoder, judge.split, judge.read, batch_size=32))
        for encoder in (model, writer.open_encoder(target))
    )
    return before, after


def points_lost(before: RetrievalScores, after: RetrievalScores) -> str:
    """Mean recall that the export loses, in points, per direction and over all; negative where it gains."""
    parts = [
        f"{name} {a.mean_recall - b.mean_recall:+.2f}"
        for name, a, b in (
            ("text→image", before.text_to_image, after.text_to_image),
            ("image→text", before.image_to_text, after.image_to_text),
            ("all", before, after),
        )
        if a and b and a.mean_recall is not None and b.mean_recall is not None
    ]
    return ", ".join(parts) or "none: the split has no ground truth"


def _history(checkpoint: str | Path, model: DualEncoder) -> dict[str, Any]:
    """What our checkpoint knows of itself goes along; other kinds know nothing. Its own size is the one it was judged at, however often
    it was written at another since."""
    folder = Path(checkpoint)
    known = read_info(folder) if (folder / INFO).is_file() else {}
    own = known.pop("image_size", {}).get("own", model.own_image_size)
    sides = {} if own in (None, model.image_size) else {"image_size": {"used": model.image_size, "own": own}}
    return {key: value for key, value in known.items() if key not in ("format", "model", WEIGHTS_SUM)} | {
        "exported_from": folder.name,
        **sides,
    }


def _writers() -> list[ModuleType]:
    return [importlib.import_module(module) for module in FORMATS.values()]


def _kinds() -> list[FolderKind]:
    """Of folder written here; a card belongs to each."""
    kinds: list[FolderKind] = [writer.KIND for writer in _writers() if writer.KIND is not None]
    return [replace(kind, files=re.compile(rf"{kind.files.pattern}|{re.escape(CARD)}")) for kind in kinds]


def _is_export(file: Path) -> bool:
    return any(writer.is_export(file) for writer in _writers() if writer.KIND is None)


def _refuse_output(output: Path, alone: bool, overwrite: bool, sources: list[str | Path]) -> FolderKind:
    """The kind of folder that is there. `alone`: a file will be, with its card beside it."""
    refuse_overlap(output, sources)
    place = real_place(output)
    kinds = _kinds()
    known = next((kind for kind in kinds if kind.known(place)), None)
    cards = {place / CARD: output / CARD} | ({card_of_file(place): card_of_file(output)} if alone else {})
    own = next((said for card, said in cards.items() if os.path.lexists(card) and not is_card(card)), None)
    if own is not None:
        raise RequestError(f"{own} was changed or is your own: move it away, or choose another --output")
    if alone and os.path.lexists(card_of_file(place)) and not is_card(card_of_file(place), of=output.name):
        raise RequestError(
            f"{card_of_file(output)} is the card of another export: choose an --output of another name than its, ending aside"
        )
    if os.path.lexists(place) and not is_empty(place):
        if not place.is_dir():
            refuse_foreign_file(output, _is_export, "an export of ours")
        elif known is None:
            raise RequestError(
                f"{output} is a folder that holds something else than a model of ours; it is not overwritten. Choose another --output"
            )
        else:
            known.refuse_other(output)
        if not overwrite:
            raise RequestError(f"{output} is there already; choose another --output, or --overwrite")
    return known or kinds[0]
