"""An official ``.pt``: what `cn_clip.clip.load_from_name` and the official training take."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from cnclip_ft.models.checkpoints import file_name, load
from cnclip_ft.models.dual_encoder import DualEncoder
from cnclip_ft.models.official import to_official
from cnclip_ft.models.towers import ForeignTower
from data_tools.errors import RequestError, UserError


def export_cn_clip(model: DualEncoder, output: Path, source: Path) -> float:
    """Write the file whole or not at all; returns the largest difference of unit features after reading it back.

    Raises:
        RequestError: the official code has no such towers.
        UserError: it cannot be written.
    """
    if isinstance(model.image_tower, ForeignTower) or model.text_tower.pooling != "cls":
        raise RequestError(f"{source}: the official code has no such towers; the checkpoint can be used with cnclip_ft.load")
    tensors = {file_name(name): tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    state = {f"module.{name}": tensor for name, tensor in to_official(tensors).items()}
    beside = output.with_name(f"{output.name}.writing")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"epoch": 0, "step": 0, "name": source.name, "state_dict": state}, beside)
        os.replace(beside, output)
    except (OSError, RuntimeError) as error:
        beside.unlink(missing_ok=True)
        raise UserError(f"{output} could not be written ({error})") from None
    back = load(output)
    pixels = torch.randint(0, 256, (4, 3, model.image_size, model.image_size), dtype=torch.uint8,
                           generator=torch.Generator().manual_seed(0))  # fmt: skip
    texts = ["一只在雪地里奔跑的狗", "a red car"]
    with torch.inference_mode():
        image = (back.image_features(pixels) - model.image_features(pixels)).abs().max().item()
    return max(image, (back.encode_texts(texts) - model.encode_texts(texts)).abs().max().item())
