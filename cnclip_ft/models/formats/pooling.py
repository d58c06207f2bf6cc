"""Which row of a text encoder is a text's feature: what its folder says of it, and what the user asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cnclip_ft.models.formats.files import read_json
from data_tools.errors import RequestError
from data_tools.words import Said

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
            Said(
                "pooling {asked} as asked for; its author's is {said} ({file})",
                "按要求使用 {asked} 池化；作者用的是 {said}（{file}）",
                asked=asked,
                said=" and ".join(said or []),
                file=SAID,
            )
        ] if known else []
    if said is None:
        return otherwise, [
            Said(
                "pooling {otherwise}: the folder says nothing of it; another with model.start={{…, pooling: mean}}",
                "池化为 {otherwise}：文件夹未作说明；用 model.start={{…, pooling: mean}} 可换",
                otherwise=otherwise,
            )
        ]
    if len(said) != 1 or said[0] not in _OURS.values():
        raise RequestError(
            f"{folder / SAID}: its pooling is {' and '.join(said) or 'none'}, which is not done here; choose one: "
            "model.start={image: …, text: …, pooling: mean}"
        )
    return said[0], [
        Said("pooling {pooling}, as {file} says", "池化为 {pooling}，依据 {file}", pooling=said[0], file=SAID)
    ]


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
