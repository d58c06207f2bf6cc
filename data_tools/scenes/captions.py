"""Scene → captions in Chinese and English, each telling a different part of what there is to tell."""

from __future__ import annotations

from random import Random

from data_tools.scenes import chinese, english
from data_tools.scenes.vocabulary import Scene, Told

LANGUAGES = {"zh": chinese.sentence, "en": english.sentence}
PLAN = ("zh", "zh", "zh", "en", "en")  # languages of a scene's captions


def captions(scene: Scene, plan: tuple[str, ...] = PLAN) -> list[tuple[str, str]]:
    """(language, text) for every language of `plan`; different texts, the same ones every time."""
    random = Random(f"{scene.seed}/captions")
    texts: list[tuple[str, str]] = []
    for language in plan:
        caption = (language, caption_of(scene, language, choose_details(scene, random), random))
        while caption in texts:
            caption = (language, caption_of(scene, language, choose_details(scene, random), random))
        texts.append(caption)
    return texts


def caption_of(scene: Scene, language: str, told: Told, random: Random) -> str:
    """One caption of `scene` that tells `told`, in words chosen by `random`."""
    return LANGUAGES[language](scene, told, random)


def choose_details(scene: Scene, random: Random) -> Told:
    """Leave out nothing, one detail, or (where two groups leave enough to tell) two."""
    details = ["background", "layout", "sizes", "counts"]
    weights = [4, 3, 5, 2]
    left_out: set[str] = set()
    at_most = 1
    if scene.second is not None:
        details.append("every_colour")
        weights.append(1)
        at_most = 2
    for _ in range(random.choices(range(at_most + 1), weights=(11, 7, 2)[: at_most + 1])[0]):
        left_out.add(random.choices(details, weights)[0])
    return Told(**{detail: detail not in left_out for detail in details})
