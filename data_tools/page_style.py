"""How every page that is one file looks: light and dark as the reader's system is, readable on a phone, nothing to fetch."""

from __future__ import annotations

import html

from data_tools.words import LANGUAGES, said_in

_STYLE = """
:root { color-scheme: light dark; --ground: #fff; --ink: #222; --soft: #5f5f5f; --line: #ccc; --hold: #f3f3f3; --bad: #a40000; --good: #127a3a;
  --one: #1f5fbf; --two: #b3401f; --three: #12775a; --four: #7a3fa0 }
@media (prefers-color-scheme: dark) { :root { --ground: #161616; --ink: #e8e8e8; --soft: #a8a8a8; --line: #4a4a4a; --hold: #242424; --bad: #ff8a80;
  --good: #5fd08a; --one: #7fb2ff; --two: #f0996f; --three: #58cfa6; --four: #cf9cf0 } }
body { font: 15px/1.5 system-ui, "Noto Sans SC", "Microsoft YaHei", sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem;
  background: var(--ground); color: var(--ink); overflow-wrap: break-word }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 2em; border-bottom: 1px solid var(--line) } h2 small { font-weight: normal; color: var(--soft) }
table { border-collapse: collapse; display: block; overflow-x: auto; max-width: 100% }
td, th { text-align: left; padding: .15rem .9rem .15rem 0; vertical-align: top; overflow-wrap: anywhere }
td.count { white-space: nowrap; overflow-wrap: normal; text-align: right }
table.numbers td, table.numbers th { text-align: right; padding: .25em .7em; border-bottom: 1px solid var(--line); white-space: nowrap }
table.numbers th:first-child { text-align: left }
table.numbers tr:first-child th { white-space: normal; vertical-align: bottom } .whole { white-space: nowrap }
pre { background: var(--hold); padding: 1em; overflow: auto; font-size: 13px }
.hurts { color: var(--bad); font-weight: 600 } .row { display: flex; flex-wrap: wrap; gap: .8rem; margin: .5rem 0 1.2rem }
figure { margin: 0; width: 168px; max-width: 46% } figure img { max-width: 100%; max-height: 160px; border: 1px solid var(--line); display: block }
figcaption { font-size: 13px; overflow-wrap: anywhere } .kept { color: var(--soft) } .kept a { color: inherit } .missing { width: 100%; height: 60px; background: var(--hold) }
.found figure { max-width: 168px; width: auto; padding: 4px; border: 3px solid transparent; text-align: center } .found figure.right { border-color: var(--good) }
@media (min-width: 62rem) { .split { display: grid; grid-template-columns: 27rem 1fr; gap: 2rem } .split h3:first-child { margin-top: 0 } }
.split > div { min-width: 0 } .split th { min-width: 10.5em } .curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); gap: 1rem } .curves svg { width: 100%; height: auto }
svg text { fill: var(--soft); font-size: 11px } svg .name { fill: var(--ink); font-size: 13px } svg path { fill: none; stroke-width: 1.8; stroke-linecap: round; stroke-linejoin: round }
svg .axis { stroke: var(--line); stroke-width: 1 } svg .start { stroke: var(--soft); stroke-dasharray: 5 4 }
"""
_BEGINS = "<!doctype html><html lang='{}'><meta charset='utf-8'><title>{}</title>"
_TAGS = {"en": "en", "zh": "zh-CN"}
END = "</main></body></html>"


def beginning(title: str, language: str = "en") -> str:
    """A page down to where its content begins."""
    head = f"<meta name='viewport' content='width=device-width, initial-scale=1'><style>{_STYLE}</style><body><main>"
    return _BEGINS.format(_TAGS[language], html.escape(said_in(title, language))) + head


def beginnings(title: str) -> tuple[bytes, ...]:
    """What pages of this title are known by, those with an English title in Chinese pages too: older ones have it."""
    titles = dict.fromkeys(said_in(title, language) for language in LANGUAGES)
    return tuple(_BEGINS.format(tag, html.escape(each)).encode() for tag in _TAGS.values() for each in titles)
