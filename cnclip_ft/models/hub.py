"""Names → files: what lies here is found first; then the hub's own cache; then the hub, with resume and checksum."""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

from cnclip_ft.models.families.chinese_clip.catalog import ARCHITECTURES, available_models
from data_tools.errors import RequestError
from data_tools.regular import sha256

OWNERS = {"huggingface": "OFA-Sys", "modelscope": "AI-ModelScope"}
_MODEL_FILES = [
    "*.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "*.safetensors",
    "pytorch_model*.bin",
    "open_clip_pytorch_model.bin",
]
_REPOSITORY = re.compile(r"(\w[\w.-]*)/[\w.-]+$")
_FILE_ENDINGS = (".pt", ".pth", ".bin", ".safetensors", ".json", ".yaml")


def places() -> list[Path]:
    """Folders searched for a published file: ``$CNCLIP_FT_MODELS``, here, our cache, the official package's."""
    found = [Path(os.environ["CNCLIP_FT_MODELS"])] if os.environ.get("CNCLIP_FT_MODELS") else []
    found += [Path("."), Path("~/.cache/cnclip_ft"), Path("~/.cache/clip")]
    return [place.expanduser().absolute() for place in found]


def find(name: str | Path, source: str = "huggingface", *, folder: str | Path | None = None) -> Path:
    """A path as it is, the file of a published name, or the folder of a repository.

    Args:
        name: a path, a name of the catalogue, or ``owner/name`` on the hub.
        source: ``huggingface`` or ``modelscope``.
        folder: where the file of a published name is looked for first and downloaded to; None is the hub's own cache.

    Raises:
        RequestError: naming the file, the places searched and where to get it.
    """
    path = Path(os.path.expanduser(name))  # these say no of a name too long, or of nobody's home; pathlib raises
    if os.path.exists(path):
        return path
    replaced = path.with_name(f"{path.name}.old")
    if os.path.isfile(replaced / "cnclip_ft.json"):  # a writer was killed between its two renames
        return replaced
    if source not in OWNERS:
        raise RequestError(f"source is {source!r}; known are {' and '.join(OWNERS)}")
    architecture = ARCHITECTURES.get(str(name))
    if architecture is None and _is_repository(str(name)):
        return _repository(str(name), source)
    if architecture is None or architecture.hub is None or architecture.file is None:
        published = ", ".join(available_models())
        made = (
            f". Its size is known, but no weights are published: {{architecture: {name}}} makes it new"
            if architecture
            else ""
        )
        raise RequestError(
            f"{str(name)[:200]}: no such file or folder, and no published name ({published}){made}{_of_its_run(path)}"
        )
    root = None if folder is None else Path(folder).expanduser().absolute()
    searched = [*([root] if root else []), *places()]
    for place in searched:
        for found in (place / architecture.file, place / architecture.hub):
            if found.exists():
                return found
    repository = f"{OWNERS[source]}/{architecture.hub}"
    try:
        return _download(repository, architecture.file, source, root)
    except Exception as error:  # noqa: BLE001 - the clients raise many kinds; each means: not here
        if isinstance(error, RequestError):
            raise
        raise RequestError(
            f"{name}: {architecture.file} is not here, and could not be fetched from {_site(source)}/{repository} "
            f"({type(error).__name__}). Searched: {', '.join(map(str, searched))}. Get the file there on a machine that is "
            "online and put it into one of these folders, or set CNCLIP_FT_MODELS to its folder, or name its path"
        ) from None


def repositories(start: Any) -> list[str]:
    """Hugging Face's names of what weights began with: a published name or file of Chinese-CLIP, ``owner/name``, towers of these, or a
    checkpoint of ours that says what it began with itself. Nothing for what has no name there."""
    if isinstance(start, dict):
        return list(dict.fromkeys(name for part in ("image", "text") for name in repositories(start.get(part))))
    if not isinstance(start, str):
        return []
    path, last = Path(start).expanduser(), Path(start).name
    here = os.path.exists(path)  # a path wins over a name
    published = (
        a for a in ARCHITECTURES.values() if a.hub and (last in (a.file, a.hub) or (a.name == start and not here))
    )
    architecture = next(published, None)
    if architecture is not None:
        return [f"{OWNERS['huggingface']}/{architecture.hub}"]
    if not here:
        return [start] if _is_repository(start) else []
    try:
        return list(json.loads((path / "cnclip_ft.json").read_text(encoding="utf-8"))["base_models"])
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _of_its_run(path: Path) -> str:
    """What the run of a checkpoint that is not there has instead, e.g. one that was stopped before its last stage."""
    written = ("recipe.yaml", "journal.jsonl")
    run = next((at for at in path.parents if all(os.path.isfile(at / name) for name in written)), None)
    if run is None:
        return ""
    found = sorted(str(file.parent) for file in run.glob("*/*/cnclip_ft.json"))
    go_on = shlex.quote(f"{run}/recipe.yaml")
    return (
        f". The run {run} has {', '.join(found) or 'no checkpoint yet'}; `cnclip-ft train {go_on} --continue` goes on"
    )


def _is_repository(name: str) -> bool:
    """``owner/name``; below a folder that is here, or with the ending of a file, it is a path that is not there."""
    found = _REPOSITORY.match(name)
    return found is not None and not os.path.isdir(found[1]) and not name.endswith(_FILE_ENDINGS)


def _site(source: str) -> str:
    return "modelscope.cn/models" if source == "modelscope" else "huggingface.co"


def _download(repository: str, file: str, source: str, root: Path | None) -> Path:
    to: dict[str, Any] = {} if root is None else {"local_dir": str(root)}
    if source == "modelscope":
        path = Path(_modelscope().model_file_download(repository, file, **to))
        _verify(path, _modelscope_checksum(repository, file))
        return path
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repository, file, local_files_only=True))
    except LocalEntryNotFoundError:
        pass
    # The client goes on where a torn download ended. Large files carry their sha256 as entity tag.
    metadata = get_hf_file_metadata(hf_hub_url(repository, file))
    path = Path(hf_hub_download(repository, file, **to))
    _verify(path, metadata.etag)
    return path


def _modelscope() -> Any:
    try:
        from modelscope.hub import file_download
    except ImportError:
        raise RequestError(
            "source: modelscope needs the package modelscope: pip install 'cnclip-ft[modelscope]'"
        ) from None
    return file_download


def _modelscope_checksum(repository: str, file: str) -> str | None:
    from modelscope.hub.api import HubApi

    try:
        listed = HubApi().get_model_files(repository, recursive=True)
    except Exception:  # noqa: BLE001 - the file is here; the client has compared what it could
        return None
    return next((entry.get("Sha256") for entry in listed if entry.get("Path") == file), None)


def _verify(path: Path, checksum: str | None) -> None:
    if checksum is None or not re.fullmatch(r"[0-9a-f]{64}", checksum):
        return
    found = sha256(path)
    if found != checksum:
        real = path.resolve()
        path.unlink(missing_ok=True)
        real.unlink(missing_ok=True)
        raise RequestError(
            f"{path.name}: the download is damaged (sha256 {found[:12]}…, expected {checksum[:12]}…) and was removed; try again"
        )


def _repository(name: str, source: str) -> Path:
    try:
        if source == "modelscope":
            _modelscope()
            from modelscope import snapshot_download

            return Path(snapshot_download(name, allow_patterns=_MODEL_FILES))
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, allow_patterns=_MODEL_FILES))
    except Exception as error:  # noqa: BLE001 - as above
        if isinstance(error, RequestError):
            raise
        raise RequestError(
            f"{name}: no such file or folder here, and it could not be fetched from {_site(source)}/{name} ({type(error).__name__}). "
            "Get the folder on a machine that is online and name its path"
        ) from None
