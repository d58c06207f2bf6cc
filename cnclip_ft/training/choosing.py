"""What the rules of a recipe look at (`recipe_rules`): pairs and pictures, the device and its memory, where the weights come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from cnclip_ft.data.mixture import Mixture
from cnclip_ft.evaluation.kinds.recall import ValidStore
from cnclip_ft.models.checkpoints import read_checkpoint
from cnclip_ft.models.families.imported import is_convolutional, is_convolutional_as_made
from cnclip_ft.models.halves import keeps_shapes
from cnclip_ft.models.hub import find
from cnclip_ft.recipe import ModelSection
from cnclip_ft.recipe_data import DataSection
from cnclip_ft.recipe_facts import FEWEST, NAME, Facts, Start
from cnclip_ft.training.context import open_split, open_train
from data_tools.errors import RequestError

_SPLIT = (
    "Pictures to judge by must not be trained on; the import deals them out: "
    "cnclip-ft data import table TABLE --images PHOTOS --split 0.9,0.1 --output DIR makes DIR/train and DIR/valid"
)


def look(model: ModelSection, data: DataSection, *, trust_import: bool = False) -> Facts:
    """The facts, the same on all devices.

    Args:
        trust_import: whether the code that a checkpoint names as its image tower may be looked at, which runs it.

    Raises:
        RequestError: a store is missing, empty or too small; how to make one to judge by.
    """
    store = open_train(data)
    parts = [(part.store, part.weight) for part in store.parts] if isinstance(store, Mixture) else [(store, 1.0)]
    for each in data.valid_sets().values():
        if isinstance(each, ValidStore):
            _check_valid(each.store)
    # Of several stores a picture may lie in two; of one the ids need not be read.
    images = len(store.image_ids) if isinstance(store, Mixture) else store.image_count
    visited = sum(weight * (len(part) if data.captions == "all" else part.image_count) for part, weight in parts)
    if len(store) < FEWEST:
        raise RequestError(
            f"data.train: {' + '.join(data.train_places())} has {len(store)} pairs; {NAME} needs {FEWEST} or more, and a few hundred to learn "
            "anything of use"
        )
    start, width = kind_of_start(model.start)
    devices = PartialState(cpu=not torch.accelerator.is_available())
    kind = devices.device.type
    memory = torch.cuda.get_device_properties(devices.device).total_memory / 2**30 if kind == "cuda" else None
    facts = [
        Facts(
            pairs=max(round(visited), FEWEST),
            images=images,
            device=kind,
            memory=memory,
            devices=devices.num_processes,
            start=start,
            width=width,
            one_size=one_size(model),
            convolutions=_far(model, trust_import),
            captions=len(store) / max(images, 1),
        )
    ]
    if devices.num_processes > 1:
        broadcast_object_list(facts)
    if facts[0].pairs < devices.num_processes:
        raise RequestError(
            f"data.train: {facts[0].pairs} pairs for {devices.num_processes} processes; start fewer of them"
        )
    return facts[0]


def _check_valid(place: str) -> None:
    try:
        open_split(place, "data.valid")
    except RequestError as error:
        raise error if Path(place).exists() else RequestError(f"{error} {_SPLIT}") from None


def kind_of_start(start: str | dict[str, Any]) -> tuple[Start, int]:
    """What the towers are to each other, and how wide the wider one is that is made new. Two halves named apart meet through a text
    projection that is made new, whatever models they come from."""
    if isinstance(start, str):
        return "whole", 768
    if "architecture" in start:
        return "new", 768
    image, text = start.get("image"), start.get("text")
    new = [tower for tower in (image, text) if isinstance(tower, dict) and "path" not in tower]
    width = max((_width(tower) for tower in new), default=768)
    if not new:
        return "towers", width
    if len(new) == 2:
        return "new", width
    return ("new image" if new[0] is image else "new text"), width


def _far(model: ModelSection, trust_import: bool) -> bool:
    """Whether the image tower is a network of convolutions that has met no texts: made by an import path, or of a checkpoint that has
    it as it was made (a stage that trains the text tower leaves it so). What cannot be read is told where the model is built."""
    if model.code is not None:
        return is_convolutional(model.code)
    place = _image_place(model)
    if place is None or not trust_import:
        return False
    try:
        found = read_checkpoint(find(place, model.source))
        return is_convolutional_as_made(found.description["image"], found.tensors)
    except RequestError:
        return False


def _image_place(model: ModelSection) -> str | None:
    """Where the image tower's weights lie."""
    image = model.start.get("image") if isinstance(model.start, dict) else model.start
    place = image.get("path") if isinstance(image, dict) else image
    return place if isinstance(place, str) else None


def one_size(model: ModelSection) -> bool:
    """Whether the image tower sees all pictures in one size. What cannot be found or read is told where the model is built."""
    place = _image_place(model)
    if place is None or model.code is not None:
        return True
    try:
        return not keeps_shapes(find(place, model.source))
    except RequestError:
        return True


def _width(tower: dict[str, Any]) -> int:
    for key in ("hidden", "width"):
        if isinstance(tower.get(key), int):
            return max(int(tower[key]), 1)
    return 768
