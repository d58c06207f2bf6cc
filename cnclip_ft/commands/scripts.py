"""`cnclip-ft scripts`: the shell scripts of the project, also where it was installed from a wheel."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from data_tools.tables import say

# In a wheel they lie in the package (setup.py), in a checkout beside it.
_PLACES = (Path(__file__).parents[1] / "run_scripts", Path(__file__).parents[2] / "run_scripts")
_FOR_BUILDERS = {"docs.sh", "lint.sh", "test.sh"}


def scripts(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where they go; made where it is not there.")],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the project's scripts that are there.")
    ] = False,
) -> None:
    """Write the shell scripts: fine-tuning on all GPUs, the three public sets, evaluation, export.

    Example: cnclip-ft scripts run_scripts
    """
    from data_tools.atomic import whole_file
    from data_tools.errors import RequestError
    from data_tools.outputs import holds, refuse_foreign_file

    found = next(place for place in _PLACES if place.is_dir())
    files = sorted(file for file in found.iterdir() if file.is_file() and file.name not in _FOR_BUILDERS)
    if folder.exists() and not folder.is_dir():
        raise RequestError(f"{folder} is a file; name a folder")
    there = [file.name for file in files if (folder / file.name).exists()]
    if there and not overwrite:
        raise RequestError(f"{folder} has {', '.join(there)} already; choose another folder, or add --overwrite")
    for file in files:
        refuse_foreign_file(folder / file.name, holds(b"cnclip"), "a script of this project")
    for file in files:
        target = folder / file.name
        with whole_file(target) as written:
            written.write(file.read_bytes())
        if file.suffix == ".sh":
            rights = target.stat().st_mode
            target.chmod(rights | (rights & 0o444) >> 2)  # who may read it may run it
    say(f"{folder}: {', '.join(file.name for file in files)}")
