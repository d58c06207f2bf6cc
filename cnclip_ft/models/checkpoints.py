"""Our checkpoint: a folder that explains itself; and `load`, which reads every kind (docs/checkpoints.md).

``model.safetensors`` + ``config.json`` + processor and tokenizer files, which transformers reads wherever it has a class for
the two towers, and ``cnclip_ft.json``: what is needed to build the model again, and how it came to be.
"""

from __future__ import annotations

import json
import logging
import re
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from cnclip_ft.models.assembly import (
    Checkpoint,
    assemble,
    describe_model,
    file_names,
    resized,
    with_scalars,
)
from cnclip_ft.models.description import checked_description
from cnclip_ft.models.doubt import warn
from cnclip_ft.models.dual_encoder import DualEncoder
from cnclip_ft.models.families.chinese_clip.catalog import ARCHITECTURES
from cnclip_ft.models.formats import peft_adapter
from cnclip_ft.models.formats.files import FOLDER_FILES, how_to_fetch, read_ahead, read_folder, read_json, save_tensors
from cnclip_ft.models.formats.folders import read_folder_of_others
from cnclip_ft.models.hub import find
from cnclip_ft.models.narrowing import narrow
from cnclip_ft.models.registry import family_of
from cnclip_ft.runtime import parse_device
from data_tools.arguments import typed
from data_tools.atomic import mend_interrupted_swap, sync_file
from data_tools.circles import no_search_for_circles
from data_tools.errors import RequestError, UserError
from data_tools.outputs import FolderKind, folder_with
from data_tools.regular import sha256
from data_tools.scratch import OLD, Scratch, real_place, scratch_folder

FORMAT = 1
INFO = "cnclip_ft.json"
WEIGHTS_SUM = "weights_sha256"  # in INFO
PURPOSE = "saving"  # of the working folder


TOKENIZER_FILES = (
    r"(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json|vocab\.txt|merges\.txt|[a-z_.]+\.model"
)
CHECKPOINT = FolderKind(
    "checkpoint of ours",
    folder_with(INFO, "format", "model"),
    re.compile(rf"model\.safetensors|{re.escape(INFO)}|(processor_|preprocessor_)?config\.json|{TOKENIZER_FILES}"),
)

# ---- writing --------------------------------------------------------------------------------------------------------


def save_checkpoint(model: DualEncoder, folder: str | Path, *, info: dict[str, Any]) -> str:
    """Write the folder whole or not at all; one that is there is replaced at the end.

    Files in it that are not of a checkpoint are kept, in a folder beside.

    Returns:
        sha256 of the weights file, which `cnclip_ft.json` states too.

    Raises:
        RequestError: another process saves here, or something else has the working folder's name.
        UserError: it cannot be written; what was there before is intact.
    """
    scratch = Scratch(real_place(folder), PURPOSE, "saving this checkpoint")
    new = scratch.folder / "new"
    try:
        _settle(scratch)
        new.mkdir()
        save_tensors(file_tensors(model), new / "model.safetensors")
        checksum = sha256(new / "model.safetensors")
        for name, content in family_of(model.text_tower).transformers_files(model).items():
            _write_json(new / name, content)
        model.tokenizer.save(new)
        _write_json(new / INFO, {"format": FORMAT, "model": describe_model(model), **info, WEIGHTS_SUM: checksum})
        for file in new.iterdir():
            sync_file(file)
        scratch.swap_in(new, CHECKPOINT)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{folder}: the checkpoint could not be written ({error}). What was there before is intact; "
            "free some space or choose another output."
        ) from None
    finally:
        scratch.remove()
    return checksum


def mend_checkpoint(folder: Path) -> None:
    """Clear up after a process that died while it saved here, and bring back the checkpoint it was replacing."""
    old = folder.with_name(f"{folder.name}.old")  # by 0.1.0
    if CHECKPOINT.known(old):
        mend_interrupted_swap(folder, old)
    place = real_place(folder)
    if scratch_folder(place, PURPOSE).is_dir():
        scratch = Scratch(place, PURPOSE, "saving this checkpoint")
        try:
            _settle(scratch)
        finally:
            scratch.remove()


def _settle(scratch: Scratch) -> None:
    """What a process that died left: the checkpoint before goes back, or away but for files of others."""
    scratch.mend()
    for before in (scratch.folder / "new", scratch.folder / OLD):
        scratch.put_aside(before, CHECKPOINT)
    scratch.clear()


def file_tensors(model: DualEncoder) -> dict[str, torch.Tensor]:
    """The model's tensors on the CPU by file name; no two share memory (a tower by import path may tie some)."""
    tensors: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    names = file_names(model)
    for name, tensor in model.state_dict().items():
        tensor = tensor.detach().cpu().contiguous()
        place = tensor.untyped_storage().data_ptr()
        tensors[names[name]] = tensor.clone() if place in seen else tensor
        seen.add(place)
    shape = family_of(model.text_tower).scalar_shape
    return tensors | {name: tensors[name].reshape(shape) for name in ("logit_scale", "logit_bias") if name in tensors}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# ---- reading --------------------------------------------------------------------------------------------------------


def read_info(folder: str | Path) -> dict[str, Any]:
    """`cnclip_ft.json` of a checkpoint folder.

    Raises:
        RequestError: not our checkpoint, or of a format this version does not know.
    """
    path = Path(folder) / INFO
    if not path.exists():
        raise RequestError(f"{path}: no such file; this is not a checkpoint of cnclip-ft")
    info = read_json(path)
    if info.get("format") != FORMAT:
        raise RequestError(
            f"{path}: format {repr(info.get('format'))[:60]} is not known here (known: {FORMAT}); use a newer cnclip-ft"
        )
    return info


def read_checkpoint(path: Path, dtype: torch.dtype = torch.float32) -> Checkpoint:
    """Whatever kind of whole model stands there, read (as `dtype`) and renamed, not yet a model.

    Raises:
        RequestError: nothing readable, or no model of two towers that is known.
    """
    if path.name in FOLDER_FILES and (path.parent / "config.json").is_file():
        path = path.parent  # the configuration beside a file knows more than its tensors
    return _read_folder(path, dtype) if path.is_dir() else _read_file(path, dtype)


# Modules that bring the towers of transformers are imported once the weights are on their way (`files.read_ahead`).
def _read_file(path: Path, dtype: torch.dtype) -> Checkpoint:
    from cnclip_ft.models.formats.chinese_clip_file import read_file

    return read_file(path, dtype)


def _read_folder(folder: Path, dtype: torch.dtype) -> Checkpoint:
    if (folder / INFO).exists():
        described = read_info(folder).get("model")
        with read_ahead(folder, dtype):
            description = checked_description(described, str(folder / INFO))
            return Checkpoint(str(folder), description, read_folder(folder, dtype).tensors, folder)
    if peft_adapter.is_adapter(folder):
        checkpoint = read_checkpoint(peft_adapter.base_of(folder), dtype)
        checkpoint.notes = [*checkpoint.notes, peft_adapter.merge(folder, checkpoint.tensors, dtype)]
        return checkpoint
    found = read_folder_of_others(folder, dtype)
    if found is not None:
        return found
    inside = sorted(p for p in folder.glob("*.pt") if p.name in {a.file for a in ARCHITECTURES.values()})
    if len(inside) == 1:
        return _read_file(inside[0], dtype)
    run = [str(info.parent) for info in sorted(folder.glob(f"*/*/{INFO}"))]
    if run:
        raise RequestError(f"{folder}: the folder of a run; name one of its checkpoints: {', '.join(run)}")
    raise RequestError(
        f"{folder}: not a checkpoint (neither {INFO} nor config.json in it). Name one that training wrote (RUN/STAGE/best), a "
        f"published name (ViT-B-16), or a folder of the hub. {how_to_fetch(folder)}"
    )


@typed
@no_search_for_circles()  # the family's modules are imported here
def load(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    image_size: int | None = None,
    source: str = "huggingface",
    trust_import: bool = False,
    download_root: str | Path | None = None,
    dimensions: int | None = None,
) -> DualEncoder:
    """A model from a checkpoint of any kind, in evaluation mode on `device`.

    Args:
        path: a folder or file of any kind that is read (docs/checkpoints.md), a published name, or ``owner/name`` on the hub.
            The kind is recognised from the content, the size from configuration or tensors.
        device: as torch names it; ``auto`` is the best that is there.
        dtype: of the weights; None is float32, whatever the file has.
        image_size: another resolution; position embeddings are resized once, and that is logged.
        source: where a published name is downloaded from: ``huggingface`` or ``modelscope``.
        trust_import: import the code a checkpoint of ours names for its image tower (docs/towers.md). Without it such a
            checkpoint is refused: importing runs whatever has that name.
        download_root: folder where a published name is looked for first and downloaded to; None is the hub's own cache.
        dimensions: keep the first so many numbers of a feature, for a model that was trained so (docs/training.md); None: all.

    Raises:
        RequestError: nothing readable is there, it is no model of a known family, or it names code that is not trusted.

    Example:
        ``cnclip_ft.load("clip_cn_vit-b-16.pt").encode_texts(["一只狗"])``
    """
    where = parse_device(device)
    checkpoint = open_checkpoint(
        path,
        dtype=dtype or torch.float32,
        image_size=image_size,
        source=source,
        trust_import=trust_import,
        download_root=download_root,
    )
    model = assemble(checkpoint)
    if dimensions is not None:
        narrow(model, dimensions)
    for note in checkpoint.all_notes:
        logging.getLogger("cnclip_ft").warning("%s: %s", checkpoint.source, note)
    model.tokenizer.once_read(partial(warn, rows=model.text_tower.vocab_size, source=checkpoint.source))
    return model.to(device=where, dtype=dtype)


def open_checkpoint(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    image_size: int | None,
    source: str,
    trust_import: bool,
    download_root: str | Path | None = None,
) -> Checkpoint:
    """`read_checkpoint` of a path or a published name; a file under a published name must be of that size."""
    checkpoint = read_checkpoint(find(path, source, folder=download_root), dtype)
    checkpoint.trust_import = trust_import
    known, found = ARCHITECTURES.get(str(path)), checkpoint.description["architecture"]
    if known is not None and not Path(path).expanduser().exists() and (found or {}).get("name") != known.name:
        raise RequestError(
            f"{checkpoint.source}: found under the name {known.name}, but its tensors are of {(found or {}).get('name') or 'another size'}"
        )
    if image_size is None:
        return checkpoint
    from cnclip_ft.models.formats.recognise import with_architecture

    before = checkpoint.image_before = checkpoint.description["image"]
    image, notes = resized(before, checkpoint.tensors, image_size)
    checkpoint.description = with_architecture(checkpoint.description | {"image": image})
    checkpoint.image_notes += notes
    return checkpoint


def saved_state(model: DualEncoder, folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint of this very model, under its parameters' names; nothing the folder names is imported.

    Raises:
        RequestError: they cannot be read, or are another model's.
    """
    tensors, own = with_scalars(read_folder(folder).tensors), model.state_dict()
    if model.logit_bias is not None:  # checkpoints of before did not keep it
        tensors.setdefault("logit_bias", own["logit_bias"])
    names = file_names(model)
    if set(names.values()) != tensors.keys():
        raise RequestError(f"{folder}: the tensors are not those of the model that is trained")
    return {name: tensors[own] for name, own in names.items()}


def checkpoint_checksum(path: str | Path) -> str:
    """sha256 of the weights file, hex.

    Raises:
        RequestError: no single file of weights there.
    """
    path = Path(path)
    files = [path] if path.is_file() else [path / name for name in FOLDER_FILES if (path / name).is_file()]
    if not files:
        raise RequestError(f"{path}: no single file of weights there")
    return sha256(files[0])
