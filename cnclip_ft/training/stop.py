"""Stopping in good order: a signal asks, the step is finished, the state is written."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from types import FrameType
from typing import Any

import torch

from cnclip_ft.collectives import sum_numbers, sum_over_ranks, world_size
from cnclip_ft.runtime import Reading

# `timeout` signals the process and then its group, Slurm both us and torchrun, which passes it on: still one request.
_ONE_REQUEST = 1.0  # seconds


class Stopped(Exception):
    """The run was asked to stop; its state is written."""


class StopRequest:
    """SIGTERM, SIGINT and SIGHUP (a closed terminal) ask for a stop after the step; again a second later, they stop at once."""

    def __init__(self) -> None:
        self._asked = False
        self._since = 0.0
        self._told: Reading | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGBREAK"):
            number = getattr(signal, name, None)
            if number is None or (name == "SIGHUP" and signal.getsignal(number) is signal.SIG_IGN):
                continue  # nohup: the run is to outlive its terminal
            try:
                self._before[number] = signal.signal(number, self._receive)
            except ValueError:  # not in the main thread: whoever owns it handles signals
                break
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if not self._asked:
            self.ask()
            if os.environ.get("RANK", "0") == "0":  # Ctrl-C reaches all processes of a launcher
                # Not print: the signal may have come in the middle of one, and the terminal may be gone.
                with suppress(OSError):
                    os.write(1, b"\nStopping after this step (again: at once).\n")
        elif time.monotonic() - self._since > _ONE_REQUEST:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def ask(self) -> None:
        """Ask for a stop, as a signal would."""
        self._asked, self._since = True, time.monotonic()

    @property
    def asked_here(self) -> bool:
        """Whether this process was asked."""
        return self._asked

    def check(self) -> None:
        """For work that may be left in the middle: raises `Stopped` where this process was asked."""
        if self._asked:
            raise Stopped

    def asked(self, device: torch.device) -> bool:
        """Whether any device was asked: they stop at the same step."""
        return bool(sum_numbers(float(self._asked), device))

    def asked_lately(self, device: torch.device) -> bool:
        """As `asked`, once a step; of several cards as it was a step before, so that none is waited for."""
        if world_size() == 1 or device.type != "cuda":
            return self.asked(device)
        told, asked = self._told, torch.full((), float(self._asked), device=device)
        self._told = Reading({"asked": sum_over_ranks(asked)})
        return told is not None and told()["asked"] > 0
