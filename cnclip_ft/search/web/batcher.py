"""Requests that wait together are answered together: one pass of the text tower, one look at the index.

No request is held back to wait for others. While one group is being answered the next one gathers, so groups grow
with the load and a lone request pays nothing. With two threads, each with half of the cores, two groups are answered
side by side: a text tower splits badly over cores when all it has is a dozen tokens.
"""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from cnclip_ft.search.engine.engine import Answer
from cnclip_ft.search.engine.query import Question

_TOGETHER = 32  # more would make the first of them wait for the last


class Busy(Exception):
    """Too many requests wait already."""


class Batcher:
    """Answers questions in groups, in threads of its own.

    Args:
        answer: `Engine.ask`. threads: how many groups at a time; torch's own threads are shared out among them.
        waiting: how many may wait before `Busy` is raised.
    """

    def __init__(
        self, answer: Callable[[Sequence[Question]], list[Answer]], threads: int = 1, waiting: int = 256
    ) -> None:
        self._answer, self._count = answer, threads
        self._queue: asyncio.Queue[tuple[Question, asyncio.Future[Answer]]] = asyncio.Queue(waiting)
        self._pool = ThreadPoolExecutor(threads, "search", initializer=set_cores, initargs=(threads,))
        self._idle = 0
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Batcher:
        self._tasks = [asyncio.create_task(self._work()) for _ in range(self._count)]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._pool.shutdown(wait=True)

    async def ask(self, question: Question) -> Answer:
        """Raises:
        Busy: the queue is full.
        """
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        try:
            self._queue.put_nowait((question, future))
        except asyncio.QueueFull:
            raise Busy from None
        return await future

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            self._idle += 1
            group = [await self._queue.get()]
            share = min(_TOGETHER, math.ceil((1 + self._queue.qsize()) / self._idle))
            self._idle -= 1
            while not self._queue.empty() and len(group) < share:
                group.append(self._queue.get_nowait())
            group = [(question, future) for question, future in group if not future.done()]  # some have hung up
            try:
                answers = await loop.run_in_executor(self._pool, self._answer, [question for question, _ in group])
            except Exception as error:  # noqa: BLE001 - who asked is told, the next group goes on
                for _, future in group:
                    if not future.done():
                        future.set_exception(error)
                continue
            for (_, future), answer in zip(group, answers, strict=True):
                if not future.done():
                    future.set_result(answer)


def set_cores(threads: int) -> None:
    """This thread's part of the cores, when `threads` compute side by side."""
    import torch

    torch.set_num_threads(max(1, usable_cores() // threads))


def usable_cores() -> int:
    """Cores this process may use, or fewer where OMP_NUM_THREADS says so."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wished = os.environ.get("OMP_NUM_THREADS", "")
    return min(cores, int(wished)) if wished.isdigit() and int(wished) else cores


def threads_for(device: str) -> int:
    """Groups at a time: two where the processor does the work and has the cores."""
    return 2 if device == "cpu" and (os.cpu_count() or 1) >= 2 else 1
