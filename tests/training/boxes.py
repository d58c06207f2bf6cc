"""Stores of pictures with coloured things in them, phrases that name the things, and where they lie."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cnclip_ft.recipe import Recipe
from data_tools.store import StoreWriter

COLOURS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (30, 30, 230), "yellow": (230, 220, 20)}
CHINESE = {"red": "红色的东西", "green": "绿色的东西", "blue": "蓝色的东西", "yellow": "黄色的东西"}


def write_boxes(folder: Path, pictures: int, seed: int, plain: int = 0) -> Path:
    """A store of grey pictures with one to three things of colours of their own; `plain` pairs more have no boxes."""
    random = np.random.default_rng(seed)
    with StoreWriter(folder) as writer:
        number = 0
        for image_id in range(pictures):
            pixels = np.full((40, 48, 3), 128, dtype=np.uint8)
            things = []
            for colour in random.permutation(list(COLOURS))[: random.integers(1, 4)]:
                x, y = int(random.integers(0, 4)) * 12, int(random.integers(0, 4)) * 10
                pixels[y : y + 10, x : x + 12] = COLOURS[colour]
                things = [each for each in things if each[1] != [x / 48, y / 40, 12 / 48, 10 / 40]]
                things.append((colour, [x / 48, y / 40, 12 / 48, 10 / 40]))
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "PNG")
            writer.add_image(image_id, file.getvalue())
            for colour, box in things:
                for text, language in ((f"the {colour} thing", "en"), (CHINESE[colour], "zh")):
                    writer.add_pair(image_id, number, text, language, beside={"boxes": [box]})
                    number += 1
            if image_id < plain:
                writer.add_pair(image_id, number, f"a caption of picture {image_id}", "en")
                number += 1
        writer.finish()
    return folder


def boxes_recipe(place: Path, folder: Path, *, stage: dict[str, Any] | None = None, **changes: Any) -> Recipe:
    """A short stage on the stores `place`/boxes and `place`/held, the model judged by `place`/valid too."""
    steps = {"steps": 6, "batch_size": 8, "learning_rate": 1e-3, "warmup_steps": 1, "validate_every": 3}
    image = {"kind": "vit", "hidden": 32, "layers": 2, "heads": 2, "patch": 8, "image_size": 32}
    text = {"hidden": 32, "layers": 2, "heads": 2, "vocabulary": 21128, "dropout": 0.0}
    ground = {"kind": "ground", "ground": {"boxes": str(place / "boxes"), "negatives": 3}, "train": "both"}
    return Recipe.model_validate(
        {
            "model": {"start": {"image": image, "text": text, "projection": 16}},
            "data": {
                "train": str(place / "train"),
                "valid": {"pairs": str(place / "valid"), "held": {"boxes": str(place / "held")}},
                "workers": 0,
            },
            "output": str(folder),
            "feature_cache": str(folder / "cache"),
            "log_every": 1,
            "stages": {"boxes": {**ground, **steps, **(stage or {})}},
            **changes,
        }
    )
