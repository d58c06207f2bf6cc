"""The check as one HTML file with thumbnails: nothing to fetch, nothing to run."""

from __future__ import annotations

import base64
import html
import random
from pathlib import Path
from typing import Any

from data_tools.atomic import whole_file
from data_tools.check.judge import CheckReport
from data_tools.check.measure import SplitCheck
from data_tools.check.tables import rows_of
from data_tools.check.words import fault_in_words, piece
from data_tools.columns import shown_in_page
from data_tools.errors import DataFault
from data_tools.page_style import END, beginning, beginnings
from data_tools.parallel import read_parallel
from data_tools.pictures import Reencoding, reencode
from data_tools.store import Id, PairSource
from data_tools.words import Said, said_in

_TITLE = Said("data check", "数据检查")
BEGINS = beginnings(_TITLE)  # what it is known by
_THUMBNAIL = Reencoding(max_side=160, quality=70)
_RANDOM = 24


def write_page(
    report: CheckReport, stores: dict[str, PairSource], file: Path, seed: int = 0, language: str = "en"
) -> None:
    """Write the report with thumbnails of what was found and of a random sample.

    Raises:
        UserError: the file cannot be written.
    """
    parts = [beginning(_TITLE, language), f"<h1>{piece('title', language)}</h1><ul>"]
    for finding in report.findings:
        mark = " class='hurts'" if finding.hurts else ""
        said = Said("{split}: {what}", "{split}：{what}", split=finding.split, what=finding.sentence(language))
        parts.append(f"<li{mark}>{html.escape(said_in(said, language))}</li>")
    parts.append("</ul>" if report.findings else f"<li>{piece('nothing', language)}</li></ul>")
    for leakage in report.leakage:
        store = stores[leakage.first]
        parts.append(f"<h2>{html.escape(leakage.first)} / {html.escape(leakage.second)}</h2>")
        shown_images = [
            (store, ids[0], f"{leakage.first} {ids[0]} = {leakage.second} {ids[1]}") for ids in leakage.image_examples
        ]
        parts.append(figures(shown_images))
        parts.append("".join(f"<div>{html.escape(text)}</div>" for text in leakage.text_examples))
    for split in report.splits:
        parts += _split(split, stores[split.name], seed, language)
    with whole_file(file, "w") as page:
        page.write("\n".join([*parts, END]))


def _split(split: SplitCheck, store: PairSource, seed: int, language: str) -> list[str]:
    parts = [f"<h2>{html.escape(split.name)}</h2><div class=split><div><table tabindex=0>"]
    parts += [
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>"
        for name, value in rows_of(split, language)
    ]
    parts.append(f"</table><p>{piece('four', language)}")
    parts.append("" if split.parallel is not None else f"<br>{piece('false', language)}")
    parts.append("</p></div><div>")

    def head(name: str) -> str:
        return f"<h3>{piece(name, language)}</h3>"

    examples = split.examples
    if examples["undecodable"]:
        parts.append(head("h_undecodable") + "<ul>")
        parts += [
            f"<li>{html.escape(f'{image_id}: {said_in(problem, language)}')}</li>"
            for image_id, problem in examples["undecodable"]
        ]
        parts.append("</ul>")
    if examples["repeated_images"]:
        parts.append(head("h_repeated_images"))
        parts.append(figures([(store, ids[0], ", ".join(map(str, ids))) for ids in examples["repeated_images"]]))
    if examples["repeated_texts"]:
        parts.append(head("h_repeated_texts") + "<table tabindex=0>")
        parts += [
            f"<tr><td class=count>{count}</td><td>{html.escape(text)}</td></tr>"
            for text, count in examples["repeated_texts"]
        ]
        parts.append("</table>")
    if examples["longest"]:
        parts.append(head("h_longest") + "<table tabindex=0>")
        parts += [
            f"<tr><td class=count>{length}</td><td>{html.escape(text)}</td></tr>"
            for length, _, text in examples["longest"]
        ]
        parts.append("</table>")
    if examples["without_text"]:
        parts.append(
            head("h_without_text")
            + figures([(store, image_id, str(image_id)) for image_id in examples["without_text"]])
        )
    if examples["skipped"]:
        parts.append(head("h_skipped") + "<table tabindex=0>")
        for fault in examples["skipped"]:
            place = f"{fault.get('file') or ''}:{fault['line']}" if fault.get("line") else str(fault.get("file") or "")
            words = (str(fault.get(key)) for key in ("kind", "problem", "mend"))
            said = said_in(fault_in_words(*words), language)
            cells = (place, "" if fault.get("id") is None else str(fault["id"]), said)
            parts.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
        parts.append("</table>")
    for kind, rows in ({} if split.parallel is None else split.parallel.examples).items():
        parts += [head(f"h_{kind}"), _rows(rows)] if rows else []
    if split.parallel is not None:
        rows = read_parallel(store).rows
        parts += [head("h_sample"), _rows(random.Random(seed).sample(rows, min(_RANDOM, len(rows))))]
    if len(store):
        chosen = sorted(random.Random(seed).sample(range(len(store)), min(_RANDOM, len(store))))
        pairs = [store[index] for index in chosen]
        parts.append(head("h_sample") + figures([(store, pair.image_id, pair.text) for pair in pairs]))
    parts.append("</div></div>")
    return parts


def _rows(rows: list[dict[str, str]]) -> str:
    """Rows of parallel text as a table, a column for each language."""
    languages = list(dict.fromkeys(language for row in rows for language in row))
    lines = ["<tr>" + "".join(f"<th>{language}</th>" for language in languages) + "</tr>"]
    for row in rows:
        cells = (f"<td lang={language}>{html.escape(row.get(language, '–'))}</td>" for language in languages)
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return "<table tabindex=0>" + "".join(lines) + "</table>"


def figures(shown: list[tuple[PairSource, Id, str]]) -> str:
    """Thumbnails of (store, image id, words below) in rows, as HTML; below the words what is kept of the picture."""
    return "<div class='row'>" + "".join(_figure(*figure) for figure in shown) + "</div>"


def _figure(store: PairSource, image_id: Any, caption: str) -> str:
    kept = shown_in_page(store.columns_of(image_id))
    try:
        data = base64.b64encode(reencode(store.image(image_id), _THUMBNAIL)).decode("ascii")
        picture = f"<img alt='' src='data:image/jpeg;base64,{data}'>"
    except (DataFault, KeyError):
        picture = "<div class='missing'></div>"
    return f"<figure>{picture}<figcaption>{html.escape(caption)}{kept}</figcaption></figure>"
