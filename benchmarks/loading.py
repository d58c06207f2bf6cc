"""Loading: peak memory of ViT-H-14 over its weights, and time of ViT-B-16 beside transformers on the same folder.

    python benchmarks/loading.py [--folder DIR] [--repeats 5]

Draws checkpoints of random weights (3.8 and 0.75 GB in float32; kept in DIR, else removed). Each load runs in a fresh
process: the time includes the imports, as in a script that starts, loads and answers. The processes of the two
libraries alternate, so that a busy machine slows both; given are the least and the median. The file is in the page
cache for both. Peak memory is the kernel's VmHWM (Linux), everything included: Python, torch, transformers.

Bounds: peak ≤ 1.15 × weights, time ≤ 1.3 × transformers.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MAKE = """
import sys, torch
from cnclip_ft.models.assembly import Checkpoint, assemble
from cnclip_ft.models.formats.recognise import recognise
from cnclip_ft.models.families.chinese_clip.catalog import ARCHITECTURES
from cnclip_ft.models.checkpoints import save_checkpoint
from cnclip_ft.models.families.chinese_clip.roberta import RobertaTower
from cnclip_ft.models.families.chinese_clip.vit import ViTTower
architecture = ARCHITECTURES[sys.argv[1]]
with torch.device("meta"):
    towers = ViTTower.make(architecture.image, architecture.projection), RobertaTower.make(architecture.text, architecture.projection)
shapes = {name: tensor for tower in towers for name, tensor in tower.state_dict().items()}
description = recognise(shapes, "catalogue")
noise = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)) * 0.02
def fill(shape):
    return noise.repeat(-(-shape.numel() // noise.numel()))[: shape.numel()].view(shape).clone()
tensors = {name: fill(tensor.shape) for name, tensor in shapes.items()} | {"logit_scale": torch.tensor(4.6)}
save_checkpoint(assemble(Checkpoint("drawn", description, tensors)), sys.argv[2], info={})
"""
MEASURE = """
import json, resource, sys, time
{load}
peak = next((int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM")), None)
usage = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps({{"peak": peak, "cpu": usage.ru_utime + usage.ru_stime}}))
"""
OURS = "import cnclip_ft; model = cnclip_ft.load(sys.argv[1])"
THEIRS = "from transformers import ChineseCLIPModel; model = ChineseCLIPModel.from_pretrained(sys.argv[1]).eval()"


def run(code: str, *arguments: str | Path) -> tuple[float, dict[str, float]]:
    """Seconds of a fresh process from start to end, and what it printed last."""
    import time

    environment = dict(os.environ, PYTHONPATH=str(ROOT), HF_HUB_OFFLINE="1", HF_HUB_DISABLE_PROGRESS_BARS="1")
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], env=environment, capture_output=True, text=True
    )
    seconds = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(done.stderr)
    lines = done.stdout.strip().splitlines()
    return seconds, json.loads(lines[-1]) if lines else {}


def make(name: str, folder: Path) -> Path:
    target = folder / name
    if not target.exists():
        run(MAKE, name, target)
    return target


def peak_memory(folder: Path) -> None:
    weights = (folder / "model.safetensors").stat().st_size
    for label, load in (("cnclip_ft.load", OURS), ("ChineseCLIPModel.from_pretrained", THEIRS)):
        _, found = run(MEASURE.format(load=load), folder)
        print(
            f"{folder.name:9} {label:33} peak {found['peak'] / 1e9:6.2f} GB = {found['peak'] / weights:.3f} × weights"
        )


def time_beside_transformers(folder: Path, repeats: int) -> None:
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    cpu: dict[str, list[float]] = {"ours": [], "theirs": []}
    for number in range(repeats + 1):
        for label, load in (("ours", OURS), ("theirs", THEIRS)):
            taken, found = run(MEASURE.format(load=load), folder)
            if number:  # the first of each fills the page cache
                seconds[label].append(taken)
                cpu[label].append(found["cpu"])
    for what, values in (("seconds", seconds), ("CPU seconds", cpu)):
        for label, name in (("ours", "cnclip_ft.load"), ("theirs", "ChineseCLIPModel.from_pretrained")):
            print(
                f"{folder.name:9} {name:33} {what}: least {min(values[label]):.2f}, median {statistics.median(values[label]):.2f}"
            )
        print(
            f"{folder.name:9} ratio of {what}: least {min(values['ours']) / min(values['theirs']):.2f}, "
            f"median {statistics.median(values['ours']) / statistics.median(values['theirs']):.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="keep the checkpoints here")
    parser.add_argument("--repeats", type=int, default=5)
    settings = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = settings.folder or Path(temporary)
        time_beside_transformers(make("ViT-B-16", folder), settings.repeats)
        if not Path("/proc/self/status").exists():
            print("peak memory is read from /proc: Linux only")
            return
        peak_memory(make("ViT-H-14", folder))


if __name__ == "__main__":
    main()
