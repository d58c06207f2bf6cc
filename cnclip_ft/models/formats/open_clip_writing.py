"""A description as open_clip's configuration, and tensors under its names: the inverse of `clip_file`."""

from __future__ import annotations

from typing import Any

from cnclip_ft.models.contract import Preprocessing
from cnclip_ft.models.families.clip.bpe import VOCABULARY
from cnclip_ft.models.families.clip.text import LARGEST
from cnclip_ft.models.formats.clip_names import text_from_ours
from cnclip_ft.models.formats.cn_clip import to_official
from cnclip_ft.models.formats.files import Tensors
from cnclip_ft.models.formats.open_clip_encoder import POOLINGS
from cnclip_ft.models.formats.open_clip_text import CLEAN
from cnclip_ft.models.formats.timm_siglip import to_timm
from cnclip_ft.models.preprocessing import SquarePicture

_CLIP_TEXTS = ("clip_text", "metaclip_2_text")
_POOLERS = {pooling: name for name, pooling in POOLINGS.items()}
# timm's names of SigLIP's image towers: width → word and layers.
_SIGLIP = {768: ("base", 12), 1024: ("large", 24), 1152: ("so400m", 27), 1536: ("giantopt", 40)}
SIGLIP_SIDES = {
    "base_patch16": (224, 256, 384, 512), "base_patch32": (256,), "large_patch16": (256, 384, 512),
    "so400m_patch14": (224, 378, 384), "so400m_patch16": (256, 384, 512), "giantopt_patch16": (256, 384),
}  # fmt: skip


def model_config(description: dict[str, Any]) -> dict[str, Any]:
    """``model_cfg``.

    Raises:
        ValueError: why there is none.
    """
    image, text = description["image"], description["text"]
    kind = text.get("kind")
    act = text.get("hidden_act") if kind != "encoder" else image.get("hidden_act", "gelu")
    config: dict[str, Any] = {"embed_dim": description["projection"]}
    if kind in _CLIP_TEXTS:
        config["text_cfg"] = _clip_text(description)
    elif kind == "siglip_text":
        config |= {"custom_text": True, "text_cfg": _siglip_text(description)}
    elif kind == "encoder" and text.get("origin") and text["pooling"] in _POOLERS:
        config["text_cfg"] = {
            "context_length": description["context_length"], "hf_model_name": text["origin"], "hf_model_pretrained": False,
            "hf_tokenizer_name": text["origin"], "hf_pooler_type": _POOLERS[text["pooling"]], "hf_proj_type": text["head"],
        } | _cleaning(description)  # fmt: skip
    else:
        raise ValueError(
            f"its text tower is of kind {kind or 'roberta'}" + " and no model of open_clip" * (kind == "encoder")
        )
    config["vision_cfg"] = _siglip_vision(image) if image["kind"] == "siglip" else _vision(image, act == "quick_gelu")
    return (
        config
        | ({"quick_gelu": True} if act == "quick_gelu" else {})
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
    scalars = {name: tensors[name].reshape(()) for name in ("logit_scale", "logit_bias") if name in tensors}
    text = {name: tensor for name, tensor in tensors.items() if name.startswith("text_")}
    image = {name: tensor for name, tensor in tensors.items() if name not in text and name not in scalars}
    kind = description["text"].get("kind")
    if kind == "encoder":
        theirs = {
            name.replace("text_model.", "text.transformer.", 1).replace("text_projection.", "text.proj.", 1): tensor
            for name, tensor in text.items()
        }
    else:
        before = "text." if kind == "siglip_text" else ""
        theirs = {f"{before}{name}": tensor for name, tensor in text_from_ours(text).items()}
    kind = description["image"]["kind"]
    pictures = image if kind == "timm" else to_timm(image) if kind == "siglip" else to_official(image)
    return {name: tensor.contiguous() for name, tensor in (pictures | theirs | scalars).items()}


def _siglip_vision(image: dict[str, Any]) -> dict[str, Any]:
    word, layers = _SIGLIP.get(image["hidden_size"], ("", 0))
    if image["num_hidden_layers"] != layers or image["hidden_act"] != "gelu" or image["layer_norm_eps"] != 1e-6:
        raise ValueError("its image tower is none of timm's SigLIP towers (sizes, gelu, eps 1e-6)")
    kind, side = f"{word}_patch{image['patch_size']}", image["image_size"]
    if side not in SIGLIP_SIDES.get(kind, ()):  # open_clip makes the tower by its name alone
        raise ValueError(f"timm has no SigLIP tower {kind} for pictures of {side} × {side}")
    name = f"vit_{kind}_siglip_{side}"
    return {
        "image_size": image["image_size"], "timm_model_name": name, "timm_model_pretrained": False, "timm_pool": "map",
        "timm_proj": "none",
    }  # fmt: skip


def _vision(image: dict[str, Any], quick: bool) -> dict[str, Any]:
    if image["kind"] == "resnet":
        if len(image["layers"]) != 4:
            raise ValueError(f"its ResNet has {len(image['layers'])} stages, open_clip's 4")
        heads = {"head_width": image["width"] * 32 // image["heads"]}
        return {"layers": list(image["layers"]), "width": image["width"], "image_size": image["image_size"]} | heads
    if image["kind"] == "timm":
        return {
            "timm_model_name": image["name"], "timm_model_pretrained": False, "timm_pool": image["pool"], "timm_proj": image["head"],
            "timm_proj_bias": image["head_bias"], "image_size": image["image_size"],
        }  # fmt: skip
    if image["kind"] != "vit":
        raise ValueError(f"its image tower is of kind {image['kind']}")
    if image["hidden_act"] != ("quick_gelu" if quick else "gelu"):
        raise ValueError(f"its image tower uses {image['hidden_act']} and its text tower another activation")
    return {
        "image_size": image["image_size"], "layers": image["num_hidden_layers"], "width": image["hidden_size"],
        "head_width": image["hidden_size"] // image["num_attention_heads"], "patch_size": image["patch_size"],
        "mlp_ratio": image["intermediate_size"] / image["hidden_size"],
    } | _norm(image)  # fmt: skip


def _sizes(text: dict[str, Any]) -> dict[str, Any]:
    if text["hidden_act"] not in ("quick_gelu", "gelu", "gelu_pytorch_tanh"):
        raise ValueError(f"its text tower uses {text['hidden_act']}, open_clip's quick_gelu or gelu")
    return {
        "context_length": text["max_position_embeddings"], "vocab_size": text["vocab_size"], "width": text["hidden_size"],
        "heads": text["num_attention_heads"], "layers": text["num_hidden_layers"],
        "mlp_ratio": text["intermediate_size"] / text["hidden_size"],
    } | _norm(text) | ({"act_kwargs": {"approximate": "tanh"}} if text["hidden_act"] == "gelu_pytorch_tanh" else {})  # fmt: skip


def _clip_text(description: dict[str, Any]) -> dict[str, Any]:
    text, tokenizer = description["text"], description.get("tokenizer") or {}
    own = tokenizer.get("clean") == "lower" and text["vocab_size"] == VOCABULARY
    at_largest = text["kind"] == "clip_text" and (text["eos_token_id"] == LARGEST or own)
    end = {} if at_largest else {"pool_type": "eos", "eos_id": text["eos_token_id"]}
    return _sizes(text) | end | ({} if own else _NAMED | _cleaning(description))


def _siglip_text(description: dict[str, Any]) -> dict[str, Any]:
    how = {"no_causal_mask": True, "proj_bias": True, "pool_type": "last"}
    return _sizes(description["text"]) | how | _NAMED | _cleaning(description)


_NAMED = {"hf_tokenizer_name": "this folder's"}  # open_clip takes the folder's own tokenizer where any is named


def _cleaning(description: dict[str, Any]) -> dict[str, Any]:
    clean = (description.get("tokenizer") or {}).get("clean")
    return {"tokenizer_kwargs": {"clean": clean if clean in CLEAN else "canonicalize" if clean else "whitespace"}}


def _norm(numbers: dict[str, Any]) -> dict[str, Any]:
    return {} if numbers["layer_norm_eps"] == 1e-5 else {"norm_kwargs": {"eps": numbers["layer_norm_eps"]}}
