"""Training on a GPU beside others, as `benchmarks/step.py cuda` prints it: one table, then where our time goes.

    python benchmarks/step.py cuda                  in at most 300 s; rows for which no time is left say so
    DEVICE=cpu python benchmarks/step.py cuda       a rehearsal of the same rows on the CPU, of no worth as numbers

Every row finds its own batch: it begins with one that should fill the card and halves it when memory runs out. Rows:

* official: cn_clip's own step in fp16 with loss scaling, its batches ready made (a process of its own);
* open_clip style: transformers' towers compiled, bf16, texts of 52 tokens, the full matrix of logits, fused AdamW;
* transformers: the model's own loss as in the library's contrastive example, bf16, texts of 52 tokens;
* ours: a stage of a real run with its loader, ids, clipping and checks, bf16, plain and compiled.

A share is that of the card's measured rate of bf16 products (8192³), counting the towers' products alone.
"""

from __future__ import annotations

import gc
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.official import Official
from benchmarks.step import OFFICIAL_STEP, TEXT_OF, OurStage, captions, flops_per_pair, pictures_of_noise, write_store
from data_tools.errors import UserError

DEVICE = os.environ.get("DEVICE", "cuda")
REHEARSAL = DEVICE == "cpu"
SECONDS, REPEATS = (60.0, 1) if REHEARSAL else (300.0, 12)
TOKENS = 52  # what the others pad every text to
# Size, stage, largest batch: the most telling first. (The official package has no tiny size: a row that fails.)
PLAN = (
    (("tiny", "two", 8), ("tiny", "one", 8))
    if REHEARSAL
    else (
        ("ViT-B-16", "two", 1024),
        ("ViT-B-16", "one", 4096),
        ("ViT-L-14", "two", 384),
        ("ViT-L-14", "one", 4096),
    )
)


def _wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def matrix_rate() -> float:
    """Measured bf16 products of 8192³, FLOP/s (smaller ones in a rehearsal)."""
    side = 512 if REHEARSAL else 8192
    a, b = (torch.randn(side, side, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(5):
        a @ b
    _wait()
    began = time.perf_counter()
    for _ in range(20):
        a @ b
    _wait()
    return 20 * 2 * side**3 / (time.perf_counter() - began)


class Peer:
    """transformers' ChineseCLIPModel of a size, stepped as others do it."""

    def __init__(self, size: str, batch: int, texts: list[str], *, frozen: bool, style: str) -> None:
        from transformers import ChineseCLIPConfig, ChineseCLIPModel

        from cnclip_ft.models.checkpoints import transformers_config
        from cnclip_ft.models.families.chinese_clip.wordpiece import TextTokenizer
        from cnclip_ft.models.start import build_start

        torch.manual_seed(0)
        source = build_start({"architecture": size})[0]
        self.model = ChineseCLIPModel(ChineseCLIPConfig(**transformers_config(source))).to(DEVICE).train()
        del source
        self.batch, self.frozen, self.style = batch, frozen, style
        if frozen:
            self.model.vision_model.requires_grad_(False)
            self.model.visual_projection.requires_grad_(False)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-6, betas=(0.9, 0.98), eps=1e-6, fused=True)
        self.forward = self.model
        if style == "open_clip":
            self.forward = torch.compile(self._features) if not REHEARSAL else self._features
        side = self.model.config.vision_config.image_size
        ids, mask = TextTokenizer(context_length=TOKENS).pad(TextTokenizer(context_length=TOKENS).encode(texts[:batch]))
        missing = TOKENS - ids.shape[1]
        self.ids, self.mask = (torch.nn.functional.pad(t, (0, missing)).to(DEVICE) for t in (ids, mask))
        self.pixels = torch.randn(batch, 3, side, side, device=DEVICE)

    def _features(self, pixels, ids, mask):
        image = self.model.get_image_features(pixel_values=pixels).pooler_output
        text = self.model.get_text_features(input_ids=ids, attention_mask=mask).pooler_output
        return torch.nn.functional.normalize(image, dim=-1), torch.nn.functional.normalize(text, dim=-1)

    def step(self) -> float:
        began = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            if self.style == "open_clip":
                image, text = self.forward(self.pixels, self.ids, self.mask)
                logits = self.model.logit_scale.exp() * image @ text.T
                own = torch.arange(len(logits), device=DEVICE)
                loss = (
                    torch.nn.functional.cross_entropy(logits, own) + torch.nn.functional.cross_entropy(logits.T, own)
                ) / 2
            else:
                loss = self.forward(
                    input_ids=self.ids, pixel_values=self.pixels, attention_mask=self.mask, return_loss=True
                ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, 4.6052)
        _wait()
        return time.perf_counter() - began


def official_seconds(size: str, batch: int, texts: list[str], frozen: bool) -> tuple[float, float]:
    """(seconds a step, GiB) of the official step."""
    arguments = (size, TEXT_OF.get(size, "RoBERTa-wwm-ext-base-chinese"), str(batch), "frozen" if frozen else "both",
                 str(torch.get_num_threads()), "-", DEVICE)  # fmt: skip
    official = Official(OFFICIAL_STEP, *arguments, cuda=DEVICE == "cuda")
    try:
        lines = [json.dumps(random.Random(n).sample(texts, batch), ensure_ascii=False) for n in range(3)]
        for _ in range(1 if REHEARSAL else 4):
            official.ask(lines[0])
        times = [official.ask(lines[n % 3]) for n in range(REPEATS)]
        return statistics.median(times), official.ask("memory") / 2**30
    finally:
        official.close()


def stepped(make: Callable[[], OurStage | Peer], warm: int) -> tuple[float, float, OurStage | Peer]:
    """(seconds a step, peak GiB, what stepped)."""
    stage = make()
    for _ in range(warm):
        stage.step()
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = [stage.step() for _ in range(REPEATS)]
    return statistics.median(times), torch.cuda.max_memory_allocated() / 2**30 if DEVICE == "cuda" else 0.0, stage


def profile(stage: OurStage, batch: int) -> None:
    """Where a step of ours goes: the ten dearest kernels, gaps between kernels, waiting for the loader."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    steps = 1 if REHEARSAL else 6
    waited, began = 0.0, time.perf_counter()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if DEVICE == "cuda" else [])
    with profiler(activities=activities) as seen:
        for _ in range(steps):
            asked = time.perf_counter()
            ready = next(stage.batches)
            waited += time.perf_counter() - asked
            stage.trainer.take(ready)
        _wait()
    wall = time.perf_counter() - began
    name = "self_device_time_total" if DEVICE == "cuda" else "self_cpu_time_total"
    rows = sorted(seen.key_averages(), key=lambda row: -getattr(row, name))
    busy = sum(getattr(row, name) for row in rows if DEVICE != "cuda" or str(row.device_type).endswith("CUDA")) / 1e6
    print(f"profile of ours, batch {batch}, {steps} steps of {wall / steps:.4f} s: device busy {100 * busy / wall:.0f} %, "
          f"gaps {100 * max(0.0, 1 - busy / wall):.0f} %, waiting for the loader {100 * waited / wall:.1f} %", flush=True)  # fmt: skip
    for row in rows[:10]:
        print(
            f"  {getattr(row, name) / 1e3 / steps:9.3f} ms a step {row.count // steps:6d} calls  {row.key[:90]}",
            flush=True,
        )


Row = tuple[str, Callable[[int], tuple[float, float, object]]]  # label, batch → seconds a step, peak GiB, what stepped


def rows_of(folder: Path, size: str, frozen: bool, texts: list[str]) -> list[Row]:
    """The sides of one line of `PLAN`."""

    def peer(style: str, warm: int) -> Callable[[int], tuple]:
        return lambda n: stepped(lambda: Peer(size, n, texts, frozen=frozen, style=style), warm)

    def ours(compiled: bool) -> Callable[[int], tuple]:
        settings = {"train": "text" if frozen else "both", "precision": "bf16", "compile": compiled}
        settings |= {"workers": 0 if REHEARSAL else 12, "start": {"architecture": size}}
        return lambda n: stepped(lambda: OurStage(folder, size, n, texts, **settings), 1 if REHEARSAL else 8)

    rows = [
        ("official, fp16", lambda n: (*official_seconds(size, n, texts, frozen), None)),
        ("open_clip style, compiled", peer("open_clip", 4)),
        ("transformers", peer("transformers", 3)),
        ("ours", ours(False)),
    ]
    return rows if REHEARSAL else [*rows, ("ours, compiled", ours(True))]


def measured(measure: Callable[[int], tuple], largest: int) -> tuple[int, float, float, object]:
    """(batch, seconds a step, GiB, what stepped) with the largest batch that fits.

    Raises:
        whatever the row raises at its smallest batch, or for another reason than memory.
    """
    batch = largest
    while True:
        gc.collect()
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
        try:
            return batch, *measure(batch)
        except (RuntimeError, SystemExit, UserError) as error:
            # The official process ends when its memory does.
            if (
                REHEARSAL
                or batch <= largest // 16
                or not ("memory" in str(error).lower() or "ended early" in str(error))
            ):
                raise
        batch //= 2


def main() -> None:
    if DEVICE == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device here")
    end = time.perf_counter() + SECONDS
    torch.set_float32_matmul_precision("high")
    rate = matrix_rate()
    card = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU (a rehearsal: these are no figures)"
    print(f"{card}: bf16 products measured {rate / 1e12:.1f} TFLOP/s")
    print(
        f"{'size':<9} {'stage':<5} {'':<25} {'batch':>6} {'pairs/s':>9} {'GiB':>6} {'share':>6} {'× official':>11}",
        flush=True,
    )
    texts = captions(5000)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_store(folder / "train", texts, pictures_of_noise(32 if REHEARSAL else 1000))
        for size, kind, largest in PLAN:
            official, kept = None, None
            for label, measure in rows_of(folder, size, kind == "one", texts):
                place = f"{size:<9} {kind:<5} {label:<25}"
                if end - time.perf_counter() < 15:
                    print(f"{place} not measured: no time left", flush=True)
                    continue
                kept = None
                try:
                    batch, seconds, memory, stage = measured(measure, largest)
                except (Exception, SystemExit) as error:  # noqa: BLE001 - one row that fails does not end the table
                    print(f"{place} failed: {type(error).__name__}: {str(error)[:120]}", flush=True)
                    continue
                pairs = batch / seconds
                official = pairs if label.startswith("official") else official
                lengths = float(stage.trainer.context.pairs.lengths.mean()) if isinstance(stage, OurStage) else TOKENS
                share = flops_per_pair(size, lengths, kind == "one") * pairs / rate
                beside = f"{pairs / official:10.2f}×" if official else "          -"
                print(f"{place} {batch:6d} {pairs:9.1f} {memory:6.1f} {100 * share:5.0f}% {beside}", flush=True)
                kept = (stage, batch) if isinstance(stage, OurStage) else None
                stage = None
            if kept and end - time.perf_counter() > 15:
                try:
                    profile(*kept)
                except Exception as error:  # noqa: BLE001
                    print(f"profile failed: {type(error).__name__}: {str(error)[:160]}", flush=True)
    print(f"took {SECONDS - (end - time.perf_counter()):.0f} s", flush=True)
