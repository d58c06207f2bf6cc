"""A tiny store and a tiny checkpoint, as small as everything still has something to say."""

from __future__ import annotations

import io
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

from cnclip_ft.features.encode import SplitFeatures
from cnclip_ft.models.checkpoints import save_checkpoint
from cnclip_ft.models.start import build_start
from data_tools.store import StoreWriter


def png(seed: int, size: int = 36) -> bytes:
    pixels = random.Random(seed).randbytes(8 * 8 * 3)
    out = io.BytesIO()
    Image.frombytes("RGB", (8, 8), pixels).resize((size, size)).save(out, "PNG")
    return out.getvalue()


def make_store(path: Path, images: int = 12, *, lone: int = 1, answers: bool = True) -> Path:
    """Image ids 100…, one Chinese and one English text each; every third Chinese text shows the next image too."""
    words = random.Random(0)
    with StoreWriter(path) as writer:
        for number in range(images):
            writer.add_image(100 + number, png(number))
        for number in range(images if answers else 0):
            chinese = "".join(words.choice("红绿蓝黄大小圆方猫狗") for _ in range(5))
            writer.add_pair(100 + number, 2 * number, chinese, "zh")
            if number % 3 == 0 and number + 1 < images:
                writer.add_pair(101 + number, 2 * number, chinese, "zh")
            writer.add_pair(100 + number, 2 * number + 1, f"thing {number}", "en")
        for number in range(lone):
            writer.add_lone_text(9000 + number, f"没有图 {number}", "zh")
        writer.finish()
    return path


def make_checkpoint(path: Path, seed: int = 0) -> Path:
    model, _ = build_start({"architecture": "tiny"}, seed=seed)
    save_checkpoint(model, path, info={"stage": "align", "step": 7})
    return path


def random_split(images: int, texts: int, dim: int = 16, seed: int = 0, noise: float = 2.0) -> SplitFeatures:
    """Texts near the feature of their image; text j belongs to image j % images."""
    generator = torch.Generator().manual_seed(seed)
    image = F.normalize(torch.randn(images, dim, generator=generator), dim=1)
    owner = torch.arange(texts) % images
    text = F.normalize(image[owner] + noise * F.normalize(torch.randn(texts, dim, generator=generator), dim=1), dim=1)
    return SplitFeatures(
        image_ids=[1000 + i for i in range(images)],
        text_ids=list(range(texts)),
        texts=[f"句子{i}" for i in range(texts)],
        languages=[None] * texts,
        positives=torch.stack([owner, torch.arange(texts)], 1),
        image_features=image,
        text_features=text,
    )
