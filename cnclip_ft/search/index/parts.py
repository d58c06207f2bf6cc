"""Pictures encoded so far: parts beside the index that survive an interruption.

A part is features with their keys and stamps, so it serves whatever the source has become meanwhile: what is still
there with the same stamp is taken, the rest is not looked at.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from cnclip_ft.search.index.folder import PART_FILES, PARTS
from cnclip_ft.search.index.listing import Key
from data_tools.arrays import write_array
from data_tools.atomic import whole_file

_ROWS, _SECONDS = 8192, 20.0  # a part is written when either is reached: what a power cut can cost


class Parts:
    """Parts of one model.

    Args:
        folder: the index. identity: what the features depend on; parts of another identity are thrown away.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], dim: int) -> None:
        self.folder, self.dim = folder / PARTS, dim
        plan, own = self.folder / "plan.json", json.dumps(identity, sort_keys=True)
        if self.folder.exists() and not (plan.is_file() and plan.read_text(encoding="utf-8") == own):
            PART_FILES.clear(self.folder, first=plan.name)  # `build_index` has looked that nothing else is in it
        if not plan.exists():
            with whole_file(plan, "w", advice="Choose another --output.") as file:
                file.write(own)
        self._arrays: list[np.ndarray] = []
        self.places: dict[Key, tuple[str, int, int]] = {}  # key → stamp, part, row
        self.damaged: dict[Key, tuple[str, str]] = {}  # key → stamp, fault
        for part in sorted(self.folder.glob("*.jsonl")):
            self._take(part)
        self._number = max((int(file.stem) for file in self.folder.glob("*.jsonl")), default=0)
        self._begin()

    def _begin(self) -> None:
        self._rows: list[tuple[Key, str, str | None]] = []
        self._features: list[np.ndarray] = []
        self._count, self._since = 0, time.monotonic()

    def _take(self, file: Path) -> None:
        """A part that was cut or changed is passed over: its pictures are encoded again."""
        try:
            features = np.load(file.with_suffix(".npy"), mmap_mode="r")
            rows = [(key, stamp, fault) for key, stamp, fault in map(json.loads, file.read_bytes().splitlines())]
        except (OSError, ValueError, TypeError, EOFError):
            return
        if not all(isinstance(key, (int, str)) for key, _, _ in rows):
            return
        if features.shape != (sum(fault is None for _, _, fault in rows), self.dim) or features.dtype != np.float32:
            return
        part, row = len(self._arrays), 0
        self._arrays.append(features)
        for key, stamp, fault in rows:
            if fault is None:
                self.places[key] = stamp, part, row
                row += 1
            else:
                self.damaged[key] = stamp, fault

    def has(self, key: Key, stamp: str) -> bool:
        return any(key in known and known[key][0] == stamp for known in (self.places, self.damaged))

    def add(self, rows: list[tuple[Key, str, str | None]], features: np.ndarray) -> None:
        """Rows ``(key, stamp, fault or None)`` and the features ``[n, dim]`` of those without a fault, in order."""
        self._rows += rows
        self._features.append(features)
        self._count += len(rows)
        if self._count >= _ROWS or time.monotonic() - self._since >= _SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what has been added; also on the way out of an interruption."""
        if not self._rows:
            return
        self._number += 1
        file = self.folder / f"{self._number:08d}.jsonl"
        advice = "What was encoded before is kept: free some space and give the same command again."
        # The features first: a part counts from the moment its list is there.
        with whole_file(file.with_suffix(".npy"), advice=advice) as out:
            count = sum(map(len, self._features))
            write_array(out, self._features, (count, self.dim), np.dtype(np.float32))
        with whole_file(file, "w", advice=advice) as out:
            out.writelines(json.dumps(row) + "\n" for row in self._rows)
        self._begin()
        self._take(file)

    def rows(self, part: int, index: list[int]) -> np.ndarray:
        return self._arrays[part][index]

    def remove(self) -> None:
        self._arrays.clear()
        PART_FILES.clear(self.folder)
