"""Trackers other than TensorBoard, through accelerate: their names checked early, their numbers sent as one series."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from cnclip_ft.recipe import dump_recipe
from data_tools.errors import RequestError

if TYPE_CHECKING:
    from accelerate import Accelerator

    from cnclip_ft.recipe import Recipe


def tracker_names(wanted: list[str]) -> list[str] | None:
    """`wanted` as it is, checked.

    Raises:
        RequestError: a tracker accelerate does not know, or whose package is not installed.
    """
    if not wanted:
        return None
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    available = {str(name) for name in get_available_trackers()}
    for name in wanted:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise RequestError(
                f"report_to: {name!r} is not known: report_to=[NAME, …] with some of {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}"
            )
        if name not in available:
            raise RequestError(
                f"report_to: the package of {name} is not installed; pip install {name}, or report_to=[]"
            )
    return wanted


def start_trackers(accelerator: Accelerator, recipe: Recipe) -> Callable[[dict[str, float]], None] | None:
    """Begin a run with the trackers of the recipe; returns what sends them numbers, None without trackers."""
    if not recipe.report_to:
        return None
    # As one text: trackers take flat settings only, and drop or refuse what is nested.
    accelerator.init_trackers("cnclip-ft", config={"recipe": dump_recipe(recipe), "output": recipe.output})
    sent = 0

    def track(numbers: dict[str, float]) -> None:
        nonlocal sent
        # Steps of stages start anew; a tracker's must not, so records are counted.
        sent += 1
        accelerator.log(numbers, step=sent)

    return track
