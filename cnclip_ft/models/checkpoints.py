"""Our checkpoint: a folder that explains itself.

``model.safetensors`` + ``config.json`` + processor and tokenizer files, which transformers' ChineseCLIPModel reads
whenever the towers are ViT + RoBERTa, and ``cnclip_ft.json``: what is needed to build the model again, and how it
came to be.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import ChineseCLIPConfig, ChineseCLIPTextConfig, ChineseCLIPVisionConfig

from cnclip_ft.data.images import OPENAI_MEAN, OPENAI_STD
from cnclip_ft.data.texts import TextTokenizer
from cnclip_ft.models.catalog import Architecture, ResNet
from cnclip_ft.models.dual_encoder import DualEncoder
from cnclip_ft.models.files import find, read_tensors
from cnclip_ft.models.official import is_official, recognise, to_ours
from cnclip_ft.models.towers import ForeignTower, ResNetTower, RobertaTower, ViTTower
from data_tools.errors import RequestError, UserError

FORMAT = 1
INFO = "cnclip_ft.json"
_TEXT_KEYS = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act",
    "hidden_dropout_prob", "attention_probs_dropout_prob", "max_position_embeddings", "type_vocab_size",
    "layer_norm_eps", "pad_token_id",
)  # fmt: skip
_VISION_KEYS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size",
    "hidden_act", "layer_norm_eps", "attention_dropout",
)  # fmt: skip


# ---- describing and building ----------------------------------------------------------------------------------------


def describe_model(model: DualEncoder) -> dict[str, Any]:
    """Everything but weights and vocabulary that `build_model` needs."""
    tower, text = model.image_tower, model.text_tower
    if isinstance(tower, ViTTower):
        image = {"kind": "vit"} | {key: getattr(tower.vision_model.config, key) for key in _VISION_KEYS}
    elif isinstance(tower, ResNetTower):
        image = asdict(tower.numbers)
    else:
        image = {"kind": "foreign", "factory": tower.path}
    return {
        "architecture": model.architecture.as_dict() if model.architecture else None,
        "image": image,
        "text": {"pooling": text.pooling} | {key: getattr(text.text_model.config, key) for key in _TEXT_KEYS},
        "projection": tower.output_dim,
        "context_length": model.context_length,
    }


def build_model(description: dict[str, Any], vocab_file: Path | None) -> DualEncoder:
    """A model of this description with fresh weights."""
    image, projection = dict(description["image"]), description["projection"]
    kind = image.pop("kind")
    if kind == "vit":
        tower = ViTTower(ChineseCLIPVisionConfig(**image, projection_dim=projection), projection)
    elif kind == "resnet":
        tower = ResNetTower(ResNet(**image | {"layers": tuple(image["layers"])}), projection)
    else:
        tower = ForeignTower(image["factory"], projection)
    text = dict(description["text"])
    pooling = text.pop("pooling")
    text_tower = RobertaTower(ChineseCLIPTextConfig(**text), projection, pooling)
    architecture = description["architecture"]
    tokenizer = TextTokenizer(vocab_file, description["context_length"])
    return DualEncoder(tower, text_tower, tokenizer, Architecture.from_dict(architecture) if architecture else None)


def file_name(name: str) -> str:
    """Our parameter name → the name in the file (transformers' where it has one)."""
    return name.removeprefix("image_tower.").removeprefix("text_tower.")


# ---- writing --------------------------------------------------------------------------------------------------------


def save_checkpoint(model: DualEncoder, folder: str | Path, *, info: dict[str, Any]) -> None:
    """Write the folder whole or not at all; one that is there is replaced at the end.

    Raises:
        UserError: it cannot be written; what was there before is intact.
    """
    folder = Path(folder)
    beside, old = folder.with_name(folder.name + ".writing"), folder.with_name(folder.name + ".old")
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        tensors = {file_name(n): t.detach().cpu().contiguous() for n, t in model.state_dict().items()}
        save_file(tensors, beside / "model.safetensors", metadata={"format": "pt"})
        _write_json(beside / "config.json", transformers_config(model))
        _write_json(beside / "preprocessor_config.json", processor_config(model))
        model.tokenizer.save(beside)
        _write_json(beside / INFO, {"format": FORMAT, "model": describe_model(model), **info})
        for file in beside.iterdir():
            with open(file, "rb+") as handle:
                os.fsync(handle.fileno())
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            os.replace(folder, old)
        os.replace(beside, folder)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise UserError(
            f"{folder}: the checkpoint could not be written ({error}). What was there before is intact; "
            "free some space or choose another output."
        ) from None


def transformers_config(model: DualEncoder) -> dict[str, Any]:
    """`config.json`; for towers transformers does not know, only what they are."""
    description = describe_model(model)
    if description["image"]["kind"] != "vit" or description["text"]["pooling"] != "cls":
        return {"model_type": "cnclip_ft", "note": f"read with cnclip_ft.load; details in {INFO}"}
    vision = {k: v for k, v in description["image"].items() if k != "kind"} | {"projection_dim": description["projection"]}
    text = {k: v for k, v in description["text"].items() if k != "pooling"}
    config = ChineseCLIPConfig(
        text_config=ChineseCLIPTextConfig(**text).to_dict(), vision_config=ChineseCLIPVisionConfig(**vision).to_dict(),
        projection_dim=description["projection"], logit_scale_init_value=model.logit_scale.item(),
    )  # fmt: skip
    return config.to_dict() | {"architectures": ["ChineseCLIPModel"], "dtype": "float32"}


def processor_config(model: DualEncoder) -> dict[str, Any]:
    """`preprocessor_config.json`: the square squash (transformers' defaults would crop)."""
    tower = model.image_tower
    return {
        "image_processor_type": "ChineseCLIPImageProcessor", "processor_class": "ChineseCLIPProcessor",
        "do_convert_rgb": True, "do_resize": True, "size": {"height": tower.image_size, "width": tower.image_size},
        "resample": 3, "do_center_crop": False, "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": list(tower.mean), "image_std": list(tower.std),
    }  # fmt: skip


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# ---- reading --------------------------------------------------------------------------------------------------------


def read_info(folder: str | Path) -> dict[str, Any]:
    """`cnclip_ft.json` of a checkpoint folder.

    Raises:
        RequestError: not our checkpoint, or of a format this version does not know.
    """
    path = Path(folder) / INFO
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RequestError(f"{path} cannot be read ({error}); this is not a checkpoint of cnclip-ft") from None
    if info.get("format") != FORMAT:
        raise RequestError(f"{path}: format {info.get('format')!r} is not known here (known: {FORMAT}); use a newer cnclip-ft")
    return info


def load_folder(folder: Path) -> DualEncoder:
    """One of our checkpoint folders as a model on the CPU, in evaluation mode."""
    info = read_info(folder)
    model = build_model(info["model"], folder / "vocab.txt")
    try:
        tensors = load_file(folder / "model.safetensors")
    except (OSError, SafetensorError) as error:
        raise RequestError(f"{folder / 'model.safetensors'}: the weights cannot be read ({error})") from None
    fill(model, tensors, str(folder / "model.safetensors"))
    return model.eval()


def fill(model: DualEncoder, tensors: dict[str, torch.Tensor], source: str) -> None:
    """Copy weights by file name; every one must be there, fit, and be used."""
    own = {file_name(name): tensor for name, tensor in model.state_dict().items()}
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or extra:
        said = [f"{len(names)} {what} ({', '.join(names[:3])}{', …' * (len(names) > 3)})"
                for what, names in (("missing", missing), ("unexpected", extra)) if names]  # fmt: skip
        raise RequestError(f"{source}: the tensors are not those of the model it describes: {'; '.join(said)}")
    with torch.no_grad():
        for name, tensor in own.items():
            if tensor.shape != tensors[name].shape:
                raise RequestError(f"{source}: {name} is {list(tensors[name].shape)}, expected {list(tensor.shape)}")
            tensor.copy_(tensors[name])


def load(
    path: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None,
    image_size: int | None = None, source: str = "huggingface",
) -> DualEncoder:  # fmt: skip
    """A model from a checkpoint of any kind, in evaluation mode on `device`.

    Args:
        path: our folder, a Hugging Face ChineseCLIPModel folder, an official ``.pt``, or a published name.
        image_size: another resolution for a ViT; its position embeddings are resized.

    Raises:
        RequestError: nothing readable is there, or it is no Chinese CLIP.
    """
    found = find(str(path), source)
    if (found / INFO).is_file():
        model = load_folder(found)
    elif found.is_dir():
        model = _load_huggingface(found)
    else:
        model = _load_official(found)
    if image_size is not None and image_size != model.image_size:
        _resize(model, image_size)
    return model.eval().to(device=device, dtype=dtype)


def _load_huggingface(folder: Path) -> DualEncoder:
    names = [name for name in ("model.safetensors", "pytorch_model.bin") if (folder / name).is_file()]
    if not names:
        raise RequestError(f"{folder}: neither {INFO} nor model.safetensors nor pytorch_model.bin in it; not a checkpoint")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RequestError(f"{folder / 'config.json'} cannot be read ({error})") from None
    if config.get("model_type") != "chinese_clip":
        raise RequestError(f"{folder}: a {config.get('model_type')!r} model, not chinese_clip. As one tower: model.start={{image: …, text: …}}")
    tensors = {n: t for n, t in read_tensors(folder / names[0]).items() if not n.endswith("position_ids") and ".pooler." not in n}
    description = _description(recognise(tensors))
    # The configuration knows what shapes do not say.
    description["text"] |= {k: v for k, v in (config.get("text_config") or {}).items() if k in _TEXT_KEYS}
    description["image"] |= {k: v for k, v in (config.get("vision_config") or {}).items() if k in _VISION_KEYS}
    model = build_model(description, folder / "vocab.txt" if (folder / "vocab.txt").is_file() else None)
    fill(model, tensors, str(folder))
    return model


def _load_official(path: Path) -> DualEncoder:
    tensors = read_tensors(path)
    if not is_official(tensors):
        raise RequestError(f"{path}: not a Chinese CLIP checkpoint (no text_projection and bert.embeddings in it)")
    try:
        tensors = to_ours(tensors)
        architecture = recognise(tensors)
    except (KeyError, RequestError) as error:
        raise RequestError(f"{path}: the checkpoint is incomplete or of another model ({error})") from None
    model = build_model(_description(architecture), None)
    fill(model, tensors, str(path))
    return model


def _description(architecture: Architecture) -> dict[str, Any]:
    """What `build_model` needs, for an architecture of the catalogue or one recognised from shapes."""
    make = ResNetTower if isinstance(architecture.image, ResNet) else ViTTower.make
    with torch.device("meta"):
        image, text = make(architecture.image, architecture.projection), RobertaTower.make(architecture.text, architecture.projection)
        return describe_model(DualEncoder(image, text, TextTokenizer(), architecture))


def _resize(model: DualEncoder, image_size: int) -> None:
    """Another resolution: position embeddings are interpolated bicubically, aligned at the corners, as the official code does."""
    tower = model.image_tower
    if not isinstance(tower, ViTTower) or image_size % tower.vision_model.config.patch_size:
        raise RequestError(f"image_size {image_size} does not fit this image tower (a ViT, and a multiple of its patch size)")
    vision = tower.vision_model
    old = vision.embeddings.position_embedding.weight.data
    side, new = round((len(old) - 1) ** 0.5), image_size // vision.config.patch_size
    grid = old[1:].T.reshape(1, -1, side, side)
    grid = torch.nn.functional.interpolate(grid, size=(new, new), mode="bicubic", align_corners=True)
    vision.config.image_size = image_size
    fresh = ViTTower(vision.config, tower.output_dim)
    weights = tower.state_dict() | {
        "vision_model.embeddings.position_embedding.weight": torch.cat([old[:1], grid.flatten(2)[0].T])
    }
    fresh.load_state_dict(weights)
    model.image_tower, model.architecture = fresh, None
    print(f"image size {side * vision.config.patch_size} → {image_size}: position embeddings resized (bicubic, corners aligned)")


def checkpoint_checksum(path: str | Path) -> str:
    """sha256 of the weights file, hex."""
    path = Path(path)
    digest = hashlib.sha256()
    with open(path / "model.safetensors" if path.is_dir() else path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
