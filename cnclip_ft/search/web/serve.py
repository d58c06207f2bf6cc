"""The application behind uvicorn, on an address that was free."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import socket
from typing import TYPE_CHECKING

from data_tools.errors import RequestError, UserError

if TYPE_CHECKING:
    from types import FrameType

    from fastapi import FastAPI

_NEEDED = {"fastapi": "fastapi", "uvicorn": "uvicorn", "multipart": "python-multipart"}


def require_serve() -> None:
    """Raises:
    RequestError: a package of the extra is not installed.
    """
    missing = [package for module, package in _NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise RequestError(f"serving needs {', '.join(missing)}: pip install 'cnclip-ft[serve]'")


def share_cores(device: str | None) -> None:
    """On the CPU: so many cores for a question that others find some too."""
    from cnclip_ft.runtime import parse_device
    from cnclip_ft.search.web.batcher import set_cores, threads_for

    if parse_device(device).type == "cpu":
        set_cores(threads_for("cpu"))


def run(app: FastAPI, listener: socket.socket) -> None:
    """Serve until interrupted."""
    import uvicorn

    from cnclip_ft.search.web.patience import patient

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            # Only the first signal counts: a second would break off the application's own end, with a traceback.
            # Ctrl-C is often pressed twice, and `timeout` signals the process and its group.
            if not self.should_exit:
                super().handle_exit(sig, frame)

    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        use_colors=False,
        server_header=False,
        timeout_graceful_shutdown=5,
        http=patient(),
        ws="none",
    )
    with contextlib.suppress(KeyboardInterrupt):
        Server(config).run(sockets=[listener])


def listen(host: str, port: int) -> socket.socket:
    """Raises:
    UserError: the address cannot be listened on.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP, flags=socket.AI_PASSIVE
        )[0]
        # The protocol by name: asyncio turns Nagle's algorithm off for TCP only, which costs 40 ms an answer if it is on.
        listener = socket.socket(family, kind, protocol)
        if os.name == "posix":  # elsewhere it would let two servers share a port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot listen on {host}, port {port} ({reason}); choose another --port or --host") from None
    return listener
