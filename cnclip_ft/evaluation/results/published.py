"""Published results to stand beside our own, each with its source.

Recall@1/5/10 in percent. Chinese-CLIP's are those of arXiv 2211.01335v3, tables of MUGE, Flickr30K-CN and COCO-CN: MUGE is its
validation split and is scored text→image only; the others are test splits. Other models' stand in `_OTHERS`, by test set and
language, accuracies on ImageNet in `_ACCURACIES`: zero-shot, and only where the pool is that of the set.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

PAPER = "arXiv 2211.01335v3"
Three = tuple[float, float, float]
Recalls = tuple[float, float | None, float | None]  # some print recall@1 alone


@dataclass(frozen=True)
class PublishedSplit:
    """A split the paper scores, how a path says so, and its size; all are in Chinese."""

    title: str
    split: str
    marks: tuple[str, ...]  # found in the path, after case, "-" and "_" are dropped
    images: int
    texts: int


SPLITS = {
    "muge": PublishedSplit("MUGE", "valid", ("muge",), 29806, 5008),
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
    """One row of a published table; a direction it does not score is None."""

    dataset: str
    size: str
    setting: str  # "zero-shot" | "fine-tuned"
    text_to_image: Recalls
    image_to_text: Recalls | None
    model: str = "Chinese-CLIP"
    source: str = PAPER

    @property
    def mean_recall(self) -> float | None:
        """None where recalls are missing."""
        numbers = [*self.text_to_image, *(self.image_to_text or ())]
        known = [number for number in numbers if number is not None]
        return sum(known) / len(known) if len(known) == len(numbers) else None

    def as_dict(self) -> dict[str, object]:
        return {
            "dataset": self.dataset, "size": self.size, "model": self.model, "setting": self.setting,
            "source": self.source,
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


_CLIP, _ALTCLIP = "arXiv 2103.00020, table 13", "README of AltCLIP in FlagAI (arXiv 2211.06679)"
_QA, _FG = "README of QA-CLIP (TencentARC)", "arXiv 2510.10921, table of English image-level tasks"
_SIGLIP = "README_siglip2 of big_vision (arXiv 2502.14786)"
_OPEN = "open_clip, docs/openclip_multilingual_retrieval_results.csv"
_WORDS = "arXiv 2103.00020, table 1"

# (test set, language) → model, size, text→image, image→text, source
_OTHERS: dict[tuple[str, str], tuple[tuple[str, str, Recalls, Recalls, str], ...]] = {
    ("flickr30k-cn", "zh"): (
        ("CLIP", "ViT-L-14", (0.0, 2.4, 4.0), (2.3, 8.1, 12.6), _ALTCLIP),
        ("AltCLIP", "ViT-L-14", (69.8, 89.9, 94.7), (84.8, 97.4, 98.8), _ALTCLIP),
    ),
    ("flickr30k", "en"): (
        ("Chinese-CLIP", "ViT-L-14", (49.5, 76.9, 83.8), (66.5, 91.2, 96.0), _ALTCLIP),
        ("CLIP", "ViT-L-14", (65.0, 87.1, 92.2), (85.1, 97.3, 99.2), _ALTCLIP),
        ("CLIP", "ViT-L-14-336", (68.7, 90.6, 95.2), (88.0, 98.7, 99.4), _CLIP),
        ("AltCLIP", "ViT-L-14", (72.5, 91.6, 95.4), (86.0, 98.0, 99.1), _ALTCLIP),
        ("SigLIP 2", "B/16", (78.0, None, None), (92.6, None, None), _FG),
        ("SigLIP 2", "L/16", (82.6, None, None), (94.3, None, None), _FG),
        ("SigLIP 2", "So400m/16", (82.5, None, None), (94.1, None, None), _FG),
        ("FG-CLIP 2", "B/16", (81.9, None, None), (94.1, None, None), _FG),
        ("FG-CLIP 2", "L/16", (84.8, None, None), (96.6, None, None), _FG),
        ("FG-CLIP 2", "So400m/16", (85.0, None, None), (95.9, None, None), _FG),
    ),
    ("coco-cn", "zh"): (("AltCLIP", "ViT-L-14", (63.5, 87.6, 93.5), (62.6, 88.5, 95.9), _QA),),
    ("coco", "en"): (
        ("CLIP", "ViT-L-14-336", (37.8, 62.4, 72.2), (58.4, 81.5, 88.1), _CLIP),
        ("SigLIP 2", "B/16 224", (52.1, None, None), (68.9, None, None), _SIGLIP),
        ("SigLIP 2", "B/16 256", (53.2, None, None), (69.7, None, None), _SIGLIP),
        ("SigLIP 2", "L/16 256", (54.7, None, None), (71.5, None, None), _SIGLIP),
        ("SigLIP 2", "So400m/14 384", (55.8, None, None), (71.7, None, None), _SIGLIP),
        ("SigLIP 2", "g-opt/16 384", (56.1, None, None), (72.8, None, None), _SIGLIP),
    ),
    ("muge", "zh"): (("AltCLIP", "ViT-L-14", (29.6, 49.9, 58.8), (21.4, 42.0, 51.9), _QA),),
    ("xm3600", "zh"): (("OpenCLIP", "XLM-R ViT-H-14", (59.1, 83.2, 89.3), (63.2, 86.7, 92.1), _OPEN),),
    ("xm3600", "en"): (("OpenCLIP", "XLM-R ViT-H-14", (51.3, 77.8, 85.1), (52.7, 78.9, 87.0), _OPEN),),
    ("xtd10", "zh"): (("OpenCLIP", "XLM-R ViT-H-14", (61.9, 85.7, 93.4), (63.7, 88.4, 94.7), _OPEN),),
    ("xtd10", "en"): (("OpenCLIP", "XLM-R ViT-H-14", (73.5, 90.8, 95.1), (71.5, 92.4, 97.3), _OPEN),),
}  # fmt: skip


@dataclass(frozen=True)
class PublishedAccuracy:
    """Zero-shot accuracy on ImageNet in percent, with the words of one language."""

    model: str
    size: str
    top1: float
    source: str


_ACCURACIES: dict[str, tuple[PublishedAccuracy, ...]] = {
    "zh": (
        PublishedAccuracy("Chinese-CLIP", "RN50", 33.5, _QA),
        PublishedAccuracy("Chinese-CLIP", "ViT-B-16", 48.4, _QA),
        PublishedAccuracy("Chinese-CLIP", "ViT-L-14", 54.7, _QA),
    ),
    "en": (
        PublishedAccuracy("CLIP", "ViT-L-14-336", 76.2, _WORDS),
        PublishedAccuracy("SigLIP 2", "B/16 224", 78.2, _SIGLIP),
        PublishedAccuracy("SigLIP 2", "B/16 256", 79.1, _SIGLIP),
        PublishedAccuracy("SigLIP 2", "L/16 256", 82.5, _SIGLIP),
        PublishedAccuracy("SigLIP 2", "So400m/14 384", 84.1, _SIGLIP),
        PublishedAccuracy("SigLIP 2", "g-opt/16 384", 85.0, _SIGLIP),
        PublishedAccuracy("FG-CLIP 2", "B/16", 79.5, _FG),
        PublishedAccuracy("FG-CLIP 2", "L/16", 83.0, _FG),
        PublishedAccuracy("FG-CLIP 2", "So400m/16", 84.1, _FG),
    ),
}


def all_rows(dataset: str, language: str, size: str | None) -> list[PublishedRow]:
    """Every model's zero-shot rows of a test set of `benchmark`, and the fine-tuned one of Chinese-CLIP's `size`."""
    own = [row for name in _ROWS for row in rows_for(dataset, name)] if dataset in SPLITS else []
    rows = [row for row in own if row.setting == "zero-shot" or row.size == size]
    others = _OTHERS.get((dataset, language), ())
    return rows + [
        PublishedRow(dataset, name, "zero-shot", by_text, by_image, model, source)
        for model, name, by_text, by_image, source in others
    ]


def accuracies(language: str) -> tuple[PublishedAccuracy, ...]:
    """Accuracies on ImageNet's val with the words of `language`."""
    return _ACCURACIES.get(language, ())


def recognise(path: Path) -> str | None:
    """The data set whose published split this store is, judged by its path; None when it is none of them."""
    parts = path.resolve().parts
    for key, known in SPLITS.items():
        squeezed = "".join(parts[-4:-1]).lower().replace("-", "").replace("_", "").replace(" ", "")
        if parts[-1].lower() == known.split and any(mark in squeezed for mark in known.marks):
            return key
    return None


def pool_warning(dataset: str, images: int, texts: int, language: str | None) -> str | None:
    """What to say when the split is not as large as the one the paper scores, or in another language."""
    known = SPLITS[dataset]
    if language == "en":
        return f"the published numbers are for the Chinese texts of {known.title}; most of these are English"
    wanted = [(known.images, images, "images"), (known.texts, texts, "texts")]
    wrong = [f"{found:,} {what} instead of {number:,}" for number, found, what in wanted if number != found]
    if not wrong:
        return None
    return (
        f"the published numbers are for another {known.title} {known.split} split: this one has {' and '.join(wrong)}"
    )
