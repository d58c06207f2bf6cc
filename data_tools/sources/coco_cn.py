"""COCO-CN (version 201805): 20,341 photos of MS-COCO with written Chinese sentences. Captions on request from the authors.

`source` is their folder (``coco-cn_{train,val,test}.txt``, ``imageid.human-written-caption.txt``); the photos are those of
MS-COCO 2014, in ``train2014/`` and ``val2014/``. The test set scored by the official code is 1,000 photos with 1,053
written sentences; the 5,000 translated ones are something else. Li et al., IEEE TMM 2019.
"""

from __future__ import annotations

from pathlib import Path

from data_tools.errors import RequestError
from data_tools.sources.captioned_images import CaptionedImagesSource, CaptionFile, find_one

SPLITS = {
    "train": ("coco-cn_train.txt", {"images": 18341, "texts": 20065}),
    "valid": ("coco-cn_val.txt", {"images": 1000, "texts": 1100}),
    "test": ("coco-cn_test.txt", {"images": 1000, "texts": 1053}),
}
CAPTIONS = {"written": "imageid.human-written-caption.txt", "translated": "imageid.manually-translated-caption.txt"}


def coco_cn(
    source: Path, images: Path | None = None, marks: tuple[str, ...] = ("written",)
) -> dict[str, CaptionedImagesSource]:
    """The three splits. `marks`: ``written`` (scored by the official code) or ``translated`` (1,000 test photos).

    Raises:
        RequestError: files are missing, or a mark is not known.
    """
    for mark in marks:
        if mark not in CAPTIONS:
            raise RequestError(f"--captions-from {mark!r}: COCO-CN has {', '.join(CAPTIONS)}")
    places = (source, source / "coco-cn-version1805v1.1", source / "data")
    photos = (
        images
        or find_one(
            (source, source / "images", source.parent, source.parent / "images"),
            ("train2014", "val2014"),
            "the photos of MS-COCO 2014 (or name the folder that holds both with --images)",
        ).parent
    )
    captions = [CaptionFile(find_one(places, (CAPTIONS[mark],), f"{mark} captions of COCO-CN"), "zh") for mark in marks]

    def find_image(name: str) -> Path:
        part = name.split("_")[1] if name.count("_") >= 2 else ""
        return photos / part / f"{name}.jpg"

    return {
        split: CaptionedImagesSource(
            "coco-cn",
            find_one(places, (names,), f"the list of {split} photos"),
            captions,
            find_image,
            counts if marks == ("written",) else {"images": counts["images"]},
        )
        for split, (names, counts) in SPLITS.items()
        if marks == ("written",) or split == "test"
    }
