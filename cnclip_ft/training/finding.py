"""One finding over a stage of a run, and what a rule is that makes some."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cnclip_ft.training.stage_records import StageRecords
from data_tools.words import Said

_TEMPERATURE = Said("docs/training.md#temperature", "docs/training.zh-CN.md#温度")
_MOVEMENT = Said("docs/training.md#gradients-and-movement", "docs/training.zh-CN.md#梯度与移动")
WHERE = {
    "overfitting": Said("docs/training.md#overfitting", "docs/training.zh-CN.md#过拟合"),
    "still rising": Said("docs/training.md#still-rising", "docs/training.zh-CN.md#仍在上升"),
    "learning nothing": Said("docs/training.md#learning-nothing", "docs/training.zh-CN.md#什么也没学到"),
    "start stays": Said("docs/training.md#the-start-stays", "docs/training.zh-CN.md#起点保留"),
    "temperature at its limit": _TEMPERATURE,
    "temperature moving": _TEMPERATURE,
    "gradients clipped": _MOVEMENT,
    "image tower still": _MOVEMENT,
    "text tower still": _MOVEMENT,
    "towers apart": _MOVEMENT,
    "spikes": Said("docs/training.md#spikes", "docs/training.zh-CN.md#损失突升"),
    "waiting for data": Said("docs/training.md#waiting-for-data", "docs/training.zh-CN.md#等待数据"),
}


@dataclass(frozen=True)
class Finding:
    """`saw`: what the numbers are; `means`: what that may mean; `do`: settings to give. `name` tells the findings of a stage apart."""

    name: str
    stage: str
    saw: Said
    means: Said | None = None
    do: Said | None = None

    @property
    def where(self) -> Said | None:
        """The section of the documentation with its reasons; None where there is nothing to explain."""
        return WHERE.get(self.name)

    def sentences(self) -> list[Said]:
        """All of it, one behind the other."""
        where = None if self.where is None else Said("({where})", "（{where}）", where=self.where)
        return [part for part in (self.saw, self.means, self.do, where) if part is not None]


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


def _table(stage: StageRecords, factor: float, tower: str) -> str:
    """What a stage without a table trains, as a table in which `tower` has `factor` times the rate of the others."""
    trains = stage.about["rates"]
    rules = []
    for each in ("image", "text", "temperature", *["heads"] * ("heads" in trains)):
        times = (factor if each == tower else 1.0) * (each in trains or f"{each}_trunk" in trains)
        part = ""
        if not times and f"{each}_projection" in trains:  # a new one, which trains along
            rules.append(f"{{tower: {each}, part: projection}}")
            part = "part: rest, "
        rules.append(f"{{tower: {each}, {part}rate: {times:g}}}")
    return f"[{', '.join(rules)}]"


def rate(stage: StageRecords, factor: float, tower: str | None = None) -> str:
    """The rate times `factor`, to type: of one tower by its rule, in a table made for it where the recipe has none, or of all."""
    number, given = stage.about.get("rules", {}).get(tower), stage.setting("learning_rate")
    part = {"image": "image_trunk", "text": "text_trunk"}.get(tower or "", tower or "")
    of_part = stage.about.get("rates", {}).get(part)
    if number is not None and of_part and given:
        return key(stage, f"train.{number}.rate={of_part / given * factor:.2g}")
    if of_part and not stage.about.get("rules"):
        return key(stage, f"train='{_table(stage, factor, str(tower))}'")
    given = given or max((line["rate"] for line in stage.lines), default=1e-5)
    return key(stage, f"learning_rate={given * factor:.2g}")
