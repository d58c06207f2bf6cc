"""Which messages docs/troubleshooting.md says more of, and where: its headings are words of them."""

from __future__ import annotations

import re

WORDS = (
    "out of memory on",
    "Training stopped before it reached the weights",
    "--continue goes on with the very same recipe",
    "holds other data than the run in",
    "holds a run already",
    "every state is broken",
    "damaged images, more than data.max_damaged_images allows",
    "carry the same text, so there is nothing to tell apart",
    "the full rate would never be reached",
    "is larger than",
    "this recipe cannot be run:",
    "--strict: the plan has warnings",
    "cannot be shared evenly by",
    "a process that loads pictures was ended from outside",
    "cannot be used (",
    "the run there is finished",
    "features hold NaN or infinity",
    "the recipe itself takes about",
    "is neither a store",
    "no such store, folder or file",
    "is not UTF-8",
    "holds something else than",
    "is not a store",
    "is not a readable LMDB file",
    "holds a store already",
    "is known to hold the",
    "the first line has to name the columns",
    "Mend the source, or raise --max-faults",
    ": another process is ",
    "no font with Chinese glyphs is installed",
    "tells these pictures apart too badly",
    "and could not be fetched from",
    "whole models that are read here",
    "the tensors are not those of the model it describes",
    "which no file of weights may do",
    "no such file or folder, and no published name",
    "refused, reading it would run code of the file",
    "the file is torn or damaged",
    "its image tower is code that the checkpoint names",
    "is not known here (known: ",
    "pip install 'cnclip-ft[",
    "was made by another model than",
    "cannot listen on",
    "the features of the export differ from the source by",
    "no threshold reaches precision",
    "holds no index",
    "can be reached from other machines",
)


def section_for(message: str, language: str) -> str | None:
    """``docs/troubleshooting.md#…`` (zh: the Chinese page) for a message that has an entry; None for others, and where a page is named."""
    if "docs/" in message:
        return None
    joined = " ".join(message.split())
    words = next((each for each in WORDS if each.strip() in joined), None)
    if words is None:
        return None
    return f"docs/troubleshooting{'.zh-CN' if language == 'zh' else ''}.md#{anchor(words)}"


def anchor(words: str) -> str:
    """What a heading becomes in an address, as code hosts make it: lower case, punctuation off, spaces to hyphens."""
    return re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")
