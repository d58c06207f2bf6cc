"""Text encoders as their library writes them: small, random, with tokenizers of their kind."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import models, pre_tokenizers, processors, trainers

from cnclip_ft.models.start import build_start
from tests.families.cards import pieces
from tests.families.texts import many_texts

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 100,
}
IMAGE = {"kind": "vit", "hidden": 32, "layers": 2, "heads": 2, "patch": 8, "image_size": 32}
SAID = ["一只狗在雪地里奔跑", "a red car", "a", "两只猫 and a dog 🐶", "dog " * 200]
DECODER = SIZES | {"num_key_value_heads": 1, "head_dim": 16}


@dataclass(frozen=True)
class Encoder:
    """
    Args:
        make: model and tokenizer.
        pooling: what is taken where the user asks for nothing.
        said: what ``1_Pooling/config.json`` says.
    """

    make: Callable[[], tuple[Any, Any]]
    pooling: str
    said: str | None = None

    def write(self, folder: Path) -> Path:
        torch.manual_seed(0)
        model, tokenizer = self.make()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if self.said is not None:
            (folder / "1_Pooling").mkdir()
            modes = {
                f"pooling_mode_{mode}": mode == self.said
                for mode in ("cls_token", "mean_tokens", "max_tokens", "lasttoken")
            }
            text = json.dumps({"word_embedding_dimension": 32, **modes})
            (folder / "1_Pooling" / "config.json").write_text(text, encoding="utf-8")
        return folder


def start(folder: Path, **more: Any) -> Any:
    """A small ViT beside the encoder of a folder, and what is reported of it."""
    return build_start({"image": IMAGE, "text": str(folder), "projection": 24} | more)


@cache
def _byte_pairs(*special: str) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A small vocabulary of RoBERTa's and of Qwen's kind."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(many_texts(300, seed=1)[7:], trainer)
    model = json.loads(backend.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def _roberta(kind: type = transformers.RobertaModel) -> tuple[Any, Any]:
    vocabulary, merges = _byte_pairs("<s>", "<pad>", "</s>", "<unk>", "<mask>")
    tokenizer = transformers.RobertaTokenizer(vocab=vocabulary, merges=merges, model_max_length=98)
    return kind(transformers.RobertaConfig(**SIZES, vocab_size=len(tokenizer))), tokenizer


def _xlm_roberta() -> tuple[Any, Any]:
    tokenizer = transformers.XLMRobertaTokenizer(vocab=pieces(), model_max_length=98)
    return transformers.XLMRobertaModel(
        transformers.XLMRobertaConfig(**SIZES, vocab_size=len(tokenizer) + 7)
    ), tokenizer


def _minilm() -> tuple[Any, Any]:
    """paraphrase-multilingual-MiniLM: a BERT with XLM-R's tokenizer."""
    tokenizer = transformers.XLMRobertaTokenizer(vocab=pieces(), model_max_length=98)
    return transformers.BertModel(transformers.BertConfig(**SIZES, vocab_size=len(tokenizer))), tokenizer


def _cased() -> tuple[Any, Any]:
    words = sorted({letter for text in many_texts(200) for letter in text if letter.strip()})
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words, *(f"##{word}" for word in words)]
    tokenizer = transformers.BertTokenizer(vocab={token: n for n, token in enumerate(tokens)}, do_lower_case=False)
    return transformers.BertModel(transformers.BertConfig(**SIZES, vocab_size=len(tokens))), tokenizer


def _modernbert() -> tuple[Any, Any]:
    vocabulary, merges = _byte_pairs("[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]")
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 0), ("[SEP]", 2)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, cls_token="[CLS]", pad_token="[PAD]", sep_token="[SEP]", unk_token="[UNK]"
    )
    config = transformers.ModernBertConfig(
        **SIZES,
        vocab_size=len(tokenizer),
        pad_token_id=1,
        cls_token_id=0,
        sep_token_id=2,
        bos_token_id=0,
        eos_token_id=2,
        local_attention=8,
        global_attn_every_n_layers=3,
    )
    return transformers.ModernBertModel(config), tokenizer


def _bytes_fast(post: Any, **special: str) -> Any:
    vocabulary, merges = _byte_pairs("<|endoftext|>", "<|im_end|>")
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if post is not None:
        backend.post_processor = post
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def _qwen3() -> tuple[Any, Any]:
    """Qwen3-Embedding: every text ends in the token that fills it up."""
    post = processors.TemplateProcessing("$A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)])
    tokenizer = _bytes_fast(post, eos_token="<|im_end|>", pad_token="<|endoftext|>", padding_side="left")
    return transformers.Qwen3Model(transformers.Qwen3Config(**DECODER, vocab_size=len(tokenizer))), tokenizer


def _llama() -> tuple[Any, Any]:
    """No token to fill up with, none at the end; saved with its head."""
    tokenizer = _bytes_fast(None, eos_token="<|im_end|>")
    config = transformers.LlamaConfig(
        **DECODER, vocab_size=len(tokenizer), pad_token_id=None, bos_token_id=0, eos_token_id=1
    )
    return transformers.LlamaForCausalLM(config), tokenizer


def _gemma() -> tuple[Any, Any]:
    """EmbeddingGemma: both ways, sliding windows."""
    tokenizer = transformers.XLMRobertaTokenizer(vocab=pieces(), model_max_length=98)
    config = transformers.Gemma3TextConfig(
        **DECODER,
        vocab_size=len(tokenizer),
        use_bidirectional_attention=True,
        sliding_window=9,
        pad_token_id=1,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        query_pre_attn_scalar=16,
    )
    return transformers.Gemma3TextModel(config), tokenizer


def _nomic() -> tuple[Any, Any]:
    """In its file by other names than in the library's model."""
    tokenizer = _modernbert()[1]
    return transformers.NomicBertModel(
        transformers.NomicBertConfig(**SIZES, vocab_size=len(tokenizer), pad_token_id=1)
    ), tokenizer


def _mpnet() -> tuple[Any, Any]:
    """all-mpnet-base-v2: attention of its own, whose bias is the distance."""
    tokenizer = _cased()[1]
    config = transformers.MPNetConfig(**SIZES, vocab_size=len(tokenizer), pad_token_id=0)
    return transformers.MPNetModel(config, add_pooling_layer=False), tokenizer


ENCODERS = {
    "roberta": Encoder(_roberta, "cls"),
    "roberta with a head": Encoder(lambda: _roberta(transformers.RobertaForMaskedLM), "cls"),
    "xlm-roberta": Encoder(_xlm_roberta, "cls", "cls_token"),
    "minilm": Encoder(_minilm, "mean", "mean_tokens"),
    "cased bert": Encoder(_cased, "cls"),
    "mpnet": Encoder(_mpnet, "mean", "mean_tokens"),
    "modernbert": Encoder(_modernbert, "mean", "mean_tokens"),
    "qwen3": Encoder(_qwen3, "last", "lasttoken"),
    "llama": Encoder(_llama, "last"),
    "gemma3_text": Encoder(_gemma, "mean", "mean_tokens"),
}
if hasattr(transformers, "NomicBertModel"):  # of late
    ENCODERS["nomic_bert"] = Encoder(_nomic, "mean", "mean_tokens")
