"""Requests that wait together are answered together: one pass of the text tower, one look at the index.

No request is held back to wait for others. While one group is being answered the next one gathers, so groups grow
with the load and a lone request pays nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from cnclip_ft.search.engine import Answer
from cnclip_ft.search.query import Question

_TOGETHER = 32  # more would make the first of them wait for the last


class Busy(Exception):
    """Too many requests wait already."""


class Batcher:
    """Answers questions in groups, in a thread of its own.

    Args:
        answer: `Engine.ask`; it is called by one thread only.
        waiting: how many may wait before `Busy` is raised.
    """

    def __init__(self, answer: Callable[[Sequence[Question]], list[Answer]], waiting: int = 256) -> None:
        self._answer = answer
        self._queue: asyncio.Queue[tuple[Question, asyncio.Future[Answer]]] = asyncio.Queue(waiting)
        self._thread = ThreadPoolExecutor(1, "search")
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Batcher:
        self._task = asyncio.create_task(self._work())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._thread.shutdown(wait=True)

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
            group = [await self._queue.get()]
            while not self._queue.empty() and len(group) < _TOGETHER:
                group.append(self._queue.get_nowait())
            group = [(question, future) for question, future in group if not future.done()]  # some have hung up
            try:
                answers = await loop.run_in_executor(self._thread, self._answer, [question for question, _ in group])
            except Exception as error:  # noqa: BLE001 - who asked is told, the next group goes on
                for _, future in group:
                    if not future.done():
                        future.set_exception(error)
                continue
            for (_, future), answer in zip(group, answers, strict=True):
                if not future.done():
                    future.set_result(answer)
