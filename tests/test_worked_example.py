"""The worked example of docs/scale.md, line by line as it stands there, with tiny data and two processes in place of eight."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import Request, urlopen

import pytest

from cnclip_ft.features.folder import read_info, read_split
from data_tools.store import StoreWriter
from tests.data_tools.samples import picture
from tests.search.test_milvus_server import Server

pytestmark = pytest.mark.slow
PAGE = Path(__file__).resolve().parents[1] / "docs" / "scale.md"
TARS, EACH = 4, 12
# Weights nobody has to download, and steps of a moment.
TRAIN = [
    "model.start={architecture: tiny}", "data.workers=0", "precision=fp32",
    *(f"stages.{stage}.{setting}" for stage in ("align", "contrast") for setting in ("epochs=1", "batch_size=8", "micro_batch_size=null", "warmup_steps=0")),
]  # fmt: skip


def example() -> list[list[str]]:
    section = PAGE.read_text(encoding="utf-8").split("## A worked example")[1]
    found = re.search(r"^```bash\n(.*?)^```", section, re.M | re.S)
    assert found
    return [shlex.split(line, comments=True) for line in found[1].splitlines() if line.strip()]


def img2dataset(folder: Path) -> None:
    """What `img2dataset --output_format webdataset` leaves: tars of KEY.jpg, KEY.txt and KEY.json, with a table and counts beside each."""
    webdataset = pytest.importorskip("webdataset")
    folder.mkdir()
    for shard in range(TARS):
        with webdataset.TarWriter(str(folder / f"{shard:05d}.tar")) as writer:
            for number in range(EACH):
                key, caption = f"{shard:05d}{number:04d}", f"第 {shard * EACH + number} 件商品"
                about = {"caption": caption, "url": f"https://x/{key}.jpg", "key": key, "status": "success"}
                about |= {"error_message": None, "width": 64, "height": 48, "original_width": 64, "exif": "{}"}
                data = picture(shard * EACH + number, (64, 48))
                writer.write({"__key__": key, "jpg": data, "txt": caption, "json": about})
        (folder / f"{shard:05d}_stats.json").write_text(json.dumps({"count": EACH, "successes": EACH}))
        (folder / f"{shard:05d}.parquet").write_bytes(b"PAR1PAR1")


def write_valid(folder: Path) -> None:
    with StoreWriter(folder) as writer:
        for number in range(8):
            writer.add_image(number, picture(100 + number))
            writer.add_pair(number, number, f"别的 {number}", "zh")
        writer.finish()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def asked(port: int, text: str) -> list[dict]:
    """What the server finds, once it answers."""
    until = time.monotonic() + 120
    while True:
        try:
            request = Request(
                f"http://127.0.0.1:{port}/api/search",
                json.dumps({"text": text, "top": 5}).encode(),
                {"Content-Type": "application/json"},
            )
            with urlopen(request, timeout=30) as response:
                return json.load(response)["results"]
        except OSError:
            assert time.monotonic() < until
            time.sleep(0.3)


def test_every_line_runs(tmp_path) -> None:
    pytest.importorskip("milvus_lite", reason="not installed: pip install 'cnclip-ft[milvus]'")
    milvus = Server(tmp_path / "server")
    milvus.start()
    write_valid(tmp_path / "data" / "valid")
    env = dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", PYTHONPATH=str(PAGE.parents[1]))
    changes = {"{00000..09999}": f"{{00000..{TARS - 1:05d}}}", "HOST:19530": f"127.0.0.1:{milvus.port}"}
    done = []
    try:
        for words in example():
            for old, new in changes.items():
                words = [word.replace(old, new) for word in words]
            done.append(words[0] if words[0] != "cnclip-ft" else " ".join(words[1:3]))
            if words[0] == "img2dataset":
                img2dataset(tmp_path / words[words.index("--output_folder") + 1])
                continue
            if words[0] == "torchrun":
                assert words[1:3] == ["--nproc_per_node", "8"]
                done[-1] += f" {words[5]}"
                words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *words[3:]]
                words += TRAIN if "train" in words else ["--workers", "0"]
            else:
                words = ["-m", "cnclip_ft", *words[1:]]
            if "serve" in words:
                serve(words, tmp_path, env)
                continue
            run = subprocess.run([sys.executable, *words], cwd=tmp_path, env=env, capture_output=True, text=True)
            assert run.returncode == 0, f"{shlex.join(words)}\n{run.stdout[-2000:]}\n{run.stderr[-4000:]}"
    finally:
        milvus.kill()
    assert done == ["img2dataset", "data index", "torchrun train", "torchrun encode", "search index", "search serve"]
    info = read_info(tmp_path / "features")
    assert info["images"] == info["texts"] == TARS * EACH and info["processes"] == 2
    assert read_split(tmp_path / "features").image_ids == [
        f"{shard:05d}{number:04d}" for shard in range(TARS) for number in range(EACH)
    ]


def serve(words: list[str], place: Path, env: dict[str, str]) -> None:
    port = free_port()
    running = subprocess.Popen([sys.executable, *words, "--port", str(port)], cwd=place, env=env)
    try:
        found = asked(port, "第 7 件商品")
    finally:
        running.terminate()
        running.wait(60)
    ids = {f"{shard:05d}{number:04d}" for shard in range(TARS) for number in range(EACH)}
    assert len(found) == 5 and {str(each["id"]) for each in found} <= ids
