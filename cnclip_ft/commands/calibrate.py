"""`cnclip-ft calibrate`: a threshold on the cosine, its curve, and what the numbers mean."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from cnclip_ft.commands.options import Checkpoint, Encoding, Json, Origin, Picture, spread
from cnclip_ft.evaluation.options import Options, open_model
from data_tools.tables import say


@spread
def calibrate(
    *,
    checkpoint: Checkpoint,
    pairs: Annotated[
        str,
        typer.Argument(metavar="PAIRS|SPLIT", help="A store (or features), or a .csv/.jsonl with image, text, match."),
    ],
    images: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER|STORE", help="Where the images of PAIRS lie. [default: beside the file]"),
    ] = None,
    precision: Annotated[float | None, typer.Option(help="Wanted: this share of what is accepted is right.")] = None,
    recall: Annotated[float | None, typer.Option(help="Wanted: this share of the true matches is accepted.")] = None,
    share: Annotated[
        float | None, typer.Option(help="Part of the pairs you will judge that match. [default: as in PAIRS]")
    ] = None,
    negatives: Annotated[int, typer.Option(min=1, help="With a split: other images drawn for every pair.")] = 10,
    seed: Annotated[int, typer.Option(help="For the draw.")] = 0,
    json_file: Json = None,
    picture: Picture = None,
    encoding: Encoding,
    origin: Origin,
) -> None:
    """A threshold on the cosine from labelled pairs, or from a split's own pairs against random ones.

    Example: cnclip-ft calibrate runs/mine/contrast/best data/valid --precision 0.95 --picture curve.png
    """
    import torch

    from cnclip_ft.evaluation.outputs import refuse_outputs
    from cnclip_ft.evaluation.results import plots, provenance
    from cnclip_ft.evaluation.thresholds import calibration
    from cnclip_ft.features import official_files
    from cnclip_ft.features.folder import is_feature_folder
    from cnclip_ft.features.sources import store_source

    options = Options(**vars(encoding), **vars(origin))
    options.check()
    calibration.check_wishes(precision, recall, share)
    refuse_outputs([checkpoint, pairs], json_file=json_file, kind="threshold", picture=picture)
    if picture:
        plots.require_matplotlib()
    labelled = calibration.read_pairs(pairs) if Path(pairs).is_file() else None
    source = None if labelled or is_feature_folder(pairs) else store_source(pairs)
    opened = open_model(checkpoint, options)
    if labelled:
        scores = calibration.pair_scores(opened, labelled, images or Path(pairs).parent)
        labels = torch.tensor([pair.match for pair in labelled])
    else:
        features = opened.features(source) if source else calibration.features_of(opened, pairs)
        scores, labels = calibration.sampled_scores(features, negatives, seed, opened.model.tokenizer.prepare)
    points = calibration.curve(scores, labels, share)
    found = calibration.choose(points, precision=precision, recall=recall, share=share)
    say(calibration.in_numbers(found, points, drawn=not labelled))
    say(calibration.in_words(found, scores, labels, opened.model.logit_scale.exp().item()))
    for note in provenance.image_size_notes(provenance.image_size(opened.model)):
        say(f"note: {note}")
    matches, others = int(labels.sum()), int((~labels).sum())
    if share is None:
        say(
            f"note: precision holds where {100 * matches / len(labels):.1f} % of the judged pairs match, as here; "
            "say --share for another part"
        )
    if json_file:
        about = {
            "path": pairs,
            "matching": matches,
            "others": others,
            "share": share,
            "checksum": source.checksum if source else None,
            "negatives": None if labelled else negatives,
            "seed": None if labelled else seed,
        }
        content = {
            "format": provenance.FORMAT,
            **opened.described(),
            "versions": provenance.versions(),
            "pairs": about,
            "threshold": asdict(found),
            "average_precision": points.average_precision,
            "curve": points.some(200),
        }
        official_files.write_json(json_file, content)
    if picture:
        plots.precision_recall_picture(
            points.recall, points.precision, (found.recall, found.precision), f"cosine >= {found.cosine:.3f}", picture
        )
