"""Where is kept what can be made again: the user's cache folder."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """``$CNCLIP_FT_CACHE``, else ``cnclip-ft`` below the user's cache folder."""
    named = os.environ.get("CNCLIP_FT_CACHE")
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "cnclip-ft"
