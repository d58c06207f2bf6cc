"""What is needed to continue a run at the very step: written beside, renamed, the newest two kept.

Randomness needs no storing: every step seeds all generators from (seed, stage, step, device), and the order of the
pairs is a function of (seed, epoch). So a continued run draws what an uninterrupted one would have drawn.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch

from cnclip_ft.training.devices import sum_numbers
from data_tools.errors import UserError

KEPT = 2


def seed_step(seed: int, stage: int, step: int, rank: int) -> None:
    """Seed every generator a step may draw from; the same step draws the same, whatever came before."""
    mixed = int(np.random.SeedSequence([seed, stage, step, rank]).generate_state(1, np.uint64)[0])
    torch.manual_seed(mixed % 2**63)
    random.seed(mixed)
    np.random.seed(mixed % 2**32)


class StateWriter:
    """Writes states in a thread of its own, one at a time: training waits for the copy in memory, not for the disk.

    The copy costs the state's size in memory while it is being written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, number: int, state: dict[str, Any]) -> None:
        """Take a copy of `state` and write it behind the caller's back.

        Raises:
            UserError: the state before this one could not be written.
        """
        self.wait()
        copy = _copied(state)
        # Not a daemon: a program that ends in good order writes its state first.
        self._thread = threading.Thread(target=self._write, args=(number, copy))
        self._thread.start()

    def _write(self, number: int, state: dict[str, Any]) -> None:
        try:
            save_state(self.folder, number, state)
        except BaseException as error:  # noqa: BLE001 - handed to the thread that trains
            self._error = error

    def wait(self) -> None:
        """Until the state is on disk; raises what its writing raised."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copied(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(inner) for inner in value)
    return value


def save_state(folder: Path, number: int, state: dict[str, Any]) -> Path:
    """Write ``folder/state-<number>.pt`` whole or not at all, and drop all but the newest two."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"state-{number:09d}.pt"
    beside = target.with_suffix(".writing")
    try:
        with open(beside, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, target)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        beside.unlink(missing_ok=True)
        raise UserError(
            f"{target}: the state could not be written ({error}). The one before is intact: free some space, "
            "then continue with --continue."
        ) from None
    for old in sorted(folder.glob("state-*.pt"))[:-KEPT]:
        old.unlink(missing_ok=True)
    return target


def load_state(folder: Path, say) -> dict[str, Any] | None:
    """The newest state that can be read whole; a broken one is named and the one before taken. None without any."""
    for path in sorted(folder.glob("state-*.pt"), reverse=True):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # noqa: BLE001 - a torn file fails in many ways; each means the one before
            say(f"{path}: this state is broken ({type(error).__name__}), taking the one before")
    return None


def clear_states(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


class StopRequest:
    """SIGTERM and SIGINT ask for a stop after the step; a second one stops at once."""

    def __init__(self) -> None:
        self._asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self._before[number] = signal.signal(number, self._receive)
            except ValueError:  # not in the main thread: whoever owns it handles signals
                break
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        self._asked = True
        print("\nStopping after this step (again: at once).", flush=True)
        for which in self._before:
            signal.signal(which, signal.SIG_DFL)

    def asked(self, device: torch.device) -> bool:
        """Whether any device was asked: they stop at the same step."""
        return bool(sum_numbers(float(self._asked), device))
