"""`cnclip-ft topk`: two sets of features in files → an official prediction file, and its score where answers are given."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from cnclip_ft.evaluation import provenance as record
from cnclip_ft.evaluation.outputs import refuse_outputs
from cnclip_ft.evaluation.scorecard import score_predictions
from cnclip_ft.features import official_files
from cnclip_ft.features.folder import read_set
from cnclip_ft.retrieval.recall import topk
from cnclip_ft.retrieval.tiles import parse_memory
from data_tools.errors import RequestError

DIRECTIONS = ("text-image", "image-text", "image-image", "text-text")


def search_files(
    queries: str | Path,
    gallery: str | Path,
    output: str | Path,
    *,
    k: int = 10,
    direction: str = "text-image",
    with_scores: bool = False,
    memory: str = "2GiB",
    device: str | None = None,
    answers: Path | None = None,
    score: Path | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Exact top-k, best first; ties in the gallery's order (as the official script).

    Raises:
        RequestError: a file cannot be used, or the two sets have different dimensions.
        DataFault: a broken line of a JSONL.
    """
    if direction not in DIRECTIONS:
        raise RequestError(f"--direction is {direction!r}; use one of {', '.join(DIRECTIONS)}")
    if score and not answers:
        raise RequestError("--score needs --answers to score against")
    parse_memory(memory)
    refuse_outputs([queries, gallery, *([answers] if answers else [])], json_file=score, lines=Path(output))
    asking, offered = direction.split("-")
    if answers and asking == offered:
        raise RequestError("answers say which images belong to which texts; a search within one kind has none")
    where = record.parse_device(device)
    q, g = read_set(queries, asking), read_set(gallery, offered)
    if q.features.shape[1] != g.features.shape[1]:
        raise RequestError(
            f"{queries} has {q.features.shape[1]} values each, {gallery} has {g.features.shape[1]}: they are of different models"
        )
    began = time.perf_counter()
    values, indices = topk(q.features, g.features, k, memory=memory, device=where)
    seconds = time.perf_counter() - began
    lines = official_files.prediction_lines(q.kind, q.ids, g.kind, g.ids, indices, values if with_scores else None)
    official_files.write_text(output, lines)
    say(f"{len(q.ids):,} {q.kind}s × {len(g.ids):,} {g.kind}s: top {indices.shape[1]} in {seconds:.2f} s, in {output}")
    if answers:
        line, content = score_predictions(output, [answers])
        say(line)
        if score:
            official_files.write_json(score, content)
