"""`cnclip-ft evaluate`, `encode`, `topk`, `classify`, `calibrate` and `compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Checkpoint = Annotated[
    str, typer.Argument(metavar="CHECKPOINT", help="A checkpoint folder or file, or a published name.")
]
BatchSize = Annotated[int, typer.Option(min=1, help="Images at once; texts go in batches twice as large.")]
Workers = Annotated[
    int | None, typer.Option(min=0, help="Processes that decode images. [default: 0 on the CPU, else up to 8]")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps. [default: the best there is]")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16: precision of the towers.")]
ImageSize = Annotated[int | None, typer.Option(help="Another image size than the checkpoint's.")]
Memory = Annotated[str, typer.Option(help="Bound for what a search holds beside the features, e.g. 512MiB.")]
OnError = Annotated[
    str,
    typer.Option(
        help="Pictures that cannot be used: report (go on, list them, exit 1 at the end), skip (the same, exit 0) or fail (stop at the first)."
    ),
]
Hub = Annotated[str, typer.Option("--source", help="Where a published name comes from: huggingface or modelscope.")]
TrustImport = Annotated[
    bool,
    typer.Option("--trust-import", help="Import the code a checkpoint names for its image tower (docs/towers.md)."),
]
Json = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write the result with all settings as JSON.")
]
Picture = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Draw it (.png, .svg, .pdf); needs cnclip-ft[plots].")
]


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
    from cnclip_ft.features import folder as feature_folder
    from cnclip_ft.features import official_files
    from data_tools.errors import RequestError
    from data_tools.tables import terminal_width

    options = scorecard.Options(batch_size, workers, device, dtype, image_size, memory, dataset, source, trust_import)
    path = Path(checkpoint)
    refuse_outputs([checkpoint, *(splits or [])], json_file=json_file, markdown=markdown)
    if path.is_file() and path.suffix == ".jsonl":
        line, score = scorecard.score_predictions(path, splits or [])
        typer.echo(line)
        if json_file:
            official_files.write_json(json_file, score)
        return
    if feature_folder.is_feature_folder(path):
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


def topk(
    queries: Annotated[
        str, typer.Argument(metavar="QUERIES", help="Features: .npy, official .jsonl, or a folder written by `encode`.")
    ],
    gallery: Annotated[str, typer.Argument(metavar="GALLERY", help="Features to search in, likewise.")],
    output: Annotated[Path, typer.Option(metavar="FILE", help="Predictions, in the official format.")],
    k: Annotated[int, typer.Option("--k", "-k", min=1, help="How many for each query.")] = 10,
    direction: Annotated[
        str, typer.Option(help="What is meant when files do not say: text-image, image-text, image-image, text-text.")
    ] = "text-image",
    scores: Annotated[bool, typer.Option("--scores", help="Write the cosines beside the ids.")] = False,
    memory: Memory = "2GiB",
    device: Device = None,
    answers: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Official answers: print the recall too.")
    ] = None,
    score: Annotated[
        Path | None, typer.Option(metavar="FILE", help="With --answers: write the official score file.")
    ] = None,
) -> None:
    """Exact top-k of two sets of features, in tiles, with bounded memory.

    Example: cnclip-ft topk features/valid features/valid --output predictions.jsonl --answers valid_texts.jsonl
    """
    from cnclip_ft.evaluation.topk_run import search_files

    search_files(queries, gallery, output, k=k, direction=direction, with_scores=scores, memory=memory, device=device,
                 answers=answers, score=score, say=typer.echo)  # fmt: skip


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


def compare(
    checkpoints: Annotated[
        list[str],
        typer.Argument(
            metavar="A B...", help="Checkpoints, or folders written by `encode`; A is compared with each other."
        ),
    ],
    split: Annotated[
        str | None, typer.Option(metavar="STORE", help="Where checkpoints are scored; not needed for features.")
    ] = None,
    draws: Annotated[int, typer.Option(help="Bootstrap draws.")] = 2000,
    seed: Annotated[int, typer.Option(help="For the draws.")] = 0,
    confidence: Annotated[float, typer.Option(help="Of the intervals.")] = 0.95,
    json_file: Json = None,
    batch_size: BatchSize = 128,
    workers: Workers = None,
    device: Device = None,
    dtype: Dtype = "float32",
    memory: Memory = "2GiB",
    source: Hub = "huggingface",
    trust_import: TrustImport = False,
) -> None:
    """Checkpoints side by side on one split: is B better than A, or is it chance? Paired bootstrap over images.

    Example: cnclip-ft compare runs/a/contrast/best runs/b/contrast/best --split data/test
    """
    from cnclip_ft.evaluation.compare_run import compare_models
    from cnclip_ft.evaluation.scorecard import Options

    options = Options(batch_size, workers, device, dtype, memory=memory, source=source, trust_import=trust_import)
    compare_models(
        checkpoints, split, options, draws=draws, seed=seed, confidence=confidence, json_file=json_file, say=typer.echo
    )
