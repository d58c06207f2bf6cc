"""Patterns with braces, as names of shards are written: ``data-{0000..0012}.tar``."""

from __future__ import annotations

from collections.abc import Iterator

from data_tools.errors import RequestError


def expand(pattern: str) -> Iterator[str]:
    """The names that a pattern with braces means, in its order.

    Raises:
        RequestError: webdataset, which brings the reader of braces, is not installed; or the braces are none.
    """
    try:
        import braceexpand
    except ImportError:
        raise RequestError(
            "patterns with braces need webdataset: pip install 'cnclip-ft[webdataset]', or write data-*.tar"
        ) from None
    try:
        return braceexpand.braceexpand(pattern)
    except ValueError as error:
        raise RequestError(f"{pattern}: {error}") from None
