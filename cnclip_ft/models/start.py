"""Where a run's weights come from: one place decides, and says what was loaded, newly made and left over."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import ChineseCLIPTextConfig, ChineseCLIPVisionConfig

from cnclip_ft.data.texts import CONTEXT_LENGTH, TextTokenizer
from cnclip_ft.models.catalog import ARCHITECTURES, ResNet, TextTransformer, VisionTransformer
from cnclip_ft.models.checkpoints import load
from cnclip_ft.models.dual_encoder import DualEncoder
from cnclip_ft.models.towers import ForeignTower, ImageTower, ResNetTower, RobertaTower, ViTTower
from data_tools.errors import RequestError


@dataclass
class LoadReport:
    """`loaded`: (part, where from); `new`: parts with fresh weights, as module paths; `left_over`: tensors not used."""

    loaded: list[tuple[str, str]] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    left_over: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        lines = [f"loaded   {part} from {where}" for part, where in self.loaded]
        lines += [f"new      {part} (random)" for part in self.new]
        if self.left_over:
            names = ", ".join(self.left_over[:4]) + (", …" if len(self.left_over) > 4 else "")
            lines.append(f"left     {len(self.left_over)} tensors not used: {names}")
        return lines


def build_start(
    spec: str | dict[str, Any], *, context_length: int | None = None, image_size: int | None = None,
    source: str = "huggingface", seed: int = 0,
) -> tuple[DualEncoder, LoadReport]:  # fmt: skip
    """A model as `model.start` of a recipe describes it.

    Args:
        spec: a published name or a path; or ``{architecture: NAME}`` for random weights; or ``{image: …, text: …,
            projection: …}`` where image is a CLIP folder, an import path or ``{kind: vit|resnet, …}`` and text is a
            BERT folder or ``{hidden: …, layers: …, heads: …}``.

    Raises:
        RequestError: something named is not there, does not fit, or is not known.
    """
    torch.manual_seed(seed)
    if isinstance(spec, str):
        model = load(spec, image_size=image_size, source=source)
        if context_length is not None:
            _set_context_length(model, context_length)
        return model.train(), LoadReport(loaded=[("both towers and temperature", spec)])
    if "architecture" in spec:
        return _random(spec, context_length)
    return _from_towers(spec, context_length)


def _set_context_length(model: DualEncoder, length: int) -> None:
    positions = model.text_tower.text_model.config.max_position_embeddings
    if length > positions:
        raise RequestError(f"data.context_length is {length}, but the text tower has {positions} positions")
    model.tokenizer = TextTokenizer(model.tokenizer.vocab_file, length)


def _random(spec: dict[str, Any], context_length: int | None) -> tuple[DualEncoder, LoadReport]:
    _refuse_unknown(spec, {"architecture"})
    architecture = ARCHITECTURES.get(spec["architecture"])
    if architecture is None:
        raise RequestError(f"model.start.architecture: {spec['architecture']!r} is not known; known: {', '.join(ARCHITECTURES)}")
    make = ResNetTower if isinstance(architecture.image, ResNet) else ViTTower.make
    image = make(architecture.image, architecture.projection)
    text = RobertaTower.make(architecture.text, architecture.projection)
    model = DualEncoder(image, text, TextTokenizer(context_length=context_length or CONTEXT_LENGTH), architecture)
    return model, LoadReport(new=["image_tower", "text_tower", "logit_scale"])


def _from_towers(spec: dict[str, Any], context_length: int | None) -> tuple[DualEncoder, LoadReport]:
    _refuse_unknown(spec, {"image", "text", "projection", "pooling"})
    for side in ("image", "text"):
        if side not in spec:
            raise RequestError(f"model.start needs both image and text (or a name or path); {side} is missing")
    report = LoadReport()
    image, logit_scale = _image_tower(spec["image"], spec.get("projection"), report)
    text, vocab_file = _text_tower(spec["text"], image.output_dim, spec.get("pooling", "cls"), report)
    tokenizer = TextTokenizer(vocab_file, context_length or CONTEXT_LENGTH)
    positions = text.text_model.config.max_position_embeddings
    if tokenizer.context_length > positions:
        raise RequestError(f"data.context_length is {tokenizer.context_length}, but the text tower has {positions} positions")
    if tokenizer.vocab_size != text.text_model.config.vocab_size:
        raise RequestError(
            f"the vocabulary {tokenizer.vocab_file} has {tokenizer.vocab_size} tokens, the text tower "
            f"{text.text_model.config.vocab_size}; put the tower's own vocab.txt beside its weights"
        )
    model = DualEncoder(image, text, tokenizer, None)
    if logit_scale is None:
        report.new.append("logit_scale")
    else:
        model.logit_scale.data.fill_(logit_scale)
    return model, report


def _image_tower(spec: Any, projection: int | None, report: LoadReport) -> tuple[ImageTower, float | None]:
    if isinstance(spec, dict):
        spec = dict(spec)
        kind = spec.pop("kind", None)
        kinds = {"vit": VisionTransformer, "resnet": ResNet}
        if kind not in kinds:
            raise RequestError(f"model.start.image.kind is {kind!r}; use vit or resnet")
        try:
            numbers = kinds[kind](**{k: tuple(v) if isinstance(v, list) else v for k, v in spec.items()})
        except TypeError as error:
            raise RequestError(f"model.start.image: {str(error).split('__init__() ')[-1]}") from None
        report.new.append("image_tower")
        make = ResNetTower if kind == "resnet" else ViTTower.make
        return make(numbers, projection or 512), None
    folder = Path(str(spec))
    if not folder.exists() and ":" in str(spec):
        tower = ForeignTower(str(spec), projection or 512)
        report.loaded.append(("image tower", f"{spec} (import path)"))
        report.new.append("image_tower.visual_projection")
        return tower, None
    tensors, config = _read_folder(folder, "model.start.image")
    vision = config.get("vision_config") or (config if "patch_size" in config else None)
    if vision is None:
        raise RequestError(f"model.start.image: {folder / 'config.json'} describes no vision tower")
    keys = ChineseCLIPVisionConfig().to_dict().keys()
    own = {k: v for k, v in vision.items() if k in keys and k not in ("model_type", "transformers_version")}
    dim = config.get("projection_dim") or vision.get("projection_dim") or 512
    if projection not in (None, dim):
        raise RequestError(f"model.start.projection is {projection}, but {folder} projects to {dim}; leave it out")
    tower = ViTTower(ChineseCLIPVisionConfig(**own), dim)
    wanted = tower.state_dict()
    _copy(wanted, {k: v for k, v in tensors.items() if k in wanted}, folder)
    report.loaded.append(("image tower and visual projection", str(folder)))
    report.left_over += sorted(k for k in tensors if k not in wanted and k != "logit_scale" and "position_ids" not in k)
    scale = tensors.get("logit_scale")
    if scale is not None:
        report.loaded.append(("temperature", str(folder)))
    return tower, None if scale is None else scale.item()


def _text_tower(spec: Any, projection: int, pooling: str, report: LoadReport) -> tuple[RobertaTower, Path | None]:
    if isinstance(spec, dict):
        try:
            numbers = TextTransformer(**spec)
        except TypeError as error:
            raise RequestError(f"model.start.text: {str(error).split('__init__() ')[-1]}") from None
        report.new.append("text_tower")
        tower = RobertaTower.make(numbers, projection)
        tower.pooling = pooling
        return tower, None
    folder = Path(str(spec))
    tensors, config = _read_folder(folder, "model.start.text")
    keys = ChineseCLIPTextConfig().to_dict().keys()
    own = {k: v for k, v in config.items() if k in keys and k not in ("model_type", "transformers_version", "architectures")}
    tower = RobertaTower(ChineseCLIPTextConfig(**own), projection, pooling)
    plain = {k.removeprefix("bert."): v for k, v in tensors.items()}
    # Old TensorFlow conversions call a norm's weight and bias gamma and beta.
    plain = {k.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias"): v for k, v in plain.items()}
    wanted = tower.text_model.state_dict()
    used = {k: v for k, v in plain.items() if k in wanted}
    _copy(wanted, used, folder)
    report.loaded.append(("text tower", str(folder)))
    report.left_over += sorted(k for k in plain if k not in used and "position_ids" not in k)
    report.new.append("text_tower.text_projection")
    vocab = folder / "vocab.txt"
    return tower, vocab if vocab.is_file() else None


def _read_folder(folder: Path, key: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    if not folder.is_dir():
        raise RequestError(f"{key}: {folder} is neither a folder nor an import path like package.module:factory")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if (folder / "model.safetensors").is_file():
            return load_file(folder / "model.safetensors"), config
        return torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True), config
    except (OSError, ValueError) as error:
        raise RequestError(f"{key}: {folder} cannot be read ({error}); expected config.json and model.safetensors") from None


def _copy(wanted: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor], folder: Path) -> None:
    missing = sorted(wanted.keys() - tensors.keys())
    if missing:
        raise RequestError(f"{folder}: {len(missing)} tensors are missing, e.g. {', '.join(missing[:3])}")
    with torch.no_grad():
        for name, tensor in wanted.items():
            if tensor.shape != tensors[name].shape:
                raise RequestError(f"{folder}: {name} is {list(tensors[name].shape)}, expected {list(tensor.shape)}")
            tensor.copy_(tensors[name])


def _refuse_unknown(spec: dict[str, Any], known: set[str]) -> None:
    unknown = sorted(spec.keys() - known)
    if unknown:
        raise RequestError(f"model.start: unknown key {', '.join(unknown)}; known here: {', '.join(sorted(known))}")
