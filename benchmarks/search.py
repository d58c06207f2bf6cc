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
import io
import json
import os
import random
import re
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

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
    from cnclip_ft.evaluation import record
    from cnclip_ft.models.checkpoints import checkpoint_checksum, save_checkpoint
    from cnclip_ft.models.start import build_start
    from cnclip_ft.search.index_folder import IndexWriter

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
    writer.items([(f"{number % 50}.jpg", f"{number}") for number in range(images)])
    writer.damaged([])
    from PIL import Image

    for number in range(50):
        pixels = draw.integers(0, 256, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((1200, 900)).save(photos / f"{number}.jpg", quality=90)
    largest = max(float(np.linalg.norm(block.astype(np.float64), axis=1).max()) for block in blocks)
    checksum = checkpoint_checksum(checkpoint)
    writer.commit({
        "checkpoint": {"path": str(checkpoint), "checksum": checksum},
        "identity": {"checksum": checksum, "image_size": model.image_size, "dtype": "float32", "stored": "float32"},
        "settings": {}, "source": {"kind": "folder", "name": "photos", "path": str(photos)}, "images": images,
        "damaged": 0, "dim": dim, "largest_norm": largest, "approximate": None, "versions": record.versions(),
    })  # fmt: skip
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


def latency(folder: Path, images: int, asked: int, threads: int | None) -> None:
    index = make_index(folder, images)
    texts = questions(asked + 30 + 8 * 60)
    with server(index, threads) as (port, _):
        client = Client(port)
        for text in texts[:30]:
            client.ask(text)
        began = time.perf_counter()
        taken = sorted(client.ask(text) for text in texts[30 : 30 + asked])
        alone = asked / (time.perf_counter() - began)
        rest = texts[30 + asked :]
        clients = [Client(port) for _ in range(8)]
        shares = [rest[number::8] for number in range(8)]
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda c: c.ask("暖"), clients))
            began = time.perf_counter()
            waits = sorted(sum(pool.map(lambda c, share: [c.ask(text) for text in share], clients, shares), []))
            together = len(rest) / (time.perf_counter() - began)
    p50, p99 = taken[len(taken) // 2], taken[int(len(taken) * 0.99)]
    said = f"{threads} thread(s)" if threads else f"torch's own number of threads, {os.cpu_count()} cores"
    print(f"{images:,} pictures, dim {DIM}, exact search, RoBERTa-base on the CPU, {said}; {asked} questions over HTTP")
    print(
        f"one client     p50 {p50:6.1f} ms (target {P50:.0f})   p99 {p99:6.1f} ms (target {P99:.0f})   {alone:6.1f} a second"
    )
    print(
        f"eight clients  p50 {statistics.median(waits):6.1f} ms   {together:6.1f} a second: {together / alone:.2f}× one (target {TIMES:.0f})"
    )


def resident(process: subprocess.Popen) -> float:
    """MiB the process holds in memory of its own and in files. Linux."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


def picture(width: int, height: int, form: str = "JPEG") -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.effect_noise((width // 4 or 1, height // 4 or 1), 60).convert("RGB").resize((width, height)).save(out, form)
    return out.getvalue()


def bomb(side: int) -> bytes:
    """A PNG of a few kB that claims side × side pixels, and has them."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    squeezed = zlib.compressobj(9)
    rows = b"".join(squeezed.compress(bytes(side // 8 + 1)) for _ in range(side)) + squeezed.flush()
    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def form(fields: dict[str, str], data: bytes | None, name: str = "a.jpg") -> tuple[bytes, dict[str, str]]:
    edge, parts = "----edge7f3a", []
    for key, value in fields.items():
        parts.append(f'--{edge}\r\nContent-Disposition: form-data; name="{key}"\r\n\r\n{value}\r\n'.encode())
    if data is not None:
        head = f'--{edge}\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\nContent-Type: image/jpeg\r\n\r\n'
        parts.append(head.encode() + data + b"\r\n")
    return b"".join(parts) + f"--{edge}--\r\n".encode(), {"Content-Type": f"multipart/form-data; boundary={edge}"}


def hostile_requests(count: int) -> Iterator[tuple[str, str, str, bytes | None, dict[str, str]]]:
    """(what it tries, method, path, body, headers), mixed by a fixed draw."""
    draw = random.Random(0)
    good, large, huge = picture(640, 480), picture(9000, 6000), os.urandom(21 * 2**20)
    png, bombs = picture(300, 300, "PNG"), [bomb(20_000), bomb(40_000)]
    as_json = {"Content-Type": "application/json"}

    def words(**fields: object) -> tuple[str, str, bytes, dict[str, str]]:
        return "POST", "/api/search", json.dumps(fields).encode(), as_json

    def upload(data: bytes | None, **fields: str) -> tuple[str, str, bytes, dict[str, str]]:
        return "POST", "/api/search/image", *form(fields, data)

    def raw(body: bytes, kind: str = "application/json") -> tuple[str, str, bytes, dict[str, str]]:
        return "POST", "/api/search", body, {"Content-Type": kind}

    def get(path: str) -> tuple[str, str, None, dict[str, str]]:
        return "GET", path, None, {}

    kinds = {
        "oversized upload": lambda: upload(huge),
        "too many pixels": lambda: upload(draw.choice([*bombs, large])),
        "truncated picture": lambda: upload((data := draw.choice([good, png]))[: draw.randrange(len(data))]),
        "flipped bytes": lambda: upload(_flipped(draw, draw.choice([good, png]))),
        "no picture": lambda: upload(draw.choice([b"", b"GIF89a", b"%!PS-Adobe-3.0 EPSF-3.0", os.urandom(5000), b"<svg/>"])),
        "wrong types": lambda: words(**draw.choice([
            {"text": 5}, {"text": ["a"]}, {"text": {"a": 1}}, {"text": None}, {"text": "a", "top": "many"}, {"like": "../1"},
            {"like": -1}, {"like": 10**12}, {"text": "a", "image_share": 7}, {"text": "a", "unknown": 1}, {"text": "a", "like": 1.5},
        ])),
        "broken JSON": lambda: raw(draw.choice([
            b"", b"{", b"[" * 5000, b'{"text": "\xff\xfe"}', b'{"text": "\\ud83d"}', b'{"text":"a","not_weight":NaN}', b"null",
            b'{"text":"a","top":1e400}', b'{"text":"a","top":' + b"9" * 6000 + b"}", b'{"\\ud83d": 1}',
        ])),
        "wrong content type": lambda: raw(b"text=a", draw.choice(["text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])),
        "traversal": lambda: get(draw.choice([
            "/api/images/../../etc/passwd", "/api/images/..%2f..%2f..%2fetc%2fpasswd", "/../../../../etc/passwd",
            "/api/images/%2e%2e/%2e%2e/index.json", "/api/images/0.jpg", "/api/images/....//....//etc/passwd",
            "/api/images/1%00.jpg", "/photos/1.jpg", "/static/../guard.py", "/api/images//etc/passwd", "/api/images/-1",
            "/api/images/99999999999999999999999", "/api/images/1?size=../../large", "/api/images/" + "9" * 3000,
        ])),
        "huge k": lambda: words(text="狗", top=draw.choice([0, -1, 1001, 10**9, 10**30, 1000])),
        "empty": lambda: words(**draw.choice([{}, {"text": ""}, {"text": "  \n"}, {"not": "狗"}, {"text": "狗", "not": "狗", "not_weight": 1}])),
        "emoji": lambda: words(text="🐕‍🦺👩‍👩‍👧‍👦🇨🇳" * draw.randrange(1, 40), top=3),
        "control characters": lambda: words(text="".join(chr(draw.randrange(0, 0x3000)) for _ in range(50)), top=3),
        "100 kB of text": lambda: words(text="雪" * 33_400) if draw.random() < 0.5 else upload(good, text="a" * 100_000),
        "just below the limit": lambda: words(text="x" * 4000, top=1),
        "wrong method": lambda: (draw.choice(["PUT", "DELETE", "PATCH", "OPTIONS"]), draw.choice(["/", "/api/search", "/api/images/1"]), None, {}),
        "foreign host": lambda: ("GET", "/api/index", None, {"Host": "evil.example"}),
        "lying length": lambda: ("POST", "/api/search", b"{}", {"Content-Length": draw.choice(["-5", "abc", "99999999999"])}),
        "thumbnails": lambda: get(f"/api/images/{draw.randrange(100_000)}?size={draw.choice(['small', 'large'])}"),
        "a picture, as it should be": lambda: upload(good, text="🐕", top="5"),
    }  # fmt: skip
    rare = {"oversized upload": 0.25, "a picture, as it should be": 0.25, "too many pixels": 0.5}
    names = list(kinds)
    for name in draw.choices(names, [rare.get(name, 1.0) for name in names], k=count):
        yield name, *kinds[name]()


def _flipped(draw: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(20):
        changed[draw.randrange(len(changed))] = draw.randrange(256)
    return bytes(changed)


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
        before = resident(process)
        four(count)
        after, alive = resident(process), process.poll() is None
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
    if failed or not (alive and works):
        raise SystemExit(1)


def ways(images: int, repeats: int, threads: int | None) -> None:
    """Time of one question by part, and of the other ways that were tried, in this process."""
    from cnclip_ft.evaluation.encode import evaluating
    from cnclip_ft.evaluation.retrieval import topk
    from cnclip_ft.models.start import build_start
    from cnclip_ft.search.exact import ExactSearch
    from cnclip_ft.search.quick_text import quicken

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

    from cnclip_ft.evaluation.encode import encode_texts

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
    alike = quicken(model)
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
