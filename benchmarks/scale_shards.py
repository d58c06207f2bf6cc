"""Shards read as they lie beside the store that is imported from them, in one run.

    python benchmarks/scale_shards.py [--photos 3000] [--pairs 20000] [--repeats 5] [--json FILE]

Photos of ordinary size (500 × 375, about 60 kB, drawn: gradients and noise) lie in tars of 1,000, in Parquet files with groups of 100
rows and in a store; one worker decodes them in the random order of training, the sides take turns: pictures a second, and their ratio.
Then the offset index of the tars: MB a second. Then --pairs pairs with tiny pictures (20,000, 200,000, 2,000,000), whose index is made in a process of its own:
pairs a second, private memory at its end, peak of all memory, seconds to open it again. Medians of the repeats. Prints the processor; --json writes all.
"""

from __future__ import annotations

import argparse
import io
import json
import platform
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402

_A_TAR = 1000
_DISTINCT = 200

_INDEX = """
import json, re, sys, time
from data_tools.shards import open_pairs
begun = time.perf_counter()
source = open_pairs(sys.argv[1])
seconds = time.perf_counter() - begun
status = open("/proc/self/status").read() if sys.platform == "linux" else "RssAnon: 0 kB VmHWM: 0 kB"
anonymous, peak = (int(re.search(name + r":\\s+(\\d+)", status)[1]) / 1024 for name in ("RssAnon", "VmHWM"))
print(json.dumps({"seconds": seconds, "private_mib": anonymous, "peak_mib": peak, "pairs": len(source)}))
"""


def photos(count: int) -> Iterator[bytes]:
    """JPEGs of 500 × 375, each unlike the others by a comment in its file."""
    random, drawn = np.random.default_rng(0), []
    across, down = np.meshgrid(np.linspace(0, 255, 500), np.linspace(0, 255, 375))
    for _ in range(min(count, _DISTINCT)):
        colours = np.stack([across * random.random() + down * random.random() for _ in range(3)], axis=-1)
        noise = random.normal(0, 14, (375, 500, 3))
        file = io.BytesIO()
        Image.fromarray(np.clip(colours / 2 + noise + 60, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=88)
        drawn.append(file.getvalue())
    for number in range(count):
        data, comment = drawn[number % len(drawn)], b"%012d" % number
        yield data[:2] + b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment + data[2:]


def tiny(count: int) -> Iterator[bytes]:
    """Small pictures of one colour, with a comment each."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 30, 40)).save(file, "JPEG")
    data = file.getvalue()
    for number in range(count):
        comment = b"%012d" % number
        yield data[:2] + b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment + data[2:]


def write_tars(folder: Path, pictures: Iterator[bytes]) -> int:
    """Tars as img2dataset leaves them; their bytes."""
    folder.mkdir(parents=True)
    tar: tarfile.TarFile | None = None
    for number, data in enumerate(pictures):
        if number % _A_TAR == 0:
            if tar is not None:
                tar.close()
            tar = tarfile.open(folder / f"{number // _A_TAR:05d}.tar", "w", format=tarfile.PAX_FORMAT)
        text = f"第{number}张照片，红色的伞和一只狗"
        about = json.dumps({"caption": text, "url": f"http://example.org/{number}.jpg", "width": 500, "height": 375})
        for ending, content in (("jpg", data), ("txt", text.encode()), ("json", about.encode())):
            member = tarfile.TarInfo(f"{number:09d}.{ending}")
            member.size = len(content)
            assert tar is not None
            tar.addfile(member, io.BytesIO(content))
    if tar is not None:
        tar.close()
    return sum(file.stat().st_size for file in folder.glob("*.tar"))


def write_parquet(folder: Path, pictures: Iterator[bytes]) -> None:
    import pyarrow
    from pyarrow import parquet

    folder.mkdir(parents=True)
    rows = []
    for number, data in enumerate(pictures):
        rows.append({"image": {"bytes": data, "path": f"{number:09d}"}, "text": f"第{number}张照片，红色的伞和一只狗"})
        if len(rows) == _A_TAR:
            file = folder / f"{number // _A_TAR:05d}.parquet"
            parquet.write_table(pyarrow.Table.from_pylist(rows), file, row_group_size=100)
            rows.clear()
    if rows:
        parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "99999.parquet", row_group_size=100)


def decoded(source: object, seed: int, limit: int) -> float:
    """Pictures a second that one worker decodes in random order, its start not counted."""
    from cnclip_ft.data.pictures import Pictures
    from cnclip_ft.models.preprocessing import SquarePicture

    pictures = Pictures(source.image_ids, source.image_view, SquarePicture(224), reduced=True)  # type: ignore[attr-defined]
    order = np.random.default_rng(seed).permutation(len(pictures))[:limit]
    batches = [order[start : start + 32].tolist() for start in range(0, len(order) // 32 * 32, 32)]
    begun, done = 0.0, 0
    for number, _ in enumerate(pictures.batches(batches, workers=1)):
        if number == 1:  # the worker runs
            begun, done = time.perf_counter(), 0
        done += 32
    return (done - 32) / (time.perf_counter() - begun)


def with_photos(top: Path, count: int, repeats: int) -> dict[str, object]:
    from data_tools.build import build_store
    from data_tools.shards import open_pairs
    from data_tools.shards.index import FOLDER
    from data_tools.sources import open_source

    size = write_tars(top / "tars", photos(count))
    write_parquet(top / "parquet", photos(count))
    build_store(open_source("webdataset", str(top / "tars"))[""], top / "store", progress=False)
    rates: dict[str, list[float]] = {"store": [], "tars": [], "parquet": []}
    index = []
    for repeat in range(repeats):
        shutil.rmtree(top / "tars" / FOLDER, ignore_errors=True)
        begun = time.perf_counter()
        open_pairs(top / "tars")
        index.append(size / 1e6 / (time.perf_counter() - begun))
        for name in rates if repeat % 2 else reversed(rates):
            source = open_pairs(top / name)
            rates[name].append(decoded(source, repeat, count if name != "parquet" else min(count, 640)))
            source.close()
    found = {name: statistics.median(each) for name, each in rates.items()}
    return {
        "photos": count,
        "bytes_of_a_photo": size // count,
        "pictures_per_second": found,
        "tars_to_store": statistics.median(a / b for a, b in zip(rates["tars"], rates["store"], strict=True)),
        "index_mb_per_second": statistics.median(index),
    }


def with_tiny(top: Path, count: int) -> dict[str, object]:
    write_tars(top / "tiny", tiny(count))
    runs = []
    for _ in range(2):  # made, then opened again
        done = subprocess.run(
            [sys.executable, "-c", _INDEX, str(top / "tiny")], cwd=ROOT, capture_output=True, text=True, check=True
        )
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    made, again = runs
    return {"pairs": count, "made": made | {"pairs_per_second": count / made["seconds"]}, "opened_again": again}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, default=3000)
    parser.add_argument("--pairs", type=int, default=20000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    processor = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    found: dict[str, object] = {"processor": processor, "python": platform.python_version()}
    with tempfile.TemporaryDirectory() as folder:
        if options.photos:
            found |= with_photos(Path(folder), options.photos, options.repeats)
        if options.pairs:
            found["tiny"] = with_tiny(Path(folder), options.pairs)
    print(json.dumps(found, indent=1))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
