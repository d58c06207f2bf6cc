"""What hard negatives bring on drawn scenes: captions told from themselves with one attribute swapped, and recall.

    python benchmarks/hard_negatives.py [--steps 1100] [--negatives '{count: 2, weight: 1}'] [--output runs/hard-negatives]

6,400 scenes as `cnclip-ft data demo` draws them; the towers and stages of the recipe `demo`. Its first stage is trained once (`--start-steps`); from there
the second trains twice, for equally many steps in the same order, without and with hard negatives. Validation shows combinations of colour and shape
that training never shows. Every run has a folder; one that is done is not run again, one that was stopped goes on. Figures do not depend on how
fast the machine is.
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


def trained(folder: Path, recipe: dict[str, Any]) -> Path:
    """The best checkpoint of the run's last stage."""
    from cnclip_ft.calls import train
    from cnclip_ft.training.run_folder import is_finished
    from cnclip_ft.training.run_state import newest_state

    if not is_finished(folder):
        proceed = newest_state(folder) is not None
        if train(recipe | {"output": str(folder)}, proceed=proceed, overwrite=not proceed) is None:
            raise SystemExit("stopped; the same line goes on")
    return folder / list(recipe["stages"])[-1] / "best"


def stage(setting: dict[str, Any], steps: int, **more: Any) -> dict[str, Any]:
    return setting | {"steps": steps, "warmup_steps": min(60, steps // 4), "validate_every": max(steps // 5, 1)} | more


def main() -> None:
    from cnclip_ft.calls import evaluate
    from cnclip_ft.recipe_files import find_recipe
    from data_tools.negatives import KINDS
    from data_tools.scenes import draw_demo
    from data_tools.tables import table

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1100, help="of either side")
    parser.add_argument("--start-steps", type=int, default=120, help="of the stage before")
    parser.add_argument("--negatives", type=yaml.safe_load, default={"count": 2, "weight": 1.0})
    parser.add_argument("--scenes", type=int, nargs=2, default=(6000, 400), help="to train with, to judge by")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/hard-negatives"))
    given = parser.parse_args()

    stores = given.output / "data"
    if not (stores / "valid").exists():
        draw_demo(stores, train=given.scenes[0], valid=given.scenes[1], overwrite=True)
    recipe = yaml.safe_load(find_recipe("demo").read_text("utf-8")) | {"seed": given.seed}
    recipe["data"] |= {"train": str(stores / "train"), "valid": str(stores / "valid")}
    align, contrast = recipe["stages"].values()
    first = given.start_steps
    start = trained(given.output / f"start-{first}", recipe | {"stages": {"align": stage(align, first)}})

    said = json.dumps(given.negatives, sort_keys=True).translate({ord(c): None for c in '{}[]" '})
    rows, found = [], []
    for label, negatives in (("without", None), ("with", given.negatives)):
        folder = given.output / "-".join(
            [
                label,
                str(first),
                str(given.steps),
                *([said.replace(":", "-").replace(",", "_")] if negatives else []),
            ]
        )
        stages = {"contrast": stage(contrast, given.steps, negatives=negatives)}
        best = trained(folder, recipe | {"model": {"start": str(start)}, "stages": stages})
        card = evaluate(best, stores / "valid", dataset="none", swapped=True)
        twins, recall = card.twins["valid"], card.scores["valid"].mean_recall or 0.0
        found.append((twins.accuracy or 0.0, recall))
        for language in (None, *twins.languages):
            cells = [f"{twins.of(kind, language)[0] or 0:.1f}" for kind in (*KINDS, None)]
            rows.append([f"  {language}" if language else label, *cells, "" if language else f"{recall:.1f}"])
    rows.append(["chance", *["50.0"] * 5, ""])
    print(table([f"{given.steps} steps, {said}", *KINDS, "all", "mean recall"], rows))
    (twins_before, recall_before), (twins_after, recall_after) = found
    print(
        f"twins {twins_before:.1f} → {twins_after:.1f} ({twins_after - twins_before:+.1f}), "
        f"mean recall {recall_before:.1f} → {recall_after:.1f} ({recall_after - recall_before:+.1f})"
    )


if __name__ == "__main__":
    main()
