"""Runs the commands of guide.md in their order, and draws what they print into docs/guide/.

    python docs/make_guide.py [--into docs/guide] [--folder WORK]

A picture below a block shows its output, 80 columns wide. WORK keeps what was made, for make_screenshots.py.
"""

from __future__ import annotations

import argparse
import html
import os
import re
import shlex
import subprocess
import sys
import tempfile
from itertools import groupby
from pathlib import Path

from rich.cells import cell_len
from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
_STEP = re.compile(r"^```bash\n(.*?)^```\n+(?:!\[[^\]]*\]\(guide/([\w-]+)\.svg\))?", re.MULTILINE | re.DOTALL)
_DRAWN = re.compile(r'x="([\d.]+)"([^>]*) textLength="([\d.]+)"([^>]*)>([^<]*)</text>')
_THEME = TerminalTheme((250, 250, 250), (36, 36, 40), [(0, 0, 0)] * 8)


def run(line: str, folder: Path) -> str:
    """What a command prints; `cnclip-ft` and `python` are those of this environment.

    Raises:
        SystemExit: it failed.
    """
    interpreter = shlex.quote(sys.executable)
    told = re.sub(r"^cnclip-ft ", f"{interpreter} -m cnclip_ft ", line)
    told = re.sub(r"^python ", f"{interpreter} ", told).replace("examples/", f"{ROOT}/examples/")
    env = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "80", "LC_ALL": "C.UTF-8"}
    done = subprocess.run(told, shell=True, cwd=folder, env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{line}\n{done.stdout}{done.stderr}")
    return done.stdout


def _in_its_cells(drawn: re.Match[str]) -> str:
    """rich takes Chinese letters to be as wide as others. They are twice as wide: each run of them, and between them, gets its own place."""
    start, more, width, rest, said = drawn.groups()
    text, runs = html.unescape(said), []
    cell, x = float(width) / max(len(text), 1), float(start)
    for _, letters in groupby(text, cell_len):
        run = "".join(letters)
        length = cell * cell_len(run)
        runs.append(f'<tspan x="{x:.1f}" textLength="{length:.1f}">{html.escape(run)}</tspan>')
        x += length
    return drawn[0] if len(text) == cell_len(text) else f'x="{start}"{more}{rest}>{"".join(runs)}</text>'


def picture(line: str, output: str, file: Path) -> None:
    """A terminal with the command and what it printed."""
    console = Console(record=True, width=80, file=open(os.devnull, "w"), force_terminal=True, color_system=None)  # noqa: SIM115
    console.print(Text(f"$ {line}"), soft_wrap=False)
    console.print(Text(output.rstrip() + "\n"))  # the frame cuts into its last line
    svg = console.export_svg(title="", theme=_THEME, font_aspect_ratio=0.61)
    # Fonts that are there: the reader's own, which has Chinese too; nothing is fetched.
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL).replace("Fira Code, monospace", "monospace")
    svg = _DRAWN.sub(_in_its_cells, svg)
    file.write_text("\n".join(line.rstrip() for line in svg.splitlines()) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--into", type=Path, default=HERE / "guide")
    parser.add_argument("--folder", type=Path, help="Where to work; must not exist.")
    chosen = parser.parse_args()
    into = chosen.into.resolve()
    into.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as passing:
        place = chosen.folder.resolve() if chosen.folder else Path(passing) / "work"
        place.mkdir(parents=True)
        for block, name in _STEP.findall((HERE / "guide.md").read_text(encoding="utf-8")):
            for line in block.strip().splitlines():
                print(f"$ {line}", flush=True)
                printed = run(line, place)
            if name:
                picture(line, printed, into / f"{name}.svg")


if __name__ == "__main__":
    main()
