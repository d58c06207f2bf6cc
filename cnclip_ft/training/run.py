"""A run from recipe to report, read straight down: context → model → plans → stages → report.

The run folder holds ``recipe.yaml`` (every setting), ``journal.jsonl``, ``tensorboard/``, ``<stage>/{best,last}``,
``state/`` (to continue, or to train a finished run further), and ``report/index.html``.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from cnclip_ft.collectives import on_first
from cnclip_ft.evaluation.kinds.recall import Recall
from cnclip_ft.models.dual_encoder import DualEncoder
from cnclip_ft.recipe import Recipe, Stage, dump_recipe
from cnclip_ft.runtime import loader_fault
from cnclip_ft.training import plan
from cnclip_ft.training.advice import refuse_warnings
from cnclip_ft.training.context import Context, make_context
from cnclip_ft.training.continuing import earlier_order, identity, refuse_other_data, refuse_other_recipe
from cnclip_ft.training.examples import Example, find_examples
from cnclip_ft.training.fit import refuse_too_large
from cnclip_ft.training.grounding import give_heads
from cnclip_ft.training.languages import language_notes
from cnclip_ft.training.progress import Progress, reasons, verdict
from cnclip_ft.training.report import write_report
from cnclip_ft.training.run_folder import (
    DONE,
    begin,
    held,
    nothing_to_continue,
    refuse_finished,
    refuse_taken,
    results,
    write_recipe,
)
from cnclip_ft.training.run_state import StateWriter, keep_newest_state, load_state, newest_state
from cnclip_ft.training.sharding import refuse_other_engines
from cnclip_ft.training.stage import NothingKept, StageRun
from cnclip_ft.training.stage_plan import MOST_STEPS, StagePlan, longer, plan_stages
from cnclip_ft.training.stop import Stopped, StopRequest
from cnclip_ft.training.telling import losses
from cnclip_ft.training.trackers import start_trackers
from cnclip_ft.training.trainer import Trainer
from cnclip_ft.training.validation import Judge, table
from cnclip_ft.training.validation_loss import ValidationLoss
from data_tools.atomic import whole_file
from data_tools.errors import RequestError, UserError
from data_tools.tables import note, terminal_width
from data_tools.words import Said, language_of


def train(
    recipe: Recipe,
    *,
    proceed: bool = False,
    overwrite: bool = False,
    strict: bool = False,
    trust_import: bool = False,
    stop: StopRequest | None = None,
    before_step: Callable[[Trainer], None] | None = None,
    language: str | None = None,
) -> bool:
    """Run a recipe; `proceed` continues the run in its folder at the very step.

    Args:
        language: of the report, zh or en; None: as `data_tools.words.language_of` finds it.
        stop: what may ask for a stop; signals do in every case.
        before_step: called on every device before every step.

    Returns:
        True when the last stage is done, False when it was stopped on request (and can be continued).

    Raises:
        RequestError: the folder holds another run or is at work, there is nothing to continue, or a setting cannot work.
        UserError: the work failed; the message says what is saved and how to go on.
    """
    folder, speaks = Path(recipe.output), language_of(language)
    refuse_other_engines()
    devices = PartialState(cpu=not torch.accelerator.is_available())
    with held(folder) if devices.is_main_process else nullcontext():
        state = shorter = None
        if proceed:
            state = load_state(folder / "state", print if devices.is_main_process else lambda text: None)
            if state is None:
                raise nothing_to_continue(folder)
            shorter = refuse_other_recipe(recipe, state)
            if shorter is None:
                refuse_finished(folder, recipe)
            recipe = recipe.with_reasons(recipe.chosen or reasons(state))
        else:
            refuse_taken(folder, recipe, overwrite=overwrite)
        devices.wait_for_everyone()  # all have looked before the first one writes
        context, model = make_context(
            recipe, trust_import=trust_import, goes_on=proceed, earlier_order=state is not None and earlier_order(state)
        )
        plans = plan_stages(context, model)
        if strict:
            refuse_warnings(context, model, plans)
        refuse_too_large(context, plans, model)
        return Run(context, model, plans, stop or StopRequest(), before_step, shorter, speaks).execute(state)


class Run:
    """Trains the stages of a recipe one after the other, and says how to go on where that fails.

    Args:
        shorter: what the stage that goes on was when it was to last less long; None where it is as it was.
        language: of the report.
    """

    def __init__(
        self,
        context: Context,
        model: DualEncoder,
        plans: list[StagePlan],
        stop: StopRequest,
        before_step: Callable[[Trainer], None] | None = None,
        shorter: Stage | None = None,
        language: str = "en",
    ) -> None:
        self.shorter, self.described, self.language = shorter, "", language
        self.context, self.model, self.plans, self.stop, self.before_step = context, model, plans, stop, before_step
        self.progress, self.states = Progress(), StateWriter(context.folder / "state")
        self.judge = Judge(
            context.evaluators,
            context.device,
            context.workers,
            context.autocast,
            guard=_guard(context),
            guard_score=_guard_score(context),
            best_by=context.recipe.best_by,
            stop=stop,
        )

    def execute(self, state: dict[str, Any] | None = None) -> bool:
        """Train all stages, from `state` on. True when done, False when stopped on request."""
        context = self.context
        with self.stop:
            try:
                self._begin(state)
                try:
                    self._train_stages(state)
                    self.states.wait()
                except Stopped:
                    raise
                except Exception as error:
                    told = self._told(error)
                    if told is error:
                        raise
                    raise told from None
            except Stopped:
                self.states.wait()
                begun = newest_state(context.folder / "state") is not None
                way = continue_line(context)
                said = Said("Stopped. Continue with: {way}", "已停止。用这条命令继续：{way}", way=way)
                nothing = "Stopped. It had not begun to train, so nothing is lost: give the command again."
                context.journal.say(said if begun else nothing)
                if begun and context.main:
                    self._write_page([*self.progress.notes, said], [])
                context.accelerator.wait_for_everyone()  # a launcher ends all processes when the first one goes
                return False
            finally:
                context.journal.close()
                context.accelerator.end_training()
        return True

    def _begin(self, state: dict[str, Any] | None) -> None:
        """Compare with the run that goes on, or make the folder that of a new one; say the plan."""
        context = self.context
        self.described = plan.describe(context, self.model, self.plans)
        said: list[str] = [self.described]
        # It reads every store whole.
        on_first(lambda: said.extend(self._open_folder(state)), context.device)
        context.journal.track = start_trackers(context.accelerator, context.recipe)
        for text in said:
            context.journal.say(text)

    def _open_folder(self, state: dict[str, Any] | None) -> list[str]:
        """Make the folder that of this run; returns what there is to say about one that goes on."""
        context, said = self.context, []
        self.progress.identity = identity(context, self.model, self.plans)
        if state is None:
            begin(context.folder, context.recipe)
            return []
        said += refuse_other_data(context, self.progress.identity, state)
        said += [longer(self.plans[state["stage"]], self.shorter, state["step"])] if self.shorter else []
        (context.folder / "report" / DONE).unlink(missing_ok=True)  # from here on it is not done
        if state["recipe"] != dump_recipe(context.recipe):
            write_recipe(context.folder, context.recipe)
        return said

    def _train_stages(self, state: dict[str, Any] | None) -> None:
        context, progress = self.context, self.progress
        first, start = 0, None
        if state is None:
            start = self._judge_start()
        else:
            first = state["stage"]
            progress.load_state_dict(state)
            name, step = self.plans[first].name, state["step"]
            context.journal.write("continue", f"Continuing stage {name} at step {step}", step=step, stage=name)
        for each in self.plans[first:]:
            self.judge.trunk_is_frozen = each.image_frozen
            if start is not None and self.judge.best_by != each.decides:
                start = self._judged_anew(each)
            self.judge.best_by = each.decides
            stage = StageRun(
                context,
                each,
                self.model,
                progress,
                judge=self.judge,
                states=self.states,
                stop=self.stop,
                start=start,
                state=state,
                before_step=self.before_step,
            )
            if self.shorter is not None and each is self.plans[first]:
                stage.selection.go_on()
            stage.train()
            start, state = stage.outcome(), None
            progress.rows.append((f"after {each.name}", start["row"]))
            if stage.selection.so_far.guard_broken:
                context.journal.say(f"The run ends with stage {each.name}: {stage.selection.so_far.ended}.")
                break
        self._report(each.name)

    def _judged_anew(self, plan: StagePlan) -> dict[str, Any]:
        """What is found of the weights a stage begins with, where another score decides in it than in the one before."""
        give_heads(self.context, plan.number, plan.grounding, self.model)
        self.judge.best_by = plan.decides
        judgement = self.judge(self.model)
        self.context.journal.write(
            "validation",
            f"{plan.name} begins with {judgement.score:.2f} ({plan.decides}) | mean recall {judgement.mean_recall:.2f}{judgement.details()}",
            stage=plan.name,
            step=0,
            mean_recall=judgement.mean_recall,
            score=judgement.score,
            scores=judgement.as_dict(),
            languages=judgement.languages,
        )
        return verdict(judgement)

    def _judge_start(self) -> dict[str, Any]:
        """Score the model before its first step: what it must not sink below."""
        self.judge.trunk_is_frozen = self.plans[0].image_frozen
        judgement, progress = self.judge(self.model), self.progress
        pool_loss = ValidationLoss.of(self.context, self.plans[0])
        loss = None if pool_loss is None else pool_loss(self.model, judgement.features)
        progress.start_score, progress.guard_start = judgement.score, judgement.guard
        progress.languages_start = judgement.languages
        progress.judge_seconds = judgement.seconds
        if self.context.main:
            chance = self.judge.chance
            progress.rows = [("chance", chance), ("start", judgement.row())]
            said = "" if judgement.guard is None else f"  guard {judgement.guard:.2f}"
            self.context.journal.write(
                "validation",
                f"before the first step | mean recall {judgement.mean_recall:.2f} "
                f"(chance {chance['mean_recall']:.2f}){judgement.details()}{said}",
                stage="start",
                step=0,
                mean_recall=judgement.mean_recall,
                score=judgement.score,
                chance=chance,
                **losses(loss, self.plans[0].setting.batch_size),
                scores=judgement.as_dict(),
                languages=judgement.languages,
            )
        return verdict(judgement)

    def _report(self, last: str) -> None:
        context, rows, notes = self.context, self.progress.rows, self.progress.notes
        final = self.judge(self.model)  # the examples of the page are those of the model that is kept
        notes = [*notes, *language_notes(self.progress.languages_start, final.languages)]
        if not context.main:
            return
        if final.languages:
            context.journal.write("languages", start=self.progress.languages_start, end=final.languages)
        folder = context.folder / "report"
        with whole_file(folder / "recall.txt", "w") as file:
            file.write("\n".join([table(rows), *notes]) + "\n")
        context.journal.write("done", rows=dict(rows))
        page = self._write_page(notes, find_examples(final.features, next(iter(context.valid_stores.values()))))
        with whole_file(folder / DONE, "w") as file:  # last: it says that the run is done
            file.write(json.dumps(dict(rows), indent=2) + "\n")
        note = next((f" ({each})" for each in reversed(self.progress.notes) if each.startswith(f"stage {last} ")), "")
        text = "\n".join([table(rows, terminal_width()), *notes])
        context.journal.say(f"\n{text}\n\nBest checkpoint: {context.folder / last / 'best'}{note}\nReport: {page}")
        self.states.wait()
        keep_newest_state(context.folder / "state")

    def _write_page(self, notes: list[str], examples: list[Example]) -> Path:
        context = self.context
        return write_report(
            context.folder / "report",
            title=f"cnclip-ft: {context.folder.name}",
            plan=self.described,
            rows=self.progress.rows,
            notes=notes,
            journal=context.folder / "journal.jsonl",
            settings=dump_recipe(context.recipe),
            examples=examples,
            language=self.language,
        )

    def _told(self, error: Exception) -> Exception:
        """The error as a message that says what is saved and how to go on. A mistake of ours keeps its traceback."""
        context, folder = self.context, self.context.folder
        try:
            self.states.wait()
        except UserError as unsaved:
            context.journal.say(str(unsaved))
        if isinstance(error, NothingKept):
            return error
        said = str(error) if isinstance(error, UserError) else loader_fault(error, context.workers)
        if said is None and isinstance(error, OSError):
            said = f"{error.filename or folder}: {error.strerror or error}"
        newest = newest_state(folder / "state")
        if newest is None:
            again = " with --overwrite" if results(folder) else ""
            way = f"There is no state yet, so nothing is lost: mend this and start again{again}."
        else:
            stage, step = divmod(newest, MOST_STEPS + 1)
            way = f"The newest state is of stage {self.plans[stage].name}, step {step}. Continue with: {continue_line(context)}"
        if said is None:
            note(f"A mistake in the program ({type(error).__name__}). {way}")
            return error
        kind = RequestError if isinstance(error, RequestError) and newest is None else UserError
        return kind(f"{said.rstrip('. ')}.\n{way}")


def _guard(context: Context) -> Recall | None:
    setting, store = context.recipe.data.guard, context.guard_store
    return None if setting is None or store is None else Recall(store, setting.language)


def _guard_score(context: Context) -> str | None:
    """The score the guard watches; None where nothing is."""
    setting = context.recipe.data.guard
    if setting is None:
        return None
    return f"{setting.language}.mean_recall" if setting.language else "mean_recall"


def continue_line(context: Context) -> str:
    """The command that goes on with the run."""
    trust = " --trust-import" * (context.trust_import or context.recipe.model.code is not None)
    return f"cnclip-ft train {shlex.quote(str(context.folder / 'recipe.yaml'))} --continue{trust}"
