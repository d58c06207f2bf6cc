"""What a run did to each language it is judged in: before the first step, during, and at the end."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from cnclip_ft.retrieval.recall import RetrievalScores
from data_tools.words import Said

_NAMES = {"zh": Said("Chinese", "中文"), "en": Said("English", "英文")}  # texts that mix both are of neither


def by_language(scores: Iterable[Any]) -> dict[str, float]:
    """Mean recall of Chinese and of English by itself, of the first split that has it; nothing where one of them is missing."""
    found: dict[str, float] = {}
    for split in scores:
        for language, part in split.languages.items() if isinstance(split, RetrievalScores) else ():
            if part.mean_recall is not None and language in _NAMES:
                found.setdefault(language, part.mean_recall)
    return found if len(found) == len(_NAMES) else {}


def since_start(start: dict[str, float], now: dict[str, float]) -> str:
    """How far each language lies from the run's start, behind a line; nothing where there are not two."""
    changes = [f"{language} {now[language] - before:+.2f}" for language, before in start.items() if language in now]
    return f"  since the start: {', '.join(changes)}" if changes else ""


def language_notes(start: dict[str, float], end: dict[str, float]) -> list[Said]:
    """A sentence for each language: what it won or lost over the run."""
    return [
        Said(
            "{name}: mean recall {before:.2f} before the first step, {now:.2f} now, {points:.2f} points {how}",
            "{name}：第一步之前平均召回率 {before:.2f}，现在 {now:.2f}，{how} {points:.2f} 分",
            name=_NAMES[language],
            before=before,
            now=end[language],
            points=abs(end[language] - before),
            how=Said("lost", "失去") if end[language] < before else Said("won", "提高"),
        )
        for language, before in start.items()
        if language in end
    ]
