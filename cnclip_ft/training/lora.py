"""Low-rank updates (LoRA, arXiv 2106.09685) through peft: put in when a stage begins, merged wherever weights leave it.

Only the linear layers of the parts whose rule says ``lora`` get one; what else the rule covers stays frozen. Checkpoints
and the judged model hold merged weights, so nothing downstream has to know about adapters.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from cnclip_ft.models.dual_encoder import DualEncoder
from cnclip_ft.recipe_stage import Lora
from cnclip_ft.training.optimizer import Entry
from data_tools.errors import RequestError

_ADAPTER = "default"


def check_lora(model: DualEncoder, entries: list[Entry]) -> None:
    """Refuse before anything is trained what `add_lora` could not do.

    Raises:
        RequestError: peft is missing, or a tower's rules with lora cover no linear layer.
    """
    if not any(entry.lora for entry in entries):
        return
    try:
        import peft  # noqa: F401
    except ImportError:
        raise RequestError(
            "lora needs peft: pip install 'cnclip-ft[lora]', or stages.STAGE.train.N.lora=null"
        ) from None
    for tower in ("image", "text"):
        if any(e.lora and e.tower == tower for e in entries) and not _targets(model, entries, tower):
            raise RequestError(
                f"the rules with lora cover no linear layer of the {tower} tower; lora has nothing to act on there. "
                "Give stages.STAGE.train.N.lora=null, or another stages.STAGE.train.N.part=PART."
            )


def trained_size(entry: Entry) -> int:
    """Parameters of the entry that train: all of it, its low-rank update's, or none."""
    if entry.lora is None:
        return entry.parameter.numel() if entry.rate else 0
    return entry.lora.rank * sum(entry.parameter.shape) if entry.linear else 0


def add_lora(model: DualEncoder, entries: list[Entry]) -> list[Entry]:
    """Put adapters beside the linear layers of `entries` and return those of what trains now.

    The adapters start as no change at all (their second matrix is zero).
    """
    if not any(entry.lora for entry in entries):
        return entries
    from peft import LoraConfig, inject_adapter_in_model

    added: list[Entry] = []
    for tower_name, tower in (("image", model.image_tower), ("text", model.text_tower)):
        targets = _targets(model, entries, tower_name)
        if not targets:
            continue
        config = LoraConfig(
            target_modules=list(targets),
            lora_dropout=max(lora.dropout for _, lora in targets.values()),
            rank_pattern={name: lora.rank for name, (_, lora) in targets.items()},
            alpha_pattern={name: lora.alpha for name, (_, lora) in targets.items()},
        )
        inject_adapter_in_model(config, tower, adapter_name=_ADAPTER)
        for name, (entry, _) in targets.items():
            for parameter_name, parameter in tower.get_submodule(name).named_parameters():
                if "lora_" in parameter_name:
                    full = f"{tower_name}_tower.{name}.{parameter_name}"
                    added.append(
                        Entry(full, parameter, tower_name, entry.rate, decays=True, projection=entry.projection)
                    )
    frozen = [replace(entry, rate=0.0, lora=None) if entry.lora else entry for entry in entries]
    return [*frozen, *added]


def remove_lora(model: DualEncoder) -> None:
    """Take the adapters out; the layers are those from before."""
    for parent, name, layer in list(_layers(model)):
        setattr(parent, name, layer.base_layer)


@contextmanager
@torch.no_grad()
def merged(model: DualEncoder) -> Iterator[None]:
    """Inside this context the model has plain layers that hold base weight + update.

    The base weights are put back from a copy: taking the update off again would not give the same bits.
    """
    swapped, kept = [], []
    for parent, name, layer in list(_layers(model)):
        base = layer.base_layer
        kept.append((base.weight, base.weight.detach().clone()))
        base.weight += layer.get_delta_weight(_ADAPTER).to(base.weight.dtype)
        swapped.append((parent, name, layer))
        setattr(parent, name, base)
    try:
        yield
    finally:
        for parent, name, layer in swapped:
            setattr(parent, name, layer)
        with torch.no_grad():
            for weight, before in kept:
                weight.copy_(before)


def _layers(model: DualEncoder) -> Iterator[tuple[nn.Module, str, Any]]:
    """(parent, name, layer) of every layer with an adapter."""
    for parent in model.modules():
        for name, child in parent.named_children():
            if hasattr(child, "base_layer") and hasattr(child, "lora_A"):
                yield parent, name, child


def _targets(model: DualEncoder, entries: list[Entry], tower: str) -> dict[str, tuple[Entry, Lora]]:
    """Names of the linear layers, within the tower, that rules with lora cover."""
    wanted = {e.name: e for e in entries if e.lora and e.tower == tower}
    found = {}
    for name, module in getattr(model, f"{tower}_tower").named_modules():
        entry = wanted.get(f"{tower}_tower.{name}.weight")
        if entry is not None and entry.lora is not None and isinstance(module, nn.Linear):
            found[name] = entry, entry.lora
    return found
