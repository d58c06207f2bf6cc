"""A run from recipe to report, read straight down: devices → model → data → stages → table.

The run folder holds ``recipe.yaml`` (every setting), ``journal.jsonl``, ``tensorboard/``, ``<stage>/{best,last}``,
``state/`` (to continue), and ``report/index.html``.
"""

from __future__ import annotations

import json
import platform
import secrets
import shlex
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

import cnclip_ft
from cnclip_ft.evaluation.evaluators import Recall
from cnclip_ft.recipe import Recipe, dump_recipe
from cnclip_ft.runtime import loader_fault
from cnclip_ft.training import plan
from cnclip_ft.training.context import make_context
from cnclip_ft.training.continuing import identity, refuse_other_data, refuse_other_recipe
from cnclip_ft.training.examples import Example, draw_panel, find_examples
from cnclip_ft.training.report import write_report
from cnclip_ft.training.run_folder import begin, held, refuse_nothing, refuse_taken, results, write_recipe
from cnclip_ft.training.run_state import FORMAT, StateWriter, clear_states, load_state, newest_state
from cnclip_ft.training.selection import NothingKept
from cnclip_ft.training.sharding import refuse_other_engines
from cnclip_ft.training.stage import StageRun
from cnclip_ft.training.stage_plan import MOST_STEPS, plan_stages
from cnclip_ft.training.stop import Stopped, StopRequest
from cnclip_ft.training.trackers import start_trackers
from cnclip_ft.training.validation import Judge, Judgement, table
from data_tools.atomic import whole_file
from data_tools.errors import RequestError, UserError
from data_tools.tables import terminal_width


class Run:
    """What all stages of a run share. `execute` trains; `plan.describe` only says what would happen."""

    def __init__(
        self, recipe: Recipe, *, write: bool = True, trust_import: bool = False, goes_on: bool = False
    ) -> None:
        self.context, self.model = make_context(recipe, write=write, trust_import=trust_import, goes_on=goes_on)
        context = self.context
        self.recipe, self.folder, self.trust_import = recipe, context.folder, trust_import
        self.accelerator, self.device, self.precision = context.accelerator, context.device, context.precision
        self.sharding, self.journal, self.workers = context.sharding, context.journal, context.workers
        self.train_store, self.valid_stores = context.train_store, context.valid_stores
        self.guard_store, self.tokenizer, self.cache_folder = (
            context.guard_store,
            context.tokenizer,
            context.cache_folder,
        )
        self.stop, self.damaged = StopRequest(), 0
        self.states = StateWriter(self.folder / "state")
        self.start_score: float | None = None
        self.guard_start: float | None = None
        self.judge_seconds: float | None = None  # of the latest judgement
        self.examples: list[Example] = []
        self.rows: list[tuple[str, dict[str, float | None]]] = []
        self.identity: dict[str, Any] | None = None  # of data and model, for the states
        self.token = secrets.token_hex(8)  # says of a checkpoint that this run kept it; the run's own when it goes on
        self.judge = Judge(
            context.evaluators, self.device, self.workers, context.autocast,
            guard=None if self.guard_store is None else Recall(self.guard_store), best_by=recipe.best_by,
        )  # fmt: skip
        self.plans = plan_stages(context, self.model)
        self.stages = [StageRun(self, plan) for plan in self.plans]

    # ---- executing --------------------------------------------------------------------------------------------

    def execute(self, state: dict[str, Any] | None = None) -> bool:
        """Train all stages, from `state` on. True when done, False when stopped on request."""
        with self.stop:
            try:
                self._begin(state)
                self._execute(state)
                self.states.wait()
            except Stopped:
                self.states.wait()
                self.journal.say(f"Stopped. Continue with: {self.continue_line()}")
                self.accelerator.wait_for_everyone()  # a launcher ends all processes when the first one goes
                return False
            finally:
                self.journal.close()
                self.accelerator.end_training()
        return True

    def _begin(self, state: dict[str, Any] | None) -> None:
        """Compare with the run that goes on, or make the folder that of a new one; say the plan."""
        self.plan = plan.describe(self.context, self.model, self.plans)
        said = [self.plan]
        if self.accelerator.is_main_process:
            self.identity = identity(self.context, self.model)
            if state is None:
                begin(self.folder, self.recipe)
            else:
                said += refuse_other_data(self.context, self.identity, state)
                if state["recipe"] != dump_recipe(self.recipe):
                    write_recipe(self.folder, self.recipe)
        self.journal.track = start_trackers(self.accelerator, self.recipe)
        for text in said:
            self.journal.say(text)

    def _execute(self, state: dict[str, Any] | None) -> None:
        try:
            self._train_stages(state)
        except Stopped:
            raise
        except Exception as error:
            told = self._told(error)
            if told is error:
                raise
            raise told from None

    def _told(self, error: Exception) -> Exception:
        """The error as a message that says what is saved and how to go on. A mistake of ours keeps its traceback."""
        try:
            self.states.wait()
        except UserError as unsaved:
            self.journal.say(str(unsaved))
        if isinstance(error, NothingKept):
            return error
        said = str(error) if isinstance(error, UserError) else loader_fault(error, self.workers)
        if said is None and isinstance(error, OSError):
            said = f"{error.filename or self.folder}: {error.strerror or error}"
        newest = newest_state(self.folder / "state")
        if newest is None:
            again = " with --overwrite" if results(self.folder) else ""
            way = f"There is no state yet, so nothing is lost: mend this and start again{again}."
        else:
            stage, step = divmod(newest, MOST_STEPS + 1)
            way = f"The newest state is of stage {self.stages[stage].name}, step {step}. Continue with: {self.continue_line()}"
        if said is None:
            print(f"A mistake in the program ({type(error).__name__}). {way}", file=sys.stderr)
            return error
        kind = RequestError if isinstance(error, RequestError) and newest is None else UserError
        return kind(f"{said.rstrip('. ')}.\n{way}")

    def _train_stages(self, state: dict[str, Any] | None) -> None:
        first = 0
        if state is not None:
            first, self.token = state["stage"], state.get("run", self.token)
            name, step = self.stages[first].name, state["step"]
            self.start_score, self.guard_start, self.damaged = (
                state["start_score"],
                state["guard_start"],
                state["damaged"],
            )
            self.rows = [(name, row) for name, row in state["rows"]]
            self.journal.write("continue", f"Continuing stage {name} at step {step}", step=step, stage=name)
        else:
            self._judge_start()
        for stage in self.stages[first:]:
            self.judge.trunk_is_frozen = stage.plan.image_frozen
            stage.prepare(state if stage.number == first else None)
            stage.train()
            self.rows.append((f"after {stage.name}", stage.selection.best_row))
            if stage.selection.guard_broken:
                self.journal.say(f"The run ends with stage {stage.name}: {stage.selection.ended}.")
                break
        self._report(stage)

    def _judge_start(self) -> None:
        """Score the model before its first step: what it must not sink below."""
        self.judge.trunk_is_frozen = self.plans[0].image_frozen
        judgement = self.judge(self.model)
        self.start_score, self.guard_start, self.judge_seconds = judgement.score, judgement.guard, judgement.seconds
        if self.accelerator.is_main_process:
            self.rows = [("chance", self.judge.chance), ("start", judgement.row())]
            said = "" if judgement.guard is None else f"  guard {judgement.guard:.2f}"
            self.journal.write(
                "validation", f"before the first step | mean recall {judgement.mean_recall:.2f} "
                f"(chance {self.judge.chance['mean_recall']:.2f}){judgement.details()}{said}", stage="start", step=0,
                mean_recall=judgement.mean_recall, chance=self.judge.chance, scores=judgement.as_dict(),
            )  # fmt: skip

    def show_examples(self, stage: StageRun, judgement: Judgement) -> None:
        """Example queries with what the model finds for them, as a picture for TensorBoard."""
        self.examples = find_examples(judgement.features, next(iter(self.valid_stores.values())))
        self.journal.picture(f"{stage.name}/example queries", draw_panel(self.examples), stage.step)

    def _report(self, last: StageRun) -> None:
        best = self.judge(self.model)  # the examples of the page are those of the model that is kept
        if not self.accelerator.is_main_process:
            return
        report = self.folder / "report"
        with whole_file(report / "recall.txt", "w") as file:
            file.write(table(self.rows) + "\n")
        self.journal.write("done", rows=dict(self.rows))
        page = write_report(
            report, title=f"cnclip-ft: {self.folder.name}", plan=self.plan, rows=self.rows,
            journal=self.folder / "journal.jsonl", settings=dump_recipe(self.recipe),
            examples=find_examples(best.features, next(iter(self.valid_stores.values()))),
        )  # fmt: skip
        with whole_file(report / "recall.json", "w") as file:  # last: it says that the run is done
            file.write(json.dumps(dict(self.rows), indent=2) + "\n")
        self.journal.say(
            f"\n{table(self.rows, terminal_width())}\n\nBest checkpoint: {self.folder / last.name / 'best'}\nReport: {page}"
        )
        self.states.wait()
        clear_states(self.folder / "state")

    # ---- what checkpoints and states carry --------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        return {
            "format": FORMAT, "run": self.token, "recipe": dump_recipe(self.recipe), "identity": self.identity,
            "start_score": self.start_score, "guard_start": self.guard_start, "rows": [[name, row] for name, row in self.rows], "damaged": self.damaged,
        }  # fmt: skip

    def checkpoint_info(self, stage: StageRun, judgement) -> dict[str, Any]:
        return {
            "run": self.token, "stage": stage.name, "step": stage.step, "steps": stage.total, "scores": judgement.as_dict(),
            "row": judgement.row(), "mean_recall": judgement.mean_recall, "score": judgement.score, "recipe": self.recipe.model_dump(mode="json"),
            "data": {"train": self.train_store.checksum(), **{n: e.checksum() for n, e in self.context.evaluators.items()}},
            "start": self.context.start.lines(), "precision": self.precision,
            "versions": {"cnclip_ft": cnclip_ft.__version__, "torch": torch.__version__, "python": platform.python_version()},
        }  # fmt: skip

    def continue_line(self) -> str:
        trust = " --trust-import" * (self.trust_import or self.recipe.model.code is not None)
        return f"cnclip-ft train {shlex.quote(str(self.folder / 'recipe.yaml'))} --continue{trust}"


def train(
    recipe: Recipe, *, proceed: bool = False, overwrite: bool = False, strict: bool = False, trust_import: bool = False
) -> bool:
    """Run a recipe; `proceed` continues the run in its folder at the very step.

    Returns:
        True when the last stage is done, False when it was stopped on request (and can be continued).

    Raises:
        RequestError: the folder holds another run or is at work, there is nothing to continue, or a setting cannot work.
        UserError: the work failed; the message says what is saved and how to go on.
    """
    folder = Path(recipe.output)
    refuse_other_engines()
    devices = PartialState(cpu=not torch.accelerator.is_available())
    with held(folder) if devices.is_main_process else nullcontext():
        state = None
        if proceed:
            state = load_state(folder / "state", print if devices.is_main_process else lambda text: None)
            if state is None:
                refuse_nothing(folder)
            refuse_other_recipe(recipe, state)
        else:
            refuse_taken(folder, recipe, overwrite=overwrite)
        devices.wait_for_everyone()  # all have looked before the first one writes
        run = Run(recipe, trust_import=trust_import, goes_on=proceed)
        if strict:
            plan.refuse_warnings(run.context, run.plans)
        return run.execute(state)
