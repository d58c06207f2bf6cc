"""What a run shows, in words: each finding says what it saw, what that may mean, and what to do.

Pure functions of the journal's records. What a rule needs at least, and why, stands in docs/training.md#what-a-run-shows.
"""

from __future__ import annotations

from collections.abc import Iterable

from cnclip_ft.training.finding import Finding, Rule
from cnclip_ft.training.findings_learning import LEARNING
from cnclip_ft.training.findings_steps import STEPS
from cnclip_ft.training.stage_records import Record, StageRecords, stages_of
from data_tools.words import Said, joined

__all__ = ["Finding", "findings", "in_short"]

_FEWEST_LINES, _FEWEST_VALIDATIONS = 5, 3  # below both there is nothing to go by
_NOTHING = "nothing"
_INSTEAD = {  # what is not said beside another, in turn: it would be untrue, or advise other values for the same settings
    "still rising": ("learning nothing",),
    "learning nothing": ("overfitting", "start stays"),
    "overfitting": ("still rising",),
}


def findings(records: Iterable[Record], stage: str | None = None) -> list[Finding]:
    """What the stages of a journal show, in their order; of a stage with nothing to remark one finding says so.

    Args:
        stage: this one alone.
    """
    found: list[Finding] = []
    for each in stages_of(records):
        if stage is None or each.name == stage:
            found += _of_stage(each, (*LEARNING, *STEPS)) or [_nothing(each)]
    return found


def _of_stage(stage: StageRecords, rules: Iterable[Rule]) -> list[Finding]:
    found: dict[str, Finding] = {}
    if _too_short(stage):
        return []
    for rule in rules:
        for finding in rule(stage):
            found.setdefault(finding.name, finding)
    for name, others in _INSTEAD.items():
        if name in found:
            for other in others:
                found.pop(other, None)
    return list(found.values())


def _too_short(stage: StageRecords) -> bool:
    return len(stage.lines) < _FEWEST_LINES and len(stage.validations) < _FEWEST_VALIDATIONS


def _nothing(stage: StageRecords) -> Finding:
    counts = {"lines": len(stage.lines), "validations": len(stage.validations)}
    if _too_short(stage):
        saw = Said(
            "Too short to say anything: lines of steps {lines}, validations {validations}.",
            "太短，说不出什么：训练日志 {lines} 行，验证 {validations} 次。",
            **counts,
        )
    else:
        saw = Said(
            "Nothing to remark (lines of steps {lines}, validations {validations}).",
            "没有需要说明的（训练日志 {lines} 行，验证 {validations} 次）。",
            **counts,
        )
    return Finding(_NOTHING, stage.name, saw)


def in_short(stage: str, found: Iterable[Finding]) -> Said:
    """For a terminal: what was seen, what to do, and where the reasons stand."""
    lines: list[str] = [Said("What stage {stage} shows:", "阶段 {stage} 看到了什么：", stage=stage)]
    for each in found:
        parts = [each.saw, *([each.do] if each.do else [])]
        if each.where is not None:
            parts.append(Said("({where})", "（{where}）", where=each.where))
        lines.append(joined(["  * ", joined(parts, " ", "")], ""))
    return joined(lines)
