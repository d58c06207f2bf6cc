"""Judged along while boxes are learnt: does the model find what the phrases of a store name?"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from cnclip_ft.data.boxed import BoxedPicture, part_of, read_boxed
from cnclip_ft.evaluation.evaluator import Evaluator
from cnclip_ft.features.shared_encoder import SharedEncoder
from cnclip_ft.grounding.heat import WHOLE, Box
from cnclip_ft.grounding.learnt import detect, in_picture, merged
from cnclip_ft.grounding.metrics import covered, judge
from cnclip_ft.recipe_data import BoxesSplit
from data_tools.errors import RequestError
from data_tools.shards import open_pairs
from data_tools.words import Said

NAMES = BoxesSplit.scores
_KS = (1, 5, 10)


@dataclass(frozen=True)
class BoxScores:
    """`found` by the names of `NAMES`, in percent; `phrases` were asked in their pictures."""

    pictures: int
    phrases: int
    found: dict[str, float]

    def value(self, name: str) -> float | None:
        return self.found[name]

    def as_dict(self) -> dict[str, Any]:
        return {"pictures": self.pictures, "phrases": self.phrases, **self.found}


class BoxesFound(Evaluator):
    """Any-box and merged-box recall and pointing (`grounding.metrics`) over the phrases of a store that have boxes.

    A model that has not learnt boxes finds nothing: its scores are 0.

    Raises:
        RequestError: the store cannot be used.
    """

    tabled = ("any_box_r1", "merged_box_r1", "pointing")

    def __init__(self, name: str, setting: BoxesSplit) -> None:
        key = f"data.valid.{name}.boxes"
        try:
            self.store = open_pairs(setting.boxes)
        except RequestError as error:
            raise RequestError(f"{key}: {error}") from None
        found = read_boxed(self.store, key)
        self.texts, self.ids, self.pictures = found.texts, list(found.pictures), list(found.pictures.values())

    def judge(self, name: str, encoder: SharedEncoder) -> tuple[BoxScores, None]:
        model = encoder.model
        asked = sum(len(picture.phrases) for picture in self.pictures)
        if model.heads is None:
            return BoxScores(len(self.ids), asked, dict.fromkeys(NAMES, 0.0)), None
        phrases = encoder.texts(self.texts).to(model.device)

        def look(places: range, pixels: torch.Tensor) -> torch.Tensor:
            regions = model.regions(pixels)
            rows: list[list[float]] = []
            for row, place in enumerate(places):
                picture = self.pictures[place]
                own = phrases[torch.from_numpy(picture.phrases).to(model.device)]
                one = type(regions)(*(part[row : row + 1] for part in regions))
                part = part_of(model.image_tower.preprocessing, self.store, self.ids[place])
                for found, true in zip(detect(one, own)[0], _true(picture), strict=True):
                    boxes = in_picture(found, part)
                    judged = judge(boxes, [boxes[0].box], true, merged_found=merged(boxes))
                    ranks = (judged.any_rank, judged.merged_rank)
                    rows.append(
                        [*(float(rank is not None and rank <= k) for rank in ranks for k in _KS), judged.pointing]
                    )
            return torch.tensor(rows)

        counts = [len(picture.phrases) for picture in self.pictures]
        found = encoder.looked(self.ids, self.store.image, counts, look).mean(0)
        return BoxScores(len(self.ids), asked, dict(zip(NAMES, (100 * found).tolist(), strict=True))), None

    def say(self, scores: BoxScores) -> list[str]:
        return [
            f"any-box R@1 {scores.found['any_box_r1']:.2f}, merged-box R@1 {scores.found['merged_box_r1']:.2f}, "
            f"pointing {scores.found['pointing']:.2f}"
        ]

    def chance(self) -> dict[str, float | None]:
        """Pointing at random: the mean share of a picture that a phrase's boxes cover. Nothing is said of a box drawn at random."""
        return dict.fromkeys(NAMES) | {"pointing": 100 * self._covered}

    @cached_property
    def _covered(self) -> float:
        shares = [covered([WHOLE], true) for picture in self.pictures for true in _true(picture)]
        return sum(shares) / len(shares)

    def checksum(self) -> str:
        return self.store.checksum()

    def describe(self) -> str:
        return Said(
            "boxes, {phrases:,} phrases in {pictures:,} pictures ({place})",
            "框，{pictures:,} 张图片中的 {phrases:,} 个短语（{place}）",
            phrases=sum(len(picture.phrases) for picture in self.pictures),
            pictures=len(self.ids),
            place=self.store.path,
        )


def _true(picture: BoxedPicture) -> list[list[Box]]:
    """The boxes of every phrase."""
    found: list[list[Box]] = []
    for place in range(len(picture.phrases)):
        found.append([tuple(box) for box in picture.boxes[picture.says[:, place]].tolist()])
    return found
