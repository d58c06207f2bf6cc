"""The training step beside the official one: same weights, same pictures and captions, same threads, one run.

    python benchmarks/step.py one  [--size ViT-B-16 --batch 32]     stage one, image tower frozen, features cached
    python benchmarks/step.py two  [--size ViT-B-16 --batch 16]     stage two, both towers
    python benchmarks/step.py loader                                one worker: images a second, and how far pixels differ
    python benchmarks/step.py loss                                  memory and time of the loss at a batch of 16,384
    python benchmarks/step.py cpu                                   all of it, as docs/benchmarks.md has it
    python benchmarks/step.py cuda                                  on a GPU beside three others (benchmarks/gpu.py)

Steps take turns, after two that do not count; given are medians and their ratio. Our side is the stage itself with its
loader, ids, clipping and checks; the official side gets its batches ready made, its own `get_loss`, AdamW and clamp.
Captions come from $CNCLIP_FT_REAL_DATA/flickr8k-cn where that is set, else they are drawn with the same lengths.
In stage one "cached" means steady state: the features are drawn instead of computed, which no step's time depends on.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

from benchmarks.official import Official  # noqa: E402

TEXT_OF = {"RN50": "RBT3-chinese", "ViT-H-14": "RoBERTa-wwm-ext-large-chinese"}

OFFICIAL_STEP = """
import json, time
from pathlib import Path
from types import SimpleNamespace
import cn_clip.clip
from cn_clip.clip.model import CLIP
from cn_clip.training.train import get_loss
size, text, batch, frozen, threads, folder, device = sys.argv[1:8]
batch, frozen = int(batch), frozen == "frozen"
torch.set_num_threads(int(threads))
torch.manual_seed(0)
configs = Path(cn_clip.clip.__file__).parent / "model_configs"
read = lambda name: json.loads((Path(name) if name.endswith(".json") else configs / (name + ".json")).read_text())
info = read(size) | read(text)
if isinstance(info["vision_layers"], str):
    info["vision_layers"] = json.loads(info["vision_layers"])
model = CLIP(**info).float()
if folder != "-":
    torch.save({"epoch": 0, "step": 0, "name": size, "state_dict": {"module." + k: v for k, v in model.state_dict().items()}}, folder + "/start.pt")
model.to(device)
model.train()
if frozen:
    for parameter in model.visual.parameters():
        parameter.requires_grad = False
    for module in model.visual.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
exclude = lambda n: "bn" in n or "ln" in n or "bias" in n or "logit_scale" in n
named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(
    [{"params": [p for n, p in named if exclude(n)], "weight_decay": 0.0},
     {"params": [p for n, p in named if not exclude(n)], "weight_decay": 0.001}], lr=1e-6, betas=(0.9, 0.98), eps=1e-6)
amp = device == "cuda"
scaler = torch.amp.GradScaler(enabled=amp)
args = SimpleNamespace(accum_freq=1, mask_ratio=0, distillation=False, aggregate=False, local_device_rank=0, report_training_batch_acc=False)
loss_function = torch.nn.CrossEntropyLoss()
resolution = info["image_resolution"]
images = torch.randn(batch, 3, resolution, resolution, device=device)
for line in sys.stdin:
    if line.strip() == "memory":
        print(torch.cuda.max_memory_allocated() if amp else 0, flush=True)
        continue
    texts = cn_clip.clip.tokenize(json.loads(line), context_length=52)
    began = time.perf_counter()
    optimizer.zero_grad()
    texts = texts.to(device)
    with torch.autocast(device, dtype=torch.float16, enabled=amp):
        loss, _ = get_loss(model, images, texts, loss_function, loss_function, args)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    model.logit_scale.data = torch.clamp(model.logit_scale.data, 0, 4.6052)
    if amp:
        torch.cuda.synchronize()
    print(time.perf_counter() - began, flush=True)
"""

OFFICIAL_LOADER = """
import json, time
from torch.utils.data import DataLoader
from cn_clip.training.data import LMDBDataset
torch.set_num_threads(1)
data = LMDBDataset(sys.argv[1], split="train", max_txt_length=52, resolution=224)
loader = DataLoader(data, batch_size=32, num_workers=1, persistent_workers=True)
for line in sys.stdin:
    if line.strip() == "pixels":
        mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)))
        rows = torch.cat([batch[0] for batch in loader])
        torch.save(((rows * std + mean) * 255).round().to(torch.uint8), sys.argv[2])
        print(0.0, flush=True)
        continue
    batches = iter(loader)
    next(batches)  # the worker is there and busy from here on
    began, seen = time.perf_counter(), 0
    for images, texts, _ in batches:
        seen += len(images)
    print((time.perf_counter() - began) / seen, flush=True)
"""


def captions(count: int) -> list[str]:
    """Chinese captions of Flickr8k-CN, or drawn ones of the same lengths."""
    folder = os.environ.get("CNCLIP_FT_REAL_DATA")
    if folder:
        lines = (Path(folder) / "flickr8k-cn" / "train_texts.zh.jsonl").read_text(encoding="utf-8").splitlines()[:count]
        return [json.loads(line)["text"] for line in lines]
    draw, words = random.Random(0), "一个男人在雪地里骑着红色自行车的小狗跑过草坪旁边有两位女孩"
    return ["".join(draw.choices(words, k=max(4, round(draw.gauss(9.5, 2.8))))) for _ in range(count)]


def pictures_of_noise(count: int, side: int = 224) -> list[bytes]:
    """`count` JPEGs that differ in their last bytes: one is encoded, and a tail told apart."""
    blank = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)).save(blank, "JPEG")
    return [blank.getvalue() + bytes([n % 256, n // 256]) for n in range(count)]


def write_store(folder: Path, texts: list[str], images: list[bytes], **options) -> Path:
    from data_tools.store import StoreWriter

    with StoreWriter(folder, **options) as writer:
        for number, data in enumerate(images):
            writer.add_image(number, data)
        for number, text in enumerate(texts):
            writer.add_pair(number % len(images), number, text, None)
        writer.finish()
    return folder


class OurStage:
    """A stage of a real run, stepped by hand."""

    def __init__(
        self,
        folder: Path,
        size: str,
        batch: int,
        texts: list[str],
        *,
        train: str,
        precision: str = "fp32",
        compile: bool | str = False,
        workers: int = 0,
        start: str | dict | None = None,
        stage_settings: dict | None = None,
        decode: str = "workers",
        fp8: bool = False,
        context_length: int | None = None,
    ) -> None:
        from cnclip_ft.features import frozen_trunk as feature_cache
        from cnclip_ft.recipe import Recipe
        from cnclip_ft.training.context import make_context
        from cnclip_ft.training.stage_plan import plan_stages
        from cnclip_ft.training.trainer import Trainer

        def drawn(cache, *_arguments, **_settings):
            width = cache.model.image_trunk(
                torch.zeros(
                    1, 3, cache.model.image_size, cache.model.image_size, dtype=torch.uint8, device=cache.model.device
                )
            ).shape[1]
            cache._features = np.random.default_rng(0).normal(size=(1, cache.count, width)).astype(np.float32)
            return True

        feature_cache.FeatureCache.build = drawn
        stage = {
            "train": train,
            "steps": 10_000,
            "batch_size": batch,
            "learning_rate": 1e-6,
            "warmup_steps": 0,
            **(stage_settings or {}),
        }
        recipe = Recipe.model_validate(
            {
                "model": {"start": start or str(folder / "start.pt")},
                "stages": {"stage": stage},
                "output": str(folder / "run"),
                "data": {
                    "train": str(folder / "train"),
                    "valid": str(folder / "train"),
                    "workers": workers,
                    "decode": decode,
                    "context_length": context_length,
                },
                "fp8": fp8,
                "precision": precision,
                "compile": compile,
            }
        )
        context, model = make_context(recipe, write=False)
        self.trainer = Trainer(context, plan_stages(context, model)[0], model)
        self.batches = self.trainer.batches()
        self.batch = batch

    def step(self, count: int = 1) -> float:
        """Seconds a step of `count`; a card is waited for after the last, as a run does not wait for it after each."""
        began = time.perf_counter()
        for _ in range(count):
            self.trainer.take(next(self.batches))
        if self.trainer.context.device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - began) / count

    def close(self) -> None:
        """With the processes that decode."""
        self.batches.close()


def step(kind: str, size: str, batch: int, threads: int, repeats: int) -> None:
    frozen = kind == "one"
    torch.set_num_threads(threads)
    texts = captions(2000)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_store(folder / "train", texts, pictures_of_noise(len(texts) // 5))
        arguments = (
            size,
            TEXT_OF.get(size, "RoBERTa-wwm-ext-base-chinese"),
            str(batch),
            "frozen" if frozen else "both",
            str(threads),
            str(folder),
            "cpu",
        )
        official = Official(OFFICIAL_STEP, *arguments)
        lines = [json.dumps(random.Random(n).sample(texts, batch), ensure_ascii=False) for n in range(repeats + 2)]
        official.ask(lines[0])
        print(f"stage {kind}, {size}, batch {batch}, {threads} threads, median of {repeats}", flush=True)
        ours = OurStage(folder, size, batch, texts, train="text" if frozen else "both")
        for _ in range(2):
            ours.step()
        official.ask(lines[1])
        pairs = [(official.ask(line), ours.step()) for line in lines[2:]]
        theirs, mine = (statistics.median(column) for column in zip(*pairs, strict=True))
        print(
            f"  official {batch / theirs:9.2f} pairs/s   ours {batch / mine:9.2f} pairs/s   {theirs / mine:6.2f}×",
            flush=True,
        )
        official.close()


def loader(repeats: int, count: int = 960) -> None:
    """Photos through one worker process each; a JPEG far larger than needed is decoded at reduced scale by ours."""
    from cnclip_ft.data.batching import BatchOrder, StageSampler, make_loader
    from cnclip_ft.data.pairs import PairDataset, build_table
    from cnclip_ft.models.families.chinese_clip.wordpiece import TextTokenizer
    from cnclip_ft.models.preprocessing import SquarePicture
    from data_tools.pictures import Reencoding, reencode
    from data_tools.store import open_store

    torch.set_num_threads(1)
    data = os.environ.get("CNCLIP_FT_REAL_DATA")
    if data:
        photos = [path.read_bytes() for path in sorted((Path(data) / "photos").glob("*.jpg"))]
    else:
        from benchmarks.data_build import photographs

        photos = photographs(None)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # Every picture several times under its own id, as captions come several to a picture.
        images, texts = [photos[n % len(photos)] for n in range(count)], captions(count)
        write_store(folder / "official", texts, images, layout="official")
        write_store(folder / "plain", texts, images)
        small = [reencode(photo, Reencoding(max_side=288)) for photo in photos]
        write_store(folder / "small", texts, [small[n % len(photos)] for n in range(count)])
        official = Official(OFFICIAL_LOADER, folder / "official", folder / "pixels.pt")
        official.ask("pixels")
        theirs = torch.load(folder / "pixels.pt")[: len(photos)].int()
        gaps = [
            max(
                (SquarePicture(224).decode(photo, reduced=reduced).int() - row).abs().max().item()
                for photo, row in zip(photos, theirs, strict=True)
            )
            for reduced in (False, True)
        ]
        tokenizer = TextTokenizer(context_length=52)

        def passes(store: Path, reduced: bool) -> Iterator[float]:
            """Seconds a picture, pass after pass of one loader."""
            opened = open_store(store)
            table = build_table(opened, tokenizer)
            order, a_pass = BatchOrder(table, 32, seed=0), len(table) // 32
            sampler = StageSampler(order, 0, (repeats + 2) * a_pass, 0, 1)
            batches = iter(
                make_loader(PairDataset(opened, table, SquarePicture(224), reduced), sampler, tokenizer, 1, pin=False)
            )
            for _ in range(a_pass):  # the worker has touched its memory; the official one had two passes for that
                next(batches)
            while True:
                for _ in range(4):  # what was made ahead while the other side was timed
                    next(batches)
                began, seen = time.perf_counter(), 0
                for _ in range(a_pass - 4):
                    seen += len(next(batches)["pixels"])
                yield (time.perf_counter() - began) / seen

        ours = [passes(folder / "plain", False), passes(folder / "plain", True), passes(folder / "small", True)]
        runs = [(official.ask(), *map(next, ours)) for _ in range(repeats)]
        for one in ours:
            one.close()  # with its worker, which holds the other side's input open too
        official.close()
    base, *found = (statistics.median(column) for column in zip(*runs, strict=True))
    print(f"loader, {len(photos)} photos, one worker, median of {repeats}")
    print(f"  official                        {1 / base:8.1f} images/s")
    for label, gap, seconds in zip(
        ("decoded whole", "as training decodes", "re-encoded at 288"), (*gaps, None), found, strict=True
    ):
        far = "" if gap is None else f"   pixels within {gap}/255"
        print(f"  ours, {label:<24}  {1 / seconds:8.1f} images/s {base / seconds:6.2f}×{far}")


def loss(repeats: int, batch: int = 16384, dim: int = 512) -> None:
    """Extra peak memory (Linux, resident) and time of forward and backward, tiled against the full matrix."""
    import subprocess

    code = """
import sys, time, torch
import torch.nn.functional as F
from pathlib import Path
from cnclip_ft.training.loss import ContrastiveObjective
torch.manual_seed(0)
kind, n, dim, threads = sys.argv[1], *map(int, sys.argv[2:])
torch.set_num_threads(threads)
def read(what): return next(int(l.split()[1]) * 1024 for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(what))
def full(x, y, scale):
    z = scale.exp() * x @ y.T
    own = torch.arange(len(x))
    return (F.cross_entropy(z, own) + F.cross_entropy(z.T, own)) / 2
tiled = ContrastiveObjective("ignore")
work = full if kind == "full" else (lambda x, y, s: tiled(x, y, s).loss)
def go(n):
    x, y = (F.normalize(torch.randn(n, dim), dim=1).requires_grad_() for _ in range(2))
    scale = torch.tensor(2.6593, requires_grad=True)
    Path("/proc/self/clear_refs").write_text("5")
    before, began = read("VmRSS"), time.perf_counter()
    work(x, y, scale).backward()
    return time.perf_counter() - began, read("VmHWM") - before
go(512)
print(*go(n))
"""
    found: dict[str, list[tuple[float, float]]] = {"full": [], "tiled": []}
    for _ in range(repeats):
        for kind, rows in found.items():
            done = subprocess.run(
                [sys.executable, "-c", code, kind, str(batch), str(dim), str(torch.get_num_threads())],
                env=dict(os.environ, PYTHONPATH=str(ROOT)),
                capture_output=True,
                text=True,
                check=True,
            )
            rows.append(tuple(map(float, done.stdout.split())))
    (full_time, full_memory), (time_, memory) = (
        [statistics.median(column) for column in zip(*found[kind], strict=True)] for kind in ("full", "tiled")
    )
    print(f"loss, batch {batch:,}, dim {dim}, forward + backward on the CPU, median of {repeats}")
    print(
        f"  full matrix {full_time:6.2f} s, {full_memory / 2**20:7.0f} MiB   tiled {time_:6.2f} s, {memory / 2**20:7.0f} MiB   "
        f"time {time_ / full_time:.2f}×, memory {100 * memory / full_memory:.1f} %"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["one", "two", "loader", "loss", "cpu", "cuda"])
    parser.add_argument("--size", default="ViT-B-16")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.what in ("one", "two"):
        step(given.what, given.size, given.batch or (32 if given.what == "one" else 16), given.threads, given.repeats)
    elif given.what == "cuda":
        from benchmarks import gpu

        gpu.main()
    elif given.what == "loader":
        loader(given.repeats)
    elif given.what == "loss":
        loss(given.repeats)
    else:
        step("one", "ViT-B-16", 32, given.threads, given.repeats)
        step("one", "ViT-L-14", 32, given.threads, 3)
        for size, batch in (("ViT-B-16", 16), ("RN50", 16), ("ViT-L-14", 4)):
            step("two", size, batch, given.threads, given.repeats)
        loader(given.repeats)
        loss(3)


if __name__ == "__main__":
    main()
