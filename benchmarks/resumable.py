"""Training for the benchmarks: a run that is done is not run again, one that was stopped goes on; what its journal says it reached."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def trained(folder: Path, settings: Mapping[str, Any]) -> Path:
    """Train what `settings` (a recipe without its output) say into `folder`, which is returned; code that they name is run."""
    from cnclip_ft.calls import read_recipe
    from cnclip_ft.training.run import train
    from cnclip_ft.training.run_folder import is_finished
    from cnclip_ft.training.run_state import newest_state

    recipe = read_recipe({**settings, "output": str(folder)})
    if not is_finished(folder):
        proceed = newest_state(folder / "state") is not None
        if not train(recipe, proceed=proceed, overwrite=not proceed, trust_import=True):
            sys.exit(f"stopped; the same command goes on with {folder}")
    return folder


def reached(folder: Path) -> dict[str, float]:
    """Mean recall by what it is of: `start`, every stage's best own weights, and the `end`, the best of all, mixtures of weights included."""
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
    return found
