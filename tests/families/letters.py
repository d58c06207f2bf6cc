"""A small family of models unlike the shipped one. Importing this file makes it known.

Characters as tokens, pads that are attended to, the last position read, pictures cropped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from cnclip_ft.models.contract import ImageTower, TextTower, Tokenizer
from cnclip_ft.models.family import Family
from cnclip_ft.models.preprocessing import SquarePicture
from cnclip_ft.models.registry import register
from cnclip_ft.models.schema import Layers, Part, Pixels, TextPart, Vocabulary, Width
from data_tools.errors import RequestError

LETTERS = "?abcdefghijklmnopqrstuvwxyz0123456789 红黄蓝绿黑白大小圆方三角星月山水火木金土猫狗鸟鱼马牛羊一个只。"
HALF = (0.5, 0.5, 0.5)


class Spelling(Part):
    kind: Literal["letters"]
    lower_case: bool


class Letters(Tokenizer):
    """A token a character; a text ends in ``。``, which fills up the rest too: pads are tokens like others."""

    kind, schema = "letters", Spelling
    preparation = "lower case, a token a character, filled up with full stops"
    padding = "max_length"

    def __init__(self, letters: str, context_length: int, lower_case: bool = True) -> None:
        if context_length < 2:
            raise RequestError(f"context_length is {context_length}; a text needs at least 2 letters")
        self.letters, self.context_length, self.lower_case = letters, context_length, lower_case

    name = property(lambda self: "letters")
    vocab_size = property(lambda self: len(self.letters))
    pad_id = property(lambda self: self.letters.index("。"))  # unlike BERT's not 0

    def prepare(self, text: str) -> str:
        return text.lower() if self.lower_case else text

    def _ids(self, text: str) -> list[int]:
        return [max(self.letters.find(letter), 0) for letter in self.prepare(text)]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [[*self._ids(text)[: self.context_length - 1], self.pad_id] for text in texts]

    def lengths(self, texts: Sequence[str]) -> list[int]:
        return [len(self._ids(text)) + 1 for text in texts]

    def mask(self, input_ids: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(input_ids)

    def with_context_length(self, context_length: int) -> Letters:
        return Letters(self.letters, context_length, self.lower_case)

    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self.lower_case} {self.letters}".encode()).hexdigest()

    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind, "lower_case": self.lower_case}

    @classmethod
    def read(cls, place: Path | None, context_length: int, described: dict[str, Any]) -> Letters:
        if place is None:
            raise RequestError("the letters of this checkpoint are missing: vocab.json")
        try:
            letters = json.loads((place / "vocab.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RequestError(f"{place}: the letters cannot be read ({error})") from None
        return cls("".join(letters), context_length, described["lower_case"])

    def save(self, folder: str | Path) -> None:
        Path(folder, "vocab.json").write_text(json.dumps(list(self.letters), ensure_ascii=False), encoding="utf-8")


class Block(nn.Module):
    """Pre-norm attention of one head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.mixed, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        query, key, value = self.mixed(self.norm(tokens)).chunk(3, dim=2)
        weights = (query @ key.transpose(1, 2) / query.shape[2] ** 0.5).softmax(2)
        return tokens + self.out(weights @ value)


class Speller(TextPart):
    kind: Literal["speller"]
    width: Width
    depth: Layers
    letters: Vocabulary
    positions: Width

    @property
    def longest(self) -> int:
        return self.positions


class SpellerTower(TextTower):
    kind, schema = "speller", Speller
    layer_names = ("depth", r"layers\.(\d+)\.")

    def __init__(self, width: int, depth: int, letters: int, positions: int, output_dim: int) -> None:
        super().__init__()
        self.width, self.depth, self.vocab_size, self.max_length = width, depth, letters, positions
        self.letter_embedding, self.place_embedding = nn.Embedding(letters, width), nn.Embedding(positions, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(depth))
        self.head, self.output_dim = nn.Linear(width, output_dim), output_dim

    @classmethod
    def described(cls, numbers: dict[str, Any], output_dim: int) -> SpellerTower:
        return cls(numbers["width"], numbers["depth"], numbers["letters"], numbers["positions"], output_dim)

    @classmethod
    def fresh(cls, numbers: dict[str, Any], output_dim: int) -> SpellerTower:
        if unknown := numbers.keys() - {"width", "depth", "positions"}:
            raise RequestError(f"model.start.text: unknown key {', '.join(sorted(unknown))}")
        sizes = {"width": 16, "depth": 2, "positions": 20} | numbers
        return cls.described(sizes | {"letters": len(LETTERS)}, output_dim)

    def describe(self) -> dict[str, Any]:
        sizes = {"width": self.width, "depth": self.depth, "letters": self.vocab_size, "positions": self.max_length}
        return {"kind": self.kind} | sizes

    def tokenizer(self, context_length: int | None = None) -> Letters:
        return Letters(LETTERS, context_length or self.max_length)

    projection = property(lambda self: self.head)

    def blocks(self) -> list[nn.Module]:
        return [nn.ModuleList([self.letter_embedding, self.place_embedding]), *self.layers, self.head]

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        hidden = self.letter_embedding(input_ids) + self.place_embedding(places)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(hidden[:, -1])


class Tiles(Part):
    kind: Literal["tiles"]
    side: Pixels
    tile: Pixels
    width: Width
    depth: Layers


class TilesTower(ImageTower):
    kind, schema = "tiles", Tiles
    layer_names = ("depth", r"layers\.(\d+)\.")

    def __init__(self, side: int, tile: int, width: int, depth: int, output_dim: int) -> None:
        super().__init__()
        self.preprocessing = SquarePicture(side, "crop", HALF, HALF)
        self.sizes = {"side": side, "tile": tile, "width": width, "depth": depth}
        self.stem = nn.Conv2d(3, width, tile, tile)
        self.layers = nn.ModuleList(Block(width) for _ in range(depth))
        self.head, self.output_dim = nn.Linear(width, output_dim), output_dim

    @classmethod
    def described(cls, numbers: dict[str, Any], output_dim: int) -> TilesTower:
        return cls(numbers["side"], numbers["tile"], numbers["width"], numbers["depth"], output_dim)

    @classmethod
    def fresh(cls, numbers: dict[str, Any], output_dim: int, image_size: int | None = None) -> TilesTower:
        sizes = {"side": 24, "tile": 8, "width": 16, "depth": 2} | numbers
        return cls.described(sizes | ({"side": image_size} if image_size else {}), output_dim)

    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind} | self.sizes

    projection = property(lambda self: self.head)

    def blocks(self) -> list[nn.Module]:
        return [self.stem, *self.layers, self.head]

    def trunk(self, pixels: torch.Tensor) -> torch.Tensor:
        tokens = self.stem(pixels).flatten(2).transpose(1, 2)
        for layer in self.layers:
            tokens = layer(tokens)
        return tokens.mean(1)


class LettersFamily(Family):
    image_towers = (TilesTower,)
    text_towers = (SpellerTower,)
    tokenizers = (Letters,)


FAMILY = LettersFamily()
register(FAMILY)
