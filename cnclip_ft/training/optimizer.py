"""One table says what trains and how fast; the optimizer is built from it, and the rate follows a curve.

Every parameter of the model, and the bias a sigmoid loss will give it, is covered by exactly one rule, or the recipe is refused.
Biases, norms, embeddings, the temperature and its bias get no weight decay.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from cnclip_ft.models.contract import Tower
from cnclip_ft.models.dual_encoder import DualEncoder
from cnclip_ft.models.heads import GroundingHeads
from cnclip_ft.recipe import Stage
from cnclip_ft.recipe_stage import Lora, TrainRule
from cnclip_ft.training.loss import Aim
from data_tools.errors import RequestError


@dataclass(frozen=True)
class Entry:
    """One parameter's line of the table; `rate` 0 is frozen."""

    name: str
    parameter: nn.Parameter
    tower: str
    rate: float
    decays: bool
    lora: Lora | None = None  # the rate is that of its low-rank update
    linear: bool = False  # the weight of an nn.Linear
    projection: bool = False  # of the tower's last map


def rules_for(stage: Stage, new_parts: list[str]) -> list[TrainRule]:
    """The stage's table; the names text, image and both are tables too.

    `new_parts` are module paths without pretrained weights. A new projection on a frozen trunk trains along:
    frozen at random it would only throw information away.
    """
    if isinstance(stage.train, list):
        return stage.train
    rules = [TrainRule(tower="temperature")]
    if stage.kind == "ground":
        rules.append(TrainRule(tower="heads"))
    for tower in ("image", "text"):
        if stage.train in (tower, "both"):
            rules.append(TrainRule(tower=tower))
        elif any(part.startswith(f"{tower}_tower.") for part in new_parts):
            rules += [TrainRule(tower=tower, part="projection"), TrainRule(tower=tower, part="trunk", rate=0)]
        else:
            rules.append(TrainRule(tower=tower, rate=0))
    return rules


def training_table(
    model: DualEncoder, objective: Aim, rules: list[TrainRule], heads: GroundingHeads | None = None
) -> list[Entry]:
    """Cover every parameter with exactly one rule; the temperature's is for the bias too, where the objective has one.

    Args:
        heads: of a stage that learns boxes, which the model may have yet to be given; elsewhere they stay as they are.

    Raises:
        RequestError: a parameter that no rule or that two rules cover, or a rule that covers nothing.
    """
    entries: list[Entry] = []
    used: set[int] = set()
    for tower_name, tower in (("image", model.image_tower), ("text", model.text_tower)):
        depth = _depths(tower)
        top = max(depth.values(), default=0)
        linear = {id(m.weight) for m in tower.modules() if isinstance(m, nn.Linear)}
        for name, parameter in tower.named_parameters():
            full = f"{tower_name}_tower.{name}"
            place = depth.get(id(parameter), top)
            projection = tower.in_projection(name)
            rule = _one_rule(full, tower_name, projection, place, top, rules, used)
            rate = rule.rate * rule.layer_decay ** (top - place)
            decays, is_linear = tower.decays(name, parameter), id(parameter) in linear
            entries.append(Entry(full, parameter, tower_name, rate, decays, rule.lora, is_linear, projection))
    rate = _one_rule("logit_scale", "temperature", False, 0, 0, rules, used).rate
    entries.append(Entry("logit_scale", model.logit_scale, "temperature", rate, False))
    bias = model.logit_bias
    if bias is None and objective.biased:  # the model gets it when the stage begins
        bias = nn.Parameter(torch.tensor(objective.initial_logit_bias))
    if bias is not None:
        entries.append(Entry("logit_bias", bias, "temperature", rate if objective.biased else 0.0, False))
    for name, parameter in heads.named_parameters() if heads is not None else ():
        rule = _one_rule(f"heads.{name}", "heads", False, 0, 0, rules, used)
        entries.append(Entry(f"heads.{name}", parameter, "heads", rule.rate, parameter.ndim >= 2))
    for number, rule in enumerate(rules):
        if number not in used and rule.part != "rest":
            raise RequestError(
                f"the train table's rule ({rule.tower}, {rule.part}) covers no parameter: take it out, or give it another part with stages.STAGE.train.{number}.part=PART"
            )
    if not any(entry.rate for entry in entries if entry.tower != "temperature"):
        raise RequestError(
            "the stage trains nothing: every tower is frozen. Give a tower a rate above 0, stages.STAGE.train.N.rate=1"
        )
    return entries


def _depths(tower: Tower) -> dict[int, int]:
    """Parameter → number of its block, counted from the input; the projection is the last."""
    return {id(p): number for number, block in enumerate(tower.blocks()) for p in block.parameters()}


def _one_rule(
    full: str, tower: str, projection: bool, place: int, top: int, rules: list[TrainRule], used: set[int]
) -> TrainRule:
    matches, rest = [], []
    for number, rule in enumerate(rules):
        if rule.tower != tower:
            continue
        if rule.part == "rest":
            rest.append(number)
        elif _covers(rule.part, projection, place, top):
            matches.append(number)
    matches = matches or rest
    if len(matches) != 1:
        said = "no rule covers" if not matches else f"{len(matches)} rules cover"
        advice = (
            "Add {tower: heads}: they are what learns boxes."
            if tower == "heads"
            else "Add {tower: " + tower + ", part: rest, rate: 0} to freeze what is left."
        )
        raise RequestError(
            f"{said} {full} in the train table; every parameter needs exactly one. " + ("" if matches else advice)
        )
    used.add(matches[0])
    return rules[matches[0]]


def _covers(part: str, projection: bool, place: int, top: int) -> bool:
    if part in ("all", "trunk", "projection"):
        return part == "all" or (part == "projection") == projection
    word, count = part.split()
    # Blocks are stem, layers, projection: "last N" counts layers, "first N" the stem too; neither the projection.
    return not projection and (place >= top - int(count) if word == "last" else place < int(count))


def give_bias(model: DualEncoder, objective: Aim) -> None:
    """Before a loss with a bias first trains `model`: its bias, and the temperature that goes with it."""
    if objective.biased and model.logit_bias is None:
        scale = model.logit_scale.data.fill_(objective.initial_logit_scale)
        model.logit_bias = nn.Parameter(torch.full_like(scale, objective.initial_logit_bias))


def apply_entries(model: DualEncoder, entries: list[Entry]) -> None:
    """What the entries name as trained asks for a gradient, nothing else does."""
    model.requires_grad_(False)
    for entry in entries:
        entry.parameter.requires_grad_(entry.rate > 0 and entry.lora is None)


def build_optimizer(entries: list[Entry], stage: Stage, device: torch.device) -> torch.optim.AdamW:
    """AdamW with one group per (rate factor, decay). `peak` in each group is the rate the curve is multiplied with.

    Temperature and bias have groups of their own: under FSDP2 they stay whole, and one group cannot hold both.
    """
    groups: dict[tuple[float, bool, bool], dict] = {}
    for entry in entries:
        if entry.rate:
            group = groups.setdefault(
                (entry.rate, entry.decays, entry.tower == "temperature"),
                {
                    "params": [],
                    "names": [],
                    "peak": stage.learning_rate * entry.rate,
                    "weight_decay": stage.weight_decay if entry.decays else 0.0,
                },
            )
            group["params"].append(entry.parameter)
            group["names"].append(entry.name)
    for group in groups.values():
        group.pop("names")
    fused = device.type in ("cuda", "cpu")
    return torch.optim.AdamW(
        list(groups.values()), lr=stage.learning_rate, betas=stage.betas, eps=stage.eps, fused=fused
    )


class RateCurve:
    """Linear warm-up, then cosine (or constant): a factor on every group's peak rate, for steps 0 … total − 1."""

    def __init__(self, stage: Stage, total_steps: int) -> None:
        self.total = total_steps
        self.warmup = stage.warmup_steps if stage.warmup_steps is not None else min(100, total_steps // 10)
        if self.warmup >= total_steps:
            raise RequestError(
                f"warmup_steps is {self.warmup}, but the stage has only {total_steps} steps: the full rate would never "
                f"be reached. Give warmup_steps={max(total_steps // 10, 0)}, or train longer."
            )
        self.kind, self.final = stage.schedule, stage.final_rate

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.kind == "constant":
            return 1.0
        progress = (step - self.warmup) / (self.total - self.warmup)
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * progress))

    def set(self, optimizer: torch.optim.Optimizer, step: int) -> float:
        """Set the rates for `step`; returns the factor."""
        factor = self(step)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        return factor
