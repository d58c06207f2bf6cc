"""MUGE (multimodal retrieval): queries of an e-commerce search with product photos, in the official source files.

The test split has no public answers: its texts name no image and are kept as texts to search with. Recall on it can only
be scored by the contest; the scores people publish are on ``valid``, text to image.
"""

from __future__ import annotations

from pathlib import Path

from data_tools.sources.official import OfficialSource

COUNTS = {
    "train": {"images": 129380, "texts": 248786},
    "valid": {"images": 29806, "texts": 5008},
    "test": {"images": 30399, "texts": 5004},
}


def muge(source: Path) -> dict[str, OfficialSource]:
    """The three splits as distributed: `{split}_imgs.tsv`, `{split}_texts.jsonl`."""
    return {split: OfficialSource(source, split, counts) for split, counts in COUNTS.items()}
