"""Image towers of CLIP and Chinese CLIP, as OpenAI, open_clip and transformers write them, as starts.

OpenAI's and open_clip's files name the image tower as the official Chinese code does. Taken are the tower, its visual
projection and the temperature; the English text half is left over.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cnclip_ft.models.assembly import described_in_file, temperature
from cnclip_ft.models.formats.cn_clip import is_dropped, is_official, to_ours
from cnclip_ft.models.formats.files import Content, Tensors, read_json, read_weights
from cnclip_ft.models.formats.open_clip import (
    CONFIGURATION,
    is_open_clip,
    model_section,
    open_clip_rules,
    picture_rule,
    said_head_width,
    timm_numbers,
    weights_of,
)
from cnclip_ft.models.formats.picture_rules import unsaid_rules
from cnclip_ft.models.formats.recognise import recognise_image
from cnclip_ft.models.formats.timm_siglip import is_timm_siglip, read_timm_siglip
from cnclip_ft.models.formats.transformers_folder import vision_numbers
from cnclip_ft.models.known import IMAGE_HALVES, IMPORT_PATH, READERS, refuse_code
from cnclip_ft.models.preprocessing import Fit
from data_tools.errors import RequestError
from data_tools.words import Said

# The English text half, and numbers some files carry.
_OTHER_HALF = (
    "transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection", "text.", "text_model.", "bert.",
    "attn_mask", "input_resolution", "context_length", "vocab_size", "logit_bias",
)  # fmt: skip


# Of each kind, the tensor whose rows are the common space.
_LAST = {
    "resnet": "visual.attnpool.c_proj.weight",
    "vit": "visual_projection.weight",
    "siglip": "vision_model.head.mlp.fc2.weight",
}
_TYPES = ("clip", "chinese_clip", *IMAGE_HALVES)


def has_image_half(path: Path) -> bool:
    """Whether the image tower of a folder or file is read by `read_image_half`."""
    file = path / "config.json"
    if file.is_file():
        return read_json(file).get("model_type") in _TYPES
    return not path.is_dir() or is_open_clip(path)


class ImageHalf:
    """What was read: `numbers` (image half of a description), `projection`, `tensors` of the tower alone, the temperature
    (logit scale, or None), names left over, and notes to say."""

    def __init__(
        self,
        numbers: dict[str, Any],
        tensors: Tensors,
        source: str,
        left_over: list[str],
        notes: list[str],
        projection: int | None = None,
    ) -> None:
        self.logit_scale = temperature(tensors, source) if "logit_scale" in tensors else None
        tensors.pop("logit_scale", None)
        self.numbers, self.tensors, self.source, self.left_over, self.notes = numbers, tensors, source, left_over, notes
        if projection is None:
            last = _LAST[numbers["kind"]]
            if last not in tensors:
                raise RequestError(f"{source}: the image tower is incomplete, no {last!r} in it")
            projection = tensors[last].shape[0]
        self.projection = projection


def read_image_half(path: Path, activation: str | None = None) -> ImageHalf:
    """The image half of a CLIP file or folder, recognised from its content.

    Args:
        activation: ``quick_gelu`` or ``gelu``, where the file does not say and the guess that is reported is wrong.

    Raises:
        RequestError: no image tower of CLIP's kind in it.
    """
    if path.is_dir() and not is_open_clip(path):
        return _transformers_folder(path, activation)
    file = weights_of(path) if path.is_dir() else path
    return image_half(file, read_weights(file), activation)


def image_half(file: Path, content: Content, activation: str | None) -> ImageHalf:
    """As `read_image_half`, of a file that was read."""
    tensors = content.tensors
    if any(name.startswith("visual.trunk.") for name in tensors):
        return _timm(file, content)
    visual = {name: tensor for name, tensor in tensors.items() if name.startswith("visual.") or name == "logit_scale"}
    if len(visual) < 2:
        if any(name.startswith("vision_model.") for name in tensors):
            return _from_tensors(file, content, None, activation or "quick_gelu")
        raise RequestError(f"{file}: no image tower in it (no tensor named visual.… or vision_model.…)")
    left_over = _check_rest(file, tensors.keys() - visual.keys())
    described = content.extras.get("cnclip_ft") if is_official(tensors) else None  # in the files we export
    width = None if is_official(tensors) else said_head_width(file.parent / CONFIGURATION)
    try:
        ours = to_ours(visual)
        numbers = (
            described_in_file(described, str(file))["image"] if described is not None else recognise_image(ours, width)
        )
    except (KeyError, ValueError) as error:
        raise RequestError(f"{file}: the image tower is incomplete, no {error} in it") from None
    except RequestError as error:
        raise RequestError(f"{file}: not an image tower of CLIP's kind: {error}") from None
    notes: list[str] = []
    if not is_official(tensors):
        numbers, notes = _open_clip_numbers(file, numbers, activation, from_openai="input_resolution" in tensors)
    return ImageHalf(numbers, ours, str(file), left_over + content.left_over, content.notes + notes)


def _timm(file: Path, content: Content) -> ImageHalf:
    """An image tower under timm's names."""
    configuration, tensors = file.parent / CONFIGURATION, content.tensors
    if not configuration.is_file():
        raise RequestError(
            f"{file}: an open_clip model with an image tower of timm; put {CONFIGURATION} beside it, which says which one"
        )
    vision, dim = model_section(configuration, "vision_cfg"), None
    if is_timm_siglip(tensors):
        numbers, ours = read_timm_siglip(file, tensors, vision)
    else:
        numbers, dim = timm_numbers(configuration, vision), model_section(configuration).get("embed_dim")
        ours = {name: tensor for name, tensor in tensors.items() if name.startswith("visual.")}
    left_over = _check_rest(file, {name for name in tensors if not name.startswith(("visual.", "logit_scale"))})
    scale = {name: tensor for name, tensor in tensors.items() if name == "logit_scale"}
    rule = picture_rule(configuration)
    return ImageHalf(numbers | rule, ours | scale, str(file), left_over + content.left_over, content.notes, dim)


def _open_clip_numbers(
    file: Path, numbers: dict[str, Any], activation: str | None, *, from_openai: bool
) -> tuple[dict[str, Any], list[str]]:
    """What shapes do not say: activation, heads, mean and std; from open_clip's configuration where it lies beside."""
    configuration = file.parent / CONFIGURATION
    if configuration.exists():
        said = open_clip_rules(configuration, numbers)
        return numbers | said | ({"hidden_act": activation} if activation and numbers["kind"] == "vit" else {}), []
    numbers = numbers | {"fit": "crop_even"}  # as OpenAI's own preprocessing, and open_clip's where nothing is said
    if numbers["kind"] != "vit":
        return numbers, []
    if activation or from_openai:
        return numbers | {"hidden_act": activation or "quick_gelu"}, []
    # open_clip's own models use gelu unless their name ends in -quickgelu; everything else comes from OpenAI's weights.
    guess = "gelu" if file.name.startswith("open_clip") else "quick_gelu"
    return numbers | {"hidden_act": guess}, [
        Said(
            "activation {guess} taken from the kind of file; if that is wrong: model.start.image={{path: …, activation: …}}",
            "激活函数 {guess} 由文件种类推断；若不对：model.start.image={{path: …, activation: …}}",
            guess=guess,
        )
    ]


def _transformers_folder(folder: Path, activation: str | None) -> ImageHalf:
    config = read_json(folder / "config.json")
    kind = config.get("model_type")
    refuse_code(folder)
    if kind not in _TYPES:
        raise RequestError(
            f"{folder}: a model of type {repr(kind)[:60]}; an image tower comes from a folder of type "
            f"{', '.join(sorted((*READERS, *IMAGE_HALVES)))}, from a folder or file of open_clip or OpenAI, or from a checkpoint of "
            f"ours; {IMPORT_PATH}"
        )
    # CLIP's own default is quick_gelu as well, and so are its other numbers.
    fit: Fit = "squash" if kind.startswith("chinese") else "crop"
    numbers, said = vision_numbers(folder, config.get("vision_config") or config, fit=fit)
    if activation:
        numbers |= {"hidden_act": activation}
    half = _from_tensors(folder, read_weights(folder), numbers, activation)
    half.notes += [*said, *unsaid_rules(folder)]
    return half


def _from_tensors(path: Path, content: Content, numbers: dict[str, Any] | None, activation: str | None) -> ImageHalf:
    tensors = content.tensors
    taken = ("vision_model.", "visual_projection.", "logit_scale")
    vision = {name: tensor for name, tensor in tensors.items() if name.startswith(taken) and not is_dropped(name)}
    rest = {name for name in tensors.keys() - vision.keys() if not is_dropped(name)}
    left_over = _check_rest(path, rest)
    if numbers is None:
        numbers = recognise_image(vision) | {"hidden_act": activation}
    return ImageHalf(numbers, vision, str(path), left_over + content.left_over, content.notes)


def _check_rest(path: Path, names: set[str]) -> list[str]:
    unexpected = sorted(name for name in names if not name.startswith(_OTHER_HALF))
    if unexpected:
        raise RequestError(f"{path}: {len(unexpected)} tensors belong to no CLIP, e.g. {', '.join(unexpected[:3])}")
    return sorted(names)


def is_openai(names: Iterable[str]) -> bool:
    """Whether a state dict of these names is a CLIP as OpenAI's or open_clip's code saves it."""
    names = list(names)
    text = any(name == "token_embedding.weight" or name.startswith("text.") for name in names)
    return text and any(name.startswith("visual.") for name in names)


ACTIVATIONS = ("quick_gelu", "gelu")


def check_activation(value: Any) -> str | None:
    """None, or one of the two activations a CLIP image tower has."""
    if value is not None and value not in ACTIVATIONS:
        raise RequestError(
            f"model.start.image.activation is {value!r}: {' or '.join(f'model.start.image.activation={known}' for known in ACTIVATIONS)}"
        )
    return value
