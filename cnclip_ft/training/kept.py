"""The checkpoints of a stage: ``last``, ``best``, ``start`` while it trains, and those of epochs that stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from cnclip_ft.models.checkpoints import (
    CHECKPOINT,
    INFO,
    WEIGHTS_SUM,
    checkpoint_checksum,
    mend_checkpoint,
    read_info,
    save_checkpoint,
    saved_state,
)
from cnclip_ft.models.dual_encoder import DualEncoder
from data_tools.errors import RequestError, UserError


class Kept:
    """Checkpoints in the folder of a stage. Every device reads them, only the first (`writes`) writes.

    `sums` are the sha256 of the weights kept as best and start, on the device that writes.
    """

    def __init__(self, folder: Path, writes: bool) -> None:
        self.folder, self.writes = folder, writes
        self.sums: dict[str, str] = {}

    def save(self, name: str, model: DualEncoder, info: dict[str, Any]) -> None:
        """Keep the model's weights under `name`, in place of those before."""
        if self.writes:
            checksum = save_checkpoint(model, self.folder / name, info=info)
            if name in ("best", "start"):
                self.sums[name] = checksum

    def weights(self, name: str, model: DualEncoder) -> dict[str, torch.Tensor]:
        """Weights of ``best`` or ``start``, as they were written.

        Raises:
            UserError: they are gone or others.
        """
        folder, fault = self.folder / name, None
        if not folder.is_dir():
            fault = "it is gone"
        elif self.writes and self.sums.get(name) not in (None, checkpoint_checksum(folder)):
            fault = "the weights are not those that were written there; the file is damaged or another"
        if fault:
            raise UserError(
                f"{folder}: {fault}. Bring it back from a copy and go on, or start a new run with "
                f"model.start={self.folder / 'last'} and another output=FOLDER"
            )
        return saved_state(model, folder)

    @property
    def has_start(self) -> bool:
        return (self.folder / "start" / INFO).is_file()

    def start_is_best(self, model: DualEncoder) -> None:
        """Make the weights the stage began with its ``best``."""
        if self.writes:
            model.load_state_dict(self.weights("start", model))
            self.save("best", model, read_info(self.folder / "start"))

    def clear_start(self) -> None:
        """``start`` is of no use when the stage is over."""
        if self.writes and (self.folder / "start").is_dir():
            CHECKPOINT.clear(self.folder / "start", first=INFO)

    def kept_later(self, token: str) -> dict[str, Any] | None:
        """What ``best`` says of itself, where the run with this `token` kept it after its newest state and then ended unawares.

        Clears up after a process that died while it saved.
        """
        folder, own = self.folder / "best", self.sums.get("best")
        for place in (folder, self.folder / "start"):
            mend_checkpoint(place)
        try:
            info, found = read_info(folder), checkpoint_checksum(folder)
        except RequestError:
            return None
        if info.get("run") != token or info.get("stage") != self.folder.name:
            return None
        if found in (None, own) or found != info.get(WEIGHTS_SUM):
            return None
        self.sums["best"] = found
        return info
