"""Description ↔ model: what besides weights and vocabulary it takes to build one.

A described model is laid out without memory (on torch's meta device) and the weights that were read become its own:
loading takes the memory of the weights once.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cnclip_ft.models.contract import ImageTower, TextTower, Tokenizer, Tower
from cnclip_ft.models.description import checked_description
from cnclip_ft.models.dual_encoder import DualEncoder
from cnclip_ft.models.families.chinese_clip.catalog import Architecture
from cnclip_ft.models.formats.files import Tensors
from cnclip_ft.models.heads import GroundingHeads, completed
from cnclip_ft.models.registry import image_kinds, text_kind, tokenizer_kind
from cnclip_ft.models.schema import MOST_PIXELS, TextPart
from data_tools.errors import RequestError
from data_tools.words import Said


@dataclass
class Checkpoint:
    """A checkpoint of any kind, read: `tensors` have our file names, `notes` are to be said to the user."""

    source: str
    description: dict[str, Any]
    tensors: Tensors
    vocabulary: Path | None = None  # as `Tokenizer.read` takes it
    left_over: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    image_notes: list[str] = field(default_factory=list)  # of one half, which may be all that is taken
    text_notes: list[str] = field(default_factory=list)
    trust_import: bool = False  # the user lets the file name code
    tokenizer: Tokenizer | None = None  # made by the reader, of a folder that is not ours
    image_before: dict[str, Any] | None = None  # the image half as the file has it, where another size was asked for

    @property
    def all_notes(self) -> list[str]:
        return [*self.notes, *self.image_notes, *self.text_notes]


def file_names(module: nn.Module) -> dict[str, str]:
    """Our parameter names, of a model or a tower → the names in a file (transformers' where it has them)."""
    if isinstance(module, Tower):
        half = "image_tower." if isinstance(module, ImageTower) else "text_tower."
        return {name: name if name.startswith(module.file_prefixes) else half + name for name in module.state_dict()}
    towers = {
        f"{half}.{name}": in_file
        for half, tower in module.named_children()
        if isinstance(tower, Tower)
        for name, in_file in file_names(tower).items()
    }
    return {name: towers.get(name, name) for name in module.state_dict()}


def read_tokenizer(description: dict[str, Any], place: Path | None) -> Tokenizer:
    """The tokenizer of a checked description; `place` as `Tokenizer.read` takes it.

    Raises:
        RequestError: its files cannot be read.
    """
    described = description.get("tokenizer", {})
    return tokenizer_kind(described).read(place, description["context_length"], described)


def tokenizer_of(checkpoint: Checkpoint) -> Tokenizer:
    """As `read_tokenizer`, of a whole model that was read."""
    return checkpoint.tokenizer or read_tokenizer(checkpoint.description, checkpoint.vocabulary)


# ---- model → description --------------------------------------------------------------------------------------------


def describe_model(model: DualEncoder) -> dict[str, Any]:
    """Everything but weights and vocabulary that `assemble` needs."""
    tokenizer = model.tokenizer.describe()
    return (
        {
            "architecture": model.architecture.as_dict() if model.architecture else None,
            "image": model.image_tower.describe(),
            "text": model.text_tower.describe(),
            "projection": model.image_tower.output_dim,
            "context_length": model.context_length,
        }
        | ({"logit_bias": True} if model.logit_bias is not None else {})
        | ({"heads": model.heads.describe()} if model.heads is not None else {})
        | ({"tokenizer": tokenizer} if tokenizer else {})
    )


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
    text = text_tower(description["text"], description["projection"])
    for half, tower in (("image", image), ("text", text)):
        if tower.output_dim != description["projection"]:
            raise RequestError(
                f"{source}: its {half} tower gives features of {tower.output_dim} numbers, and the model it describes has "
                f"{description['projection']}; fetch both again"
            )
    tokenizer = tokenizer_of(checkpoint)
    check_vocabulary(tokenizer, text, source)
    known = description["architecture"]
    model = DualEncoder(image, text, tokenizer, Architecture.from_dict(known) if known else None)
    if description.get("logit_bias"):
        model.logit_bias = nn.Parameter(torch.zeros(()))
    if described := description.get("heads"):
        with torch.device("meta"):
            model.heads = GroundingHeads(**described)
    if checkpoint.image_before is not None and (own := image.size_in(checkpoint.image_before)) != image.image_size:
        model.own_image_size = own
        checkpoint.image_notes += size_notes(image, own)
    fill(model, completed(checkpoint.tensors), source)
    return model.eval()


def _check_layers(description: dict[str, Any], tensors: Tensors, source: str) -> None:
    """Refuse a number of layers the weights do not have before so many are laid out; all else is told by the shapes."""
    kinds = {"image": image_kinds()[description["image"]["kind"]], "text": text_kind(description["text"])}
    for half, kind in kinds.items():
        if kind.layer_names is None:
            continue
        key, pattern = kind.layer_names
        described, found = description[half][key], count_layers(own_tensors(tensors, kind, half), pattern)
        if described != found:
            raise RequestError(
                f"{source}: the tensors are not those of the model it describes: {described} {half} layers, {found} in the weights; "
                "fetch both again"
            )


def check_vocabulary(tokenizer: Tokenizer, text: TextTower, source: str) -> None:
    """Refuse a vocabulary or a context length the tower has no embeddings for."""
    tokenizer.check_rows(text.vocab_size, source)
    if tokenizer.context_length > text.max_length:
        raise RequestError(
            f"data.context_length is {tokenizer.context_length}, but the text tower has {text.max_length} positions: "
            f"data.context_length={text.max_length} or less"
        )


def fill(module: nn.Module, tensors: Tensors, source: str) -> None:
    """Give a module the tensors of a file; every one must be there, fit, and be used.

    Raises:
        RequestError: naming what is missing, unexpected or of another shape.
    """
    tensors = with_scalars(tensors)
    names = file_names(module)
    own = {names[name]: (name, tensor) for name, tensor in module.state_dict().items()}
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or extra:
        said = [
            f"{len(names)} {what} ({', '.join(names[:3])}{', …' * (len(names) > 3)})"
            for what, names in (("missing", missing), ("unexpected", extra))
            if names
        ]
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


def temperature(tensors: Tensors, source: str) -> float:
    """The logarithm that a whole model multiplies its cosines by.

    Raises:
        RequestError: it is not there, or no single number.
    """
    found = tensors.get("logit_scale")
    if found is None or found.numel() != 1:
        what = "missing" if found is None else f"{list(found.shape)}, expected []"
        raise RequestError(f"{source}: logit_scale is {what}; fetch the weights again")
    return float(found)


def with_scalars(tensors: Tensors) -> Tensors:
    """Temperature and bias as numbers without dimensions, which some files give one (SigLIP's)."""
    return {
        name: tensor.reshape(()) if name in ("logit_scale", "logit_bias") and tensor.numel() == 1 else tensor
        for name, tensor in tensors.items()
    }


def _give(module: nn.Module, state: Tensors) -> None:
    if isinstance(module, DualEncoder):
        for side in ("image_tower", "text_tower", *(["heads"] if module.heads is not None else [])):
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


def own_tensors(tensors: Tensors, kind: type[Tower], half: str) -> Tensors:
    """Those of one tower out of a file, by the tower's own names."""
    if kind.file_prefixes:
        return {name: tensor for name, tensor in tensors.items() if name.startswith(kind.file_prefixes)}
    before = f"{half}_tower."
    return {name.removeprefix(before): tensor for name, tensor in tensors.items() if name.startswith(before)}


def resized(numbers: dict[str, Any], tensors: Tensors, image_size: int) -> tuple[dict[str, Any], list[str]]:
    """`ImageTower.resized` for the tensors of a file, which are changed in place.

    Raises:
        RequestError: the tower has no such resolution.
    """
    if not 8 <= image_size <= MOST_PIXELS:
        raise RequestError(f"image_size is {image_size}, expected 8 to {MOST_PIXELS:,}")
    kind = image_kinds()[numbers["kind"]]
    if kind.imports(numbers) is None:
        with torch.device("meta"):
            if kind.described(numbers, 1).image_size == image_size:
                return numbers, []
    own = own_tensors(tensors, kind, "image")
    found = kind.resized(numbers, own, image_size)
    tensors.update(own if kind.file_prefixes else {f"image_tower.{name}": tensor for name, tensor in own.items()})
    return found


def size_notes(tower: ImageTower, before: int) -> list[str]:
    """What to say of a tower that takes any size, where it was another; what was `resized` has said so."""
    if not tower.any_size or tower.image_size == before:
        return []
    return [
        Said(
            "image size {old} → {new}: no weight changes",
            "图像边长 {old} → {new}：权重不变",
            old=before,
            new=tower.image_size,
        )
    ]


KEPT_POSITIONS = 20  # well trained, as most texts are short (arXiv 2403.15378)


def stretched(
    numbers: dict[str, Any], tensors: Tensors, context_length: int | None
) -> tuple[dict[str, Any], list[str]]:
    """Positions for texts longer than the tower was trained on, as Long-CLIP has them (arXiv 2403.15378).

    The first 20 stay, the others are spread over the rest, interpolated linearly; 77 become 248 as there.

    Args:
        numbers: the text half of a checked description.
        tensors: by file name; changed in place.

    Returns:
        The new description, and what to say about it; as they were where nothing is longer, or where the tower has no learnt
        positions, which is refused when tokenizer and tower meet.
    """
    kind = text_kind(numbers)
    part = kind.schema.model_validate(numbers)
    assert isinstance(part, TextPart)
    longest = part.longest
    name = kind.position_names[1] if kind.position_names else None
    if name not in tensors or context_length is None or context_length <= longest:
        return numbers, []
    old = tensors[name].float()
    kept = len(old) - longest + min(KEPT_POSITIONS, longest - 2)  # RoBERTa's begin behind the pad's number
    rest, wanted = len(old) - kept, len(old) - kept + context_length - longest
    place = torch.arange(wanted) * (rest / wanted)
    before = place.long().clamp(max=rest - 2)  # beyond the last but one: on along the last difference
    spread = torch.lerp(old[kept + before], old[kept + before + 1], (place - before)[:, None])
    tensors[name] = torch.cat([old[:kept], spread]).to(tensors[name].dtype)
    note = Said(
        "texts of {longest} → {length} tokens: position embeddings stretched (the first {kept} kept, the rest interpolated)",
        "文本长度 {longest} → {length} token：位置编码已拉伸（前 {kept} 个保留，其余插值）",
        longest=longest,
        length=context_length,
        kept=kept - len(old) + longest,
    )
    return kind.with_positions(numbers, len(tensors[name])), [note]


def count_layers(tensors: Tensors, pattern: str) -> int:
    return max((int(match[1]) for name in tensors if (match := re.match(pattern, name))), default=-1) + 1
