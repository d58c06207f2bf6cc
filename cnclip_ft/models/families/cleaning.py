"""How a text is prepared before its tokenizer, where code and not ``tokenizer.json`` does it.

open_clip (3.3, ``tokenizer.py``) mends and unescapes it, and then by kind: ``lower``: white space made single spaces, lower
case; ``whitespace``: the former alone; ``canonicalize``: underscores to spaces, ASCII punctuation dropped, lower case, single
spaces. transformers' SiglipTokenizer mends nothing: ``siglip``: lower case, ASCII punctuation dropped, single spaces;
``siglip_cased``: the last two alone.
"""

from __future__ import annotations

import html
import string
from importlib.util import find_spec
from typing import Literal

from data_tools.errors import RequestError

Clean = Literal["lower", "whitespace", "canonicalize", "siglip", "siglip_cased"]
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


_SIGLIP = ("siglip", "siglip_cased")


def whole_characters(text: str) -> str:
    """Lone surrogates (half an emoji out of a broken export) become U+FFFD: they cannot be tokenised."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def check_installed(kind: Clean) -> None:
    """
    Raises:
        RequestError: the library that mends broken encodings is missing, and texts of that kind are mended.
    """
    if kind not in _SIGLIP and find_spec("ftfy") is None:
        raise RequestError(
            "texts of this model are prepared with ftfy, which is not installed: pip install 'cnclip-ft[open_clip]'"
        )


def clean_text(text: str, kind: Clean) -> str:
    """`text` as the tokenizer of that kind takes it."""
    if kind in _SIGLIP:
        text = text.lower() if kind == "siglip" else text
        return " ".join(text.translate(_NO_PUNCTUATION).split())
    from ftfy import fix_text

    plain = text.isascii() and text.isprintable() and "&" not in text  # ftfy leaves it as it is, in 30 times the time
    if not plain:
        text = html.unescape(html.unescape(fix_text(text)))
    if kind == "canonicalize":
        text = text.replace("_", " ").translate(_NO_PUNCTUATION)
    return " ".join((text if kind == "whitespace" else text.lower()).split())
