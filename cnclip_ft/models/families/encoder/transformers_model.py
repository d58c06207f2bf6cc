"""What models of transformers of any type have in common: a configuration in a description, weights without memory, blocks."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import nullcontext
from types import MethodType
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AttentionInterface, AutoConfig, AutoModel, PretrainedConfig, masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask

from data_tools.errors import RequestError

_BOUNDS = {
    "hidden_size": 1 << 16,
    "num_hidden_layers": 1000,
    "num_attention_heads": 1 << 14,
    "intermediate_size": 1 << 18,
    "vocab_size": 10_000_000,
    "max_position_embeddings": 10_000_000,
    "image_size": 1 << 13,
    "patch_size": 1 << 13,
}
# Which kernels compute: this machine's matter. Named as owner/name, transformers fetches and imports them: code of a stranger.
_KERNELS = ("attn_implementation", "experts_implementation")
# Of a configuration: where it came from, and what is the file's, not the model's.
_NOT_KEPT = ("use_cache", "_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version")


def configuration(
    model_type: str, numbers: dict[str, Any], known: Collection[str], what: str, noun: str
) -> PretrainedConfig:
    """transformers' configuration of these numbers.

    Args:
        known: types that are taken.
        what: they are, with examples, for the message.
        noun: for what is configured.

    Raises:
        ValueError: another type, or the numbers are not of it.
    """
    if model_type not in known:
        raise ValueError(f"a {noun} of type {model_type[:60]!r}; {what}")
    numbers = {key: value for key, value in numbers.items() if not key.lstrip("_").startswith(_KERNELS)}
    try:
        config = AutoConfig.for_model(model_type, **numbers)
        sizes = {key: getattr(config, key, None) for key in _BOUNDS}
    except Exception as error:  # noqa: BLE001 - every configuration checks its numbers in its own way
        raise ValueError(f"no configuration of type {model_type}: {str(error).splitlines()[0][:200]}") from None
    for key, value in sizes.items():
        many = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
        if not all(type(number) is int and 0 < number <= _BOUNDS[key] for number in many):
            raise ValueError(f"{key} is {repr(value)[:40]}, expected a whole number up to {_BOUNDS[key]:,}")
    return config


def of_section(section: dict[str, Any]) -> dict[str, Any]:
    """The numbers of a section of ``config.json``, without what is said beside them."""
    return {k: v for k, v in section.items() if k not in ("model_type", "architectures", "transformers_version")}


def described(config: PretrainedConfig) -> dict[str, Any]:
    """For a description: what `configuration` makes it of again."""
    return {key: value for key, value in config.to_dict().items() if key not in (*_NOT_KEPT, "model_type")}


def laid_out(config: PretrainedConfig) -> Any:
    """`AutoModel` of a configuration, its weights without memory.

    Raises:
        RequestError: there is no such model.
    """
    # Whatever device is the default; buffers are numbers that stand in no file.
    try:
        with torch.device("cpu"), init_empty_weights(include_buffers=False):
            return AutoModel.from_config(config, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001 - every class stumbles over wrong numbers in its own way
        raise RequestError(
            f"transformers makes no {config.model_type} of these numbers ({type(error).__name__}: {str(error)[:160]}). Use the "
            "config.json that came with the weights"
        ) from None


def _always(mask: Callable[..., torch.Tensor | None]) -> Callable[..., torch.Tensor | None]:
    """A mask function of transformers that makes a mask in every case.

    By itself the library reads whether a text is padded, to leave the mask out where none is: the CPU would wait for the card
    in every step, and torch's meta device, on which products are counted, has nothing to read.
    """

    def always(*args: Any, **kwargs: Any) -> torch.Tensor | None:
        return mask(*args, **kwargs | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})

    return always


UNREAD, _UNREAD_OWN = "sdpa_always_masked", "own_always_masked"
AttentionInterface.register(UNREAD, sdpa_attention_forward)
AttentionMaskInterface.register(UNREAD, _always(sdpa_mask))
AttentionMaskInterface.register(_UNREAD_OWN, _always(eager_mask))


def _or_masks(*functions: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """In place of the function of that name in transformers (masking_utils): what is allowed by any of `functions`, of batch, head, query and
    key. A single value, which Gemma's encoder makes on the CPU, is taken as a number there: moved to a card it would be waited for."""

    def any_of(*at: torch.Tensor) -> torch.Tensor:
        allowed = at[2].new_zeros((), dtype=torch.bool)
        for function in functions:
            mask = function(*at)
            allowed = allowed | (mask.to(allowed.device) if mask.ndim else mask)
        return allowed

    return any_of


masking_utils.or_masks = _or_masks


def leave_mask_unread(model: Any) -> None:
    """From here on no value of a mask decides what a text model of transformers does (but for some with recurrent layers)."""
    if not model._can_set_attn_implementation():  # attention of its own: the name chooses the mask alone
        if model.config._attn_implementation == "eager":
            model.config._attn_implementation_internal = _UNREAD_OWN
    elif model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(UNREAD)


def _bias_on_the_device(encoder: Any, x: torch.Tensor, *more: Any, **named: Any) -> torch.Tensor:
    """MPNet's own `compute_position_bias`, whose distances transformers before 5.18 makes on the CPU: a card would be waited for."""
    whole = type(encoder).compute_position_bias
    with nullcontext() if torch.compiler.is_compiling() else x.device:  # a graph has them as constants
        return whole(encoder, x, *more, **named)


def leave_places_there(model: Any) -> None:
    """From here on a text model of transformers counts its tokens where they are."""
    encoder: Any = getattr(model, "encoder", None)
    if hasattr(type(encoder), "compute_position_bias"):
        encoder.compute_position_bias = MethodType(_bias_on_the_device, encoder)  # a copy of the model has its own


def stem_and_layers(model: nn.Module, count: int) -> list[nn.Module]:
    """What stands before the layers, then `count` layers; what follows them goes with the last one.

    A model without such a list (ALBERT's layers are one) is one block.
    """
    name = next((n for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count), None)
    if name is None:
        return [model]
    before: list[nn.Parameter] = []
    after: list[nn.Parameter] = []
    found, owner = before, model
    for step in name.split("."):
        found = before
        before += owner.parameters(recurse=False)
        for child_name, child in owner.named_children():
            if child_name == step:
                found = after
            else:
                found += child.parameters()
        owner = getattr(owner, step)
    layers = list(owner.children())
    last = nn.ModuleList([layers[-1], nn.ParameterList(after)]) if after else layers[-1]
    return [nn.ParameterList(before), *layers[:-1], last]
