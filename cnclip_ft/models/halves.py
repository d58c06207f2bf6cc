"""One tower of a whole model, beside a tower of another: its tensors, its notes, and for texts the pooling that is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cnclip_ft.models.assembly import Checkpoint, file_names, text_tower, tokenizer_of
from cnclip_ft.models.checkpoints import INFO, read_checkpoint, read_info
from cnclip_ft.models.contract import Tokenizer, Tower
from cnclip_ft.models.families.siglip.naflex import NaflexTower
from cnclip_ft.models.formats.bert import TextHalf
from cnclip_ft.models.formats.files import Tensors, read_json
from cnclip_ft.models.registry import text_kind
from data_tools.errors import RequestError
from data_tools.words import Said


def own_half(checkpoint: Checkpoint, kind: type[Tower], otherwise: str) -> tuple[Tensors, list[str]]:
    """The tensors of one tower under their names in the file, and the names of all others but the temperature.

    Args:
        otherwise: what stands before the tower's names where its kind has no prefix of its own.
    """
    prefixes = kind.file_prefixes or (otherwise,)
    own = {name: tensor for name, tensor in checkpoint.tensors.items() if name.startswith(prefixes)}
    return own, sorted(checkpoint.tensors.keys() - own.keys() - {"logit_scale"})


def keeps_shapes(path: Path) -> bool:
    """Whether the image tower of a folder takes pictures in their own shape (NaFlex), by what the folder says; no weights are read.

    Raises:
        RequestError: its description is not readable.
    """
    if (path / INFO).is_file():
        model = read_info(path).get("model")
        image = model.get("image") if isinstance(model, dict) else None
        return isinstance(image, dict) and image.get("kind") == NaflexTower.kind
    file = path / "config.json"  # the family is called like the tower
    return file.is_file() and read_json(file).get("model_type") == NaflexTower.kind


def text_half_of_whole(path: Path, pooling: str | None) -> TextHalf:
    """The text half of a whole model; its projection, into another common space, is left over.

    Args:
        pooling: what the user asks for; None keeps the model's own.

    Raises:
        RequestError: the tower has no such pooling, or not readable.
    """
    checkpoint = read_checkpoint(path)
    numbers, projection = checkpoint.description["text"], checkpoint.description["projection"]
    tensors, left_over = own_half(checkpoint, text_kind(numbers), "text_tower.")
    tokenizer, notes = tokenizer_of(checkpoint), [*checkpoint.notes, *checkpoint.text_notes]
    without = set(_names(numbers, projection))
    if pooling is not None:
        numbers, said = _pooled(checkpoint.source, numbers, pooling, tensors, tokenizer)
        notes += said
    own = _names(numbers, projection)
    without -= own.keys()  # another pooling has no use for them
    without |= {name for name, into_space in own.items() if into_space}
    kept = {name: tensor for name, tensor in tensors.items() if name not in without}
    left_over = sorted({*left_over, *(tensors.keys() & without), *checkpoint.left_over})
    return TextHalf(numbers, kept, checkpoint.vocabulary, checkpoint.source, left_over, notes, tokenizer)


def _names(numbers: dict[str, Any], projection: int) -> dict[str, bool]:
    """The tower's tensors by their names in a file, and whether they are of its projection."""
    tower = text_tower(numbers, projection)
    return {in_file: tower.in_projection(name) for name, in_file in file_names(tower).items()}


def _pooled(
    source: str, numbers: dict[str, Any], asked: str, tensors: Tensors, tokenizer: Tokenizer
) -> tuple[dict[str, Any], list[str]]:
    """The description with another pooling, and what to say of it."""
    kind = text_kind(numbers)
    possible = kind.poolings(numbers, tensors, tokenizer)
    if not possible:
        raise RequestError(
            f"model.start.pooling is {asked!r}, but a text tower of kind {kind.kind} has its own: model.start.pooling=null"
        )
    was = getattr(kind.schema.model_validate(numbers), "pooling")  # noqa: B009 - of every kind that has several
    if asked not in possible:
        raise RequestError(
            f"model.start.pooling is {asked!r}, which the text tower of {source} does not have: its own is {was}, and "
            f"{', '.join(possible)} work with it: model.start.pooling={was}"
        )
    if asked == was:
        return numbers, []
    note = Said(
        "pooling {asked} as asked for; the model was trained with {was}",
        "按要求使用 {asked} 池化；模型训练时用的是 {was}",
        asked=asked,
        was=was,
    )
    return possible[asked], [note]
