"""Search: an index of pictures (`index`), questions and their answers (`engine`), a page (`web`); docs/search.md.

The name is also the call ``cnclip_ft.search(index, text)``: importing a module in here puts this package in its place.
"""

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    def __call__(self, *given: Any, **options: Any) -> Any:
        from importlib import import_module

        return import_module("cnclip_ft.calls").search(*given, **options)


sys.modules[__name__].__class__ = _Callable
