"""A card for every family: how its own library writes a small random model of it, and how it is called."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from tests.families.texts import many_texts

VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
DIM = 24
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@dataclass(frozen=True)
class Card:
    """
    Args:
        name: the folder's `model_type`.
        make: the model and what prepares pictures and texts, by the library's own classes.
        tokens: how the library's tokenizer is called.
        pictures: what its processor is to be told beside the folder: Siglip2Processor has a budget of its own.
        loss: whether the library's model has a loss of its own.
        exact: how far features may be apart.
    """

    name: str
    make: Callable[[], tuple[Any, Any, Any]]
    tokens: dict[str, Any] = field(default_factory=lambda: {"padding": True})
    length: int = 77
    pictures: dict[str, Any] = field(default_factory=dict)
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
    text = TEXT | {"vocab_size": len(tokenizer), "project_dim": 28, "max_position_embeddings": 100, **STILL}
    config = transformers.AltCLIPConfig(text_config=text, vision_config=VISION, projection_dim=DIM)
    return transformers.AltCLIPModel(config), tokenizer, _cropped()


# ---- SigLIP and SigLIP 2 --------------------------------------------------------------------------------------------


@cache
def sentencepiece_model(size: int = 1200) -> bytes:
    """A small vocabulary of SigLIP's kind: numbers as in its own, NFKC."""
    trainer = pytest.importorskip("sentencepiece").SentencePieceTrainer
    written = io.BytesIO()
    trainer.train(
        sentence_iterator=iter(text[:2000].lower() for text in many_texts(500, seed=1)[7:]),
        model_writer=written,
        vocab_size=size,
        model_type="unigram",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        character_coverage=0.99,
        hard_vocab_limit=False,
        byte_fallback=True,
        minloglevel=2,
    )
    return written.getvalue()


@cache
def gemma_pairs(size: int = 900) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A small vocabulary of Gemma's kind, learnt from lower case."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, limit_alphabet=300, max_token_length=12, show_progress=False
    )
    backend.train_from_iterator((text.lower() for text in many_texts(500, seed=1)[7:]), trainer)
    model = json.loads(backend.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def gemma(kind: str = "Siglip2Tokenizer") -> Any:
    vocabulary, merges = gemma_pairs()
    return getattr(transformers, kind)(
        vocab=vocabulary,
        merges=merges,
        add_bos_token=False,
        add_eos_token=True,
        padding_side="right",
        model_max_length=64,
        model_input_names=["input_ids"],
    )


SIGLIP_VISION = VISION | {"image_size": 36}  # no multiple of the patch, as so400m-patch14-384


def _siglip() -> tuple[Any, Any, Any]:
    with TemporaryDirectory() as place:
        file = Path(place, "spiece.model")
        file.write_bytes(sentencepiece_model())
        tokenizer = transformers.SiglipTokenizer(str(file), model_input_names=["input_ids"])
        tokenizer.save_pretrained(place)
        tokenizer = Saved(place)
    text = TEXT | {"vocab_size": tokenizer.tokens, "pad_token_id": 1, "max_position_embeddings": 64}
    config = transformers.SiglipConfig(text_config=text, vision_config=SIGLIP_VISION)
    return transformers.SiglipModel(config), tokenizer, _squashed(36)


class Saved:
    """Files of a tokenizer whose own place is gone."""

    def __init__(self, place: str) -> None:
        self.files = {file.name: file.read_bytes() for file in Path(place).iterdir()}
        self.tokens = transformers.AutoTokenizer.from_pretrained(place, tokenizer_type="siglip").vocab_size

    def save_pretrained(self, folder: Path) -> None:
        for name, content in self.files.items():
            (folder / name).write_bytes(content)


def _squashed(side: int) -> Any:
    return transformers.SiglipImageProcessorPil(size={"height": side, "width": side})


def _siglip_2(kind: str = "Siglip2Tokenizer") -> tuple[Any, Any, Any]:
    tokenizer = gemma(kind)
    text = TEXT | {"vocab_size": len(tokenizer) + 7, "pad_token_id": 0, "max_position_embeddings": 64}
    config = transformers.SiglipConfig(text_config=text, vision_config=VISION)
    return transformers.SiglipModel(config), tokenizer, _squashed(32)


def _naflex() -> tuple[Any, Any, Any]:
    tokenizer = gemma()
    text = TEXT | {"vocab_size": len(tokenizer), "pad_token_id": 0, "max_position_embeddings": 64}
    vision = {key: value for key, value in VISION.items() if key != "image_size"} | {"num_patches": 16}
    config = transformers.Siglip2Config(text_config=text, vision_config=vision)
    pictures = transformers.Siglip2ImageProcessorPil(patch_size=8, max_num_patches=30)
    return transformers.Siglip2Model(config), tokenizer, pictures


def _dual(vision: Callable[[], Any] | None = None, pictures: Callable[[], Any] | None = None) -> Any:
    """Pictures of a CLIP, or of another encoder of the library, and XLM-R's texts."""

    def make() -> tuple[Any, Any, Any]:
        tokenizer = transformers.XLMRobertaTokenizer(vocab=pieces(), model_max_length=98)
        text = transformers.XLMRobertaConfig(
            **TEXT,
            vocab_size=len(tokenizer) + 7,
            max_position_embeddings=100,
            **STILL,
        )
        own = vision() if vision else transformers.CLIPVisionConfig(**VISION)
        config = transformers.VisionTextDualEncoderConfig(
            vision_config=own.to_dict(), text_config=text.to_dict(), projection_dim=DIM
        )
        return transformers.VisionTextDualEncoderModel(config), tokenizer, (pictures or _cropped)()

    return make


def _vit() -> Any:
    return transformers.ViTConfig(**VISION, **STILL)


def _vit_pictures() -> Any:
    return transformers.ViTImageProcessorPil(size={"height": 32, "width": 32})


def _dinov2() -> Any:
    """Made for pictures of another size than its folder's processor gives it, as the published ones."""
    numbers = {key: value for key, value in VISION.items() if key not in ("image_size", "intermediate_size")}
    return transformers.Dinov2Config(**numbers, image_size=40, mlp_ratio=2)


def _dinov2_pictures() -> Any:
    return transformers.BitImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


PADDED = {"padding": "max_length"}

# Kinds of one family whose features alone differ.
VARIANTS = {
    "clip of before": Card("clip", _clip(end=2)),  # the largest number is the end
    "clip with gelu": Card("clip", _clip(hidden_act="gelu")),
}
CARDS = {
    "clip": Card("clip", _clip()),
    "metaclip_2": Card("metaclip_2", _metaclip_2),
    "altclip": Card("altclip", _altclip),
    "vision-text-dual-encoder": Card("vision-text-dual-encoder", _dual()),
    "vit beside xlm-r": Card("vision-text-dual-encoder", _dual(_vit, _vit_pictures)),
    "dinov2 beside xlm-r": Card("vision-text-dual-encoder", _dual(_dinov2, _dinov2_pictures)),
    "siglip beside xlm-r": Card(
        "vision-text-dual-encoder", _dual(lambda: transformers.SiglipVisionConfig(**VISION), lambda: _squashed(32))
    ),
    "siglip": Card("siglip", _siglip, PADDED, 64),
    "siglip of version 2": Card("siglip", _siglip_2, PADDED, 64),
    "siglip2": Card("siglip2", _naflex, PADDED, 64, {"max_num_patches": 30, "patch_size": 8}),
}
