"""`cnclip-ft search index`, `query` and `serve`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cnclip_ft.commands.options import Device, Dimensions, Dtype, Origin, TrustImport, Where, Workers, defaults, spread
from cnclip_ft.evaluation.options import Options
from data_tools.tables import note, say

if TYPE_CHECKING:
    from cnclip_ft.search.engine.engine import Found

app = typer.Typer(
    help="Index pictures, search them with words and pictures, serve a search page.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

IndexPlace = Annotated[
    str, typer.Argument(metavar="INDEX", help="A folder written by `search index`, or milvus:PATH.db|http://HOST:PORT.")
]
Threshold = Annotated[
    str | None, typer.Option(metavar="FILE|NUMBER", help="Cosine of a match: a number, or `calibrate --json`'s file.")
]

Host = Annotated[str, typer.Option(help="Address to listen on; others than this machine's print a warning.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")]

_HOST, _PORT = "127.0.0.1", 8000
_SHORT = 16  # characters of a kept value that has room in a table


@dataclass(frozen=True)
class Opening:
    """How an index is opened: what `open_engine` takes."""

    checkpoint: Annotated[
        str | None, typer.Option(help="Where the index's model lies now. [default: where it was]")
    ] = None
    device: Device = None
    exact: Annotated[bool, typer.Option("--exact", help="Leave an approximate index aside.")] = False
    trust_import: TrustImport = False


@app.command()
@spread
def index(
    *,
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="A checkpoint, or a published name.")],
    what: Annotated[str, typer.Argument(metavar="FOLDER|SPLIT", help="A folder of pictures, or a store.")],
    output: Annotated[Path | None, typer.Option(metavar="INDEX", help="Folder for the index.")] = None,
    to: Annotated[
        str | None,
        typer.Option(
            metavar="milvus:PLACE",
            help="Instead of a folder: milvus:PATH.db, or milvus:http://HOST:19530, each with #COLLECTION or without; "
            "needs cnclip-ft[milvus]. A server's token: environment variable CNCLIP_FT_MILVUS_TOKEN.",
        ),
    ] = None,
    approximate: Annotated[
        str | None,
        typer.Option(
            help="hnsw, ivf, or none; in a folder this needs cnclip-ft[faiss]. [default: as it was; beyond 10 million ivf, "
            "in Milvus hnsw]"
        ),
    ] = None,
    half: Annotated[bool, typer.Option("--half", help="Store float16: half the disk, slower exact search.")] = False,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Encode everything anew, e.g. by another model.")] = False,
    moved: Annotated[bool, typer.Option("--moved", help="The pictures now lie elsewhere; keep what is equal.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at once.")] = 64,
    workers: Workers = None,
    device: Device = None,
    dtype: Dtype = Options.dtype,
    dimensions: Dimensions = Options.dimensions,
    serve_it: Annotated[
        bool, typer.Option("--serve", help="Then show the search page, as `search serve` does; needs cnclip-ft[serve].")
    ] = False,
    host: Host = _HOST,
    port: Port = _PORT,
    origin: Origin,
) -> None:
    """Make an index, or bring it up to date: only new and changed pictures are encoded. Stopped, it continues.

    Example: cnclip-ft search index runs/mine/contrast/best PHOTOS --output photos.index --serve --port 8010
    """
    from cnclip_ft.search.index.renewal import Wishes, build_index
    from data_tools.errors import RequestError

    options = Options(batch_size, workers, device, dtype, **vars(origin), dimensions=dimensions)
    place = _place(output, to)
    if not serve_it and (host, port) != (_HOST, _PORT):
        raise RequestError("--host and --port say where the page is shown: give --serve too")
    if serve_it:
        from cnclip_ft.search.web.serve import listen, require_serve

        require_serve()
        listen(host, port).close()  # before the pictures: a port in use is said at once
    build_index(checkpoint, what, place, options, Wishes(half, rebuild, moved, approximate), say)
    if serve_it:
        here = {"index": str(place), "host": host, "port": port, "device": device, "trust_import": origin.trust_import}
        serve(**defaults(serve) | here)


def _place(output: Path | None, to: str | None) -> Path | str:
    from cnclip_ft.search.index.milvus import milvus_place
    from data_tools.errors import RequestError

    if (output is None) == (to is None):
        raise RequestError("say where the index goes: --output FOLDER, or --to milvus:PLACE")
    if output is not None:
        return output
    assert to is not None
    if milvus_place(to) is None:
        raise RequestError(f"--to {to}: expected milvus:PATH.db or milvus:http://HOST:19530; a folder is --output")
    return to


@app.command()
@spread
def query(
    *,
    index: IndexPlace,
    text: Annotated[str | None, typer.Argument(metavar="[TEXT]", help="What is looked for.")] = None,
    image: Annotated[Path | None, typer.Option(metavar="FILE", help="A picture of what is looked for.")] = None,
    without: Annotated[str | None, typer.Option("--not", metavar="TEXT", help="What is not wanted.")] = None,
    image_share: Annotated[float, typer.Option(help="The picture's part beside words, 0 to 1.")] = 0.5,
    not_weight: Annotated[float, typer.Option(help="How strongly --not pushes away, 0 to 2.")] = 0.5,
    top: Annotated[int, typer.Option(help="How many pictures, 1 to 1,000.")] = 10,
    where: Where = None,
    threshold: Threshold = None,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON object a line instead of a table.")] = False,
    opening: Opening,
) -> None:
    """Search with words, a picture, or both.

    Example: cnclip-ft search query index "雪地里奔跑的狗" --not 草地 --top 20
    """
    import json

    from cnclip_ft.evaluation.thresholds.limit import read_threshold
    from cnclip_ft.search.engine.engine import open_engine, open_gallery
    from cnclip_ft.search.engine.query import Question, given_picture
    from data_tools.columns import parse_where
    from data_tools.errors import RequestError

    gallery = open_gallery(index)
    identity = gallery.info["identity"]
    limit = read_threshold(threshold, identity["checksum"], identity.get("image_size"))
    given = None if image is None else given_picture(identity, image)
    question = Question(text, without, given, None, image_share, not_weight, top, parse_where(where or ()), limit)
    question.check()  # before the model is opened
    if question.where:
        gallery.check(question.where)
    engine = open_engine(gallery, **vars(opening), say=note)
    (answer,) = engine.ask([question])
    if isinstance(answer, RequestError):
        raise answer
    if as_json:
        for rank, found in enumerate(answer, 1):
            typer.echo(json.dumps(_line(gallery.info["source"], rank, found), ensure_ascii=False))
        return
    if not answer:
        note("no picture meets the conditions" if limit is None else f"nothing reaches the threshold {limit:.4f}")
        return
    say(_table(answer))


def _line(source: Mapping[str, str], rank: int, found: Found) -> dict[str, object]:
    line: dict[str, object] = {"rank": rank, "score": round(found.score, 6), "number": found.number, "id": found.key}
    if source["kind"] == "folder":
        line["path"] = str(Path(source["path"]) / str(found.key))
    return line | ({"columns": found.columns} if found.columns else {})


def _table(answer: list[Found]) -> str:
    from data_tools.tables import table, terminal_width

    heads, rows = ["#", "score", "number", "picture"], list[list[str]]()
    for rank, found in enumerate(answer, 1):
        rows.append([str(rank), f"{found.score:.4f}", str(found.number), str(found.key)])
    # Links and the like are in --json; a table has no room for them.
    kept = [
        name
        for name in dict.fromkeys(name for found in answer for name in found.columns)
        if all(len(str(found.columns.get(name, ""))) <= _SHORT for found in answer)
    ]
    for row, found in zip(rows, answer, strict=True):
        row += [str(found.columns.get(name, "")) for name in kept]
    return table([*heads, *kept], rows, text=range(3, len(heads) + len(kept)), width=terminal_width())


@app.command()
@spread
def serve(
    *,
    index: IndexPlace,
    host: Host = _HOST,
    port: Port = _PORT,
    threshold: Threshold = None,
    max_upload: Annotated[str, typer.Option(help="Bytes of a picture that is sent.")] = "20MiB",
    max_pixels: Annotated[int, typer.Option(min=1, help="Pixels of a picture that is sent or shown.")] = 50_000_000,
    max_decode_seconds: Annotated[float, typer.Option(min=0.1, help="Seconds one picture may take to decode.")] = 5.0,
    max_request_seconds: Annotated[float, typer.Option(min=1, help="Seconds a request may take to arrive.")] = 30.0,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Another host name to answer to, e.g. a proxy's; may be repeated; '*': any."),
    ] = None,
    password_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Ask for the password in this file's only line (chmod 600).")
    ] = None,
    opening: Opening,
) -> None:
    """A search page and a JSON API, on this machine only unless --host says otherwise. Needs cnclip-ft[serve].

    Example: cnclip-ft search serve photos.index --threshold calibration.json
    """
    from cnclip_ft.evaluation.thresholds.limit import read_threshold
    from cnclip_ft.retrieval.tiles import parse_memory
    from cnclip_ft.search.engine.engine import open_engine, open_gallery
    from cnclip_ft.search.web import serve as web

    web.require_serve()
    from cnclip_ft.search.web.api import Limits, make_app
    from cnclip_ft.search.web.gate import is_loopback, names_of
    from cnclip_ft.search.web.password import read_password

    gallery = open_gallery(index)
    identity = gallery.info["identity"]
    limit = read_threshold(threshold, identity["checksum"], identity.get("image_size"))
    password = None if password_file is None else read_password(password_file)
    limits = Limits(
        parse_memory(max_upload), max_pixels, decode_seconds=max_decode_seconds, body_seconds=max_request_seconds
    )
    listener = web.listen(host, port)  # before the model: a port in use is said at once
    web.share_cores(opening.device)
    engine = open_engine(gallery, **vars(opening), say=note)
    prepared = engine.prepare()
    if prepared:
        say(f"prepared: {prepared}")
    local, allowed = is_loopback(host), frozenset(name.lower() for name in allow_host or ())
    page = make_app(
        engine,
        threshold=limit,
        limits=limits,
        names=names_of(host),
        addresses=not local,
        allowed=allowed,
        password=password,
    )
    place = f"[{host}]" if ":" in host else host
    say(f"{len(gallery):,} pictures at http://{place}:{listener.getsockname()[1]}/  (Ctrl-C stops)")
    if not local and password is None:
        note(
            f"WARNING: {host} can be reached from other machines. Anyone who reaches this server can search and see "
            "every picture of the index; there is no password. Give one with --password-file FILE"
        )
    elif not local:
        note(
            f"note: {host} can be reached from other machines; the password and the pictures travel unencrypted. "
            "Put a proxy that speaks https before it"
        )
    web.run(page, listener)
    say("stopped")
