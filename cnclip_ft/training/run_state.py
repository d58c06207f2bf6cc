"""What is needed to continue a run at the very step: written beside, renamed, the newest two kept.

Randomness needs no storing: every step seeds all generators from (seed, stage, step, device), and the order of the
pairs is a function of (seed, epoch). So a continued run draws what an uninterrupted one would have drawn.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import struct
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch

from data_tools.atomic import leftovers, whole_file
from data_tools.errors import RequestError, UserError

KEPT = 2
FORMAT = 1


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
    """Write ``folder/state-<number>.pt`` whole or not at all, and drop all but the newest two.

    The file is torch's zip; the sha256 of its bytes stands in the zip's comment, which torch passes over.
    """
    target = folder / f"state-{number:09d}.pt"
    hashed = None
    try:
        for unfinished in leftovers(folder):  # of a process that was killed while it wrote
            unfinished.unlink(missing_ok=True)
        with whole_file(target, advice="") as file:
            hashed = _Hashed(file)
            torch.save(state, cast(IO[bytes], hashed))  # which only writes to it
            file.seek(-2, os.SEEK_END)
            file.write(_LENGTH + hashed.sha.hexdigest().encode())
    except (OSError, RuntimeError, UserError) as error:  # torch reports a full disk as RuntimeError
        found = (hashed and hashed.error) or error
        raise UserError(
            f"{target}: the state could not be written ({getattr(found, 'strerror', None) or found}). The one before is intact: free some space, "
            "then continue with --continue."
        ) from None
    states = _states(folder)
    whole = [path for path in states if path <= target][
        -KEPT:
    ]  # later ones are broken: the run went on from before them
    for path in set(states) - set(whole):
        path.unlink(missing_ok=True)
    return target


_LENGTH = struct.pack("<H", 64)  # of the comment: a zip's last field
_NONE = b"\0\0"
_SEALED = re.compile(re.escape(_LENGTH) + rb"([0-9a-f]{64})")


class _Hashed:
    """A file to write that knows the sha256 of what went in."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.sha, self.flush = file, hashlib.sha256(), file.flush
        self.error: OSError | None = None  # torch tells only where it noticed

    def write(self, data: Any) -> int:
        self.sha.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise


def _states(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("state-*.pt") if path.is_file() and path.stem[6:].isdigit())


def newest_state(folder: Path) -> int | None:
    """The number of the newest state there is."""
    states = _states(folder)
    return int(states[-1].stem.partition("-")[2]) if states else None


def _fault(path: Path) -> str | None:
    """What is wrong with a state's bytes; states from before there were checksums have those of the zip."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - 66, 0))
        tail = file.read()
        sealed = _SEALED.fullmatch(tail)
        if sealed is None:
            if tail[-22:-18] != b"PK\x05\x06" or tail[-2:] != _NONE:
                return "it is cut short"
            bad = zipfile.ZipFile(file).testzip()
            return None if bad is None else f"the checksum of {bad} does not fit"
        file.seek(0)
        sha, left = hashlib.sha256(), size - 66
        while left:
            part = file.read(min(left, 2**22))
            sha.update(part)
            left -= len(part)
        sha.update(_NONE)
        return None if sha.hexdigest().encode() == sealed[1] else "its checksum does not fit"


def load_state(folder: Path, say: Callable[[str], Any]) -> dict[str, Any] | None:
    """The newest state that is whole; a broken one is named and the one before taken. None without any.

    Raises:
        UserError: there are states, and all are broken.
        RequestError: a newer version wrote it.
    """
    states = _states(folder)
    for path in reversed(states):
        try:
            fault, state = _fault(path), None
            if fault is None:
                state = torch.load(path, map_location="cpu", weights_only=True)
                if not isinstance(state, dict) or not {"format", "step"} & state.keys():
                    fault, state = "it is not the state of a run", None
        except Exception as error:  # noqa: BLE001 - a torn file fails in many ways; each means the one before
            fault = type(error).__name__
        if state is not None:
            if state.get("format", FORMAT) != FORMAT:
                raise RequestError(f"{path}: state format {state['format']!r} is not known here; use a newer cnclip-ft")
            return _with_bias(state)
        say(f"{path}: this state is broken ({fault}), taking the one before")
    if states:
        kept = sorted(map(str, folder.parent.glob("*/last/cnclip_ft.json")), key=os.path.getmtime)
        weights = f" with model.start={Path(kept[-1]).parent}" if kept else ""
        raise UserError(
            f"{folder}: every state is broken ({', '.join(path.name for path in states)}), so the run cannot go on at its step. "
            f"Bring one back from a copy, or start a new run{weights} and another output=FOLDER."
        )
    return None


def _with_bias(state: dict[str, Any]) -> dict[str, Any]:
    """The sigmoid loss once kept its bias to itself; it belongs to the model."""
    bias = state.pop("objective", {}).get("bias")
    if bias is not None:
        state["model"]["logit_bias"] = bias
        average = (state["average"] or {}).get("average", {})
        if "objective.bias" in average:
            average["logit_bias"] = average.pop("objective.bias")
    return state


def keep_newest_state(folder: Path) -> None:
    """Remove all states but the newest, from which a finished run can be extended."""
    for path in [*_states(folder)[:-1], *leftovers(folder)]:
        path.unlink(missing_ok=True)
