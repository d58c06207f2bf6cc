"""`cnclip-ft classify`: pictures and a list of classes → labels, accuracies, confusion."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch

from cnclip_ft.evaluation import plots, provenance
from cnclip_ft.evaluation.encoding import check_on_error, tell_left_out
from cnclip_ft.evaluation.outputs import refuse_outputs
from cnclip_ft.evaluation.recall_table import number
from cnclip_ft.evaluation.scorecard import Options, open_model
from cnclip_ft.evaluation.zero_shot import (
    ClassReport,
    class_features,
    labelled_images,
    read_classes,
    read_templates,
    score_classes,
)
from cnclip_ft.features import official_files
from cnclip_ft.features.encode import Meter, encode_images, evaluating
from cnclip_ft.features.sources import open_source
from data_tools.errors import DataFault, RequestError, UserError
from data_tools.tables import table, terminal_width

_SHOWN = 40  # classes in the printed table; the JSON has all


def classify_images(
    checkpoint: str,
    images: str,
    classes_file: Path,
    templates_spec: str,
    options: Options,
    *,
    output: Path | None,
    json_file: Path | None,
    picture: Path | None,
    cache: bool,
    on_error: str = "report",
    say: Callable[[str], None] = print,
) -> None:
    """Images without a label are classified and not scored; `on_error` as in `encoding.encode_to_folder`.

    Raises:
        RequestError, DataFault: classes, templates or images cannot be used.
        UserError: images were left out, with ``report``; or none can be used.
    """
    options.check()
    check_on_error(on_error)
    refuse_outputs(
        [checkpoint, images, classes_file], json_file=json_file, kind="classes", lines=output, picture=picture
    )
    if picture:
        plots.require_matplotlib()
    classes, templates = read_classes(classes_file), read_templates(templates_spec)
    source = open_source(images)
    if source.kind == "texts":
        raise RequestError(f"{images} is a file of texts; give a folder of images or a store")
    ids, labels = labelled_images(Path(images), source, classes)
    for note in source.notes:
        say(note)
    model, device, dtype = open_model(checkpoint, options)
    about = provenance.describe_checkpoint(model, checkpoint)
    settings = provenance.describe_settings(model, dtype, device)
    key = (
        json.dumps([about.get("checksum", about.get("weights_checksum")), settings["text"], settings["dtype"]])
        if cache
        else None
    )
    workers = provenance.default_workers(device) if options.workers is None else options.workers
    with evaluating(model, dtype=dtype):
        words = class_features(model, classes, templates, key=key, batch_size=2 * options.batch_size)
        meter = Meter(len(ids), "images")
        faults: dict[int, DataFault] = {}
        told = None if on_error == "fail" else faults.__setitem__
        pixels = encode_images(
            model, ids, source.read, batch_size=options.batch_size, workers=workers, meter=meter, on_fault=told
        )
        meter.close()
        if len(faults) == len(ids):
            raise UserError(f"none of the {len(ids):,} pictures can be used; the first: {faults[0]}")
        whole = [row for row in range(len(ids)) if row not in faults]
        pixels = pixels[whole]
        cosines = pixels @ words.T
        shares = (cosines * model.logit_scale.exp().float().cpu()).softmax(1)
    report = score_classes(cosines, [labels[row] for row in whole], classes)
    say(meter.line("images"))
    if report is None:
        say("no image has a label (a sub-folder named like its class), so nothing is scored")
        if output is None:
            raise RequestError("nothing is scored without labels; say --output FILE to get each image's classes")
    else:
        say(_table(report))
    if output:
        best = cosines.topk(min(5, len(classes)), dim=1).indices
        keys = [c.key for c in classes]
        lines = _lines([ids[row] for row in whole], [labels[row] for row in whole], keys, best, cosines, shares)
        official_files.write_text(output, [*lines, *_fault_lines(ids, labels, keys, faults)])
    if json_file:
        content = {
            "format": provenance.FORMAT, "checkpoint": about, "settings": settings, "versions": provenance.versions(),
            "images": {"path": images, "count": len(whole), "checksum": source.checksum},
            "left_out": [fault.as_dict() for fault in faults.values()],
            "classes": {c.key: list(c.names) for c in classes}, "templates": templates,
            "scores": report.as_dict() if report else None,
        }  # fmt: skip
        official_files.write_json(json_file, content)
    if picture and report:
        note = plots.confusion_picture(report.confusion, [c.key for c in classes], picture)
        if note:
            say(note)
    if faults:
        tell_left_out([fault.problem for fault in faults.values()], output, on_error, say)


def _fault_lines(ids, labels, keys: list[str], faults: dict[int, DataFault]):
    for row, fault in faults.items():
        label = None if labels[row] is None else keys[labels[row]]
        yield json.dumps({"image_id": ids[row], "label": label, "fault": fault.as_dict()})


def _table(report: ClassReport) -> str:
    top5 = "" if report.top5 is None else f"  top-5 {report.top5:.1f}"
    head = f"top-1 {report.top1:.1f}{top5}  mean per class {report.mean_per_class:.1f}  ({report.images:,} images)"
    worst = sorted(report.per_class.items(), key=lambda item: (item[1] is None, item[1] or 0))
    rows = [[key, str(report.counts[key]), number(value)] for key, value in worst[:_SHOWN]]
    more = len(worst) - _SHOWN
    return (
        head
        + "\n\n"
        + table(["class", "images", "accuracy"], rows, width=terminal_width())
        + (f"\n… and {more} more" if more > 0 else "")
    )


def _lines(ids, labels, keys: list[str], best: torch.Tensor, cosines: torch.Tensor, shares: torch.Tensor):
    for row, (image_id, label) in enumerate(zip(ids, labels, strict=True)):
        found = [
            {"class": keys[c], "cosine": round(cosines[row, c].item(), 6), "share": round(shares[row, c].item(), 6)}
            for c in best[row].tolist()
        ]
        line = {"image_id": image_id, "label": None if label is None else keys[label], "classes": found}
        yield json.dumps(line, ensure_ascii=False)
