"""Small pictures for the page: upright, resized, encoded anew, kept in bounded memory.

Always encoded anew: what lies behind an indexed path may have become any file, and only pixels leave the server.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cnclip_ft.search.index.listing import Key
from cnclip_ft.search.web.decoder import GONE
from cnclip_ft.search.web.decoders import TOO_SLOW, Decoders
from data_tools.errors import DataFault
from data_tools.pictures import Reencoding

SIZES = {"small": Reencoding(max_side=360, quality=82), "large": Reencoding(max_side=1600, quality=88)}
_KEPT = 24 * 2**20  # bytes of encoded thumbnails


class Gone(Exception):
    """The picture is not where it was, or no picture any more; the message says which."""


class Thumbnails:
    """Encoded thumbnails by number and size, the last used ones kept.

    Args:
        kind, path: the index's source. item: gives a number's key and stamp.
    """

    def __init__(self, kind: str, path: str | Path, item: Callable[[int], tuple[Key, str]], decoders: Decoders) -> None:
        self._source, self._item, self._decoders = {"kind": kind, "path": str(path)}, item, decoders
        self._kept: OrderedDict[tuple[int, str], bytes] = OrderedDict()
        self._bytes = 0

    async def get(self, number: int, size: str) -> bytes:
        """A JPEG.

        Raises:
            IndexError: no such number.
            Gone: it cannot be had any more.
            Busy: too many are being made.
        """
        place = number, size
        if place in self._kept:
            self._kept.move_to_end(place)
            return self._kept[place]
        data = await self._run("thumbnail", number, SIZES[size].as_dict())
        if place not in self._kept:
            self._kept[place] = data
            self._bytes += len(data)
        while self._bytes > _KEPT and len(self._kept) > 1:
            self._bytes -= len(self._kept.popitem(last=False)[1])
        return data

    async def fitted(self, number: int, how: dict[str, Any]) -> bytes:
        """`decoder.SIDES` of the upright picture and of what follows: its pixels as `Preprocessing.fitting` says.

        Raises:
            IndexError, Gone, Busy: as `get`.
        """
        return await self._run("fit_indexed", number, how)

    async def _run(self, job: str, number: int, how: dict[str, Any]) -> bytes:
        key, stamp = self._item(number)
        try:
            return await self._decoders.run({"do": job, **self._source, "key": key, "stamp": stamp, "how": how})
        except DataFault as error:
            # Not a decoder's own words: they may quote what lies there now.
            own = error.kind in (GONE, TOO_SLOW)
            raise Gone(error.problem if own else "what lies there is no picture that can be shown") from None
