"""`cnclip-ft classify`: pictures and a list of classes → labels, accuracies, confusion."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cnclip_ft.commands.options import Checkpoint, Encoding, Json, OnError, Origin, Picture, Where, spread
from cnclip_ft.evaluation.options import Options, open_model
from data_tools.tables import say


@spread
def classify(
    *,
    checkpoint: Checkpoint,
    images: Annotated[
        str,
        typer.Argument(
            metavar="IMAGES",
            help="A folder with a sub-folder a class, or a store: --by a column it keeps, or its texts are class names.",
        ),
    ],
    classes: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A line a class: `name|other name`, or `folder<TAB>name|other name`."),
    ] = None,
    by: Annotated[
        str | None,
        typer.Option(metavar="COLUMN", help="The classes are the values of a column that the store keeps: 类目."),
    ] = None,
    least: Annotated[int, typer.Option(min=1, help="With --by: pictures a value must have to be a class.")] = 1,
    where: Where = None,
    templates: Annotated[
        str | None,
        typer.Option(
            help="zh, en, clip, siglip, several joined (zh+en), none, or a file with {} in every line; left out, those of the model's family."
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The five best classes of every image, as JSONL.")
    ] = None,
    json_file: Json = None,
    picture: Picture = None,
    cache: Annotated[
        bool, typer.Option("--cache/--no-cache", help="Keep the averaged prompts for the next time.")
    ] = True,
    on_error: OnError = "report",
    encoding: Encoding,
    origin: Origin,
) -> None:
    """Zero-shot classification with your own classes: top-1, top-5, accuracy per class, confusion picture.

    Example: cnclip-ft classify runs/mine/contrast/best photos --classes classes.txt --templates zh --json report.json

    Example: cnclip-ft classify runs/mine/contrast/best DIR/test --by 类目 --where '价格<100' --picture confusion.png
    """
    import json

    from cnclip_ft.evaluation.classes.classification import classify_images, report_table
    from cnclip_ft.evaluation.classes.columns import column_classes
    from cnclip_ft.evaluation.classes.zero_shot import labelled_images, read_classes, read_templates
    from cnclip_ft.evaluation.encoding import check_on_error, tell_left_out
    from cnclip_ft.evaluation.outputs import refuse_outputs
    from cnclip_ft.evaluation.results import plots, provenance
    from cnclip_ft.features import official_files
    from cnclip_ft.features.sources import open_source
    from cnclip_ft.models.registry import family_of
    from data_tools.columns import parse_where
    from data_tools.errors import RequestError
    from data_tools.shards import open_pairs

    options = Options(**vars(encoding), **vars(origin))
    options.check()
    check_on_error(on_error)
    if (classes is None) == (by is None):
        raise RequestError(
            "what are the classes? Give --by COLUMN (values that a store keeps with its pictures) or --classes FILE, one of the two"
        )
    chosen, read = parse_where(where or ()), [place for place in (checkpoint, images, classes) if place is not None]
    refuse_outputs(read, json_file=json_file, kind="classes", lines=output, picture=picture)
    if picture:
        plots.require_matplotlib()
    known = [] if classes is None else read_classes(classes)
    sentences = None if templates is None else read_templates(templates)
    source = open_source(images)
    if source.kind == "texts":
        raise RequestError(f"{images} is a file of texts; give a folder of images or a store")
    if (by or chosen) and source.kind != "store":
        raise RequestError(
            f"{images} is a folder of pictures, which keeps no columns: {'--by' if by else '--where'} needs a store"
        )
    ids: list[Any] = source.split.image_ids
    labels: list[int | None] = [None] * len(ids)
    if not by:
        ids, labels = labelled_images(Path(images), source, known)
    if by or chosen:
        store = open_pairs(images)
        chosen.check(store.columns, images)
        places = [place for place, image_id in enumerate(ids) if chosen.holds(store.columns_of(image_id))]
        if not places:
            raise RequestError(f"{images}: no picture meets --where {chosen}")
        ids, labels = [ids[place] for place in places], [labels[place] for place in places]
        if by:
            told = column_classes(store, ids, by, least)
            known, labels = told.classes, told.labels
            source.notes.extend(told.notes)
        store.close()
    for note in source.notes:
        say(note)
    opened = open_model(checkpoint, options)
    if sentences is None:
        sentences = read_templates(family_of(opened.model.text_tower).templates)
    about = opened.described()
    made_by, settings = about["checkpoint"], about["settings"]
    key = [provenance.weights_sum(made_by), settings["text"], settings["dtype"]]
    found = classify_images(
        opened,
        ids,
        labels,
        source.read,
        known,
        sentences,
        key=json.dumps(key) if cache else None,
        fail=on_error == "fail",
    )
    say(found.speed)
    for note in provenance.image_size_notes(settings):
        say(f"note: {note}")
    if found.report is None:
        say("no image has a label (a sub-folder named like its class), so nothing is scored")
        if output is None:
            raise RequestError("nothing is scored without labels; say --output FILE to get each image's classes")
    else:
        say(report_table(found.report))
    if output:
        official_files.write_text(output, found.lines())
    faults = found.faults.values()
    if json_file:
        content = {
            "format": provenance.FORMAT,
            **about,
            "versions": provenance.versions(),
            "images": {"path": images, "count": len(ids) - len(faults), "checksum": source.checksum},
            "left_out": [fault.as_dict() for fault in faults],
            "by": by,
            "where": str(chosen),
            "classes": {c.key: list(c.names) for c in known},
            "templates": sentences,
            "scores": found.report.as_dict() if found.report else None,
        }
        official_files.write_json(json_file, content)
    if picture and found.report:
        warning = plots.confusion_picture(found.report.confusion, found.keys, picture)
        if warning:
            say(warning)
    if faults:
        tell_left_out([fault.problem for fault in faults], output, on_error, say)
