"""What the commands `train`, `evaluate` and `search query` do, as calls: ``cnclip_ft.train``, ``evaluate``, ``search`` (docs/python.md)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cnclip_ft.evaluation.options import Options
from data_tools.arguments import typed
from data_tools.errors import RequestError

if TYPE_CHECKING:
    from cnclip_ft.evaluation.scores.scorecard import Scorecard
    from cnclip_ft.recipe import ModelSection, Recipe
    from cnclip_ft.recipe_data import DataSection
    from cnclip_ft.recipe_facts import Facts
    from cnclip_ft.search.engine.engine import Engine, Found


@typed
def train(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    overrides: Sequence[str] = (),
    *,
    proceed: bool = False,
    overwrite: bool = False,
    strict: bool = False,
    trust_import: bool = False,
    language: str | None = None,
) -> Path | None:
    """Train all stages of a recipe.

    Args:
        recipe: a file, the name of a shipped one, or its content.
        overrides: ``key.path=value`` each, for a file or a name.
        proceed: go on with the run in the output folder, as --continue; a recipe in a run's folder goes on there.
        overwrite, strict, trust_import: as the command's flags.
        language: of the report: zh or en; None: the system's.

    Returns:
        The folder of the last stage's best checkpoint; None where the run was stopped on request and can be continued.

    Raises:
        RequestError: a setting, a place or a combination that cannot work; nothing was written.
        UserError: the work failed; the message says what is saved and how to go on.
    """
    from cnclip_ft.recipe_files import begun_with_rules
    from cnclip_ft.training.run import train as execute
    from cnclip_ft.training.run_folder import run_of

    if proceed and isinstance(recipe, (str, Path)):  # with what was chosen when the run began
        recipe = begun_with_rules(recipe, list(overrides)) or recipe
    settings = read_recipe(recipe, overrides, trust_import)
    moved = None
    if proceed and isinstance(recipe, (str, Path)) and not any(each.startswith("output=") for each in overrides):
        moved = run_of(Path(recipe))
    if moved is not None:  # the folder that the recipe lies in, wherever it was when the run began
        settings = settings.model_copy(update={"output": str(moved)})
    done = execute(
        settings,
        proceed=proceed,
        overwrite=overwrite,
        strict=strict,
        trust_import=trust_import,
        language=language,
    )
    if not done:
        return None
    return max(Path(settings.output).glob("*/best"), key=lambda best: list(settings.stages).index(best.parent.name))


def read_recipe(
    recipe: str | Path | Mapping[str, Any] | Recipe, overrides: Sequence[str] = (), trust_import: bool = False
) -> Recipe:
    """The recipe. One that lies in a checkpoint's or a run's folder came with it: it may name code only where that is allowed.

    Raises:
        RequestError: it cannot be read or run.
    """
    from cnclip_ft.recipe import Recipe
    from cnclip_ft.recipe_files import checked_recipe, find_recipe, load_recipe

    if not isinstance(recipe, (str, Path)):
        if overrides:
            raise RequestError("overrides are for a recipe's file or name; change the content itself")
        return (
            recipe
            if isinstance(recipe, Recipe)
            else checked_recipe(dict(recipe), partial(_look, trust_import=trust_import))
        )
    file = find_recipe(recipe)
    came_along = any((file.parent / mark).exists() for mark in ("cnclip_ft.json", "config.json", "journal.jsonl"))

    def refused(model: ModelSection) -> str:
        if not came_along or trust_import or model.code is None:
            return ""
        return (
            f"a recipe that lies in the folder of a checkpoint or a run, and names code as image tower, {model.code}. Nothing was "
            "imported. If the folder is your own, or you know that code: --trust-import"
        )

    def looked(model: ModelSection, data: DataSection) -> Facts:
        if said := refused(model):  # rules look at the tower, which runs its code
            raise RequestError(said)
        return _look(model, data, trust_import)

    found = load_recipe(recipe, list(overrides), looked)
    if said := refused(found.model):
        raise RequestError(f"{file}: {said}")
    return found


def _look(model: ModelSection, data: DataSection, trust_import: bool) -> Facts:
    from cnclip_ft.training.choosing import look  # late: most recipes have no rules, and it opens stores

    return look(model, data, trust_import=trust_import)


@typed
def evaluate(
    checkpoint: str | Path,
    *splits: str | Path,
    batch_size: int = Options.batch_size,
    workers: int | None = None,
    device: str | None = None,
    dtype: str = Options.dtype,
    image_size: int | None = None,
    memory: str = Options.memory,
    dataset: str | None = None,
    source: str = Options.source,
    trust_import: bool = False,
    by: str | None = None,
    official: str | Path | None = None,
    dimensions: int | None = None,
    swapped: bool = False,
) -> Scorecard:
    """Recall both ways over the whole pool of stores, or of a folder of features that `encode` wrote.

    Args:
        checkpoint: anything `load` reads, or a folder of features, to which no splits are named.
        splits: stores, or the folders of data sets, of which valid and test are judged.
        by: a column the stores keep (a category): every value of it is scored as well, under `by_group`.
        official: a folder for the result files of the official scripts.
        dimensions: keep the first so many numbers of a feature; None: all.
        swapped: ask too whether pictures are nearer to their captions than to these with one attribute swapped: `twins` by the split's name.
        dataset: published rows to show beside: muge, flickr30k-cn, coco-cn, none; None judges by the path.

    Returns:
        `scores` by the split's name, of which each has `mean_recall`, `text_to_image.recall[1]`, …, in percent;
        `table()` is what the command prints, `as_dict()` what it writes as JSON.

    Raises:
        RequestError: checkpoint, split or option cannot be used.
        DataFault: an image or a pair is broken.
    """
    from cnclip_ft.evaluation.scores import scorecard
    from cnclip_ft.features.folder import is_feature_folder

    options = Options(batch_size, workers, device, dtype, image_size, memory, dataset, source, trust_import, dimensions)
    if not is_feature_folder(Path(checkpoint)):
        folder = None if official is None else Path(official)
        return scorecard.score_checkpoint(checkpoint, splits, options, by, folder, swapped)
    if splits:
        raise RequestError(f"{checkpoint} holds features already; name no splits beside it")
    if official is not None:
        raise RequestError(
            f"{checkpoint} holds features: `topk` makes official files of them; --official is for a checkpoint"
        )
    if swapped:
        raise RequestError(
            f"{checkpoint} holds features, and swapped captions have to be read by a model: evaluate the checkpoint on the store"
        )
    if by:
        raise RequestError(
            f"{checkpoint} holds features, and a column (by) is read from the store: evaluate the checkpoint on the store"
        )
    return scorecard.score_features(checkpoint, options)


@typed
def search(
    index: str | Path,
    text: str | None = None,
    *,
    image: str | Path | None = None,
    without: str | None = None,
    top: int = 10,
    image_share: float = 0.5,
    not_weight: float = 0.5,
    checkpoint: str | Path | None = None,
    device: str | None = None,
    exact: bool = False,
    trust_import: bool = False,
    where: Sequence[str] = (),
) -> list[Found]:
    """The pictures of an index that words, a picture or both describe best, the best first.

    The model of the index stays open for the next question.

    Args:
        index: a folder that `search index` wrote, or `milvus:PATH.db` and `milvus:http://HOST:19530` (docs/search.md).
        without: words for what is not wanted; `not_weight` says how strongly it pushes away, 0 to 2.
        top: how many, 1 to 1,000.
        image_share: the picture's part beside words, 0 to 1.
        checkpoint: where the index's model lies now, where it was moved.
        exact: leave an approximate index aside.
        where: conditions on what is kept of the pictures, like ``["类目=女装", "价格<100"]``.

    Returns:
        Of each its `number`, `key` (the path below the indexed folder, or the id in the store), `score`, a cosine, and
        `columns`, what is kept of it.

    Raises:
        RequestError: nothing asked, a number out of its range, or no index.
    """
    from cnclip_ft.search.engine.engine import open_gallery
    from cnclip_ft.search.engine.query import Question, given_picture
    from cnclip_ft.search.index.milvus import milvus_place
    from data_tools.columns import parse_where

    pixels = None if image is None else given_picture(open_gallery(index).info["identity"], image)
    question = Question(text, without, pixels, None, image_share, not_weight, top, parse_where(where))
    question.check()  # before the model is opened
    stamp = (Path(index) / "index.json").stat().st_mtime_ns if (Path(index) / "index.json").is_file() else 0
    place = os.path.abspath(index) if milvus_place(index) is None else str(index)
    (answer,) = _engine(place, checkpoint, device, exact, trust_import, stamp).ask([question])
    if isinstance(answer, RequestError):
        raise answer
    return answer


@lru_cache(maxsize=1)
def _engine(
    index: str, checkpoint: str | Path | None, device: str | None, exact: bool, trust_import: bool, _stamp: int
) -> Engine:
    from cnclip_ft.search.engine.engine import open_engine

    return open_engine(index, checkpoint=checkpoint, device=device, exact=exact, trust_import=trust_import)
