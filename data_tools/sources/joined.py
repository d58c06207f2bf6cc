"""Several sources one behind the other: their counted text numbers go on where those before ended."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from data_tools.items import Item, Source, Stream, TextItem


class Joined:
    """`sources` as one.

    Args:
        after: the number behind which counted texts begin.
    """

    kind = "joined"

    def __init__(self, sources: Sequence[Source], after: int = 0) -> None:
        self.sources, self.after = sources, after

    def open(self) -> Stream:
        totals, units = [], set()
        for source in self.sources:  # opened again when its turn comes: a thousand tables are not held open at once
            stream = source.open()
            totals.append(stream.total)
            units.add(stream.unit)
        known = [total for total in totals if total is not None]
        total = sum(known) if len(known) == len(totals) and len(units) == 1 else None
        notes: list[str] = []
        done = [0]
        now: list[Stream] = []
        tell = lambda: done[0] + (now[-1].tell() if now else 0)  # noqa: E731
        return Stream(self._items(now, done, notes), total, units.pop() if len(units) == 1 else "item", tell, notes)

    def _items(self, now: list[Stream], done: list[int], notes: list[str]) -> Iterator[Item]:
        most = self.after
        for source in self.sources:
            stream, before = source.open(), most
            now[:] = [stream]
            for item in stream.items:
                if isinstance(item, TextItem):
                    if item.own_number and isinstance(item.text_id, int):
                        item = replace(item, text_id=item.text_id + before)
                    if isinstance(item.text_id, int):
                        most = max(most, item.text_id)
                yield item
            done[0] += stream.total or 0
            now.clear()
            notes += stream.notes

    def fingerprint(self) -> dict[str, Any]:
        return {
            "parts": [{"source": source.kind, **source.fingerprint()} for source in self.sources],
            "after": self.after,
        }

    def expected(self) -> dict[str, int]:
        return {}
