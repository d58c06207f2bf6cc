"""Where a stage's weights, gradients and optimizer live: whole on every device, or spread over all of them (FSDP2).

Spreading is asked for by accelerate's configuration (``fsdp_version: 2``, docs/training.md) and done by torch's
``fully_shard``: a layer's weights are gathered for its forward and its backward and let go again; gradients are reduced
to the owners' shares. The model of the run stays whole, on the CPU between two validations, and is what is judged,
saved and handed from stage to stage.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from cnclip_ft.collectives import mean_gradients, sum_over_ranks
from cnclip_ft.models.dual_encoder import DualEncoder
from data_tools.errors import RequestError
from data_tools.words import Said


class Whole:
    """Every device holds everything: the model of the run is the one that trains."""

    name: str = Said("whole on every device", "每个设备各有一份")

    def place(self, model: DualEncoder) -> DualEncoder:
        """The model that trains."""
        return model

    @contextmanager
    def gathered(self, trained: DualEncoder, model: DualEncoder, weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Inside this context `model` holds the trained weights, with `weights` in place of those it names."""
        before = {name: parameter.detach().clone() for name, parameter in trained.named_parameters() if name in weights}
        with torch.no_grad():
            for name in before:
                trained.get_parameter(name).copy_(weights[name])
        try:
            yield
        finally:
            with torch.no_grad():
                for name, tensor in before.items():
                    trained.get_parameter(name).copy_(tensor)

    def mean_gradients(self, parameters: Iterable[nn.Parameter]) -> AbstractContextManager[None]:
        """After this context gradients are means over the devices; those of a backward in it travel meanwhile."""
        return mean_gradients(parameters)

    def clip(self, parameters: list[nn.Parameter], limit: float) -> torch.Tensor:
        """Scale the gradients down to the norm `limit`; returns the norm they had."""
        return nn.utils.clip_grad_norm_(parameters, limit, foreach=True)

    def sum_of_shares(self, value: torch.Tensor) -> torch.Tensor:
        """What devices found of their shares of the weights, added up; `value` itself where nobody has shares."""
        return value

    def full(self, state: Any) -> Any:
        """`state` with whole tensors in it, on the device that writes."""
        return state

    def share(self, state: Any, like: Any) -> Any:
        """The opposite of `full`: what this device keeps of a whole state, where `like` says how."""
        return state


class Sharded(Whole):
    """Every device holds its share.

    Args:
        device: of this process.
        reshard: let a layer's weights go between forward and backward; without it they stay (faster, more memory).
    """

    def __init__(self, device: torch.device, reshard: bool) -> None:
        self.device, self.reshard = device, reshard
        self.mesh = dist.device_mesh.init_device_mesh(device.type, (dist.get_world_size(),))
        self.name = Said(
            "spread over {count} devices (FSDP2)", "分到 {count} 个设备（FSDP2）", count=dist.get_world_size()
        )

    def place(self, model: DualEncoder) -> DualEncoder:
        from torch.distributed.fsdp import fully_shard

        trained = copy.deepcopy(model)
        model.to("cpu")
        for parameter in trained.parameters():  # FSDP2 takes no other order in memory
            parameter.data = parameter.data.contiguous()
        for tower in (trained.image_tower, trained.text_tower):
            for block in tower.blocks()[1:-1]:  # stem, projections and what has no layers go with the root
                unit = block[0] if isinstance(block, nn.ModuleList) else block
                fully_shard(unit, mesh=self.mesh, reshard_after_forward=self.reshard)
        # FSDP2 takes no scalars; temperature and bias stay whole, and their gradients are averaged.
        fully_shard(trained, mesh=self.mesh, ignored_params=set(trained.parameters(recurse=False)))
        return trained

    @contextmanager
    @torch.no_grad()
    def gathered(self, trained: DualEncoder, model: DualEncoder, weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
        self._release(trained)
        own = dict(model.named_parameters())
        for name, parameter in trained.named_parameters():
            # One parameter after another, so that only one is whole on the devices at a time.
            own[name].copy_(_whole(weights.get(name, parameter)))
        for mine, theirs in zip(model.buffers(), trained.buffers(), strict=True):
            mine.copy_(theirs)
        model.to(self.device)  # every device judges its share of the data
        try:
            yield
        finally:
            model.to("cpu")

    @contextmanager
    def mean_gradients(self, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
        yield  # the backward reduces shares itself
        with mean_gradients(p for p in parameters if not is_sharded(p)):
            pass

    def clip(self, parameters: list[nn.Parameter], limit: float) -> torch.Tensor:
        sharded = [p for p in parameters if p.grad is not None and is_sharded(p)]
        own = [p for p in parameters if p.grad is not None and not is_sharded(p)]
        parts = [_whole(nn.utils.get_total_norm(_gradients(group))) for group in (sharded, own) if group]
        norm = torch.stack(parts).norm()
        if math.isfinite(limit):
            factor = (limit / (norm + 1e-6)).clamp(max=1.0)
            for group in (sharded, own):
                if group:  # shares and whole tensors do not mix in one call
                    torch._foreach_mul_(_gradients(group), factor)
        return norm

    def sum_of_shares(self, value: torch.Tensor) -> torch.Tensor:
        return sum_over_ranks(value)

    def full(self, state: Any) -> Any:
        if isinstance(state, torch.Tensor):
            whole = _whole(state)  # every device takes part; only the first, which writes, has room for all of it
            return whole.to("cpu") if dist.get_rank() == 0 else None
        if isinstance(state, dict):
            return {key: self.full(value) for key, value in state.items()}
        if isinstance(state, (list, tuple)):
            return type(state)(self.full(value) for value in state)
        return state

    def share(self, state: Any, like: Any) -> Any:
        from torch.distributed.tensor import DTensor, distribute_tensor

        if isinstance(state, dict):
            inner = like.get if isinstance(like, Mapping) else lambda _key: like
            return {key: self.share(value, inner(key)) for key, value in state.items()}
        if isinstance(state, torch.Tensor) and isinstance(like, DTensor) and state.shape == like.shape:
            # Every device read the same file, so nothing has to be sent.
            return distribute_tensor(state.to(self.device), like.device_mesh, like.placements, src_data_rank=None)
        return state

    @staticmethod
    def _release(trained: DualEncoder) -> None:
        """Let gathered weights go: after a forward without backward the root still holds them."""
        from torch.distributed.fsdp import FSDPModule

        for module in trained.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def is_sharded(tensor: torch.Tensor) -> bool:
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def _gradients(parameters: list[nn.Parameter]) -> list[torch.Tensor]:
    return [p.grad for p in parameters if p.grad is not None]


def _whole(tensor: Any) -> torch.Tensor:
    return tensor.detach().full_tensor() if is_sharded(tensor) else tensor.detach()


def sharding_asked() -> bool:
    """Whether accelerate's configuration asks for FSDP. It says so in the environment of what it launches."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def refuse_other_engines() -> None:
    """Refuse, before accelerate acts on it, what its configuration asks for and this training does not do.

    accelerate says it in the environment of what it launches.

    Raises:
        RequestError: naming the setting, and what to set instead.
    """
    asked = {name: value.lower() for name, value in os.environ.items()}
    yes = {name for name, value in asked.items() if value in ("true", "1", "yes")}
    instead = "run_scripts/accelerate_fsdp2.yaml is a configuration that spreads a model over devices"
    refused = [
        ("ACCELERATE_USE_DEEPSPEED" in yes, f"DeepSpeed; {instead}, or choose 'no' there"),
        ("ACCELERATE_USE_MEGATRON_LM" in yes, f"Megatron-LM; {instead}"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG" in yes, f"tensor or context parallelism; {instead}"),
        ("ACCELERATE_USE_XLA" in yes or asked.get("PJRT_DEVICE") == "tpu", "TPUs (XLA); training runs on CPU, CUDA and MPS"),
        (asked.get("ACCELERATE_MIXED_PRECISION") == "fp8", "fp8; set mixed_precision: 'no' there, and give precision=bf16"),
        (asked.get("ACCELERATE_DYNAMO_BACKEND", "no") != "no", "torch.compile; set dynamo_backend: 'no' there, and give compile=true"),
        (asked.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1") not in ("1", ""),
         "gradient accumulation; set gradient_accumulation_steps: 1 there, and give stages.STAGE.micro_batch_size=N (same gradient)"),
        (sharding_asked() and asked.get("FSDP_VERSION", "1") != "2", f"FSDP version 1; set fsdp_version: 2 in it ({instead})"),
        (sharding_asked() and asked.get("FSDP_OFFLOAD_PARAMS", "false") == "true",
         "fsdp_offload_params, which is not supported; set it to false there, and give a smaller stages.STAGE.micro_batch_size=N"),
    ]  # fmt: skip
    for found, what in refused:
        if found:
            raise RequestError(f"accelerate's configuration asks for {what}")


def settle_sharding(device: torch.device) -> Whole:
    """What accelerate's configuration asks for (checked by `refuse_other_engines`)."""
    if not sharding_asked() or not (dist.is_available() and dist.is_initialized()):
        return Whole()
    return Sharded(device, reshard=os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() != "false")


def refuse_with_sharding(sharding: Whole, stage: str, *, precision: str, lora: bool, micro_batch_size: Any) -> None:
    """Refuse before anything is trained what does not go together with shares.

    Raises:
        RequestError: with the way out.
    """
    if not isinstance(sharding, Sharded):
        return
    if precision == "fp16":
        raise RequestError(
            "FSDP2 with fp16: loss scaling over shares is not supported: precision=bf16 or precision=fp32"
        )
    if lora:
        raise RequestError(
            f"stages.{stage}: LoRA trains too little for FSDP2 to pay and is not supported with it: launch without FSDP, or stages.{stage}.train.N.lora=null"
        )
    if micro_batch_size == "auto":
        raise RequestError(
            f"stages.{stage}: micro_batch_size: auto tries sizes until one fails, which FSDP2 does not survive: stages.{stage}.micro_batch_size=N"
        )
