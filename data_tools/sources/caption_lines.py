"""Caption files with a line per sentence, ``1000268201_693b08cb0e.jpg#zhc#0 句子`` or ``COCO_val2014_…#0<TAB>句子``."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from data_tools.annotations import check_text
from data_tools.errors import DataFault, RequestError
from data_tools.items import located
from data_tools.text_files import TextFile
from data_tools.walk import is_picture

# name, optionally #source, #number, then a tab or spaces, then the sentence; names may hold spaces if a tab follows
_LINE = re.compile(
    r"(?:(?P<tabbed>[^\t]*?)|(?P<name>\S*?))(?:#(?P<source>[A-Za-z]\w*))?(?:#(?P<number>\d+))?(?(tabbed)\t|[ \t]+)(?P<text>.*)",
    re.DOTALL,  # texts may hold a vertical tab or the like
)
_TAG = re.compile(r":[A-Za-z]+$")


@dataclass(frozen=True, slots=True)
class CaptionLine:
    """One sentence: the image as named, its name without ending, the mark before the sentence (its id), the sentence."""

    name: str
    image: str
    mark: str
    text: str
    line: int


def without_ending(name: str) -> str:
    """``a.jpg`` → ``a``."""
    return name.rpartition(".")[0] if is_picture(name) else name


def join_segmented(text: str) -> str:
    """``两:m 只:q 狗:n`` → ``两只狗``: words cut and tagged by a segmenter; two spaces stood for a comma."""
    parts = (part.split() for part in re.split(r"\s{2,}", text.strip()))
    return "，".join("".join(_TAG.sub("", word) for word in words) for words in parts if words)


def read_captions(
    file: Path, clean: Callable[[str], str] = str.strip, encoding: str = "utf-8"
) -> Iterator[CaptionLine | DataFault]:
    """Every line of a caption file as a sentence or a fault.

    Raises:
        RequestError: the file cannot be read.
    """
    with TextFile(file, encoding) as text:
        for number, line in text.lines():
            try:
                if isinstance(line, DataFault):
                    raise line
                found = _LINE.fullmatch(line)
                name = found and (found["tabbed"] or found["name"])
                if not found or not name:
                    raise DataFault(
                        f"not a caption line: {line[:60]!r}",
                        mend="A line is image#number<TAB>sentence.",
                        kind="bad-caption-line",
                    )
                name = name.strip()
                image = without_ending(name)
                mark = "#".join(part for part in (image, found["source"], found["number"] or str(number)) if part)
                yield CaptionLine(name, image, mark, check_text(clean(found["text"])), number)
            except DataFault as fault:
                yield located(fault, file, number)


def read_names(file: Path, encoding: str = "utf-8") -> list[str]:
    """The image names of a split file, one a line, with or without ending, in order.

    Raises:
        RequestError: the file is missing or not text, names an image twice, or one outside of the folder of images.
    """
    names = []
    with TextFile(file, encoding) as text:
        for number, line in text.lines():
            if isinstance(line, DataFault):
                raise RequestError(str(located(line, file, number)))
            name = without_ending(line.split("#")[0].strip())
            if "/" in name or "\\" in name or name in ("", ".", "..") or "\0" in name:
                raise RequestError(
                    f"{file}:{number}: {name[:60]!r} is no name of an image; a line is like 1000092795.jpg"
                )
            names.append(name)
    if len(set(names)) < len(names):
        raise RequestError(f"{file} names {len(names) - len(set(names))} images twice")
    return names
