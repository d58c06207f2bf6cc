"""An official ``.pt``: what `cn_clip.clip.load_from_name` and the official training take."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import torch

from cnclip_ft.export.settings import ExportSettings
from cnclip_ft.models.assembly import describe_model
from cnclip_ft.models.checkpoints import file_tensors, load
from cnclip_ft.models.dual_encoder import DualEncoder
from cnclip_ft.models.families.chinese_clip.catalog import VOCABULARY
from cnclip_ft.models.formats.cn_clip import to_official
from data_tools.errors import RequestError

KIND = None  # a file
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_TEXT_NAMES = {
    (768, 3): "RBT3-chinese",
    (768, 12): "RoBERTa-wwm-ext-base-chinese",
    (1024, 24): "RoBERTa-wwm-ext-large-chinese",
}


def check(model: DualEncoder) -> None:
    """Refuse what the official code cannot express."""
    description = describe_model(model)
    image, text = description["image"], description["text"]
    wrong = []
    if image["kind"] == "vit":
        if image["hidden_act"] != "quick_gelu":
            wrong.append(f"its image tower uses {image['hidden_act']}, the official one quick_gelu")
        if image["intermediate_size"] != 4 * image["hidden_size"]:
            wrong.append("its image layers are not four times as wide inside")
    elif image["kind"] == "foreign":
        wrong.append(f"its image tower is {image['factory']}")
    elif image["kind"] != "resnet":
        wrong.append(f"its image tower is of kind {image['kind']}")
    elif len(image["layers"]) != 4 or image["heads"] != image["width"] * 32 // 64:
        wrong.append("its ResNet has not four stages and heads of 64")
    if {"fit", "resample"} & image.keys():
        wrong.append("its pictures are not squashed bicubically")
    if "mean" in image:
        wrong.append("its pixels are normalised with another mean and deviation")
    if text["pooling"] != "cls":
        wrong.append(f"its texts are {text['pooling']}-pooled")
    if text["vocab_size"] != VOCABULARY:
        wrong.append(f"it has {text['vocab_size']:,} tokens, the official vocabulary {VOCABULARY:,}")
    if text["layer_norm_eps"] != 1e-12:
        wrong.append(f"its text tower's LayerNorm eps is {text['layer_norm_eps']:g}")
    if wrong:
        raise RequestError(
            f"the official code cannot express this checkpoint: {'; '.join(wrong)}. It can be used with cnclip_ft.load as it is"
        )


def write(model: DualEncoder, target: Path, order: ExportSettings) -> None:
    """``epoch`` and ``step`` for the official training, the ``module.`` prefix both its loaders take.

    Beside them `cnclip_ft`, the description that `cnclip_ft.load` needs of sizes that were never published.
    """
    info = order.info
    tensors, description = file_tensors(model), describe_model(model)
    for said in (tensors, description):
        for own in [name for name in said if name == "logit_bias" or name.partition(".")[0] == "heads"]:
            said.pop(own)  # the official training refuses a tensor it does not know
    state = {f"module.{name}": tensor for name, tensor in to_official(tensors).items()}
    content = {
        "epoch": int(info.get("epoch") or 0), "step": int(info.get("step") or 0), "name": str(info["exported_from"]),
        "state_dict": state, "cnclip_ft": description,
    }  # fmt: skip
    with open(target, "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())


def is_export(file: Path) -> bool:
    """Whether the file was written here; nothing of it is unpickled."""
    try:
        with zipfile.ZipFile(file) as parts:
            name = next(name for name in parts.namelist() if name.endswith("/data.pkl"))
            head = parts.open(name).read(2**24)
    except (OSError, StopIteration, zipfile.BadZipFile, RuntimeError):
        return False
    return all(word in head for word in (b"state_dict", b"cnclip_ft", b"module.bert"))


def open_encoder(target: Path) -> DualEncoder:
    """The file read back, in fp32. (That the official package reads the same is what the tests prove.)"""
    return load(target)


def read_features(target: Path, pixels: torch.Tensor, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit features of the file read back, in fp32."""
    model = open_encoder(target)
    return model.image_features(pixels), model.encode_texts(texts)


def advice(model: DualEncoder, output: Path) -> str:
    """How to read what was written with the official package."""
    description = describe_model(model)
    text = _TEXT_NAMES.get((description["text"]["hidden_size"], description["text"]["num_hidden_layers"]))
    if model.architecture is None or text is None or model.architecture.hub is None:
        return "its size was never published: the official package needs a model configuration of it; cnclip_ft.load reads it as it is"
    return (
        f'read it with cn_clip.clip.load_from_name("{output}", vision_model_name="{model.architecture.name}", '
        f'text_model_name="{text}", input_resolution={model.image_size})'
    )
