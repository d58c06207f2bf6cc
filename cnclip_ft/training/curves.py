"""Curves of a run as inline SVG: losses, in-batch accuracy, validation recall with its start, rate, scale, speed, norms by part."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from data_tools.words import Said, said_in

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 360, 220, 52, 10, 26, 24
_LEGEND = 15  # a row of its own for many names
_COLOURS = ("one", "two", "three", "four", "ink")
_MOST = 600  # points of a line: more are narrower than a pixel
_PANELS = [
    ("train", "loss", Said("loss", "损失")),
    ("validation", "gap", Said("gap: validation − training loss", "差距：验证损失 − 训练损失")),
    ("train", "accuracy", Said("in-batch accuracy", "批内准确率")),
    ("validation", "mean_recall", Said("mean recall", "平均召回率")),
    ("train", "rate", Said("learning rate", "学习率")),
    ("train", "logit_scale", Said("logit scale", "logit scale（温度）")),
    ("train", "pairs_per_second", Said("pairs/s", "每秒图文对")),
]
_WITH_VALIDATION = Said("loss (dashed: validation)", "损失（虚线：验证）")
_NORMS = [
    ("gradient_norms", Said("gradient norms", "梯度范数")),
    ("relative_updates", Said("update of a step ÷ weights", "每步更新 ÷ 权重")),
]
_PARTS = {
    "image_trunk": Said("image trunk", "图像主干"),
    "image_projection": Said("image projection", "图像投影"),
    "text_trunk": Said("text trunk", "文本主干"),
    "text_projection": Said("text projection", "文本投影"),
    "heads": Said("heads", "检测头"),
}  # the temperature has a panel
Points = list[tuple[float, float]]
Record = dict[str, Any]


@dataclass
class _Line:
    name: str
    points: Points
    colour: int
    dashed: bool = False


def curves(records: list[Record], language: str) -> list[str]:
    """An SVG a panel, steps of all stages one after the other; nothing where the journal holds no step."""
    stages = list(dict.fromkeys(r["stage"] for r in records if r["kind"] == "train"))
    if not stages:
        return []
    ends = {name: max(r["step"] for r in records if r["kind"] == "train" and r["stage"] == name) for name in stages}
    offset = {name: sum(ends[earlier] for earlier in stages[:number]) for number, name in enumerate(stages)}

    def points(kind: str, name: str, key: str, part: str | None = None) -> Points:
        # A continued run says some steps twice; the later line counts.
        found = {
            r["step"] + offset[name]: _of(r, key, part) for r in records if r["kind"] == kind and r["stage"] == name
        }
        return [(step, value) for step, value in sorted(found.items()) if value is not None]

    def lines(kind: str, key: str, **look: Any) -> list[_Line]:
        return [_Line(name, points(kind, name, key), number, **look) for number, name in enumerate(stages)]

    start = next((r for r in records if r["kind"] == "validation" and r["stage"] == "start"), {})
    drawn = []
    for kind, key, title in _PANELS:
        shown, level = lines(kind, key), None
        if key == "mean_recall":
            level = _begun(shown, start.get(key))
        elif key == "loss":
            judged = lines("validation", "loss", dashed=True)
            if any(line.points for line in judged):
                _begun(judged, start.get("loss"))
                shown, title = shown + judged, _WITH_VALIDATION
        drawn.append(_panel(said_in(title, language), shown, level, language))
    for key, title in _NORMS:
        parts = []
        for number, (part, name) in enumerate(_PARTS.items()):
            found = [point for stage in stages for point in points("train", stage, key, part)]
            parts += [_Line(said_in(name, language), found, number)] * bool(found)
        drawn.append(_panel(said_in(title, language), parts, None, language, by_tens=True))
    return ["<div class=curves>", *drawn, "</div>"]


def _of(record: Record, key: str, part: str | None) -> Any:
    return record.get(key) if part is None else record.get(key, {}).get(part)


def _begun(lines: list[_Line], start: float | None) -> float | None:
    """The first stage's line begins with what was found before the first step."""
    if start is not None:
        lines[0].points.insert(0, (0, start))
    return start


def _label(value: float) -> str:
    """At most seven characters: what there is room for left of the axis."""
    return text if len(text := f"{value:.4g}") <= 7 else f"{value:.2g}"


def _panel(title: str, lines: list[_Line], start: float | None, language: str, *, by_tens: bool = False) -> str:
    """`by_tens`: powers of ten are as far from one another; what is not above 0 is left out then."""
    if by_tens:
        lines = [_Line(line.name, [(x, y) for x, y in line.points if y > 0], line.colour) for line in lines]
    points = [point for line in lines for point in line.points]
    if not points:
        return ""
    height = math.log10 if by_tens else float
    last, heights = max(x for x, _ in points) or 1, [height(y) for _, y in points]
    low, high = min(heights), max(heights)
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    low, high = low - room, high + room
    top = _TOP + _LEGEND * (len({line.name for line in lines}) > 2)

    def at(x: float, y: float) -> str:
        across = _LEFT + x / last * (_WIDTH - _LEFT - _RIGHT)
        return f"{across:.1f} {_HEIGHT - _BOTTOM - (height(y) - low) / (high - low) * (_HEIGHT - top - _BOTTOM):.1f}"

    said = f"{title}: {points[0][1]:.4g} → {points[-1][1]:.4g}"
    parts = [
        f"<svg viewBox='0 0 {_WIDTH} {_HEIGHT}' role=img aria-label='{html.escape(said)}'>",
        f"<text class=name x=4 y=15>{html.escape(title)}</text>",
    ]
    for share in (0.0, 0.5, 1.0):
        value = low + room + share * (high - low - 2 * room)
        value = 10**value if by_tens else value
        x, y = at(0, value).split()
        parts.append(f"<path class=axis d='M{x} {y}L{_WIDTH - _RIGHT} {y}'/>")
        parts.append(f"<text x={_LEFT - 4} y={y} text-anchor=end dominant-baseline=middle>{_label(value)}</text>")
    steps = said_in(Said("{last:,.0f} steps", "{last:,.0f} 步", last=last), language)
    parts.append(f"<text x={_LEFT} y={_HEIGHT - 6}>0</text>")
    parts.append(f"<text x={_WIDTH - _RIGHT} y={_HEIGHT - 6} text-anchor=end>{steps}</text>")
    if start is not None:
        parts.append(f"<path class=start d='M{at(0, start)}L{at(last, start)}'/>")
        parts.append(
            f"<text x={_WIDTH - _RIGHT} y={float(at(0, start).split()[1]) - 4:.1f} text-anchor=end>"
            f"{said_in(Said('start', '起点'), language)}</text>"
        )
    across = _WIDTH - _RIGHT
    for line in reversed(lines):
        colour = f"var(--{_COLOURS[line.colour % len(_COLOURS)]})"
        dashes = "; stroke-dasharray: 5 4" * line.dashed
        parts.append(
            f"<path style='stroke: {colour}{dashes}' d='{_path([at(*point) for point in _thinned(line.points)])}'/>"
        )
        if not line.dashed:
            row = 15 if top == _TOP else 15 + _LEGEND
            parts.append(
                f"<text x={across} y={row} text-anchor=end style='fill: {colour}'>{html.escape(line.name)}</text>"
            )
            across -= 8 + _wide(line.name)
    return "".join(parts) + "</svg>"


def _wide(name: str) -> int:
    """Units that a name takes, about: a Chinese character twice a letter."""
    return sum(12 if ord(letter) > 0x2E7F else 6 for letter in name)


def _thinned(line: Points) -> Points:
    step = -(-len(line) // _MOST)
    return line[:: step or 1] + line[-1:]


def _path(places: Sequence[str]) -> str:
    return "M" + "L".join(places) if places else ""
