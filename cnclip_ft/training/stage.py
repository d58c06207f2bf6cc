"""One stage of a run: step, log, judge and keep, until its last step or until it has learnt what it can."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from functools import partial
from statistics import fmean
from typing import Any

from cnclip_ft.collectives import on_first, sum_numbers
from cnclip_ft.data.mixture import check_lines
from cnclip_ft.data.transport import SECONDS
from cnclip_ft.models.checkpoints import read_info
from cnclip_ft.models.dual_encoder import DualEncoder
from cnclip_ft.training.context import Context
from cnclip_ft.training.examples import draw_panel, find_examples
from cnclip_ft.training.grounding import give_heads
from cnclip_ft.training.interpolation import interpolate
from cnclip_ft.training.journal import Meter, duration
from cnclip_ft.training.kept import Kept
from cnclip_ft.training.languages import since_start
from cnclip_ft.training.optimizer import give_bias
from cnclip_ft.training.progress import Progress, checkpoint_info, verdict
from cnclip_ft.training.run_folder import EPOCH
from cnclip_ft.training.run_state import StateWriter
from cnclip_ft.training.selection import Selection
from cnclip_ft.training.sizing import Sizing
from cnclip_ft.training.stage_plan import MOST_STEPS, StagePlan
from cnclip_ft.training.stop import Stopped, StopRequest
from cnclip_ft.training.telling import tell_findings, tell_stage, tell_steps, tell_validation
from cnclip_ft.training.throughput import Throughput
from cnclip_ft.training.trainer import Trainer
from cnclip_ft.training.validation import Judgement
from cnclip_ft.training.validation_loss import PoolLoss, ValidationLoss
from data_tools.errors import UserError
from data_tools.words import Said, joined

VERDICT = ("scores", "row", "mean_recall", "score")


class NothingKept(UserError):
    """A stage ended without a model that may be kept: the run cannot go on."""


class StageRun:
    """Trains a stage as planned.

    Args:
        model: holds the weights the stage begins with, and at its end those of its best.
        start: what was found of these weights (`progress.verdict`): they are the stage's first candidate. None where a
            `state` goes on in this stage.
        judge: called by all devices at once; gives them the same judgement.
        before_step: called before every step.
    """

    def __init__(
        self,
        context: Context,
        plan: StagePlan,
        model: DualEncoder,
        progress: Progress,
        *,
        judge: Callable[[DualEncoder], Judgement],
        states: StateWriter,
        stop: StopRequest,
        start: dict[str, Any] | None = None,
        state: dict[str, Any] | None = None,
        before_step: Callable[[Trainer], None] | None = None,
    ) -> None:
        self.context, self.plan, self.model, self.progress = context, plan, model, progress
        self.judge, self.states, self.stop, self.before_step = judge, states, stop, before_step
        self.selection = Selection(plan.setting, context.recipe.data.guard, progress.guard_start, plan.name)
        self.kept = Kept(context.folder / plan.name, context.main)
        self.interpolated = False
        self.meter, self.foretold = Meter(context.device, plan.setting.gradient_clip), False
        self._metered: dict[str, Any] | None = None  # of the steps before, which no line was written of
        self.pool_loss = ValidationLoss.of(context, plan)
        self.since_validation: list[float] = []  # losses of the pairs
        self.throughput = Throughput.of(context, plan, model)
        self.unjudged = False  # a validation is due for the weights as they are: it failed
        self.saved: int | None = None  # step of the newest state
        if start is not None:
            self.selection.begin(start["score"], start["row"])
            give_bias(model, plan.objective)  # so that start and best hold the same tensors
            give_heads(context, plan.number, plan.grounding, model)
            self._keep("start", model, checkpoint_info(context, plan, 0, progress.token, start))
        self.trainer = Trainer(context, plan, model, state, stop)
        self.plan = self.trainer.plan  # without the images that cannot be read
        tell_stage(context, self.plan, self.trainer.whole)
        if state is not None:
            self.selection.load_state_dict(state["selection"])
            self.kept.sums = dict(state["selection"].get("sums", {}))
            self.unjudged, self.saved = state.get("unjudged", False), self.trainer.step
            self.since_validation = list(state.get("since_validation", []))
            self._metered = state.get("meter")
            self._take_what_was_kept_later()

    def _take_what_was_kept_later(self) -> None:
        """The run may have kept a best after its newest state, and then have ended unawares."""
        later = self.context.from_main(self.kept.kept_later(self.progress.token) if self.context.main else None)
        if later is not None:
            so_far, self.interpolated = self.selection.so_far, "interpolated" in later
            so_far.best, so_far.best_step, so_far.best_row = later["score"], later["step"], later["row"]

    # ---- the loop ---------------------------------------------------------------------------------------------

    @property
    def finished(self) -> bool:
        return self.trainer.step >= self.plan.total or self.selection.so_far.ended is not None

    def train(self) -> None:
        """Steps until the stage is over; raises `Stopped` when asked to stop."""
        context, plan, trainer, meter = self.context, self.plan, self.trainer, self.meter
        meter.reset()
        if self._metered is not None:
            meter.load_state_dict(self._metered)
        if self.unjudged:
            with meter.paused():
                self._judge()
        batches = trainer.batches() if not self.finished else None
        sizing = trainer.sizing()
        with context.journal.bar(plan.name, trainer.step, plan.total) as advance:
            while batches is not None and not self.finished:
                asked = time.perf_counter()
                try:
                    batch = next(batches)
                    self._count_faults(batch)
                    if self.before_step is not None:
                        self.before_step(trainer)
                except Exception:
                    self._save_what_was_done()
                    raise
                ready = time.perf_counter()
                meter.waited += ready - asked
                try:
                    trainer.take(batch)
                    # A CPU has done the step by now; told later, its time would be that of the next one. On a card the few
                    # steps that are measured are waited for.
                    if sizing is not None or context.device.type == "cpu":
                        trainer.settle()
                finally:
                    self._tell()
                if sizing is not None:
                    sizing.add(batch[SECONDS], time.perf_counter() - ready)
                    if sizing.at_rest:
                        batches = self._resized(batches, sizing)
                        sizing = None
                step = trainer.step
                advance()
                judged = step % plan.validate_every == 0 or step == plan.total
                saved, kept = (e is not None and step % e == 0 for e in (context.recipe.save_every, plan.keep_every))
                if judged or saved or kept:
                    self._settle()
                    with meter.paused():
                        if judged:
                            self._judge()
                        elif saved:
                            self.save()
                        if kept:
                            self._keep_epoch()
                if self.stop.asked_lately(context.device) and not self.finished:
                    if self.saved != step:
                        self.save()
                    raise Stopped
        ended = self.selection.so_far.ended
        if ended and trainer.step < plan.total:
            note = Said(
                "{stage} ends at step {step} of {total}: {why}",
                "阶段 {stage} 在第 {step} 步结束（共 {total} 步）：{why}",
                stage=plan.name,
                step=trainer.step,
                total=plan.total,
                why=ended,
            )
            context.journal.write("ended", note, stage=plan.name, step=trainer.step, reason=ended)
            self.progress.notes = [*self.progress.notes, note]
        trainer.release()
        self._finish()

    def _resized(self, batches: Generator[dict[str, Any]], sizing: Sizing) -> Generator[dict[str, Any]]:
        """The batches that follow, decoded by as many workers as it takes."""
        with self.meter.paused():
            self.context.journal.write(
                "loader", sizing.said(), stage=self.plan.name, step=self.trainer.step, **sizing.numbers()
            )
            if sizing.chosen != sizing.workers and not self.finished:
                batches.close()  # with its workers
                batches = self.trainer.batches(sizing.chosen)
        return batches

    def _count_faults(self, batch: dict[str, Any]) -> None:
        context, allowed = self.context, self.context.recipe.data.max_damaged_images
        for fault in batch["faults"]:
            context.journal.write(
                "damaged", f"damaged image, replaced by another pair: {fault}", stage=self.plan.name, fault=fault
            )
        damaged = self.progress.damaged + len(batch["faults"])
        if damaged > allowed:
            raise UserError(
                f"{damaged} damaged images, more than data.max_damaged_images allows ({allowed}). "
                f"Run {check_lines(context.train_store)}, or raise the limit: "
                f"it may be raised for --continue too, data.max_damaged_images={2 * damaged}"
            )
        self.progress.damaged = damaged

    def _settle(self) -> None:
        """Wait for the step that is under way, and say what came of it."""
        try:
            self.trainer.settle()
        finally:
            self._tell()

    def _tell(self) -> None:
        """Say what came of the steps that the device has done."""
        meter, plan, every = self.meter, self.plan, self.context.recipe.log_every
        meter.waited += self.trainer.waited_for_decoding()
        for done in self.trainer.settled:
            if done.usable:
                meter.add(done.loss, done.accuracy, done.norm, plan.setting.batch_size, done.parts)
                self.since_validation.append(done.parts.get("pairs", done.loss))
            if meter.steps and plan.logged(done.step, every):
                seconds_left = tell_steps(self.context, plan, done, meter, self.throughput)
                meter.reset()
                if not self.foretold and done.step < plan.total:
                    self._foretell(done.step, seconds_left)
                    self.foretold = True
        self.trainer.settled.clear()

    def _foretell(self, step: int, seconds: float) -> None:
        """Say how long the stage will take, now that its first steps are timed; validations are added."""
        count = -(-self.plan.total // self.plan.validate_every) - step // self.plan.validate_every
        each = self.progress.judge_seconds
        self.context.journal.say(
            f"{self.plan.name}: about {duration(seconds + count * each)} to go ({duration(seconds)} of steps, "
            f"{count} validation{'s' * (count != 1)} of {duration(each)})"
        )

    # ---- judging and saving -----------------------------------------------------------------------------------

    def _judge(self) -> None:
        """Validate, keep ``last`` and perhaps ``best``, and write the state; where that fails, first what was trained."""
        failure = judgement = loss = None
        with self.trainer.judged() as model:
            try:
                judgement = self.judge(model)
                if self.pool_loss is not None:
                    loss = self.pool_loss(model, judgement.features)
            except Exception as error:  # noqa: BLE001 - raised below, when the state is written
                failure = error
            self.unjudged = bool(sum_numbers(float(failure is not None), self.context.device))
            if not self.unjudged and judgement is not None:
                try:
                    on_first(partial(self._say_and_keep, model, judgement, loss), self.context.device)
                except Exception as error:  # noqa: BLE001 - as above; all devices meet one
                    failure, self.unjudged = error, True
        if self.unjudged or judgement is None:
            self._save_what_was_done(all_devices=True)
            raise failure or UserError("the validation failed on another device, which says why")
        self.selection.take(self.trainer.step, judgement.score, judgement.row(), judgement.guard)
        self.progress.judge_seconds = judgement.seconds
        self.since_validation = []
        self.save()

    def _say_and_keep(self, model: DualEncoder, judgement: Judgement, loss: PoolLoss | None) -> None:
        context, plan, step, selection = self.context, self.plan, self.trainer.step, self.selection
        # The run's first score is of another kind where the stage has one of its own.
        run_start = self.progress.start_score if plan.decides == context.recipe.best_by else None
        compared = selection.compared(judgement.score, judgement.guard, run_start)
        words = f"{since_start(self.progress.languages_start, judgement.languages)}{compared}{selection.guard_note(judgement.guard)}"
        training_loss = fmean(self.since_validation) if self.since_validation else None
        tell_validation(context, plan, step, judgement, loss, training_loss, words)
        info = checkpoint_info(context, plan, step, self.progress.token, verdict(judgement))
        self.kept.save("last", model, info)
        if selection.beats(judgement.score, judgement.guard):
            self.kept.save("best", model, info)
        examples = find_examples(judgement.features, next(iter(context.valid_stores.values())))
        context.journal.picture(f"{plan.name}/example queries", draw_panel(examples), step)

    def _keep_epoch(self) -> None:
        """Keep the weights that would be judged, as they are after this epoch."""
        name = f"{EPOCH}{self.trainer.step // self.plan.order.steps_per_epoch}"
        with self.trainer.judged() as model:
            info = checkpoint_info(self.context, self.plan, self.trainer.step, self.progress.token, {})
            self._keep(name, model, info)

    def _keep(self, name: str, model: DualEncoder, info: dict[str, Any]) -> None:
        on_first(partial(self.kept.save, name, model, info), self.context.device)

    def save(self) -> None:
        """Write the state to continue from; training goes on while the file is written."""
        self._settle()
        state = self.trainer.state_dict()
        selection = self.selection.state_dict() | {"sums": self.kept.sums}
        state |= self.progress.state_dict(self.context) | {"selection": selection, "unjudged": self.unjudged}
        state |= {"since_validation": self.since_validation, "meter": self.meter.state_dict()}
        number = self.plan.number * (MOST_STEPS + 1) + self.trainer.step
        on_first(partial(self.states.save, number, state), self.context.device)
        self.saved = self.trainer.step

    def _save_what_was_done(self, all_devices: bool = False) -> None:
        """Before a fault that comes between two steps ends the run. Other devices must be at the same place."""
        if self.saved == self.trainer.step or (self.context.world > 1 and not all_devices):
            return
        try:
            self.save()
            self.states.wait()
        except UserError as unsaved:
            self.context.journal.say(str(unsaved))

    # ---- when the stage is over ---------------------------------------------------------------------------------

    def _finish(self) -> None:
        """Interpolate where that is wanted, and put the best weights into the model."""
        context, plan, kept, so_far = self.context, self.plan, self.kept, self.selection.so_far
        if so_far.best == float("-inf"):  # goes on from before starts were candidates
            raise NothingKept(
                f"stage {plan.name}: no validation kept within the guard's limit, so there is no best model, and going on "
                f"would not change that. {kept.folder / 'last'} is the last one. Start a new run with "
                f"{self._gentler()}, and --overwrite or another output=FOLDER."
            )
        if so_far.best_step == 0:
            on_first(self._keep_start, self.context.device)
            note = Said(
                "stage {stage} brought nothing: no validation beat its start ({best:.2f}), which stays",
                "阶段 {stage} 没有带来提升：没有一次验证超过其起点（{best:.2f}），保留起点",
                stage=plan.name,
                best=so_far.best,
            )
            if so_far.guard_broken:
                note = Said(
                    "stage {stage} brought nothing: no validation within the guard's limit beat its start ({best:.2f}), which "
                    "stays. Give {gentler}",
                    "阶段 {stage} 没有带来提升：在防遗忘划分的限度之内没有一次验证超过其起点（{best:.2f}），保留起点。可设 {gentler}",
                    stage=plan.name,
                    best=so_far.best,
                    gentler=self._gentler(),
                )
            context.journal.write("unchanged", note, stage=plan.name, score=so_far.best)
            self.progress.notes = [*self.progress.notes, note]
        elif plan.setting.interpolate and not self.interpolated:
            self._interpolate(plan.setting.interpolate)
        on_first(partial(tell_findings, context, plan.name), context.device)  # it reads the whole journal
        context.accelerator.wait_for_everyone()  # all have read what is cleared
        on_first(kept.clear_start, context.device)
        self.model.load_state_dict(kept.weights("best", self.model))

    def _keep_start(self) -> None:
        if "best" not in self.kept.sums:
            self.kept.start_is_best(self.model)

    def _gentler(self) -> str:
        """What may keep a stage within the guard's limit, to type."""
        guard = self.context.recipe.data.guard
        higher = [f"data.guard.max_drop={2 * guard.max_drop or 1:g}"] if guard else []
        lower = f"stages.{self.plan.name}.learning_rate={self.plan.setting.learning_rate / 4:.2g}"
        return joined([lower, *higher], ", or ", " 或 ")

    def _interpolate(self, steps: int) -> None:
        context, kept, model, journal = self.context, self.kept, self.model, self.context.journal
        if not context.from_main(kept.has_start):
            journal.say(f"{kept.folder / 'start'} is gone: nothing is interpolated, the best checkpoint stays")
            return
        won = interpolate(
            model,
            kept.weights("start", model),
            kept.weights("best", model),
            steps,
            judge=self.judge,
            selection=self.selection,
            journal=journal,
            stage=self.plan.name,
            by=self.plan.decides,
        )
        if won is not None:
            alpha, judgement = won
            info = checkpoint_info(context, self.plan, self.trainer.step, self.progress.token, verdict(judgement))
            self._keep("best", model, info | {"interpolated": alpha})

    def outcome(self) -> dict[str, Any]:
        """What was found of the weights the stage ends with: the start of the next one."""
        so_far = self.selection.so_far
        info = read_info(self.kept.folder / "best")
        return {key: info.get(key) for key in VERDICT} | {"score": so_far.best, "row": so_far.best_row}
