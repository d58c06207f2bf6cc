"""Training on a GPU beside others, as `benchmarks/step.py cuda` prints it: one table, then where our time goes.

    python benchmarks/step.py cuda                  in at most 300 s; rows for which no time is left say so
    DEVICE=cpu python benchmarks/step.py cuda       a rehearsal of every row on the CPU with tiny models, of no worth as numbers

The most telling rows come first, each has its own limit of seconds, and one that fails ends nothing. Rows:

* ours: a stage of a real run with its loader, ids, clipping and checks, bf16, plain and compiled;
* official: cn_clip's own step in fp16 with loss scaling, its batches ready made (a process of its own);
* open_clip style: transformers' towers compiled, bf16, texts of 52 tokens, the full matrix of logits, fused AdamW;
* transformers: the model's own loss as in the library's contrastive example, bf16, texts of 52 tokens;
* top-10 of 100,000 × 100,000 features, and pictures encoded with decoding in front, beside the forward alone.

Batches fill the card: what a pair takes was counted once (`PAIR`), and a batch that does not fit is cut by a quarter. FLOP are
those of `training.throughput`; a share is of the card's measured rate of bf16 products, the second one of its listed rate.
"""

from __future__ import annotations

import gc
import io
import json
import os
import random
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

from benchmarks.official import Official
from benchmarks.step import OFFICIAL_STEP, TEXT_OF, OurStage, captions, write_store
from cnclip_ft.models.families.chinese_clip.catalog import ARCHITECTURES
from cnclip_ft.training import compiling, throughput
from cnclip_ft.training.memory import tokens_per_text
from data_tools.errors import UserError

DEVICE = os.environ.get("DEVICE", "cuda")
REHEARSAL = DEVICE == "cpu"
SECONDS = float(os.environ.get("SECONDS", 55 if REHEARSAL else 300))
TOKENS = 52  # what the others pad every text to
# MiB of activations a pair takes in bf16, both towers: ours, and theirs with all tokens of all layers. Counted on a CPU.
PAIR = {"tiny": (1, 1), "ViT-B-16": (90, 125), "ViT-L-14": (300, 350)}
TEXT_PAIR = 15  # of the text tower alone
_TINY = {
    "embed_dim": 32, "image_resolution": 32, "vision_layers": 2, "vision_width": 64, "vision_patch_size": 8,
    "vocab_size": 21128, "text_attention_probs_dropout_prob": 0.1, "text_hidden_act": "gelu", "text_hidden_dropout_prob": 0.1,
    "text_hidden_size": 64, "text_initializer_range": 0.02, "text_intermediate_size": 128,
    "text_max_position_embeddings": 512, "text_num_attention_heads": 2, "text_num_hidden_layers": 2,
    "text_type_vocab_size": 2,
}  # fmt: skip


def wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def fitting(megabytes: int, most: int) -> int:
    """Pairs that fill five sixths of the card beside 16 bytes a weight of the larger models."""
    if REHEARSAL:
        return 8
    free = torch.cuda.get_device_properties(0).total_memory * 5 / 6 - 5 * 2**30
    return max(32, min(most, int(free / (megabytes * 2**20)) // 32 * 32))


# ---- sides: what takes steps ----------------------------------------------------------------------------------------


class Ours:
    """A stage of a real run."""

    def __init__(self, folder: Path, size: str, batch: int, texts: list[str], **settings: Any) -> None:
        if REHEARSAL:
            compiling.COMPILER["backend"] = "eager"
        frozen = settings.pop("frozen")
        self.stage = OurStage(
            folder,
            size,
            batch,
            texts,
            train="text" if frozen else "both",
            precision="bf16",
            workers=0 if REHEARSAL else min(12, os.cpu_count() or 1),
            start=settings.pop("start", {"architecture": size}),
            **settings,
        )
        self.step = self.stage.step
        trainer = self.stage.trainer
        self.flops = throughput.flops_per_pair(trainer.plan, trainer.whole, tokens_per_text(trainer.context)) or 0.0

    def memory(self) -> float:
        return torch.cuda.max_memory_allocated() / 2**30 if DEVICE == "cuda" else 0.0

    def close(self) -> None:
        pass


class Peer:
    """transformers' ChineseCLIPModel of a size, stepped as others do it; its batch lies on the device."""

    def __init__(self, size: str, batch: int, texts: list[str], *, frozen: bool, style: str) -> None:
        from transformers import ChineseCLIPModel

        from cnclip_ft.models.families.chinese_clip.wordpiece import TextTokenizer

        torch.manual_seed(0)
        with torch.device(DEVICE):
            self.model = ChineseCLIPModel(config_of(size)).train()
        self.style = style
        if frozen:
            self.model.vision_model.requires_grad_(False)
            self.model.visual_projection.requires_grad_(False)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-6, betas=(0.9, 0.98), eps=1e-6, fused=True)
        self.features = torch.compile(self._features, backend="eager" if REHEARSAL else "inductor")
        side = self.model.config.vision_config.image_size
        tokenizer = TextTokenizer(context_length=TOKENS)
        ids, mask = tokenizer.pad(tokenizer.encode(texts[:batch]), TOKENS)
        self.ids, self.mask = ids.to(DEVICE), mask.to(DEVICE)
        self.pixels = torch.randn(batch, 3, side, side, device=DEVICE)
        self.flops = flops_of(self.model, frozen)

    def _features(
        self, pixels: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        image = self.model.get_image_features(pixel_values=pixels).pooler_output
        text = self.model.get_text_features(input_ids=ids, attention_mask=mask).pooler_output
        return torch.nn.functional.normalize(image, dim=-1), torch.nn.functional.normalize(text, dim=-1)

    def step(self) -> float:
        began = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            if self.style == "open_clip":
                image, text = self.features(self.pixels, self.ids, self.mask)
                logits = self.model.logit_scale.exp() * image @ text.T
                own = torch.arange(len(logits), device=DEVICE)
                cross_entropy = torch.nn.functional.cross_entropy
                loss = (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2
            else:
                given = {"input_ids": self.ids, "pixel_values": self.pixels, "attention_mask": self.mask}
                loss = self.model(**given, return_loss=True).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, 4.6052)
        wait()
        return time.perf_counter() - began

    memory = Ours.memory
    close = Ours.close


class OfficialSide:
    """cn_clip's own step, in a process of its own."""

    def __init__(self, folder: Path, size: str, batch: int, texts: list[str], *, frozen: bool) -> None:
        names = size, TEXT_OF.get(size, "RoBERTa-wwm-ext-base-chinese")
        if size == "tiny":
            tiny = folder / "tiny.json"
            tiny.write_text(json.dumps(_TINY))
            names = str(tiny), str(tiny)
        self.process = Official(
            OFFICIAL_STEP,
            *names,
            str(batch),
            "frozen" if frozen else "both",
            str(torch.get_num_threads()),
            "-",
            DEVICE,
            cuda=DEVICE == "cuda",
        )
        self.lines = [json.dumps(random.Random(n).sample(texts, batch), ensure_ascii=False) for n in range(3)]
        self.count = 0
        from transformers import ChineseCLIPModel

        with torch.device("meta"):
            self.flops = flops_of(ChineseCLIPModel(config_of(size)), frozen)

    def step(self) -> float:
        self.count += 1
        return self.process.ask(self.lines[self.count % 3])

    def memory(self) -> float:
        return self.process.ask("memory") / 2**30

    def close(self) -> None:
        self.process.process.kill()
        self.process.process.wait()


def config_of(size: str) -> Any:
    """transformers' configuration of a published size."""
    from transformers import ChineseCLIPConfig

    found = ARCHITECTURES[size]
    image, text = found.image, found.text
    return ChineseCLIPConfig(
        vision_config={
            "hidden_size": image.hidden,
            "intermediate_size": image.intermediate or 4 * image.hidden,
            "num_hidden_layers": image.layers,
            "num_attention_heads": image.heads,
            "image_size": image.image_size,
            "patch_size": image.patch,
            "projection_dim": found.projection,
        },
        text_config={
            "vocab_size": text.vocabulary,
            "hidden_size": text.hidden,
            "num_hidden_layers": text.layers,
            "num_attention_heads": text.heads,
            "intermediate_size": text.intermediate or 4 * text.hidden,
            "projection_dim": found.projection,
        },
        projection_dim=found.projection,
    )


def flops_of(model: torch.nn.Module, frozen: bool) -> float:
    """FLOP of a pair whose text has 52 tokens, all of them counted."""
    side = model.config.vision_config.image_size
    trained = {
        name for name, _ in model.named_parameters() if not (frozen and name.startswith(("vision_model", "visual_")))
    }
    mask = torch.ones(2, 1, 1, TOKENS, dtype=torch.bool, device="meta")
    ids = torch.zeros(2, TOKENS, dtype=torch.int64, device="meta")
    pixels = torch.empty(2, 3, side, side, device="meta")
    return throughput.counted(model, trained, {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}) / 2


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
        batch = fitting(TEXT_PAIR, 4096) if stage == "one" else fitting(PAIR[size][0], 2048)
        settings |= {"frozen": stage == "one", "compile": compiled}
        make = lambda n: Ours(folder, size, n, texts, **settings)  # noqa: E731
        words = {False: "", True: ", compiled", "layers": ", compiled by layers"}
        return Row(size, stage, label + words[compiled], make, batch, limit, profiled)

    def official(size: str, stage: str, limit: float) -> Row:
        make = lambda n: OfficialSide(folder, size, n, texts, frozen=stage == "one")  # noqa: E731
        return Row(size, stage, "official, fp16", make, fitting(PAIR[size][1], 1024), limit)

    def peer(size: str, stage: str, style: str, label: str, limit: float) -> Row:
        make = lambda n: Peer(size, n, texts, frozen=stage == "one", style=style)  # noqa: E731
        return Row(size, stage, label, make, fitting(PAIR[size][1], 1024), limit)

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
        peer(base, "two", "plain", "transformers", 30),
        official(large, "two", 60),
        ours(base, "one", 40, compiled="layers"),
        ours(large, "one", 50, compiled=False),
        official(base, "one", 45),
        ours(large, "two", 50, compiled=False),
        peer(large, "two", "plain", "transformers", 45),
        peer(base, "one", "plain", "transformers", 30),
    ]
    once = not REHEARSAL  # there all sizes are tiny
    return [row for row in rows if once or isinstance(row, Extra) or row.size == base]


def measured(row: Row) -> tuple[int, float, float, Any]:
    """(batch, seconds a step, GiB, the side) with the row's batch, or the largest of its three quarters that fits."""
    batch = row.batch
    while True:
        clean()
        side = None
        try:
            side = row.make(batch)
            times: list[float] = []
            for warm in range(1 if REHEARSAL else 4):
                side.step()
                if DEVICE == "cuda" and warm == 2:
                    torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
            while len(times) < 3 or (len(times) < 12 and time.perf_counter() - began < 6):
                times.append(side.step())
            return batch, statistics.median(times), side.memory(), side
        except (RuntimeError, SystemExit, UserError) as error:
            if side is not None:
                side.close()
            # The official process ends when its memory does.
            short = "memory" in str(error).lower() or "ended early" in str(error)
            if REHEARSAL or not short or batch <= row.batch // 4:
                raise
            del error
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


def top_ten() -> str:
    """The ten best of 100,000 for each of 100,000 vectors of 512 numbers, exactly; the answers lie on the CPU."""
    from cnclip_ft.retrieval.recall import topk

    count = 2000 if REHEARSAL else 100_000
    generator = torch.Generator(DEVICE).manual_seed(0)
    queries, gallery = (
        torch.nn.functional.normalize(torch.randn(count, 512, device=DEVICE, generator=generator), dim=1)
        for _ in range(2)
    )
    topk(queries[:1000], gallery, 10, device=DEVICE)
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
    lines = [f"profile of ours, batch {batch}, {steps} steps of {wall / steps:.4f} s: device busy {100 * busy / wall:.0f} %, "
             f"gaps {100 * max(0.0, 1 - busy / wall):.0f} %, waiting for the loader {100 * waited / wall:.1f} %"]  # fmt: skip
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
    signal.setitimer(signal.ITIMER_REAL, seconds)
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
        rate = throughput.product_rate(device, torch.bfloat16, side=256, repeats=2)
        card = throughput.Card("CPU (a rehearsal: these are no figures)", rate, None)
    else:
        card = throughput.card(device, "bf16")
    print(f"{card}; torch {torch.__version__}")
    head = f"{'size':<9} {'stage':<5} {'':<32} {'batch':>6} {'pairs/s':>9} {'GiB':>6} {'measured':>9} {'listed':>7} {'× official':>11} {'took':>6}"
    print(head, flush=True)
    texts, notes, official = captions(5000), [], {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_store(folder / "train", texts, pictures(64 if REHEARSAL else len(texts)))
        for row in rows_of(folder, texts):
            place = f"{row.size:<9} {row.stage:<5} {row.label:<32}" if isinstance(row, Row) else f"{row.label:<48}"
            began, side = time.perf_counter(), None
            if end - began < (1.0 if REHEARSAL else min(15.0, row.limit / 2)):
                print(f"{place} not measured: no time left", flush=True)
                continue
            try:
                with limited(min(SECONDS / 2 if REHEARSAL else row.limit, end - began)):
                    if isinstance(row, Extra):
                        print(f"{place} {row.measure()} ({time.perf_counter() - began:.0f} s)", flush=True)
                        continue
                    batch, seconds, memory, side = measured(row)
                    pairs, flops = batch / seconds, side.flops
                    if row.label.startswith("official"):
                        official[row.size, row.stage] = pairs
                    base = official.get((row.size, row.stage))
                    beside = f"{pairs / base:10.2f}×" if base else f"{'-':>11}"
                    known = f"{100 * flops * pairs / card.listed:6.0f}%" if card.listed else f"{'-':>7}"
                    print(
                        f"{place} {batch:6d} {pairs:9.1f} {memory:6.1f} {100 * flops * pairs / card.measured:8.0f}% {known} {beside} "
                        f"{time.perf_counter() - began:5.0f}s",
                        flush=True,
                    )
                    if row.profiled:
                        notes.append("the profile failed")
                        notes[-1] = profile(side, batch)
            except (Exception, SystemExit) as error:  # noqa: BLE001 - one row that fails does not end the table
                said = " ".join(str(error).split())
                print(f"{place} failed: {type(error).__name__}: {said[:160]}", flush=True)
            finally:
                with suppress(Exception):
                    side.close()
                side = None
    print("\n".join(notes), flush=True)
    print(f"took {SECONDS - (end - time.perf_counter()):.0f} s", flush=True)
