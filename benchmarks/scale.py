"""The table of pairs and the order of an epoch at 20,000, 200,000 and 2,000,000 pairs: seconds and private memory, and how they grow.

    python benchmarks/scale.py --pairs 20000 200000 2000000 --language en --repeats 3 --output scale.json

Each size is measured in processes of its own: making the table, starting from the one that is kept, the order of epoch 7, and a step
of it by itself; medians of the repeats. Pictures are one small JPEG under many ids, captions are drawn, Chinese or English. Making
the table is measured twice over: once for its time, once for the peak of its memory, which a thread reads every 20 ms.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

CAPTIONS = 5  # of a picture
BATCH = 256


def draw(folder: Path, pairs: int, language: str = "zh") -> None:
    """A store of so many pairs, five captions a picture; English ones of 6 to 16 words out of 20,000, few of them often."""
    from PIL import Image

    from data_tools.store import StoreWriter

    out, chance = io.BytesIO(), random.Random(0)
    Image.new("RGB", (16, 16), "red").save(out, "JPEG")
    words = "一 只 猫 狗 在 雪 地 里 跑 红 色 的 伞 街 上 看 书 孩子 海边 两 个 人".split()
    syllables = [
        a + b for a in "b d f g k l m n p r s t v".split() for b in ("a", "e", "i", "o", "ar", "en", "ing", "ed")
    ]
    english = ["".join(chance.choices(syllables, k=1 + number % 3)) for number in range(20_000)]
    often = list(itertools.accumulate(1 / (number + 1) for number in range(len(english))))
    with StoreWriter(folder) as writer:
        for image in range(-(-pairs // CAPTIONS)):
            writer.add_image(image, out.getvalue())
        for number in range(pairs):
            if language == "zh":
                text = "".join(chance.choices(words, k=chance.randint(6, 20)))
            else:
                drawn = chance.choices(english, cum_weights=often, k=chance.randint(6, 16))
                text = " ".join(drawn).capitalize() + "."
            writer.add_pair(number // CAPTIONS, number, text, language)
        writer.finish()


def private_mib() -> float:
    """Memory that this process has written and no other shares, MiB (Linux); pages of mapped files are not."""
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("Private_Dirty", "Swap:"))) / 1024


class Peak(threading.Thread):
    """The most private memory there is while it runs, MiB."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.found, self.over = private_mib(), threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.02):
            self.found = max(self.found, private_mib())


def measure(what: str, store: Path, cache: Path) -> dict[str, float]:
    """In a process of its own; `what`: make, peak, start or order."""
    import numpy as np

    import cnclip_ft.data.pairs as pairs
    from cnclip_ft.data.batching import BatchOrder
    from cnclip_ft.models.families.chinese_clip.wordpiece import TextTokenizer
    from data_tools.store import open_store

    pairs.KEPT_FROM = 0
    tokenizer, opened = TextTokenizer(), open_store(store)
    tokenizer.encode(["热身"])
    before, peak = private_mib(), Peak()
    if what == "peak":
        peak.start()
    begun = time.perf_counter()
    table = pairs.build_table(opened, tokenizer, place=cache)
    if what == "peak":
        peak.over.set()
        return {"peak MiB": peak.found - before}
    found = {"table s": time.perf_counter() - begun}
    order = BatchOrder(table, BATCH, seed=1)
    if what == "order":
        order.step(0)
        before, begun = private_mib(), time.perf_counter()
        for step in range(7 * order.steps_per_epoch, 8 * order.steps_per_epoch):
            order.step(step)
        found["epoch s"] = time.perf_counter() - begun
        steps = np.random.default_rng(0).integers(7 * order.steps_per_epoch, 8 * order.steps_per_epoch, 20)
        taken = []
        for step in steps.tolist():
            begun = time.perf_counter()
            BatchOrder(table, BATCH, seed=1).step(step)
            taken.append(time.perf_counter() - begun)
        found["any step ms"] = 1000 * float(np.median(taken))
    else:
        batch = table.batch(order.step(0), tokenizer)
        found["first batch s"] = time.perf_counter() - begun
        found["pairs a second"] = len(table) / found["table s"]
        assert len(batch["input_ids"]) == BATCH
    return found | {"private MiB": private_mib() - before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=int, nargs="+", default=[20_000, 200_000, 2_000_000])
    parser.add_argument("--language", choices=["zh", "en"], default="zh", help="of the captions")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    parser.add_argument("--folder", type=Path, help="where stores are drawn and kept; else a temporary folder")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(given.measure[0], Path(given.measure[1]), Path(given.measure[2]))))
        return
    place = given.folder or Path(tempfile.mkdtemp())
    named = (
        Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("model name")[2].partition("\n")[0].strip("\t :")
    )
    found: dict[str, Any] = {"processor": named or platform.machine(), "language": given.language, "sizes": {}}
    try:
        for pairs in given.pairs:
            store = place / (str(pairs) if given.language == "zh" else f"{pairs}-{given.language}")
            cache = place / f"{store.name}-cache"
            if not store.exists():
                draw(store, pairs, given.language)
            own = found["sizes"][pairs] = {}
            for what in ("peak", "make", "start", "order"):
                runs = []
                for _ in range(given.repeats):
                    if what in ("peak", "make"):
                        shutil.rmtree(cache, ignore_errors=True)
                    command = [sys.executable, __file__, "--measure", what, str(store), str(cache)]
                    done = subprocess.run(command, check=True, capture_output=True, text=True)
                    runs.append(json.loads(done.stdout))
                own[what] = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
                print(
                    f"{pairs:>10,} {what:6}" + "".join(f"  {name} {value:.3g}" for name, value in own[what].items()),
                    flush=True,
                )
        first, last = (found["sizes"][pairs] for pairs in (given.pairs[0], given.pairs[-1]))
        growth = last["start"]["first batch s"] - first["start"]["first batch s"]
        more = last["start"]["private MiB"] - first["start"]["private MiB"]
        print(
            f"{found['processor']}: a later start takes {growth:.2f} s and {more:.0f} MiB more at {given.pairs[-1]:,} pairs"
        )
        if given.output:
            given.output.write_text(json.dumps(found, indent=1), encoding="utf-8")
    finally:
        if given.folder is None:
            shutil.rmtree(place, ignore_errors=True)


if __name__ == "__main__":
    main()
