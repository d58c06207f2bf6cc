"""Which checkpoint of a stage is kept, and whether the stage has learnt what it can: decided by recall on validation."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from cnclip_ft.collectives import sum_numbers
from cnclip_ft.models.checkpoints import (
    CHECKPOINT,
    INFO,
    WEIGHTS_SUM,
    checkpoint_checksum,
    mend_checkpoint,
    read_info,
    save_checkpoint,
    saved_state,
)
from cnclip_ft.training.journal import duration
from cnclip_ft.training.lora import merged
from cnclip_ft.training.validation import Judgement
from data_tools.errors import RequestError, UserError

if TYPE_CHECKING:
    from cnclip_ft.training.stage import StageRun


class NothingKept(UserError):
    """A stage ended without a model that may be kept: the run cannot go on."""


class Selection:
    """Judges the weights of a stage, keeps ``last`` and ``best``, and says in `ended` why the stage is over early.

    All devices judge, only the first writes; what is decided here is decided the same way on all of them.
    """

    def __init__(self, stage: StageRun) -> None:
        self.stage, self.setting, self.run = stage, stage.stage, stage.run
        self.folder = self.run.folder / stage.name
        self.best, self.best_step = float("-inf"), 0
        self.best_row: dict[str, float | None] = {}
        self.risen_to, self.without_rise = float("-inf"), 0  # for the plateau
        self.ended: str | None = None
        self.guard_broken = False
        self.sums: dict[str, str] = {}  # sha256 of the weights kept as best and start, on the first device
        self.interpolated = False

    def keep_start(self) -> None:
        """The weights the stage begins with, where they are wanted at its end."""
        if self.setting.interpolate and self.run.accelerator.is_main_process:
            info = {"stage": self.stage.name, "step": 0}
            self.sums["start"] = save_checkpoint(self.run.model, self.folder / "start", info=info)

    @contextmanager
    def judged_weights(self):
        """In the run's model, those that are judged and kept: averaged if there is an average, low-rank updates merged."""
        stage, run = self.stage, self.run
        weights = stage.average.average if stage.average is not None else {}
        with run.sharding.gathered(stage.model, run.model, weights), merged(run.model):
            yield

    def judge(self) -> Exception | None:
        """Recall on the validation splits; keep ``last``, and ``best`` when it is. Returns what went wrong, on the first device."""
        stage, run = self.stage, self.run
        score, within, failure = 0.0, True, None
        with self.judged_weights():
            try:
                judgement = run.judge(run.model)
                run.judge_seconds = judgement.seconds
                score, within = judgement.score, self._within_guard(judgement)
                if run.accelerator.is_main_process:
                    self._say_and_keep(judgement)
            except Exception as error:  # noqa: BLE001 - raised by the stage, when the state is written
                failure = error
        if sum_numbers(float(failure is not None), run.device):
            return failure
        if score > self.best and within:
            self.best, self.best_step = score, stage.step
        if not within:
            self.guard_broken = True
            self.ended = "the guard split lost more than data.guard.max_drop allows"
        self._watch_plateau(score)
        return None

    def _say_and_keep(self, judgement: Judgement) -> None:
        stage, run = self.stage, self.run
        score, within = judgement.score, self._within_guard(judgement)
        run.journal.write(
            "validation", f"{stage.name} {stage.step}/{stage.total} | mean recall {judgement.mean_recall:.2f}"
            f"{judgement.details()} ({duration(judgement.seconds)}){self._compare(score)}{self._guard_note(judgement)}",
            stage=stage.name, step=stage.step, mean_recall=judgement.mean_recall, scores=judgement.as_dict(),
        )  # fmt: skip
        info = run.checkpoint_info(stage, judgement)
        save_checkpoint(run.model, self.folder / "last", info=info)
        if score > self.best and within:
            self.sums["best"] = save_checkpoint(run.model, self.folder / "best", info=info)
            self.best_row = judgement.row()
        run.show_examples(stage, judgement)

    def _kept(self, name: str) -> dict[str, torch.Tensor]:
        """Weights of ``best`` or ``start``, as they were written."""
        folder, fault = self.folder / name, None
        if not folder.is_dir():
            fault = "it is gone"
        elif self.run.accelerator.is_main_process and self.sums.get(name) not in (None, checkpoint_checksum(folder)):
            fault = "the weights are not those that were written there; the file is damaged or another"
        if fault:
            raise UserError(
                f"{folder}: {fault}. Bring it back from a copy and go on, or start a new run with model.start={self.folder / 'last'} and another output=FOLDER"
            )
        return saved_state(self.run.model, folder)

    def _watch_plateau(self, score: float) -> None:
        if self.setting.until != "plateau":
            return
        if score >= self.risen_to + self.setting.min_gain:
            self.risen_to, self.without_rise = score, 0
        else:
            self.without_rise += 1
        if self.without_rise >= self.setting.patience and self.ended is None:
            self.ended = (
                f"plateau: no rise of {self.setting.min_gain:g} or more above {self.risen_to:.2f} in "
                f"{self.without_rise} validations"
            )

    def _guard_drop(self, judgement: Judgement) -> float:
        if judgement.guard is None or self.run.guard_start is None:
            return 0.0
        return self.run.guard_start - judgement.guard

    def _within_guard(self, judgement: Judgement) -> bool:
        guard = self.run.recipe.data.guard
        return guard is None or guard.action == "report" or self._guard_drop(judgement) <= guard.max_drop

    def _guard_note(self, judgement: Judgement) -> str:
        guard = self.run.recipe.data.guard
        if guard is None:
            return ""
        drop = self._guard_drop(judgement)
        said = f"  guard {judgement.guard:.2f} ({-drop:+.2f})"
        return said if drop <= guard.max_drop else f"{said} DROPPED BY MORE THAN {guard.max_drop:g}"

    def _compare(self, score: float) -> str:
        start = self.run.start_score
        if start is not None and score < start:
            return (
                f"  BELOW THE START ({start:.2f}): lower the learning rate, or train longer if this is the first epoch"
            )
        return "  best so far" if score > self.best else f"  (best {self.best:.2f} at step {self.best_step})"

    # ---- when the stage is over ---------------------------------------------------------------------------------

    def finish(self) -> None:
        """Interpolate where that is wanted, and put the best weights into the model."""
        run = self.run
        if self.best == float("-inf"):
            raise NothingKept(
                f"stage {self.stage.name}: no validation kept within the guard's limit, so there is no best model, and going on "
                f"would not change that. {self.folder / 'last'} is the last one. Start a new run with a lower learning rate, or a "
                "higher data.guard.max_drop, and --overwrite or another output=FOLDER."
            )
        run.model.load_state_dict(self._kept("best"))
        if self.setting.interpolate:
            there = run.accelerator.is_main_process and (self.folder / "start" / INFO).is_file()
            if sum_numbers(float(there and not self.interpolated), run.device):
                self._interpolate(self.setting.interpolate)
            elif not self.interpolated:
                run.journal.say(f"{self.folder / 'start'} is gone: nothing is interpolated, the best checkpoint stays")
            run.accelerator.wait_for_everyone()  # all have read what is cleared
            if run.accelerator.is_main_process and (self.folder / "start").is_dir():
                CHECKPOINT.clear(self.folder / "start", first=INFO)
        run.accelerator.wait_for_everyone()
        run.model.load_state_dict(self._kept("best"))

    def _interpolate(self, steps: int) -> None:
        """Judge ``(1 − α) · start + α · best`` (arXiv 2109.01903) and keep the best α when it beats the best."""
        run, stage = self.run, self.stage
        start, best = self._kept("start"), self._kept("best")

        def put(alpha: float) -> None:
            mixed = {
                name: torch.lerp(start[name], tensor, alpha) if tensor.is_floating_point() else tensor
                for name, tensor in best.items()
            }
            run.model.load_state_dict(mixed)

        winner, judged, lines = None, None, []
        for number in range(steps + 1):
            alpha = number / steps
            put(alpha)
            judgement = run.judge(run.model)
            lines.append((alpha, judgement.score, self._guard_note(judgement)))
            run.journal.write("interpolation", None, stage=stage.name, step=number, alpha=alpha, score=judgement.score)
            if judgement.score > self.best and self._within_guard(judgement):
                self.best, self.best_row, winner, judged = judgement.score, judgement.row(), alpha, judgement
        run.journal.say(
            f"{stage.name}: weights between its start (α = 0) and its best (α = 1), by {run.recipe.best_by}"
        )
        for alpha, score, note in lines:
            run.journal.say(f"  α {alpha:.2f}  {score:6.2f}{note}{'  kept' if alpha == winner else ''}")
        if winner is None:
            run.journal.say("  none beats the best checkpoint, which stays")
        else:
            put(winner)
            info = run.checkpoint_info(stage, judged) | {"interpolated": winner}
            run.accelerator.wait_for_everyone()  # all have read the best of before
            if run.accelerator.is_main_process:
                self.sums["best"] = save_checkpoint(run.model, self.folder / "best", info=info)

    # ---- state --------------------------------------------------------------------------------------------------

    _KEPT = ("best", "best_step", "best_row", "risen_to", "without_rise", "ended", "guard_broken", "sums")

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._KEPT}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in self._KEPT:
            setattr(self, name, state.get(name, {}) if name == "sums" else state[name])
        later = None
        if self.run.accelerator.is_main_process:
            for kept in (self.folder / "best", self.folder / "start"):
                mend_checkpoint(kept)
            later = self._kept_later()
        if later is not None:
            self.best_step, self.best_row, self.interpolated = later["step"], later["row"], "interpolated" in later
            self.sums["best"] = later[WEIGHTS_SUM]
        self.best = sum_numbers(
            (self.best if later is None else later["score"]) if self.run.accelerator.is_main_process else 0.0,
            self.run.device,
        )

    def _kept_later(self) -> dict[str, Any] | None:
        """What ``best`` says of itself, where this run kept it after the state was written and then ended unawares."""
        folder, own = self.folder / "best", self.sums.get("best")
        try:
            info, found = read_info(folder), checkpoint_checksum(folder)
        except RequestError:
            return None
        later = info.get("run") == self.run.token and info.get("stage") == self.stage.name
        return info if later and found not in (None, own) and found == info.get(WEIGHTS_SUM) else None
