"""An image item → the bytes to store: looked at, or encoded anew."""

from __future__ import annotations

from dataclasses import dataclass

from data_tools.errors import DataFault
from data_tools.items import ImageItem, located
from data_tools.pictures import Reencoding, read_header, reencode


@dataclass(frozen=True)
class Preparation:
    """Runs in threads: Pillow frees the interpreter while it works."""

    reencoding: Reencoding | None
    pixel_limit: int

    def __call__(self, item: ImageItem) -> bytes | DataFault:
        try:
            data = item.read()
            if item.ready:
                return data
            if self.reencoding is not None:
                return reencode(data, self.reencoding, pixel_limit=self.pixel_limit)
            read_header(data, pixel_limit=self.pixel_limit)
            return data
        except DataFault as fault:
            return located(fault, item.file, item.line, item.image_id)
