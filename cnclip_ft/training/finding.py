"""One finding over a stage of a run, and what a rule is that makes some."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cnclip_ft.training.stage_records import StageRecords
from data_tools.words import Said

WHERE = Said("(docs/training.md#what-a-run-shows)", "（docs/training.zh-CN.md#训练看到了什么）")


@dataclass(frozen=True)
class Finding:
    """`saw`: what the numbers are; `means`: what that may mean; `do`: settings to give. `name` tells the findings of a stage apart."""

    name: str
    stage: str
    saw: Said
    means: Said | None = None
    do: Said | None = None

    def sentences(self) -> list[Said]:
        """All of it, one behind the other."""
        more = [part for part in (self.means, self.do) if part is not None]
        return [self.saw, *more, *([WHERE] if more else [])]


Rule = Callable[[StageRecords], list[Finding]]


def key(stage: StageRecords, name: str) -> str:
    """A setting of the stage as it is typed."""
    return f"stages.{stage.name}.{name}"


def longer(stage: StageRecords) -> str:
    """Twice as long, to type."""
    epochs, steps = stage.setting("epochs"), stage.setting("steps")
    if epochs:
        return key(stage, f"epochs={2 * epochs:g}")
    return key(stage, f"steps={2 * (steps or stage.lines[-1]['step'])}")


def rate(stage: StageRecords, factor: float, tower: str | None = None) -> str:
    """The rate times `factor`, to type: of one tower where the recipe has a table with a rule for it, else of all."""
    number, given = stage.about.get("rules", {}).get(tower), stage.setting("learning_rate")
    part = {"image": "image_trunk", "text": "text_trunk"}.get(tower or "", tower or "")
    of_part = stage.about.get("rates", {}).get(part)
    if number is not None and of_part and given:
        return key(stage, f"train.{number}.rate={of_part / given * factor:.2g}")
    given = given or max((line["rate"] for line in stage.lines), default=1e-5)
    return key(stage, f"learning_rate={given * factor:.2g}")
