"""The trials of a search as lines of ``trials.jsonl``: the file is the search's memory, and what it continues from."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

FILE = "trials.jsonl"
_FEWEST = 4
State = Literal["running", "complete", "pruned", "failed"]


@dataclass
class Trial:
    """One trial of a stage.

    Args:
        values: by axis.
        reports: best score so far by number of the validation, in order.
        start: score before the first step.
        score: of the best weights of a complete one, in percent; those of the start where no validation beat it.
        seconds: that it ran, over all attempts.
        reason: why it was given up, or failed.
    """

    stage: str
    number: int
    values: dict[str, Any]
    state: State = "running"
    score: float | None = None
    seconds: float = 0.0
    reports: dict[int, float] = field(default_factory=dict)
    reason: str = ""
    start: float | None = None

    @property
    def gained_nothing(self) -> bool:
        return self.score is not None and self.start is not None and self.score <= self.start

    def report(self, number: int, score: float) -> float:
        """Take in a validation, of which a run that went on may tell twice; the best so far."""
        self.reports[number] = max([score, *(found for at, found in self.reports.items() if at <= number)])
        return self.reports[number]


class TrialFile:
    """All trials by stage and number; of several lines on one the last counts, and a line that a kill cut off does not."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / FILE
        self.trials: dict[tuple[str, int], Trial] = {}
        if not self.file.exists():
            return
        for line in self.file.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                content = json.loads(line)
                content["reports"] = {int(number): float(score) for number, score in content["reports"].items()}
                trial = Trial(**content)
            except (ValueError, TypeError, KeyError, AttributeError):
                continue
            self.trials[trial.stage, trial.number] = trial

    def write(self, trial: Trial) -> None:
        self.trials[trial.stage, trial.number] = trial
        with self.file.open("ab") as file:
            file.write(
                b"\n" + json.dumps(asdict(trial), ensure_ascii=False).encode() + b"\n"
            )  # a cut line before it ends
            file.flush()
            os.fsync(file.fileno())

    def of(self, stage: str) -> list[Trial]:
        return [trial for trial in self.trials.values() if trial.stage == stage]

    @property
    def seconds(self) -> float:
        return sum(trial.seconds for trial in self.trials.values())


def complete(trials: list[Trial]) -> list[Trial]:
    """Those that ended, the best first; of equals the earlier."""
    ended = [trial for trial in trials if trial.state == "complete" and trial.score is not None]
    return sorted(ended, key=lambda trial: (-(trial.score or 0.0), trial.number))


def behind(trial: Trial, number: int, trials: list[Trial]) -> bool:
    """Whether successive halving gives the trial up after its validation of this number: at 1, 2, 4, … the better half goes on.

    The first trial is the recipe itself and always goes on; of fewer than four there is no half to speak of.
    """
    if number & (number - 1) or trial.number == 0:
        return False
    scores = sorted((each.reports[number] for each in trials if number in each.reports), reverse=True)
    return len(scores) >= _FEWEST and trial.reports[number] < scores[(len(scores) + 1) // 2 - 1]
