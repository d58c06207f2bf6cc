"""The text half of an open_clip folder that is an encoder of transformers (``hf_model_name``).

The encoder's own configuration is not in such a folder. It is looked for under its name: a folder, or what the hub's cache has;
of RoBERTa and XLM-R the tensors tell it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig, RobertaConfig, XLMRobertaConfig

from cnclip_ft.models.assembly import count_layers
from cnclip_ft.models.families.encoder.text import EncoderTower, configuration
from cnclip_ft.models.formats.cn_clip import modern
from cnclip_ft.models.formats.files import Tensors, read_json
from cnclip_ft.models.formats.open_clip import refusal
from cnclip_ft.models.known import refuse_code
from data_tools.errors import RequestError

POOLINGS = {"mean_pooler": "mean", "cls_pooler": "pooler", "cls_last_hidden_state_pooler": "cls"}


def encoder_of(file: Path, cfg: dict[str, Any], tensors: Tensors) -> tuple[dict[str, Any], Tensors]:
    """Text half of a description, and the encoder's tensors under our file names.

    Args:
        file: ``open_clip_config.json``.
        cfg: ``text_cfg``.
        tensors: without ``text.`` before their names.

    Raises:
        RequestError: another pooling or projection, or an encoder that is not known.
    """
    pooler, head = cfg.get("hf_pooler_type", "mean_pooler"), cfg.get("hf_proj_type", "mlp")
    if pooler not in POOLINGS:
        raise refusal(file, "text_cfg.hf_pooler_type", pooler, " or ".join(POOLINGS))
    if head not in ("linear", "mlp"):
        raise refusal(file, "text_cfg.hf_proj_type", head, "'linear' or 'mlp'")
    own = modern(
        {name.removeprefix("transformer."): t for name, t in tensors.items() if name.startswith("transformer.")}
    )
    config = _configuration(file, str(cfg["hf_model_name"]), own)
    with torch.device("meta"):
        tower = EncoderTower(config, 1, POOLINGS[pooler], head=head, origin=str(cfg["hf_model_name"]))
    ours = {f"text_model.{name}": tensor for name, tensor in own.items() if name in tower.text_model.state_dict()}
    projection = {
        f"text_projection{name.removeprefix('proj')}": t for name, t in tensors.items() if name.startswith("proj.")
    }
    return tower.describe(), ours | projection


def _configuration(file: Path, name: str, tensors: Tensors) -> PretrainedConfig:
    beside = Path(name) / "config.json"
    if beside.is_file():
        said = read_json(beside)
        refuse_code(beside.parent)
        try:
            return configuration(str(said.pop("model_type", "")), said)
        except ValueError as error:
            raise RequestError(f"{beside}: {error}") from None
    try:
        cached = AutoConfig.from_pretrained(name, local_files_only=True, trust_remote_code=False)
        return configuration(cached.model_type, cached.to_dict())
    except (OSError, ValueError):
        found = _recognised(name, tensors)
    if found is None:
        raise RequestError(
            f"{file}: the configuration of text_cfg.hf_model_name {name[:80]!r} is not in the folder, and not in the hub's cache. "
            f"Fetch it: hf download {name[:80]} config.json"
        )
    return found


def _recognised(name: str, tensors: Tensors) -> PretrainedConfig | None:
    """RoBERTa and XLM-R of 64 numbers a head, as all that were published."""
    if "roberta" not in name.lower() or "embeddings.word_embeddings.weight" not in tensors:
        return None
    kind = XLMRobertaConfig if "xlm" in name.lower() else RobertaConfig
    rows, width = tensors["embeddings.word_embeddings.weight"].shape
    return kind(
        vocab_size=rows,
        hidden_size=width,
        num_attention_heads=width // 64,
        layer_norm_eps=1e-5,
        pad_token_id=1,
        num_hidden_layers=count_layers(tensors, r"encoder\.layer\.(\d+)\."),
        intermediate_size=tensors["encoder.layer.0.intermediate.dense.weight"].shape[0],
        max_position_embeddings=tensors["embeddings.position_embeddings.weight"].shape[0],
        type_vocab_size=tensors["embeddings.token_type_embeddings.weight"].shape[0],
        bos_token_id=0,
        eos_token_id=2,
    )
