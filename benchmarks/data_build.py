"""Building, importing and reading stores, side by side with the official script and reader, in one run.

    python benchmarks/data_build.py [--images 4000] [--import-pairs 100000] [--repeats 5] [--photos FOLDER]

Prints, and with --json writes: seconds to build from the same TSV + JSONL (ours checks every image header), bytes of the
stores, pairs a second at random access (bytes and text, nothing decoded), peak memory of an import. Medians of the
repeats; the two sides take turns, so that a slow moment of the machine meets both. Pictures are photos of ordinary size:
those in --photos (or $CNCLIP_FT_REAL_DATA/photos), each made unlike the others by a comment in its file, else drawn ones.

Both sides run in processes of their own. The official side is its own script (`cn_clip.preprocess.build_lmdb_dataset`)
and the access of its own `LMDBDataset`: pair and image as `__getitem__` gets them, up to the bytes that would be decoded.
"""

from __future__ import annotations

import argparse
import base64
import csv
import io
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
_READS = 8000
OFFICIAL = Path(os.environ.get("CNCLIP_FT_OFFICIAL", ROOT / ".official"))

# Imports are not timed: both sides measure their own work.
_THEIR_BUILD = """
import runpy, sys, time
import lmdb, tqdm, pickle, json
sys.argv = ["build_lmdb_dataset.py", "--data_dir", sys.argv[1], "--splits", "train", "--lmdb_dir", sys.argv[2]]
began = time.perf_counter()
runpy.run_path(__PATH__, run_name="__main__")  # by its path: the package would import torch, which it does not need
print("SECONDS", time.perf_counter() - began)
"""
_OUR_BUILD = """
import sys, time
from data_tools.build import build_split
from PIL import Image
Image.init()
began = time.perf_counter()
build_split(sys.argv[1], "train", sys.argv[2] + "/train", progress=True)
print("SECONDS", time.perf_counter() - began)
"""
_THEIR_READ = """
import base64, json, pickle, random, sys, time, types
from io import BytesIO
sys.modules["torchvision._meta_registrations"] = types.ModuleType("torchvision._meta_registrations")
from cn_clip.training.data import LMDBDataset
data = LMDBDataset(sys.argv[1] + "/train", split="val")
order = random.Random(0).choices(range(len(data)), k=_READS)
for what in ("WARM", "UNDECODED", "SECONDS"):  # the first pass warms the page cache
    began = time.perf_counter()
    for index in order:
        # LMDBDataset.__getitem__ up to Image.open
        sample_index = index % data.number_samples
        pair = pickle.loads(data.txn_pairs.get("{}".format(sample_index).encode('utf-8')).tobytes())
        image_id, text_id, raw_text = pair
        image_b64 = data.txn_imgs.get("{}".format(image_id).encode('utf-8')).tobytes()
        image_b64 = image_b64.decode(encoding="utf8", errors="ignore")
        if what != "UNDECODED":
            image = base64.urlsafe_b64decode(image_b64)
    print(what, time.perf_counter() - began)
"""
_OUR_READ = """
import random, sys, time
from data_tools.store import open_store
store = open_store(sys.argv[1] + "/train")
order = random.Random(0).choices(range(len(store)), k=_READS)
for what in ("WARM", "SECONDS"):
    began = time.perf_counter()
    for index in order:
        pair = store[index]
        image = store.image(pair.image_id)
    print(what, time.perf_counter() - began)
"""
_OUR_IMPORT = """
import re, sys, time
from data_tools.build import build_store
from data_tools.sources import open_source
began = time.perf_counter()
report = build_store(open_source("folder", sys.argv[1])[""], sys.argv[2], workers=int(sys.argv[3]), progress=True)
print("SECONDS", time.perf_counter() - began)
print("PAIRS", report.pairs)
print("PEAK", int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1024)
"""


def run(code: str, *arguments: object, official: bool = False) -> dict[str, float]:
    """Run `code` in a process of its own; the numbers it printed in capitals."""
    environment = dict(os.environ, PYTHONPATH=str(OFFICIAL if official else ROOT), PYTHONUTF8="1")
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return {name: float(value) for name, value in re.findall(r"^([A-Z]+) ([\d.]+)$", done.stdout, re.MULTILINE)}


def photographs(folder: Path | None) -> list[bytes]:
    """JPEGs of ordinary size: those of `folder`, else sixty drawn ones of some 100 kB."""
    if folder is not None and folder.is_dir():
        return [file.read_bytes() for file in sorted(folder.glob("*.jpg"))]
    import numpy as np
    from PIL import Image

    pictures = []
    for seed in range(60):
        noise = np.random.default_rng(seed).integers(0, 256, (47, 63, 3), dtype=np.uint8)
        fine = np.random.default_rng(seed + 1000).normal(0, 9, (375, 500, 3))
        image = np.asarray(Image.fromarray(noise).resize((500, 375), Image.Resampling.BICUBIC)) + fine
        file = io.BytesIO()
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=92)
        pictures.append(file.getvalue())
    return pictures


def unlike(data: bytes, number: int) -> bytes:
    """The same picture with a comment of its own: a file like no other."""
    comment = b"%08d" % number
    return data[:2] + b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment + data[2:]


def write_source(folder: Path, pictures: list[bytes], images: int, captions: int = 5) -> None:
    """The official source files."""
    with (folder / "train_imgs.tsv").open("wb") as file:
        for number in range(images):
            file.write(b"%d\t%s\n" % (number, base64.b64encode(unlike(pictures[number % len(pictures)], number))))
    with (folder / "train_texts.jsonl").open("w", encoding="utf-8") as file:
        for number in range(images * captions):
            row = {"text_id": number, "text": f"第 {number} 句：一只狗在草地上奔跑", "image_ids": [number % images]}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def write_photos(folder: Path, pairs: int) -> None:
    """A folder of small pictures and a captions.csv: one caption each."""
    from PIL import Image

    file = io.BytesIO()
    Image.linear_gradient("L").resize((64, 64)).convert("RGB").save(file, "JPEG")
    with (folder / "captions.csv").open("w", encoding="utf-8", newline="") as table:
        rows = csv.writer(table)
        rows.writerow(["image", "text"])
        for number in range(pairs):
            name = f"{number // 1000:03d}/{number:06d}.jpg"
            if number % 1000 == 0:
                (folder / name).parent.mkdir()
            (folder / name).write_bytes(unlike(file.getvalue(), number))
            rows.writerow([name, f"第 {number} 张图片的说明"])


def size_of(folder: Path) -> int:
    """Bytes on the disk: the official files are as sparse as the file system lets them be."""
    blocks = [file.stat() for file in folder.rglob("*.mdb") if file.name == "data.mdb"]
    return sum(min(status.st_size, getattr(status, "st_blocks", 1 << 60) * 512) for status in blocks)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--images", type=int, default=4000)
    options.add_argument("--import-pairs", type=int, default=100_000)
    options.add_argument("--repeats", type=int, default=5)
    real = os.environ.get("CNCLIP_FT_REAL_DATA")
    options.add_argument("--photos", type=Path, default=Path(real) / "photos" if real else None)
    options.add_argument("--workers", type=int, default=2, help="of the import")
    options.add_argument("--scratch", type=Path, default=None, help="where to write (about 5 GB)")
    options.add_argument("--json", type=Path, default=None)
    chosen = options.parse_args()
    pictures = photographs(chosen.photos)
    script = json.dumps(str(OFFICIAL / "cn_clip" / "preprocess" / "build_lmdb_dataset.py"))
    reads = [code.replace("_READS", str(_READS)) for code in (_THEIR_READ, _OUR_READ)]
    sides = {"official": (_THEIR_BUILD.replace("__PATH__", script), reads[0]), "ours": (_OUR_BUILD, reads[1])}
    result: dict[str, object] = {"images": chosen.images, "pairs": 5 * chosen.images, "repeats": chosen.repeats}

    with tempfile.TemporaryDirectory(dir=chosen.scratch) as name:
        folder = Path(name)
        write_source(folder, pictures, chosen.images)
        result["picture_bytes"] = round(statistics.mean(map(len, pictures)))
        seconds: dict[str, list[float]] = {"official": [], "ours": []}
        reading: dict[str, list[float]] = {"official": [], "ours": [], "official, base64 left as it is": []}
        for repeat in range(chosen.repeats):
            for side in random.Random(repeat).sample(list(sides), 2):
                os.sync() if hasattr(os, "sync") else None
                target = folder / f"{side}-{repeat}"
                seconds[side].append(run(sides[side][0], folder, target, official=side == "official")["SECONDS"])
        for repeat in range(chosen.repeats):
            for side in random.Random(repeat).sample(list(sides), 2):
                code = sides[side][1]
                found = run(code, folder / f"{side}-0", official=side == "official")
                reading[side].append(_READS / found["SECONDS"])
                if side == "official":
                    reading["official, base64 left as it is"].append(_READS / found["UNDECODED"])
        sizes = {side: size_of(folder / f"{side}-0") for side in sides}
    result |= {"build_seconds": seconds, "pairs_per_second": reading, "store_bytes": sizes}
    median = {side: (statistics.median(seconds[side]), statistics.median(reading[side])) for side in sides}

    with tempfile.TemporaryDirectory(dir=chosen.scratch) as name:
        folder = Path(name)
        (folder / "photos").mkdir()
        write_photos(folder / "photos", chosen.import_pairs)
        began = time.perf_counter()
        imported = run(_OUR_IMPORT, folder / "photos", folder / "store", chosen.workers)
        result["import"] = {**imported, "wall": time.perf_counter() - began}

    print(
        f"{chosen.images:,} pictures of {result['picture_bytes']:,} bytes, {5 * chosen.images:,} pairs; medians of {chosen.repeats}"
    )
    print(f"{'':22}{'official':>12}{'ours':>12}{'':>10}")
    build, read = [[median[side][k] for side in ("official", "ours")] for k in (0, 1)]
    print(f"{'build, seconds':22}{build[0]:12.2f}{build[1]:12.2f}{build[0] / build[1]:9.2f}x as fast")
    print(
        f"{'store, MiB':22}{sizes['official'] / 2**20:12.1f}{sizes['ours'] / 2**20:12.1f}{sizes['ours'] / sizes['official']:9.3f}x the size"
    )
    print(f"{'random access, pairs/s':22}{read[0]:12,.0f}{read[1]:12,.0f}{read[1] / read[0]:9.2f}x as fast")
    raw = statistics.median(reading["official, base64 left as it is"])
    print(f"{'  base64 left as is':22}{raw:12,.0f}{'':12}{read[1] / raw:9.2f}x as fast")
    print(
        f"import of {imported['PAIRS']:,.0f} pairs: {imported['SECONDS']:.1f} s, peak memory {imported['PEAK']:.0f} MiB"
    )
    if chosen.json:
        chosen.json.write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
