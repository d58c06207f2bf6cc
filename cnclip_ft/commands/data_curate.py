"""`cnclip-ft data curate`: what of a store is better left out, to look at, and a new store without it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cnclip_ft.commands.options import Checkpoint, Origin, PageLanguage, Towers, spread
from data_tools.tables import say


@spread
def curate(
    *,
    store: Annotated[Path, typer.Argument(metavar="STORE", help="<dir>/<split>; it stays as it is.")],
    checkpoint: Checkpoint,
    report: Annotated[Path, typer.Option(metavar="FILE", help="The page with thumbnails.")] = Path("curate.html"),
    listing: Annotated[
        Path | None, typer.Option("--list", metavar="FILE", help="Everything that is left out, one JSON object a line.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="A new store without it. [default: only the page]")] = None,
    near: Annotated[
        float | None, typer.Option(help="Cosine from which on pictures are alike; 1: none. [default: measured]")
    ] = None,
    fit: Annotated[
        str | None,
        typer.Option(
            metavar="NUMBER|FILE",
            help="Cosine below which a caption does not fit, or `calibrate --json`'s file; -1: none. [default: measured]",
        ),
    ] = None,
    most: Annotated[
        int | None, typer.Option(help="Pictures one text may stand on. [default: 1 % of the pictures, at least 20]")
    ] = None,
    seed: Annotated[int, typer.Option(help="For what is measured on samples.")] = 0,
    language: PageLanguage = None,
    towers: Towers,
    origin: Origin,
) -> None:
    """Find pictures that are like others, captions that do not fit, and texts on too many pictures.

    Example: cnclip-ft data curate DIR/train runs/mine/contrast/best --report curate.html

    Example: cnclip-ft data curate DIR/train runs/mine/contrast/best --output DIR/curated
    """
    import json

    from cnclip_ft.evaluation.curation import finding
    from cnclip_ft.evaluation.curation.page import BEGINS, write_page
    from cnclip_ft.evaluation.options import Options, open_model
    from cnclip_ft.evaluation.results.provenance import weights_sum
    from cnclip_ft.evaluation.thresholds.limit import read_threshold
    from cnclip_ft.features.sources import store_source
    from data_tools.appending import kept_form
    from data_tools.atomic import whole_file
    from data_tools.build import build_store
    from data_tools.outputs import begins, lines_with, refuse_files, refuse_overlap
    from data_tools.shards import open_pairs
    from data_tools.sources.stored import StoreSource
    from data_tools.store import refuse_place
    from data_tools.words import language_of

    options = Options(**vars(towers), **vars(origin))
    options.check()
    said_in, read = language_of(language), [store, Path(checkpoint)]
    refuse_files(
        [
            (report, begins(*BEGINS), "a page of `data curate`"),
            (listing, lines_with("why", "image_id"), "a list of `data curate`"),
        ],
        read,
    )
    if output is not None:
        refuse_overlap(output, read)
        refuse_place(output, overwrite=False)
    finding.Wishes(near, None, most).check()
    source, opened_store = store_source(store), open_pairs(store)
    opened = open_model(checkpoint, options)
    made = opened.described()["checkpoint"]
    limit = read_threshold(fit, weights_sum(made), opened.model.image_size, "--fit")
    wishes = finding.Wishes(near, limit, most, seed=seed)
    wishes.check()
    found = finding.curate(opened_store, opened.features(source), opened, wishes, say)
    for line in found.lines():
        say(line)
    write_page(found, opened_store, report, said_in)
    say(f"look at {report}")
    if listing is not None:
        with whole_file(listing, "w") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in found.records())
    if output is None:
        return
    images, pairs = found.dropped_images, found.dropped_pairs
    told = {pair.image_id for pair in opened_store.pairs()}
    stays = {
        pair.image_id
        for pair in opened_store.pairs()
        if pair.image_id not in images and (pair.image_id, pair.text_id) not in pairs
    }
    # A picture that had texts and has none left goes; one that never had any is part of the gallery.
    part = StoreSource(
        store,
        keep=lambda image_id: image_id in stays or (image_id not in told and image_id not in images),
        keep_pair=lambda pair: (pair.image_id, pair.text_id) not in pairs,
        open_place=open_pairs,
    )
    report_of = build_store(part, output, **kept_form(opened_store))
    say("\n".join(report_of.lines()))
