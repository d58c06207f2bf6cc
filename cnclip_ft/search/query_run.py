"""`cnclip-ft search query`: one question, answered as a table or as JSON lines."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from cnclip_ft.search.engine.engine import Found, open_engine
from cnclip_ft.search.engine.query import Question
from cnclip_ft.search.engine.threshold import read_threshold
from cnclip_ft.search.index.folder import Index
from cnclip_ft.search.index.pictures import uploaded_pixels
from data_tools.errors import DataFault, RequestError
from data_tools.pictures import MISSING, read_file
from data_tools.tables import table, terminal_width


def query_index(
    folder: str | Path,
    text: str | None,
    *,
    image: Path | None,
    without: str | None,
    image_share: float,
    without_weight: float,
    top: int,
    threshold: str | None,
    as_json: bool,
    checkpoint: str | None,
    device: str | None,
    exact: bool,
    trust_import: bool = False,
    say: Callable[[str], None] = print,
    note: Callable[[str], None] = print,
) -> None:
    """Print what is found; `note` takes what is no result.

    Raises:
        RequestError: nothing asked, a number out of range, or index, model or picture cannot be opened.
    """
    index = Index(folder)
    limit = read_threshold(threshold, index.info)
    given = None
    if image is not None:
        try:
            given = uploaded_pixels(read_file(image), index.info["identity"]["image_size"])
        except DataFault as error:
            raise RequestError(error.problem if error.kind == MISSING else f"{image}: {error.problem}") from None
    question = Question(text, without, given, None, image_share, without_weight, top)
    question.check()  # before the model is opened
    engine = open_engine(folder, checkpoint=checkpoint, device=device, exact=exact, trust_import=trust_import, say=note)
    (answer,) = engine.ask([question])
    if isinstance(answer, RequestError):
        raise answer
    if limit is not None:
        answer = [found for found in answer if found.score >= limit]
    if as_json:
        for rank, found in enumerate(answer, 1):
            say(json.dumps(_line(engine.index, rank, found), ensure_ascii=False))
        return
    if not answer:
        note(f"nothing reaches the threshold {limit:.4f}")
        return
    say(_table(answer))


def _line(index: Index, rank: int, found: Found) -> dict[str, object]:
    line = {"rank": rank, "score": round(found.score, 6), "number": found.number, "id": found.key}
    if index.info["source"]["kind"] == "folder":
        line["path"] = str(Path(index.info["source"]["path"]) / str(found.key))
    return line


def _table(answer: list[Found]) -> str:
    rows = [
        [str(rank), f"{found.score:.4f}", str(found.number), str(found.key)] for rank, found in enumerate(answer, 1)
    ]
    return table(["#", "score", "number", "picture"], rows, text=(3,), width=terminal_width())
