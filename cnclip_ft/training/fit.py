"""What fits on the device: `micro_batch_size: auto`, and what to say when something did not fit."""

from __future__ import annotations

import traceback
from collections.abc import Sequence

import torch
from torch import nn

from cnclip_ft.models.dual_encoder import DualEncoder
from cnclip_ft.runtime import keep_activations
from cnclip_ft.training.compiling import uncompiled
from cnclip_ft.training.context import Context
from cnclip_ft.training.memory import HOPELESS, blank_pairs, estimate, keeps, largest_half
from cnclip_ft.training.sharding import Sharded
from cnclip_ft.training.stage_plan import StagePlan
from data_tools.errors import RequestError, UserError


def micro_batch_size(
    context: Context, plan: StagePlan, model: DualEncoder, to_come: Sequence[nn.Parameter]
) -> int | None:
    """Pairs per forward on this device as the stage wants it; None where the whole share goes at once.

    Args:
        model: the one that trains, ready for its first step.
        to_come: parameters whose moments AdamW has yet to make.
    """
    keep_activations(context.device, keeps(plan))
    wanted = plan.setting.micro_batch_size
    if wanted == "auto":
        wanted = largest_that_fits(context, plan, model, to_come)
    return None if wanted is None or wanted >= plan.share else wanted


def largest_that_fits(
    context: Context, plan: StagePlan, model: DualEncoder, to_come: Sequence[nn.Parameter]
) -> int | None:
    """The whole share of a batch, or the largest of its halves, that goes through forward and backward.

    Tried on a GPU; by the estimate on a CPU, where what does not fit ends the process. None on other devices.
    """
    if context.device.type == "cpu":
        size = estimate(context, plan, model).fitting
    elif context.device.type != "cuda":
        return None
    else:
        size = largest_half(plan.share, lambda size: _goes_through(context, plan, model, size, to_come))
    context.journal.say(f"micro_batch_size: auto → {size}")
    return size


def _goes_through(
    context: Context, plan: StagePlan, model: DualEncoder, size: int, to_come: Sequence[nn.Parameter]
) -> bool:
    try:
        try_step(context, plan, model, size, to_come)
    except torch.cuda.OutOfMemoryError as error:
        traceback.clear_frames(error.__traceback__)  # they hold what was computed so far
        torch.cuda.empty_cache()
        return False
    finally:
        model.zero_grad(set_to_none=True)
    return True


def refuse_too_large(context: Context, plans: Sequence[StagePlan], model: DualEncoder) -> None:
    """Raise before anything is trained where a stage would not get through its first step."""
    for plan in plans:
        said = estimate(context, plan, model).shortage(plan.name, HOPELESS)
        if said is not None:
            raise RequestError(f"{said}. Nothing was trained.")


def try_step(context: Context, plan: StagePlan, model: DualEncoder, size: int, to_come: Sequence[nn.Parameter]) -> None:
    """Forward and backward of `size` blank pairs of full length, beside the moments that AdamW will hold."""
    statistics = [(buffer, buffer.clone()) for buffer in model.buffers()]
    moments = [torch.empty_like(parameter) for parameter in to_come for _ in range(2)]
    try:
        with context.autocast(), uncompiled():  # compiled it takes less
            found = model(**blank_pairs(plan, model, size, model.context_length))
        torch.stack([part.float().sum() for part in found if part is not None]).sum().backward()
    finally:
        del moments
        for buffer, value in statistics:  # batch norm would learn from blank pictures
            buffer.copy_(value)


def out_of_memory(
    context: Context,
    plan: StagePlan,
    model: DualEncoder,
    error: BaseException,
    *,
    step: int,
    at_once: int,
    to_come: Sequence[nn.Parameter],
) -> UserError | None:
    """The message for a step that ran out of memory, with a setting that fits; None where that is not what happened.

    Args:
        step: number of the step, from 1.
        at_once: pairs of a forward.
    """
    told = str(error)
    if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and not (
        "can't allocate memory" in told or "not enough memory" in told
    ):
        return None
    setting = plan.setting
    traceback.clear_frames(
        error.__traceback__
    )  # what the step had computed is freed, or next to nothing would fit beside it
    model.zero_grad(set_to_none=True)
    fits = None
    if context.device.type == "cuda" and not isinstance(context.sharding, Sharded):
        torch.cuda.empty_cache()
        found = largest_that_fits(context, plan, model, to_come)
        fits = found if found is not None and 1 < found < at_once else None  # 1 was not tried
    size = fits or max(at_once // 2, 1)
    going_on = [
        f"stages.{plan.name}.micro_batch_size={size} ({'fits, tried just now' if fits else f'half of the {at_once} that did not fit'}; same gradient)"
    ]
    if setting.gradient_checkpointing == "none":
        going_on.append(f"stages.{plan.name}.gradient_checkpointing=both (about a third slower)")
    anew = []
    if context.precision == "fp32" and context.device.type == "cuda":
        anew.append("precision=bf16")
    if not plan.image_frozen:
        anew.append(f"stages.{plan.name}.patch_dropout=0.5 for most of the stage")
    return UserError(
        f"stage {plan.name}, step {step}: out of memory on {context.device} with {at_once} pairs at once. "
        "Give, also with --continue: "
        + "; or ".join(going_on)
        + (f". In a new run also: {'; or '.join(anew)}" if anew else "")
    )
