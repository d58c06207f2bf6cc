"""What happens to a fault: the work stops, or it is listed, counted and passed over."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from data_tools.errors import DataFault, RequestError, UserError

FILE_NAME = "faults.jsonl"
OnError = Literal["fail", "skip"]


class FaultList:
    """Faults of one build, a line each in `file`.

    Args:
        on_error: ``fail`` raises the first fault; ``skip`` lists it.
        max_faults: more of them stop the work.
        remembered: going on with an interrupted build: the lines that stand, whatever became of `file` meanwhile.
        remember: called with the place and the bytes of every line, to be kept with what is built.
        advice: what else can be done about the fault that stops the work; follows its mend.
    """

    def __init__(
        self,
        file: Path,
        on_error: OnError = "fail",
        max_faults: int = 1000,
        remembered: Iterable[bytes] = (),
        remember: Callable[[int, bytes], object] | None = None,
        advice: str = "",
    ) -> None:
        if on_error not in ("fail", "skip"):
            raise RequestError(f"--on-error {on_error!r}: fail or skip")
        if max_faults < 0:
            raise RequestError(f"--max-faults {max_faults}: it cannot be negative")
        self.file, self.on_error, self.max_faults = file, on_error, max_faults
        self.kinds: Counter[str] = Counter()
        self._remember, self._advice = remember, advice
        self._handle = file.open("w+b")
        for line in remembered:
            self._handle.write(line)
            self.kinds[json.loads(line)["kind"]] += 1
        self._handle.flush()

    @property
    def total(self) -> int:
        return self.kinds.total()

    @property
    def bytes(self) -> int:
        """Length of the list, as it is on the disk."""
        return self._handle.tell()

    def add(self, fault: DataFault) -> None:
        """List `fault`, or raise it.

        Raises:
            DataFault: with ``fail``.
            UserError: there are more than `max_faults`.
        """
        if self.on_error == "fail":
            raise DataFault(
                fault.problem,
                mend=fault.mend.removesuffix(self._advice) + self._advice,  # an outer list may see it once more
                kind=fault.kind,
                file=fault.file,
                line=fault.line,
                item_id=fault.item_id,
            )
        self.kinds[fault.kind] += 1
        # Readable as it is; half a character would not be UTF-8 and stays an escape, which is JSON too.
        line = json.dumps(fault.as_dict(), ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
        if self._remember is not None:
            self._remember(self.bytes, line)
        self._handle.write(line)
        self._handle.flush()
        if self.total > self.max_faults:
            raise UserError(
                f"more than {self.max_faults} faults ({self.summary()}); the last one: {fault} "
                "Mend the source, or raise --max-faults."
            )

    def summary(self) -> str:
        """``12 bad-json, 3 missing-image``."""
        return ", ".join(f"{count:,} {kind}" for kind, count in self.kinds.most_common())

    def close(self) -> None:
        self._handle.close()

    def join(self, before: Iterable[Path]) -> bool:
        """Once it is closed: put the lines of the lists `before` in front, each once. Whether there are any lines."""
        lines = [file.read_bytes().splitlines(keepends=True) for file in (*before, self.file) if file.is_file()]
        found = dict.fromkeys(line for part in lines for line in part)
        self.file.write_bytes(b"".join(found))
        return bool(found)


def read_faults(store: Path) -> Iterator[dict[str, Any]]:
    """What the build of a store left out, where it lists anything; lines that are none are passed over."""
    try:
        with (store / FILE_NAME).open("rb") as file:
            for line in file:
                try:
                    fault = json.loads(line)
                except (ValueError, RecursionError):
                    continue
                if isinstance(fault, dict) and "kind" in fault:
                    yield fault
    except OSError:
        return
