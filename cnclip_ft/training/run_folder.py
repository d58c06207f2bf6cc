"""The run folder: one run at a time, known by its content, and cleared of nothing but what a run writes."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Container, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from cnclip_ft.recipe import Recipe, dump_recipe
from data_tools.atomic import whole_file
from data_tools.errors import RequestError
from data_tools.lock import FileLock
from data_tools.outputs import json_with, refuse_foreign_file, refuse_overlap

DONE = "recall.json"  # in the report; written last
LOCK, RECIPE, JOURNAL, STATES, REPORT, BOARD = (
    "cnclip-ft.lock",
    "recipe.yaml",
    "journal.jsonl",
    "state",
    "report",
    "tensorboard",
)
_CHECKPOINTS = ("best", "last", "start")
EPOCH = "epoch-"  # and its number: a checkpoint that `keep_every` asked for
_KEPT = {name + end for name in _CHECKPOINTS for end in ("", ".old", ".writing")}
_OURS = re.compile(
    r"cnclip-ft\.lock|recipe\.yaml|journal\.jsonl|state/state-\d+\.pt|report/(recall\.txt|recall\.json|index\.html)|"
    r"tensorboard/events\.out\.tfevents\.[^/]*|([^/]+/)?\.cnclip-ft-[0-9a-f]+\.writing|"
    r"[^/]+/(best|last|start|epoch-\d+)(\.old|\.writing)?/"
    r"(model\.safetensors|config\.json|preprocessor_config\.json|cnclip_ft\.json|tokenizer\w*\.json|vocab\.(txt|json)|merges\.txt|special_tokens_map\.json)"
)


_SPELT_OUT = {"model", "data", "stages", "output", "seed", "precision", "best_by", "log_every", "report_to"}


def is_run(folder: Path) -> bool:
    """Whether the folder's ``recipe.yaml`` is one that a run wrote: with every setting spelt out, and no word of the user's."""
    return _recipe_of(folder) is not None


def _recipe_of(folder: Path) -> dict[str, Any] | None:
    try:
        text = (folder / RECIPE).read_text(encoding="utf-8")
        content = yaml.safe_load(text)
        if not isinstance(content, dict) or not _SPELT_OUT <= content.keys() or not isinstance(content["stages"], dict):
            return None
        as_written = text == yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return None
    return content if as_written or (folder / JOURNAL).is_file() or (folder / STATES).is_dir() else None


def _is_ours(name: str, stages: Container[str]) -> bool:
    """Whether a run with these stages writes a file of this name; `name` is a path in its folder."""
    first, _, rest = name.partition("/")
    kept = rest.partition("/")[0]
    return bool(_OURS.fullmatch(name)) and (first in stages or (kept not in _KEPT and not kept.startswith(EPOCH)))


def run_of(recipe_file: Path) -> Path | None:
    """The run a recipe lies in: the folder that goes on, wherever it was moved to."""
    folder = recipe_file.parent
    inside = recipe_file.name == RECIPE and is_run(folder) and ((folder / STATES).is_dir() or results(folder))
    return folder if inside else None


def results(folder: Path) -> list[Path]:
    """What a run has made that would be missed: states, checkpoints, a report."""
    return [
        *folder.glob(f"{STATES}/state-*.pt"), *folder.glob("*/best/cnclip_ft.json"), *folder.glob("*/last/cnclip_ft.json"),
        *folder.glob(f"{REPORT}/recall.json"),
    ]  # fmt: skip


def check_place(recipe: Recipe) -> None:
    """Refuse a run folder that is, holds or lies in what the run reads.

    Raises:
        RequestError: naming both.
    """
    guard = recipe.data.guard
    refuse_overlap(
        recipe.output,
        [
            *recipe.data.train_places(),
            *recipe.data.valid_places(),
            *([guard.split] if guard and guard.split else []),
            *_paths(recipe.model.start),
            *(
                place
                for stage in recipe.stages.values()
                if stage.teach
                for place in (stage.teach.teacher, stage.teach.texts)
            ),
            *(stage.distill.teacher for stage in recipe.stages.values() if stage.distill),
        ],
    )


def _paths(start: Any) -> Iterator[str]:
    if isinstance(start, str):
        yield start
    elif isinstance(start, dict):
        for key in ("image", "text", "path"):
            yield from _paths(start.get(key))


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Inside this context the folder is this process's; a folder that then holds nothing is gone again.

    Raises:
        RequestError: another process trains there, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        refuse_foreign_file(folder / LOCK, json_with("pid", "host"), "the lock of a run")
        lock = FileLock(folder / LOCK, "training in this folder")
        writable = os.access(folder, os.W_OK)
    except OSError as error:
        raise RequestError(
            f"output: {folder} cannot be written ({error.strerror}). Choose another with output=FOLDER."
        ) from None
    try:
        if not writable:
            raise RequestError(f"output: {folder} cannot be written. Choose another with output=FOLDER.")
        yield
    finally:
        if os.name != "posix":
            lock.release()  # Windows removes no open file
        with suppress(OSError):
            (folder / LOCK).unlink()
        lock.release()
        with suppress(OSError):
            folder.rmdir()


def refuse_taken(folder: Path, recipe: Recipe, *, overwrite: bool) -> None:
    """Refuse to begin where a run left something, or where something else has the names a run needs.

    A run that left neither state nor checkpoint does not stand in the way.

    Raises:
        RequestError: with the ways out.
    """
    before = _recipe_of(folder)
    if before is not None:
        if results(folder) and not overwrite:
            raise RequestError(
                f"{folder} holds a run already. Continue it with --continue, replace it with --overwrite, "
                "or choose another folder with output=FOLDER."
            )
        needed = [Path(stage, kept) for stage in recipe.stages for kept in _CHECKPOINTS]
    else:
        needed = [Path(name) for name in (RECIPE, JOURNAL, STATES, REPORT, BOARD, *recipe.stages)]
    for place in needed:
        foreign = _foreign(folder / place, place.as_posix(), None if before is None else before["stages"])
        if foreign:
            raise RequestError(
                f"{folder / foreign} is there already, and no run of cnclip-ft wrote it. It is not overwritten: move it away, "
                "or choose another folder with output=FOLDER."
            )
    for name in (STATES, *recipe.stages):
        if (folder / name).is_symlink() and overwrite:
            raise RequestError(
                f"{folder / name} is a link, and --overwrite removes nothing behind links; remove it first"
            )


def _foreign(path: Path, name: str, stages: Container[str] | None) -> str | None:
    """The first file at or under `path` that is not of a run with these stages; every file where no run is known."""
    if path.is_symlink() or path.is_file():
        return None if stages is not None and _is_ours(name, stages) else name
    for above, _, files in os.walk(path):
        for file in files:
            inside = f"{name}/{Path(above, file).relative_to(path).as_posix()}"
            if stages is None or not _is_ours(inside, stages):
                return inside
    return None


def begin(folder: Path, recipe: Recipe) -> None:
    """Clear what an earlier run left, and write ``recipe.yaml``: from here on a run is in the folder."""
    before = _recipe_of(folder)
    if before is not None:
        for above, _, files in os.walk(folder, topdown=False):
            for path in (Path(above, file) for file in files):
                ours = _is_ours(path.relative_to(folder).as_posix(), before["stages"])
                if ours and path.name != LOCK and not path.is_symlink():
                    path.unlink()
            if Path(above) != folder:
                with suppress(OSError):
                    os.rmdir(above)  # what is not of a run stays
    write_recipe(folder, recipe)


def write_recipe(folder: Path, recipe: Recipe) -> None:
    """``recipe.yaml``, as it is from now on: the line to continue with names nothing else."""
    with whole_file(
        folder / RECIPE, "w", advice="Free some space, or choose another folder with output=FOLDER."
    ) as file:
        file.write(dump_recipe(recipe))


def is_finished(folder: Path) -> bool:
    return (folder / REPORT / DONE).is_file()


def refuse_finished(folder: Path, recipe: Recipe) -> None:
    """Refuse to go on with a run that is done and is to be no longer.

    Raises:
        RequestError: with the line to type.
    """
    if is_finished(folder):
        name, stage = list(recipe.stages.items())[-1]
        key, now = ("epochs", stage.epochs) if stage.steps is None else ("steps", stage.steps)
        raise RequestError(
            f"{folder}: the run there is finished. Train it further with more {key} of its last stage (now {now:g}): "
            f"cnclip-ft train {shlex.quote(str(folder / RECIPE))} --continue stages.{name}.{key}={2 * (now or 1):g}"
        )


def nothing_to_continue(folder: Path) -> RequestError:
    """There is no state to continue from: why, and what to do."""
    if is_finished(folder):
        way = f" The run there is finished, and its state is gone. Train its weights further with model.start={folder}/STAGE/best output=FOLDER."
    elif not is_run(folder):
        way = " No run is there. If it was moved, name its recipe: cnclip-ft train PLACE/recipe.yaml --continue."
    elif any(path.name == "cnclip_ft.json" for path in results(folder)):
        kept = ", ".join(sorted({str(path.parent) for path in results(folder) if path.name == "cnclip_ft.json"}))
        way = f" Its checkpoints are {kept}: give model.start=CHECKPOINT output=FOLDER, without --continue."
    else:
        way = " It ended before its first state, so nothing is lost: give the command again without --continue."
    return RequestError(f"{folder}: no state to continue from.{way}")
