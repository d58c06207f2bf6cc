"""Decoding beside the server: deadlines, crashes, floods, and what may stand where an indexed picture was."""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
import subprocess
import sys
import time

import pytest
from PIL import Image

pytest.importorskip("fastapi", reason="not installed: pip install 'cnclip-ft[serve]'")

from cnclip_ft.search.web import decoders as room
from cnclip_ft.search.web.batcher import Busy
from cnclip_ft.search.web.decoders import Decoders
from cnclip_ft.search.web.thumbnails import SIZES, Gone, Thumbnails
from data_tools.errors import DataFault
from tests.evaluation import tiny

# The real process with jobs that pictures do not usually offer.
_MORE_JOBS = """
import os, time
import cnclip_ft.search.web.decoder as decoder
def memory(data, pixels): return bytes(len(bytearray(8 << 30)))
decoder._JOBS |= {
    "sleep": lambda data, pixels: time.sleep(30), "crash": lambda data, pixels: os.abort(),
    "memory": memory, "who": lambda data, pixels: str(os.getpid()).encode(),
    "chatter": lambda data, pixels: os.write(1, b"x" * 1000) and b"", "recurse": lambda data, pixels: (f := lambda: f()) and f(),
    "nonsense": lambda data, pixels: os.write(1, decoder.LENGTHS.pack(3, 1 << 50) + b"abc") and b"",
}
decoder.main(int(sys.argv[1]), float(sys.argv[2]))
"""


@pytest.fixture
def more_jobs(monkeypatch):
    monkeypatch.setattr(room, "_CODE", f"import sys; sys.path[:] = sys.argv[3:]\n{_MORE_JOBS}")


def use(scene, at_once=1, waiting=4, seconds=0.4):
    async def inside():
        async with Decoders(at_once, waiting, seconds, pixels=1_000_000) as decoders:
            return await scene(decoders)

    return asyncio.run(inside())


def test_what_overruns_crashes_or_babbles_is_ended_and_replaced(more_jobs):
    async def scene(decoders):
        found, pids = {}, [await decoders.run({"do": "who"})]
        for job in ("sleep", "crash", "chatter", "nonsense"):
            began = time.monotonic()
            with pytest.raises(DataFault) as caught:
                await decoders.run({"do": job})
            found[job] = caught.value.kind
            assert time.monotonic() - began < 10
            pids.append(await decoders.run({"do": "who"}))
        for job in ("memory", "recurse"):  # a fault, and the same process goes on
            with pytest.raises(DataFault) as caught:
                await decoders.run({"do": job})
            found[job] = caught.value.kind
        assert await decoders.run({"do": "who"}) == pids[-1] and len(set(pids)) == len(pids)
        return found, pids

    found, pids = use(scene)
    assert found["sleep"] == "too-slow"
    assert found["crash"] == found["chatter"] == found["nonsense"] == found["recurse"] == "undecodable-image"
    if sys.platform == "linux":
        assert found["memory"] == "image-too-large"
        assert not any(os.path.exists(f"/proc/{int(pid)}") for pid in pids)


def test_the_message_names_the_option(more_jobs):
    async def scene(decoders):
        with pytest.raises(DataFault, match=r"more than 0\.4 s .*--max-decode-seconds"):
            await decoders.run({"do": "sleep"})

    use(scene)


def test_others_go_on_and_few_wait(more_jobs):
    async def scene(decoders):
        slow = asyncio.create_task(decoders.run({"do": "sleep"}))
        await asyncio.sleep(0.05)
        assert (await asyncio.wait_for(decoders.run({"do": "who"}), 30)).isdigit() and not slow.done()
        many = await asyncio.gather(*(decoders.run({"do": "who"}) for _ in range(12)), return_exceptions=True)
        assert (
            sum(isinstance(found, Busy) for found in many) == 12 - 5
            and sum(isinstance(found, bytes) for found in many) == 5
        )
        slow.cancel()
        await asyncio.gather(slow, return_exceptions=True)

    use(scene, at_once=2, seconds=20)


def test_who_waits_too_long_is_sent_away(more_jobs, monkeypatch):
    monkeypatch.setattr(room, "_QUEUE_SECONDS", 0.1)

    async def scene(decoders):
        slow = asyncio.create_task(decoders.run({"do": "sleep"}))
        await asyncio.sleep(0.05)
        with pytest.raises(Busy):
            await decoders.run({"do": "who"})
        slow.cancel()
        await asyncio.gather(slow, return_exceptions=True)

    use(scene, seconds=20)


def test_a_process_that_ended_while_idle_is_not_noticed(more_jobs):
    async def scene(decoders):
        os.kill(int(await decoders.run({"do": "who"})), 9)
        await asyncio.sleep(0.3)
        assert (await decoders.run({"do": "who"})).isdigit()

    use(scene)


def test_it_is_light_and_ends_with_the_server():
    code = "import sys; from cnclip_ft.search.web import decoder; print([m for m in ('torch', 'numpy', 'fastapi', 'lmdb') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
    command = [sys.executable, "-c", room._CODE, str(2**30), "9", *sys.path]
    assert subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=60).returncode == 0


def _stamp(path):
    found = path.stat()
    return f"{found.st_size}-{found.st_mtime_ns}"


def _became(path, outside, kind):
    if kind == "vanished":
        path.unlink()
        return
    if kind == "touched":
        os.utime(path, ns=(0, 0))
        return
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "link to a picture outside":
        path.symlink_to(outside / "secret.png")
    elif kind == "another picture":
        path.write_bytes(tiny.png(5))
    elif kind == "folder above is a file":
        path.parent.rmdir()
        path.parent.write_bytes(b"")


KINDS = [
    "vanished", "touched", "pipe", "folder", "device", "loop", "link to a picture outside", "another picture",
    "folder above is a file",
]  # fmt: skip


@pytest.mark.skipif(os.name != "posix", reason="pipes and links")
def test_only_the_file_that_was_indexed_is_shown(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.png").write_bytes(tiny.png(9))
    items = []
    for number, kind in enumerate([*KINDS, "whole", "link, as it was"]):
        path = tmp_path / "photos" / str(number) / "a.png"
        path.parent.mkdir(parents=True)
        if kind == "link, as it was":
            path.symlink_to(outside / "secret.png")
        else:
            path.write_bytes(tiny.png(3))
        items.append((f"{number}/a.png", _stamp(path)))
        if kind in KINDS:
            _became(path, outside, kind)
    items += [("../outside/secret.png", _stamp(outside / "secret.png")), (str(outside / "secret.png"), items[-1][1])]

    async def scene(decoders):
        thumbnails = Thumbnails("folder", tmp_path / "photos", items.__getitem__, decoders)
        found = []
        for number in range(len(items)):
            try:
                found.append((await thumbnails.get(number, "small"))[:2])
            except Gone as error:
                found.append(str(error))
        return found

    began = time.monotonic()
    found = dict(zip([*KINDS, "whole", "link, as it was", "above", "absolute"], use(scene, seconds=20), strict=True))
    assert time.monotonic() - began < 20
    jpeg = [kind for kind, said in found.items() if said == b"\xff\xd8"]
    assert jpeg == ["whole", "link, as it was"]
    assert all("secret" not in said for said in found.values() if isinstance(said, str))
    assert "changed" in found["touched"] and "changed" in found["another picture"] and "no file" in found["pipe"]


def test_a_picture_of_a_store_is_known_by_its_content(store):
    from data_tools.store import open_store

    opened = open_store(store)
    key = opened.image_ids[0]
    data = opened.image(key)
    right = hashlib.blake2b(data, digest_size=16).hexdigest()

    async def scene(decoders):
        thumbnails = Thumbnails("store", store, [(key, right), (key, "0" * 32), (99999, right)].__getitem__, decoders)
        assert Image.open(io.BytesIO(await thumbnails.get(0, "large"))).format == "JPEG"
        for number, words in ((1, "changed"), (2, "not where")):
            with pytest.raises(Gone, match=words):
                await thumbnails.get(number, "small")

    use(scene, seconds=20)
    assert SIZES.keys() == {"small", "large"}
