"""``report/index.html``: the run on one page that needs nothing else, headings in English and Chinese."""

from __future__ import annotations

import base64
import html
import io
import json
from pathlib import Path
from typing import Any

from PIL import Image

from cnclip_ft.training.examples import Example
from cnclip_ft.training.validation import cell, columns
from data_tools.atomic import whole_file

_STYLE = """
body{font:15px/1.5 system-ui,"Noto Sans SC","Microsoft YaHei",sans-serif;max-width:1080px;margin:2em auto;padding:0 1em;color:#222}
h1{font-size:1.5em}h2{font-size:1.15em;margin-top:2em;border-bottom:1px solid #ddd}
h2 small{font-weight:normal;color:#777}
table{border-collapse:collapse}td,th{padding:.25em .7em;text-align:right;border-bottom:1px solid #eee}
td:first-child,th:first-child{text-align:left}pre{background:#f6f6f6;padding:1em;overflow:auto;font-size:13px}
.query{margin:1em 0}.found{display:flex;gap:8px;flex-wrap:wrap}
figure{margin:0;padding:4px;border:3px solid transparent;text-align:center}figure.right{border-color:#18964a}
figcaption{font-size:12px;color:#666}img.curve{max-width:100%}
"""


def write_report(
    folder: Path, *, title: str, plan: str, rows: list[tuple[str, dict[str, float | None]]], notes: list[str],
    journal: Path, examples: list[Example], settings: str,
) -> Path:  # fmt: skip
    """Write ``index.html`` into `folder`, which is made where it is missing. Curves need matplotlib (an extra)."""
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'>",
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style><h1>{html.escape(title)}</h1>",
        _heading("Recall before and after every stage", "各阶段前后的召回率"), _table(rows),
        *(f"<p>{html.escape(note)}</p>" for note in notes),
        _heading("Curves", "训练曲线"), *_curves(read_journal(journal)),
        _heading("Example queries", "检索示例"), *map(_example, examples),
        _heading("Plan", "训练计划"), f"<pre>{html.escape(plan)}</pre>",
        _heading("Settings", "全部设置"), f"<pre>{html.escape(settings)}</pre></html>",
    ]  # fmt: skip
    target = folder / "index.html"
    with whole_file(target, "w") as file:
        file.write("\n".join(parts))
    return target


def read_journal(path: Path) -> list[dict[str, Any]]:
    """The records of a journal; a last line that a kill cut off is passed over."""
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def _heading(english: str, chinese: str) -> str:
    return f"<h2>{english} <small>{chinese}</small></h2>"


def _table(rows: list[tuple[str, dict[str, float | None]]]) -> str:
    keys, heads = columns(rows)
    lines = ["<table><tr><th></th>" + "".join(f"<th>{head}</th>" for head in heads) + "</tr>"]
    for name, row in rows:
        lines.append(
            f"<tr><td>{html.escape(name)}</td>" + "".join(f"<td>{cell(row.get(key))}</td>" for key in keys) + "</tr>"
        )
    return "\n".join(lines) + "</table>"


def _example(example: Example) -> str:
    figures = "".join(
        f"<figure{' class=right' if right else ''}><img alt='' src='{_data(picture)}'><figcaption>{score:.3f}</figcaption></figure>"
        for picture, score, right in example.found
    )
    return f"<div class=query><div>{html.escape(example.text)}</div><div class=found>{figures}</div></div>"


def _data(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def _curves(records: list[dict[str, Any]]) -> list[str]:
    """Loss, in-batch accuracy, scale, rate and speed over all steps, validation recall, as one picture."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return ["<p>Curves need matplotlib: pip install 'cnclip-ft[plots]'. The numbers are in journal.jsonl.</p>"]
    stages = list(dict.fromkeys(r["stage"] for r in records if r["kind"] == "train"))
    ends = {name: max(r["step"] for r in records if r["kind"] == "train" and r["stage"] == name) for name in stages}
    offset = {name: sum(ends[earlier] for earlier in stages[:number]) for number, name in enumerate(stages)}
    panels = [
        ("train", "loss", "loss"), ("train", "accuracy", "in-batch accuracy"), ("validation", "mean_recall", "mean recall"),
        ("train", "rate", "learning rate"), ("train", "logit_scale", "logit scale"), ("train", "pairs_per_second", "pairs/s"),
    ]  # fmt: skip
    figure = Figure(figsize=(12, 6), layout="constrained")
    for axes, (kind, key, title) in zip(figure.subplots(2, 3).flat, panels, strict=True):
        for name in stages:
            # A continued run says some steps twice; the later line counts.
            points = {r["step"] + offset[name]: r[key] for r in records if r["kind"] == kind and r["stage"] == name}
            axes.plot(list(points), list(points.values()), marker="." if kind == "validation" else None, label=name)
        axes.set_title(title, fontsize=10)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    figure.axes[-1].set_xlabel("step, all stages", fontsize=8)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return [f"<img class=curve alt='curves' src='data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}'>"]
