"""Learnt boxes on drawn scenes, on the CPU: how well a model finds the objects of held-out combinations of colour and shape, and what retrieval loses.

    python benchmarks/learnt_boxes.py CHECKPOINT --output FOLDER                  # learnt: from the quickstart's model, all labels
    python benchmarks/learnt_boxes.py CHECKPOINT --output FOLDER --part selftrained

`learnt` trains the recipe `demo_boxes`: one stage of kind `ground`, on the phrases of the drawn scenes. `selftrained` trains it on half of the scenes, lets it write boxes for the phrases
of the other half, trains another stage on both, and compares with `learnt`, which has to be there. CHECKPOINT is ``demo/run/contrast/best`` of
``run_scripts/quickstart.sh``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from cnclip_ft.evaluation.grounding.box_writing import write_boxes
from cnclip_ft.evaluation.options import Options, open_model
from cnclip_ft.models.checkpoints import read_info
from cnclip_ft.recipe import Recipe, dump_recipe
from cnclip_ft.recipe_files import load_recipe
from data_tools.scenes import draw_demo
from data_tools.store import PairStore, StoreWriter, open_store


def recipe(given: argparse.Namespace, boxes: Path, output: Path) -> Recipe:
    """The shipped one with the settings that were given."""
    data, stage = given.output / "data", "stages.boxes"
    settings: dict[str, Any] = {
        "model.start": given.checkpoint,
        "model.image_size": given.image_size,
        "data.train": data / "train",
        "data.valid.pairs": data / "valid",
        "data.valid.boxes.boxes": data / "phrases" / "valid",
        f"{stage}.ground.boxes": boxes,
        f"{stage}.ground.stay": given.stay,
        f"{stage}.steps": given.steps,
        f"{stage}.validate_every": max(given.steps // 6, 1),
        f"{stage}.batch_size": given.batch_size,
        f"{stage}.learning_rate": given.rate,
        "output": output,
    }
    return load_recipe("demo_boxes", [f"{key}={value}" for key, value in settings.items()])


def half(store: PairStore, first: bool, target: Path) -> Path:
    """The first or second half of the pictures, with their phrases and boxes; of the second the phrases alone."""
    ids = store.image_ids[: len(store.image_ids) // 2] if first else store.image_ids[len(store.image_ids) // 2 :]
    with StoreWriter(target) as writer:
        for image_id in ids:
            writer.add_image(image_id, store.image(image_id))
        kept = set(ids)
        for pair, beside in store.pairs_and_beside():
            if pair.image_id in kept:
                writer.add_pair(pair.image_id, pair.text_id, pair.text, pair.language, beside if first else None)
        writer.finish()
    return target


def joined(one: PairStore, other: PairStore, target: Path) -> Path:
    with StoreWriter(target) as writer:
        for store in (one, other):
            for image_id in store.image_ids:
                writer.add_image(image_id, store.image(image_id))
        for number, store in enumerate((one, other)):
            for pair, beside in store.pairs_and_beside():
                writer.add_pair(pair.image_id, f"{number}/{pair.text_id}", pair.text, pair.language, beside)
        writer.finish()
    return target


def trained(given: argparse.Namespace, boxes: Path, name: str) -> dict[str, float]:
    """Scores of the best weights, in percent, what of mean recall was there before, and seconds, start and validations among them."""
    output, file = given.output / name, given.output / f"{name}.yaml"
    file.write_text(dump_recipe(recipe(given, boxes, output)), encoding="utf-8")
    devices = ["--standalone", "--nproc_per_node", str(given.processes)]
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *devices, "-m", "cnclip_ft", "train", str(file), "--overwrite"],
        env=os.environ | {"OMP_NUM_THREADS": str(given.threads)},
        check=True,
    )
    seconds = time.perf_counter() - began
    scores = read_info(output / "boxes" / "best")["scores"]
    asked = read_info(given.checkpoint)["scores"]  # at its own size of pictures, before anything
    return {
        **scores["boxes"],
        "mean_recall": scores["pairs"]["mean_recall"],
        "mean_recall_before": next(iter(asked.values()))["mean_recall"],
        "seconds": round(seconds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--part", choices=("learnt", "selftrained"), default="learnt")
    parser.add_argument("--scenes", type=int, default=6000)
    parser.add_argument("--valid", type=int, default=400)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--image-size", type=int, default=96)
    parser.add_argument("--rate", type=float, default=8e-4)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="of a process; batches are small")
    parser.add_argument("--stay", type=float, default=30.0)
    parser.add_argument("--threshold", type=float, default=0.3)
    given = parser.parse_args()
    data = given.output / "data"
    if not (data / "phrases" / "valid").is_dir():
        draw_demo(data, train=given.scenes, valid=given.valid, boxes=True, overwrite=True)
    phrases = data / "phrases" / "train"
    if given.part == "learnt":
        found = trained(given, phrases, "learnt")
        (given.output / "learnt.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        print(json.dumps(found, indent=2))
        return
    whole = json.loads((given.output / "learnt.json").read_text(encoding="utf-8"))
    store = open_store(phrases)
    labelled = half(store, True, given.output / "labelled")
    plain = half(store, False, given.output / "plain")
    found = {"all labels": whole, "half": trained(given, labelled, "half")}
    teacher = given.output / "half" / "boxes" / "best"
    written = write_boxes(
        open_model(teacher, Options(device="cpu")),
        plain,
        given.output / "found",
        threshold=given.threshold,
        overwrite=True,
    )
    both = joined(open_store(labelled), open_store(given.output / "found"), given.output / "both")
    found["self-trained"] = trained(given, both, "both")
    found["kept"] = {"share of phrases": 100 * written.kept / written.asked, "boxes": written.boxes}
    for score in ("any_box_r1", "merged_box_r1", "pointing"):
        found["self-trained"][f"{score} of all labels"] = 100 * found["self-trained"][score] / max(whole[score], 1e-9)
    (given.output / "selftrained.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
