"""What the rules of `own-data` look at: how much there is to learn from, on what, and from where."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from data_tools.words import Said

NAME = "own-data"
FEWEST = 8  # pairs: two batches of four
ALIGN, CONTRAST = "align", "contrast"  # the stages whose settings follow; others have to be written out

Start = Literal["whole", "towers", "new text", "new image", "new"]


@dataclass(frozen=True)
class Facts:
    """What the rules look at. `pairs`: visits of an epoch; `images`: different pictures; `device`: cpu, cuda, …; `memory`: GiB of one
    card (None: a CPU, or not known); `devices`: processes; `width`: of the wider tower that is made new; `one_size`: of all pictures, not each
    in its own shape; `convolutions`: the image tower is a network of them, by an import path: what it learnt from had no texts; `captions`:
    of a picture, on average, as they lie in the stores."""

    pairs: int
    images: int
    device: str = "cpu"
    memory: float | None = None
    devices: int = 1
    start: Start = "whole"
    width: int = 768
    one_size: bool = True
    convolutions: bool = False
    captions: float = 1.0


EXAMPLE = Facts(pairs=10_000, images=2_000, captions=5.0)  # to look at a recipe without data
_STARTS = {
    "whole": Said("a model trained whole", "整体训练过的模型"),
    "towers": Said("two pretrained towers that had not met", "两座互不相识的预训练塔"),
    "new text": Said("a new text tower", "新建的文本塔"),
    "new image": Said("a new image tower", "新建的图像塔"),
    "new": Said("both towers new", "两座塔都是新建的"),
}


def facts_line(facts: Facts) -> Said:
    """What was looked at."""
    return Said(
        "{name}: {pairs:,} pairs, {images:,} pictures; {devices} × {device}{memory}; {start}",
        "{name}：{pairs:,} 个图文对，{images:,} 张图片；{devices} × {device}{memory}；{start}",
        name=NAME,
        pairs=facts.pairs,
        images=facts.images,
        devices=facts.devices,
        device=facts.device,
        memory="" if facts.memory is None else f", {facts.memory:.0f} GiB",
        start=_STARTS[facts.start],
    )
