"""`cnclip-ft compare`: checkpoints side by side on one split, with paired bootstrap intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cnclip_ft.evaluation import provenance as record
from cnclip_ft.evaluation.comparison import HitTable, compare, hit_table
from cnclip_ft.evaluation.outputs import refuse_outputs
from cnclip_ft.evaluation.scorecard import Options, open_model
from cnclip_ft.features import folder as feature_folder
from cnclip_ft.features import official_files
from cnclip_ft.features.encode import SplitFeatures, encode_source
from cnclip_ft.features.sources import Source, store_source
from cnclip_ft.retrieval.recall import split_ranks
from data_tools.errors import RequestError
from data_tools.tables import table, terminal_width


def compare_models(
    checkpoints: Sequence[str],
    split: str | None,
    options: Options,
    *,
    draws: int,
    seed: int,
    confidence: float,
    json_file: Path | None,
    say: Callable[[str], None] = print,
) -> None:
    """The first against each of the others.

    Raises:
        RequestError: fewer than two, no split for a checkpoint, or features of different splits.
    """
    options.check()
    refuse_outputs([*checkpoints, *([split] if split else [])], json_file=json_file)
    if len(checkpoints) < 2:
        raise RequestError("name at least two checkpoints to compare")
    source = store_source(split) if split else None
    if source is None:
        without = next((c for c in checkpoints if not feature_folder.is_feature_folder(c)), None)
        if without is not None:
            raise RequestError(f"{without} holds no features; say --split STORE to score it on")
    tables, described, shape = [], [], None
    for checkpoint in checkpoints:
        features, about, name = _features(checkpoint, source, options)
        asked = (features.image_ids, features.text_ids, sorted(features.positives.tolist()))
        if shape is not None and asked != shape:
            raise RequestError(f"{checkpoint} was scored on another split than {checkpoints[0]}")
        shape = asked
        found = split_ranks(features, memory=options.memory, device=record.parse_device(options.device))
        tables.append(hit_table(features, found))
        described.append(about)
    results = []
    for other, checkpoint in zip(tables[1:], checkpoints[1:], strict=True):
        differences = compare(tables[0], other, draws=draws, seed=seed, confidence=confidence)
        heads = ["", "A", "B", "B − A", f"{100 * confidence:g} % interval", "B better in", ""]
        rows = [
            [d.measure, f"{d.first:.2f}", f"{d.second:.2f}", f"{d.difference:+.2f}", f"{d.low:+.2f} … {d.high:+.2f}",
             f"{100 * d.better:.1f} %", d.verdict]
            for d in differences
        ]  # fmt: skip
        say(f"A = {checkpoints[0]}\nB = {checkpoint}\n{_images(tables[0])} images of {name}, {draws:,} draws\n\n"
            + table(heads, rows, text=(0, 6), width=terminal_width()) + "\n")  # fmt: skip
        results.append({"a": checkpoints[0], "b": checkpoint, "differences": [d.as_dict() for d in differences]})
    if json_file:
        content: dict[str, Any] = {
            "format": record.FORMAT, "checkpoints": described,
            "split": {"path": split, "checksum": source.checksum if source else None},
            "draws": draws, "seed": seed, "confidence": confidence, "drawn": "images, with their texts",
            "results": results, "versions": record.versions(),
        }  # fmt: skip
        official_files.write_json(json_file, content)


def _images(table: HitTable) -> str:
    return f"{int((table.asked.sum(1) > 0).sum()):,}"


def _features(checkpoint: str, source: Source | None, options: Options) -> tuple[SplitFeatures, dict[str, Any], str]:
    if feature_folder.is_feature_folder(checkpoint):
        info = feature_folder.read_info(checkpoint)["settings"]
        return feature_folder.read_split(checkpoint), {**info, "features": checkpoint}, info["source"]["name"]
    model, device, dtype = open_model(checkpoint, options)
    workers = record.default_workers(device) if options.workers is None else options.workers
    features = encode_source(
        model, source.split, source.read, batch_size=options.batch_size, workers=workers, dtype=dtype
    )
    about = {
        "checkpoint": record.describe_checkpoint(model, checkpoint),
        "settings": record.describe_settings(model, dtype, device),
    }
    return features, about, source.name
