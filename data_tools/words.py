"""Sentences in English and Chinese: said in English wherever they are text, in Chinese where a page asks for it."""

from __future__ import annotations

import locale
import os
from collections.abc import Iterable
from typing import Any

from data_tools.errors import RequestError

LANGUAGES = ("en", "zh")


def language_of(given: str | None) -> str:
    """`given`, else what the environment speaks: Chinese where its locale is, English anywhere else.

    Raises:
        RequestError: neither zh nor en.
    """
    if given is None:
        names = [os.environ.get(name) for name in ("LC_ALL", "LC_MESSAGES", "LANG")]
        said = next(filter(None, names), None) or locale.getlocale()[0] or ""
        return "zh" if said.lower().startswith(("zh", "chinese")) else "en"
    if given not in LANGUAGES:
        raise RequestError(f"--language {given!r}: zh or en")
    return given


def many(count: int, noun: str) -> str:
    """``1 pair``, ``1,000 pairs``; of a noun whose plural ends in s."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


class Said(str):
    """English text that knows its Chinese; as any string it is the English one.

    Args:
        en, zh: as for `str.format`; a value that is `Said` is put in in the language of the sentence.
    """

    zh: str

    def __new__(cls, en: str, zh: str, /, **values: Any) -> Said:
        self = super().__new__(cls, en.format(**values))
        self.zh = zh.format(**{name: said_in(value, "zh") for name, value in values.items()})
        return self

    @classmethod
    def exactly(cls, en: str, zh: str) -> Said:
        """Both as they are: braces stand for themselves."""
        return cls("{en}", "{zh}", en=str(en), zh=str(zh))

    def __reduce__(self) -> tuple[Any, ...]:  # copies and pickles are made from both
        return Said.exactly, (str(self), self.zh)


def said_in(value: Any, language: str) -> Any:
    """A sentence in `language`; what knows no Chinese (a name, a number) as it is."""
    return value.zh if language == "zh" and isinstance(value, Said) else value


def joined(parts: Iterable[str], between: str = "\n", between_zh: str | None = None) -> Said:
    """Sentences as one, in both languages."""
    known = list(parts)
    zh = (between if between_zh is None else between_zh).join(said_in(part, "zh") for part in known)
    return Said.exactly(between.join(known), zh)


def labelled(label: str, width: int, said: str) -> Said:
    """A line of a list: the label, filled up to `width` columns of a terminal, then what is said."""
    from rich.cells import set_cell_size  # late: the command prints help without it

    heads = [set_cell_size(said_in(label, language), width) for language in LANGUAGES]
    return joined([Said.exactly(*heads), said], "")
