"""What a pair takes in arithmetic, and what a card can do of it: a rate to expect, and the share that was reached."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cnclip_ft.models.dual_encoder import DualEncoder
from cnclip_ft.training.compiling import uncompiled
from cnclip_ft.training.context import Context
from cnclip_ft.training.memory import blank_pictures, heads_at_hand, tokens_per_text
from cnclip_ft.training.stage_plan import StagePlan
from data_tools.words import Said

# Dense matrix products with 16-bit inputs and 32-bit sums, TFLOP/s, from NVIDIA's data sheets and architecture papers of the
# cards (those that name a rate with sparsity alone: half of it). bf16, but fp16 for what is older than Ampere.
# By what `torch.cuda.get_device_name` says; the first that stands in it as words of its own.
LISTED = (
    ("B200", 2250.0), ("H200 NVL", 835.5), ("GH200", 989.4), ("H200", 989.4), ("H100 NVL", 835.5), ("H100 PCIe", 756.0), ("H100", 989.4),
    ("H800", 989.4), ("H20", 148.0), ("A100", 312.0), ("A800", 312.0), ("A30", 165.0), ("A40", 149.7), ("A10G", 70.0),
    ("A10", 125.0), ("L40S", 362.1), ("L40", 181.1), ("L4", 121.0), ("RTX 6000 Ada", 364.2), ("RTX A6000", 154.8),
    ("RTX 4090", 165.2), ("RTX 4080", 97.5), ("RTX 3090", 71.2), ("V100", 125.0), ("T4", 65.1),
)  # fmt: skip
_OTHERS = re.compile(r"\b(MIG|Laptop|Max-Q|Ti|SUPER|D)\b")  # parts of a card, and cards of nearly the same name
# Share of the measured rate to plan with: of what is published for towers of these sizes, 40 to 55 % is good (on Hopper); a loader
# that is too slow or small batches bring less. The journal says what it is.
EXPECTED_SHARE = 0.4


@dataclass(frozen=True)
class Card:
    """16-bit products of a device, FLOP/s; `listed` None where its name is not known here."""

    name: str
    measured: float
    listed: float | None

    @property
    def peak(self) -> float:
        """What shares are of: the listed rate, else the measured one."""
        return self.listed or self.measured

    def __str__(self) -> str:
        return self.in_words

    @property
    def in_words(self) -> Said:
        """For the plan."""
        listed = Said(", listed with {rate:,.0f}", "，标称 {rate:,.0f}", rate=self.listed / 1e12) if self.listed else ""
        return Said(
            "{name}: 16-bit products measured at {rate:,.0f} TFLOP/s{listed}",
            "{name}：16 位乘法实测 {rate:,.0f} TFLOP/s{listed}",
            name=self.name,
            rate=self.measured / 1e12,
            listed=listed,
        )


@lru_cache
def card(device: torch.device, precision: str) -> Card | None:
    """The card, measured once; None where there is none, or where the towers compute in 32 bits."""
    if device.type != "cuda" or precision == "fp32":
        return None
    name = torch.cuda.get_device_name(device)
    return Card(name, product_rate(device, torch.float16 if precision == "fp16" else torch.bfloat16), listed(name))


def listed(name: str) -> float | None:
    """FLOP/s of a card by its name; None where it is another than those listed."""
    if _OTHERS.search(name):
        return None
    return next((rate * 1e12 for part, rate in LISTED if re.search(rf"\b{part}\b", name)), None)


def product_rate(device: torch.device, dtype: torch.dtype, side: int = 8192, repeats: int = 10) -> float:
    """FLOP/s of products of two random ``[side, side]``, a tenth of a second on a card."""
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for _ in range(3):
        a @ b
    wait()
    began = time.perf_counter()
    for _ in range(repeats):
        a @ b
    wait()
    return 2 * side**3 * repeats / (time.perf_counter() - began)


def flops_per_pair(plan: StagePlan, model: DualEncoder, tokens: int) -> float | None:
    """Matrix products of a pair's forward and backward as the stage trains, two FLOP for a multiplication with its addition.

    Counted on torch's meta device; towers that ask for numbers there (some with recurrent layers or experts, some of a user's own)
    are walked once where they are. Recomputed activations do not count, nor does padding: `tokens` are those of a text.

    Returns:
        None where the towers can be walked in neither way, or features of both are kept.
    """
    trained = {e.name for e in plan.entries if e.rate and (e.lora is None or e.parameter.ndim < 2)}
    inputs = {}
    # Of an image tower whose features are kept the projection is left, which is next to nothing.
    if not plan.cached and plan.teaching is None:
        inputs["pixels" if plan.grounding is None else "region_pixels"] = blank_pictures(plan, model, 2)
    if not plan.texts_kept:
        inputs["input_ids"], inputs["attention_mask"] = model.text_tower.example(2 * plan.texts_per_pair, tokens)
    for place in ("meta", model.device):
        try:
            return counted(model, trained, {name: tensor.to(place) for name, tensor in inputs.items()}) / 2
        except Exception:  # noqa: BLE001 - towers stumble in their own ways where there are no numbers
            continue
    return None


def counted(model: nn.Module, trained: set[str], inputs: Mapping[str, torch.Tensor]) -> float:
    """FLOP of one forward, and of a backward from all float outputs to the parameters `trained`.

    Nothing of the model or of torch's generators is changed.

    Args:
        inputs: all on the meta device, or all on the model's.
    """
    meta = all(tensor.is_meta for tensor in inputs.values())

    def stand_in(tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(tensor, device="meta") if meta else tensor.detach().clone()

    weights = {name: stand_in(tensor) for name, tensor in model.named_buffers()}
    parameters = {name: stand_in(p) if meta else p.detach() for name, p in model.named_parameters()}
    roots = [weight.requires_grad_() for name, weight in parameters.items() if name in trained]
    # Fused attention is not counted everywhere; as products it is. Compiled towers would be compiled for this.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), uncompiled(), torch.random.fork_rng():
        out = torch.func.functional_call(model, weights | parameters, (), dict(inputs), tie_weights=False)
        parts = [p for p in (out if isinstance(out, tuple) else out.values()) if isinstance(p, torch.Tensor)]
        torch.autograd.grad([p.sum() for p in parts if p.requires_grad], roots, allow_unused=True)
    return float(counter.get_total_flops())


@dataclass(frozen=True)
class Throughput:
    """A stage's arithmetic on the run's devices: `flops` a pair, padding and what is computed twice left out."""

    card: Card
    flops: float
    world: int

    @staticmethod
    def of(context: Context, plan: StagePlan, model: DualEncoder) -> Throughput | None:
        """None without a card, for 32 bits, or where the towers' products cannot be counted."""
        known = card(context.device, context.precision)
        if known is None:
            return None
        with heads_at_hand(plan, model):
            flops = flops_per_pair(plan, model, tokens_per_text(context))
        return None if flops is None else Throughput(known, flops, context.world)

    def share(self, pairs_per_second: float) -> float:
        """Of the cards' peak (MFU): the listed rate, else the measured one."""
        return pairs_per_second * self.flops / (self.card.peak * self.world)

    def foretold(self, pairs: int) -> str:
        """What is to be expected of so many pairs, in words."""
        rate = EXPECTED_SHARE * self.card.measured * self.world / self.flops
        return Said(
            "{flops:,.1f} GFLOP a pair; about {rate:,.0f} pairs/s where {expected:.0f}% of the measured products are reached "
            "({share:.0f}% of the peak), {hours:,.1f} hours of steps",
            "每对 {flops:,.1f} GFLOP；达到实测乘法的 {expected:.0f}% 时约每秒 {rate:,.0f} 对（峰值的 {share:.0f}%），各步共 {hours:,.1f} 小时",
            flops=self.flops / 1e9,
            rate=rate,
            expected=100 * EXPECTED_SHARE,
            share=100 * self.share(rate),
            hours=pairs / rate / 3600,
        )
