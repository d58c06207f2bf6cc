"""What the tensors of a Chinese CLIP alone can say of it: files of weights have no configuration beside them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import ChineseCLIPTextConfig, ChineseCLIPVisionConfig

from cnclip_ft.models.assembly import count_layers
from cnclip_ft.models.families.chinese_clip import resnet, vit
from cnclip_ft.models.families.chinese_clip.catalog import ARCHITECTURES, VOCABULARY, Architecture, ResNet
from cnclip_ft.models.families.chinese_clip.roberta import RobertaTower
from cnclip_ft.models.families.chinese_clip.wordpiece import CONTEXT_LENGTH
from cnclip_ft.models.families.numbers import side_of
from cnclip_ft.models.formats.files import Tensors
from data_tools.errors import RequestError

_HEAD_WIDTHS = {1280: 80}  # ViT-H; all other published towers have heads of 64


def recognise(tensors: Tensors, source: str) -> dict[str, Any]:
    """The description from names and shapes alone, for files without a configuration.

    Heads are not in a file of weights: 64 wide, as in all published sizes but ViT-H.

    Raises:
        RequestError: a tensor that tells the size is missing.
    """
    try:
        image, text = recognise_image(tensors), recognise_text(tensors)
        projection = tensors["text_projection.weight"].shape[0]
    except (KeyError, ValueError, IndexError) as error:
        raise RequestError(f"{source}: the checkpoint is incomplete, no {error} in it") from None
    return with_architecture(
        {
            "architecture": None,
            "image": image,
            "text": text,
            "projection": projection,
            "context_length": CONTEXT_LENGTH,
        }
    )


def recognise_image(tensors: Tensors, head_width: int | None = None) -> dict[str, Any]:
    """Image half of a description, from tensors with our file names; KeyError where one is missing.

    Args:
        head_width: of a ViT, where a file beside says it.
    """
    if "visual.conv1.weight" in tensors:
        width = tensors["visual.conv1.weight"].shape[0] * 2
        stages = count_layers(tensors, r"visual\.layer(\d+)\.") - 1
        layers = tuple(count_layers(tensors, rf"visual\.layer{number}\.(\d+)\.") for number in range(1, stages + 1))
        side = side_of(tensors[resnet.POSITIONS])
        return asdict(ResNet(layers, width, width * 32 // 64, side * 4 * 2 ** (stages - 1)))
    patch = tensors["vision_model.embeddings.patch_embedding.weight"]
    hidden, size = patch.shape[0], patch.shape[-1]
    config = ChineseCLIPVisionConfig(
        hidden_size=hidden,
        num_hidden_layers=count_layers(tensors, r"vision_model\.encoder\.layers\.(\d+)\."),
        num_attention_heads=_heads(hidden, head_width),
        patch_size=size,
        image_size=side_of(tensors[vit.POSITIONS]) * size,
        intermediate_size=tensors["vision_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
        hidden_act="quick_gelu",
    )
    return {"kind": "vit"} | {key: getattr(config, key) for key in vit.ViTTower.config_keys}


def recognise_text(tensors: Tensors) -> dict[str, Any]:
    """Text half of a description, from tensors with our file names; KeyError where one is missing."""
    vocabulary, hidden = tensors["text_model.embeddings.word_embeddings.weight"].shape
    config = ChineseCLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=count_layers(tensors, r"text_model\.encoder\.layer\.(\d+)\."),
        num_attention_heads=_heads(hidden),
        intermediate_size=tensors["text_model.encoder.layer.0.intermediate.dense.weight"].shape[0],
        max_position_embeddings=tensors["text_model.embeddings.position_embeddings.weight"].shape[0],
        type_vocab_size=tensors["text_model.embeddings.token_type_embeddings.weight"].shape[0],
    )
    return {"pooling": "cls"} | {key: getattr(config, key) for key in RobertaTower.config_keys}


def with_architecture(description: dict[str, Any]) -> dict[str, Any]:
    """The description with the catalogue's entry where it is one of the published sizes, else with None."""
    found = next((known for known in ARCHITECTURES.values() if _is(known, description)), None)
    return description | {"architecture": found.as_dict() if found else None}


def _is(known: Architecture, description: dict[str, Any]) -> bool:
    image, text = description["image"], description["text"]
    numbers: dict[str, Any] = {
        "hidden_size": known.text.hidden, "num_hidden_layers": known.text.layers, "num_attention_heads": known.text.heads,
        "intermediate_size": known.text.intermediate or 4 * known.text.hidden, "vocab_size": known.text.vocabulary,
    }  # fmt: skip
    if known.projection != description["projection"] or any(text.get(key) != value for key, value in numbers.items()):
        return False
    if isinstance(known.image, ResNet):
        return image == asdict(known.image) | {"layers": type(image.get("layers", ()))(known.image.layers)}
    numbers = {
        "kind": "vit", "hidden_size": known.image.hidden, "num_hidden_layers": known.image.layers,
        "num_attention_heads": known.image.heads, "patch_size": known.image.patch, "image_size": known.image.image_size,
        "intermediate_size": known.image.intermediate or 4 * known.image.hidden, "hidden_act": "quick_gelu",
    }  # fmt: skip
    return all(image.get(key) == value for key, value in numbers.items())


def own_vocabulary(folder: Path, description: dict[str, Any], source: str) -> Path | None:
    """``vocab.txt`` or ``tokenizer.json`` of a folder; None (the packaged list) where there is none and the sizes agree."""
    for name in ("vocab.txt", "tokenizer.json"):
        if (folder / name).exists():
            return folder / name
    if description["vocab_size"] != VOCABULARY:
        raise RequestError(
            f"{source}: no vocab.txt beside the weights, and {description['vocab_size']:,} tokens are not BERT-base-Chinese's {VOCABULARY:,}"
        )
    return None


def _heads(hidden: int, width: int | None = None) -> int:
    if width is not None and hidden % width:
        raise RequestError(f"vision_cfg.head_width is {width}, expected a divisor of the width {hidden}")
    width = width or _HEAD_WIDTHS.get(hidden, 64)
    if hidden % width:
        raise RequestError(
            f"the number of attention heads of a width of {hidden} is not in the file; use a folder with its config.json"
        )
    return hidden // width
