"""Pictures are decoded in processes beside the server (`decoder`): a few at a time, each with a deadline.

A picture can hold a decoder for hours, take gigabytes or crash it, whatever its header says. Then that process is
ended and another takes its place; who sent the picture is told, and nobody else notices.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from contextlib import suppress
from typing import Any

import anyio

from cnclip_ft.search.web.batcher import Busy
from cnclip_ft.search.web.decoder import LENGTHS, frame
from data_tools.errors import DataFault

TOO_SLOW = "too-slow"
_QUEUE_SECONDS = 30.0  # who waits longer is sent away
_START_SECONDS = 60.0
_MOST = 64 * 2**20  # bytes of an answer; a process that a picture has taken over may claim any number
_MEMORY, _BYTES_A_PIXEL = 512 * 2**20, 24  # an animation with transparency, upright, on white: six copies of four bytes
_CODE = "import sys; sys.path[:] = sys.argv[3:]; from cnclip_ft.search.web.decoder import main; main(int(sys.argv[1]), float(sys.argv[2]))"


class Decoders:
    """Runs jobs of `decoder` in processes that start when they are first needed; use inside ``async with``.

    Args:
        at_once: processes. waiting: jobs that may wait for one. seconds: that one job may take.
        pixels: of the largest picture, which bounds the memory of a process where the system can.
    """

    def __init__(self, at_once: int, waiting: int, seconds: float, pixels: int) -> None:
        self.seconds, self.pixels = seconds, pixels
        self._free, self._room = anyio.CapacityLimiter(at_once), waiting + at_once
        self._idle: list[_Child] = []
        self._all: list[_Child] = []  # also those that are ending
        self._inside = 0

    async def __aenter__(self) -> Decoders:
        return self

    async def __aexit__(self, *_: object) -> None:
        for child in self._all:
            await child.end()

    async def run(self, job: dict[str, Any], body: bytes = b"") -> bytes:
        """The bytes of the answer.

        Raises:
            Busy: too many wait, or have waited too long.
            DataFault: what `decoder` found; kind ``too-slow`` where the deadline passed.
        """
        if self._inside >= self._room:
            raise Busy
        self._inside += 1
        try:
            with anyio.move_on_after(_QUEUE_SECONDS) as time:
                await self._free.acquire()
            if time.cancelled_caught:
                raise Busy
            try:
                return await self._in_a_child(job, body)
            finally:
                self._free.release()
        finally:
            self._inside -= 1

    async def _in_a_child(self, job: dict[str, Any], body: bytes) -> bytes:
        child = await self._child()
        about: dict[str, Any] | None = None
        data = b""
        try:
            with anyio.move_on_after(self.seconds) as time:
                about, data = await child.ask(frame({**job, "pixels": self.pixels}, body))
        except (OSError, EOFError, ValueError):  # it has crashed
            raise DataFault("the picture cannot be decoded", mend="", kind="undecodable-image") from None
        finally:
            if about is None:
                child.kill()
            else:
                self._idle.append(child)
        if time.cancelled_caught or about is None:
            raise DataFault(
                f"the picture takes more than {self.seconds:g} s to decode (--max-decode-seconds)",
                mend="",
                kind=TOO_SLOW,
            )
        if "problem" in about:
            raise DataFault(about["problem"], mend="", kind=about["kind"])
        return data

    async def _child(self) -> _Child:
        while self._idle:
            if (idle := self._idle.pop()).alive:
                return idle
        self._all = [child for child in self._all if child.alive]
        child: _Child | None = None
        ready = False
        try:
            with anyio.move_on_after(_START_SECONDS):
                child = await _Child.start(_MEMORY + _BYTES_A_PIXEL * self.pixels, self.seconds + 5)
                self._all.append(child)
                await child.answer()  # from here on the deadline is the picture's alone
                ready = True
        except (OSError, EOFError, ValueError):
            pass
        finally:
            if child is not None and not ready:
                child.kill()
        if child is None or not ready:
            raise Busy
        return child


class _Child:
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None and process.stdout is not None, "started with pipes"
        self._process, self._in, self._out = process, process.stdin, process.stdout

    @classmethod
    async def start(cls, memory: int, seconds: float) -> _Child:
        command = [sys.executable, "-c", _CODE, str(memory), str(seconds), *sys.path]
        environment = dict(os.environ, OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
        pipe, nothing = asyncio.subprocess.PIPE, asyncio.subprocess.DEVNULL
        # Its errors are dropped: libraries in C write there what a picture says.
        return cls(
            await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, stderr=nothing, env=environment)
        )

    @property
    def alive(self) -> bool:
        return self._process.returncode is None

    async def ask(self, request: bytes) -> tuple[dict[str, Any], bytes]:
        self._in.write(request)
        await self._in.drain()
        return await self.answer()

    async def answer(self) -> tuple[dict[str, Any], bytes]:
        """Raises:
        EOFError, OSError: it has ended.
        """
        read = self._out.readexactly
        head, body = LENGTHS.unpack(await read(LENGTHS.size))
        if head > _MOST or body > _MOST:
            raise ValueError(f"{head}, {body} bytes")
        return json.loads(await read(head)), await read(body)

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            self._process.kill()

    async def end(self) -> None:
        self.kill()
        await self._process.wait()
