"""The one progress bar: what is counted stands before it, and it moves every second, also while one item takes longer."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

from tqdm import tqdm

_TICK = 0.5  # seconds


class Bar(tqdm):
    """tqdm's bar on a terminal, nothing elsewhere; gone when its work is done. `desc` and `unit` say what is counted.

    Args:
        shown: False: not on a terminal either. Of many processes the first one draws.
    """

    def __init__(self, *arguments: Any, shown: bool = True, **settings: Any) -> None:
        self._over = threading.Event()
        off = True if not shown or os.environ.get("RANK", "0") != "0" else None
        super().__init__(*arguments, **settings | {"disable": off, "leave": False, "maxinterval": 1.0})
        if not self.disable:
            threading.Thread(target=self._tick, daemon=True).start()

    def _tick(self) -> None:
        """Draw it again where nothing did for a while: the clock in it goes on."""
        while not self._over.wait(_TICK):
            now = time.time()
            if now - self.last_print_t >= 2 * _TICK - 0.1 and now - self.start_t >= (self.delay or 0):
                self.last_print_t = now
                self.refresh()

    def close(self) -> None:
        self._over.set()
        super().close()
