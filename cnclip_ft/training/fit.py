"""What fits on the device: `micro_batch_size: auto`, and what to say when something did not fit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from cnclip_ft.training.sharding import Sharded
from data_tools.errors import UserError

if TYPE_CHECKING:
    from cnclip_ft.training.stage import StageRun


def largest_that_fits(stage: StageRun) -> int | None:
    """Try the whole share of a batch, then halves, with one forward and backward of blank pairs of full length.

    None where all of it fits. On a CPU, which has no fixed limit to run into, always None.
    """
    run = stage.run
    share = stage.stage.batch_size // run.accelerator.num_processes
    if run.device.type != "cuda":
        return None
    size = share
    statistics = [
        (buffer, buffer.clone()) for buffer in stage.model.buffers()
    ]  # batch norm would learn from blank pictures
    while size > 1:
        try:
            _try(stage, size)
            run.journal.say(f"micro_batch_size: auto → {size}")
            return None if size == share else size
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            size = -(-size // 2)
        finally:
            stage.model.zero_grad(set_to_none=True)
            for buffer, value in statistics:
                buffer.copy_(value)
    return 1


def _try(stage: StageRun, size: int) -> None:
    model, run = stage.model, stage.run
    ids = torch.full((size, model.context_length), 1000, device=run.device)
    image = {"pixels": torch.zeros(size, 3, model.image_size, model.image_size, dtype=torch.uint8, device=run.device)}
    if stage.cache is not None:
        image = {"trunk": stage.cache.rows(torch.zeros(size, dtype=torch.int64), 0).to(run.device)}
    trained = [entry.parameter for entry in stage.table if entry.rate and not stage.optimizer.state]
    moments = [
        torch.empty_like(parameter) for parameter in trained for _ in range(2)
    ]  # AdamW's, from the first step on
    with run.autocast():
        images, texts = model(**image, input_ids=ids, attention_mask=torch.ones_like(ids))
    (images.float().sum() + texts.float().sum()).backward()
    del moments


def out_of_memory(stage: StageRun, error: BaseException) -> UserError | None:
    """The message for a step that ran out of memory, with a setting that fits; None where that is not what happened."""
    told = str(error)
    if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and not (
        "can't allocate memory" in told or "not enough memory" in told
    ):
        return None
    setting, run = stage.stage, stage.run
    share = stage.gradient.micro_batch_size or setting.batch_size // run.accelerator.num_processes
    stage.model.zero_grad(set_to_none=True)
    fits = None
    if run.device.type == "cuda" and not isinstance(run.sharding, Sharded):
        torch.cuda.empty_cache()
        fits = largest_that_fits(stage)
    size = fits or max(share // 2, 1)
    going_on = [
        f"micro_batch_size: {size} ({'fits, tried just now' if fits else f'half of the {share} that did not fit'}; same gradient)"
    ]
    if setting.gradient_checkpointing == "none":
        going_on.append("gradient_checkpointing: both (about a third slower)")
    anew = []
    if run.precision == "fp32" and run.device.type == "cuda":
        anew.append("precision: bf16")
    if not stage.image_frozen:
        anew.append("patch_dropout: 0.5 for most of the stage")
    return UserError(
        f"stage {stage.name}, step {stage.step + 1}: out of memory on {run.device} with {share} pairs at once. "
        f"Set for stages.{stage.name}, also with --continue: " + "; or ".join(going_on)
        + (f". In a new run also: {'; or '.join(anew)}" if anew else "")
    )  # fmt: skip
