"""The lines of a stage: what it is, its steps, its validations, and in words what they show. Each goes to the terminal and the journal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from cnclip_ft.models.dual_encoder import DualEncoder
from cnclip_ft.training.context import Context
from cnclip_ft.training.findings import findings, in_short
from cnclip_ft.training.journal import Meter, duration, read_journal
from cnclip_ft.training.norms import part_of
from cnclip_ft.training.outcome import Outcome
from cnclip_ft.training.stage_plan import StagePlan
from cnclip_ft.training.throughput import Throughput
from cnclip_ft.training.validation import Judgement
from cnclip_ft.training.validation_loss import PoolLoss


def tell_stage(context: Context, plan: StagePlan, model: DualEncoder) -> None:
    """What the findings have to know of a stage, for the journal alone."""
    setting, rates = plan.setting, dict[str, float]()
    for entry in plan.entries:
        if entry.rate:
            rates[part_of(entry)] = max(rates.get(part_of(entry), 0.0), entry.rate * setting.learning_rate)
    rules = setting.train if isinstance(setting.train, list) else []
    context.journal.write(
        "stage",
        stage=plan.name,
        last=plan.number == len(context.recipe.stages) - 1,
        total=plan.total,
        steps_per_epoch=plan.order.steps_per_epoch,
        # With the teacher alone the loss of the pairs is only looked at.
        objective="distillation" if setting.distill is not None and not setting.distill.pairs else plan.objective.kind,
        keeps="best" if setting.teach is None else setting.teach.keep,
        rates=rates,
        # The first rule of each tower that trains, by its place in the table of the recipe.
        rules={
            rule.tower: number
            for number, rule in reversed(list(enumerate(rules)))
            if rule.rate and rule.part != "projection"
        },
        new=[tower for tower in ("image", "text") if f"{tower}_tower" in context.new_parts],
        held=model.logit_bias is None and not plan.objective.biased,  # the temperature, in its limits
        workers=context.recipe.data.workers,
        crops=plan.grounding is None and setting.augment.crop == 1,  # whether pictures may yet be cropped
        settings={
            name: getattr(setting, name)
            for name in ("epochs", "steps", "batch_size", "learning_rate", "gradient_clip", "until", "patience")
        },
    )


def tell_steps(context: Context, plan: StagePlan, done: Outcome, meter: Meter, throughput: Throughput | None) -> float:
    """A line over the steps since the one before; returns the seconds that the steps to come will take."""
    summary, scale, rate = meter.summary(), math.exp(done.logit_scale), done.rate
    told: dict[str, Any] = {} if done.logit_bias is None else {"logit_bias": done.logit_bias}
    bias = "" if done.logit_bias is None else f"bias {done.logit_bias:.1f} | "
    left = (plan.total - done.step) * summary["seconds_per_step"]
    memory = f" | {summary['memory_gib']:.1f} GiB" if "memory_gib" in summary else ""
    if throughput is not None:
        told["mfu"] = throughput.share(summary["pairs_per_second"])
        memory = f" | {100 * told['mfu']:.0f}% of peak{memory}"
    parts = ", ".join(f"{name} {summary[name]:.3f}" for name in done.parts)
    loss = f"loss {summary['loss']:.4f}{f' ({parts})' if parts else ''}"
    right = f"{'found' if plan.grounding is not None else 'in-batch'} {100 * summary['accuracy']:.1f}%"
    named = {"gradient_norms": done.gradient_norms, "relative_updates": done.relative_updates}
    told |= {name: finite for name, numbers in named.items() if (finite := _finite(numbers))}
    context.journal.write(
        "train",
        f"{plan.name} {done.step}/{plan.total} | {loss} | {right} | "
        f"scale {scale:.1f} | {bias}rate {rate:.2e} | {summary['pairs_per_second']:.0f} pairs/s | "
        f"data wait {100 * summary['data_wait']:.0f}%{memory} | {duration(left)} left",
        stage=plan.name,
        step=done.step,
        logit_scale=scale,
        rate=rate,
        seconds_left=left,
        **told,
        **summary,
    )
    return left


def _finite(numbers: Mapping[str, float]) -> dict[str, float]:
    return {name: number for name, number in numbers.items() if math.isfinite(number)}


def tell_validation(
    context: Context,
    plan: StagePlan,
    step: int,
    judgement: Judgement,
    loss: PoolLoss | None,
    training_loss: float | None,
    compared: str,
) -> None:
    """A line over a validation.

    Args:
        training_loss: mean over the steps since the one before, of what `loss` is of.
        compared: what its scores are beside earlier ones.
    """
    told: dict[str, Any] = losses(loss, plan.setting.batch_size, training_loss)
    words = "" if loss is None else f" | loss {loss.value:.4f}"
    if loss is not None and loss.pairs != plan.setting.batch_size:  # the smaller, the lower
        words += f" in batches of {loss.pairs}"
    if loss is not None and training_loss is not None:
        words += f" (training {training_loss:.4f})"
    context.journal.write(
        "validation",
        f"{plan.name} {step}/{plan.total} | mean recall {judgement.mean_recall:.2f}"
        f"{judgement.details()}{words} ({duration(judgement.seconds)}){compared}",
        stage=plan.name,
        step=step,
        mean_recall=judgement.mean_recall,
        score=judgement.score,
        **told,
        scores=judgement.as_dict(),
        languages=judgement.languages,
    )


def losses(loss: PoolLoss | None, batch_size: int, training_loss: float | None = None) -> dict[str, float]:
    """Losses as a validation's record has them; the gap where both are over batches of one size."""
    told: dict[str, float] = {} if training_loss is None else {"training_loss": training_loss}
    if loss is not None:
        told |= {"loss": loss.value, "loss_batch": loss.pairs}
        if training_loss is not None and loss.pairs == batch_size:
            told["gap"] = loss.value - training_loss
    return told


def tell_findings(context: Context, stage: str) -> None:
    """What the stage shows, in short; on the device that has the journal."""
    journal = context.journal
    if journal.active:
        journal.say(in_short(stage, findings(read_journal(journal.folder / "journal.jsonl"), stage)))
