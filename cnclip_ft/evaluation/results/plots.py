"""Pictures of results. matplotlib is an extra: everything else works without it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL.ImageFont import FreeTypeFont

from data_tools.atomic import whole_file
from data_tools.contact_sheet import HAN, find_font
from data_tools.errors import RequestError

MADE_BY = {"png": "Software", "svg": "Creator", "pdf": "Creator"}  # where a format says who wrote the file
MAKER = "cnclip-ft evaluation"


def require_matplotlib() -> Any:
    """`matplotlib.figure.Figure`, which draws to files without a display.

    Raises:
        RequestError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise RequestError(
            "pictures need matplotlib: pip install 'cnclip-ft[plots]' (or leave --picture out)"
        ) from None
    matplotlib.rcParams["font.family"] = ["DejaVu Sans"]
    matplotlib.rcParams["axes.unicode_minus"] = False
    return Figure


def _chinese_font() -> bool:
    """Let matplotlib draw with the font that contact sheets are written with; False where there is none."""
    import matplotlib
    from matplotlib import font_manager

    try:
        font = find_font(None, chinese=True)
        if not isinstance(font, FreeTypeFont):
            return False
        file = str(font.path)
        font_manager.fontManager.addfont(file)
        name = font_manager.FontProperties(fname=file).get_name()
    except (RequestError, OSError, RuntimeError):
        return False
    matplotlib.rcParams["font.family"] = ["DejaVu Sans", name]  # the second for what the first lacks
    return True


def _save(figure: Any, path: str | Path) -> bool:
    """Whether the fonts had every letter: those they lack are drawn as boxes."""
    kind = Path(path).suffix.removeprefix(".").lower()
    said = {MADE_BY[kind]: MAKER} if kind in MADE_BY else None
    try:
        with warnings.catch_warnings(record=True) as said_of, whole_file(path, advice="Choose another file.") as file:
            warnings.filterwarnings("always", message="Glyph .* missing")
            figure.savefig(file, format=kind or "png", metadata=said, dpi=120, bbox_inches="tight")
    except ValueError as error:
        raise RequestError(
            f"{path}: the picture cannot be written ({error}); use a name ending in .png, .svg or .pdf"
        ) from None
    return not any(re.match("Glyph .* missing", str(warning.message)) for warning in said_of)


def confusion_picture(confusion: torch.Tensor, names: Sequence[str], path: str | Path) -> str | None:
    """Rows are true classes, columns predicted ones; shares of the row.

    Without a font that has Chinese glyphs such classes are numbered; what is returned says so, and also that letters are lacking.
    """
    note, make = None, require_matplotlib()
    if any(HAN.search(name) for name in names) and not _chinese_font():
        names = [f"class {number}" for number in range(1, len(names) + 1)]
        note = (
            f"{path}: no font with Chinese glyphs is installed (fonts-noto-cjk, fonts-wqy-microhei), so the classes are "
            "numbered in the order of the list of classes (in --json)"
        )
    figure = make(figsize=(2 + 0.32 * min(len(names), 60), 2 + 0.32 * min(len(names), 60)))
    axes = figure.add_subplot()
    shares = confusion.double() / confusion.sum(1, keepdim=True).clamp_min(1)
    image = axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    if len(names) <= 60:
        axes.set_xticks(range(len(names)), names, rotation=90)
        axes.set_yticks(range(len(names)), names)
    if len(names) <= 15:
        for row, column in confusion.nonzero().tolist():
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(int(confusion[row, column])), ha="center", va="center", color=colour, fontsize=8)
    axes.set(xlabel="predicted", ylabel="true")
    figure.colorbar(image, label="share of the true class", shrink=0.8)
    if not _save(figure, path):
        note = f"{path}: the fonts found here lack letters of the classes, which are drawn as boxes (their names are in --json)"
    return note


def precision_recall_picture(
    recall: torch.Tensor, precision: torch.Tensor, chosen: tuple[float, float], label: str, path: str | Path
) -> None:
    """The curve, and the chosen threshold as a point (recall, precision)."""
    figure = require_matplotlib()(figsize=(5, 4))
    axes = figure.add_subplot()
    axes.step(recall.tolist(), precision.tolist(), where="post")
    axes.plot(*chosen, "o", label=label)
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1.02), ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left")
    _save(figure, path)
