"""Flickr30K-CN: 31,783 photos, five captions each; machine-translated for training, by people for the test.

Two forms are read: the folder distributed with Chinese-CLIP ({train,valid,test}_imgs.tsv and _texts.jsonl), and the
authors' own caption folders (``flickr30kzhbbosontrain/TextData/seg.….caption.txt``: words cut apart and tagged, joined
again here) beside the photos of Flickr30k. Lan et al., ACM MM 2017.
"""

from __future__ import annotations

from pathlib import Path

from data_tools.items import Source
from data_tools.sources.caption_lines import join_segmented
from data_tools.sources.captioned_images import CaptionedImagesSource, CaptionFile, find_one
from data_tools.sources.official import OfficialSource

COUNTS = {
    "train": {"images": 29783, "texts": 148915},
    "valid": {"images": 1000, "texts": 5000},
    "test": {"images": 1000, "texts": 5000},
}
FOLDERS = {"train": "flickr30kzhbbosontrain", "valid": "flickr30kzhbbosonval", "test": "flickr30kzhmbosontest"}
IMAGE_FOLDERS = ("flickr30k-images", "flickr30k_images", "Images", "images")


def flickr30k_cn(source: Path, images: Path | None = None) -> dict[str, Source]:
    """The splits that are there.

    Raises:
        RequestError: neither form is there, or the photos are missing.
    """
    if any(source.glob("*_imgs.tsv")):
        return {split: OfficialSource(source, split, counts) for split, counts in COUNTS.items()}
    places = (source, source / "annotations", source / "flickr30k-cn")
    find_one(places, tuple(FOLDERS.values()), "Flickr30K-CN: neither {split}_imgs.tsv nor the authors' folders")
    photos = images or find_one(
        (source, source.parent), IMAGE_FOLDERS, "the photos of Flickr30k (or name their folder with --images)"
    )
    splits: dict[str, Source] = {}
    for split, name in FOLDERS.items():
        folder = next((place / name for place in places if (place / name).is_dir()), None)
        if folder is not None:
            captions = find_one(
                (folder / "TextData",), (f"seg.{name}.caption.txt", f"{name}.caption.txt"), f"captions of {split}"
            )
            splits[split] = CaptionedImagesSource(
                "flickr30k-cn",
                folder / "ImageSets" / f"{name}.txt",
                [CaptionFile(captions, "zh", join_segmented)],
                lambda image: photos / f"{image}.jpg",
                COUNTS[split],
            )
    return splits
