"""`cnclip-ft search serve`: the application behind uvicorn, on this machine only unless told otherwise."""

from __future__ import annotations

import importlib.util
import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

from cnclip_ft.search.engine.engine import open_engine
from cnclip_ft.search.engine.threshold import read_threshold
from data_tools.errors import RequestError, UserError

_NEEDED = {"fastapi": "fastapi", "uvicorn": "uvicorn", "multipart": "python-multipart"}


def require_serve() -> None:
    """Raises:
    RequestError: a package of the extra is not installed.
    """
    missing = [package for module, package in _NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise RequestError(f"serving needs {', '.join(missing)}: pip install 'cnclip-ft[serve]'")


def serve_index(
    folder: str | Path,
    *,
    host: str,
    port: int,
    threshold: str | None,
    upload: str,
    pixels: int,
    decode_seconds: float = 5.0,
    request_seconds: float = 30.0,
    allowed: Sequence[str] = (),
    checkpoint: str | None,
    device: str | None,
    exact: bool,
    trust_import: bool = False,
    say: Callable[[str], None] = print,
    warn: Callable[[str], None] = print,
) -> None:
    """Open the index, prepare it, then serve until interrupted.

    Raises:
        RequestError: index, model, threshold or a limit cannot be used, or an extra is missing.
        UserError: the address cannot be listened on.
    """
    require_serve()
    import uvicorn

    from cnclip_ft.evaluation import provenance as record
    from cnclip_ft.retrieval.tiles import parse_memory
    from cnclip_ft.search.index.folder import Index
    from cnclip_ft.search.web.api import Limits, make_app
    from cnclip_ft.search.web.batcher import set_cores, threads_for
    from cnclip_ft.search.web.guard import is_loopback, names_of
    from cnclip_ft.search.web.patience import patient

    limit = read_threshold(threshold, Index(folder).info)
    limits = Limits(
        upload_bytes=parse_memory(upload), pixels=pixels, decode_seconds=decode_seconds, body_seconds=request_seconds
    )
    listener = _listen(host, port)  # before the model: a port in use is said at once
    if record.parse_device(device).type == "cpu":
        set_cores(threads_for("cpu"))
    engine = open_engine(folder, checkpoint=checkpoint, device=device, exact=exact, trust_import=trust_import, say=warn)
    prepared = engine.prepare()
    if prepared:
        say(f"prepared: {prepared}")
    local = is_loopback(host)
    app = make_app(
        engine, threshold=limit, limits=limits, names=names_of(host), addresses=not local,
        allowed=frozenset(name.lower() for name in allowed),
    )  # fmt: skip
    place = f"[{host}]" if ":" in host else host
    say(f"{len(engine.index):,} pictures at http://{place}:{listener.getsockname()[1]}/  (Ctrl-C stops)")
    if not local:
        warn(f"WARNING: {host} can be reached from other machines. Anyone who reaches this server can search and see "
             "every picture of the index; there is no password. Put it behind a proxy that asks for one")  # fmt: skip
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
    try:
        uvicorn.Server(config).run(sockets=[listener])
    except KeyboardInterrupt:
        pass
    say("stopped")


def _listen(host: str, port: int) -> socket.socket:
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
