"""Scene → phrases for its objects in Chinese and English, each with the boxes of what it names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from data_tools.scenes import chinese, english
from data_tools.scenes.drawing import Box
from data_tools.scenes.vocabulary import Group, Scene

WORDS = {"zh": chinese.phrase, "en": english.phrase}


@dataclass(frozen=True)
class Phrase:
    """`boxes`: ``[x, y, width, height]`` in shares of the picture, in the order of drawing."""

    language: str
    text: str
    boxes: list[Box]


def phrases(scene: Scene, things: Sequence[tuple[Group, Box]]) -> list[Phrase]:
    """One phrase a language for every group: its number where there are several, its colour and its shape; the same ones every time.

    No two groups of a scene have colour and shape in common, so a phrase means one of them.

    Args:
        things: as `drawing.draw_with_boxes` returns them.
    """
    random = Random(f"{scene.seed}/phrases")
    return [
        Phrase(language, word(group, random), [box for owner, box in things if owner is group])
        for group in scene.groups
        for language, word in WORDS.items()
    ]
