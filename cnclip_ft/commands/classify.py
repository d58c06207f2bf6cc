"""`cnclip-ft classify`: pictures and a list of classes → labels, accuracies, confusion."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cnclip_ft.commands.options import Checkpoint, Encoding, Json, OnError, Origin, Picture, spread
from cnclip_ft.evaluation.options import Options, open_model
from data_tools.tables import say


@spread
def classify(
    *,
    checkpoint: Checkpoint,
    images: Annotated[
        str,
        typer.Argument(
            metavar="IMAGES", help="A folder with a sub-folder a class, or a store whose texts are class names."
        ),
    ],
    classes: Annotated[
        Path, typer.Option(metavar="FILE", help="A line a class: `name|other name`, or `folder<TAB>name|other name`.")
    ],
    templates: Annotated[
        str | None,
        typer.Option(
            help="zh, en, zh+en, none, or a file with {} in every line; left out, those of the model's family."
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
    """
    import json

    from cnclip_ft.evaluation import plots, provenance
    from cnclip_ft.evaluation.classification import classify_images, report_table
    from cnclip_ft.evaluation.encoding import check_on_error, tell_left_out
    from cnclip_ft.evaluation.outputs import refuse_outputs
    from cnclip_ft.evaluation.zero_shot import labelled_images, read_classes, read_templates
    from cnclip_ft.features import official_files
    from cnclip_ft.features.sources import open_source
    from cnclip_ft.models.registry import family_of
    from data_tools.errors import RequestError

    options = Options(**vars(encoding), **vars(origin))
    options.check()
    check_on_error(on_error)
    refuse_outputs([checkpoint, images, classes], json_file=json_file, kind="classes", lines=output, picture=picture)
    if picture:
        plots.require_matplotlib()
    known = read_classes(classes)
    sentences = None if templates is None else read_templates(templates)
    source = open_source(images)
    if source.kind == "texts":
        raise RequestError(f"{images} is a file of texts; give a folder of images or a store")
    ids, labels = labelled_images(Path(images), source, known)
    for note in source.notes:
        say(note)
    opened = open_model(checkpoint, options)
    if sentences is None:
        sentences = read_templates(family_of(opened.model.text_tower).templates)
    about = opened.described()
    made_by, settings = about["checkpoint"], about["settings"]
    key = [made_by.get("checksum", made_by.get("weights_checksum")), settings["text"], settings["dtype"]]
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
