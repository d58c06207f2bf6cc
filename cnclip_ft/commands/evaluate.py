"""`cnclip-ft evaluate`, `encode`, `classify` and `calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cnclip_ft.commands.options import (
    BatchSize,
    Checkpoint,
    Device,
    Dtype,
    Hub,
    ImageSize,
    Json,
    Memory,
    OnError,
    Picture,
    TrustImport,
    Workers,
)


def evaluate(
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT",
            help="A checkpoint; or a folder written by `encode`; or an official prediction file (.jsonl).",
        ),
    ],
    splits: Annotated[
        list[str] | None,
        typer.Argument(metavar="[SPLIT]...", help="Stores to score on; for a prediction file, the official answers."),
    ] = None,
    json_file: Json = None,
    markdown: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the table as Markdown.")] = None,
    dataset: Annotated[
        str | None,
        typer.Option(help="Published rows to show: muge, flickr30k-cn, coco-cn, none. [default: judged by the path]"),
    ] = None,
    batch_size: BatchSize = 128,
    workers: Workers = None,
    device: Device = None,
    dtype: Dtype = "float32",
    image_size: ImageSize = None,
    memory: Memory = "2GiB",
    source: Hub = "huggingface",
    trust_import: TrustImport = False,
) -> None:
    """Recall@1/5/10 text→image and image→text, mean recall and median rank over the whole pool, per language.

    Ties count against the model. A direction without ground truth is left out, and that is said.

    Example: cnclip-ft evaluate runs/mine/contrast/best data/valid data/test --json scores.json
    """
    from cnclip_ft.evaluation import scorecard
    from cnclip_ft.evaluation.outputs import refuse_outputs
    from cnclip_ft.features import official_files
    from cnclip_ft.features.folder import is_feature_folder
    from data_tools.errors import RequestError
    from data_tools.tables import terminal_width

    options = scorecard.Options(batch_size, workers, device, dtype, image_size, memory, dataset, source, trust_import)
    path = Path(checkpoint)
    refuse_outputs([checkpoint, *(splits or [])], json_file=json_file, kind="splits", markdown=markdown)
    if path.is_file() and path.suffix == ".jsonl":
        line, score = scorecard.score_predictions(path, splits or [])
        typer.echo(line)
        if json_file:
            official_files.write_json(json_file, score)
        return
    if is_feature_folder(path):
        if splits:
            raise RequestError(f"{checkpoint} holds features already; name no splits beside it")
        card = scorecard.score_features(path, options)
    else:
        card = scorecard.score_checkpoint(checkpoint, splits or [], options)
    typer.echo(card.table(width=terminal_width()))
    if json_file:
        official_files.write_json(json_file, card.as_dict())
    if markdown:
        official_files.write_text(markdown, card.table(markdown=True).split("\n"))


def encode(
    checkpoint: Checkpoint,
    what: Annotated[
        str,
        typer.Argument(
            metavar="SPLIT|FOLDER|TEXTFILE", help="A store, a folder of images, or a .txt / .jsonl of texts."
        ),
    ],
    output: Annotated[Path, typer.Option(help="Folder for the features.")],
    file_format: Annotated[
        str, typer.Option("--format", help="npy, or jsonl for the official feature files beside it.")
    ] = "npy",
    half: Annotated[bool, typer.Option("--half", help="Store float16.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what the output folder holds.")] = False,
    on_error: OnError = "report",
    batch_size: BatchSize = 128,
    workers: Workers = None,
    device: Device = None,
    dtype: Dtype = "float32",
    image_size: ImageSize = None,
    source: Hub = "huggingface",
    trust_import: TrustImport = False,
) -> None:
    """Unit features of images and texts, with their ids. The same command given again continues where it stopped.

    Uses all devices under torchrun or accelerate launch.

    Example: cnclip-ft encode runs/mine/contrast/best data/valid --output features/valid
    """
    from cnclip_ft.evaluation.encoding import encode_to_folder
    from cnclip_ft.evaluation.scorecard import Options

    options = Options(batch_size, workers, device, dtype, image_size, source=source, trust_import=trust_import)
    encode_to_folder(
        checkpoint,
        what,
        output,
        options,
        file_format=file_format,
        half=half,
        overwrite=overwrite,
        on_error=on_error,
        say=typer.echo,
    )


def classify(
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
    templates: Annotated[str, typer.Option(help="zh, en, zh+en, none, or a file with {} in every line.")] = "zh",
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The five best classes of every image, as JSONL.")
    ] = None,
    json_file: Json = None,
    picture: Picture = None,
    cache: Annotated[
        bool, typer.Option("--cache/--no-cache", help="Keep the averaged prompts for the next time.")
    ] = True,
    on_error: OnError = "report",
    batch_size: BatchSize = 128,
    workers: Workers = None,
    device: Device = None,
    dtype: Dtype = "float32",
    image_size: ImageSize = None,
    source: Hub = "huggingface",
    trust_import: TrustImport = False,
) -> None:
    """Zero-shot classification with your own classes: top-1, top-5, accuracy per class, confusion picture.

    Example: cnclip-ft classify runs/mine/contrast/best photos --classes classes.txt --templates zh --json report.json
    """
    from cnclip_ft.evaluation.classification import classify_images
    from cnclip_ft.evaluation.scorecard import Options

    options = Options(batch_size, workers, device, dtype, image_size, source=source, trust_import=trust_import)
    classify_images(checkpoint, images, classes, templates, options, output=output, json_file=json_file, picture=picture,
                    cache=cache, on_error=on_error, say=typer.echo)  # fmt: skip


def calibrate(
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
    batch_size: BatchSize = 128,
    workers: Workers = None,
    device: Device = None,
    dtype: Dtype = "float32",
    image_size: ImageSize = None,
    source: Hub = "huggingface",
    trust_import: TrustImport = False,
) -> None:
    """A threshold on the cosine from labelled pairs, or from a split's own pairs against random ones.

    Example: cnclip-ft calibrate runs/mine/contrast/best data/valid --precision 0.95 --picture curve.png
    """
    from cnclip_ft.evaluation.calibrate_run import calibrate_model
    from cnclip_ft.evaluation.scorecard import Options

    options = Options(batch_size, workers, device, dtype, image_size, source=source, trust_import=trust_import)
    calibrate_model(checkpoint, pairs, options, images=images, precision=precision, recall=recall, share=share,
                    negatives=negatives, seed=seed, json_file=json_file, picture=picture, say=typer.echo)  # fmt: skip
