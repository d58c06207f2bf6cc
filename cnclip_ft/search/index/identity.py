"""What the features of an index depend on, and the refusal to mix two of them."""

from __future__ import annotations

from typing import Any

from cnclip_ft.search.index.listing import Listing
from data_tools.errors import RequestError


def check_same(info: dict[str, Any], there: object, identity: dict[str, Any], listing: Listing, moved: bool) -> None:
    """Raises:
    RequestError: the index `there`, described by `info`, is of another checkpoint, other settings or another source.
    """
    # Older indexes say how pictures were prepared among their settings.
    before = {"image_transform": info.get("settings", {}).get("image_transform")} | info.get("identity", {})
    path = info["source"]["path"]
    if before.get("checksum") != identity["checksum"]:
        made = info["checkpoint"].get("path")
        raise RequestError(
            f"{there} was made by another checkpoint ({made}, checksum {str(before.get('checksum'))[:12]}…, this one "
            f"has {identity['checksum'][:12]}…), and features of two models cannot be compared. Encode all "
            f"{len(listing.stamps):,} pictures anew with --rebuild, or choose another place"
        )
    now = {"dimensions": None} | identity
    changed = [f"{key} {before.get(key)} → {value}" for key, value in now.items() if before.get(key) != value]
    if changed:
        raise RequestError(
            f"{there} was made with other settings ({', '.join(changed)}); give the same ones, or --rebuild"
        )
    if path != str(listing.path) and not moved:
        raise RequestError(
            f"{there} is the index of {path}, not of {listing.path}. Choose another place; if the pictures were "
            "moved, say --moved (what has kept path, size and time is not encoded again); or say --rebuild"
        )
