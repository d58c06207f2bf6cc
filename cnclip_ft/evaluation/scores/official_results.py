"""The result files of the official scripts for a scored split: predictions of both directions, and their score files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from cnclip_ft.evaluation.outputs import is_prediction_file, is_report
from cnclip_ft.features import official_files
from cnclip_ft.features.encode import SplitFeatures
from cnclip_ft.features.official_files import Answers
from cnclip_ft.retrieval.recall import topk
from data_tools.errors import RequestError
from data_tools.outputs import refuse_files

K = 10  # as the official scripts write
_WAYS = (("text", "image", ""), ("image", "text", "tr_"))


def official_files_of(folder: Path, split: str | Path) -> list[tuple[Path, Path]]:
    """Predictions and score, text→image first, under the names of the official instructions."""
    name = Path(split).resolve().name
    return [(folder / f"{name}_{way}predictions.jsonl", folder / f"{name}_{way}output.json") for *_, way in _WAYS]


def refuse_official(folder: Path, splits: Sequence[str | Path], checkpoint: str | Path) -> None:
    """Before any work.

    Raises:
        RequestError: `folder` is a file or lies in what is read, a file that is there was not written here, or two splits have one name.
    """
    if folder.exists() and not folder.is_dir():
        raise RequestError(f"--official {folder} is no folder; name one")
    names = [Path(split).resolve().name for split in splits]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise RequestError(
            f"--official: two splits are called {twice}, and so would their files be; evaluate them one by one"
        )
    pairs = [pair for split in splits for pair in official_files_of(folder, split)]
    predictions = [(lines, is_prediction_file, "a file of predictions") for lines, _ in pairs]
    refuse_files(
        [*predictions, *((score, is_report("score"), "an official score file") for _, score in pairs)],
        [checkpoint, *splits],
    )


def write_official(
    folder: Path, split: Path, features: SplitFeatures, *, memory: str, device: torch.device
) -> list[Path]:
    """Write them; a direction of which no answer is known (a test set), or with fewer than ten to choose from, has no score.

    Returns:
        The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ids = {"text": features.text_ids, "image": features.image_ids}
    rows = {"text": features.text_features, "image": features.image_features}
    at, written = {"image": 0, "text": 1}, []
    for (asking, offered, _), (lines, score) in zip(_WAYS, official_files_of(folder, split), strict=True):
        _, indices = topk(rows[asking], rows[offered], K, memory=memory, device=device)
        found = official_files.prediction_lines(asking, ids[asking], offered, ids[offered], indices, None)
        official_files.write_text(lines, found)
        written.append(lines)
        right = Answers(asking, {query: [] for query in ids[asking]})
        for pair in features.positives.tolist():
            right.targets[ids[asking][pair[at[asking]]]].append(ids[offered][pair[at[offered]]])
        if any(right.targets.values()) and len(ids[offered]) >= K:
            scored = official_files.score_predictions(official_files.read_predictions(lines), right)
            official_files.write_json(score, official_files.score_file(scored))
            written.append(score)
    return written
