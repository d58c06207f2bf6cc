"""Training on a GPU beside others, as `benchmarks/step.py cuda` prints it: one table, then where our time goes.

    python benchmarks/step.py cuda                  in at most 300 s; rows for which no time is left say so
    DEVICE=cpu python benchmarks/step.py cuda       a rehearsal of every row on the CPU with tiny models, of no worth as numbers

The most telling rows come first, each has its own limit of seconds, and one that fails ends nothing. Rows:

* ours: a stage of a real run with its loader, ids, clipping and checks, bf16, plain and compiled (max-autotune too), with JPEGs decoded by
  workers and by the card, with products in 8 bits;
* official: cn_clip's own step in fp16 with loss scaling, its batches ready made (a process of its own);
* open_clip style: transformers' towers compiled, bf16, texts of 52 tokens, the full matrix of logits, fused AdamW;
* transformers: the model's own loss as in the library's contrastive example, bf16, texts of 52 tokens;
* top-10 of 100,000 × 100,000 features, and pictures encoded with decoding in front, beside the forward alone.

Batches fill the card, up to the same size on all sides: what a pair takes was counted once (`PAIR`). Of a batch that does not fit a
line says so, and it is cut by a quarter. FLOP are those of `training.throughput`; a share is of the card's measured rate of bf16
products, the second one of its listed rate.
"""

from __future__ import annotations

import gc
import io
import os
import signal
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.gpu_sides import DEVICE, REHEARSAL, OfficialSide, Ours, Peer, wait
from benchmarks.step import captions, write_store
from cnclip_ft.training import throughput

SECONDS = float(os.environ.get("SECONDS", 55 if REHEARSAL else 300))
GROUP = 1 if REHEARSAL else 4  # steps between two waits for the card; a run waits after none
# MiB of activations a pair takes in bf16, both towers: ours, and theirs with all tokens of all layers. Counted on a CPU.
PAIR = {"tiny": (1, 1), "ViT-B-16": (90, 125), "ViT-L-14": (300, 350)}
TEXT_PAIR = (15, 27)  # of the text tower alone: with a frozen trunk


def fitting(megabytes: int, most: int) -> int:
    """Pairs that fill five sixths of the card beside 16 bytes a weight of the larger models."""
    if REHEARSAL:
        return 8
    free = torch.cuda.get_device_properties(0).total_memory * 5 / 6 - 5 * 2**30
    return max(32, min(most, int(free / (megabytes * 2**20)) // 32 * 32))


def batch_of(size: str, stage: str, side: int) -> int:
    """Pairs of a step, ours (0) or theirs (1): the same number wherever theirs fit too."""
    return fitting(TEXT_PAIR[side], 4096) if stage == "one" else fitting(PAIR[size][side], 2048)


# ---- rows -----------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """A line of the table: `make` builds a side for a batch; `limit` is in seconds."""

    size: str
    stage: str
    label: str
    make: Callable[[int], Any]
    batch: int
    limit: float
    profiled: bool = False

    @property
    def place(self) -> str:
        return f"{self.size:<9} {self.stage:<5} {self.label:<32}"


SIGLIP = {
    "image": {"kind": "siglip", "hidden": 768, "layers": 12, "heads": 12, "patch": 16, "image_size": 224},
    "text": {"hidden": 768, "layers": 12, "heads": 12}, "projection": 768,
}  # fmt: skip
TINY_SIGLIP = {
    "image": {"kind": "siglip", "hidden": 32, "layers": 2, "heads": 2, "patch": 8, "image_size": 32},
    "text": {"hidden": 32, "layers": 2, "heads": 2}, "projection": 32,
}  # fmt: skip


def rows_of(folder: Path, texts: list[str]) -> list[Row | Extra]:
    """The table, the most telling first."""
    base, large = "tiny" if REHEARSAL else "ViT-B-16", "ViT-L-14"

    def ours(
        size: str,
        stage: str,
        limit: float,
        *,
        compiled: bool | str,
        label: str = "ours",
        profiled: bool = False,
        **settings: Any,
    ) -> Row:
        settings |= {"frozen": stage == "one", "compile": compiled}
        make = lambda n: Ours(folder, size, n, texts, **settings)  # noqa: E731
        words = {False: "", True: ", compiled", "layers": ", compiled by layers", "max-autotune": ", max-autotune"}
        return Row(size, stage, label + words[compiled], make, batch_of(size, stage, 0), limit, profiled)

    def official(size: str, stage: str, limit: float) -> Row:
        make = lambda n: OfficialSide(folder, size, n, texts, frozen=stage == "one")  # noqa: E731
        return Row(size, stage, "official, fp16", make, batch_of(size, stage, 1), limit)

    def peer(size: str, stage: str, style: str, label: str, limit: float) -> Row:
        make = lambda n: Peer(size, n, texts, frozen=stage == "one", style=style)  # noqa: E731
        return Row(size, stage, label, make, batch_of(size, stage, 1), limit)

    siglip = {"start": TINY_SIGLIP if REHEARSAL else SIGLIP, "stage_settings": {"objective": {"kind": "sigmoid"}}}
    rows: list[Row | Extra] = [
        official(base, "two", 45),
        ours(base, "two", 60, compiled="layers", profiled=True),
        peer(base, "two", "open_clip", "open_clip style, compiled", 90),
        ours(large, "two", 60, compiled="layers"),
        ours(base, "one", 45, compiled=False),
        Extra("top-10, 100,000 × 100,000", top_ten, 25),
        Extra("pictures encoded", lambda: encoded(folder, base), 40),
        ours(base, "two", 100, compiled=True),
        ours(base, "two", 40, compiled=False),
        ours(base, "two", 50, compiled="layers", label="ours, SigLIP", **siglip),
        ours(base, "two", 50, compiled="layers", label="ours, JPEGs by the card", decode="device"),
        peer(base, "two", "plain", "transformers", 30),
        ours(base, "two", 60, compiled="layers", label="ours, 8 bits", fp8=True),
        official(large, "two", 60),
        ours(base, "one", 40, compiled="layers"),
        ours(large, "one", 50, compiled=False),
        official(base, "one", 45),
        ours(large, "two", 50, compiled=False),
        ours(base, "two", 120, compiled="max-autotune"),
        peer(large, "two", "plain", "transformers", 45),
        peer(base, "one", "plain", "transformers", 30),
        peer(large, "two", "open_clip", "open_clip style, compiled", 90),
        ours(base, "one", 40, compiled=False, label="ours, SigLIP", **siglip),
        official(large, "one", 45),
        peer(large, "one", "plain", "transformers", 30),
        peer(base, "one", "open_clip", "open_clip style, compiled", 60),
        peer(large, "one", "open_clip", "open_clip style, compiled", 60),
    ]
    once = not REHEARSAL  # there all sizes are tiny
    return [row for row in rows if once or isinstance(row, Extra) or row.size == base]


def measured(row: Row) -> tuple[int, float, float, Any]:
    """(batch, seconds a step, GiB, the side) with the row's batch, or the largest of its three quarters that fits, each said."""
    batch = row.batch
    while True:
        clean()
        side = None
        try:
            side = row.make(batch)
            times: list[float] = []
            for warm in range(1 if REHEARSAL else 4):
                last = side.step()
                if DEVICE == "cuda" and warm == 2:
                    torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
            least, most = (1, 1) if REHEARSAL else (2, 6)
            group = GROUP if last < 0.5 else 1  # what is waited for after a long step is nothing beside it
            while len(times) < least or (len(times) < most and time.perf_counter() - began < 6):
                times.append(side.step(group))
            return batch, statistics.median(times), side.memory(), side
        except (
            Exception,
            SystemExit,
        ) as error:  # its time may be over too: nothing of it may go on beside the next row
            left, _ = signal.setitimer(signal.ITIMER_REAL, 0)  # clearing up takes as long as it takes
            if side is not None:
                side.close()
            # The official process ends when its memory does.
            short = "memory" in str(error).lower() or "ended early" in str(error)
            if REHEARSAL or isinstance(error, OutOfTime) or not short or batch <= row.batch // 4:
                raise
            print(f"{row.place} {batch:6d} does not fit: {' '.join(str(error).split())[:70]}", flush=True)
            del error
        if left:  # of the row's time: a smaller batch gets no more
            signal.setitimer(signal.ITIMER_REAL, left, 1.0)
        batch = max(batch * 3 // 4 // 32 * 32, 32)


def clean() -> None:
    torch.compiler.reset()
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


@dataclass
class Extra:
    """A line that is no training step: `measure` says what it found."""

    label: str
    measure: Callable[[], str]
    limit: float

    @property
    def place(self) -> str:
        return f"{self.label:<48}"


def top_ten() -> str:
    """The ten best of 100,000 for each of 100,000 vectors of 512 numbers, exactly; the answers lie on the CPU."""
    from cnclip_ft.retrieval.recall import topk

    count = 500 if REHEARSAL else 100_000
    generator = torch.Generator(DEVICE).manual_seed(0)
    queries, gallery = (
        torch.nn.functional.normalize(torch.randn(count, 512, device=DEVICE, generator=generator), dim=1)
        for _ in range(2)
    )
    topk(queries[: count // 100], gallery, 10, device=DEVICE)
    wait()
    began = time.perf_counter()
    topk(queries, gallery, 10, device=DEVICE)
    return f"{count:,} × {count:,}: {time.perf_counter() - began:.2f} s"


def encoded(folder: Path, size: str) -> str:
    """Pictures a second of `iterate_images` from JPEGs on, after its first four batches, and of the forward alone."""
    from cnclip_ft.features.encode import evaluating, iterate_images
    from cnclip_ft.models.start import build_start
    from data_tools.store import open_store

    store, batch = open_store(folder / "train"), 8 if REHEARSAL else 256
    model = build_start({"architecture": size})[0].to(DEVICE)
    ids = list(store.image_ids) * (1 if REHEARSAL else 4)
    with evaluating(model, DEVICE, torch.bfloat16):
        pixels = torch.randint(0, 256, (batch, 3, model.image_size, model.image_size), dtype=torch.uint8, device=DEVICE)
        rounds = 3 if REHEARSAL else 20
        for _ in range(rounds):
            model.image_features(pixels)
        wait()
        began = time.perf_counter()
        for _ in range(rounds):
            model.image_features(pixels)
        wait()
        alone = rounds * batch / (time.perf_counter() - began)
        workers = 0 if REHEARSAL else (os.cpu_count() or 2) - 2
        parts = iterate_images(model, ids, store.image, batch_size=batch, workers=workers)
        for _ in range(4):
            next(parts)
        began, seen = time.perf_counter(), 0
        for part in parts:
            seen += len(part)
        whole = seen / (time.perf_counter() - began)
    return f"{whole:,.0f} a second, the forward alone {alone:,.0f}: {whole / alone:.2f}×"


def profile(side: Ours, batch: int) -> str:
    """Where a step of ours goes: the ten dearest kernels, gaps between kernels, waiting for the loader."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    steps, stage = 1 if REHEARSAL else 5, side.stage
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if DEVICE == "cuda" else [])
    with profiler(activities=activities) as seen:
        wait()
        waited, began = 0.0, time.perf_counter()
        for _ in range(steps):
            asked = time.perf_counter()
            ready = next(stage.batches)
            waited += time.perf_counter() - asked
            stage.trainer.take(ready)
        wait()
        wall = time.perf_counter() - began
        waited += stage.trainer.waited_for_decoding()
    name = "self_device_time_total" if DEVICE == "cuda" else "self_cpu_time_total"
    rows = sorted(seen.key_averages(), key=lambda row: -getattr(row, name))
    if DEVICE == "cuda":
        # Spans that the program names are on the card's line too, over the kernels inside.
        rows = [
            row
            for row in rows
            if str(row.device_type).endswith("CUDA") and not getattr(row, "is_user_annotation", False)
        ]
    busy = sum(getattr(row, name) for row in rows) / 1e6
    lines = [
        f"profile of ours, batch {batch}, {steps} steps of {wall / steps:.4f} s: device busy {100 * busy / wall:.0f} %, "
        f"gaps {100 * max(0.0, 1 - busy / wall):.0f} %, waiting for the loader {100 * waited / wall:.1f} %"
    ]
    lines += [
        f"  {getattr(row, name) / 1e3 / steps:9.3f} ms a step {100 * getattr(row, name) / 1e6 / busy:5.1f} % {row.count // steps:6d} calls  {row.key[:90]}"
        for row in rows[:10]
    ]
    return "\n".join(lines)


# ---- the table ------------------------------------------------------------------------------------------------------


class OutOfTime(Exception):
    """A row's seconds are over."""


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raises OutOfTime inside when the time is over."""

    def over(*_: Any) -> None:
        raise OutOfTime(f"more than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, over)
    # Again every second: what is raised while Python clears up (a weak reference's callback) is swallowed.
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def pictures(count: int) -> list[bytes]:
    """JPEGs of 288 pixels, as stores hold them: 16 are drawn, the others are told apart by their last bytes."""
    random_, drawn = np.random.default_rng(0), []
    for _ in range(16):
        rough = Image.fromarray(random_.integers(0, 256, (24, 24, 3), dtype=np.uint8)).resize(
            (384, 288), Image.Resampling.BICUBIC
        )
        out = io.BytesIO()
        rough.save(out, "JPEG", quality=90)
        drawn.append(out.getvalue())
    return [drawn[n % 16] + bytes([n % 256, n // 256]) for n in range(count)]


def main() -> None:
    if DEVICE == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device here")
    end = time.perf_counter() + SECONDS
    warnings.filterwarnings("ignore")
    device = torch.device(DEVICE)
    if REHEARSAL:
        torch.set_num_threads(1)  # tiny layers: threads that wait for one another take longer where the machine is busy
        rate = throughput.product_rate(device, torch.bfloat16, side=256, repeats=2)
        card = throughput.Card("CPU (a rehearsal: these are no figures)", rate, None)
    else:
        card = throughput.card(device, "bf16")
    print(f"{card}; torch {torch.__version__}")
    head = f"{'size':<9} {'stage':<5} {'':<32} {'batch':>6} {'pairs/s':>9} {'GiB':>6} {'measured':>9} {'listed':>7} {'× official':>11} {'took':>6}"
    print(head, flush=True)
    texts, notes, official = captions(64 if REHEARSAL else 5000), [], {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_store(folder / "train", texts, pictures(len(texts)))
        for row in rows_of(folder, texts):
            began, side = time.perf_counter(), None
            if end - began < (1.0 if REHEARSAL else min(15.0, row.limit / 2)):
                print(f"{row.place} not measured: no time left", flush=True)
                continue
            try:
                with limited(min(SECONDS / 2 if REHEARSAL else row.limit, end - began)):
                    if isinstance(row, Extra):
                        print(f"{row.place} {row.measure()} ({time.perf_counter() - began:.0f} s)", flush=True)
                        continue
                    batch, seconds, memory, side = measured(row)
                    pairs, flops = batch / seconds, side.flops
                    if row.label.startswith("official"):
                        official[row.size, row.stage] = pairs
                    base = official.get((row.size, row.stage))
                    beside = f"{pairs / base:10.2f}×" if base else f"{'-':>11}"
                    known = f"{100 * flops * pairs / card.listed:6.0f}%" if card.listed else f"{'-':>7}"
                    print(
                        f"{row.place} {batch:6d} {pairs:9.1f} {memory:6.1f} {100 * flops * pairs / card.measured:8.0f}% {known} {beside} "
                        f"{time.perf_counter() - began:5.0f}s",
                        flush=True,
                    )
                    if row.profiled:
                        notes.append("the profile failed")
                        notes[-1] = profile(side, batch)
            except (Exception, SystemExit) as error:  # noqa: BLE001 - one row that fails does not end the table
                said = " ".join(str(error).split())
                print(f"{row.place} failed: {type(error).__name__}: {said[:160]}", flush=True)
            finally:
                with suppress(Exception):
                    side.close()
                side = None
    print("\n".join(notes), flush=True)
    print(f"took {SECONDS - (end - time.perf_counter()):.0f} s", flush=True)
