"""Which files the evaluation commands may write over: those they wrote, known by their content."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

from cnclip_ft.evaluation.grounding.judging import PROTOCOLS
from cnclip_ft.evaluation.results.plots import MAKER
from cnclip_ft.evaluation.results.recall_table import benchmark_recall_heads, markdown_table, recall_heads
from cnclip_ft.features.official_files import is_prediction_file
from data_tools.outputs import begins, holds, refuse_files

_OFFICIAL = {"success", "score", "scoreJson"}  # keys of the official score file, which evaluate and topk write
_HEADS = (
    *(markdown_table(heads, []).split("\n")[0].encode() for heads in (recall_heads(), benchmark_recall_heads())),
    PROTOCOLS["any_box"].encode(),
)


def is_report(kind: str) -> Callable[[Path], bool]:
    """Whether a file is a report of the command whose reports have the key `kind`."""

    def known(path: Path) -> bool:
        content = json.loads(path.read_text(encoding="utf-8"))
        own = {"format", "versions", kind} <= content.keys()
        return own or kind in ("splits", "score") and _OFFICIAL <= content.keys()

    return known


def _is_answer_file(path: Path) -> bool:
    if is_prediction_file(path):
        return True
    with open(path, "rb") as file:
        first = json.loads(file.readline(2**24))
    return isinstance(first, dict) and first.keys() == {"image_id", "label", "classes"}


def refuse_outputs(
    sources: Iterable[str | Path],
    *,
    json_file: Path | None = None,
    kind: str = "",
    lines: Path | None = None,
    markdown: Path | None = None,
    picture: Path | None = None,
) -> None:
    """Before any work: refuse outputs that overlap a source, are one file, or were not written by these commands.

    Args:
        kind: the key that tells this command's reports from other commands' (``splits``, ``results``, …).

    Raises:
        RequestError: naming the file.
    """
    refuse_files(
        [
            (json_file, is_report(kind), "a report in JSON of this command"),
            (lines, _is_answer_file, "a file of predictions"),
            (markdown, begins(*_HEADS), "a table of results"),
            (picture, holds(MAKER.encode()), "a picture of this command"),
        ],
        sources,
    )
