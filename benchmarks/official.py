"""Processes that do one piece of work for every line they are sent, with the official package or without."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.official import FOLDER, PRELUDE  # noqa: E402


class Side:
    """Runs `code` in a process of its own; `ask` sends a line and waits for the number answered.

    The code reads lines from stdin and prints, after each, a number alone or ``SECONDS number``; what else it prints is
    passed over. `path` is where it finds packages first.
    """

    def __init__(self, code: str, *arguments: str | Path, path: Path = ROOT) -> None:
        python_path = os.pathsep.join([str(path), os.environ.get("PYTHONPATH", "")])
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)],
            env=os.environ | {"PYTHONPATH": python_path, "PYTHONUTF8": "1", "HF_HUB_OFFLINE": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )

    def ask(self, line: str = "go") -> float:
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        while answer := self.process.stdout.readline():
            words = answer.split()
            if len(words) == 1 or words[:1] == ["SECONDS"]:
                return float(words[-1])
        raise SystemExit("the process of the other side ended early")

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


class Official(Side):
    """With the official package; on a CPU `.cuda()` does nothing, as its code calls it everywhere."""

    def __init__(self, code: str, *arguments: str | Path, cuda: bool = False) -> None:
        if not (FOLDER / "cn_clip").is_dir():
            raise SystemExit(f"the official package is not in {FOLDER}: run_scripts/test.sh installs it")
        prelude = PRELUDE.partition("torch.Tensor.cuda")[0] if cuda else PRELUDE
        super().__init__(prelude + code, *arguments, path=FOLDER)
