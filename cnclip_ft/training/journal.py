"""What a run says while it goes: a line on the terminal, ``journal.jsonl`` and TensorBoard, one call for all three."""

from __future__ import annotations

import errno
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from data_tools.bars import Bar
from data_tools.errors import UserError
from data_tools.tables import fitted, terminal_width

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class Journal:
    """Records of a run. On any rank but the first it says and writes nothing, so callers never ask who they are."""

    def __init__(
        self, folder: Path, *, active: bool = True, track: Callable[[dict[str, float]], None] | None = None
    ) -> None:
        self.active, self.folder, self.track = active, folder, track
        self._board: SummaryWriter | None = None
        self._without_board = False  # TensorBoard is not installed
        self._opened: IO[bytes] | None = None

    @property
    def _file(self) -> IO[bytes]:
        """Opened with the first record: a run that is refused before leaves nothing."""
        if self._opened is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._opened = open(self.folder / "journal.jsonl", "ab+")
            if self._opened.seek(0, os.SEEK_END):
                self._opened.seek(-1, os.SEEK_END)
                if self._opened.read(1) != b"\n":  # a kill or a full disk cut the last line off
                    self._opened.write(b"\n")
        return self._opened

    def say(self, text: str = "") -> None:
        """Text for the reader alone."""
        if self.active:
            try:
                Bar.write(fitted(text, terminal_width()))  # above the progress bar, where there is one
                sys.stdout.flush()
            except OSError:  # the terminal or the pipe is gone; the journal has it all
                sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115

    def write(self, kind: str, line: str | None = None, **values: Any) -> None:
        """One record: into the journal as it is, numbers to TensorBoard under `kind`, `line` to the terminal.

        Raises:
            UserError: the disk is full or cannot be written.
        """
        if not self.active:
            return
        if line is not None:
            self.say(line)
        record = {"time": round(time.time(), 3), "kind": kind, **values}
        with self._told():
            self._file.write(json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")
            self._file.flush()
            if "step" in values:
                numbers = dict(_numbers(values, f"{values.get('stage', 'run')}/{kind}"))
                board = self.board
                if board is not None:
                    for name, value in numbers.items():
                        board.add_scalar(name, value, values["step"])
                if self.track is not None and numbers:
                    self.track(numbers)

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            full = error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", -1), None)
            raise UserError(
                f"{error.filename or self.folder}: the run's records cannot be written ({error.strerror or error}). "
                + ("Free some space" if full else "Move away what is in the way, or make it writable")
            ) from None

    def picture(self, name: str, image: Image.Image, step: int) -> None:
        """A picture for TensorBoard."""
        if self.active:
            with self._told():
                board = self.board
                if board is not None:
                    board.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    @property
    def board(self) -> SummaryWriter | None:
        """None where TensorBoard is missing: a run is worth more than its curves there, which the report has too."""
        if self._board is None and not self._without_board:
            # Imported late: it takes longer than everything else here, and the tests of other parts do without.
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                self._without_board = True
                self.say("TensorBoard is not installed, so nothing is written for it: pip install tensorboard")
                return None
            self._board = SummaryWriter(str(self.folder / "tensorboard"))
        return self._board

    @contextmanager
    def bar(self, name: str, done: int, total: int) -> Iterator[Callable[[], Any]]:
        """A progress bar on a terminal, nothing elsewhere; yields what moves it by one step."""
        with Bar(total=total, initial=done, desc=name, unit="step", shown=self.active) as bar:
            yield bar.update

    def close(self) -> None:
        with suppress(OSError):  # a full disk, said by then
            if self._opened is not None:
                self._opened.close()
        with suppress(OSError):
            if self._board is not None:
                self._board.close()


def _numbers(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    """All numbers of a record, nested ones (recalls by split, direction and language) too."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}/{name}")
        elif name != "step" and isinstance(value, (int, float)) and not isinstance(value, bool):
            yield f"{prefix}/{name}", value


def read_journal(path: Path) -> list[dict[str, Any]]:
    """The records of a journal; a last line that a kill cut off is passed over."""
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


_CARRIED = ("steps", "pairs", "waited", "losses", "norms", "accuracies", "parts")


class Meter:
    """Averages between two lines, with the time spent waiting for data kept apart from the time spent computing."""

    def __init__(self, device: torch.device, gradient_clip: float | None = None) -> None:
        self.device, self.gradient_clip = device, gradient_clip
        self.reset()

    def reset(self) -> None:
        self.steps = self.pairs = 0
        self.waited = 0.0
        self.started = time.perf_counter()
        self._still: float | None = None  # since when nothing is counted
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.accuracies: list[float] = []
        self.parts: dict[str, list[float]] = {}

    def state_dict(self) -> dict[str, Any]:
        """What a run that is stopped between two lines needs for its next one to be over all of the steps."""
        return {name: getattr(self, name) for name in _CARRIED} | {"passed": self.passed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name in _CARRIED:
            setattr(self, name, state[name])
        self.started = time.perf_counter() - state["passed"]

    def add(
        self, loss: float, accuracy: float, norm: float, pairs: int, parts: Mapping[str, float] | None = None
    ) -> None:
        """A step: its numbers, the norm of its gradient before it was clipped, and the parts of its loss."""
        self.losses.append(loss)
        if math.isfinite(norm):  # else loss scaling left the step out
            self.norms.append(norm)
        for name, part in (parts or {}).items():
            self.parts.setdefault(name, []).append(part)
        self.accuracies.append(accuracy)
        self.steps, self.pairs = self.steps + 1, self.pairs + pairs

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what is neither data nor training (validation, saving)."""
        self._still = began = time.perf_counter()
        try:
            yield
        finally:
            self.started += time.perf_counter() - began
            self._still = None

    @property
    def passed(self) -> float:
        """Seconds since the line before."""
        now = time.perf_counter() if self._still is None else self._still  # a state is written in a pause
        return max(now - self.started, 1e-9)

    def summary(self) -> dict[str, float]:
        passed = self.passed
        summary = {
            "loss": statistics.fmean(self.losses),
            "accuracy": statistics.fmean(self.accuracies),
            "pairs_per_second": self.pairs / passed,
            "data_wait": self.waited / passed,
            "seconds_per_step": passed / self.steps,
        }
        summary |= {name: statistics.fmean(parts) for name, parts in self.parts.items()}
        if len(self.losses) > 1:
            summary["highest_loss"] = max(self.losses)
        if self.norms:
            summary["gradient_norm"] = statistics.fmean(self.norms)
            if self.gradient_clip is not None:
                summary["clipped"] = statistics.fmean(norm > self.gradient_clip for norm in self.norms)
        if self.device.type == "cuda":
            summary["memory_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        return summary


def duration(seconds: float) -> str:
    """90061 → ``25:01:01``; 59 → ``0:59``."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
