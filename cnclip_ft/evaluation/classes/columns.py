"""Classes that a store knows by itself: the values of a column kept with its pictures (a category)."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cnclip_ft.evaluation.classes.zero_shot import Class
from data_tools.columns import refuse_unknown
from data_tools.errors import RequestError
from data_tools.store import PairSource

FEW = 5  # pictures of a class below which its accuracy says little
MOST = 5_000  # classes
_NAMED = 5  # of a kind in a note


@dataclass(frozen=True)
class ColumnClasses:
    """`classes`, the largest first; `labels` of the pictures asked about, None where they belong to none; what to say of it."""

    classes: list[Class]
    labels: list[int | None]
    notes: list[str]


def column_classes(store: PairSource, ids: Sequence[Any], column: str, least: int = 1) -> ColumnClasses:
    """The values of `column` as classes, by their own words.

    Values that differ in width, letter case or blanks are one class, named as most pictures have it.

    Args:
        ids: the pictures, of those in `store`.
        least: pictures a value must have to be a class.

    Raises:
        RequestError: the store keeps no such column; it makes fewer than two classes, or sets nearly every picture apart.
    """
    refuse_unknown([column], store.columns, store.path)
    said = [str(store.columns_of(image_id).get(column, "")).strip() for image_id in ids]
    spellings: dict[str, Counter[str]] = {}
    for value in filter(None, said):
        spellings.setdefault(_folded(value), Counter())[value] += 1
    counts = {folded: found.total() for folded, found in spellings.items()}
    whole = sum(counts.values())
    if whole == 0:
        raise RequestError(f"none of the {len(ids):,} pictures has a value in {column}; name another column with --by")
    if len(counts) > max(20, whole // 2) or len(counts) > MOST:
        others = ", ".join(name for name in store.columns if name != column)
        raise RequestError(
            f"{column} has {len(counts):,} values on {whole:,} pictures: that is no category. "
            + (f"Name another column with --by: {others}" if others else "No other column is kept")
        )
    kept = sorted((f for f, count in counts.items() if count >= least), key=lambda f: (-counts[f], f))
    if len(kept) < 2:
        raise RequestError(
            f"{column} has {len(kept)} value{'' if len(kept) == 1 else 's'} with {least:,} or more pictures; at least two "
            f"are needed (values: {_some([f'{max(s, key=s.__getitem__)} ({s.total():,})' for s in spellings.values()])})"
        )
    names = {folded: spellings[folded].most_common(1)[0][0] for folded in kept}
    at = {folded: number for number, folded in enumerate(kept)}
    labels = [at.get(_folded(value)) if value else None for value in said]
    return ColumnClasses(
        [Class(names[folded], (names[folded],)) for folded in kept],
        labels,
        list(_notes(column, spellings, counts, names, len(ids) - whole, least)),
    )


def _notes(
    column: str,
    spellings: dict[str, Counter[str]],
    counts: dict[str, int],
    names: dict[str, str],
    empty: int,
    least: int,
) -> list[str]:
    notes = [f"classes: the {len(names):,} values of {column}"]
    if empty:
        notes.append(f"{empty:,} pictures have no value in {column}: classified, not scored")
    several = [found for found in spellings.values() if len(found) > 1]
    if several:
        shown = [" = ".join(repr(value) for value, _ in found.most_common()) for found in several]
        notes.append(f"spellings of one value were put together: {_some(shown)}")
    rare = [folded for folded, count in counts.items() if count < least]
    if rare:
        pictures = sum(counts[folded] for folded in rare)
        notes.append(
            f"{len(rare):,} values with fewer than {least:,} pictures are no classes: their {pictures:,} pictures are not scored"
        )
    few = [names[folded] for folded in names if counts[folded] < FEW]
    if few:
        notes.append(
            f"{len(few):,} classes have fewer than {FEW} pictures, so their accuracy says little: {_some(few)}; "
            f"--least {FEW} leaves them out"
        )
    return notes


def _some(items: Sequence[str]) -> str:
    more = len(items) - _NAMED
    return ", ".join(items[:_NAMED]) + (f" and {more:,} more" if more > 0 else "")


def _folded(value: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", value).casefold().split())
