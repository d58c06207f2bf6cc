"""Curves of a run as inline SVG: loss, in-batch accuracy, validation recall with its start, rate, scale, speed."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

from data_tools.words import Said, said_in

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 360, 220, 52, 10, 26, 24
_COLOURS = ("one", "two", "three", "four")
_MOST = 600  # points of a line: more are narrower than a pixel
_PANELS = [
    ("train", "loss", Said("loss", "损失")),
    ("train", "accuracy", Said("in-batch accuracy", "批内准确率")),
    ("validation", "mean_recall", Said("mean recall", "平均召回率")),
    ("train", "rate", Said("learning rate", "学习率")),
    ("train", "logit_scale", Said("logit scale", "logit scale（温度）")),
    ("train", "pairs_per_second", Said("pairs/s", "每秒图文对")),
]
Points = list[tuple[float, float]]


def curves(records: list[dict[str, Any]], language: str) -> list[str]:
    """An SVG a panel, steps of all stages one after the other; nothing where the journal holds no step."""
    stages = list(dict.fromkeys(r["stage"] for r in records if r["kind"] == "train"))
    ends = {name: max(r["step"] for r in records if r["kind"] == "train" and r["stage"] == name) for name in stages}
    offset = {name: sum(ends[earlier] for earlier in stages[:number]) for number, name in enumerate(stages)}
    start = next((r["mean_recall"] for r in records if r["kind"] == "validation" and r["stage"] == "start"), None)
    if not stages:
        return []
    drawn = []
    for kind, key, title in _PANELS:
        lines: dict[str, Points] = {}
        for name in stages:
            # A continued run says some steps twice; the later line counts.
            found = {r["step"] + offset[name]: r.get(key) for r in records if r["kind"] == kind and r["stage"] == name}
            lines[name] = [(step, value) for step, value in sorted(found.items()) if value is not None]
        if kind == "validation" and start is not None:
            lines[stages[0]].insert(0, (0, start))
        drawn.append(_panel(said_in(title, language), lines, start if kind == "validation" else None, language))
    return ["<div class=curves>", *drawn, "</div>"]


def _label(value: float) -> str:
    """At most seven characters: what there is room for left of the axis."""
    return text if len(text := f"{value:.4g}") <= 7 else f"{value:.2g}"


def _panel(title: str, lines: dict[str, Points], start: float | None, language: str) -> str:
    points = [point for line in lines.values() for point in line]
    if not points:
        return ""
    last, low, high = max(x for x, _ in points) or 1, min(y for _, y in points), max(y for _, y in points)
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    low, high = low - room, high + room

    def at(x: float, y: float) -> str:
        across = _LEFT + x / last * (_WIDTH - _LEFT - _RIGHT)
        return f"{across:.1f} {_HEIGHT - _BOTTOM - (y - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM):.1f}"

    said = f"{title}: {points[0][1]:.4g} → {points[-1][1]:.4g}"
    parts = [
        f"<svg viewBox='0 0 {_WIDTH} {_HEIGHT}' role=img aria-label='{html.escape(said)}'>",
        f"<text class=name x=4 y=15>{html.escape(title)}</text>",
    ]
    for share in (0.0, 0.5, 1.0):
        value = low + room + share * (high - low - 2 * room)
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
    for number, (name, line) in reversed(list(enumerate(lines.items()))):
        colour = f"var(--{_COLOURS[number % len(_COLOURS)]})"
        parts.append(f"<path style='stroke: {colour}' d='{_path([at(*point) for point in _thinned(line)])}'/>")
        parts.append(f"<text x={across} y=15 text-anchor=end style='fill: {colour}'>{html.escape(name)}</text>")
        across -= 8 + 7 * len(name)
    return "".join(parts) + "</svg>"


def _thinned(line: Points) -> Points:
    step = -(-len(line) // _MOST)
    return line[:: step or 1] + line[-1:]


def _path(places: Sequence[str]) -> str:
    return "M" + "L".join(places) if places else ""
