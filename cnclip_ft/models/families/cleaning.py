"""How open_clip prepares a text before its tokenizer (open_clip 3.3, ``tokenizer.py``): mended, unescaped, and by kind.

``lower``: white space made single spaces, lower case; ``whitespace``: the former alone; ``canonicalize``: underscores to
spaces, ASCII punctuation dropped, lower case, single spaces (SigLIP's).
"""

from __future__ import annotations

import html
import string
from typing import Literal

from data_tools.errors import RequestError

Clean = Literal["lower", "whitespace", "canonicalize"]
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def clean_text(text: str, kind: Clean) -> str:
    """`text` as open_clip's tokenizer of that kind takes it.

    Raises:
        RequestError: the library that mends broken encodings is missing.
    """
    try:
        from ftfy import fix_text
    except ImportError:
        raise RequestError(
            "texts for this model are prepared with ftfy, which is not installed: pip install 'cnclip-ft[open_clip]'"
        ) from None
    plain = text.isascii() and text.isprintable() and "&" not in text  # ftfy leaves it as it is, in 30 times the time
    if not text.isascii():  # half an emoji out of a broken export cannot be tokenised
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if not plain:
        text = html.unescape(html.unescape(fix_text(text)))
    if kind == "canonicalize":
        text = text.replace("_", " ").translate(_NO_PUNCTUATION)
    return " ".join((text if kind == "whitespace" else text.lower()).split())
