"""What a pair takes, what a card can do of it, and how plan and journal say so."""

from __future__ import annotations

import pytest
import torch

from cnclip_ft.training import plan, throughput
from cnclip_ft.training.run import train
from cnclip_ft.training.throughput import Card, Throughput, counted, flops_per_pair, listed
from tests.families.encoders import ENCODERS
from tests.training.helpers import planned, records, tiny_recipe

HIDDEN, LAYERS, SIDE, PATCH, OUT = 32, 2, 32, 8, 16
START = {
    "image": {"kind": "vit", "hidden": HIDDEN, "layers": LAYERS, "heads": 2, "patch": PATCH, "image_size": SIDE},
    "text": {"hidden": HIDDEN, "layers": LAYERS, "heads": 2, "dropout": 0.0},
    "projection": OUT,
}


def layers(tokens: int) -> float:
    """Multiplications and additions of the forward of both layers: the last one gives nothing but the first token."""
    whole = 12 * HIDDEN**2 * tokens + 2 * tokens**2 * HIDDEN
    reading = 2 * HIDDEN**2 * tokens + 10 * HIDDEN**2 + 2 * tokens * HIDDEN  # keys and values of all, the rest of one
    return 2.0 * (whole + reading)


def recipe(stores, tmp_path, **changes):
    return tiny_recipe(
        stores, model={"start": START}, output=str(tmp_path / "run"), feature_cache=str(tmp_path / "cache"), **changes
    )


def test_products_of_a_pair_are_those_of_the_towers(stores, tmp_path):
    context, model, (align, contrast) = planned(recipe(stores, tmp_path))
    patches, tokens = (SIDE // PATCH) ** 2, 9
    text = layers(tokens) + 2 * HIDDEN * OUT
    patch = 2 * 3 * PATCH**2 * HIDDEN * patches
    image = layers(patches + 1) + 2 * HIDDEN * OUT
    # A backward is two forwards; pixels and embeddings need no gradient of their own.
    assert flops_per_pair(align, model, tokens) == pytest.approx(3 * text, rel=0.02)
    assert flops_per_pair(contrast, model, tokens) == pytest.approx(3 * (text + image) + 2 * patch, rel=0.02)
    assert all(p.device.type == "cpu" and p.grad is None for p in model.parameters())


def test_a_frozen_tower_that_is_walked_has_no_backward(stores, tmp_path):
    _, model, (align, _) = planned(recipe(stores, tmp_path, align={"feature_cache": False}))
    _, _, (cached, _) = planned(recipe(stores, tmp_path))
    extra = flops_per_pair(align, model, 9) - flops_per_pair(cached, model, 9)
    patches = (SIDE // PATCH) ** 2
    forward = layers(patches + 1) + 2 * HIDDEN * OUT + 2 * 3 * PATCH**2 * HIDDEN * patches
    assert extra == pytest.approx(forward, rel=0.02)


def test_towers_that_look_at_numbers_are_walked_with_numbers(stores, tmp_path, monkeypatch):
    """The same products; nothing of the run is changed by it."""
    _, model, (_, contrast) = planned(recipe(stores, tmp_path))
    expected = flops_per_pair(contrast, model.train(), 9)
    forward = type(model.text_tower).forward

    def looking(self, input_ids, attention_mask):
        assert int(attention_mask.sum()) > 0
        torch.rand(1)
        return forward(self, input_ids, attention_mask)

    monkeypatch.setattr(type(model.text_tower), "forward", looking)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    drawn = torch.random.get_rng_state()
    assert flops_per_pair(contrast, model, 9) == expected > 0
    assert torch.equal(drawn, torch.random.get_rng_state())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_towers_that_cannot_be_walked_are_not_counted(stores, tmp_path, monkeypatch):
    _, model, (align, _) = planned(recipe(stores, tmp_path))
    monkeypatch.setattr(type(model.text_tower), "forward", lambda *_: 1 / 0)
    assert flops_per_pair(align, model, 9) is None


@pytest.mark.parametrize("name", ENCODERS)
def test_every_text_encoder_of_transformers_is_counted(stores, tmp_path, monkeypatch, name):
    """On the meta device: near the sum of its weights' products, and the plan has the line."""
    known = Card("NVIDIA Test", 4e9, 8e9)
    for module in (plan, throughput):
        monkeypatch.setattr(module, "card", lambda device, precision: known)
    start = START | {"text": str(ENCODERS[name].write(tmp_path / "text"))}
    wanted = tiny_recipe(stores, model={"start": start}, output=str(tmp_path / "run"))
    context, model, plans = planned(wanted)
    tower, tokens = model.text_tower, int(context.pairs.lengths.mean())
    weights = sum(
        p.numel()
        for n, p in tower.text_model.named_parameters()
        if p.ndim == 2 and "embed" not in n and "bias" not in n
    )
    monkeypatch.setattr(type(model), "device", torch.device("meta"))  # no second walk
    found = flops_per_pair(plans[0], model, tokens)
    # Beside the weights' products there are those of attention; a backward is two forwards, the first layer's input has none.
    assert 0.8 * 6 * weights * tokens < found < 1.8 * 6 * weights * tokens
    monkeypatch.undo()
    for module in (plan, throughput):
        monkeypatch.setattr(module, "card", lambda device, precision: known)
    assert plan.describe(context, model, plans).count("GFLOP a pair") == len(plans)


def test_a_plain_layer_is_counted_with_its_backward():
    layer = torch.nn.Linear(8, 4)
    given = {"input": torch.empty(3, 8, device="meta")}

    class Named(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, input):
            return {"out": self.layer(input)}

    forward = 2 * 3 * 8 * 4
    assert counted(Named(), {"layer.weight", "layer.bias"}, given) == 2 * forward  # no gradient of what went in


@pytest.mark.parametrize(
    "name,rate",
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA L40S", 362.1),
        ("NVIDIA L4", 121.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("Tesla V100-SXM2-32GB", 125.0),
        ("NVIDIA A10G", 70.0),
        ("Tesla T4", 65.1),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA RTX A4000", None),
        ("NVIDIA T400 4GB", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("A card of next year", None),
    ],
)
def test_listed_rates_by_name(name, rate):
    assert listed(name) == (None if rate is None else pytest.approx(rate * 1e12))


def test_plan_and_journal_say_what_is_expected_and_what_is_reached(stores, tmp_path, monkeypatch):
    known = Card("NVIDIA Test", 4e9, 8e9)
    for module in (plan, throughput):
        monkeypatch.setattr(module, "card", lambda device, precision: known)
    wanted = recipe(stores, tmp_path)
    context, model, plans = planned(wanted)
    said = plan.describe(context, model, plans)
    assert "card         NVIDIA Test: 16-bit products measured at 0 TFLOP/s, listed with 0" in said
    flops = flops_per_pair(plans[1], model, int(context.pairs.lengths.mean()))
    rate = 0.4 * 4e9 / flops
    assert f"{flops / 1e9:,.1f} GFLOP a pair; about {rate:,.0f} pairs/s where 40% of the measured products" in said
    assert "(20% of the peak)" in said
    assert train(wanted)
    found = [record for record in records(tmp_path / "run") if record["stage"] == "contrast"]
    assert len(found) == 6
    for record in found:
        assert record["mfu"] == pytest.approx(record["pairs_per_second"] * flops / 8e9)


def test_a_cpu_says_nothing_of_it(stores, tmp_path):
    context, model, plans = planned(recipe(stores, tmp_path))
    said = plan.describe(context, model, plans)
    assert "GFLOP" not in said and "card" not in said
    assert Throughput.of(context, plans[0], model) is None


def test_a_rate_is_measured(device):
    assert throughput.product_rate(device, torch.bfloat16, side=64 if device.type == "cpu" else 4096, repeats=2) > 0
    found = throughput.card(device, "bf16")
    assert (found is None) == (device.type == "cpu") and throughput.card(device, "fp32") is None
    if found is not None:
        assert found.measured > 1e12 and found.name in str(found)
