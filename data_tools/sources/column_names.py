"""Which column of a table is what: named by the user, else found by the names that tables of data sets and shops have."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from data_tools.errors import RequestError
from data_tools.sources.beside_cells import NEGATIVES, WEIGHT, usual

# In order of preference: a path before a link, a title before a description.
IMAGE_NAMES = (
    "image", "image_path", "file_name", "path", "file", "filepath", "image_name", "img", "image_file", "img_path", "picture",
    "photo", "图片", "图像", "图片路径", "图片文件", "图片文件名", "图片名", "图片名称", "文件名", "主图", "主图路径", "商品主图",
    "商品图片", "商品图", "宝贝主图", "宝贝图片", "产品图片", "照片", "图片地址", "图片链接", "图片url", "主图链接", "主图地址", "主图url",
    "main_image", "image_url", "img_url", "pic_url", "picture_url",
)  # fmt: skip
TEXT_NAMES = (
    "text", "caption", "captions", "texts", "title", "description", "sentence", "sentences", "comment", "query", "标题", "商品标题",
    "宝贝标题", "产品标题", "商品名称", "宝贝名称", "产品名称", "商品名", "品名", "名称", "图片描述", "商品描述", "宝贝描述", "产品描述",
    "描述", "文本", "文字", "说明", "product_name", "product_title", "item_name",
)  # fmt: skip
_ASIDE = re.compile(r"[\s_\-*＊:：]|[(（\[【].*?[)）\]】]")


def _plain(name: str) -> str:
    """Without case, spaces, underscores, the star of a required column, and what stands in brackets."""
    return _ASIDE.sub("", name).casefold()


def known_for(name: str, usual: Sequence[str]) -> bool:
    """Whether it is one of the usual names."""
    return _plain(name) in map(_plain, usual)


@dataclass(frozen=True)
class Columns:
    """Which column is what; None is looked for among the usual names.

    Args:
        keep: other columns to be kept with the picture; None: all that hold plain values.
        negatives, weight: what captions have beside them. A column of the usual name is that unless `keep` names it.
    """

    image: str | None = None
    text: tuple[str, ...] = ()
    image_id: str | None = None
    text_id: str | None = None
    language: str | None = None
    keep: tuple[str, ...] | None = None
    negatives: str | None = None
    weight: str | None = None

    def resolve(self, names: list[str], file: Path) -> Columns:
        """The columns of a table whose header is `names`.

        Raises:
            RequestError: a column is not there, or none can be guessed.
        """

        def given(name: str | None, what: str, flag: str) -> str | None:
            return None if name is None else _one(name, (), names, file, what, flag)

        image = _one(self.image, IMAGE_NAMES, names, file, "image", "--image-column")
        text = tuple(_one(name, (), names, file, "text", "--text-column") for name in self.text)
        text = text or (_one(None, TEXT_NAMES, names, file, "text", "--text-column"),)
        image_id = given(self.image_id, "id", "--image-id-column")
        text_id = given(self.text_id, "id", "--text-id-column")
        language = given(self.language, "language", "--language-column")
        language = language or ("language" if "language" in names else None)
        negatives, weight = self.beside(names)
        given(self.negatives, "negatives", "--negatives-column")
        given(self.weight, "weight", "--weight-column")
        found = Columns(image, text, image_id, text_id, language, None, negatives, weight)
        used = found.used()
        others = tuple(dict.fromkeys(name for name in names if name and name not in used and names.count(name) == 1))
        if self.keep is not None:
            others = tuple(str(given(name, "value to keep", "--keep-columns")) for name in self.keep)
        return replace(found, keep=others)

    def beside(self, names: Sequence[str]) -> tuple[str | None, str | None]:
        """The columns of negatives and of weights among `names`; None where there is none."""
        free = [name for name in names if name not in (self.keep or ()) and name not in self.used()]
        return self.negatives or usual(free, NEGATIVES), self.weight or usual(free, WEIGHT)

    def names_picture(self, cell: str) -> bool:
        """Whether a header's cell is the column of pictures."""
        return known_for(cell, IMAGE_NAMES) if self.image is None else cell.strip() == self.image

    def used(self) -> list[str]:
        """The columns that are read for something."""
        single = (self.image, self.image_id, self.text_id, self.language, self.negatives, self.weight)
        return [name for name in (*single, *self.text) if name]

    def in_words(self, encoding: str | None = None) -> str:
        """What is taken from where, for the summary."""
        texts = ", ".join(map(repr, self.text))
        kept = f"; kept with the picture: {', '.join(self.keep)}" if self.keep else ""
        for what, name in (("negatives", self.negatives), ("weights of pairs", self.weight)):
            kept = f"; {what} from {name!r}{kept}" if name else kept
        read = f"{encoding}; " if encoding else ""
        return f"{read}picture from {self.image!r}, text from {texts}{kept}"


def _one(name: str | None, usual: Sequence[str], names: list[str], file: Path, what: str, flag: str) -> str:
    if name is None:
        plain = {_plain(known): known for known in reversed(names)}
        name = next((plain[_plain(known)] for known in usual if _plain(known) in plain), None)
    if name is not None and names.count(name) > 1:
        raise RequestError(f"{file}: {names.count(name)} columns are called {name!r}; give each a name of its own.")
    if name is None or name not in names:
        wanted = f"no column {name!r}" if name else f"none of the columns is known to hold the {what}"
        if not any(names):
            raise RequestError(f"{file} is empty: its first line has to name the columns (a header like image,text)")
        raise RequestError(f"{file}: {wanted}; there are {', '.join(map(repr, names))}. Name it with {flag}.")
    return name
