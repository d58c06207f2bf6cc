"""Validation on two processes against one, same scores: one thread each, interleaved, medians.

    OMP_NUM_THREADS=1 python benchmarks/validation.py [--repeats 3] [--images 1024]

Noise pictures with one text each, a text tower and an image tower of four layers: encoding is nearly all of the time.
Bound: two processes on two free cores take 0.6 of the time of one. Other work on the cores shows in
that ratio, and hardly in the one of processor time, which is printed too.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from cnclip_ft.evaluation.kinds.recall import Recall
from cnclip_ft.models.start import build_start
from cnclip_ft.training.validation import Judge
from data_tools.store import StoreWriter, open_store

SPEC = {
    "image": {"kind": "vit", "hidden": 384, "layers": 4, "heads": 6, "patch": 16, "image_size": 112},
    "text": {"hidden": 384, "layers": 4, "heads": 6, "dropout": 0.0},
    "projection": 256,
}


def write(folder: Path, images: int) -> None:
    import io

    from PIL import Image

    random = np.random.default_rng(0)
    with StoreWriter(folder) as writer:
        for number in range(images):
            file = io.BytesIO()
            Image.fromarray(random.integers(0, 256, (112, 112, 3), dtype=np.uint8)).save(file, "JPEG")
            writer.add_image(number, file.getvalue())
            writer.add_pair(number, number, f"第{number}张图片里的风景" * 2)
        writer.finish()


def work(rank: int, folder: str, repeats: int) -> None:
    """The first process judges alone while the other waits at a socket, then both judge, and so on."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model, _ = build_start(SPEC)
    judge = Judge({"valid": Recall(open_store(Path(folder, "store")))}, torch.device("cpu"), 0, nullcontext)
    judge(model)  # warm
    alone, both, own, shared = [], [], [], []  # seconds that passed, and of this process's processor
    for _ in range(repeats):
        dist.barrier()
        if rank == 0:
            used = time.process_time()
            alone.append(_alone(judge, model))
            own.append(time.process_time() - used)
        dist.barrier()
        used = time.process_time()
        both.append(judge(model).seconds)
        shared.append(time.process_time() - used)
    if rank == 0:
        one, two = statistics.median(alone), statistics.median(both)
        ratios = [b / a for a, b in zip(alone, both, strict=True)]
        print(
            f"one process {one:.2f} s   two {two:.2f} s   ratio {two / one:.2f} (pairs {min(ratios):.2f} … {max(ratios):.2f}; bound 0.6)"
        )
        used, half = statistics.median(own), statistics.median(shared)
        print(
            f"processor time of the first process: alone {used:.2f} s   beside another {half:.2f} s   ratio {half / used:.2f}"
        )
    dist.barrier()
    dist.destroy_process_group()


def _alone(judge: Judge, model) -> float:
    """Seconds of a judgement by this process only, as one that was started alone."""
    from unittest.mock import patch

    import cnclip_ft.collectives as collectives

    names = ("cnclip_ft.collectives", "cnclip_ft.features.shared_encoder", "cnclip_ft.training.validation")
    patches = [patch.object(sys.modules[name], "world_size", lambda: 1) for name in names]
    patches.append(patch.object(collectives, "rank", lambda: 0))
    for each in patches:
        each.start()
    began = time.perf_counter()
    try:
        judge(model)
    finally:
        for each in patches:
            each.stop()
    return time.perf_counter() - began


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--images", type=int, default=1024)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder, "store"), asked.images)
        mp.spawn(work, (folder, asked.repeats), nprocs=2)
