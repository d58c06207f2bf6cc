"""What a curation would leave out, with thumbnails, on one page that needs nothing else; in English or Chinese."""

from __future__ import annotations

import html
from pathlib import Path

from cnclip_ft.evaluation.curation.finding import Curation, Misfit
from data_tools.atomic import whole_file
from data_tools.check.page import figures
from data_tools.page_style import END, beginning, beginnings
from data_tools.store import Id, PairSource
from data_tools.words import Said, said_in

_TITLE = Said("data curate", "数据清理")
BEGINS = beginnings(_TITLE)  # what it is known by
_SHOWN = 60
_WORDS = {
    "title": ("What would be left out", "将会去掉的内容"),
    "like": ("Pictures like another ({count:,})", "与另一张相似的图片（{count:,}）"),
    "like_how": (
        "The first of each row stays: it is the largest. The others go, with their texts.",
        "每行第一张保留（尺寸最大），其余连同文本去掉。",
    ),
    "stays": ("stays: {image_id}", "保留：{image_id}"),
    "misfits": ("Captions that do not fit their picture ({count:,}), the worst first", "与图片不符的文本（{count:,}），最不符的在前"),
    "just": ("Just above the limit: these stay", "刚好高于界限：这些保留"),
    "just_how": (
        "If most of these are wrong too, raise --fit; if most of those above are right, lower it.",
        "若这些多数也不对，请调高 --fit；若上面多数其实是对的，请调低。",
    ),
    "crowds": ("Texts on more than {most:,} pictures", "出现在超过 {most:,} 张图片上的文本"),
    "crowd": ("{images:,} pictures, {leaves:,} of the pairs go: those that fit least", "{images:,} 张图片，去掉其中 {leaves:,} 对：最不相符的"),
    "none": ("none", "无"),
    "more": ("… and {count:,} more; all of them are in the list", "……另有 {count:,} 项，全部见清单"),
}  # fmt: skip


def write_page(found: Curation, store: PairSource, file: Path, language: str) -> None:
    """Raises:
    UserError: the file cannot be written.
    """

    def say(name: str, **values: int) -> str:
        return html.escape(said_in(Said(*_WORDS[name], **values), language))

    def rest(count: int) -> str:
        return f"<p>{say('more', count=count - _SHOWN)}</p>" if count > _SHOWN else ""

    def pairs(misfits: list[Misfit]) -> str:
        return figures([(store, one.image_id, f"{one.score:.3f} {one.text}") for one in misfits[:_SHOWN]])

    parts = [beginning(_TITLE, language), f"<h1>{say('title')}</h1><ul>"]
    parts += [f"<li>{html.escape(said_in(line, language))}</li>" for line in found.lines()]
    parts.append(f"</ul><h2>{say('like', count=len(found.dropped_images))}</h2><p>{say('like_how')}</p>")
    for group in sorted(found.groups, key=lambda group: -len(group.others))[:_SHOWN]:
        row: list[tuple[PairSource, Id, str]] = [
            (store, group.stays, said_in(Said(*_WORDS["stays"], image_id=group.stays), language))
        ]
        row += [(store, image_id, f"{score:.3f} {image_id}") for image_id, score in group.others[:11]]
        parts.append(figures(row))
    parts.append(rest(len(found.groups)) or ("" if found.groups else f"<p>{say('none')}</p>"))
    parts.append(f"<h2>{say('misfits', count=len(found.misfits))}</h2>{pairs(found.misfits)}{rest(len(found.misfits))}")
    parts.append(f"<h2>{say('just')}</h2><p>{say('just_how')}</p>{pairs(found.just_fit)}")
    parts.append(f"<h2>{say('crowds', most=found.most)}</h2>" + ("" if found.crowds else f"<p>{say('none')}</p>"))
    for crowd in found.crowds[:_SHOWN]:
        parts.append(
            f"<h3>{html.escape(crowd.text)}</h3><p>{say('crowd', images=crowd.images, leaves=len(crowd.leaves))}</p>"
        )
        shown = [(store, image_id, "") for image_id in crowd.stays]
        parts.append(figures(shown + [(store, image_id, f"{score:.3f}") for image_id, _, score in crowd.leaves[-6:]]))
    parts.append(rest(len(found.crowds)))
    with whole_file(file, "w") as page:
        page.write("\n".join([*parts, END]))
