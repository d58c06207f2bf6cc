"""`cnclip-ft data mine`: hard negatives of every pair, found by a checkpoint and kept in a new store."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from cnclip_ft.commands.options import Checkpoint, Memory, Origin, Store, Towers, Where, spread
from cnclip_ft.evaluation.options import Options
from data_tools.tables import say

PURPOSE = "mining"


@spread
def mine(
    *,
    checkpoint: Checkpoint,
    store: Store,
    output: Annotated[Path, typer.Option(metavar="STORE", help="A new store: all of STORE, with the negatives.")],
    count: Annotated[int, typer.Option(help="Negatives a pair, at most.")] = 8,
    by: Annotated[
        str, typer.Option(help="Who looks for captions that are near: the image, or the text (the pair's own caption).")
    ] = "image",
    below: Annotated[
        float, typer.Option(help="Left out is what scores this share of the own caption's score, or more.")
    ] = 0.95,
    where: Where = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the store that is there.")] = False,
    memory: Memory = Options.memory,
    towers: Towers,
    origin: Origin,
) -> None:
    """Find the captions of other pictures that a checkpoint takes for a pair's own, and keep them with the pair.

    With --where, pictures that meet it get negatives; the captions of all are searched. Features are encoded and captions searched on
    all devices under torchrun or accelerate launch. Stopped, the same command goes on; the new store is whole or not there.

    Example: cnclip-ft data mine runs/mine/contrast/best DIR/train --output DIR/mined
    """
    from cnclip_ft.evaluation import mining, mining_table
    from cnclip_ft.evaluation.encoding import Processes, encode_to_folder
    from cnclip_ft.features.folder import read_split
    from cnclip_ft.retrieval.tiles import parse_memory
    from cnclip_ft.runtime import parse_device
    from data_tools.alike import copies_of, group
    from data_tools.appending import kept_form
    from data_tools.build import build_store
    from data_tools.columns import parse_where
    from data_tools.errors import RequestError
    from data_tools.outputs import refuse_overlap
    from data_tools.scratch import Scratch, real_place, scratch_folder
    from data_tools.shards import is_pairs, open_pairs
    from data_tools.sources.stored import StoreSource
    from data_tools.store import is_store, refuse_place

    options = Options(**vars(towers), **vars(origin), memory=memory)
    options.check()
    parse_memory(memory)
    wishes, conditions = mining.Wishes(count, by, below), parse_where(where or ())
    wishes.check()
    if is_store(Path(checkpoint)) and not is_pairs(store):
        raise RequestError(
            f"{checkpoint} is a store: the checkpoint comes first, "
            f"{shlex.join(['cnclip-ft', 'data', 'mine', str(store), str(checkpoint), '--output', str(output)])}"
        )
    refuse_overlap(output, [store, checkpoint])
    refuse_place(output, overwrite=overwrite)
    opened = open_pairs(store)
    mining.refuse_store(opened)
    processes, place = Processes(options.device), real_place(output)
    folder, first = scratch_folder(place, PURPOSE), processes.index == 0
    asking = mining.asked_pictures(opened, conditions) if first else None
    scratch = Scratch(place, PURPOSE, "mining negatives for this store") if first else None
    features, device = folder / "features", parse_device(processes.device)
    try:
        encode_to_folder(checkpoint, store, features, options, renew=True, on_error="fail", say=say)
        found = mining.mine(
            features,
            folder / "walk",
            lambda: group(*copies_of(opened, workers=2)),
            wishes,
            asking,
            memory=memory,
            device=device,
        )
        if scratch is None or found is None:
            return
        split = read_split(features)
        for line in mining_table.lines(found, wishes) + mining_table.examples(found, split):
            say(line)
        negatives = found.negatives(split)
        report = build_store(
            StoreSource(
                store,
                add_negatives=lambda pair: negatives.get((pair.image_id, pair.text_id), ()),
                open_place=open_pairs,
            ),
            output,
            **kept_form(opened),
            overwrite=overwrite,
        )
    except BaseException as error:
        if scratch is not None:
            nothing = isinstance(error, mining.NothingFound) or not features.exists()
            scratch.remove() if nothing else scratch.release()
        raise
    scratch.remove()
    say("\n".join(report.lines()))
