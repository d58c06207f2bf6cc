"""A store whose phrases have boxes, judged along while boxes are learnt: does the model find what the phrases name?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from cnclip_ft.evaluation.kinds.contract import Evaluator
from cnclip_ft.recipe_section import Place
from cnclip_ft.recipe_valid import ValidSet
from data_tools.errors import RequestError
from data_tools.words import Said

if TYPE_CHECKING:
    import torch

    from cnclip_ft.data.boxed import BoxedPicture
    from cnclip_ft.features.shared_encoder import SharedEncoder
    from cnclip_ft.grounding.heat import Box

_KS = (1, 5, 10)


class BoxesSplit(ValidSet):
    """Judged along: does the model, once it has learnt boxes, find what phrases name?"""

    boxes: Place
    """A store whose phrases have boxes."""

    scores = (*(f"{way}_r{k}" for way in ("any_box", "merged_box") for k in (1, 5, 10)), "pointing")
    decides = "ground"

    def open(self, name: str, open_split: Callable[[str, str], Any]) -> BoxesFound:
        return BoxesFound(name, self)


@dataclass(frozen=True)
class BoxScores:
    """`found` by the names of `BoxesSplit.scores`, in percent; `phrases` were asked in their pictures."""

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
        from cnclip_ft.data.boxed import read_boxed
        from data_tools.shards import open_pairs

        key = f"data.valid.{name}.boxes"
        try:
            self.store = open_pairs(setting.boxes)
        except RequestError as error:
            raise RequestError(f"{key}: {error}") from None
        found = read_boxed(self.store, key)
        self.texts, self.ids, self.pictures = found.texts, list(found.pictures), list(found.pictures.values())

    def judge(self, name: str, encoder: SharedEncoder) -> tuple[BoxScores, None]:
        import torch

        from cnclip_ft.data.boxed import part_of
        from cnclip_ft.grounding.learnt import detect, in_picture, merged
        from cnclip_ft.grounding.metrics import judge

        model = encoder.model
        asked = sum(len(picture.phrases) for picture in self.pictures)
        if model.heads is None:
            return BoxScores(len(self.ids), asked, dict.fromkeys(BoxesSplit.scores, 0.0)), None
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
        return BoxScores(len(self.ids), asked, dict(zip(BoxesSplit.scores, (100 * found).tolist(), strict=True))), None

    def say(self, scores: BoxScores) -> list[str]:
        return [
            f"any-box R@1 {scores.found['any_box_r1']:.2f}, merged-box R@1 {scores.found['merged_box_r1']:.2f}, "
            f"pointing {scores.found['pointing']:.2f}"
        ]

    def chance(self) -> dict[str, float | None]:
        """Pointing at random: the mean share of a picture that a phrase's boxes cover. Nothing is said of a box drawn at random."""
        return dict.fromkeys(BoxesSplit.scores) | {"pointing": 100 * self._covered}

    @cached_property
    def _covered(self) -> float:
        from cnclip_ft.grounding.heat import WHOLE
        from cnclip_ft.grounding.metrics import covered

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
