"""Pictures and phrases in, heat maps and boxes out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from PIL import Image

from cnclip_ft.grounding.heat import Box, Heat, Region, heats
from cnclip_ft.grounding.learnt import detect, in_picture, merged
from cnclip_ft.grounding.phrases import phrases_of, unique
from cnclip_ft.models.dual_encoder import DualEncoder
from cnclip_ft.models.modes import evaluation_mode
from cnclip_ft.models.preprocessing import PictureSource, whole_picture
from data_tools.errors import RequestError
from data_tools.pictures import PIXEL_LIMIT

DEFAULT_METHOD = "sclip"
LEARNT = "learnt"  # boxes of the heads that a stage of kind `ground` trains
THRESHOLD = 0.5
MOST_BOXES = 10
MOST_PROPOSED = 100  # boxes of a phrase that an upper bound is taken over
MOST_PHRASES = 1000


@dataclass(frozen=True)
class Grounded:
    """Where a phrase is in a picture.

    Args:
        boxes: with a score each, the best first.
    """

    phrase: str
    heat: Heat
    boxes: list[Region]
    learnt: bool = False

    @property
    def score(self) -> float:
        """The cosine of the hottest patch: it compares pictures and phrases of one model, and is no probability. Of learnt boxes the
        probability of the best one."""
        return self.heat.score

    @property
    def hottest(self) -> list[Box]:
        """Where the phrase is pointed at: the hottest patches, or the best learnt box."""
        return [self.boxes[0].box] if self.learnt else self.heat.hottest

    @property
    def merged(self) -> list[Region] | None:
        """Of learnt boxes, candidates for the one box around all things of the phrase."""
        return merged(self.boxes) if self.learnt else None


@dataclass(frozen=True)
class How:
    """How phrases are looked for.

    Args:
        method: `LEARNT`, or one of the image tower's `patch_methods`; None: learnt boxes where the model has heads, else `DEFAULT_METHOD`,
            or the tower's own where it has that alone.
        threshold: share of the way from a map's coldest place to its hottest, above which regions are found; of learnt boxes, share of
            the best one's probability from which on others stay.
        most: boxes a phrase.
    """

    method: str | None = None
    threshold: float = THRESHOLD
    most: int = MOST_BOXES

    def method_of(self, model: DualEncoder) -> str:
        """
        Raises:
            RequestError: the model has no features of patches, by this method or at all; or a number is out of its range.
        """
        if not 0 <= self.threshold <= 1:
            raise RequestError(f"the threshold is {self.threshold:g}; it is a share, from 0 to 1")
        if self.most < 1:
            raise RequestError(f"the most boxes of a phrase are {self.most}; at least 1")
        if self.method == LEARNT and model.heads is None:
            raise RequestError(
                "method learnt: this model has not learnt boxes; train it in a stage of kind ground (docs/training.md#learning-boxes), or give "
                "another --method"
            )
        if self.method == LEARNT or (self.method is None and model.heads is not None):
            return LEARNT
        if self.method is None:
            return default_method(model)
        model.image_tower.check_patches(self.method)
        return self.method


def default_method(model: DualEncoder) -> str:
    """The method for maps of cosines, of a model with learnt boxes too: `DEFAULT_METHOD`, or the tower's own.

    Raises:
        RequestError: the tower has no features of patches.
    """
    tower = model.image_tower
    tower.check_patches(None)
    return DEFAULT_METHOD if DEFAULT_METHOD in tower.patch_methods else tower.patch_methods[0]


def checked_phrases(phrases: str | Iterable[str]) -> list[str]:
    """A sentence is split (`phrases.phrases_of`), several are taken as they stand, each once.

    Raises:
        RequestError: there is none, or too many.
    """
    listed = [] if isinstance(phrases, str) else list(phrases)
    if wrong := [phrase for phrase in listed if not isinstance(phrase, str)]:
        raise RequestError(f"phrases are text, {wrong[0]!r} is {type(wrong[0]).__name__}")
    found = phrases_of(phrases) if isinstance(phrases, str) else unique(listed)
    if not found:
        raise RequestError('no phrase to look for: say what is to be found, like "红色的伞" or "a red umbrella"')
    if len(found) > MOST_PHRASES:
        raise RequestError(f"{len(found):,} phrases: at most {MOST_PHRASES:,} at once; ask in several goes")
    return found


def ground(
    model: DualEncoder,
    pictures: Iterable[PictureSource],
    phrases: str | Iterable[str],
    *,
    method: str | None = None,
    threshold: float = THRESHOLD,
    most: int = MOST_BOXES,
    batch_size: int = 16,
) -> Iterator[list[Grounded]]:
    """For every picture, what `phrases` asks for; a list of as many entries as there are phrases.

    Args:
        pictures: as `DualEncoder.encode_images` takes them; a batch is held at a time.
        phrases: a sentence, which is split, or phrases as they stand; Chinese, English, both.
        method, threshold, most: as `How` has them.

    Raises:
        RequestError: no phrase, an unknown method, or an image tower that gives no features of patches.
        DataFault: a picture cannot be read or decoded.
    """
    how, asked = How(method, threshold, most), checked_phrases(phrases)
    how.method_of(model)
    texts = model.encode_texts(asked)

    def walk() -> Iterator[list[Grounded]]:
        left = iter(pictures)
        while some := list(islice(left, batch_size)):
            decoded = [decode(model, picture) for picture in some]
            yield from find(model, decoded, [asked] * len(decoded), [texts] * len(decoded), how)

    return walk()


@dataclass(frozen=True)
class Decoded:
    """
    Args:
        pixels: uint8 of the preprocessing's `shape`.
        width, height: of the upright picture.
    """

    pixels: torch.Tensor
    width: int
    height: int


def decode(model: DualEncoder, picture: PictureSource, pixel_limit: int = PIXEL_LIMIT) -> Decoded:
    """
    Raises:
        DataFault: it cannot be read or decoded.
    """
    whole = whole_picture(picture, None, pixel_limit)
    return Decoded(model.image_tower.preprocessing.decode(whole), whole.shape[1], whole.shape[0])


def shown(picture: PictureSource, side: int) -> Image.Image:
    """Upright RGB, at most `side` pixels high and wide, for drawing."""
    whole = Image.fromarray(whole_picture(picture, side, PIXEL_LIMIT))
    whole.thumbnail((side, side), Image.Resampling.BICUBIC)
    return whole


def find(
    model: DualEncoder,
    pictures: Sequence[Decoded],
    asked: Sequence[Sequence[str]],
    texts: Sequence[torch.Tensor],
    how: How,
) -> list[list[Grounded]]:
    """What is found of each picture's phrases in it: the one way from a model to boxes.

    Args:
        asked: phrases of each picture; `texts` are their unit features, ``[phrases, dim]`` each.

    Raises:
        RequestError: as `How.method_of`.
    """
    if how.method_of(model) == LEARNT:
        return _learnt(model, pictures, asked, texts, how)
    found = heat_maps(model, pictures, texts, how.method_of(model))
    return [
        [
            Grounded(phrase, heat, heat.regions(how.threshold, how.most))
            for phrase, heat in zip(phrases, maps, strict=True)
        ]
        for phrases, maps in zip(asked, found, strict=True)
    ]


def _learnt(
    model: DualEncoder,
    pictures: Sequence[Decoded],
    asked: Sequence[Sequence[str]],
    texts: Sequence[torch.Tensor],
    how: How,
) -> list[list[Grounded]]:
    """Boxes of the model's heads; a patch is as hot as its own region is probable."""
    found = []
    with evaluation_mode(model), torch.inference_mode():
        pixels = torch.stack([picture.pixels for picture in pictures]).to(model.device)
        tokens = model.image_tokens(pixels)
        assert model.heads is not None
        regions = model.heads(tokens)
        for number, (picture, phrases, own) in enumerate(zip(pictures, asked, texts, strict=True)):
            one = type(regions)(*(part[number : number + 1] for part in regions))
            own = own.to(one.features)
            rows, columns = tokens.grid[number].tolist()
            x, y, width, height = part = model.image_tower.preprocessing.part(picture.width, picture.height)
            hot = torch.sigmoid(one.scores(own))[0, : rows * columns].T.float().cpu().numpy()
            seen = (x, y, width * tokens.seen[1], height * tokens.seen[0])
            maps = [Heat(values.reshape(rows, columns), seen) for values in hot]
            entries = []
            for phrase, heat, best in zip(phrases, maps, detect(one, own)[0], strict=True):
                boxes = in_picture(best, part)
                kept = [region for region in boxes if region.score >= how.threshold * boxes[0].score]
                entries.append(Grounded(phrase, heat, kept[: how.most], learnt=True))
            found.append(entries)
    return found


def heat_maps(
    model: DualEncoder, pictures: Sequence[Decoded], texts: Sequence[torch.Tensor], method: str
) -> list[list[Heat]]:
    """For every picture a map for each row of its ``[phrases, dim]`` of `texts`."""
    with evaluation_mode(model), torch.inference_mode():
        pixels = torch.stack([picture.pixels for picture in pictures]).to(model.device)
        given = model.patch_features(pixels, method)
    found = []
    for number, (picture, own) in enumerate(zip(pictures, texts, strict=True)):
        part = model.image_tower.preprocessing.part(picture.width, picture.height)
        rows, columns = given.grid[number].tolist()
        found.append(heats(given.features[number, : rows * columns], rows, columns, own, part, given.seen))
    return found


def as_json(found: Grounded) -> dict[str, Any]:
    """Boxes and the map, in shares of the upright picture; ``boxes`` and ``relative`` are as `data import boxes` reads them."""
    heat = found.heat
    return {
        "phrase": found.phrase,
        "score": round(found.score, 5),
        "point": [round(one, 5) for one in heat.point],
        "boxes": [[round(one, 5) for one in region.box] for region in found.boxes],
        "scores": [round(region.score, 5) for region in found.boxes],
        "relative": True,
        "heat": {
            "part": [round(one, 5) for one in heat.part],
            "values": [[round(float(one), 4) for one in row] for row in heat.values],
        },
    }
