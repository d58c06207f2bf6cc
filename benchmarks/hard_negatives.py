"""What hard negatives bring on drawn scenes: captions told from themselves with one attribute swapped, and recall.

    python benchmarks/hard_negatives.py [--steps 1100] [--negatives '{count: 2, weight: 1, swap: [number, position, object]}'] [--seeds 0 1 2] [--output runs/hard-negatives]

6,400 scenes as `cnclip-ft data demo` draws them; the towers and stages of the recipe `demo`. Its first stage is trained once (`--start-steps`); from there
the second trains twice, for equally many steps in the same order, without and with hard negatives; their recall is compared as `cnclip-ft compare` does. Validation
shows combinations of colour and shape that training never shows. Every run has a folder; one that is done is not run again, one that was stopped goes on. Figures do not depend on how
fast the machine is.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.resumable import trained  # noqa: E402


def best_of(folder: Path, recipe: dict[str, Any]) -> Path:
    """The best checkpoint of the run's last stage."""
    return trained(folder, recipe) / list(recipe["stages"])[-1] / "best"


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
    parser.add_argument(
        "--negatives",
        type=yaml.safe_load,
        default={"count": 2, "weight": 1.0, "swap": ["number", "position", "object"]},
    )
    parser.add_argument("--scenes", type=int, nargs=2, default=(6000, 400), help="to train with, to judge by")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--output", type=Path, default=Path("runs/hard-negatives"))
    given = parser.parse_args()

    stores = given.output / "data"
    if not (stores / "valid").exists():
        draw_demo(stores, train=given.scenes[0], valid=given.scenes[1], overwrite=True)
    recipe = yaml.safe_load(find_recipe("demo").read_text("utf-8"))
    recipe["data"] |= {"train": str(stores / "train"), "valid": str(stores / "valid")}
    align, contrast = recipe["stages"].values()
    first = given.start_steps
    said = json.dumps(given.negatives, sort_keys=True).translate({ord(c): None for c in '{}[]" '})
    rows, gains = [], []
    for seed in given.seeds:
        alike = recipe | {"seed": seed}
        stages = {"align": stage(align, first)}
        start = best_of(given.output / f"start-{first}-{seed}", alike | {"stages": stages})
        best, told = {}, {}
        for label, negatives in (("without", None), ("with", given.negatives)):
            words = [label, str(first), str(given.steps), str(seed)]
            words += [said.replace(":", "-").replace(",", "_")] if negatives else []
            stages = {"contrast": stage(contrast, given.steps, negatives=negatives)}
            best[label] = best_of(
                given.output / "-".join(words), alike | {"model": {"start": str(start)}, "stages": stages}
            )
            card = evaluate(best[label], stores / "valid", dataset="none", swapped=True)
            twins, recall = card.twins["valid"], card.scores["valid"].mean_recall or 0.0
            told[label] = twins.accuracy or 0.0, recall
            for language in (None, *twins.languages):
                cells = [f"{twins.of(kind, language)[0] or 0:.1f}" for kind in (*KINDS, None)]
                name = f"  {language}" if language else f"seed {seed}, {label}"
                rows.append([name, *cells, "" if language else f"{recall:.1f}"])
        gains.append([after - before for before, after in zip(*told.values(), strict=True)])
        command = [
            sys.executable,
            "-m",
            "cnclip_ft",
            "compare",
            *map(str, best.values()),
            "--split",
            str(stores / "valid"),
        ]
        subprocess.run(command, check=True, cwd=ROOT)
    rows.append(["chance", *["50.0"] * 5, ""])
    print(table([f"{given.steps} steps, {said}", *KINDS, "all", "mean recall"], rows))
    for name, each in zip(("twins", "mean recall"), zip(*gains, strict=True), strict=True):
        error = f" ± {stdev(each) / len(each) ** 0.5:.1f}" if len(each) > 1 else ""
        print(f"{name}: {', '.join(f'{gain:+.1f}' for gain in each)}; mean {mean(each):+.1f}{error}")


if __name__ == "__main__":
    main()
