"""Training for the benchmarks: a run that is done is not run again, one that was stopped goes on."""

from __future__ import annotations

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
