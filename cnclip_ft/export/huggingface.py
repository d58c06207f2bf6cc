"""A folder that ``transformers.ChineseCLIPModel.from_pretrained`` and ``ChineseCLIPProcessor`` read without a hub."""

from __future__ import annotations

from pathlib import Path

import torch

from cnclip_ft.models.checkpoints import INFO, describe_model, read_info, save_checkpoint
from cnclip_ft.models.dual_encoder import DualEncoder
from data_tools.errors import RequestError


def export_huggingface(model: DualEncoder, output: Path, source: Path) -> float:
    """Write the folder; returns the largest difference of features between source and what transformers reads.

    Raises:
        RequestError: transformers has no model for these towers.
    """
    description = describe_model(model)
    if description["image"]["kind"] != "vit" or description["text"]["pooling"] != "cls":
        raise RequestError(
            f"{source}: transformers' ChineseCLIPModel is a ViT with a [CLS]-pooled RoBERTa; these towers are "
            f"{description['image']['kind']} and {description['text']['pooling']}-pooled. The checkpoint itself can be "
            "used with cnclip_ft.load."
        )
    # What our checkpoint knows of itself goes along; other kinds know nothing.
    known = read_info(source) if (source / INFO).is_file() else {}
    info = {key: value for key, value in known.items() if key not in ("format", "model")}
    save_checkpoint(model, output, info=info | {"exported_from": source.name})
    return _difference(model, output)


@torch.inference_mode()
def _difference(model: DualEncoder, folder: Path) -> float:
    from transformers import ChineseCLIPModel
    from transformers.utils import logging

    from cnclip_ft.data.images import normalise

    logging.disable_progress_bar()
    theirs = ChineseCLIPModel.from_pretrained(folder).eval()
    size, tower = model.image_size, model.image_tower
    pixels = torch.randint(0, 256, (4, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    image = theirs.get_image_features(pixel_values=normalise(pixels, tower.mean, tower.std))
    ids, mask = model.tokenizer.pad(model.tokenizer.encode(["一只在雪地里奔跑的狗", "“两个”孩子在踢足球", "a red car"]))
    text = theirs.get_text_features(input_ids=ids, attention_mask=mask)
    found = [getattr(out, "pooler_output", out) for out in (image, text)]  # transformers 4 gave the tensor itself
    ours = model.image_features(pixels), model.text_features(ids, mask)
    unit = torch.nn.functional.normalize
    return max((unit(a.float(), dim=1) - b).abs().max().item() for a, b in zip(found, ours, strict=True))
