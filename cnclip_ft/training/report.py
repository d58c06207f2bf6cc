"""``report/index.html``: the run on one page that needs nothing else, in English or Chinese."""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path
from typing import Any

from PIL import Image

from cnclip_ft.training.curves import curves
from cnclip_ft.training.examples import Example
from cnclip_ft.training.findings import Finding, findings
from cnclip_ft.training.journal import read_journal
from cnclip_ft.training.validation import cell, columns
from data_tools.atomic import whole_file
from data_tools.columns import shown_in_page
from data_tools.page_style import END, beginning
from data_tools.words import Said, said_in


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
    language: str,
) -> Path:
    """Write ``index.html`` into `folder`, which is made where it is missing.

    Args:
        examples: may be none: of a run that was stopped.
        language: of all but the user's own words (captions, names, settings); `plan` and `notes` are said in it where they can.
    """

    def heading(english: str, chinese: str) -> str:
        return f"<h2>{said_in(Said(english, chinese), language)}</h2>"

    records = read_journal(journal)
    parts = [
        f"{beginning(title, language)}<h1>{html.escape(title)}</h1>",
        heading("Recall before and after every stage", "各阶段前后的召回率"), _table(rows, language),
        *(f"<p>{html.escape(said_in(note, language))}</p>" for note in notes),
        *_shown(records, language),
        heading("Curves", "训练曲线"), *curves(records, language),
        *([heading("Example queries", "检索示例"), *map(_example, examples)] if examples else []),
        heading("Plan", "训练计划"), f"<pre tabindex=0>{html.escape(said_in(plan, language))}</pre>",
        heading("Settings", "全部设置"), f"<pre tabindex=0>{html.escape(settings)}</pre>{END}",
    ]  # fmt: skip
    target = folder / "index.html"
    with whole_file(target, "w") as file:
        file.write("\n".join(parts))
    return target


def _head(words: str) -> str:
    """Broken between words alone: a browser would break 文→图 too."""
    return " ".join(f"<span class=whole>{html.escape(word)}</span>" for word in words.split(" "))


def _table(rows: list[tuple[str, dict[str, float | None]]], language: str) -> str:
    keys, heads = columns(rows)
    lines = [
        "<table class=numbers tabindex=0><tr>"
        + "".join(f"<th>{_head(said_in(head, language))}</th>" for head in [Said("model", "模型"), *heads])
        + "</tr>"
    ]
    for name, row in rows:
        lines.append(
            f"<tr><th scope=row>{html.escape(said_in(_row_name(name), language))}</th>"
            + "".join(f"<td>{cell(row.get(key))}</td>" for key in keys)
            + "</tr>"
        )
    return "\n".join(lines) + "</table>"


def _shown(records: list[dict[str, Any]], language: str) -> list[str]:
    """What the run shows, a list for each stage."""
    found: dict[str, list[Finding]] = {}
    for finding in findings(records):
        found.setdefault(finding.stage, []).append(finding)
    if not found:
        return []
    parts = [f"<h2>{said_in(Said('What this run shows', '这次训练看到了什么'), language)}</h2>"]
    for stage, shown in found.items():
        parts.append(f"<h3>{html.escape(stage)}</h3><ul class=findings>")
        for finding in shown:
            saw, *rest = (html.escape(said_in(part, language)) for part in finding.sentences())
            parts.append(f"<li><b>{saw}</b> {('' if language == 'zh' else ' ').join(rest)}</li>")
        parts.append("</ul>")
    return parts


def _row_name(name: str) -> str:
    known = {"chance": Said("chance", "随机"), "start": Said("start", "起点")}
    stage = name.removeprefix("after ")
    return known.get(name, name if stage == name else Said("after {stage}", "{stage} 之后", stage=stage))


def _example(example: Example) -> str:
    figures = "".join(
        f"<figure{' class=right' if found.right else ''}><img alt='' src='{_data(found.thumbnail)}'>"
        f"<figcaption>{found.score:.3f}{shown_in_page(found.columns)}</figcaption></figure>"
        for found in example.found
    )
    return f"<div class=query><div>{html.escape(example.text)}</div><div class='row found'>{figures}</div></div>"


def _data(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
