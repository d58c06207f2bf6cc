"""Which weights of a stage are its best, and whether it has learnt what it can: decided on scores alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from cnclip_ft.recipe import Stage
from cnclip_ft.recipe_data import Guard
from data_tools.words import Said, said_in


@dataclass
class Scores:
    """What is remembered of a stage's judgements. A state holds it field by field."""

    best: float = float("-inf")
    best_step: int = 0  # 0: the weights the stage began with
    best_row: dict[str, float | None] = field(default_factory=dict)
    risen_to: float = float("-inf")  # for the plateau
    without_rise: int = 0
    ended: str | None = None  # why the stage is over early
    guard_broken: bool = False


class Selection:
    """Told every score of a stage, beginning with that of its start, it says which is the best and when it is enough.

    Args:
        guard, guard_start: the guard of the recipe, and its score before the run's first step.
        stage: its name, for messages.
    """

    def __init__(
        self, setting: Stage, guard: Guard | None = None, guard_start: float | None = None, stage: str = "STAGE"
    ) -> None:
        self.setting, self.guard, self.guard_start, self.so_far = setting, guard, guard_start, Scores()
        self.stage = stage

    def begin(self, score: float, row: dict[str, float | None]) -> None:
        """The weights the stage begins with are its first candidate."""
        self.so_far = Scores(best=score, best_row=row, risen_to=score)

    def beats(self, score: float, guard: float | None = None) -> bool:
        """Whether this is better than the best so far, and within the guard's limit.

        Where boxes are learnt, trained weights win over the stage's start at an equal score: before the first hit all score 0.
        """
        teach, best = self.setting.teach, self.so_far.best
        better = score > best or (self.setting.kind == "ground" and score == best and not self.so_far.best_step)
        return ((teach is not None and teach.keep == "last") or better) and self.within(guard)

    def within(self, guard: float | None) -> bool:
        """Whether weights with this score on the guard split may be kept."""
        return self.guard is None or self.guard.action == "report" or self._drop(guard) <= self.guard.max_drop

    def take(self, step: int, score: float, row: dict[str, float | None], guard: float | None = None) -> None:
        """A validation after `step` steps."""
        if self.beats(score, guard):
            self.so_far.best, self.so_far.best_step, self.so_far.best_row = score, step, row
        if not self.within(guard):
            self.so_far.guard_broken = True
            self.so_far.ended = Said(
                "the guard split lost more than data.guard.max_drop allows",
                "防遗忘划分的下降超过了 data.guard.max_drop 所允许的",
            )
        self._watch_plateau(score)

    def go_on(self) -> None:
        """The stage is to last longer: what ended it counts no more."""
        self.so_far.ended, self.so_far.without_rise = None, 0

    def take_mixture(self, score: float, row: dict[str, float | None]) -> None:
        """A mixture of start and best that beats the best."""
        self.so_far.best, self.so_far.best_row = score, row

    def _watch_plateau(self, score: float) -> None:
        setting, so_far = self.setting, self.so_far
        if setting.until != "plateau":
            return
        if score >= so_far.risen_to + setting.min_gain:
            so_far.risen_to, so_far.without_rise = score, 0
        else:
            so_far.without_rise += 1
        if so_far.without_rise >= setting.patience and so_far.ended is None:
            so_far.ended = Said(
                "plateau: no rise of {gain:g} or more above {top:.2f} in {times} validations",
                "进入平台期：连续 {times} 次验证没有比 {top:.2f} 高出 {gain:g} 或更多",
                gain=setting.min_gain,
                top=so_far.risen_to,
                times=so_far.without_rise,
            )

    def _drop(self, guard: float | None) -> float:
        return 0.0 if guard is None or self.guard_start is None else self.guard_start - guard

    # ---- in words ---------------------------------------------------------------------------------------------

    def guard_note(self, guard: float | None) -> str:
        """The guard's score and how far it lies from the run's start; nothing without a guard."""
        if self.guard is None or guard is None:
            return ""
        drop = self._drop(guard)
        said = f"  guard {guard:.2f} ({-drop:+.2f})"
        return said if drop <= self.guard.max_drop else f"{said} DROPPED BY MORE THAN {self.guard.max_drop:g}"

    def compared(self, score: float, guard: float | None, run_start: float | None) -> str:
        """How the score stands to the best so far and to that of the run's start, before it is taken."""
        if run_start is not None and score < run_start:
            lower = f"stages.{self.stage}.learning_rate={self.setting.learning_rate / 4:.2g}"
            return f"  BELOW THE START ({run_start:.2f}): lower the rate, {lower}, or train longer if this is the first epoch"
        if self.beats(score, guard):
            return "  best so far"
        where = f"at step {self.so_far.best_step}" if self.so_far.best_step else "where the stage began"
        return f"  (best {self.so_far.best:.2f} {where})"

    # ---- state ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        why = self.so_far.ended  # in both languages, as plain strings
        return asdict(self.so_far) | {"ended": why and [str(why), said_in(why, "zh")]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """States of versions before say in English alone why the stage ended."""
        self.so_far = Scores(**{each.name: state[each.name] for each in fields(Scores)})
        if isinstance(state["ended"], list):
            self.so_far.ended = Said.exactly(*state["ended"])
