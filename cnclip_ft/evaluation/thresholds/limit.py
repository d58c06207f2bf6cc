"""A limit on the cosine as it is given to commands: a number, or what `cnclip-ft calibrate --json` wrote."""

from __future__ import annotations

import json
import math
from pathlib import Path

from data_tools.errors import RequestError


def read_threshold(
    given: str | None, checksum: str | None, image_size: int | None, flag: str = "--threshold"
) -> float | None:
    """The cosine.

    Args:
        checksum, image_size: of the checkpoint it is to be used with, and of the pictures it sees there; None: not known.

    Raises:
        RequestError: neither a number from −1 to 1 nor a file of `calibrate`, or one made with another checkpoint or image size.
    """
    if given is None:
        return None
    try:
        number = float(given)
    except ValueError:
        return _from_file(Path(given), checksum, image_size, flag)
    if not (math.isfinite(number) and -1 <= number <= 1):
        raise RequestError(f"{flag} is {given}; a cosine lies between -1 and 1")
    return number


def _from_file(path: Path, checksum: str | None, image_size: int | None, flag: str) -> float:
    from cnclip_ft.evaluation.results.provenance import weights_sum  # late: a number is read without torch

    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        cosine = float(content["threshold"]["cosine"])
        made = weights_sum(content["checkpoint"])
        side = content["settings"]["image_transform"]["size"]
    except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RequestError(
            f"{flag} {path}: neither a number nor a file that `cnclip-ft calibrate … --json FILE` wrote ({error})"
        ) from None
    if made != checksum:
        raise RequestError(
            f"{path} was measured with another checkpoint ({content['checkpoint'].get('path')}); a threshold holds for "
            "one model only. Calibrate this one"
        )
    if image_size not in (None, side):
        raise RequestError(
            f"{path} was measured on pictures of {side} × {side}, and here they are {image_size} × {image_size}; a threshold holds for "
            f"one size only. Calibrate at this one (--image-size {image_size})"
        )
    return cosine
