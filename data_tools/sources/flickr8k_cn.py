"""Flickr8k-CN: 8,000 photos with Chinese captions by people, machine and human translations, and the English ones.

`source` holds the caption files and split lists (or has them in ``data/``); the photos lie in ``Flicker8k_Dataset/``,
``Images/`` or ``images/`` there, or in the folder given. Li et al., ICMR 2016; Hodosh et al. 2013.
"""

from __future__ import annotations

from pathlib import Path

from data_tools.errors import RequestError
from data_tools.sources.captioned_images import CaptionedImagesSource, CaptionFile, find_one

SPLITS = {"train": ("flickr8ktrain.txt", 6000), "valid": ("flickr8kval.txt", 1000), "test": ("flickr8ktest.txt", 1000)}
IMAGE_FOLDERS = ("Flicker8k_Dataset", "Flickr8k_Dataset", "Images", "images")
# mark → (file, language, captions a photo)
CAPTIONS = {
    "zhc": ("flickr8kzhc.caption.txt", "zh", 5),
    "zhb": ("flickr8kzhb.caption.txt", "zh", 5),
    "zhg": ("flickr8kzhg.caption.txt", "zh", 5),
    "zhmtest": ("flickr8kzhmtest.captions.txt", "zh", 5),
    "enc": ("flickr8kenc.caption.txt", "en", 5),
}


def flickr8k_cn(
    source: Path, images: Path | None = None, marks: tuple[str, ...] = ("zhc",)
) -> dict[str, CaptionedImagesSource]:
    """The three splits. `marks`: which captions; ``zhc`` (people, from the photo) unless said.

    Raises:
        RequestError: files are missing, or a mark is not known.
    """
    for mark in marks:
        if mark not in CAPTIONS:
            raise RequestError(f"--captions-from {mark!r}: Flickr8k-CN has {', '.join(CAPTIONS)}")
    folders = (source, source / "data")
    photos = images or find_one(
        (source, source.parent), IMAGE_FOLDERS, "the photos of Flickr8k (or name their folder with --images)"
    )
    splits = {}
    for split, (names, count) in SPLITS.items():
        if "zhmtest" in marks and split != "test":
            continue  # translated for the test split only
        files = [
            (find_one(folders, (CAPTIONS[mark][0],), f"captions {mark} of Flickr8k-CN"), *CAPTIONS[mark][1:])
            for mark in marks
        ]
        splits[split] = CaptionedImagesSource(
            "flickr8k-cn",
            find_one(folders, (names,), f"the list of {split} photos"),
            [CaptionFile(file, language) for file, language, _ in files],
            lambda name: photos / f"{name}.jpg",
            {"images": count, "texts": count * sum(each for _, _, each in files)},
        )
    return splits
