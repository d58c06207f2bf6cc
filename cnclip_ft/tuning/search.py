"""The search: stage by stage, trial by trial, within a budget; told by the library what to try and what to give up (Optuna).

TPE (Bergstra et al. 2011) draws the values, successive halving (Jamieson & Talwalkar 2016) gives trials up at a validation where
they are not among the better half. The first trial of a stage is the recipe itself, so that what is found is never below it.
All trials share the cached features of a frozen tower; those of a later stage start from the best of the one before.
"""

from __future__ import annotations

import json
import re
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cnclip_ft.data.mixture import stores_of
from cnclip_ft.recipe import Recipe, dump_recipe
from cnclip_ft.recipe_files import checked_recipe
from cnclip_ft.training.context import make_context
from cnclip_ft.training.run_folder import STATES, held
from cnclip_ft.training.stage_plan import plan_stages
from cnclip_ft.tuning.drawing import draw
from cnclip_ft.tuning.runner import Record, Runner
from cnclip_ft.tuning.space import VALIDATIONS, Space, axes_of, given_axes
from cnclip_ft.tuning.trials import FILE, Trial, TrialFile, behind, complete
from data_tools.atomic import whole_file
from data_tools.check.overlap import shared_pictures
from data_tools.errors import RequestError, UserError
from data_tools.words import Said

SETTINGS = "search.json"
KEPT = 5  # complete trials whose weights stay: the flattery of choosing is measured on them
_AT_ONCE = 3  # failures in a row, of the first trials, that end the search
_IN_A_ROW = 10  # failures in a row, later, that end the search of a stage: they take no time, so no budget would
_OVER = 1.1  # a trial may take so much more than what is left of the budget
Run = Callable[[Runner, Callable[[Record], str | None]], tuple[str, str]]


@dataclass(frozen=True)
class Found:
    """What a search found: the space and the trials of every stage, and the recipe with the winners' settings."""

    recipe: Recipe
    spaces: list[Space]
    trials: dict[str, list[Trial]]
    folder: Path
    warning: str = ""

    def winner(self, stage: str) -> Trial:
        return complete(self.trials[stage])[0]

    def weights(self, trial: Trial) -> Path:
        return self.folder / trial.stage / f"{trial.number:04}" / trial.stage / "best"


def seconds_of(text: str) -> float:
    """``2h``, ``90m``, ``1h30m``, ``45s`` → seconds.

    Raises:
        RequestError: not of this form, or nothing.
    """
    found = re.fullmatch(
        r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m(?:in)?)?(?:(\d+(?:\.\d+)?)s)?", text.strip().lower()
    )
    seconds = (
        sum(float(part or 0) * unit for part, unit in zip(found.groups(), (3600, 60, 1), strict=True)) if found else 0
    )
    if not seconds:
        raise RequestError(f"--budget is {text!r}; give a time as 2h, 90m or 1h30m")
    return seconds


class Search:
    """A search in `folder`, as long as `budget` seconds of trials or `trials` trials a stage, whichever ends first.

    Args:
        stages: names of those that are searched; others are trained once, as the recipe has them.
        given: axes of the user's own (``--search``).
        say: told every line.
        run: starts a trial.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        *,
        budget: float | None = None,
        trials: int | None = None,
        stages: Sequence[str] = (),
        given: Sequence[str] = (),
        trust_import: bool = False,
        say: Callable[[str], object] = print,
        run: Run = Runner.run,
    ) -> None:
        if budget is None and trials is None:
            raise RequestError("say how long to search: --budget 2h, or --trials N for each stage")
        unknown = next((name for name in stages if name not in recipe.stages), None)
        if unknown is not None:
            raise RequestError(f"--stage {unknown}: the recipe has the stages {', '.join(recipe.stages)}")
        searched = list(stages) or list(recipe.stages)
        for text in given:
            stage = text.removeprefix("stages.").partition(".")[0]
            if not re.fullmatch(r"stages\.[^.=]+\.[^=]+=.+", text) or stage not in searched:
                raise RequestError(
                    f"--search {text}: name a key of a searched stage and its values, e.g. "
                    f"stages.{searched[-1]}.learning_rate=1e-6..1e-4 or stages.{searched[-1]}.ema=null,0.99,0.999"
                )
        keys = [text.partition("=")[0] for text in given]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise RequestError(f"--search {twice} is given twice; name all its values in one")
        self.recipe, self.folder, self.budget, self.most, self.searched = recipe, folder, budget, trials, searched
        self.given, self.trust_import, self.say, self.start_run = list(given), trust_import, say, run
        self.spaces: list[Space] = []
        self.warning = ""

    def execute(self, *, proceed: bool = False) -> Found:
        """Search; with `proceed` go on with the search in the folder.

        Raises:
            RequestError: the folder holds another search, the budget is too small for one trial, a stage cannot be searched.
            UserError: no trial of a stage came to its end.
            KeyboardInterrupt: stopped; what was done is kept.
        """
        try:
            import optuna
        except ImportError:
            raise RequestError("the search needs Optuna: pip install 'cnclip-ft[tune]'") from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        with held(self.folder):
            self._settle_folder(proceed)
            self.file = TrialFile(self.folder)
            try:
                self._look()
            except RequestError:
                if not proceed:  # nothing was searched: the folder is as it was
                    (self.folder / SETTINGS).unlink()
                raise
            start: Any = self.recipe.model.start
            for number, space in enumerate(self.spaces):
                share = None if self.budget is None else (self.budget - self.file.seconds) / self._still(number)
                best = self._search_stage(space, start, share)
                start = str(Found(self.recipe, self.spaces, {}, self.folder).weights(best))
            trials = {space.name: self.file.of(space.name) for space in self.spaces}
            return Found(self._recipe(), self.spaces, trials, self.folder, self.warning)

    def _settle_folder(self, proceed: bool) -> None:
        settings = {
            "recipe": dump_recipe(self.recipe.model_copy(update={"output": "", "feature_cache": None})),
            "stages": self.searched,
            "search": self.given,
        }
        file = self.folder / SETTINGS
        if not file.exists():
            if proceed:
                raise RequestError(f"{self.folder} holds no search to continue; leave --continue out")
            foreign = next(
                (path.name for path in self.folder.iterdir() if not path.name.startswith("cnclip-ft.lock")), None
            )
            if foreign is not None:
                raise RequestError(f"{self.folder} holds {foreign}, which is no search; choose another --output")
            with whole_file(file, "w") as target:
                target.write(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
            return
        if not proceed:
            raise RequestError(f"{self.folder} holds a search. Continue it with --continue, or choose another --output")
        try:
            before = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            raise RequestError(f"{file} cannot be read; begin anew in another --output") from None
        other = next((name for name, value in settings.items() if before.get(name) != value), None)
        if other is not None:
            raise RequestError(
                f"{self.folder} holds the search of another {other}. Continue with what it began with (budget and trials may be "
                "more), or choose another --output"
            )

    def _look(self) -> None:
        """Plan the recipe once: what cannot work is refused before the first trial, and the axes follow from the plan."""
        context, model = make_context(self.recipe, write=False, trust_import=self.trust_import)
        for plan in plan_stages(context, model):
            space = axes_of(
                plan,
                context.new_parts,
                len(context.pairs),
                context.world,
                model.image_tower.patch_dropout is not None,
                captions=len(context.pairs) / context.pairs.image_count,
            )
            own = [text for text in self.given if text.startswith(f"stages.{plan.name}.")]
            if plan.name not in self.searched:
                space = Space(plan.name, space.setting, space.steps, space.rules, ())
            if own:
                space = given_axes(space, own)
                self._refuse_values(space)
            self.spaces.append(space)
        name, valid = next(iter(context.valid_stores.items()))
        shared = shared_pictures(stores_of(context.train_store), valid)
        if shared:
            self.warning = Said(
                "{shared:,} pictures of data.valid ({name}) are in the training data too: the search will choose what learns them by "
                "heart. Take them out (cnclip-ft data check TRAIN VALID lists them) before you trust what it finds.",
                "data.valid（{name}）中有 {shared:,} 张图片也在训练数据里：搜索会偏爱死记硬背它们的设置。先去掉它们（cnclip-ft data check TRAIN "
                "VALID 会列出），再相信搜索的结果。",
                shared=shared,
                name=name,
            )
            self.say(f"warning: {self.warning}")

    def _refuse_values(self, space: Space) -> None:
        """Every value that was given makes a recipe, put in alone.

        Raises:
            RequestError: one does not.
        """
        for axis in space.axes:
            for value in axis.choices or (axis.low, axis.high):
                try:
                    self._with_stage(space.name, space.stage({axis.name: value}), self.recipe.model.start, self.folder)
                except RequestError as refused:
                    raise RequestError(f"--search stages.{space.name}.{axis.name} has {value}: {refused}") from None

    def _still(self, number: int) -> int:
        """How many searched stages are to come, this one among them; one at least."""
        return max(1, sum(space.name in self.searched for space in self.spaces[number:]))

    # ---- one stage ----------------------------------------------------------------------------------------------

    def _search_stage(self, space: Space, start: Any, budget: float | None) -> Trial:
        most = 1 if not space.axes else self.most
        before = sum(trial.seconds for trial in self.file.of(space.name))
        limit = None if budget is None else before + budget
        if space.axes:
            self.say(f"stage {space.name}: searching over {', '.join(axis.name for axis in space.axes)}")
        while True:
            ended = [trial for trial in self.file.of(space.name) if trial.state != "running"]
            self._refuse_hopeless(space.name, ended)
            under_way = next((trial for trial in self.file.of(space.name) if trial.state == "running"), None)
            spent = sum(trial.seconds for trial in self.file.of(space.name))
            if under_way is None:
                if (most is not None and len(ended) >= most) or self._over(space, ended, spent, limit):
                    break
                if len(ended) >= _IN_A_ROW and all(trial.state == "failed" for trial in ended[-_IN_A_ROW:]):
                    self.say(
                        f"stage {space.name}: {_IN_A_ROW} trials in a row failed, so no more are tried: {ended[-1].reason}"
                    )
                    break
            trial = under_way or Trial(space.name, len(ended), draw(space, ended, self.recipe.seed))
            self._run_trial(space, trial, start, limit, spent)
        best = complete(ended)
        if not best:
            raise UserError(f"stage {space.name}: no trial came to its end; {self.folder / FILE} says why")
        return best[0]

    def _over(self, space: Space, ended: list[Trial], spent: float, limit: float | None) -> bool:
        """Whether no further trial fits into the budget. The first one is tried in any case."""
        times = [trial.seconds for trial in complete(ended)]
        return (
            limit is not None and bool(times) and (not space.axes or spent + statistics.median(times) > limit * _OVER)
        )

    def _refuse_hopeless(self, stage: str, ended: list[Trial]) -> None:
        failed = [trial for trial in ended if trial.state == "failed"]
        own = next((trial for trial in failed if trial.number == 0), None)
        if own is not None or (len(failed) >= _AT_ONCE and len(failed) == len(ended)):
            raise UserError(
                f"stage {stage}: {'the recipe itself does not train' if own is not None else f'all {len(failed)} trials failed'}: "
                f"{failed[0].reason}"
            )

    def _run_trial(self, space: Space, trial: Trial, start: Any, limit: float | None, spent: float) -> None:
        place = self.folder / space.name / f"{trial.number:04}"
        stage = space.stage(trial.values) if space.axes else space.setting.model_dump(mode="json")
        try:
            recipe = self._with_stage(space.name, stage, start, place)
        except RequestError as refused:
            trial.state, trial.reason = "failed", str(refused)
            self._ended(space, trial)
            return
        place.parent.mkdir(exist_ok=True)
        runner = Runner(place.with_suffix(".yaml"), place, space.name, trust_import=self.trust_import)
        with whole_file(runner.file, "w") as file:
            file.write(dump_recipe(recipe))
        self.file.write(trial)
        earlier, began = trial.seconds, time.monotonic()
        every = stage["validate_every"] or 1

        def follow(record: Record) -> str | None:
            trial.seconds = earlier + time.monotonic() - began
            if record.get("kind") == "validation" and record.get("stage") == "start":
                trial.start = record.get("score")
            left = record.get("seconds_left", 0.0)
            if record.get("stage") != space.name:
                return None
            if limit is not None and spent + trial.seconds - earlier + left > limit * _OVER:
                if trial.number == 0:
                    need = _said((trial.seconds + left) * 1.3 * self._still(0))  # it starts anew, and may be slower
                    raise RequestError(
                        f"stage {space.name}: the recipe itself takes about {_said(trial.seconds + left)}, and "
                        f"{_said(max(0.0, limit - spent))} of the budget are left for this stage. Give --budget {need} or more "
                        "with --continue, or fewer steps in a new search"
                    )
                if spent + trial.seconds - earlier > limit * _OVER:
                    return "the budget is used up"
            if record.get("kind") == "validation" and space.axes:
                number = max(1, round(record["step"] / every))
                trial.report(number, record["score"])
                self.file.write(trial)
                if behind(trial, number, self.file.of(space.name)):
                    return f"not among the better half after {number} of {VALIDATIONS} validations"
            return None

        try:
            state, trial.reason = self.start_run(runner, follow)
            trial.state = "complete" if state == "complete" else "pruned"
            trial.score = runner.score() if trial.state == "complete" else None
        except RequestError:
            self.file.write(trial)
            raise
        except UserError as error:
            trial.state, trial.reason = "failed", str(error)
        finally:
            trial.seconds = earlier + time.monotonic() - began
            if trial.state == "running":
                self.file.write(trial)
        self._ended(space, trial)

    def _ended(self, space: Space, trial: Trial) -> None:
        self.file.write(trial)
        best = complete(self.file.of(space.name))
        told = f"{trial.state}: {trial.reason}" if trial.score is None else f"{trial.score:.2f}"
        told += " (nothing beat its start)" if trial.gained_nothing else ""
        changed = [
            f"{axis.name} {axis.shown(trial.values[axis.name])}"
            for axis in space.axes
            if trial.values[axis.name] != axis.own
        ]
        leading = f" (best {best[0].score:.2f}, trial {best[0].number})" if best else ""
        self.say(
            f"{space.name} {trial.number} | {told} | {_said(trial.seconds)} | {', '.join(changed) or 'the recipe itself'}{leading}"
        )
        for other in self.file.of(space.name):
            place = self.folder / space.name / f"{other.number:04}"
            if other.state != "running" and other not in best[:KEPT]:
                for name in ("best", "last", "start"):
                    shutil.rmtree(place / space.name / name, ignore_errors=True)
            if other.state != "running":
                shutil.rmtree(place / STATES, ignore_errors=True)

    # ---- recipes ------------------------------------------------------------------------------------------------

    def _with_stage(self, name: str, stage: dict[str, Any], start: Any, output: Path) -> Recipe:
        content = self.recipe.model_dump(mode="json")
        content |= {
            "stages": {name: stage},
            "output": str(output),
            "feature_cache": self.recipe.feature_cache or str(self.folder / "feature_cache"),
            "report_to": [],
        }
        content["model"]["start"] = start
        return checked_recipe(content)

    def _recipe(self) -> Recipe:
        """The recipe with what was found."""
        content = self.recipe.model_dump(mode="json")
        for space in self.spaces:
            best = complete(self.file.of(space.name))[0]
            if space.axes and best.number:
                found = space.stage(best.values)
                found["validate_every"] = space.setting.validate_every
                content["stages"][space.name] = found
        return checked_recipe(content)


def _said(seconds: float) -> str:
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{max(1, round(seconds))}s"
    return f"{minutes}m" if minutes < 120 else f"{minutes // 60}h{minutes % 60:02}m"
