"""What hard negatives bring on drawn scenes: captions told from themselves with one attribute swapped, and recall.

    python benchmarks/hard_negatives.py [--steps 1100] [--negatives '{count: 2, weight: 1}'] [--output runs/hard-negatives]

6,400 scenes as `cnclip-ft data demo` draws them; the recipe `demo`. Its first stage is trained once; its second from there twice, for equally many
steps in the same order, without and with hard negatives. Validation shows combinations of colour and shape that training never shows. Every run
has a folder; one that is done is not run again, one that was stopped goes on. Figures do not depend on how fast the machine is.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

TRAIN, VALID = 6000, 400


def trained(place: Path, name: str, recipe: dict[str, Any]) -> Path:
    """The best checkpoint of the run's only stage."""
    from cnclip_ft.calls import train
    from cnclip_ft.training.run_folder import is_finished
    from cnclip_ft.training.run_state import newest_state

    folder = place / name
    (stage,) = recipe["stages"]
    if not is_finished(folder):
        proceed = newest_state(folder) is not None
        if train(recipe | {"output": str(folder)}, proceed=proceed, overwrite=not proceed) is None:
            raise SystemExit("stopped; the same line goes on")
    return folder / stage / "best"


def main() -> None:
    from cnclip_ft.calls import evaluate
    from cnclip_ft.recipe_files import find_recipe
    from data_tools.negatives import KINDS
    from data_tools.scenes import draw_demo
    from data_tools.tables import table

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1100)
    parser.add_argument("--first-steps", type=int, default=120, help="of the first stage")
    parser.add_argument("--negatives", type=yaml.safe_load, default={"count": 2, "weight": 1.0})
    parser.add_argument("--scenes", type=int, nargs=2, default=(TRAIN, VALID))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/hard-negatives"))
    given = parser.parse_args()

    stores = given.output / "data"
    if not (stores / "valid").exists():
        draw_demo(stores, train=given.scenes[0], valid=given.scenes[1], overwrite=True)
    recipe = yaml.safe_load(find_recipe("demo").read_text("utf-8"))
    recipe["data"] |= {"train": str(stores / "train"), "valid": str(stores / "valid")}
    recipe |= {"seed": given.seed}
    align = recipe["stages"]["align"] | {"steps": given.first_steps, "warmup_steps": min(30, given.first_steps // 4)}
    contrast = recipe["stages"]["contrast"] | {
        "steps": given.steps, "warmup_steps": min(60, given.steps // 4), "validate_every": given.steps // 2
    }  # fmt: skip
    start = trained(given.output, f"align-{given.first_steps}", recipe | {"stages": {"align": align}})
    said = (
        json.dumps(given.negatives, sort_keys=True)
        .translate({ord(c): None for c in '{}" '})
        .replace(":", "-")
        .replace(",", "_")
    )
    rows, found = [], {}
    for label, negatives in (("without", None), ("with", given.negatives)):
        name = f"{label}-{given.steps}" + (f"-{said}" if negatives else "")
        own = recipe | {"model": {"start": str(start)}, "stages": {"contrast": contrast | {"negatives": negatives}}}
        card = evaluate(trained(given.output, name, own), stores / "valid", dataset="none", swapped=True)
        twins, recall = card.twins["valid"], card.scores["valid"].mean_recall
        found[label] = twins, recall
        for language in (None, *twins.languages):
            cells = [f"{twins.of(kind, language)[0] or 0:.1f}" for kind in (*KINDS, None)]
            rows.append(
                [label if language is None else f"  {language}", *cells, f"{recall:.1f}" if language is None else ""]
            )
    rows.append(["chance", *["50.0"] * 5, ""])
    print(table([f"{given.steps} steps, {said}", *KINDS, "all", "mean recall"], rows))
    (before, recall_before), (after, recall_after) = found["without"], found["with"]
    print(
        f"twins {before.accuracy:.1f} → {after.accuracy:.1f} ({after.accuracy - before.accuracy:+.1f}) of {after.of()[1]:,}, "
        f"mean recall {recall_before:.1f} → {recall_after:.1f} ({recall_after - recall_before:+.1f})"
    )


if __name__ == "__main__":
    main()
