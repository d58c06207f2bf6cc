"""Write a checkpoint in another format: refuse early, write beside, compare features, put in place."""

from __future__ import annotations

import importlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from cnclip_ft.export.parity import difference, require
from cnclip_ft.models.checkpoints import INFO, load, read_info
from data_tools.errors import RequestError, UserError

# Name → module with `check(model)`, `write(model, target, info)`, `read_features(target, pixels, texts)` and `advice(model, output)`.
FORMATS = {"huggingface": "cnclip_ft.export.huggingface", "cn_clip": "cnclip_ft.export.cn_clip"}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Exported:
    """What was written: the largest difference of unit features to the source, and how to use it."""

    output: Path
    difference: float
    advice: str


def export_checkpoint(
    checkpoint: str | Path, to: str, output: str | Path, *, dtype: str = "float32", overwrite: bool = False,
    source: str = "huggingface",
) -> Exported:  # fmt: skip
    """Write `checkpoint` (anything `load` reads) in the format `to`.

    Args:
        to: a name of `FORMATS`.
        dtype: of the written weights. The features must agree within 1e-4 in float32; half the bits cost accuracy, and
            for those the difference is bounded by 2e-2 only.
        overwrite: replace an earlier export at `output`.
        source: where a published name comes from.

    Raises:
        RequestError: unknown format, an output that is there, or towers the format has no place for.
        UserError: it cannot be written, or its features are not those of the source; nothing is left at `output`.
    """
    output = Path(output)
    if to not in FORMATS:
        raise RequestError(f"--to is {to!r}; use {' or '.join(FORMATS)}")
    if dtype not in DTYPES:
        raise RequestError(f"--dtype is {dtype!r}; use {', '.join(DTYPES)}")
    _refuse_output(output, overwrite)
    writer = importlib.import_module(FORMATS[to])
    model = load(checkpoint, source=source)
    writer.check(model)
    beside = output.with_name(f"{output.name}.unchecked")
    _remove(beside)
    try:
        try:
            beside.parent.mkdir(parents=True, exist_ok=True)
            writer.write(
                load(checkpoint, dtype=DTYPES[dtype], source=source) if dtype != "float32" else model,
                beside,
                _history(checkpoint),
            )
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"{output} could not be written ({error}); free some space or choose another --output"
            ) from None
        found = difference(model, lambda pixels, texts: writer.read_features(beside, pixels, texts))
        require(found, output, exact=dtype == "float32")
        try:
            _remove(output)
            os.replace(beside, output)
        except OSError as error:
            raise UserError(f"{output} could not be written ({error})") from None
    finally:
        _remove(beside)
    return Exported(output, found, writer.advice(model, output))


def _history(checkpoint: str | Path) -> dict:
    """What our checkpoint knows of itself goes along; other kinds know nothing."""
    folder = Path(checkpoint)
    known = read_info(folder) if (folder / INFO).is_file() else {}
    return {key: value for key, value in known.items() if key not in ("format", "model")} | {
        "exported_from": folder.name
    }


def _refuse_output(output: Path, overwrite: bool) -> None:
    empty = output.is_dir() and not any(output.iterdir())
    if not output.exists() or empty:
        return
    if not overwrite:
        raise RequestError(f"{output} is there already; choose another --output, or --overwrite")
    if output.is_dir() and not (output / "config.json").is_file():
        raise RequestError(f"{output} is a folder that holds something else than a model; it is not overwritten")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
