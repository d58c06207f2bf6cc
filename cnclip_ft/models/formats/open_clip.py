"""open_clip's folder: its weights, and what its configuration says of pictures and the image tower, obeyed or refused by key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cnclip_ft.models.description import checked_half
from cnclip_ft.models.families.timm import Timm
from cnclip_ft.models.formats.files import how_to_fetch, read_json
from cnclip_ft.models.known import IMPORT_PATH
from cnclip_ft.models.preprocessing import OPENAI_MEAN, OPENAI_STD
from data_tools.errors import RequestError

CONFIGURATION = "open_clip_config.json"
UNCLEANED = (
    "texts_not_cleaned"  # of a model whose texts open_clip cleans and we do not, in what we write beside `model_cfg`
)
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")

# Keys of vision_cfg that change no feature in evaluation, and the values of others that are what the towers here do.
_NO_EFFECT = (
    "patch_dropout",
    "output_tokens",
    "timm_proj_bias",
    "timm_drop",
    "timm_drop_path",
    "timm_model_pretrained",
    "drop_path",
)
_ONLY = {
    "pool_type": ("tok",), "pos_embed_type": ("learnable",), "timm_pool": ("avg",), "timm_proj": ("linear",),
    "final_ln_after_pool": (True, False),  # of one pooled token the norm is the same before and after
    "attn_pooler_queries": (256,), "attn_pooler_heads": (8,),  # said even where there is no such pooler
    "block_type": ("default",),
}  # fmt: skip
_MODEL_NO_EFFECT = (
    "embed_dim",
    "quick_gelu",
    "vision_cfg",
    "text_cfg",
    "init_logit_scale",
    "init_logit_bias",
    "custom_text",
    "multimodal_cfg",
    "nonscalar_logit_scale",
)


def weights_of(folder: Path) -> Path:
    """Its file of weights.

    Raises:
        RequestError: there is none.
    """
    found = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if found is None:
        raise RequestError(f"{folder}: no weights in it; expected {' or '.join(WEIGHTS)}. {how_to_fetch(folder)}")
    return found


def is_open_clip(folder: Path) -> bool:
    """Whether weights of open_clip lie there."""
    return any((folder / name).is_file() for name in WEIGHTS)


def model_section(file: Path, key: str | None = None) -> dict[str, Any]:
    """``model_cfg``, or a section of it."""
    model = _section(file, read_json(file), "model_cfg")
    return model if key is None else _section(file, model, key)


def said_head_width(file: Path) -> int | None:
    """What the configuration says of a ViT's heads; None where there is no such file. open_clip's default is 64.

    Raises:
        RequestError: no whole number above 0.
    """
    if not file.is_file():
        return None
    width = model_section(file, "vision_cfg").get("head_width") or 64
    if type(width) is not int or width < 1:
        raise refusal(file, "vision_cfg.head_width", width, "a whole number above 0")
    return width


def is_uncleaned(file: Path) -> bool:
    ours = read_json(file).get("cnclip_ft")
    return isinstance(ours, dict) and ours.get(UNCLEANED) is True


def open_clip_rules(file: Path, numbers: dict[str, Any]) -> dict[str, Any]:
    """What ``open_clip_config.json`` adds to the image half `numbers` read off the tensors.

    Raises:
        RequestError: a key says something the image towers here do not do, or what the tensors are not.
    """
    content = read_json(file)
    model = _section(file, content, "model_cfg")
    vision, pictures = _section(file, model, "vision_cfg"), _section(file, content, "preprocess_cfg")
    for key, value in model.items():
        if value and key not in _MODEL_NO_EFFECT and not key.endswith("_dtype"):
            raise refusal(file, f"model_cfg.{key}", value, "nothing")
    said: dict[str, Any] = {}
    for key, value in vision.items():
        place = f"vision_cfg.{key}"
        if value is None or key in _NO_EFFECT:
            continue
        expected = _from_tensors(numbers, key, value)
        if expected is not None:
            if expected != value:
                raise refusal(file, place, value, f"{expected!r}, as the tensors say")
        elif key == "head_width" and numbers["kind"] == "vit":
            if type(value) is not int or value < 1 or numbers["hidden_size"] % value:
                raise refusal(file, place, value, f"a divisor of the width {numbers['hidden_size']}")
            said["num_attention_heads"] = numbers["hidden_size"] // value
        elif key == "head_width":
            if value != numbers["width"] * 32 // numbers["heads"]:
                raise refusal(file, place, value, repr(numbers["width"] * 32 // numbers["heads"]))
        elif key == "norm_kwargs" and isinstance(value, dict) and value.keys() <= {"eps"} and numbers["kind"] == "vit":
            said |= {"layer_norm_eps": _number(file, place, value["eps"])} if value else {}
        elif key in _ONLY and value in _ONLY[key]:
            continue
        elif value:
            raise refusal(file, place, value, " or ".join(map(repr, _ONLY.get(key, ("nothing",)))))
    if numbers["kind"] == "vit":
        said["hidden_act"] = "quick_gelu" if model.get("quick_gelu") else "gelu"
    return said | _colours(file, pictures) | _way(file, pictures)


def picture_rule(file: Path) -> dict[str, Any]:
    """What the configuration says of pictures, for a tower whose own rule may be another."""
    pictures = _section(file, read_json(file), "preprocess_cfg")
    usual = {"mean": list(OPENAI_MEAN), "std": list(OPENAI_STD), "fit": "squash", "resample": "bicubic"}
    return usual | _colours(file, pictures) | _way(file, pictures)


def timm_numbers(file: Path, vision: dict[str, Any]) -> dict[str, Any]:
    """The image half of a description of a tower of timm, without its picture rule; defaults as in open_clip 3.3.

    Raises:
        RequestError: a key says something that is not done here.
    """
    for key, value in vision.items():
        if value and not key.startswith("timm_") and key not in (*_NO_EFFECT, "image_size"):
            raise refusal(file, f"vision_cfg.{key}", value, "nothing")
    found = {
        "kind": "timm", "name": vision.get("timm_model_name"), "pool": vision.get("timm_pool", "avg"),
        "head": vision.get("timm_proj", "linear"), "head_bias": vision.get("timm_proj_bias", False),
        "image_size": vision.get("image_size", 224),
    }  # fmt: skip
    return checked_half(Timm, found, f"{file}: vision_cfg")


def _colours(file: Path, pictures: dict[str, Any]) -> dict[str, Any]:
    """Mean and deviation, where they are not OpenAI's."""
    mean, std = pictures.get("mean") or list(OPENAI_MEAN), pictures.get("std") or list(OPENAI_STD)
    for key, value in (("mean", mean), ("std", std)):
        if not isinstance(value, list) or len(value) != 3:
            raise refusal(file, f"preprocess_cfg.{key}", value, "three numbers")
        for number in value:
            _number(file, f"preprocess_cfg.{key}", number)
    return {} if (tuple(mean), tuple(std)) == (OPENAI_MEAN, OPENAI_STD) else {"mean": mean, "std": std}


def _way(file: Path, pictures: dict[str, Any]) -> dict[str, str]:
    """How a picture becomes a square: the middle of the picture with its shorter side fitted, where nothing is said."""
    mode, filter = pictures.get("resize_mode") or "shortest", pictures.get("interpolation") or "bicubic"
    if mode not in ("shortest", "squash"):
        raise refusal(file, "preprocess_cfg.resize_mode", mode, "'shortest' or 'squash'")
    if filter not in ("bicubic", "bilinear", "random"):
        raise refusal(file, "preprocess_cfg.interpolation", filter, "'bicubic' or 'bilinear'")
    return ({"fit": "crop_even"} if mode == "shortest" else {}) | (
        {"resample": "bilinear"} if filter == "bilinear" else {}
    )


def _from_tensors(numbers: dict[str, Any], key: str, value: Any) -> Any:
    """What the tensors say of a key; None where they say nothing."""
    if numbers["kind"] == "resnet":
        own = {"layers": list(numbers["layers"]), "width": numbers["width"], "image_size": numbers["image_size"]}
    else:
        own = {
            "layers": numbers["num_hidden_layers"], "width": numbers["hidden_size"], "patch_size": numbers["patch_size"],
            "image_size": numbers["image_size"], "mlp_ratio": numbers["intermediate_size"] / numbers["hidden_size"],
        }  # fmt: skip
    if key == "mlp_ratio" and isinstance(value, (int, float)) and key in own:
        return value if abs(value - own[key]) < 1e-3 else own[key]
    if key in ("image_size", "patch_size") and value == [own.get(key)] * 2:
        return value
    return own.get(key)


def _section(file: Path, content: dict[str, Any], key: str) -> dict[str, Any]:
    found = content.get(key)
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise refusal(file, key, found, "an object")
    return found


def _number(file: Path, place: str, value: Any) -> float:
    if type(value) not in (int, float) or not 0 < value < 1:
        raise refusal(file, place, value, "a number between 0 and 1")
    return value


def refusal(file: Path, place: str, value: Any, expected: str) -> RequestError:
    return RequestError(
        f"{file}: {place} is {repr(value)[:60]}; the towers here have {expected} there. For one like that, {IMPORT_PATH}"
    )
