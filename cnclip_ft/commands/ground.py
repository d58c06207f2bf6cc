"""`cnclip-ft ground`: where in a picture phrases are."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cnclip_ft.commands.options import Checkpoint, Device, Dtype, ImageSize, Json, Origin, spread
from cnclip_ft.evaluation.options import Options, open_model
from data_tools.tables import say


@spread
def ground(
    *,
    checkpoint: Checkpoint,
    what: Annotated[
        list[str],
        typer.Argument(
            metavar="PICTURE... SENTENCE...",
            help="Files are pictures; all else is words, of which sentences are split into phrases.",
        ),
    ],
    phrases: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PHRASE|FILE",
            help="A phrase as it stands, never split, or several between commas, or a file with one a line; may be repeated.",
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="learnt, sclip, maskclip or naclip. [default: learnt where the checkpoint has learnt boxes, else sclip]"
        ),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(
            help="How hot a place must be to lie in a box: a share between the coldest and the hottest; of learnt boxes, of the best one's "
            "probability."
        ),
    ] = None,
    most: Annotated[int, typer.Option(min=1, max=1000, help="Boxes a phrase.")] = 10,
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw boxes, heat maps and a legend (.png).")
    ] = None,
    write_boxes: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Of a store: write its pictures with the phrases of their captions and the learnt boxes of at least --threshold (0.5) as a "
            "store to learn from.",
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--continue", help="With --write-boxes: go on where it was interrupted.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="With --write-boxes: replace the store there.")
    ] = False,
    json_file: Json = None,
    font: Annotated[Path | None, typer.Option(metavar="FILE", help="Font for the legend.")] = None,
    image_size: ImageSize = Options.image_size,
    device: Device = Options.device,
    dtype: Dtype = Options.dtype,
    origin: Origin,
) -> None:
    """Where phrases are in pictures: a heat map and boxes with scores for each, without any training.

    Works with every checkpoint whose image tower is a ViT, and with towers by import path that give patches. Where a checkpoint has
    learnt boxes, they are what is shown.

    Example: cnclip-ft ground runs/mine/contrast/best photo.jpg "红色的伞" "a red umbrella" --picture out.png --json out.json

    Example: cnclip-ft ground runs/mine/boxes/best DIR/train --write-boxes DIR/found --threshold 0.6

    Example: cnclip-ft ground ViT-B-16 street.jpg --phrases "red bus, 行人" --threshold 0.7
    """
    from PIL import Image

    from cnclip_ft.commands.grounding_input import read_pictures, told_apart
    from cnclip_ft.evaluation.outputs import is_report
    from cnclip_ft.evaluation.results import provenance
    from cnclip_ft.features import official_files
    from cnclip_ft.features.encode import evaluating
    from cnclip_ft.grounding import drawing, finder
    from data_tools.errors import DataFault, RequestError, UserError
    from data_tools.outputs import holds, refuse_files
    from data_tools.tables import table, terminal_width

    options = Options(image_size=image_size, device=device, dtype=dtype, **vars(origin))
    options.check()
    if write_boxes is not None:
        looked = {
            "--phrases": phrases, "--method": method not in (None, finder.LEARNT), "--most": most != finder.MOST_BOXES,
            "--picture": picture, "--json": json_file, "--font": font,
        }  # fmt: skip
        other = [name for name, given in looked.items() if given]
        if other:
            raise RequestError(
                f"{', '.join(other)}: not with --write-boxes, which writes all learnt boxes of the phrases of a store's captions. "
                "Leave out the one or the other"
            )
        _write_boxes(checkpoint, what, write_boxes, options, threshold, overwrite=overwrite, proceed=resume)
        return
    for name, given in (("--continue", resume), ("--overwrite", overwrite)):
        if given:
            raise RequestError(f"{name} is for --write-boxes DIR: give both, or leave {name} out")
    files, asked = told_apart(what, phrases or [])
    asked = finder.checked_phrases(asked)
    how = finder.How(method, finder.THRESHOLD if threshold is None else threshold, most)
    refuse_files(
        [
            (json_file, is_report("grounded"), "a report in JSON of this command"),
            (picture, holds(drawing.MAKER.encode()), "a picture of this command"),
        ],
        [checkpoint, *files],
    )
    if picture:
        drawing.check_name(picture)
    many = f"{len(asked):,} phrase{'s' * (len(asked) > 1)}"
    say(f"{many}: {' | '.join(asked[:12])}{' | …' if len(asked) > 12 else ''}")
    opened = open_model(checkpoint, options)
    model, chosen = opened.model, how.method_of(opened.model)
    texts = model.encode_texts(asked)
    drawn: list[tuple[Image.Image, list[finder.Grounded]]] = []
    entries: list[dict[str, Any]] = []
    rows: list[list[str]] = []
    faults: list[str] = []
    with evaluating(model, dtype=opened.dtype):
        for file, content in read_pictures(files):
            try:
                if isinstance(content, DataFault):
                    raise content
                decoded = finder.decode(model, content)
                thumb = finder.shown(content, drawing.SIDE) if picture and len(drawn) < drawing.MOST_PICTURES else None
            except DataFault as fault:
                faults.append(f"{file}: {fault.problem}")
                continue
            (found,) = finder.find(model, [decoded], [asked], [texts], how)
            entries.append(
                {
                    "picture": str(file), "width": decoded.width, "height": decoded.height,
                    "grounded": [finder.as_json(one) for one in found],
                }
            )  # fmt: skip
            if thumb is not None:
                drawn.append((thumb, found))
            for one in found:
                best = one.boxes[0].box
                rows.append(
                    [
                        file.name,
                        one.phrase,
                        f"{one.score:.3f}",
                        " ".join(f"{side:.3f}" for side in best),
                        f"{len(one.boxes)}",
                    ]
                )
    if rows:
        heads = ["picture", "phrase", "score", "best box (x y w h)", "boxes"]
        say(table(heads, rows[:200], text=(0, 1), width=terminal_width()))
        if len(rows) > 200:
            say(f"… and {len(rows) - 200:,} more" + ("" if json_file else " (all of them with --json FILE)"))
        what_scores_are = "probabilities" if chosen == finder.LEARNT else "cosines of the hottest patch"
        say(f"method {chosen}; scores are {what_scores_are}: compare them between pictures and phrases of one model")
        for note in provenance.image_size_notes(provenance.image_size(model)):
            say(f"note: {note}")
    if picture and drawn:
        for note in drawing.draw(drawn, picture, font=font, pictures=len(entries)):
            say(note)
    if json_file and entries:
        official_files.write_json(
            json_file,
            {
                "format": provenance.FORMAT,
                **opened.described(),
                "versions": provenance.versions(),
                "method": chosen,
                "threshold": how.threshold,
                "phrases": asked,
                "grounded": entries,
            },
        )
    if faults:
        raise UserError(
            f"{len(faults):,} of {len(files):,} pictures cannot be used: {'; '.join(faults[:3])}"
            + (". The rest is complete" if entries else "")
        )


def _write_boxes(
    checkpoint: str,
    what: list[str],
    output: Path,
    options: Options,
    threshold: float | None,
    *,
    overwrite: bool,
    proceed: bool,
) -> None:
    from cnclip_ft.evaluation.grounding import box_writing
    from data_tools.errors import RequestError

    if len(what) != 1:
        raise RequestError(
            f"--write-boxes takes one store, whose captions say what is looked for, and {len(what)} arguments are given: "
            "cnclip-ft ground CHECKPOINT STORE --write-boxes DIR"
        )
    done = box_writing.write_boxes(
        open_model(checkpoint, options),
        what[0],
        output,
        threshold=box_writing.THRESHOLD if threshold is None else threshold,
        overwrite=overwrite,
        proceed=proceed,
    )
    thrown = done.asked - done.kept
    say(
        f"{output}: {done.boxes:,} boxes of {done.kept:,} phrases in {done.pictures:,} pictures. Of {done.asked:,} phrases "
        f"{100 * done.kept / done.asked:.1f}% are kept, {100 * thrown / done.asked:.1f}% ({thrown:,}) thrown away"
    )
    if done.damaged:
        say(f"{done.damaged:,} pictures cannot be read and are left out")
