"""``report/index.html``: the run on one page that needs nothing else, headings in English and Chinese."""

from __future__ import annotations

import base64
import html
import io
import json
from pathlib import Path
from typing import Any

from PIL import Image

from cnclip_ft.training.curves import curves
from cnclip_ft.training.examples import Example
from cnclip_ft.training.validation import cell, columns
from data_tools.atomic import whole_file
from data_tools.page_style import END, beginning


def write_report(
    folder: Path,
    *,
    title: str,
    plan: str,
    rows: list[tuple[str, dict[str, float | None]]],
    notes: list[str],
    journal: Path,
    examples: list[Example],
    settings: str,
) -> Path:
    """Write ``index.html`` into `folder`, which is made where it is missing. `examples` may be none: of a run that was stopped."""
    parts = [
        f"{beginning(title)}<h1>{html.escape(title)}</h1>",
        _heading("Recall before and after every stage", "各阶段前后的召回率"), _table(rows),
        *(f"<p>{html.escape(note)}</p>" for note in notes),
        _heading("Curves", "训练曲线"), *curves(read_journal(journal)),
        *([_heading("Example queries", "检索示例"), *map(_example, examples)] if examples else []),
        _heading("Plan", "训练计划"), f"<pre tabindex=0>{html.escape(plan)}</pre>",
        _heading("Settings", "全部设置"), f"<pre tabindex=0>{html.escape(settings)}</pre>{END}",
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
    return f"<h2>{english} <small lang=zh-CN>{chinese}</small></h2>"


def _table(rows: list[tuple[str, dict[str, float | None]]]) -> str:
    keys, heads = columns(rows)
    lines = [
        "<table class=numbers tabindex=0><tr><th>model · <span lang=zh-CN>模型</span></th>"
        + "".join(f"<th>{head}</th>" for head in heads)
        + "</tr>"
    ]
    for name, row in rows:
        lines.append(
            f"<tr><th scope=row>{html.escape(name)}</th>"
            + "".join(f"<td>{cell(row.get(key))}</td>" for key in keys)
            + "</tr>"
        )
    return "\n".join(lines) + "</table>"


def _example(example: Example) -> str:
    figures = "".join(
        f"<figure{' class=right' if right else ''}><img alt='' src='{_data(picture)}'><figcaption>{score:.3f}</figcaption></figure>"
        for picture, score, right in example.found
    )
    return f"<div class=query><div>{html.escape(example.text)}</div><div class='row found'>{figures}</div></div>"


def _data(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
