"""The file formats of the official evaluation scripts (cn_clip 1.6.0), in and out.

* features: a line per item, ``{"image_id" | "text_id": id, "feature": [floats]}``
* answers: ``{"text_id", "text", "image_ids"}`` (text→image) and ``.tr.jsonl`` ``{"image_id", "text_ids"}`` (image→text)
* predictions: ``{"text_id", "image_ids": [10 ids]}`` and ``{"image_id", "text_ids": [10 ids]}``
* score: ``{"success", "score", "scoreJson": {"score", "mean_recall", "r1", "r5", "r10"}}``, in percent

Ids may be strings as well as integers here; the official scripts accept integers only.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic_core import from_json

from data_tools.atomic import whole_file
from data_tools.errors import DataFault, RequestError, UserError

Id = int | str
OTHER = {"text": "image", "image": "text"}


@dataclass
class IdFeatures:
    """Features with their ids; `kind` is what they are of: ``image`` or ``text``."""

    kind: str
    ids: list[Id]
    features: torch.Tensor  # [n, dim]


@dataclass
class Answers:
    """What is right: query id → ids of its positives, in the order of the file; empty where nothing is known."""

    query_kind: str
    targets: dict[Id, list[Id]]


def write_text(path: str | Path, lines: Iterable[str]) -> None:
    """Write the lines; the file is whole or it is not there.

    Raises:
        RequestError: it cannot be written.
    """
    try:
        with whole_file(path, "w", advice="Choose another file.") as file:
            for line in lines:
                file.write(line + "\n")
    except DataFault:
        raise  # of what is written, not of the writing
    except UserError as error:
        raise RequestError(str(error)) from None


def write_json(path: str | Path, content: Mapping[str, Any]) -> None:
    write_text(path, [json.dumps(content, indent=2, ensure_ascii=False)])


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.isspace():
                    yield number, line
    except OSError as error:
        raise RequestError(f"{path} cannot be read ({error.strerror or error})") from None


def parse_json(data: bytes | str) -> Any:
    """JSON, seven times as fast as `json` on features, which alone takes half characters: of file names that are not UTF-8.

    Raises:
        ValueError: it is none.
    """
    try:
        return from_json(data)
    except ValueError:
        if "\\ud" not in (data if isinstance(data, str) else data.decode("utf-8", "replace")).lower():
            raise
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("nested beyond reason") from None


def _object(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        value = parse_json(line)
    except ValueError as error:
        raise DataFault(
            f"the line is not JSON ({error})",
            mend="Write one JSON object a line.",
            kind="bad-json",
            file=path,
            line=number,
        ) from None
    if not isinstance(value, dict):
        raise DataFault(
            "the line is not a JSON object",
            mend="Write one JSON object a line.",
            kind="bad-json",
            file=path,
            line=number,
        )
    return value


def _field(path: Path, number: int, value: dict[str, Any], key: str) -> Any:
    if key not in value:
        raise DataFault(
            f"no field {key!r} (found: {', '.join(value) or 'none'})",
            mend=f"Add {key!r} to the line.",
            kind="missing-field",
            file=path,
            line=number,
        )
    return value[key]


def _kind(path: Path, number: int, value: dict[str, Any]) -> str:
    kind = "text" if "text_id" in value else "image"
    _field(path, number, value, f"{kind}_id" if kind == "text" else "image_id")
    return kind


# ---- features -------------------------------------------------------------------------------------------------------


def read_features(path: str | Path) -> IdFeatures:
    """Official feature file → float32 ``[n, dim]``.

    Raises:
        DataFault: a line is not JSON, lacks a field, repeats an id, or has another number of values than the first.
    """
    path = Path(path)
    kind = ""
    rows: dict[int | str, np.ndarray] = {}
    for number, line in _lines(path):
        value = _object(path, number, line)
        found = _kind(path, number, value)
        feature = _field(path, number, value, "feature")
        try:
            row = np.array(feature, dtype=np.float32)
        except (TypeError, ValueError):
            row = np.empty(0, dtype=np.float32)
        item_id = value[f"{found}_id"]
        first = next(iter(rows.values()), row)
        problem = (
            "the feature is not a list of numbers"
            if row.ndim != 1 or not row.size
            else f"a {found} feature of {len(row)} values among {kind} features of {len(first)}"
            if kind not in ("", found) or len(row) != len(first)
            else f"{found} id {item_id!r} stands here a second time"
            if item_id in rows
            else None
        )
        if problem:
            raise DataFault(
                problem,
                mend="Keep features of one model and one kind in a file, each id once.",
                kind="bad-feature",
                file=path,
                line=number,
            )
        kind, rows[item_id] = found, row
    if not rows:
        raise RequestError(f"{path} holds no features")
    return IdFeatures(kind, list(rows), torch.from_numpy(np.stack(list(rows.values()))))


def feature_lines(kind: str, ids: Sequence[Id], features: torch.Tensor) -> Iterator[str]:
    for start in range(0, len(ids), 1024):
        for item_id, row in zip(
            ids[start : start + 1024], features[start : start + 1024].float().tolist(), strict=True
        ):
            yield json.dumps({f"{kind}_id": item_id, "feature": row}, ensure_ascii=False)


def write_features(path: str | Path, items: IdFeatures) -> None:
    write_text(path, feature_lines(items.kind, items.ids, items.features))


# ---- answers --------------------------------------------------------------------------------------------------------


def read_answers(path: str | Path) -> Answers:
    """``_texts.jsonl`` or ``.tr.jsonl`` → what is right.

    Raises:
        DataFault: a line is not JSON or lacks its ids.
    """
    path = Path(path)
    kind, targets = "", {}
    for number, line in _lines(path):
        value = _object(path, number, line)
        found = _kind(path, number, value)
        if kind and found != kind:
            raise DataFault(
                "texts and images both ask in this file",
                mend="Split it in two.",
                kind="bad-answers",
                file=path,
                line=number,
            )
        kind = found
        ids = (
            value.get("image_ids", [])
            if kind == "text" and "text" in value
            else _field(path, number, value, f"{OTHER[kind]}_ids")
        )
        if not isinstance(ids, list):
            raise DataFault(
                f"{OTHER[kind]}_ids is not a list",
                mend="Write a list of ids.",
                kind="bad-answers",
                file=path,
                line=number,
            )
        targets[value[f"{kind}_id"]] = ids
    if not targets:
        raise RequestError(f"{path} holds no answers")
    return Answers(kind, targets)


def turn_answers(answers: Answers) -> Answers:
    """Answers of one direction → those of the other, in the order first met, as the official conversion."""
    turned: dict[Id, list[Id]] = {}
    for query, targets in answers.targets.items():
        for target in targets:
            turned.setdefault(target, []).append(query)
    return Answers(OTHER[answers.query_kind], turned)


def write_answers(path: str | Path, answers: Answers) -> None:
    """Image→text answers are a ``.tr.jsonl``; text→image ones come without the texts."""
    kind = answers.query_kind
    write_text(
        path,
        (
            json.dumps({f"{kind}_id": q, f"{OTHER[kind]}_ids": t}, ensure_ascii=False)
            for q, t in answers.targets.items()
        ),
    )


# ---- predictions ----------------------------------------------------------------------------------------------------


def prediction_lines(
    query_kind: str,
    query_ids: Sequence[Id],
    gallery_kind: str,
    gallery_ids: Sequence[Id],
    indices: torch.Tensor,
    scores: torch.Tensor | None = None,
) -> Iterator[str]:
    """Gallery indices ``[queries, k]`` (module `retrieval`) → lines; with `scores` each line carries them too."""
    for row, query in enumerate(query_ids):
        line = {f"{query_kind}_id": query, f"{gallery_kind}_ids": [gallery_ids[i] for i in indices[row].tolist()]}
        if scores is not None:
            line["scores"] = [round(score, 6) for score in scores[row].tolist()]
        yield json.dumps(line, ensure_ascii=False)


def is_prediction_file(path: Path) -> bool:
    """Does the first line look like a prediction (an id, and ids of the other kind, no text)?"""
    for _, line in _lines(path):
        try:
            value = parse_json(line)
        except ValueError:
            return False
        return isinstance(value, dict) and "text" not in value and ("image_ids" in value or "text_ids" in value)
    return False


def read_predictions(path: str | Path) -> Answers:
    """Prediction file → query id → predicted ids, best first.

    Raises:
        DataFault: a line is broken, repeats a predicted id, or a query stands twice.
    """
    path = Path(path)
    kind, predicted = "", {}
    for number, line in _lines(path):
        value = _object(path, number, line)
        found = _kind(path, number, value)
        ids = _field(path, number, value, f"{OTHER[found]}_ids")
        query = value[f"{found}_id"]
        problem = (
            f"{OTHER[found]}_ids is not a list"
            if not isinstance(ids, list)
            else f"{found} {query!r} names an id twice"
            if len(set(ids)) != len(ids)
            else f"{found} {query!r} stands here a second time"
            if query in predicted
            else f"a prediction for a {found} among those for {kind}s"
            if kind not in ("", found)
            else None
        )
        if problem:
            raise DataFault(problem, mend="Write the predictions again.", kind="bad-prediction", file=path, line=number)
        kind, predicted[query] = found, ids
    if not predicted:
        raise RequestError(f"{path} holds no predictions")
    return Answers(kind, predicted)


def score_predictions(predictions: Answers, answers: Answers, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float | int]:
    """Recall in percent over the queries with an answer, as `evaluation.py` and `evaluation_tr.py` compute it.

    A difference, said in the result: the official scripts count a query without any answer as missed, here it is
    left out (`queries` counts the others, `without_answer` these).

    Raises:
        RequestError: wrong direction, no answers at all, a query without prediction, or fewer than max(ks) ids.
    """
    if predictions.query_kind != answers.query_kind:
        raise RequestError(
            f"the predictions answer {predictions.query_kind}s, the answers are for {answers.query_kind}s; "
            "give the answers of the other direction (.tr.jsonl for image→text)"
        )
    asked = {query: set(targets) for query, targets in answers.targets.items() if targets}
    if not asked:
        raise RequestError("no query of the answers has a known target: there is no ground truth to score against")
    missing = [query for query in asked if query not in predictions.targets]
    if missing:
        raise RequestError(
            f"{len(missing)} queries have no prediction, the first is {missing[0]!r}; predict for all of them"
        )
    short = next((q for q in asked if len(predictions.targets[q]) < max(ks)), None)
    if short is not None:
        raise RequestError(
            f"query {short!r} has {len(predictions.targets[short])} predictions; {max(ks)} are needed for recall@{max(ks)}"
        )
    shares = {}
    for k in ks:
        hits = sum(not targets.isdisjoint(predictions.targets[query][:k]) for query, targets in asked.items())
        shares[f"r{k}"] = hits / len(asked)
    # In the official order of operations, so that not even the last digit differs.
    scores: dict[str, float | int] = {name: share * 100 for name, share in shares.items()}
    scores["mean_recall"] = sum(shares.values()) / len(shares) * 100
    return scores | {"queries": len(asked), "without_answer": len(answers.targets) - len(asked)}


def score_file(scores: Mapping[str, float | int]) -> dict[str, Any]:
    """The official score file's content."""
    inner = {"score": scores["mean_recall"], "mean_recall": scores["mean_recall"]}
    return {
        "success": True,
        "score": scores["mean_recall"],
        "scoreJson": inner | {key: scores[key] for key in ("r1", "r5", "r10")},
    }
