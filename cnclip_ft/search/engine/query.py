"""What can be asked: words, a picture, "not this", and the vector all of it makes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from cnclip_ft.features.encode import encode_texts
from cnclip_ft.models.dual_encoder import DualEncoder
from cnclip_ft.models.patches import recorded
from cnclip_ft.search.index.pictures import uploaded_pixels
from data_tools.columns import EVERYTHING, Where
from data_tools.errors import DataFault, RequestError
from data_tools.pictures import MISSING, read_file

IMAGE_SHARE = 0.5
WITHOUT_WEIGHT = 0.5
_TEXTS_ON_CPU = 8
MOST = 1000  # results of one question
DEEPEST = 100_000  # results that may be passed over: what a deeper look would hold grows with it
_NOTHING_LEFT = 1e-4  # length of a combined vector below which its direction is rounding


@dataclass(frozen=True)
class Question:
    """One question; at least one of text, pixels and like.

    Args:
        text, without: words wanted, and words not wanted.
        pixels: uint8 ``[3, s, s]`` of a picture. like: number of a picture of the index; it does not find itself.
        image_share: the picture's part, 0 to 1, where words and a picture are both given.
        without_weight: how strongly `without` pushes away.
        where: what must be kept of the pictures that are found. at_least: the cosine from which a picture is one.
        skip: how many of the best to leave out, because they were had before.
    """

    text: str | None = None
    without: str | None = None
    pixels: torch.Tensor | None = None
    like: int | None = None
    image_share: float = IMAGE_SHARE
    without_weight: float = WITHOUT_WEIGHT
    top: int = 20
    where: Where = EVERYTHING
    at_least: float | None = None
    skip: int = 0

    def check(self) -> None:
        """Raises:
        RequestError: nothing asked, or a number out of its range.
        """
        if not (self.text or "").strip() and self.pixels is None and self.like is None:
            raise RequestError("nothing is asked: give words, a picture, or both")
        if self.pixels is not None and self.like is not None:
            raise RequestError("one picture at a time: a file or a picture of the index")
        if not 1 <= self.top <= MOST:
            raise RequestError(f"{self.top} results were asked for; 1 to {MOST:,} can be had")
        if not 0 <= self.skip <= DEEPEST:
            raise RequestError(f"{self.skip} results are to be passed over; 0 to {DEEPEST:,} can be")
        if not 0 <= self.image_share <= 1:
            raise RequestError(f"the picture's share is {self.image_share}; it lies between 0 and 1")
        if not 0 <= self.without_weight <= 2:
            raise RequestError(f"the weight of what is not wanted is {self.without_weight}; it lies between 0 and 2")


def given_picture(identity: Mapping[str, Any], image: str | Path) -> torch.Tensor:
    """`pixels` of a question from a file, as the model of an index of this identity sees pictures.

    Raises:
        RequestError: no such file, or no picture.
    """
    try:
        return uploaded_pixels(read_file(Path(image)), recorded(identity["image_transform"]))
    except DataFault as error:
        raise RequestError(error.problem if error.kind == MISSING else f"{image}: {error.problem}") from None


def vectors(
    model: DualEncoder, questions: Sequence[Question], likes: Mapping[int, torch.Tensor]
) -> list[torch.Tensor | RequestError]:
    """A unit float32 ``[dim]`` a question; all words go through the tower together, and so do all pictures.

    The vector is ``(1 − share)·words + share·picture``, made unit, minus ``weight·without``, made unit.

    Args:
        model: in evaluation mode (to put it there costs milliseconds a question). likes: float32 ``[dim]`` of
            the pictures that questions name as `like`.

    Returns:
        In a question's place the error where its parts cancel each other out.
    """
    words = list(dict.fromkeys(text for q in questions for text in (q.text, q.without) if text and text.strip()))
    pictures = [q.pixels for q in questions if q.pixels is not None]
    # On a CPU a handful of texts of like length already fill it; more would only be padded further.
    together = _TEXTS_ON_CPU if model.device.type == "cpu" else 256
    with torch.inference_mode():
        known = dict(zip(words, encode_texts(model, words, batch_size=together), strict=True)) if words else {}
        seen = iter(model.image_features(torch.stack(pictures).to(model.device)).float().cpu() if pictures else ())
    return [_combine(q, known, next(seen) if q.pixels is not None else None, likes) for q in questions]


def _combine(
    question: Question, known: dict[str, torch.Tensor], picture: torch.Tensor | None, likes: Mapping[int, torch.Tensor]
) -> torch.Tensor | RequestError:
    if question.like is not None:
        picture = likes[question.like]
    text = known.get(question.text) if question.text else None
    wanted = picture if text is None else text
    if text is not None and picture is not None:
        wanted = (1 - question.image_share) * text + question.image_share * picture
    assert wanted is not None, "the question was checked"
    without = known.get(question.without) if question.without else None
    if without is not None:
        wanted = F.normalize(wanted, dim=0) - question.without_weight * without
    if wanted.norm() < _NOTHING_LEFT:
        return RequestError("what is wanted and what is not cancel each other out: ask for something else")
    return F.normalize(wanted, dim=0)
