"""Python's search for circles of objects, put off: what is made in millions and stays is looked through again and again."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_search_for_circles() -> Iterator[None]:
    """While millions of small objects are made that all stay: texts are numbered, libraries imported. The search takes a fifth of the time."""
    swept = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if swept:
            gc.enable()
