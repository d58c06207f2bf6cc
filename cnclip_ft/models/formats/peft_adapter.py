"""A folder that PEFT wrote: low-rank updates (arXiv 2106.09685) of a checkpoint that is named, merged into its weights."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import torch

from cnclip_ft.models.formats.files import Tensors, read_file, read_json
from data_tools.errors import RequestError
from data_tools.words import Said

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<half>[AB])\.weight")
# Settings under which the product of the two halves is not what is added, or is not all of it.
_OTHERS = (
    "use_dora",
    "fan_in_fan_out",
    "lora_bias",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "megatron_config",
)


def is_adapter(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def base_of(folder: Path, above: frozenset[Path] = frozenset()) -> Path:
    """The checkpoint the adapter was trained on: a path, seen from the working folder or from the adapter's.

    Args:
        above: adapters that lead here.

    Raises:
        RequestError: it is no LoRA, its base is not here, or bases lead in a circle.
    """
    config = read_json(folder / CONFIG)
    other = [key for key in _OTHERS if config.get(key)]
    if str(config.get("peft_type")).upper() != "LORA" or other or config.get("bias", "none") != "none":
        kind = ", ".join(other) or f"{config.get('peft_type')}, bias {config.get('bias')}"
        raise RequestError(
            f"{folder / CONFIG}: {kind} is not read here; plain LoRA is. Merge it with peft (merge_and_unload) and name the result"
        )
    base = str(config.get("base_model_name_or_path") or "")
    for place in (Path(base), folder / base):
        if base and place.exists():
            known = above | {folder.resolve()}
            if place.resolve() in known:
                raise RequestError(
                    f"{folder / CONFIG}: base_model_name_or_path is {base!r}, low-rank updates that lead back to themselves. "
                    "Write the path of the model they were trained on"
                )
            if is_adapter(place):
                base_of(place, known)
            return place
    raise RequestError(
        f"{folder / CONFIG}: base_model_name_or_path is {base!r}, which is not here. Put the base model there, or write its path"
    )


def merge(folder: Path, tensors: Tensors, dtype: torch.dtype) -> str:
    """Add the updates to `tensors`, the weights of the base by their file names; returns what was done, in words.

    Raises:
        RequestError: the adapter is another model's.
    """
    config, halves = read_json(folder / CONFIG), read_file(folder / WEIGHTS).tensors
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if (
        not isinstance(rank, int)
        or rank is True
        or rank < 1
        or not isinstance(alpha, (int, float))
        or not math.isfinite(alpha)
    ):
        raise RequestError(
            f"{folder / CONFIG}: r is {rank!r} and lora_alpha {alpha!r}; both are numbers, r a whole one from 1"
        )
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    pairs: dict[str, dict[str, Any]] = {}
    for name, tensor in halves.items():
        found = _NAME.fullmatch(name)
        if found is None or f"{found['module']}.weight" not in tensors:
            raise RequestError(f"{folder / WEIGHTS}: {name} updates nothing of the base model; is it another model's?")
        pairs.setdefault(f"{found['module']}.weight", {})[found["half"]] = tensor
    for name, pair in pairs.items():
        weight = tensors[name]
        if pair.keys() != {"A", "B"} or (pair["B"].shape[0], pair["A"].shape[1]) != tuple(weight.shape):
            raise RequestError(f"{folder / WEIGHTS}: the update of {name} does not fit its shape {list(weight.shape)}")
        tensors[name] = (weight.float() + scale * (pair["B"].float() @ pair["A"].float())).to(dtype)
    return Said(
        "low-rank updates of {count} layers from {folder} merged (rank {rank}, alpha {alpha:g})",
        "已合并 {folder} 中 {count} 层的低秩更新（rank {rank}，alpha {alpha:g}）",
        count=len(pairs),
        folder=folder,
        rank=rank,
        alpha=alpha,
    )
