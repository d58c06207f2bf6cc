"""`cnclip-ft encode`: features of a store, an image folder or a text file into files; continues where it stopped."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cnclip_ft.evaluation.options import Opened, Options, open_model
from cnclip_ft.evaluation.results import provenance
from cnclip_ft.features.encode import Meter, encode_texts, evaluating, iterate_images
from cnclip_ft.features.folder import FAULTS, FeatureWriter, read_info
from cnclip_ft.features.official_files import IdFeatures, write_features
from cnclip_ft.features.rows import Block
from cnclip_ft.features.sources import Source, open_source
from data_tools.errors import DataFault, RequestError, UserError
from data_tools.outputs import refuse_overlap

FORMATS = ("npy", "jsonl")
ON_ERROR = ("report", "skip", "fail")


def check_on_error(on_error: str) -> None:
    """Refuse anything but the three ways to meet a picture that cannot be used.

    Raises:
        RequestError: another word.
    """
    if on_error not in ON_ERROR:
        raise RequestError(f"--on-error {on_error!r}: one of {', '.join(ON_ERROR)}")


class Processes:
    """This process among those started by `torchrun` or `accelerate launch`; alone without them."""

    def __init__(self, device: str | None) -> None:
        self.state: Any = None
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from accelerate import PartialState

            self.state = PartialState(cpu=device == "cpu" or not torch.accelerator.is_available())
        self.index = self.state.process_index if self.state else 0
        self.count = self.state.num_processes if self.state else 1
        self.device = str(self.state.device) if self.state else device

    def wait(self) -> None:
        if self.state:
            self.state.wait_for_everyone()


def encode_to_folder(
    checkpoint: str | Path,
    what: str | Path,
    output: str | Path,
    options: Options,
    *,
    file_format: str = "npy",
    half: bool = False,
    overwrite: bool = False,
    renew: bool = False,
    on_error: str = "report",
    say: Callable[[str], None] = print,
) -> None:
    """Write unit features with their ids to `output` (layout: `features.folder`).

    Every process started by a launcher takes its share of the blocks; the first one makes and finishes the folder.

    Args:
        file_format: ``npy``, or ``jsonl`` for the official feature files beside it.
        half: store float16.
        renew: what `output` holds of another request is replaced; where it holds this one's, nothing is done.
        on_error: a picture that cannot be used is left out and listed in ``faults.jsonl``; ``report`` ends with an
            error once the rest is done, ``skip`` does not; ``fail`` stops at the first.

    Raises:
        RequestError: something in the request cannot be used, or `output` holds something else.
        DataFault: an image (with ``fail``) or a line is broken; what was computed before it stays.
        UserError: pictures were left out, with ``report``; or none can be used.
    """
    options.check()
    check_on_error(on_error)
    if file_format not in FORMATS:
        raise RequestError(f"--format is {file_format!r}; use {' or '.join(FORMATS)}")
    refuse_overlap(output, [what, checkpoint])
    source = open_source(what)
    processes = Processes(options.device)
    if processes.index == 0:
        for note in source.notes:
            say(note)
    opened = open_model(checkpoint, replace(options, device=processes.device))
    model = opened.model
    settings = opened.described() | {
        "source": {"name": source.name, "path": str(source.path), "kind": source.kind, "checksum": source.checksum},
    }
    first = processes.index == 0
    writer = FeatureWriter(
        output,
        source.split,
        settings,
        dim=model.image_tower.output_dim,
        half=half,
        overwrite=overwrite,
        renew=renew,
        main=first,
    )
    processes.wait()  # until the first has prepared the folder
    if renew and writer.finished:
        return
    shares = {kind: rows.missing(processes.index, processes.count) for kind, rows in writer.rows.items()}
    meters: dict[str, Meter] = {}
    with evaluating(model, dtype=opened.dtype), read_for_good():
        for kind, blocks in shares.items():
            if not blocks:
                continue
            meter = meters[kind] = Meter(sum(map(len, blocks)), f"{kind}s", wanted=first)
            faults: dict[int, dict[str, Any]] = {}
            if kind == "image":
                batches = _images(opened, source, blocks, None if on_error == "fail" else faults, meter)
            else:
                texts = (source.split.texts[block.start : block.stop] for block in blocks)
                batches = (encode_texts(model, part, batch_size=2 * options.batch_size, meter=meter) for part in texts)
            writer.rows[kind].fill(blocks, (batch.numpy() for batch in batches), faults)
            meter.close()
    processes.wait()
    if first:
        speed = {
            f"{kind}s": {
                "count": m.count,
                "seconds": m.seconds,
                "first_batch_seconds": m.first_seconds,
                "per_second_after_it": m.rate,
            }
            for kind, m in meters.items()
            if m.count
        }
        left_out = writer.finish({"speed": speed, "versions": provenance.versions(), "processes": processes.count})
        for kind, meter in meters.items():
            if meter.count:
                say(meter.line(f"{kind}s" + (" (of this process)" if processes.count > 1 else "")))
        if file_format == "jsonl":
            _official_files(Path(output), source.name)
        info = read_info(output)
        say(
            f"{info['images']:,} images and {info['texts']:,} texts, {info['dim']} values each ({info['dtype']}), in {output}"
        )
        for note in provenance.image_size_notes(settings["settings"]):
            say(f"note: {note}")
    processes.wait()
    if first and left_out:
        tell_left_out([fault["problem"] for fault in left_out.values()], Path(output) / FAULTS, on_error, say)


@contextmanager
def read_for_good() -> Iterator[None]:
    """Ids and texts of a source stay for as long as it is encoded: to look through two million for circles took a tenth of the time."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def tell_left_out(problems: Sequence[str], listed: Path | None, on_error: str, say: Callable[[str], None]) -> None:
    """Say which pictures were left out.

    Raises:
        UserError: with ``report``, so that a script notices.
    """
    where = f" (all of them in {listed})" if listed else ""
    message = f"{len(problems):,} pictures cannot be used and are left out{where}; the first: {'; '.join(problems[:3])}"
    if on_error == "report":
        raise UserError(f"{message}. The rest is complete; --on-error skip takes this for success")
    say(message)


def _images(
    opened: Opened, source: Source, blocks: Sequence[Block], faults: dict[int, dict[str, Any]] | None, meter: Meter
) -> Iterator[torch.Tensor]:
    rows = [row for block in blocks for row in range(block.start, block.stop)]

    def note(place: int, fault: DataFault) -> None:
        if faults is not None:
            faults[rows[place]] = fault.as_dict()

    ids = [source.split.image_ids[row] for row in rows]
    return iterate_images(
        opened.model,
        ids,
        source.read,
        batch_size=opened.batch_size,
        workers=opened.workers,
        meter=meter,
        on_fault=None if faults is None else note,
    )


def _official_files(folder: Path, name: str) -> None:
    """``<name>_imgs.img_feat.jsonl`` and ``<name>_texts.txt_feat.jsonl``: the names the official scripts give."""
    from cnclip_ft.features.folder import read_set

    for kind, file in (("image", f"{name}_imgs.img_feat.jsonl"), ("text", f"{name}_texts.txt_feat.jsonl")):
        if (folder / f"{kind}_features.npy").is_file():
            items = read_set(folder, kind)
            write_features(folder / file, IdFeatures(kind, items.ids, items.features))
