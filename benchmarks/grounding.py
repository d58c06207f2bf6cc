"""Where phrases are, without training: how often it is right, and what it costs.

    cnclip-ft data demo demo/data --train 6000 --boxes        # what run_scripts/quickstart.sh draws, with boxes
    python benchmarks/grounding.py free --checkpoint demo/run/contrast/best --boxes demo/data/phrases/valid --image-size 96
    cnclip-ft data import boxes $CNCLIP_FT_REAL_DATA/boxes/boxes.jsonl --images $CNCLIP_FT_REAL_DATA/boxes --output photos
    python benchmarks/grounding.py free --checkpoint runs/flickr8k-cn/contrast/best --trust-import --boxes photos --bound 0
    python benchmarks/grounding.py time [--size ViT-B-16] [--repeats 15]

`free`: pointing accuracy and recall of boxes, of every method and threshold, beside chance and the picture's middle: on drawn scenes whose
combinations of colour and shape were never trained, or on photos (120 of COCO, class names in Chinese and English), where it is stated
as it is. Bound: the pointing accuracy of the default method is at least twice chance.

`time`: a heat map of one picture and one phrase against encoding the picture, both from decoded pixels, in turns; the phrase's feature
is at hand, and what encoding it takes stands beside. Bound: 1.15.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

THRESHOLDS = (0.4, 0.5, 0.6, 0.7)


def scored(given: argparse.Namespace, store: Path) -> float:
    """Print a line a method and threshold; gives the default's pointing accuracy over chance."""
    from cnclip_ft.evaluation.grounding.judging import score_grounding
    from cnclip_ft.evaluation.options import Options
    from cnclip_ft.grounding.finder import How
    from cnclip_ft.models.checkpoints import load
    from data_tools.tables import table

    methods = load(given.checkpoint, trust_import=given.trust_import).image_tower.patch_methods
    options, rows, share = Options(trust_import=given.trust_import, image_size=given.image_size), [], 0.0
    for method in methods:
        for threshold in THRESHOLDS:
            card = score_grounding(given.checkpoint, [store], options, method, threshold)
            (groups,) = card.scores.values()
            for group, found in groups.items():
                if group in ("all", "zh", "en") and (group == "all" or threshold == How().threshold):
                    figures = (
                        found.pointing,
                        found.chance,
                        found.centre,
                        found.any_box[1],
                        found.any_bound,
                        found.merged_box[1],
                    )
                    rows.append(
                        [method, f"{threshold:g}", group, *(f"{one:.1f}" for one in figures), f"{found.phrases:,}"]
                    )
            if method == (How().method or _default(methods)) and threshold == How().threshold:
                share = groups["all"].pointing / groups["all"].chance
    heads = [
        "method",
        "threshold",
        "phrases",
        "pointing",
        "chance",
        "centre",
        "any-box R@1",
        "bound",
        "merged R@1",
        "count",
    ]
    print(table(heads, rows, text=(0, 2)))
    return share


def _default(methods: tuple[str, ...]) -> str:
    from cnclip_ft.grounding.finder import DEFAULT_METHOD

    return DEFAULT_METHOD if DEFAULT_METHOD in methods else methods[0]


def free(given: argparse.Namespace) -> bool:
    share = scored(given, given.boxes)
    print(f"default method: pointing accuracy {share:.2f} × chance (bound {given.bound:g})")
    return share >= given.bound


def timed(given: argparse.Namespace) -> bool:
    import torch

    from cnclip_ft.grounding.heat import heats
    from cnclip_ft.models.families.chinese_clip.catalog import available_models
    from cnclip_ft.models.start import build_start

    spec = {"architecture": given.size} if given.size in (*available_models(), "tiny") else given.size
    model = build_start(spec)[0].eval()
    pixels = model.image_tower.example(1).random_(256)
    (phrase,) = model.encode_texts("一把红色的伞")
    methods = model.image_tower.patch_methods
    part = model.image_tower.preprocessing.part(640, 480)

    def heat(method: str) -> None:
        found = model.patch_features(pixels, method)
        rows, columns = found.grid[0].tolist()
        (one,) = heats(found.features[0, : rows * columns], rows, columns, phrase[None], part, found.seen)
        one.regions(0.5)

    tasks = {"encoding": lambda: model.image_features(pixels), "the phrase": lambda: model.encode_texts("一把红色的伞")}
    tasks |= {method: (lambda method=method: heat(method)) for method in methods}
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    with torch.inference_mode():
        for repeat in range(given.repeats + 2):
            for name, task in tasks.items():
                began = time.perf_counter()
                task()
                if repeat >= 2:  # the first ones warm up
                    seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(some) for name, some in seconds.items()}
    for name, median in medians.items():
        ratio = median / medians["encoding"]
        print(f"{name:12} {median * 1e3:8.1f} ms  {ratio:5.2f} × encoding")
    default = medians[_default(methods)] / medians["encoding"]
    print(f"default method: a heat map takes {default:.2f} × the time of encoding the picture (bound 1.15)")
    return default <= 1.15


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(required=True)
    part = parts.add_parser("free")
    part.add_argument("--checkpoint", required=True)
    part.add_argument("--boxes", type=Path, required=True, help="a store whose pairs have boxes")
    part.add_argument("--trust-import", action="store_true")
    part.add_argument("--image-size", type=int, help="another than the checkpoint's: finer maps")
    part.add_argument("--bound", type=float, default=2)
    part.set_defaults(run=free)
    part = parts.add_parser("time")
    part.add_argument("--size", default="ViT-B-16")
    part.add_argument("--repeats", type=int, default=15)
    part.set_defaults(run=timed)
    given = parser.parse_args()
    sys.exit(0 if given.run(given) else 1)


if __name__ == "__main__":
    main()
