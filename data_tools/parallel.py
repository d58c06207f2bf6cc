"""Parallel text: rows that say one thing in two or more languages, without pictures, in a store of texts.

Each text lies in the store as one without a picture, under the id ``ROW:LANGUAGE`` (``12:zh``): a store like any other, whole or
not there, checked and continued like any other. Row and language are read off the id.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from data_tools.errors import DataFault, RequestError
from data_tools.language import read_language
from data_tools.store import Id, PairSource

# Two-letter codes of ISO 639-1.
CODES = frozenset(
    "aa ab ae af ak am an ar as av ay az ba be bg bh bi bm bn bo br bs ca ce ch co cr cs cu cv cy da de dv dz ee el en eo es et "
    "eu fa ff fi fj fo fr fy ga gd gl gn gu gv ha he hi ho hr ht hu hy hz ia id ie ig ii ik io is it iu ja jv ka kg ki kj kk kl "
    "km kn ko kr ks ku kv kw ky la lb lg li ln lo lt lu lv mg mh mi mk ml mn mr ms mt my na nb nd ne ng nl nn no nr nv ny oc oj "
    "om or os pa pi pl ps pt qu rm rn ro ru rw sa sc sd se sg si sk sl sm sn so sq sr ss st su sv sw ta te tg th ti tk tl tn to "
    "tr ts tt tw ty ug uk ur uz ve vi vo wa wo xh yi yo za zh zu".split()
)
_ID = re.compile(r"(.+):([a-z]{2})")


def language_code(name: str) -> str | None:
    """``zh``, ``en-US``, ``Chinese``, ``中文`` → the two-letter code; None for what names no language."""
    try:
        found = read_language(name.strip()) if name.strip() else None
    except DataFault:
        found = re.split("[-_]", name.strip().lower())[0]
    return found if found in CODES else None


def text_id(row: int, language: str) -> str:
    return f"{row}:{language}"


@dataclass(frozen=True)
class ParallelTexts:
    """Rows in stored order, each language → text."""

    store: PairSource
    rows: list[dict[str, str]]

    @cached_property
    def languages(self) -> dict[str, int]:
        """Language → rows that have it, the most frequent first."""
        return dict(Counter(language for row in self.rows for language in row).most_common())

    def __len__(self) -> int:
        return len(self.rows)


def _row_of(item_id: Id) -> tuple[str, str] | None:
    found = _ID.fullmatch(item_id) if isinstance(item_id, str) else None
    return (found[1], found[2]) if found and found[2] in CODES else None


def is_parallel(store: PairSource) -> bool:
    """Whether the store holds parallel text: texts alone, each under an id of a row and a language."""
    texts = store.lone_texts if not len(store) and not store.image_count else []
    return bool(texts) and all(_row_of(item_id) for item_id, _, _ in texts)


def read_parallel(store: PairSource) -> ParallelTexts:
    """The rows of a store of parallel text.

    Raises:
        RequestError: it is none.
    """
    if not is_parallel(store):
        raise RequestError(
            f"{store.path} holds no parallel text (it has {len(store):,} pairs and {len(store.lone_texts):,} texts without a picture). "
            "Make a store of rows in two languages: cnclip-ft data import parallel FILE --output DIR/parallel"
        )
    rows: dict[str, dict[str, str]] = {}
    for item_id, text, _ in store.lone_texts:
        place = _row_of(item_id)
        assert place is not None  # looked at above
        rows.setdefault(place[0], {})[place[1]] = text
    return ParallelTexts(store, list(rows.values()))
