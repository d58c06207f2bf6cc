"""`micro_batch_size: auto`: the largest that fits on the device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

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
    while size > 1:
        try:
            _try(stage, size)
            run.journal.say(f"micro_batch_size: auto → {size}")
            return None if size == share else size
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            size = -(-size // 2)
        finally:
            run.model.zero_grad(set_to_none=True)
    return 1


def _try(stage: StageRun, size: int) -> None:
    model, run = stage.model, stage.run
    ids = torch.full((size, model.context_length), 1000, device=run.device)
    image = {"pixels": torch.zeros(size, 3, model.image_size, model.image_size, dtype=torch.uint8, device=run.device)}
    if stage.cache is not None:
        image = {"trunk": stage.cache.rows(torch.zeros(size, dtype=torch.int64), 0).to(run.device)}
    with run.autocast():
        images, texts = model(**image, input_ids=ids, attention_mask=torch.ones_like(ids))
    (images.float().sum() + texts.float().sum()).backward()
