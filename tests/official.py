"""The official package and open_clip beside ours: they live in a folder of their own and run in a subprocess.

Their pins do not fit this environment, so they are never imported here. `run_scripts/test.sh`
installs them into `.official`; without them the parity tests are skipped with the reason.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(os.environ.get("CNCLIP_FT_OFFICIAL", Path(__file__).resolve().parents[1] / ".official"))

# A CPU build of torch has no torchvision that registers its kernels, and the scripts call .cuda().
PRELUDE = """
import sys, types
sys.modules["torchvision._meta_registrations"] = types.ModuleType("torchvision._meta_registrations")
import torch
torch.Tensor.cuda = lambda self, *a, **k: self
torch.nn.Module.cuda = lambda self, *a, **k: self
"""

requires_official = pytest.mark.skipif(
    not (FOLDER / "cn_clip").is_dir(),
    reason=f"the official package is not in {FOLDER} (run_scripts/test.sh installs it; needs the network)",
)

requires_open_clip = pytest.mark.skipif(
    not (FOLDER / "open_clip").is_dir(),
    reason=f"open_clip is not in {FOLDER} (run_scripts/test.sh installs it; needs the network)",
)


def run_official(code: str, *arguments: str | Path, cwd: Path | None = None, timeout: int = 600) -> str:
    """Run Python `code` where `import cn_clip` works; return what it printed."""
    environment = dict(os.environ, PYTHONPATH=str(FOLDER), PYTHONUTF8="1", HF_HUB_OFFLINE="1")
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + code, *map(str, arguments)],
        env=environment,
        cwd=cwd,
        timeout=timeout,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout
