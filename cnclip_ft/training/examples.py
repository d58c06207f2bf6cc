"""Example queries with the pictures found for them: what a recall of 60 looks like, in TensorBoard and in the report."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from PIL import Image, ImageDraw

from cnclip_ft.features.encode import SplitFeatures
from cnclip_ft.retrieval.recall import topk
from data_tools import pictures
from data_tools.contact_sheet import find_font
from data_tools.errors import DataFault, RequestError
from data_tools.store import PairSource
from data_tools.store.layouts import Value

QUERIES, SHOWN, SIDE = 8, 5, 112
_GAP, _LINE = 6, 24
_RIGHT = (24, 150, 70)


@dataclass
class Retrieved:
    """A picture found for a text; `right`: it belongs to the text."""

    thumbnail: Image.Image
    score: float
    right: bool
    columns: dict[str, Value] = field(default_factory=dict)  # kept with it


@dataclass
class Example:
    """One text, and the pictures with the highest scores for it."""

    text: str
    found: list[Retrieved]


def find_examples(
    features: SplitFeatures | None, store: PairSource, queries: int = QUERIES, shown: int = SHOWN
) -> list[Example]:
    """`queries` texts spread evenly over the split (the same ones every time) with their `shown` best pictures; none without features."""
    if features is None:
        return []
    asked = features.positives[:, 1].unique()
    asked = asked[torch.linspace(0, len(asked) - 1, min(queries, len(asked))).round().long()]
    scores, indices = topk(features.text_features[asked], features.image_features, shown)
    right = {(image, text) for image, text in features.positives.tolist()}
    return [
        Example(
            features.texts[text],
            [
                Retrieved(
                    thumbnail(store.image(features.image_ids[image])),
                    score,
                    (image, text) in right,
                    store.columns_of(features.image_ids[image]),
                )
                for image, score in zip(row.tolist(), values.tolist(), strict=True)
            ],
        )
        for text, row, values in zip(asked.tolist(), indices, scores, strict=True)
    ]


def thumbnail(content: bytes, side: int = SIDE) -> Image.Image:
    """The longer side `side` pixels, upright, as it looks on white; what cannot be read is grey."""
    try:
        return pictures.thumbnail(content, side, enlarge=True)
    except DataFault:
        return Image.new("RGB", (side, side), "grey")


def draw_panel(examples: list[Example]) -> Image.Image:
    """One row per query: the text, its pictures below, right ones framed in green.

    Without a font that has Chinese glyphs the rows are numbered instead, and say why.
    """
    try:
        font = find_font(None, chinese=any(not example.text.isascii() for example in examples))
        heads = [example.text for example in examples]
    except RequestError:
        font = find_font(None, chinese=False)
        heads = [f"query {n} (no font with Chinese glyphs is installed)" for n in range(1, len(examples) + 1)]
    cell = SIDE + 2 * _GAP
    panel = Image.new("RGB", (SHOWN * cell + _GAP, len(examples) * (cell + _LINE) + _GAP), "white")
    pen = ImageDraw.Draw(panel)
    for row, (example, head) in enumerate(zip(examples, heads, strict=True)):
        top = row * (cell + _LINE) + _GAP
        pen.text((_GAP, top), head, fill="black", font=font)
        for column, found in enumerate(example.found):
            left = column * cell + _GAP
            if found.right:
                pen.rectangle((left - 3, top + _LINE - 3, left + SIDE + 3, top + _LINE + SIDE + 3), fill=_RIGHT)
                pen.rectangle((left, top + _LINE, left + SIDE, top + _LINE + SIDE), fill="white")
            picture = found.thumbnail
            panel.paste(picture, (left + (SIDE - picture.width) // 2, top + _LINE + (SIDE - picture.height) // 2))
    return panel
