"""A description as open_clip's configuration, and tensors under its names: the inverse of `clip_file`."""

from __future__ import annotations

from typing import Any

from cnclip_ft.models.contract import Preprocessing
from cnclip_ft.models.families.clip.bpe import VOCABULARY
from cnclip_ft.models.families.clip.text import LARGEST
from cnclip_ft.models.formats.clip_names import text_from_ours
from cnclip_ft.models.formats.cn_clip import to_official
from cnclip_ft.models.formats.files import Tensors
from cnclip_ft.models.preprocessing import SquarePicture

_CLIP_TEXTS = ("clip_text", "metaclip_2_text")


def model_config(description: dict[str, Any]) -> dict[str, Any]:
    """``model_cfg``.

    Raises:
        ValueError: why there is none.
    """
    image, text = description["image"], description["text"]
    if text.get("kind") not in _CLIP_TEXTS:
        raise ValueError(f"its text tower is of kind {text.get('kind', 'roberta')}")
    quick = _is_quick(text["hidden_act"])
    config = {
        "embed_dim": description["projection"],
        "vision_cfg": _vision(image, quick),
        "text_cfg": _text(description),
    }
    return (
        config
        | ({"quick_gelu": True} if quick else {})
        | ({"init_logit_bias": 0.0} if description.get("logit_bias") else {})
    )


def picture_config(picture: Preprocessing) -> dict[str, Any]:
    """``preprocess_cfg``.

    Raises:
        ValueError: its pictures are no squares.
    """
    if not isinstance(picture, SquarePicture):
        raise ValueError(f"its pictures are {picture.in_words}")
    return {
        "size": picture.size, "mode": "RGB", "mean": list(picture.mean), "std": list(picture.std),
        "interpolation": picture.resample, "resize_mode": "squash" if picture.fit == "squash" else "shortest",
    }  # fmt: skip


def open_clip_tensors(tensors: Tensors, description: dict[str, Any]) -> Tensors:
    """Ours by file name → theirs."""
    text = {name: tensor for name, tensor in tensors.items() if name.startswith("text_")}
    bias = {name: tensor for name, tensor in tensors.items() if name == "logit_bias"}
    rest = {name: tensor for name, tensor in tensors.items() if name not in text and name not in bias}
    return {name: tensor.contiguous() for name, tensor in (to_official(rest) | bias | text_from_ours(text)).items()}


def _is_quick(activation: str) -> bool:
    if activation not in ("quick_gelu", "gelu"):
        raise ValueError(f"its text tower uses {activation}, open_clip's quick_gelu or gelu")
    return activation == "quick_gelu"


def _vision(image: dict[str, Any], quick: bool) -> dict[str, Any]:
    if image["kind"] == "resnet":
        if len(image["layers"]) != 4:
            raise ValueError(f"its ResNet has {len(image['layers'])} stages, open_clip's 4")
        heads = {"head_width": image["width"] * 32 // image["heads"]}
        return {"layers": list(image["layers"]), "width": image["width"], "image_size": image["image_size"]} | heads
    if image["kind"] != "vit":
        raise ValueError(f"its image tower is of kind {image['kind']}")
    if image["hidden_act"] != ("quick_gelu" if quick else "gelu"):
        raise ValueError(f"its image tower uses {image['hidden_act']} and its text tower another activation")
    return {
        "image_size": image["image_size"], "layers": image["num_hidden_layers"], "width": image["hidden_size"],
        "head_width": image["hidden_size"] // image["num_attention_heads"], "patch_size": image["patch_size"],
        "mlp_ratio": image["intermediate_size"] / image["hidden_size"],
    } | _norm(image)  # fmt: skip


def _text(description: dict[str, Any]) -> dict[str, Any]:
    text, tokenizer = description["text"], description.get("tokenizer") or {}
    own = tokenizer.get("clean") == "lower" and text["vocab_size"] == VOCABULARY
    at_largest = text["kind"] == "clip_text" and (text["eos_token_id"] == LARGEST or own)
    return {
        "context_length": text["max_position_embeddings"], "vocab_size": text["vocab_size"], "width": text["hidden_size"],
        "heads": text["num_attention_heads"], "layers": text["num_hidden_layers"],
        "mlp_ratio": text["intermediate_size"] / text["hidden_size"],
    } | ({} if at_largest else {"pool_type": "eos", "eos_id": text["eos_token_id"]}) | _norm(text) | (
        # open_clip takes the folder's own tokenizer where any is named
        {} if own else {"hf_tokenizer_name": "this folder's", "tokenizer_kwargs": {"clean": tokenizer.get("clean") or "whitespace"}}
    )  # fmt: skip


def _norm(numbers: dict[str, Any]) -> dict[str, Any]:
    return {} if numbers["layer_norm_eps"] == 1e-5 else {"norm_kwargs": {"eps": numbers["layer_norm_eps"]}}
