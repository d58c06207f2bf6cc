"""How long the server waits for a connection, and for how many: uvicorn waits for half a request for ever.

Headers have ten seconds, from the opening of the connection or the last answer; a request has two minutes from its
headers to the last byte of its answer (`Gate` bounds its body, `Decoders` and `Batcher` what it waits for). Where
more connections are open than the server may have, the one that has waited longest for a request is closed.
"""

from __future__ import annotations

import asyncio
import functools
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_SECONDS, REQUEST_SECONDS = 10.0, 120.0
_MOST, _OTHER_FILES = 512, 192  # connections; what else the process has open: model, index, libraries, decoders


class PatientProtocol(H11Protocol):
    """uvicorn's protocol with the limits above.

    Args:
        waiting: the connections that owe a request, the longest waiting first; shared by all of a server.
    """

    def __init__(self, *args: Any, waiting: dict[PatientProtocol, None], most: int, **named: Any) -> None:
        super().__init__(*args, **named)
        self._waiting, self._most = waiting, most
        self._alarm: asyncio.TimerHandle | None = None
        self._seen: object = self  # the request the alarm is set for

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport), "of a stream"
        super().connection_made(transport)
        self._watch()
        if len(self.connections) > self._most:
            longest = next(iter(self._waiting))
            del self._waiting[longest]
            longest.transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        self._waiting.pop(self, None)
        if self._alarm is not None:
            self._alarm.cancel()
        super().connection_lost(error)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def _watch(self) -> None:
        """Set the alarm anew when a request has begun or ended; a byte now and then moves nothing."""
        request = self.cycle if self.cycle is not None and not self.cycle.response_complete else None
        if request is self._seen:
            return
        self._seen = request
        self._waiting.pop(self, None)
        if request is None:
            self._waiting[self] = None
        if self._alarm is not None:
            self._alarm.cancel()
        # An answer counts as given when it is on its way; a slow line may still be taking it.
        done = request is None and not self.transport.get_write_buffer_size()
        seconds = HEADER_SECONDS if done else REQUEST_SECONDS
        # Not `close`: it would wait until what was written has been taken.
        self._alarm = self.loop.call_later(seconds, self.transport.abort)


def patient() -> type[PatientProtocol]:
    """The protocol of one server, for as many connections as this process may have files."""
    most = _MOST
    try:
        import resource

        most = max(16, min(most, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - _OTHER_FILES))
    except ImportError:  # Windows
        pass
    waiting: dict[PatientProtocol, None] = {}

    class OfThisServer(PatientProtocol):
        __init__ = functools.partialmethod(PatientProtocol.__init__, waiting=waiting, most=most)

    return OfThisServer
