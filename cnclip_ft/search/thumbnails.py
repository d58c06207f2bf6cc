"""Small pictures for the page: upright, resized, encoded anew, kept in bounded memory.

Always encoded anew: what lies behind an indexed path may have become any file, and only pixels leave the server.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable

from cnclip_ft.search.listing import Key
from data_tools.errors import DataFault
from data_tools.pictures import MISSING, Reencoding, reencode

SIZES = {"small": Reencoding(max_side=360, quality=82), "large": Reencoding(max_side=1600, quality=88)}
_KEPT = 24 * 2**20  # bytes of encoded thumbnails


class Gone(Exception):
    """The picture is not where it was, or no picture any more; the message says which."""


class Thumbnails:
    """Encoded thumbnails by number and size, the last used ones kept.

    Args:
        read: gives a picture's encoded bytes for its key. key: gives a number's key.
    """

    def __init__(self, read: Callable[[Key], bytes], key: Callable[[int], Key], pixel_limit: int) -> None:
        self._read, self._key, self._pixel_limit = read, key, pixel_limit
        self._kept: OrderedDict[tuple[int, str], bytes] = OrderedDict()
        self._bytes, self._lock = 0, threading.Lock()

    def get(self, number: int, size: str) -> bytes:
        """A JPEG.

        Raises:
            IndexError: no such number.
            Gone: it cannot be had any more.
        """
        place = number, size
        with self._lock:
            if place in self._kept:
                self._kept.move_to_end(place)
                return self._kept[place]
        key = self._key(number)
        try:
            data = reencode(self._read(key), SIZES[size], pixel_limit=self._pixel_limit)
        except (OSError, KeyError):
            raise Gone("the picture is not where it was") from None
        except DataFault as error:
            # Not the fault's own words: they may quote what lies there now.
            there = (
                "the picture is not where it was"
                if error.kind == MISSING
                else "what lies there is no picture that can be shown"
            )
            raise Gone(there) from None
        with self._lock:
            if place not in self._kept:
                self._kept[place] = data
                self._bytes += len(data)
            while self._bytes > _KEPT and len(self._kept) > 1:
                self._bytes -= len(self._kept.popitem(last=False)[1])
        return data
