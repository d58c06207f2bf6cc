"""`cnclip-ft topk`: two sets of features in files → an official prediction file, and its score where answers are given."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cnclip_ft.commands.options import Device, Memory
from cnclip_ft.evaluation.options import Options
from data_tools.tables import say


def topk(
    queries: Annotated[
        str, typer.Argument(metavar="QUERIES", help="Features: .npy, official .jsonl, or a folder written by `encode`.")
    ],
    gallery: Annotated[str, typer.Argument(metavar="GALLERY", help="Features to search in, likewise.")],
    output: Annotated[Path, typer.Option(metavar="FILE", help="Predictions, in the official format.")],
    k: Annotated[int, typer.Option("--k", "-k", min=1, help="How many for each query.")] = 10,
    direction: Annotated[
        str, typer.Option(help="What is meant when files do not say: text-image, image-text, image-image, text-text.")
    ] = "text-image",
    scores: Annotated[bool, typer.Option("--scores", help="Write the cosines beside the ids.")] = False,
    memory: Memory = Options.memory,
    device: Device = None,
    answers: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Official answers: print the recall too.")
    ] = None,
    score: Annotated[
        Path | None, typer.Option(metavar="FILE", help="With --answers: write the official score file.")
    ] = None,
) -> None:
    """Exact top-k of two sets of features, in tiles, with bounded memory.

    Example: cnclip-ft topk features/valid features/valid --output predictions.jsonl --answers valid_texts.jsonl
    """
    import time

    from cnclip_ft.evaluation.outputs import refuse_outputs
    from cnclip_ft.evaluation.scores.scorecard import score_predictions
    from cnclip_ft.features import official_files
    from cnclip_ft.features.folder import read_set
    from cnclip_ft.retrieval.recall import topk as search
    from cnclip_ft.retrieval.tiles import parse_memory
    from cnclip_ft.runtime import parse_device
    from data_tools.errors import RequestError

    directions = ("text-image", "image-text", "image-image", "text-text")
    if direction not in directions:
        raise RequestError(f"--direction is {direction!r}; use one of {', '.join(directions)}")
    if score and not answers:
        raise RequestError("--score needs --answers to score against")
    parse_memory(memory)
    refuse_outputs([queries, gallery, *([answers] if answers else [])], json_file=score, kind="score", lines=output)
    asking, offered = direction.split("-")
    if answers and asking == offered:
        raise RequestError("answers say which images belong to which texts; a search within one kind has none")
    where = parse_device(device)
    q, g = read_set(queries, asking), read_set(gallery, offered)
    if q.features.shape[1] != g.features.shape[1]:
        raise RequestError(
            f"{queries} has {q.features.shape[1]} values each, {gallery} has {g.features.shape[1]}: they are of different models"
        )
    began = time.perf_counter()
    values, indices = search(q.features, g.features, k, memory=memory, device=where)
    seconds = time.perf_counter() - began
    lines = official_files.prediction_lines(q.kind, q.ids, g.kind, g.ids, indices, values if scores else None)
    official_files.write_text(output, lines)
    say(f"{len(q.ids):,} {q.kind}s × {len(g.ids):,} {g.kind}s: top {indices.shape[1]} in {seconds:.2f} s, in {output}")
    if answers:
        line, content = score_predictions(output, [answers])
        say(line)
        if score:
            official_files.write_json(score, content)
