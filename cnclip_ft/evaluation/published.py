"""Published recalls to stand beside our own: arXiv 2211.01335v3, tables of MUGE, Flickr30K-CN and COCO-CN.

Recall@1/5/10 in percent. MUGE is its validation split and is scored text→image only; the others are test splits.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

PAPER = "arXiv 2211.01335v3"
Three = tuple[float, float, float]


@dataclass(frozen=True)
class PublishedSplit:
    """A split the paper scores, how a path says so, and what is known of its size."""

    title: str
    split: str
    marks: tuple[str, ...]  # found in the path, after case, "-" and "_" are dropped
    images: int | None = None
    texts: int | None = None


SPLITS = {
    "muge": PublishedSplit("MUGE", "valid", ("muge",)),
    "flickr30k-cn": PublishedSplit("Flickr30K-CN", "test", ("flickr30k", "f30k"), 1000, 5000),
    "coco-cn": PublishedSplit("COCO-CN", "test", ("cococn",), 1000, 1053),
}

_BOTH = ("zero-shot text→image", "fine-tuned text→image", "zero-shot image→text", "fine-tuned image→text")
# Per size: MUGE zero-shot and fine-tuned; then the four of `_BOTH` for Flickr30K-CN and for COCO-CN.
_ROWS: dict[str, tuple[Three, ...]] = {
    "RN50": (
        (42.6, 68.6, 77.9), (48.6, 75.1, 84.0),
        (48.8, 76.0, 84.6), (66.7, 89.4, 94.1), (60.0, 85.9, 92.0), (84.2, 96.7, 98.0),
        (48.1, 81.3, 90.5), (66.8, 91.1, 97.0), (51.6, 81.2, 90.5), (68.4, 93.3, 97.8),
    ),
    "ViT-B-16": (
        (52.1, 76.7, 84.4), (58.4, 83.6, 90.0),
        (62.7, 86.9, 92.8), (79.1, 94.8, 97.4), (74.6, 93.5, 97.1), (93.5, 99.0, 99.5),
        (62.2, 86.6, 94.9), (77.0, 97.1, 99.0), (57.0, 84.1, 93.6), (77.4, 96.2, 98.9),
    ),
    "ViT-L-14": (
        (56.3, 79.8, 86.2), (63.3, 85.6, 91.3),
        (68.0, 89.7, 94.4), (82.7, 96.7, 98.6), (80.2, 96.6, 98.2), (96.1, 99.5, 99.9),
        (64.0, 89.2, 94.4), (78.9, 96.3, 99.0), (60.4, 84.2, 92.9), (80.2, 96.7, 99.2),
    ),
    "ViT-L-14-336": (
        (59.0, 81.4, 87.8), (65.3, 86.7, 92.1),
        (69.0, 90.7, 95.4), (84.4, 97.1, 98.7), (83.3, 97.2, 98.5), (96.6, 99.8, 100.0),
        (64.7, 89.6, 94.6), (80.1, 96.7, 99.2), (63.4, 87.2, 94.4), (81.2, 97.2, 99.1),
    ),
    "ViT-H-14": (
        (63.0, 84.1, 89.2), (68.9, 88.7, 93.1),
        (71.2, 91.4, 95.5), (83.8, 96.9, 98.6), (81.6, 97.5, 98.8), (95.3, 99.7, 100.0),
        (69.2, 89.9, 96.1), (81.5, 96.9, 99.1), (63.0, 86.6, 92.9), (83.5, 97.3, 99.2),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class PublishedRow:
    """One row of the paper; a direction it does not score is None."""

    dataset: str
    size: str
    setting: str  # "zero-shot" | "fine-tuned"
    text_to_image: Three
    image_to_text: Three | None

    @property
    def mean_recall(self) -> float:
        numbers = [*self.text_to_image, *(self.image_to_text or ())]
        return sum(numbers) / len(numbers)

    def as_dict(self) -> dict[str, object]:
        return {
            "dataset": self.dataset, "size": self.size, "setting": self.setting, "source": PAPER,
            "text_to_image": dict(zip(("r1", "r5", "r10"), self.text_to_image, strict=True)),
            "image_to_text": self.image_to_text and dict(zip(("r1", "r5", "r10"), self.image_to_text, strict=True)),
            "mean_recall": self.mean_recall,
        }  # fmt: skip

    def cells(self) -> list[str]:
        """A row under `recall_table.recall_heads`; the paper gives no median ranks."""
        numbers = [*self.text_to_image, *(self.image_to_text or (None,) * 3), self.mean_recall]
        name = f"  published · {self.dataset} {self.size} {self.setting}"
        return [name, *("–" if number is None else f"{number:.1f}" for number in numbers), "–", "–"]


def rows_for(dataset: str, size: str) -> list[PublishedRow]:
    """Zero-shot and fine-tuned row of a data set (a key of `SPLITS`) and model size; none for an unknown size."""
    numbers, title = _ROWS.get(size), SPLITS[dataset].title
    if numbers is None:
        return []
    if dataset == "muge":
        return [
            PublishedRow(title, size, setting, numbers[i], None)
            for i, setting in enumerate(("zero-shot", "fine-tuned"))
        ]
    first = 2 if dataset == "flickr30k-cn" else 6
    four = dict(zip(_BOTH, numbers[first : first + 4], strict=True))
    return [
        PublishedRow(title, size, setting, four[f"{setting} text→image"], four[f"{setting} image→text"])
        for setting in ("zero-shot", "fine-tuned")
    ]


def recognise(path: Path) -> str | None:
    """The data set whose published split this store is, judged by its path; None when it is none of them."""
    parts = path.resolve().parts
    for key, known in SPLITS.items():
        squeezed = "".join(parts[-4:-1]).lower().replace("-", "").replace("_", "").replace(" ", "")
        if parts[-1].lower() == known.split and any(mark in squeezed for mark in known.marks):
            return key
    return None


def size_warning(dataset: str, images: int, texts: int) -> str | None:
    """What to say when the split is not as large as the one the paper scores."""
    known = SPLITS[dataset]
    wanted = [(known.images, images, "images"), (known.texts, texts, "texts")]
    wrong = [f"{found:,} {what} instead of {number:,}" for number, found, what in wanted if number and number != found]
    if not wrong:
        return None
    return (
        f"the published numbers are for another {known.title} {known.split} split: this one has {' and '.join(wrong)}"
    )
