"""`cnclip-ft search index`, `query` and `serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cnclip_ft.commands.evaluate import TrustImport

app = typer.Typer(help="Index pictures, search them with words and pictures, serve a search page.", no_args_is_help=True,
                  rich_markup_mode=None)  # fmt: skip

IndexFolder = Annotated[Path, typer.Argument(metavar="INDEX", help="A folder written by `search index`.")]
Moved = Annotated[
    str | None, typer.Option("--checkpoint", help="Where the index's model lies now. [default: where it was]")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps. [default: the best there is]")]
Exact = Annotated[bool, typer.Option("--exact", help="Leave an approximate index aside.")]
Threshold = Annotated[
    str | None, typer.Option(metavar="FILE|NUMBER", help="Cosine of a match: a number, or `calibrate --json`'s file.")
]


@app.command()
def index(
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="A checkpoint, or a published name.")],
    what: Annotated[str, typer.Argument(metavar="FOLDER|SPLIT", help="A folder of pictures, or a store.")],
    output: Annotated[Path, typer.Option(metavar="INDEX", help="Folder for the index.")],
    approximate: Annotated[
        str | None,
        typer.Option(help="hnsw, ivf, or none; needs cnclip-ft[faiss]. [default: as it was; ivf beyond 10 million]"),
    ] = None,
    half: Annotated[bool, typer.Option("--half", help="Store float16: half the disk, slower exact search.")] = False,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Encode everything anew, e.g. by another model.")] = False,
    moved: Annotated[bool, typer.Option("--moved", help="The pictures now lie elsewhere; keep what is equal.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at once.")] = 64,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Processes that decode. [default: 0 on the CPU, else up to 8]")
    ] = None,
    device: Device = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16: precision of the towers.")] = "float32",
    source: Annotated[str, typer.Option(help="Where a published name comes from: huggingface or modelscope.")] = (
        "huggingface"
    ),
    trust_import: TrustImport = False,
) -> None:
    """Make an index, or bring it up to date: only new and changed pictures are encoded. Stopped, it continues.

    Example: cnclip-ft search index runs/mine/contrast/best PHOTOS --output photos.index
    """
    from cnclip_ft.evaluation.scorecard import Options
    from cnclip_ft.search.index.build import Wishes, build_index

    options = Options(batch_size, workers, device, dtype, source=source, trust_import=trust_import)
    build_index(checkpoint, what, output, options, Wishes(half, rebuild, moved, approximate), typer.echo)


@app.command()
def query(
    index: IndexFolder,
    text: Annotated[str | None, typer.Argument(metavar="[TEXT]", help="What is looked for.")] = None,
    image: Annotated[Path | None, typer.Option(metavar="FILE", help="A picture of what is looked for.")] = None,
    without: Annotated[str | None, typer.Option("--not", metavar="TEXT", help="What is not wanted.")] = None,
    image_share: Annotated[float, typer.Option(help="The picture's part beside words, 0 to 1.")] = 0.5,
    not_weight: Annotated[float, typer.Option(help="How strongly --not pushes away, 0 to 2.")] = 0.5,
    top: Annotated[int, typer.Option(help="How many pictures, 1 to 1,000.")] = 10,
    threshold: Threshold = None,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON object a line instead of a table.")] = False,
    checkpoint: Moved = None,
    device: Device = None,
    exact: Exact = False,
    trust_import: TrustImport = False,
) -> None:
    """Search with words, a picture, or both.

    Example: cnclip-ft search query photos.index "一只在雪地里奔跑的狗" --not "草地" --top 20
    """
    from cnclip_ft.search.query_run import query_index

    query_index(
        index, text, image=image, without=without, image_share=image_share, without_weight=not_weight, top=top,
        threshold=threshold, as_json=as_json, checkpoint=checkpoint, device=device, exact=exact, trust_import=trust_import,
        say=typer.echo, note=lambda line: typer.echo(line, err=True),
    )  # fmt: skip


@app.command()
def serve(
    index: IndexFolder,
    host: Annotated[str, typer.Option(help="Address to listen on; others than this machine's print a warning.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    threshold: Threshold = None,
    max_upload: Annotated[str, typer.Option(help="Bytes of a picture that is sent.")] = "20MiB",
    max_pixels: Annotated[int, typer.Option(min=1, help="Pixels of a picture that is sent or shown.")] = 50_000_000,
    max_decode_seconds: Annotated[float, typer.Option(min=0.1, help="Seconds one picture may take to decode.")] = 5.0,
    max_request_seconds: Annotated[float, typer.Option(min=1, help="Seconds a request may take to arrive.")] = 30.0,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Another host name to answer to, e.g. a proxy's; may be repeated; '*': any."),
    ] = None,
    checkpoint: Moved = None,
    device: Device = None,
    exact: Exact = False,
    trust_import: TrustImport = False,
) -> None:
    """A search page and a JSON API, on this machine only unless --host says otherwise. Needs cnclip-ft[serve].

    Example: cnclip-ft search serve photos.index --threshold calibration.json
    """
    from cnclip_ft.search.web.serve import serve_index

    serve_index(
        index, host=host, port=port, threshold=threshold, upload=max_upload, pixels=max_pixels,
        decode_seconds=max_decode_seconds, request_seconds=max_request_seconds, allowed=allow_host or (), checkpoint=checkpoint,
        device=device, exact=exact, trust_import=trust_import, say=typer.echo, warn=lambda line: typer.echo(line, err=True),
    )  # fmt: skip
