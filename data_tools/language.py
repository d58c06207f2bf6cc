"""Which language a caption is in: counting scripts is enough to tell Chinese, English and a mixture apart."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from data_tools.errors import DataFault

LANGUAGES = ("zh", "en", "mixed")
_HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f]")
_WORD = re.compile("[A-Za-zÀ-ɏ]{2,}")  # one letter is a size or a model (T恤), not a language
_NAMES = {
    "zh": "zh",
    "cn": "zh",
    "chinese": "zh",
    "中文": "zh",
    "en": "en",
    "english": "en",
    "英文": "en",
    "mixed": "mixed",
}


def detect_language(text: str) -> str | None:
    """``zh``, ``en``, ``mixed``, or None where there is neither (digits, emoji, another script)."""
    if _HAN.search(text):
        return "mixed" if _WORD.search(text) else "zh"
    return "en" if _WORD.search(text) else None


def main_language(texts: Iterable[str], marks: Iterable[str | None]) -> str | None:
    """``zh`` or ``en``, whichever more of the texts are in, by their marks and, where there is none, by their letters; ``mixed``
    counts as Chinese. None where neither leads."""
    counts = Counter(mark or detect_language(text) for text, mark in zip(texts, marks, strict=True))
    chinese, english = counts["zh"] + counts["mixed"], counts["en"]
    return None if chinese == english else "zh" if chinese > english else "en"


def read_language(value: object) -> str | None:
    """A language as people write it (``zh-CN``, ``Chinese``, …) → ours; None stays None.

    Raises:
        DataFault: a language that is none of ours.
    """
    if value is None or value == "":
        return None
    name = _NAMES.get(re.split("[-_]", value.lower())[0]) if isinstance(value, str) else None
    if name is None:
        raise DataFault(
            f"language {value!r} is not known",
            mend="Write zh, en or mixed, or leave it out (it is detected).",
            kind="bad-language",
        )
    return name
