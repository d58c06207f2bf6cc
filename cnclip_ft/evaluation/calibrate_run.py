"""`cnclip-ft calibrate`: a threshold on the cosine, its curve, and what the numbers mean."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from cnclip_ft.evaluation import plots, provenance
from cnclip_ft.evaluation.calibration import choose, curve, in_words, read_pairs, sampled_scores
from cnclip_ft.evaluation.outputs import refuse_outputs
from cnclip_ft.evaluation.scorecard import Options, open_model
from cnclip_ft.features import official_files
from cnclip_ft.features.encode import encode_images, encode_source, encode_texts, evaluating
from cnclip_ft.features.folder import is_feature_folder, read_info, read_split
from cnclip_ft.features.sources import FolderReader, is_store, store_source
from cnclip_ft.models.dual_encoder import DualEncoder
from data_tools.errors import DataFault, RequestError

_POINTS = 200  # of the curve in the JSON


def calibrate_model(
    checkpoint: str,
    pairs: str,
    options: Options,
    *,
    images: Path | None,
    precision: float | None,
    recall: float | None,
    share: float | None,
    negatives: int,
    seed: int,
    json_file: Path | None,
    picture: Path | None,
    say: Callable[[str], None] = print,
) -> None:
    """Threshold for a wanted precision or recall.

    Raises:
        RequestError: not exactly one wish, one that cannot be had, or unusable pairs.
        DataFault: a broken line or image.
    """
    options.check()
    if (precision is None) == (recall is None):
        raise RequestError("say either --precision or --recall, e.g. --precision 0.95")
    if share is not None and not 0 < share < 1:
        raise RequestError(f"--share is {share}; it lies between 0 and 1, e.g. 0.01 when one pair in a hundred matches")
    refuse_outputs([checkpoint, pairs], json_file=json_file, kind="threshold", picture=picture)
    if picture:
        plots.require_matplotlib()
    labelled = Path(pairs).is_file()
    given = read_pairs(pairs) if labelled else None
    source = None if labelled or is_feature_folder(pairs) else store_source(pairs)
    model, device, dtype = open_model(checkpoint, options)
    workers = provenance.default_workers(device) if options.workers is None else options.workers
    if given is not None:
        with evaluating(model, dtype=dtype):
            scores = _pair_scores(model, given, images or Path(pairs).parent, options.batch_size, workers)
        labels = torch.tensor([pair.match for pair in given])
    else:
        if source is None:
            features = read_split(pairs)
            made_by = read_info(pairs)["settings"]["checkpoint"]
            own = provenance.describe_checkpoint(model, checkpoint)
            if any(made_by.get(key) != own.get(key) for key in ("checksum", "weights_checksum")):
                raise RequestError(
                    f"the features in {pairs} were made with {made_by.get('path')}, another model than {checkpoint}"
                )
        else:
            features = encode_source(
                model, source.split, source.read, batch_size=options.batch_size, workers=workers, dtype=dtype
            )
        scores, labels = sampled_scores(features, negatives, seed)
    points = curve(scores, labels, share)
    found = choose(points, precision=precision, recall=recall, share=share)
    matches, others = int(labels.sum()), int((~labels).sum())
    drawn = "" if labelled else " drawn at random"
    say(f"{matches:,} matching and {others:,} other pairs{drawn}; average precision {points.average_precision:.3f}")
    interval = found.precision_interval
    said = "" if interval is None else f" ({interval[0]:.3f} to {interval[1]:.3f})"
    say(
        f"for {found.wanted}: cosine >= {found.cosine:.4f}   precision {found.precision:.3f}{said}   "
        f"recall {found.recall:.3f} ({found.recall_interval[0]:.3f} to {found.recall_interval[1]:.3f})"
    )
    temperature = model.logit_scale.exp().item()
    say(in_words(found, scores, labels, temperature))
    if share is None:
        say(f"note: precision holds where {100 * matches / (matches + others):.1f} % of the judged pairs match, as here; "
            "say --share for another part")  # fmt: skip
    if json_file:
        step = max(1, len(points.thresholds) // _POINTS)
        content: dict[str, Any] = {
            "format": provenance.FORMAT, "checkpoint": provenance.describe_checkpoint(model, checkpoint),
            "settings": provenance.describe_settings(model, dtype, device), "versions": provenance.versions(),
            "pairs": {"path": pairs, "matching": matches, "others": others, "share": share,
                      "checksum": source.checksum if source else None,
                      "negatives": None if labelled else negatives, "seed": None if labelled else seed},
            "threshold": asdict(found), "average_precision": points.average_precision,
            "curve": {name: getattr(points, name)[::step].tolist() for name in ("thresholds", "precision", "recall")},
        }  # fmt: skip
        official_files.write_json(json_file, content)
    if picture:
        plots.precision_recall_picture(
            points.recall, points.precision, (found.recall, found.precision), f"cosine >= {found.cosine:.3f}", picture
        )


def _pair_scores(model: DualEncoder, pairs: list[Any], images: Path, batch_size: int, workers: int) -> torch.Tensor:
    """float64 cosine of every labelled pair; each image and each text is encoded once."""
    if is_store(images):
        source = store_source(images)
        by_name = {str(image_id): image_id for image_id in source.split.image_ids}
        missing = next((pair.image for pair in pairs if pair.image not in by_name), None)
        read, ids = source.read, {pair.image: by_name.get(pair.image) for pair in pairs}
    else:
        missing = next((pair.image for pair in pairs if not (images / pair.image).is_file()), None)
        read, ids = FolderReader(images), {pair.image: pair.image for pair in pairs}
    if missing is not None:
        raise DataFault(f"image {missing!r} is not in {images}", mend="Say where the images lie with --images.",
                        kind="missing-image", file=images)  # fmt: skip
    image_at = {name: number for number, name in enumerate(ids)}
    text_at = {text: number for number, text in enumerate(dict.fromkeys(pair.text for pair in pairs))}
    pictures = encode_images(model, list(ids.values()), read, batch_size=batch_size, workers=workers)
    words = encode_texts(model, list(text_at), batch_size=2 * batch_size)
    left = torch.tensor([image_at[pair.image] for pair in pairs])
    right = torch.tensor([text_at[pair.text] for pair in pairs])
    return (pictures[left].double() * words[right].double()).sum(1)
