"""A small store and a tiny recipe, shared by the tests of the training room."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from cnclip_ft.models.dual_encoder import DualEncoder
from cnclip_ft.models.start import build_start
from cnclip_ft.recipe import Recipe
from cnclip_ft.training.context import Context, make_context
from cnclip_ft.training.stage_plan import StagePlan, plan_stages
from cnclip_ft.training.stop import StopRequest
from cnclip_ft.training.trainer import Trainer
from data_tools.store import StoreWriter

WORDS = "红黄蓝绿黑白大小圆方三角星月山水火木金土猫狗鸟鱼马牛羊"


def write_store(folder: Path, images: int, captions: int, seed: int) -> Path:
    """A store of small noise pictures, `captions` texts each (some Chinese, some English)."""
    random = np.random.default_rng(seed)
    with StoreWriter(folder) as writer:
        for image_id in range(images):
            file = io.BytesIO()
            Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((40, 32)).save(file, "PNG")
            writer.add_image(image_id, file.getvalue())
        for number in range(images * captions):
            text = "".join(random.choice(list(WORDS), random.integers(3, 12)))
            writer.add_pair(
                number % images, number, text if number % 2 else f"{text} dog {number}", "zh" if number % 2 else "mixed"
            )
        writer.finish()
    return folder


def write_stores(folder: Path) -> Path:
    """Twenty pictures to train with and ten to judge by: `folder`/train and `folder`/valid."""
    write_store(folder / "train", images=20, captions=2, seed=0)
    write_store(folder / "valid", images=10, captions=2, seed=1)
    return folder


def write_several(folder: Path) -> Path:
    """Twelve pictures of four captions each to train with, ten to judge by."""
    write_store(folder / "train", images=12, captions=4, seed=0)
    write_store(folder / "valid", images=10, captions=2, seed=1)
    return folder


def tiny_recipe(folder: Path, **changes) -> Recipe:
    """Two short stages on the stores `folder`/train and `folder`/valid; `changes` per stage: align={…}, contrast={…}."""
    stage = {"steps": 6, "batch_size": 8, "learning_rate": 1e-3, "warmup_steps": 1, "validate_every": 3}
    content = {
        "model": {"start": {"architecture": "tiny"}},
        "data": {"train": str(folder / "train"), "valid": str(folder / "valid"), "workers": 0},
        "stages": {
            "align": {"train": "text", **stage, **changes.pop("align", {})},
            "contrast": {"train": "both", **stage, **changes.pop("contrast", {})},
        },
        "output": str(folder / "run"),
        "log_every": 1,
        **changes,
    }
    return Recipe.model_validate(content)


def one_stage(place: Path, folder: Path, stage: dict[str, Any], **changes) -> Recipe:
    """Six steps of both towers on `place`/train, judged twice by `place`/valid; `stage` says what else the stage does."""
    steps = {
        "steps": 6,
        "batch_size": 8,
        "learning_rate": 1e-3,
        "warmup_steps": 1,
        "validate_every": 3,
        "train": "both",
    }
    data = {"train": str(place / "train"), "valid": str(place / "valid"), "workers": 0}
    return Recipe.model_validate(
        {
            "data": data, "output": str(folder), "feature_cache": str(folder / "cache"), "log_every": 1,
            "stages": {"learn": steps | stage}, **changes,
        }
    )  # fmt: skip


def planned(recipe: Recipe) -> tuple[Context, DualEncoder, list[StagePlan]]:
    """A run before its first step; nothing is written."""
    context, model = make_context(recipe, write=False)
    return context, model, plan_stages(context, model)


def prepared(recipe: Recipe, number: int = 1) -> Trainer:
    """The stage of this number ready for its first step; nothing was judged."""
    context, model, plans = planned(recipe)
    return Trainer(context, plans[number], model)


def stopped_after(*places: tuple[str, int]) -> dict[str, Any]:
    """Arguments of `train` with which it is asked to stop when a step of these (stage, step) is done, once each."""
    stop, left = StopRequest(), set(places)

    def ask(trainer: Trainer) -> None:
        place = (trainer.plan.name, trainer.step + 1)
        if place in left:
            left.remove(place)
            stop.ask()

    return {"stop": stop, "before_step": ask}


def records(folder: Path, kind: str = "train") -> list[dict]:
    """Lines of a run's journal."""
    lines = [json.loads(line) for line in (folder / "journal.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line["kind"] == kind]


def losses(folder: Path) -> dict[tuple[str, int], float]:
    """(stage, step) → loss of a run; a step that was done twice has its last."""
    return {(r["stage"], r["step"]): r["loss"] for r in records(folder)}


def tiny_model(dropout: float = 0.1, seed: int = 0, **parts) -> DualEncoder:
    spec = {
        "image": {"kind": "vit", "hidden": 32, "layers": 2, "heads": 2, "patch": 8, "image_size": 32},
        "text": {"hidden": 32, "layers": 2, "heads": 2, "vocabulary": 21128, "dropout": dropout},
        "projection": 16,
    }
    return build_start(spec | parts, seed=seed)[0]


def random_batch(model: DualEncoder, size: int, seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 12, (size,), generator=generator).sort(descending=True).values
    ids = torch.randint(1000, 9000, (size, 12), generator=generator)
    mask = (torch.arange(12) < lengths[:, None]).long()
    side = model.image_size
    return {
        "pixels": torch.randint(0, 256, (size, 3, side, side), dtype=torch.uint8, generator=generator),
        "input_ids": ids * mask, "attention_mask": mask,
        "image_keys": torch.arange(size) // 2, "text_keys": torch.arange(size), "faults": [],
    }  # fmt: skip
