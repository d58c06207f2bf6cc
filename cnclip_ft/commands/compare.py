"""`cnclip-ft compare`: checkpoints side by side on one split, with paired bootstrap intervals."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from cnclip_ft.commands.options import Json, Memory, Origin, Towers, spread
from cnclip_ft.evaluation.options import Options, open_model
from data_tools.tables import say

if TYPE_CHECKING:
    from cnclip_ft.evaluation.scores.comparison import HitTable
    from cnclip_ft.features.encode import SplitFeatures
    from cnclip_ft.features.sources import Source


@spread
def compare(
    *,
    checkpoints: Annotated[
        list[str],
        typer.Argument(
            metavar="A B...", help="Checkpoints, or folders written by `encode`; A is compared with each other."
        ),
    ],
    split: Annotated[
        str | None, typer.Option(metavar="STORE", help="Where checkpoints are scored; not needed for features.")
    ] = None,
    draws: Annotated[int, typer.Option(help="Bootstrap draws.")] = 2000,
    seed: Annotated[int, typer.Option(help="For the draws.")] = 0,
    confidence: Annotated[float, typer.Option(help="Of the intervals.")] = 0.95,
    json_file: Json = None,
    towers: Towers,
    memory: Memory = Options.memory,
    origin: Origin,
) -> None:
    """Checkpoints side by side on one split: is B better than A, or is it chance? Paired bootstrap over images.

    Example: cnclip-ft compare runs/a/contrast/best runs/b/contrast/best --split data/test
    """
    from cnclip_ft.evaluation.outputs import refuse_outputs
    from cnclip_ft.evaluation.results import provenance
    from cnclip_ft.evaluation.scores.comparison import compare as differences_of
    from cnclip_ft.evaluation.scores.comparison import hit_table
    from cnclip_ft.features import folder, official_files
    from cnclip_ft.features.sources import store_source
    from cnclip_ft.retrieval.recall import split_ranks
    from cnclip_ft.runtime import parse_device
    from data_tools.errors import RequestError
    from data_tools.tables import table, terminal_width

    options = Options(**vars(towers), **vars(origin), memory=memory)
    options.check()
    refuse_outputs([*checkpoints, *([split] if split else [])], json_file=json_file, kind="results")
    if len(checkpoints) < 2:
        raise RequestError("name at least two checkpoints to compare")
    scored = store_source(split) if split else None
    if scored is None:
        without = next((c for c in checkpoints if not folder.is_feature_folder(c)), None)
        if without is not None:
            raise RequestError(f"{without} holds no features; say --split STORE to score it on")
    tables, described, shape = [], [], None
    for checkpoint in checkpoints:
        features, about, name = _features(checkpoint, scored, options)
        asked = (features.image_ids, features.text_ids, sorted(features.positives.tolist()))
        if shape is not None and asked != shape:
            raise RequestError(f"{checkpoint} was scored on another split than {checkpoints[0]}")
        shape = asked
        found = split_ranks(features, memory=options.memory, device=parse_device(options.device))
        tables.append(hit_table(features, found))
        described.append(about)
    results = []
    for other, checkpoint, about in zip(tables[1:], checkpoints[1:], described[1:], strict=True):
        differences = differences_of(tables[0], other, draws=draws, seed=seed, confidence=confidence)
        heads = ["", "A", "B", "B − A", f"{100 * confidence:g} % interval", "B better in", ""]
        rows = [
            [
                d.measure,
                f"{d.first:.2f}",
                f"{d.second:.2f}",
                f"{d.difference:+.2f}",
                f"{d.low:+.2f} … {d.high:+.2f}",
                f"{100 * d.better:.1f} %",
                d.verdict,
            ]
            for d in differences
        ]
        say(
            f"A = {_named(checkpoints[0], described[0])}\nB = {_named(checkpoint, about)}\n{_images(tables[0])} images of {name}, {draws:,} draws\n\n"
            + table(heads, rows, text=(0, 6), width=terminal_width())
            + "\n"
        )
        results.append({"a": checkpoints[0], "b": checkpoint, "differences": [d.as_dict() for d in differences]})
    if json_file:
        content: dict[str, Any] = {
            "format": provenance.FORMAT,
            "checkpoints": described,
            "split": {"path": split, "checksum": scored.checksum if scored else None},
            "draws": draws,
            "seed": seed,
            "confidence": confidence,
            "drawn": "images, with their texts",
            "results": results,
            "versions": provenance.versions(),
        }
        official_files.write_json(json_file, content)


def _named(checkpoint: str, described: dict[str, Any]) -> str:
    from cnclip_ft.evaluation.results.provenance import image_size_notes

    return checkpoint + "".join(f" ({note})" for note in image_size_notes(described.get("settings")))


def _images(table: HitTable) -> str:
    return f"{int((table.asked.sum(1) > 0).sum()):,}"


def _features(checkpoint: str, source: Source | None, options: Options) -> tuple[SplitFeatures, dict[str, Any], str]:
    from cnclip_ft.features import folder

    if folder.is_feature_folder(checkpoint):
        info = folder.read_info(checkpoint)["settings"]
        return folder.read_split(checkpoint), {**info, "features": checkpoint}, info["source"]["name"]
    assert source is not None  # refused above
    opened = open_model(checkpoint, options)
    return opened.features(source), opened.described(), source.name
