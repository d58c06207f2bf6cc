"""What a search may change of a stage, and how: every axis is relative to the recipe, whose own settings are the first trial."""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cnclip_ft.recipe import Stage
from cnclip_ft.recipe_stage import TrainRule
from cnclip_ft.training.loss import ContrastiveObjective
from cnclip_ft.training.optimizer import rules_for
from cnclip_ft.training.stage_plan import StagePlan, trunk_trains
from cnclip_ft.yaml_file import parse_yaml
from data_tools.errors import RequestError
from data_tools.words import Said

if TYPE_CHECKING:
    import optuna

Values = dict[str, Any]
_CHINESE = {
    "rate": "学习率", "image rate": "图像塔学习率", "heads rate": "投影与温度的学习率", "batch size": "批大小", "length": "训练长度",
    "weight decay": "权重衰减", "averaged over": "权重平均", "label smoothing": "标签平滑", "crop": "裁剪", "patch dropout": "图块丢弃", "captions at once": "同时展示的文本数",
    "layer decay": "逐层衰减", "lora": "LoRA",
}  # fmt: skip
_LORA_RATE = (
    10.0  # low-rank updates start at zero and want a rate about ten times that of whole weights (arXiv 2106.09685)
)
_FEWEST = 8  # pairs of a batch, per device


@dataclass(frozen=True)
class Axis:
    """One thing to search over.

    `choices`, or a range from `low` to `high` in which factors are equally likely, of whole numbers where `own` is one. `own` is
    what the recipe has.
    """

    name: str
    own: Any
    choices: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0

    @property
    def said(self) -> Said:
        """Its name in both languages; a key of a recipe is the same in both."""
        return Said(self.name, _CHINESE.get(self.name, self.name))

    def distribution(self) -> optuna.distributions.BaseDistribution:
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        if self.choices:
            return CategoricalDistribution(self.choices)
        if isinstance(self.own, int):
            return IntDistribution(int(self.low), int(self.high), log=True)
        return FloatDistribution(self.low, self.high, log=True)

    def shown(self, value: Any) -> str:
        return f"{value:.3g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Space:
    """The axes of one stage, and what is needed to make a stage of a trial's values.

    Args:
        setting: the stage as the recipe has it.
        steps: its length.
        rules: its table of what trains.
        keys: of axes the user gave: the key of the stage they set.
    """

    name: str
    setting: Stage
    steps: int
    rules: tuple[TrainRule, ...]
    axes: tuple[Axis, ...]
    keys: dict[str, str] = field(default_factory=dict)

    def own(self) -> Values:
        """The values under which a trial is the recipe itself."""
        return {axis.name: axis.own for axis in self.axes}

    def stage(self, values: Values) -> dict[str, Any]:
        """The stage of a trial as a recipe has it, its length in steps."""
        stage = self.setting.model_dump(mode="json")
        get = self.own() | values
        batch = int(get.get("batch size", self.setting.batch_size))
        seen = self.steps * self.setting.batch_size * get.get("length", 1.0)
        stage |= {"batch_size": batch, "epochs": None, "steps": max(2, round(seen / batch))}
        if batch > self.setting.batch_size and self.setting.micro_batch_size is None:
            stage["micro_batch_size"] = (
                self.setting.batch_size
            )  # what fitted before, with the exact gradient of the batch
        if stage["warmup_steps"] is not None:
            stage["warmup_steps"] = round(stage["warmup_steps"] * stage["steps"] / self.steps)
        if stage["unmasked_steps"]:
            stage["unmasked_steps"] = round(stage["unmasked_steps"] * stage["steps"] / self.steps)
        stage["learning_rate"] = self.setting.learning_rate * get.get("rate", 1.0)
        stage["validate_every"] = max(1, stage["steps"] // VALIDATIONS)
        for key in ("weight_decay", "patch_dropout", "captions_at_once"):
            stage[key] = get.get(key.replace("_", " "), stage[key])
        stage["augment"]["crop"] = get.get("crop", stage["augment"]["crop"])
        stage["objective"]["label_smoothing"] = get.get("label smoothing", stage["objective"]["label_smoothing"])
        if get.get("averaged over") not in (None, "own"):
            stage["ema"] = _decay(get["averaged over"], stage["steps"])
        if any(name in get for name in ("image rate", "heads rate", "layer decay", "lora")):
            stage["train"] = [rule.model_dump(mode="json") for rule in self._rules(get)]
        for name, key in self.keys.items():
            _put(stage, key, get[name])
        return stage

    def _rules(self, get: Values) -> list[TrainRule]:
        """The table with the trial's rates: the rule of a whole tower becomes one for its trunk and one for its projection."""
        heads, rank = get.get("heads rate", 1.0), get.get("lora", "none")
        made = []
        for rule in self.rules:
            if rule.rate == 0:
                made.append(rule)
            elif rule.tower == "temperature" or rule.part == "projection":
                made.append(_changed(rule, rate=rule.rate * heads))
            else:
                rate = rule.rate * (get.get("image rate", 1.0) if rule.tower == "image" else 1.0)
                part = "trunk" if rule.part == "all" else rule.part
                if rule.part == "all":
                    made.append(_changed(rule, part="projection", rate=rule.rate * heads, layer_decay=1.0, lora=None))
                if rank != "none":
                    lora = {"rank": int(rank), "alpha": 2 * int(rank)}
                    made.append(_changed(rule, part=part, rate=rate * _LORA_RATE, layer_decay=1.0, lora=lora))
                else:
                    made.append(
                        _changed(rule, part=part, rate=rate, layer_decay=get.get("layer decay", rule.layer_decay))
                    )
        return made


VALIDATIONS = 6  # of a trial: where it may be given up


def axes_of(
    plan: StagePlan, new_parts: list[str], pairs: int, world: int, patches: bool, captions: float = 1.0
) -> Space:
    """What is worth changing of a stage.

    Args:
        new_parts: of the start (`training.optimizer.rules_for`).
        pairs: of the training data. captions: of one of its pictures, on average.
        patches: whether the image tower can leave patches out.
    """
    setting, rules = plan.setting, tuple(rules_for(plan.setting, new_parts))
    image, text = not plan.image_frozen, trunk_trains(plan.entries, "text")
    whole = [rule for rule in rules if rule.rate and rule.tower != "temperature" and rule.part != "projection"]
    with_lora = any(rule.lora for rule in rules)
    axes = [Axis("rate", 1.0, low=1 / 8, high=8.0)]
    if image and text:
        axes.append(Axis("image rate", 1.0, low=1 / 16, high=4.0))
    axes.append(Axis("heads rate", 1.0, low=0.5, high=16.0))
    largest = max(pairs // 4, setting.batch_size)
    sizes = sorted(
        size
        for size in (setting.batch_size * 2**power // 4 for power in range(6))
        if (_FEWEST * world <= size <= largest and size % world == 0) or size == setting.batch_size
    )
    axes.append(Axis("batch size", setting.batch_size, tuple(sizes)))
    axes.append(Axis("length", 1.0, (0.5, 0.75, 1.0, 1.5, 2.0)))
    axes.append(_number("weight decay", setting.weight_decay, (0.0, 1e-3, 1e-2, 0.1)))
    spans: tuple[Any, ...] = (0.0, 0.02, 0.05, 0.1)
    own_span = 0.0 if setting.ema is None else "own"
    if own_span not in spans:
        spans = (own_span, *spans)
    axes.append(Axis("averaged over", own_span, spans))
    if isinstance(plan.objective, ContrastiveObjective):
        axes.append(_number("label smoothing", setting.objective.label_smoothing, (0.0, 0.05, 0.1)))
    if image:
        if not plan.cached and setting.augment.crop:
            # crops of a size of their own need to be crops
            spread = (0.6, 0.8, 1.0) if setting.augment.size is None else (0.6, 0.8)
            axes.append(_number("crop", setting.augment.crop, spread))
        if captions >= 2 and plan.distilling is None and plan.grounding is None:
            shown = {setting.captions_at_once, 1, min(3, int(captions))}
            axes.append(Axis("captions at once", setting.captions_at_once, tuple(sorted(shown))))
        if patches:
            axes.append(_number("patch dropout", setting.patch_dropout, (0.0, 0.25, 0.5)))
    if whole and not with_lora:
        decays = {rule.layer_decay for rule in whole}
        if len(decays) == 1:
            axes.append(_number("layer decay", decays.pop(), (0.75, 0.9, 1.0)))
        if importlib.util.find_spec("peft") is not None and text:
            axes.append(Axis("lora", "none", ("none", "8", "32")))
    return Space(plan.name, setting, plan.total, rules, tuple(axes))


def given_axes(space: Space, given: Iterable[str]) -> Space:
    """The space of a stage with the axes a user gave instead: ``stages.NAME.key=1e-6..1e-4`` or ``…=0.5,1,null``.

    Raises:
        RequestError: not of this form, or no key of the stage.
    """
    axes, keys = [], {}
    for text in given:
        path, _, found = text.partition("=")
        key = path.removeprefix(f"stages.{space.name}.")
        own = _get(space.setting.model_dump(mode="json"), key, path)
        span = re.fullmatch(r"\s*([^.,\s][^,\s]*?)\.\.([^,\s]+)\s*", found)
        keys[key] = key
        if span:
            low, high = (_positive(end, text) for end in span.groups())
            if low >= high:
                raise RequestError(f"--search {text}: {span[1]} is not below {span[2]}")
            if isinstance(own, bool) or not isinstance(own, (int, float)) or not low <= own <= high:
                raise RequestError(
                    f"--search {text}: the recipe's own value, {own}, is the first trial, and lies outside; widen the range, or set "
                    f"{path} to a value within"
                )
            if isinstance(own, int) and not (low.is_integer() and high.is_integer()):
                raise RequestError(f"--search {text}: {path} is a whole number; give a range of whole numbers")
            if isinstance(own, int):
                low, high = int(low), int(high)
            axes.append(Axis(key, own, low=low, high=high))
        else:
            choices = tuple(parse_yaml(part) for part in found.split(",") if part.strip())
            if len(choices) < (1 if own not in choices else 2) or any(isinstance(c, (dict, list)) for c in choices):
                raise RequestError(
                    f"--search {text}: name a range, LOW..HIGH, or two values or more with commas between them"
                )
            choices = choices if own in choices else (own, *choices)
            axes.append(Axis(key, own, choices))
    return Space(space.name, space.setting, space.steps, space.rules, tuple(axes), keys) if axes else space


def _number(name: str, own: float, usual: tuple[float, ...]) -> Axis:
    return Axis(name, own, tuple(sorted({*usual, own})))


def _decay(span: float, steps: int) -> float | None:
    """The decay of an average whose memory is `span` of the stage; None where that is less than two steps."""
    memory = span * steps
    return None if memory < 2 else 1 - 1 / memory


def _changed(rule: TrainRule, **values: Any) -> TrainRule:
    return TrainRule.model_validate(rule.model_dump() | values)


def _positive(text: str, whole: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not (number > 0 and math.isfinite(number)):
        raise RequestError(
            f"--search {whole}: {text!r} is no number above 0, as a range needs; list values with commas instead"
        )
    return number


def _get(stage: dict[str, Any], key: str, path: str) -> Any:
    place: Any = stage
    for part in key.split("."):
        if not isinstance(place, dict) or part not in place:
            raise RequestError(f"--search {path}: the stage has no such key; cnclip-ft recipe keys lists them")
        place = place[part]
    if isinstance(place, (dict, list)):
        raise RequestError(f"--search {path} is a section; name a key in it")
    return place


def _put(stage: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        stage = stage[parent]
    stage[last] = value
