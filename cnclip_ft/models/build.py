"""Description ↔ model: what besides weights and vocabulary it takes to build one, and what tensors alone can say.

A described model is laid out without memory (on torch's meta device) and the weights that were read become its own:
loading takes the memory of the weights once.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import ChineseCLIPTextConfig, ChineseCLIPVisionConfig

from cnclip_ft.models.contract import ImageTower, TextTower, Tokenizer
from cnclip_ft.models.description import checked_description
from cnclip_ft.models.dual_encoder import DualEncoder
from cnclip_ft.models.families.chinese_clip import resnet, vit
from cnclip_ft.models.families.chinese_clip.catalog import ARCHITECTURES, VOCABULARY, Architecture, ResNet
from cnclip_ft.models.families.chinese_clip.numbers import side_of
from cnclip_ft.models.families.chinese_clip.roberta import TEXT_KEYS
from cnclip_ft.models.families.chinese_clip.wordpiece import CONTEXT_LENGTH, TextTokenizer
from cnclip_ft.models.formats.files import Tensors
from cnclip_ft.models.registry import image_kinds, text_kind
from data_tools.errors import RequestError

_HEAD_WIDTHS = {1280: 80}  # ViT-H; all other published towers have heads of 64


@dataclass
class Checkpoint:
    """A checkpoint of any kind, read: `tensors` have our file names, `notes` are to be said to the user."""

    source: str
    description: dict[str, Any]
    tensors: Tensors
    vocab_file: Path | None = None
    left_over: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    trust_import: bool = False  # the user lets the file name code
    image_size: int | None = None  # wished of a tower that is code, which tells its own when it is made


def file_name(name: str) -> str:
    """Our parameter name → the name in the file (transformers' where it has one)."""
    return name.removeprefix("image_tower.").removeprefix("text_tower.")


# ---- model → description --------------------------------------------------------------------------------------------


def describe_model(model: DualEncoder) -> dict[str, Any]:
    """Everything but weights and vocabulary that `assemble` needs."""
    return {
        "architecture": model.architecture.as_dict() if model.architecture else None,
        "image": model.image_tower.describe(),
        "text": model.text_tower.describe(),
        "projection": model.image_tower.output_dim,
        "context_length": model.context_length,
    } | ({"logit_bias": True} if model.logit_bias is not None else {})


# ---- description → model --------------------------------------------------------------------------------------------


def described_in_file(found: Any, source: str) -> dict[str, Any]:
    """The description that stands beside a state dict in the files we export; such a file never names code.

    Raises:
        RequestError: it does, or it describes no model.
    """
    described = checked_description(found, f"{source}: cnclip_ft")
    code = image_kinds()[described["image"]["kind"]].imports(described["image"])
    if code is not None:
        raise RequestError(
            f"{source}: refused, it names code to import ({code}), which no file of weights may do. "
            "Nothing was imported"
        )
    return described


def image_tower(description: dict[str, Any], projection: int, *, source: str, trust_import: bool) -> ImageTower:
    """A tower of this description; without memory on the meta device unless it is an import path.

    Raises:
        RequestError: it is code, and the user did not allow `source` to name any.
    """
    kind = image_kinds()[description["kind"]]
    code = kind.imports(description)
    if code is None:
        with torch.device("meta"):
            return kind.described(description, projection)
    if not trust_import:
        raise RequestError(
            f"{source}: its image tower is code that the checkpoint names, {code}. Nothing was imported. If "
            "you know that code and where the checkpoint comes from: --trust-import on the command line, "
            "trust_import=True in Python"
        )
    return kind.described(description, projection)


def text_tower(description: dict[str, Any], projection: int) -> TextTower:
    """A tower of this description, without memory on the meta device."""
    with torch.device("meta"):
        return text_kind(description).described(description, projection)


def assemble(checkpoint: Checkpoint) -> DualEncoder:
    """The model of a checkpoint, in evaluation mode; its tensors become the model's own.

    Raises:
        RequestError: a tensor is missing, left over or of another shape, or the vocabulary does not fit.
    """
    description, source = checkpoint.description, checkpoint.source
    _check_layers(description, checkpoint.tensors, source)
    image = image_tower(
        description["image"], description["projection"], source=source, trust_import=checkpoint.trust_import
    )
    if checkpoint.image_size not in (None, image.image_size):
        type(image).resized(description["image"], checkpoint.tensors, checkpoint.image_size)  # which refuses
    text = text_tower(description["text"], description["projection"])
    tokenizer = TextTokenizer(checkpoint.vocab_file, description["context_length"])
    check_vocabulary(tokenizer, text, source)
    known = description["architecture"]
    model = DualEncoder(image, text, tokenizer, Architecture.from_dict(known) if known else None)
    if description.get("logit_bias"):
        model.logit_bias = nn.Parameter(torch.zeros(()))
    fill(model, checkpoint.tensors, source)
    return model.eval()


def _check_layers(description: dict[str, Any], tensors: Tensors, source: str) -> None:
    """Refuse a number of layers the weights do not have before so many are laid out; all else is told by the shapes."""
    kinds = {"image": image_kinds()[description["image"]["kind"]], "text": text_kind(description["text"])}
    for half, kind in kinds.items():
        if kind.layer_names is None:
            continue
        key, pattern = kind.layer_names
        described, found = description[half][key], _count(tensors, pattern)
        if described != found:
            raise RequestError(
                f"{source}: the tensors are not those of the model it describes: {described} {half} layers, {found} in the weights; "
                "fetch both again"
            )


def check_vocabulary(tokenizer: Tokenizer, text: TextTower, source: str) -> None:
    """Refuse a vocabulary or a context length the tower has no embeddings for."""
    if tokenizer.vocab_size != text.vocab_size:
        raise RequestError(
            f"{source}: the vocabulary {tokenizer.name} has {tokenizer.vocab_size:,} tokens, the text tower "
            f"{text.vocab_size:,}; put the tower's own vocab.txt beside its weights"
        )
    if tokenizer.context_length > text.max_length:
        raise RequestError(
            f"data.context_length is {tokenizer.context_length}, but the text tower has {text.max_length} positions"
        )


def fill(module: nn.Module, tensors: Tensors, source: str) -> None:
    """Give a module the tensors of a file; every one must be there, fit, and be used.

    Raises:
        RequestError: naming what is missing, unexpected or of another shape.
    """
    own = {file_name(name): (name, tensor) for name, tensor in module.state_dict().items()}
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or extra:
        said = [f"{len(names)} {what} ({', '.join(names[:3])}{', …' * (len(names) > 3)})"
                for what, names in (("missing", missing), ("unexpected", extra)) if names]  # fmt: skip
        raise RequestError(f"{source}: the tensors are not those of the model it describes: {'; '.join(said)}")
    for name, (_, expected) in own.items():
        found = tensors[name]
        if found.shape != expected.shape:
            raise RequestError(f"{source}: {name} is {list(found.shape)}, expected {list(expected.shape)}")
        if found.is_floating_point() != expected.is_floating_point():
            raise RequestError(
                f"{source}: {name} holds numbers of type {str(found.dtype)[6:]}, expected {str(expected.dtype)[6:]}"
            )
    _give(module, {full: tensors[name] for name, (full, _) in own.items()})
    _make_buffers(module)


def _give(module: nn.Module, state: Tensors) -> None:
    if isinstance(module, DualEncoder):
        for side in ("image_tower", "text_tower"):
            part = {
                name.removeprefix(f"{side}."): tensor for name, tensor in state.items() if name.startswith(f"{side}.")
            }
            _give(getattr(module, side), part)
        for name, number in module.named_parameters(recurse=False):
            number.data.copy_(state[name])
    else:
        # A tower by import path keeps its own tensors (it may share some); the others, laid out without memory, take these.
        module.load_state_dict(state, assign=any(own.is_meta for own in module.parameters()))


def _make_buffers(module: nn.Module) -> None:
    """Buffers that stand in no file: numbers of positions, token types."""
    for part in module.modules():
        for name, buffer in list(part.named_buffers(recurse=False)):
            if not buffer.is_meta:
                continue
            if name == "position_ids":
                made = torch.arange(buffer.shape[-1]).expand(buffer.shape).clone()
            elif name == "token_type_ids":
                made = torch.zeros(buffer.shape, dtype=buffer.dtype)
            else:
                raise RuntimeError(f"{type(part).__name__}.{name}: no rule how to make this buffer")
            part.register_buffer(name, made, persistent=False)


# ---- tensors → description ------------------------------------------------------------------------------------------


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
    return with_architecture({
        "architecture": None, "image": image, "text": text, "projection": projection, "context_length": CONTEXT_LENGTH,
    })  # fmt: skip


def recognise_image(tensors: Tensors) -> dict[str, Any]:
    """Image half of a description, from tensors with our file names; KeyError where one is missing."""
    if "visual.conv1.weight" in tensors:
        width = tensors["visual.conv1.weight"].shape[0] * 2
        stages = _count(tensors, r"visual\.layer(\d+)\.") - 1
        layers = tuple(_count(tensors, rf"visual\.layer{number}\.(\d+)\.") for number in range(1, stages + 1))
        side = side_of(tensors[resnet.POSITIONS])
        return asdict(ResNet(layers, width, width * 32 // 64, side * 4 * 2 ** (stages - 1)))
    patch = tensors["vision_model.embeddings.patch_embedding.weight"]
    hidden, size = patch.shape[0], patch.shape[-1]
    config = ChineseCLIPVisionConfig(
        hidden_size=hidden, num_hidden_layers=_count(tensors, r"vision_model\.encoder\.layers\.(\d+)\."),
        num_attention_heads=_heads(hidden), patch_size=size, image_size=side_of(tensors[vit.POSITIONS]) * size,
        intermediate_size=tensors["vision_model.encoder.layers.0.mlp.fc1.weight"].shape[0], hidden_act="quick_gelu",
    )  # fmt: skip
    return {"kind": "vit"} | {key: getattr(config, key) for key in vit.VISION_KEYS}


def recognise_text(tensors: Tensors) -> dict[str, Any]:
    """Text half of a description, from tensors with our file names; KeyError where one is missing."""
    vocabulary, hidden = tensors["text_model.embeddings.word_embeddings.weight"].shape
    config = ChineseCLIPTextConfig(
        vocab_size=vocabulary, hidden_size=hidden, num_hidden_layers=_count(tensors, r"text_model\.encoder\.layer\.(\d+)\."),
        num_attention_heads=_heads(hidden),
        intermediate_size=tensors["text_model.encoder.layer.0.intermediate.dense.weight"].shape[0],
        max_position_embeddings=tensors["text_model.embeddings.position_embeddings.weight"].shape[0],
        type_vocab_size=tensors["text_model.embeddings.token_type_embeddings.weight"].shape[0],
    )  # fmt: skip
    return {"pooling": "cls"} | {key: getattr(config, key) for key in TEXT_KEYS}


def with_architecture(description: dict[str, Any]) -> dict[str, Any]:
    """The description with the catalogue's entry where it is one of the published sizes, else with None."""
    found = next((known for known in ARCHITECTURES.values() if _is(known, description)), None)
    return description | {"architecture": found.as_dict() if found else None}


def _is(known: Architecture, description: dict[str, Any]) -> bool:
    image, text = description["image"], description["text"]
    numbers = {
        "hidden_size": known.text.hidden, "num_hidden_layers": known.text.layers, "num_attention_heads": known.text.heads,
        "intermediate_size": known.text.intermediate or 4 * known.text.hidden, "vocab_size": known.text.vocabulary,
    }  # fmt: skip
    if known.projection != description["projection"] or any(text[key] != value for key, value in numbers.items()):
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


def _count(tensors: Tensors, pattern: str) -> int:
    return max((int(match[1]) for name in tensors if (match := re.match(pattern, name))), default=-1) + 1


def _heads(hidden: int) -> int:
    width = _HEAD_WIDTHS.get(hidden, 64)
    if hidden % width:
        raise RequestError(
            f"the number of attention heads of a width of {hidden} is not in the file; use a folder with its config.json"
        )
    return hidden // width
