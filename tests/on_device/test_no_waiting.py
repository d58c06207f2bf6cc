"""The loop never waits for the device, and a compiled run makes no graph anew after its first steps."""

from __future__ import annotations

import traceback
from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import cnclip_ft
from cnclip_ft.data.augment import augment
from cnclip_ft.data.batching import BatchOrder
from cnclip_ft.data.pairs import fixed_lengths, padded_length
from cnclip_ft.models.dual_encoder import DualEncoder
from cnclip_ft.recipe_stage import Augmentation, Distill
from cnclip_ft.training import compiling
from cnclip_ft.training.distilling import DistillStep
from cnclip_ft.training.large_batch import GradientStep
from cnclip_ft.training.loss import ContrastiveObjective, SigmoidObjective
from cnclip_ft.training.optimizer import give_bias
from data_tools.errors import UserError
from tests.families.cards import CARDS
from tests.families.encoders import ENCODERS, IMAGE
from tests.families.encoders import start as beside_a_vit
from tests.training.helpers import random_batch, tiny_model

WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "is_nonzero"}


class Reads(TorchDispatchMode):
    """Counts what would make the CPU wait, where it was asked for. Texts packed without padding are for the CPU alone."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.__name__.partition(".")[0] in WAITS:
            frames = [f for f in traceback.extract_stack() if "cnclip_ft" in f.filename]
            if not any(f.filename.endswith("packing.py") for f in frames):
                self.found[f"{func} in {frames[-1].filename}:{frames[-1].lineno}" if frames else str(func)] += 1
        return func(*args, **(kwargs or {}))


class Copies(TorchDispatchMode):
    """Counts what comes from the host otherwise than by `to_device`: on a card the CPU waits for such a copy. The device is torch's meta
    device. A single number goes along with the kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.__name__.partition(".")[0]
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        here = [t for t in tensors if t.device.type == "cpu"]
        if name == "_to_copy":
            waits = bool(here) and str(kwargs.get("device")) == "meta" and not kwargs.get("non_blocking")
        else:
            waits = any(t.is_meta for t in tensors) and any(t.ndim or name == "copy_" for t in here)
        if waits:
            frames = traceback.extract_stack()
            if not any(f.name == "to_device" for f in frames):
                asked = [f for f in frames if "cnclip_ft" in f.filename or "transformers" in f.filename]
                self.found[f"{func} in {asked[-1].filename}:{asked[-1].lineno}"] += 1
        return func(*args, **kwargs)


@pytest.mark.parametrize("objective", [ContrastiveObjective, SigmoidObjective])
@pytest.mark.parametrize("micro", [None, 4])
def test_forward_loss_and_backward_work_on_a_device_that_cannot_be_read(monkeypatch, objective, micro):
    """torch's meta device has shapes and no numbers: whoever asks for one fails."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # not for this device
    model = tiny_model(dropout=0.1)
    give_bias(model, objective())
    batch = random_batch(model, 12)
    model = model.to("meta").train()
    model.image_tower.patch_dropout = 0.5
    everything = [
        Augmentation(crop=0.5, colour=0.3, mirror=True, operations=2),
        Augmentation(crop=0.9, colour=0.3, mirror=True, auto_augment="original"),
    ]
    step = GradientStep(
        model,
        objective(tile=5),
        micro_batch_size=micro,
        autocast=nullcontext,
        backward=lambda loss: loss.backward(),
        augment=lambda pixels: augment(augment(pixels, everything[0]), everything[1]),
    )
    with Copies() as copies:
        out = step(batch)
    assert not copies.found
    assert out.loss.device.type == "meta" and out.accuracy.device.type == "meta"
    assert all(p.grad is not None for p in model.parameters())
    with pytest.raises(RuntimeError, match="meta"):
        out.loss.item()


@pytest.mark.parametrize("micro", [None, 4])
def test_a_teacher_and_features_that_may_be_cut_are_not_read_either(monkeypatch, micro):
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    model, batch = tiny_model(dropout=0.0), random_batch(tiny_model(), 12)
    model, teacher = model.to("meta").train(), tiny_model(dropout=0.0).to("meta").eval()
    taught = SimpleNamespace(images=None, encode_pixels=teacher.image_features, scale=torch.ones((), device="meta"))
    step = DistillStep(
        model,
        ContrastiveObjective(tile=5, dimensions=(8, 4)),
        micro_batch_size=micro,
        autocast=nullcontext,
        backward=lambda loss: loss.backward(),
        taught=taught,
        setting=Distill(teacher="t", similarities=1.0),
    )
    out = step(batch | {"teacher_texts": torch.empty(12, 16, device="meta")})
    assert out.loss.device.type == "meta" and all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("objective", [ContrastiveObjective(tile=5, dimensions=(8,)), SigmoidObjective(tile=5)])
@pytest.mark.parametrize("micro", [None, 4])
def test_hard_negatives_are_not_read_either(monkeypatch, objective, micro):
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    model, batch = tiny_model(dropout=0.1), random_batch(tiny_model(), 12)
    give_bias(model, objective)
    for name in ("input_ids", "attention_mask"):
        batch[name] = batch[name][:, None].repeat(1, 3, 1)
    step = GradientStep(
        model.to("meta").train(), objective, micro_batch_size=micro, autocast=nullcontext, backward=torch.Tensor.backward,
        negatives=0.5,
    )  # fmt: skip
    out = step(batch | {"negatives": torch.ones(12, 2, dtype=torch.bool)})
    assert out.loss.device.type == "meta" and all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", CARDS)
def test_no_family_reads_the_device(monkeypatch, tmp_path, name):
    """As above, with the towers and the tokenizer of every family; padding in every batch."""
    if name == "siglip":
        pytest.importorskip("sentencepiece", reason="the library writes this tokenizer with sentencepiece")
    step_on_meta(monkeypatch, cnclip_ft.load(CARDS[name].write(tmp_path / "model")))


@pytest.mark.parametrize("name", ENCODERS)
def test_no_text_encoder_of_transformers_reads_the_device(monkeypatch, tmp_path, name):
    """Which the library does by itself, to leave out the mask of texts without padding."""
    step_on_meta(monkeypatch, beside_a_vit(ENCODERS[name].write(tmp_path / "text"))[0])


def step_on_meta(monkeypatch, model: DualEncoder) -> None:
    model.train()
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    ids, mask = model.tokenizer.pad([[token % 20 + 1 for token in range(length)] for length in (3, 9, 4, 12, 5, 7)])
    pixels, keys = model.image_tower.example(len(ids)), torch.arange(len(ids))
    batch = {"pixels": pixels, "input_ids": ids, "attention_mask": mask, "image_keys": keys, "text_keys": keys}
    model.image_tower.patch_dropout = 0.5
    objective = ContrastiveObjective() if model.logit_bias is None else SigmoidObjective()
    step = GradientStep(
        model.to("meta"), objective, micro_batch_size=None, autocast=nullcontext, backward=lambda loss: loss.backward()
    )
    with Copies() as copies:
        assert step(batch).loss.device.type == "meta"
    assert not copies.found


@pytest.mark.parametrize(
    "stage",
    [
        {},
        {
            "ema": 0.9,
            "gradient_clip": 1.0,
            "skip_bad_steps": 1,
            "micro_batch_size": 4,
            "objective": {"dimensions": [8]},
        },
    ],
)
@pytest.mark.parametrize("number", [0, 1])
def test_a_step_reads_nothing_of_the_device(device, ready, stage, number):
    trainer = ready(number, stage={"steps": 6, **stage}, precision="bf16")
    batches = trainer.batches()
    trainer.take(next(batches))  # moments are made
    with Reads() as reads:
        for _ in range(2):
            trainer.take(next(batches))
    assert not reads.found
    assert [done.step for done in trainer.settled] == [1, 2] and trainer.step == 3  # one step late
    trainer.settle()
    assert [done.step for done in trainer.settled] == [1, 2, 3]
    with Reads() as reads:
        trainer.model.logit_scale.item()
    assert sum(reads.found.values()) == 1  # it would have been seen


@pytest.mark.parametrize("name", ["xlm-roberta", "mpnet", "gemma3_text", "qwen3"])
def test_a_step_of_a_text_encoder_of_transformers_reads_nothing(device, ready, tmp_path, name):
    """Masks by the library's own attention, by a model's own (MPNet), with sliding windows, and of a decoder."""
    text = str(ENCODERS[name].write(tmp_path / "text"))
    trainer = ready(
        stage={"steps": 9}, layers=0, precision="bf16", start={"image": IMAGE, "text": text, "projection": 16}
    )
    batches = trainer.batches()
    for _ in range(2):
        trainer.take(next(batches))
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        with Reads() as reads:
            trainer.take(next(batches))
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert not reads.found


@pytest.mark.parametrize("drawn", [{"operations": 2}, {"auto_augment": "original"}], ids=["random", "policy"])
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_a_card_is_never_waited_for(device, ready, precision, drawn):
    """torch raises where the CPU waits for the card."""
    if device.type == "cpu":
        pytest.skip("a CPU waits for nobody; reads are counted above")
    changes = {"augment": {"crop": 0.5, "colour": 0.3, **drawn}, "patch_dropout": 0.5, "ema": 0.9}
    trainer = ready(stage={"steps": 9, "gradient_clip": 1.0, "micro_batch_size": 32, **changes}, precision=precision)
    batches = trainer.batches()
    for _ in range(2):
        trainer.take(next(batches))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            trainer.take(next(batches))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    trainer.settle()
    assert [done.step for done in trainer.settled] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_bad_step_changes_nothing_and_is_told_one_step_late(device, ready, what):
    """Weights, moments, average and statistics are those before it; where none may be skipped the run ends there."""
    stage = {"steps": 9, "ema": 0.9, "skip_bad_steps": 1}
    trainer = ready(stage=stage, precision="fp32", layers=0)
    batches = trainer.batches()
    for _ in range(2):
        trainer.take(next(batches))
    trainer.settle()
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    average = {name: tensor.clone() for name, tensor in trainer.average.average.items()}
    moments = [{k: v.clone() for k, v in state.items()} for state in trainer.optimizer.state.values()]
    whole = trainer.gradient.backward

    def poisoned(loss):
        whole(loss)
        trainer.model.text_tower.projection.weight.grad[0] = float("inf")

    if what == "gradient":
        trainer.gradient.backward = poisoned
    else:
        trainer.model.logit_scale.data.fill_(float("nan"))
    trainer.take(next(batches))
    trainer.gradient.backward = whole
    trainer.model.logit_scale.data.copy_(before["logit_scale"])
    assert trainer.skipped == 0  # nobody asked the device yet
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.model.state_dict().items())
    for state, was in zip(trainer.optimizer.state.values(), moments, strict=True):
        assert all(torch.equal(state[name], was[name]) for name in was)
    trainer.settle()
    assert trainer.skipped == 1 and not trainer.settled[-1].usable
    assert all(torch.equal(tensor, average[name]) for name, tensor in trainer.average.average.items())
    trainer.take(next(batches))
    assert any(not torch.equal(tensor, before[name]) for name, tensor in trainer.model.state_dict().items())
    trainer.gradient.backward = poisoned
    trainer.take(next(batches))
    with pytest.raises(UserError, match=r"step 5: the gradient is (inf|nan)"):
        trainer.take(next(batches))


def test_lengths_are_few_and_enough():
    for context in (3, 16, 52, 77, 512):
        lengths = fixed_lengths(context)
        assert lengths[-1] == context and list(lengths) == sorted(set(lengths)) and len(lengths) <= 11
        assert all(longer <= 1.5 * shorter for shorter, longer in zip(lengths, lengths[1:], strict=False))
        assert padded_length(context, lengths) == context and padded_length(1, lengths) == lengths[0]
    assert fixed_lengths(52) == (16, 24, 32, 48, 52) and padded_length(17, ()) == 17


@pytest.mark.parametrize("micro", [None, pytest.param(3, marks=pytest.mark.slow)])
def test_nothing_is_compiled_again_after_the_first_steps(device, ready, monkeypatch, micro):
    """Batches whose longest texts differ: a graph for each of few lengths, made once; on the CPU without a compiler texts keep theirs."""
    if device.type == "cuda" and micro:
        pytest.skip("the whole batch is enough there")
    monkeypatch.setitem(compiling.COMPILER, "backend", "eager")
    counters.clear()
    trainer = ready(stage={"steps": 30, "micro_batch_size": micro}, compile=True, precision="fp32", layers=0)
    plan, lengths = trainer.plan, trainer.context.pairs.lengths
    longest = [int(lengths[batch].max()) for epoch in range(3) for batch in BatchOrder.epoch(plan.order, epoch)]
    assert len(set(longest)) > 2
    batches, made, seen = trainer.batches(), [], set()
    for _ in range(9):
        batch = next(batches)
        seen.add(batch["input_ids"].shape[1])
        trainer.take(batch)
        made.append(counters["stats"]["unique_graphs"])
    assert seen <= set(fixed_lengths(trainer.context.tokenizer.context_length)) and len(seen) < len(set(longest))
    assert made[-1] == made[3] > 0 and not counters["graph_break"]
    plain = ready(stage={"steps": 30}, precision="fp32", layers=0)
    assert next(plain.batches())["input_ids"].shape[1] == longest[0]


def test_one_layer_is_compiled_for_all_that_are_alike(device, ready, monkeypatch):
    """Four layers a tower: one graph for three of them, one for the last, which is read at its first token alone.

    On a CPU texts have no padding, so that their tower is compiled as a whole.
    """
    monkeypatch.setitem(compiling.COMPILER, "backend", "eager")
    counters.clear()
    start = {
        "image": {"kind": "vit", "hidden": 32, "layers": 4, "heads": 2, "patch": 8, "image_size": 32},
        "text": {"hidden": 32, "layers": 4, "heads": 2, "dropout": 0.0},
        "projection": 16,
    }
    found = []
    for wanted in (False, "layers"):
        trainer = ready(stage={"steps": 9}, compile=wanted, precision="fp32", start=start)
        batches = trainer.batches()
        found.append([trainer.take(next(batches)).loss.item() for _ in range(3)])
    assert counters["stats"]["unique_graphs"] == (3 if device.type == "cpu" else 4) and not counters["graph_break"]
    assert found[0] == pytest.approx(found[1], abs=1e-5)
