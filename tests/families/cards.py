"""A card for every family: how its own library writes a small random model of it, and how it is called."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from tests.families.texts import many_texts

VISION = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 32, "patch_size": 8,
}  # fmt: skip
TEXT = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
DIM = 24


@dataclass(frozen=True)
class Card:
    """
    Args:
        name: the folder's `model_type`.
        make: the model and what prepares pictures and texts, by the library's own classes.
        tokens: how the library's tokenizer is called.
        loss: whether the library's model has a loss of its own.
        exact: how far features may be apart.
    """

    name: str
    make: Callable[[], tuple[Any, Any, Any]]
    tokens: dict[str, Any] = field(default_factory=lambda: {"padding": True})
    length: int = 77
    loss: bool = True
    exact: float = 1e-5

    def write(self, folder: Path, seed: int = 0) -> Path:
        """The folder as the library saves it; biases and norms are not the initial ones."""
        torch.manual_seed(seed)
        model, tokenizer, pictures = self.make()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.ndim else 0.01))
        for part in (model, tokenizer, pictures):
            part.save_pretrained(folder)
        return folder


@cache
def byte_pairs(size: int = 700) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A small vocabulary of CLIP's kind."""
    backend = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, end_of_word_suffix="</w>", initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(many_texts(500, seed=1), trainer)
    model = json.loads(backend.to_str())["model"]
    letters = [*sorted(alphabet), *(f"{letter}</w>" for letter in sorted(alphabet))]
    merges = [tuple(pair) for pair in model["merges"]]
    tokens = dict.fromkeys([*letters, *("".join(pair) for pair in merges), "<|startoftext|>", "<|endoftext|>"])
    return {token: number for number, token in enumerate(tokens)}, merges


@cache
def pieces(size: int = 900) -> list[tuple[str, float]]:
    """A small vocabulary of XLM-R's kind."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=size, special_tokens=special, unk_token="<unk>", show_progress=False)
    backend.train_from_iterator(many_texts(300, seed=1)[7:], trainer)
    return [tuple(entry) for entry in json.loads(backend.to_str())["model"]["vocab"]]


# ---- CLIP and what is built like it ---------------------------------------------------------------------------------


def _clip(end: int | None = None, **more: Any) -> Callable[[], tuple[Any, Any, Any]]:
    def make() -> tuple[Any, Any, Any]:
        vocabulary, merges = byte_pairs()
        tokenizer = transformers.CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)
        last = len(vocabulary) - 1
        text = TEXT | {"vocab_size": last + 1, "bos_token_id": last - 1, "eos_token_id": last if end is None else end}
        config = transformers.CLIPConfig(text_config=text | more, vision_config=VISION | more, projection_dim=DIM)
        return transformers.CLIPModel(config), tokenizer, _cropped()

    return make


def _cropped() -> Any:
    return transformers.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


def _metaclip_2() -> tuple[Any, Any, Any]:
    tokenizer = transformers.XLMRobertaTokenizer(vocab=pieces(), model_max_length=77)
    text = TEXT | {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    config = transformers.MetaClip2Config(text_config=text, vision_config=VISION, projection_dim=DIM)
    return transformers.MetaClip2Model(config), tokenizer, _cropped()


def _altclip() -> tuple[Any, Any, Any]:
    tokenizer = transformers.XLMRobertaTokenizer(vocab=pieces(), model_max_length=512)
    text = TEXT | {"vocab_size": len(tokenizer), "project_dim": 28, "max_position_embeddings": 100}
    config = transformers.AltCLIPConfig(text_config=text, vision_config=VISION, projection_dim=DIM)
    return transformers.AltCLIPModel(config), tokenizer, _cropped()


# Kinds of one family whose features alone differ.
VARIANTS = {
    "clip of before": Card("clip", _clip(end=2)),  # the largest number is the end
    "clip with gelu": Card("clip", _clip(hidden_act="gelu")),
}
CARDS = {
    "clip": Card("clip", _clip()),
    "metaclip_2": Card("metaclip_2", _metaclip_2),
    "altclip": Card("altclip", _altclip),
}
