"""Which row of a text encoder is a text's feature: what its folder says of it, and what the user asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cnclip_ft.models.formats.files import read_json
from data_tools.errors import RequestError

SAID = "1_Pooling/config.json"  # of sentence-transformers
_OURS = {"cls_token": "cls", "mean_tokens": "mean", "lasttoken": "last", "cls": "cls", "mean": "mean"}


def choose_pooling(folder: Path, asked: str | None, otherwise: str) -> tuple[str, list[str]]:
    """The pooling, and what to say about it.

    Args:
        asked: by the user, whose word goes before the folder's.
        otherwise: where nobody says.

    Raises:
        RequestError: the folder asks for one that is not done here, and the user for none.
    """
    said = _said(folder)
    if asked is not None:
        known = said is not None and said != [asked]
        return asked, [
            f"pooling {asked} as asked for; its author's is {' and '.join(said or [])} ({SAID})"
        ] if known else []
    if said is None:
        return otherwise, [
            f"pooling {otherwise}: the folder says nothing of it; another with model.start={{…, pooling: mean}}"
        ]
    if len(said) != 1 or said[0] not in _OURS.values():
        raise RequestError(
            f"{folder / SAID}: its pooling is {' and '.join(said) or 'none'}, which is not done here; choose one: "
            "model.start={image: …, text: …, pooling: mean}"
        )
    return said[0], [f"pooling {said[0]}, as {SAID} says"]


def _said(folder: Path) -> list[str] | None:
    if not (folder / SAID).is_file():
        return None
    said: dict[str, Any] = read_json(folder / SAID)
    named = said.get("pooling_mode")
    modes = [named] if isinstance(named, str) else named if isinstance(named, list) else None
    if modes is None:
        modes = [
            key.removeprefix("pooling_mode_")
            for key, value in said.items()
            if key.startswith("pooling_mode_") and value
        ]
    return [_OURS.get(str(mode), str(mode)[:40]) for mode in modes]
