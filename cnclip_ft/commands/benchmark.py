"""`cnclip-ft benchmark`: one checkpoint on the public test sets a folder holds, both languages, in one table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cnclip_ft.commands.options import Checkpoint, Encoding, Json, Memory, Origin, spread
from cnclip_ft.evaluation.options import Options
from data_tools.tables import say


@spread
def benchmark(
    *,
    checkpoint: Checkpoint,
    data: Annotated[
        Path,
        typer.Option(
            metavar="DIR",
            help="The folder that holds the test sets, one below another name each (docs/evaluation.md#the-public-test-sets).",
        ),
    ],
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="flickr30k-cn, coco, muge, xm3600, imagenet, …; may be repeated."),
    ] = None,
    language: Annotated[str | None, typer.Option(help="zh or en alone. [default: both]")] = None,
    json_file: Json = None,
    markdown: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the tables as Markdown.")] = None,
    encoding: Encoding,
    memory: Memory = Options.memory,
    origin: Origin,
) -> None:
    """Flickr30K(-CN), COCO(-CN), Flickr8k(-CN), MUGE, XM3600, XTD10 and zero-shot ImageNet, as far as DIR holds them.

    Recall both ways and accuracy with 95 % bootstrap intervals, published results beside them where the pool is theirs.
    What is missing is listed. Under torchrun all processes share the encoding. With --json a stopped run goes on: sets done with the same weights are not done again.

    Example: cnclip-ft benchmark runs/mine/contrast/best --data DIR --json benchmark.json --markdown benchmark.md

    Example: cnclip-ft benchmark ViT-B-16 --data DIR --only flickr30k-cn --only coco-cn --language zh
    """
    from cnclip_ft.collectives import rank
    from cnclip_ft.evaluation.benchmark.run import KIND, benchmark_tables, run_benchmark
    from cnclip_ft.evaluation.benchmark.sets import chosen_sets
    from cnclip_ft.evaluation.outputs import refuse_outputs
    from cnclip_ft.features.official_files import write_text
    from data_tools.tables import terminal_width

    wanted = chosen_sets(only or (), language)
    refuse_outputs([checkpoint, data], json_file=json_file, kind=KIND, markdown=markdown)
    options = Options(**vars(encoding), **vars(origin), memory=memory)
    report = run_benchmark(checkpoint, data, wanted, options, language=language, json_file=json_file, say=say)
    if rank():
        return
    print(benchmark_tables(report, width=terminal_width()), flush=True)
    if markdown:
        write_text(markdown, benchmark_tables(report, markdown=True).split("\n"))
