"""The search server, measured through HTTP on localhost.

    python benchmarks/search.py latency     500 questions in words, one after another, then from 8 clients at once
    python benchmarks/search.py hostile     2,000 requests that should not be made, against a live server
    python benchmarks/search.py ways        where the time of one question goes, and other ways to spend it

The index holds 100,000 random unit vectors of 512 values; the model is ViT-B-16 with RoBERTa-base, random weights.
Nothing here needs data or the network; about 1.5 GB of disk for a moment.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import http.client
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from hostile_requests import hostile_requests

DIM = 512
P50, P99, TIMES, RSS = 60.0, 150.0, 2.0, 50.0  # targets: ms, ms, ×, MiB
_THINGS = "狗 猫 鸟 鱼 马 房子 汽车 自行车 孩子 女人 老人 花 树 雨伞 桌子 椅子 船 飞机 山 河".split()
_DOING = "在奔跑 在睡觉 在吃东西 在跳跃 站着 坐着 在玩耍 在看书 在唱歌 飞过".split()
_PLACES = "雪地里 草地上 沙滩上 城市街道上 厨房里 树下 海边 夜空下 公园里 房间里".split()


def questions(count: int, seed: int = 0) -> list[str]:
    """Short Chinese questions as people type them, no two alike: four to about twenty tokens."""
    draw, found = random.Random(seed), {}
    while len(found) < count:
        words = [draw.choice(_PLACES), draw.choice(["", "一只", "两个", "红色的", "一个小小的"]), draw.choice(_THINGS)]
        words += draw.choice([[], [draw.choice(_DOING)], [draw.choice(_DOING), "，旁边有", draw.choice(_THINGS)]])
        found["".join(words)] = None
    return list(found)


def make_index(folder: Path, images: int, architecture: str = "ViT-B-16") -> Path:
    """A checkpoint with random weights and an index that says it was made by it."""
    from cnclip_ft.evaluation.results import provenance
    from cnclip_ft.models.checkpoints import checkpoint_checksum, save_checkpoint
    from cnclip_ft.models.start import build_start
    from cnclip_ft.search.index.folder import IndexWriter

    checkpoint, index = folder / "checkpoint", folder / "index"
    model, _ = build_start({"architecture": architecture}, seed=0)
    save_checkpoint(model, checkpoint, info={"stage": "benchmark", "step": 0})
    dim, draw = model.image_tower.output_dim, np.random.default_rng(0)
    index.mkdir()
    photos = folder / "photos"
    photos.mkdir()
    blocks = []
    for start in range(0, images, 10_000):
        block = draw.standard_normal((min(10_000, images - start), dim), dtype=np.float32)
        blocks.append(block / np.linalg.norm(block, axis=1, keepdims=True))
    writer = IndexWriter(index)
    writer.features(blocks, images, dim, np.dtype(np.float32))
    from PIL import Image

    for number in range(50):
        pixels = draw.integers(0, 256, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((1200, 900)).save(photos / f"{number}.jpg", quality=90)
    stats = [(photos / f"{number}.jpg").stat() for number in range(50)]
    stamps = [f"{stat.st_size}-{stat.st_mtime_ns}" for stat in stats]
    writer.items([(f"{number % 50}.jpg", stamps[number % 50]) for number in range(images)])
    writer.damaged([])
    largest = max(float(np.linalg.norm(block.astype(np.float64), axis=1).max()) for block in blocks)
    checksum = checkpoint_checksum(checkpoint)
    writer.commit(
        {
            "checkpoint": {"path": str(checkpoint), "checksum": checksum},
            "identity": {"checksum": checksum, "image_size": model.image_size, "dtype": "float32", "stored": "float32"},
            "settings": {},
            "source": {"kind": "folder", "name": "photos", "path": str(photos)},
            "images": images,
            "damaged": 0,
            "dim": dim,
            "largest_norm": largest,
            "approximate": None,
            "versions": provenance.versions(),
        }
    )
    return index


class Client:
    """One connection that is kept open, as a browser keeps it."""

    def __init__(self, port: int) -> None:
        self.port, self.connection = port, None

    def send(self, method: str, path: str, body: bytes | None = None, headers: dict | None = None) -> tuple[int, bytes]:
        if self.connection is None:
            self.connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            self.connection.request(method, path, body, headers or {})
            response = self.connection.getresponse()
            return response.status, response.read()
        except (http.client.HTTPException, OSError):
            self.connection.close()
            self.connection = None
            raise

    def ask(self, text: str) -> float:
        """Milliseconds of a question of twenty pictures."""
        body = json.dumps({"text": text, "top": 20}).encode()
        began = time.perf_counter()
        status, answer = self.send("POST", "/api/search", body, {"Content-Type": "application/json"})
        taken = (time.perf_counter() - began) * 1e3
        if status != 200 or len(json.loads(answer)["results"]) != 20:
            raise SystemExit(f"{status}: {answer[:300]!r}")
        return taken


@contextlib.contextmanager
def server(index: Path, threads: int | None) -> Iterator[tuple[int, subprocess.Popen]]:
    command = [sys.executable, "-m", "cnclip_ft", "search", "serve", str(index), "--port", "0"]
    environment = dict(os.environ)
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, encoding="utf-8", env=environment)
    try:
        said = iter(process.stdout.readline, "")
        line = next((line for line in said if "http://" in line), "nothing was said")
        found = re.search(r"http://[^/]*:(\d+)/", line)
        if not found:
            raise SystemExit(f"the server did not start: {line}")
        yield int(found[1]), process
    finally:
        process.terminate()
        process.wait(20)


class Others:
    """Share of the cores that other programs took since the last look, in percent: what makes a figure worthless. Linux."""

    def __init__(self, process: subprocess.Popen) -> None:
        self.process, self.last = process, (0.0, 0.0)
        self.look()

    def look(self) -> float:
        ticks = [int(value) for value in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        own = int(fields[11]) + int(fields[12]) + sum(os.times()[:2]) * os.sysconf("SC_CLK_TCK")
        now, before = (sum(ticks) - ticks[3] - ticks[4] - own, sum(ticks)), self.last  # 3, 4: idle, waiting for disks
        self.last = now
        return 100 * max(0.0, now[0] - before[0]) / max(1, now[1] - before[1])


def latency(folder: Path, images: int, asked: int, threads: int | None) -> None:
    index = make_index(folder, images)
    texts = questions(asked + 30 + 8 * 60)
    with server(index, threads) as (port, process):
        client = Client(port)
        for text in texts[:30]:
            client.ask(text)
        others = Others(process)
        began = time.perf_counter()
        taken = sorted(client.ask(text) for text in texts[30 : 30 + asked])
        alone = asked / (time.perf_counter() - began)
        beside = others.look()
        rest = texts[30 + asked :]
        clients = [Client(port) for _ in range(8)]
        shares = [rest[number::8] for number in range(8)]
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda c: c.ask("暖"), clients))
            began = time.perf_counter()
            waits = sorted(sum(pool.map(lambda c, share: [c.ask(text) for text in share], clients, shares), []))
            together = len(rest) / (time.perf_counter() - began)
            beside_eight = others.look()
    p50, p99 = taken[len(taken) // 2], taken[int(len(taken) * 0.99)]
    said = f"{threads} thread(s)" if threads else f"torch's own number of threads, {os.cpu_count()} cores"
    print(f"{images:,} pictures, dim {DIM}, exact search, RoBERTa-base on the CPU, {said}; {asked} questions over HTTP")
    print(
        f"one client     p50 {p50:6.1f} ms (target {P50:.0f})   p99 {p99:6.1f} ms (target {P99:.0f})   {alone:6.1f} a second"
    )
    print(
        f"eight clients  p50 {statistics.median(waits):6.1f} ms   {together:6.1f} a second: {together / alone:.2f}× one (target {TIMES:.0f})"
    )
    print(f"other programs had {beside:.0f} % of the cores during the first, {beside_eight:.0f} % during the second")


def resident(process: subprocess.Popen) -> float:
    """MiB the process holds in memory of its own and in files. Linux."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


def running(process: subprocess.Popen) -> tuple[int, int]:
    """Threads of the server, and its child processes (Linux)."""
    tasks = Path(f"/proc/{process.pid}/task")
    threads = list(tasks.iterdir()) if tasks.is_dir() else []
    return len(threads), sum(len((task / "children").read_text().split()) for task in threads)


def hostile(folder: Path, images: int, count: int, threads: int | None) -> None:
    index = make_index(folder, images)
    with server(index, threads) as (port, process):
        lock, found, dropped = threading.Lock(), Counter(), Counter()
        work = hostile_requests(count + 200)

        def worker(limit: int) -> None:
            client = Client(port)
            while True:
                with lock:
                    if sum(found.values()) + sum(dropped.values()) >= limit:
                        return
                    name, *request = next(work)
                    found[name, 0] += 1
                try:
                    status, _ = client.send(*request)
                except (http.client.HTTPException, OSError):
                    status = None  # the server hung up: on a body it will not read, or a length that cannot be
                with lock:
                    found[name, 0] -= 1
                    (dropped if status is None else found)[(name, status)] += 1

        def four(limit: int) -> None:
            workers = [threading.Thread(target=worker, args=(limit,)) for _ in range(4)]
            for thread in workers:
                thread.start()
            for thread in workers:
                thread.join()

        four(200)  # the first of each kind load what they need: decoders, caches, threads
        found.clear()
        dropped.clear()
        before, held = resident(process), running(process)
        four(count)
        after, alive = resident(process), process.poll() is None
        held_after = running(process)
        works = Client(port).ask("一只在雪地里奔跑的狗") > 0
    totals = Counter({status: 0 for status in ()})
    for (_, status), number in found.items():
        totals[status] += number
    for name in sorted({name for name, _ in found} | {name for name, _ in dropped}):
        statuses = {status: number for (other, status), number in sorted(found.items()) if other == name and number}
        hung = sum(number for (other, _), number in dropped.items() if other == name)
        print(
            f"  {name:28s} {'  '.join(f'{s}: {n}' for s, n in statuses.items())}{f'  connection closed: {hung}' if hung else ''}"
        )
    failed = sum(number for status, number in totals.items() if status >= 500)
    total = sum(totals.values()) + sum(dropped.values())
    print(
        f"{total:,} hostile requests from 4 clients: {failed} answered 5xx (target 0), server {'alive' if alive and works else 'DEAD'}"
    )
    print(f"memory {before:.0f} → {after:.0f} MiB: {after - before:+.1f} (target ± {RSS:.0f})")
    print(f"threads and decoders {held} → {held_after}")
    if failed or not (alive and works):
        raise SystemExit(1)


def ways(images: int, repeats: int, threads: int | None) -> None:
    """Time of one question by part, and of the other ways that were tried, in this process."""
    from cnclip_ft.features.encode import evaluating
    from cnclip_ft.models.start import build_start
    from cnclip_ft.retrieval.exact import ExactSearch
    from cnclip_ft.retrieval.recall import topk
    from cnclip_ft.search.engine.quick_text import use_half_products

    if threads:
        torch.set_num_threads(threads)
    model, _ = build_start({"architecture": "ViT-B-16"}, seed=0)
    model.eval().requires_grad_(False)
    gallery = torch.nn.functional.normalize(torch.randn(images, DIM), dim=1)
    search = ExactSearch(gallery, float(gallery.double().norm(dim=1).max()))
    texts = questions(repeats * 8)

    def timed(what, *, together: int = 1) -> str:
        taken = []
        for start in range(0, min(len(texts), repeats * together), together):
            began = time.perf_counter()
            what(texts[start : start + together])
            taken.append((time.perf_counter() - began) * 1e3)
        return f"{statistics.median(taken):7.1f} ms"

    from cnclip_ft.features.encode import encode_texts

    def encode(some: list[str], padded: int | None = None) -> torch.Tensor:
        with evaluating(model):
            if padded is None:
                return encode_texts(model, some)
            ids, mask = model.tokenizer.pad(model.tokenizer.encode(some), padded)
            return model.text_features(ids, mask)

    print(f"{torch.get_num_threads()} thread(s), medians of {repeats}; together: eight questions")
    for many in (1, 8):
        queries = encode(texts[:many])
        print(f"--- {many} together")
        print("text, padded to 52           ", timed(lambda some: encode(some, 52), together=many))
        print("text, padded to the longest  ", timed(encode, together=many))
        print("search, evaluation's topk    ", timed(lambda some, q=queries: topk(q, gallery, 20), together=many))
        print("search, prepared once        ", timed(lambda some, q=queries: search.search(q, 20), together=many))
        print("  its product  gallery @ q.T ", timed(lambda some, q=queries: gallery @ q.T, together=many))
        print("  product the other way round", timed(lambda some, q=queries: q @ gallery.T, together=many))
    search.keep_copy()
    print("--- half-precision copy of the gallery, what it proposes scored in float64")
    for many in (1, 8):
        queries = encode(texts[:many])
        print(
            f"search, {many} together            ", timed(lambda some, q=queries: search.search(q, 20), together=many)
        )
    exact = encode(texts[:64])
    alike = use_half_products(model)
    print(f"--- half-precision copies of the text weights (lowest cosine of the samples {alike})")
    if alike is None:
        return
    print(f"largest |score| difference    {(gallery[:2000] @ (encode(texts[:64]) - exact).T).abs().max():.1e}")
    for many in (1, 8):
        print(f"text, {many} together              ", timed(encode, together=many))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("latency", "hostile", "ways"))
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--questions", type=int, default=500)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--threads", type=int, help="OMP_NUM_THREADS of the server. [default: torch's own]")
    args = parser.parse_args()
    if args.what == "ways":
        ways(args.images, 20, args.threads)
        return
    with tempfile.TemporaryDirectory() as name:
        if args.what == "latency":
            latency(Path(name), args.images, args.questions, args.threads)
        else:
            hostile(Path(name), args.images, args.requests, args.threads)


if __name__ == "__main__":
    main()
