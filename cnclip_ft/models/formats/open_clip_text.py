"""The text half of an open_clip folder: CLIP's tower, SigLIP's, or an encoder of transformers; byte pairs or its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cnclip_ft.models.contract import Tokenizer
from cnclip_ft.models.description import checked_half
from cnclip_ft.models.families.clip.bpe import OPEN_CLIP_NAMES, VOCABULARY, clip_bpe
from cnclip_ft.models.families.clip.text import LARGEST, ClipText, MetaClip2Text
from cnclip_ft.models.families.fast_tokenizer import FastTokenizer, Mask, Padding
from cnclip_ft.models.families.siglip.text import SiglipText
from cnclip_ft.models.formats.clip_names import text_to_ours
from cnclip_ft.models.formats.files import Tensors
from cnclip_ft.models.formats.open_clip import is_uncleaned, model_section, refusal
from cnclip_ft.models.formats.open_clip_encoder import encoder_of
from data_tools.errors import RequestError

# What open_clip's text_cfg has where it says nothing (open_clip 3.3), of the keys that change a feature.
_DEFAULTS: dict[str, Any] = {
    "context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12, "mlp_ratio": 4.0, "pool_type": "argmax",
    "eos_id": 2, "no_causal_mask": False, "proj_bias": False, "proj_type": "linear",
}  # fmt: skip
_ELSEWHERE = (
    "hf_tokenizer_name",
    "tokenizer_kwargs",
    "norm_kwargs",
    "act_kwargs",
    "output_tokens",
    "pad_id",
    "hf_model_pretrained",
    "hf_model_name",
    "hf_proj_type",
    "hf_pooler_type",
    "final_ln_after_pool",
)
CLEAN = ("lower", "whitespace", "canonicalize")


def open_clip_text(file: Path, tensors: Tensors, projection: int) -> tuple[dict[str, Any], Tensors, Tokenizer]:
    """Text half of a description, its tensors under our file names, and the tokenizer.

    Args:
        file: ``open_clip_config.json``.
        tensors: all of the weights but the image tower's.

    Raises:
        RequestError: a key says something the text towers here do not do.
    """
    model, said = model_section(file), model_section(file, "text_cfg")
    own = {name.removeprefix("text."): tensor for name, tensor in tensors.items()}
    for key, value in said.items():
        if value and key not in _DEFAULTS and key not in _ELSEWHERE:
            raise refusal(file, f"text_cfg.{key}", value, "nothing")
    cfg = _DEFAULTS | {key: value for key, value in said.items() if value is not None}
    if said.get("hf_model_name"):
        return (*encoder_of(file, cfg, own), _tokenizer(file, cfg, said, "tokens"))
    ours = text_to_ours(own)
    if cfg["no_causal_mask"] and cfg["proj_bias"] and cfg["pool_type"] == "last":
        numbers = _sizes(file, model, cfg, said) | {"kind": "siglip_text"}
        return checked_half(SiglipText, numbers, f"{file}: text_cfg"), ours, _tokenizer(file, cfg, said, "all")
    causal = not cfg["no_causal_mask"] and not cfg["proj_bias"] and cfg["pool_type"] in ("argmax", "eos")
    if not causal or cfg["proj_type"] != "linear" or "text_model.embeddings.token_embedding.weight" not in ours:
        shown = {key: cfg[key] for key in ("no_causal_mask", "pool_type", "proj_bias", "proj_type")}
        raise refusal(
            file, "text_cfg", shown, "causal attention, pool_type argmax or eos, and a projection without bias"
        )
    tokenizer = _tokenizer(file, cfg, said, "to_end")
    # argmax finds the end by its number, the largest of all: with CLIP's own byte pairs that is known.
    end = cfg["eos_id"] if cfg["pool_type"] == "eos" else VOCABULARY - 1 if cfg["vocab_size"] == VOCABULARY else LARGEST
    schema = MetaClip2Text if cfg["pool_type"] == "eos" and end == LARGEST else ClipText
    numbers = _sizes(file, model, cfg, said) | {"eos_token_id": end}
    numbers["kind"] = "metaclip_2_text" if schema is MetaClip2Text else "clip_text"
    return checked_half(schema, numbers, f"{file}: text_cfg"), ours, tokenizer


def _sizes(file: Path, model: dict[str, Any], cfg: dict[str, Any], said: dict[str, Any]) -> dict[str, Any]:
    return {
        "vocab_size": cfg["vocab_size"], "hidden_size": cfg["width"], "num_attention_heads": cfg["heads"],
        "num_hidden_layers": cfg["layers"], "intermediate_size": int(cfg["width"] * cfg["mlp_ratio"]),
        "hidden_act": activation(file, model, said), "layer_norm_eps": norm_eps(file, said), "attention_dropout": 0.0,
        "max_position_embeddings": cfg["context_length"],
    }  # fmt: skip


def activation(file: Path, model: dict[str, Any], section: dict[str, Any]) -> str:
    """The activation of a tower of open_clip by transformers' word."""
    how = section.get("act_kwargs") or {}
    if how not in ({}, {"approximate": "tanh"}) or (how and model.get("quick_gelu")):
        raise refusal(file, "act_kwargs", how, "{'approximate': 'tanh'} or nothing")
    return "gelu_pytorch_tanh" if how else "quick_gelu" if model.get("quick_gelu") else "gelu"


def norm_eps(file: Path, section: dict[str, Any]) -> float:
    kwargs = section.get("norm_kwargs") or {}
    eps = kwargs.get("eps", 1e-5)
    if kwargs.keys() - {"eps"} or type(eps) is not float or not 0 < eps < 1:
        raise refusal(file, "norm_kwargs", kwargs, "an eps between 0 and 1")
    return eps


def _tokenizer(file: Path, cfg: dict[str, Any], said: dict[str, Any], mask: Mask) -> Tokenizer:
    length, kwargs = cfg["context_length"], dict(said.get("tokenizer_kwargs") or {})
    name = said.get("hf_tokenizer_name")
    clean = kwargs.pop("clean", "whitespace" if name else "lower")
    if clean not in CLEAN or any(kwargs.values()):
        raise refusal(
            file,
            "text_cfg.tokenizer_kwargs",
            said["tokenizer_kwargs"],
            f"clean, one of {', '.join(CLEAN)}, and nothing else",
        )
    if not name:
        return clip_bpe(file.parent, length, names=OPEN_CLIP_NAMES, clean=clean)
    if not (file.parent / "tokenizer_config.json").is_file():
        raise RequestError(
            f"{file.parent}: its tokenizer is {repr(name)[:60]}, which is not in the folder. Put its files (tokenizer.json, "
            "tokenizer_config.json) beside the weights"
        )
    padding: Padding = "max_length" if mask == "all" else "longest"  # where pads are attended to, their number tells
    clean = None if is_uncleaned(file) else clean
    return FastTokenizer.of_folder(file.parent, length, padding=padding, mask=mask, clean=clean)
