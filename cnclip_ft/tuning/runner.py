"""One trial as a process of its own: a run of one stage, followed by its journal, stopped where it is not worth going on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from cnclip_ft.models.checkpoints import read_info
from cnclip_ft.runtime import end_with_parent
from cnclip_ft.training.run_folder import JOURNAL, LOCK, STATES, held, is_finished
from cnclip_ft.training.stop import StopRequest
from data_tools.errors import RequestError, UserError

_EVERY = 0.5  # seconds between two looks at the journal
_PATIENCE = 120  # seconds a run has to end after it was asked to
Record = dict[str, Any]


class Runner:
    """Runs the recipe in `file`, whose output is `folder`.

    Args:
        trust_import: as for `train`.
    """

    def __init__(self, file: Path, folder: Path, stage: str, *, trust_import: bool = False) -> None:
        self.file, self.folder, self.stage, self.trust_import = file, folder, stage, trust_import
        self.log = file.with_suffix(".log")

    @property
    def begun(self) -> bool:
        """Whether an attempt before left a state to go on from."""
        return any((self.folder / STATES).glob("state-*.pt"))

    def run(self, follow: Callable[[Record], str | None]) -> tuple[Literal["complete", "stopped"], str]:
        """Train; `follow` is told every record of the journal and may give a reason to stop.

        Returns:
            "complete", or "stopped" and the reason.

        Raises:
            UserError: the run failed; the message is its last words.
            RequestError: another process trains in its folder and does not end.
            KeyboardInterrupt: the search was asked to stop; the run has stopped with its state written.
        """
        self._await_orphan()
        if is_finished(self.folder):  # the search ended just then
            return "complete", ""
        command = [sys.executable, "-m", "cnclip_ft", "train", str(self.file)]
        command += ["--continue"] if self.begun else ["--overwrite"]
        command += ["--trust-import"] if self.trust_import else []
        records, reason = self._records(), None
        with self.log.open("ab") as log, StopRequest() as stop:
            # A session of its own: Ctrl-C in the terminal is for the search, which then asks the run to stop. A search that is
            # killed has no time to ask; the system does it then.
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=_stop_with_parent if sys.platform == "linux" else None,
            )
            try:
                while process.poll() is None and reason is None and not stop.asked_here:
                    time.sleep(_EVERY)
                    reason = next((told for told in map(follow, records()) if told), None)
            finally:
                _end(process)
        for record in records():
            if reason is None:
                follow(record)
        if stop.asked_here:
            raise KeyboardInterrupt
        if reason:
            return "stopped", reason
        if process.returncode:
            raise UserError(self._last_words(process.returncode))
        return "complete", ""

    def _await_orphan(self) -> None:
        """A run whose search was killed still writes its state: let it end, or the new attempt finds the folder taken."""
        deadline = time.monotonic() + _PATIENCE
        while (self.folder / LOCK).exists():
            try:
                with held(self.folder):
                    return
            except RequestError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(_EVERY)

    def score(self) -> float:
        """Of the best weights, by what decides."""
        return float(read_info(self.folder / self.stage / "best")["score"])

    def _records(self) -> Callable[[], Iterator[Record]]:
        """A function that gives what the journal has gained since it was last asked; what an attempt before wrote is old."""
        journal = self.folder / JOURNAL
        old = journal.stat().st_size if self.begun and journal.exists() else 0
        place, rest = [old], [b""]

        def more() -> Iterator[Record]:
            try:
                with journal.open("rb") as file:
                    file.seek(place[0])
                    found = file.read()
            except OSError:
                return
            place[0] += len(found)
            *lines, rest[0] = (rest[0] + found).split(b"\n")
            for line in lines:
                try:
                    yield json.loads(line)
                except ValueError:
                    continue

        return more

    def _last_words(self, code: int) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").rstrip().split("\n")
        start = max((number for number, line in enumerate(lines) if line.startswith("error: ")), default=len(lines) - 1)
        said = " ".join(line.strip() for line in lines[start : start + 3]).removeprefix("error: ")
        return f"{said[:300] or f'it ended with {code}'} ({self.log})"


def _stop_with_parent() -> None:
    end_with_parent(signal.SIGTERM)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask it to stop, and wait until it has; what does not listen is killed. Its state is then that of its last validation."""
    if process.poll() is not None:
        return
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(_PATIENCE)
    except subprocess.TimeoutExpired:
        if os.name == "posix":
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.wait()
