"""A Milvus server that goes away, and an index killed while it is written: nothing is lost.

The server is milvus-lite behind gRPC, in a process that can be killed.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("pymilvus", reason="not installed: pip install 'cnclip-ft[milvus]'")
pytest.importorskip("milvus_lite", reason="not installed: pip install 'cnclip-ft[milvus]'")

from cnclip_ft.search.engine.engine import open_engine
from cnclip_ft.search.engine.query import Question
from cnclip_ft.search.index import milvus_renewal, renewal
from cnclip_ft.search.index.milvus import TOKEN, Away, Milvus, milvus_place
from tests.search.encoded import counted
from tests.search.milvus_rows import equal, held

ROOT = Path(__file__).resolve().parents[2]


class Server:
    """milvus-lite behind gRPC, in a process of its own."""

    def __init__(self, folder: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.folder, self.place = folder, f"milvus:http://127.0.0.1:{self.port}"

    def start(self) -> None:
        words = ["-m", "milvus_lite", "server", "--data-dir", str(self.folder), "--port", str(self.port)]
        self.process = subprocess.Popen([sys.executable, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until = time.monotonic() + 60
        while True:
            try:
                return Milvus(milvus_place(self.place)).close()
            except Away:
                assert time.monotonic() < until and self.process.poll() is None
                time.sleep(0.2)

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def server(tmp_path):
    running = Server(tmp_path / "server")
    running.start()
    yield running
    running.kill()


@pytest.mark.slow
def test_a_server_that_goes_away_loses_nothing(make, checkpoint, photos, server, tmp_path, monkeypatch):
    monkeypatch.setenv(TOKEN, "a-very-secret-token")
    real = renewal.encode_pictures

    def killing(*arguments, **options):
        for number, batch in enumerate(real(*arguments, **options)):
            if number == 3:
                server.kill()
            yield batch

    monkeypatch.setattr(milvus_renewal, "_SECONDS", 0.0)  # every batch is put
    monkeypatch.setattr(renewal, "encode_pictures", killing)
    with pytest.raises(Away, match="Milvus cannot be reached") as error:
        make(checkpoint, photos, server.place, batch_size=4)
    assert "a-very-secret-token" not in str(error.value)
    with pytest.raises(Away):
        make(checkpoint, photos, server.place)
    monkeypatch.setattr(renewal, "encode_pictures", real)
    server.start()
    seen = counted(monkeypatch)
    said = make(checkpoint, photos, server.place)
    assert "12 were encoded before the interruption" in said and len(seen) == 8
    make(checkpoint, photos, f"milvus:{tmp_path}/whole.db")
    assert equal(held(server.place), held(f"milvus:{tmp_path}/whole.db"))
    engine = open_engine(server.place, device="cpu")
    assert len(engine.ask([Question("狗", top=20)])[0]) == 20
    server.kill()
    answers = engine.ask([Question("狗"), Question(like=3)])
    assert all(isinstance(answer, Away) for answer in answers)
    written = [path for path in [*tmp_path.rglob("*")] if path.is_file()]
    assert written and not any(b"a-very-secret-token" in path.read_bytes() for path in written)
    server.start()
    assert len(engine.ask([Question("狗", top=20)])[0]) == 20


_CHILD = """
import os, sys
from cnclip_ft.evaluation.options import Options
from cnclip_ft.search.index import milvus_renewal
from cnclip_ft.search.index.renewal import Wishes, build_index
milvus_renewal._SECONDS = 0.0
checkpoint, photos, place, seed, kills = *sys.argv[1:4], int(sys.argv[4]), int(sys.argv[5])
import random, signal, time
random.seed(seed)
def child(seconds):
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            build_index(checkpoint, photos, place, Options(batch_size=2, workers=0, device="cpu"), Wishes(), str)
            code = 0
        finally:
            os._exit(code)
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        if os.waitpid(pid, os.WNOHANG)[0]:
            return time.monotonic() - began
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None
whole = float(sys.argv[6])
done = 0
for number in range(kills):
    for name in random.sample(sorted(os.listdir(photos)), 4):
        with open(os.path.join(photos, name), "ab") as file:
            file.write(b" ")  # another size: it is encoded again
    done += child(random.uniform(0, whole)) is not None
print(done)
assert done < kills
assert child(600) is not None
"""


@pytest.mark.slow
def test_thirty_kills(make, checkpoint, photos, tmp_path):
    place, flat = f"milvus:{tmp_path}/i.db", tmp_path / "flat"
    flat.mkdir()
    for number, path in enumerate(sorted(photos.rglob("*.png"))):
        path.rename(flat / f"{number}.png")
    began = time.monotonic()
    make(checkpoint, flat, f"milvus:{tmp_path}/once.db", batch_size=2)
    words = [
        str(checkpoint),
        str(flat),
        place,
        str(random.Random(0).randint(0, 99)),
        "30",
        str(time.monotonic() - began),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, *words], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    make(checkpoint, flat, f"milvus:{tmp_path}/fresh.db")
    assert equal(held(place), held(f"milvus:{tmp_path}/fresh.db"))
