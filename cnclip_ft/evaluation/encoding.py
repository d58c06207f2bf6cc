"""`cnclip-ft encode`: features of a store, an image folder or a text file into files; continues where it stopped."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cnclip_ft.evaluation import provenance
from cnclip_ft.evaluation.scorecard import Options, open_model
from cnclip_ft.features.encode import Meter, encode_texts, evaluating, iterate_images
from cnclip_ft.features.folder import FAULTS, FeatureWriter, fill_parts, read_info
from cnclip_ft.features.official_files import IdFeatures, write_features
from cnclip_ft.features.sources import open_source
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

            self.state = PartialState(cpu=device == "cpu")
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
    on_error: str = "report",
    say: Callable[[str], None] = print,
) -> None:
    """Write unit features with their ids to `output` (layout: `features.folder`).

    Every process started by a launcher takes its share of the parts; the first one joins them.

    Args:
        file_format: ``npy``, or ``jsonl`` for the official feature files beside it.
        half: store float16.
        on_error: a picture that cannot be used is left out and listed in ``faults.jsonl``; ``report`` ends with an
            error once the rest is done, ``skip`` does not; ``fail`` stops at the first.

    Raises:
        RequestError: something in the request cannot be used, or `output` holds something else.
        DataFault: an image (with ``fail``) or a line is broken; the parts already written stay.
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
    options.device = processes.device
    model, device, dtype = open_model(checkpoint, options)
    settings = {
        "checkpoint": provenance.describe_checkpoint(model, checkpoint),
        "settings": provenance.describe_settings(model, dtype, device),
        "source": {"name": source.name, "path": str(source.path), "kind": source.kind, "checksum": source.checksum},
    }
    first = processes.index == 0
    writer = FeatureWriter(output, source.split, settings, half=half, overwrite=overwrite, main=first)
    processes.wait()  # until the first has prepared the folder
    workers = provenance.default_workers(device) if options.workers is None else options.workers
    meters = {}
    with evaluating(model, dtype=dtype):
        for kind in ("image", "text"):
            parts = writer.missing(kind, processes.index, processes.count)
            meters[kind] = Meter(sum(p.stop - p.start for p in parts), f"{kind}s", wanted=first)
            if kind == "image":
                ids, read = source.split.image_ids, source.read
                faults: dict[int, DataFault] | None = None if on_error == "fail" else {}
                take: Callable[[Sequence[int]], Iterator[torch.Tensor]] = partial(
                    _images,
                    model,
                    ids,
                    read,
                    faults,
                    batch_size=options.batch_size,
                    workers=workers,
                    meter=meters[kind],
                )
                fill_parts(writer, parts, take, faults)
            else:
                for part in parts:
                    texts = source.split.texts[part.start : part.stop]
                    writer.write(
                        part, encode_texts(model, texts, batch_size=2 * options.batch_size, meter=meters[kind])
                    )
            meters[kind].close()
    processes.wait()
    if first:
        speed = {f"{kind}s": {"count": m.count, "seconds": m.seconds, "first_batch_seconds": m.first_seconds,
                              "per_second_after_it": m.rate} for kind, m in meters.items() if m.count}  # fmt: skip
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
    processes.wait()
    if first and left_out:
        tell_left_out([fault["problem"] for fault in left_out.values()], Path(output) / FAULTS, on_error, say)


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
    model: Any,
    ids: Sequence[Any],
    read: Any,
    faults: dict[int, DataFault] | None,
    wanted: Sequence[int],
    **options: Any,
) -> Iterator[torch.Tensor]:
    def note(place: int, fault: DataFault) -> None:
        faults[wanted[place]] = fault

    told = None if faults is None else note
    return iterate_images(model, [ids[index] for index in wanted], read, on_fault=told, **options)


def _official_files(folder: Path, name: str) -> None:
    """``<name>_imgs.img_feat.jsonl`` and ``<name>_texts.txt_feat.jsonl``: the names the official scripts give."""
    from cnclip_ft.features.folder import read_set

    for kind, file in (("image", f"{name}_imgs.img_feat.jsonl"), ("text", f"{name}_texts.txt_feat.jsonl")):
        if (folder / f"{kind}_features.npy").is_file():
            items = read_set(folder, kind)
            write_features(folder / file, IdFeatures(kind, items.ids, items.features))
