"""8-bit products: refused with the reason where they cannot be; names, parameters and checkpoints stay plain."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from cnclip_ft.models.checkpoints import load
from cnclip_ft.training import context as context_module
from cnclip_ft.training import fp8
from cnclip_ft.training.advice import warnings
from cnclip_ft.training.run import train
from cnclip_ft.training.sharding import Sharded, Whole
from data_tools.errors import RequestError
from tests.official import FOLDER
from tests.training.helpers import prepared, tiny_recipe, write_stores

CARD = torch.device("cuda")


class Rounded(nn.Linear):
    """Inputs and weight rounded to 8 bits; the gradient passes as if they were not."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(self._eight(hidden), self._eight(self.weight), self.bias)

    @staticmethod
    def _eight(tensor: torch.Tensor) -> torch.Tensor:
        scale = 448 / tensor.detach().abs().max()
        return tensor + ((tensor * scale).to(torch.float8_e4m3fn).to(tensor.dtype) / scale - tensor).detach()


def rounded(layer: nn.Linear) -> nn.Linear:
    with torch.device("meta"):
        made = Rounded(layer.in_features, layer.out_features, bias=layer.bias is not None)
    made.weight, made.bias = layer.weight, layer.bias
    return made


@pytest.fixture(params=["stand-in", "torchao"])
def on_the_cpu(request, monkeypatch):
    """What a card does, done by the CPU: by a stand-in, and by torchao itself where it is installed."""
    made = rounded
    if request.param == "torchao":
        if (FOLDER / "torchao").is_dir():  # run_scripts/test.sh -m slow puts it there
            monkeypatch.syspath_prepend(str(FOLDER / "torchao"))
        pytest.importorskip("torchao", reason="torchao is not installed")
        made = partial(fp8.eight_bit, emulate=True)
    monkeypatch.setattr(fp8, "eight_bit", made)
    monkeypatch.setattr(context_module, "check_fp8", lambda *_: None)


@pytest.mark.parametrize(
    "device,capability,precision,sharding,there,says",
    [
        ("cpu", None, "bf16", Whole(), True, "needs a CUDA device, this run is on cpu; or leave it out: fp8=false"),
        ("cuda", (8, 0), "bf16", Whole(), True, r"8\.9 or more \(Ada, Hopper\), and A Card has 8\.0"),
        ("cuda", (9, 0), "fp16", Whole(), True, "this run computes in fp16: precision=bf16; or"),
        ("cuda", (9, 0), "bf16", Sharded.__new__(Sharded), True, "spread over devices"),
        ("cuda", (8, 9), "bf16", Whole(), False, r"needs torchao: pip install -e '\.\[fp8\]'"),
        ("cuda", (8, 9), "bf16", Whole(), True, None),
    ],
)
def test_where_it_cannot_be_it_is_refused(monkeypatch, device, capability, precision, sharding, there, says):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A Card")
    monkeypatch.setattr(fp8, "find_spec", lambda _: there or None)
    if says is None:
        fp8.check_fp8(torch.device(device), precision, sharding)
        return
    with pytest.raises(RequestError, match=says):
        fp8.check_fp8(torch.device(device), precision, sharding)


def test_a_recipe_that_asks_for_it_on_a_cpu_trains_nothing(device, tmp_path):
    if device.type == "cuda":
        pytest.skip("what a card cannot do is refused above")
    with pytest.raises(RequestError, match="fp8: true needs a CUDA device"):
        train(tiny_recipe(write_stores(tmp_path), output=str(tmp_path / "run"), fp8=True))
    assert not (tmp_path / "run" / "align").exists()


def test_names_and_parameters_are_those_of_the_plain_layers(tmp_path, on_the_cpu):
    stores = write_stores(tmp_path)
    plain = prepared(tiny_recipe(stores, output=str(tmp_path / "run")))
    eight = prepared(tiny_recipe(stores, output=str(tmp_path / "run"), fp8=True))
    assert any(said.startswith("fp8 without compile") for said in warnings(eight.context, eight.model, [eight.plan]))
    assert len(eight.fp8) > 20 and plain.fp8 is None
    assert list(eight.model.state_dict()) == list(plain.model.state_dict())
    kinds = [type(module) for module in eight.model.modules()]
    batches = [next(trainer.batches()) for trainer in (plain, eight)]
    before = {entry.name: entry.parameter.detach().clone() for entry in eight.entries if entry.rate}
    losses = [trainer.take(batch).loss.item() for trainer, batch in zip((plain, eight), batches, strict=True)]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], abs=0.1)
    # Each parameter that trains moved, through the 8-bit form of its layer.
    moved = [name for name, old in before.items() if not torch.equal(old, dict(eight.model.named_parameters())[name])]
    assert len(moved) > 0.9 * len(before)
    with eight.judged() as model:
        assert {type(m) for m in model.modules() if isinstance(m, nn.Linear)} <= {
            type(m) for m in plain.model.modules() if isinstance(m, nn.Linear)
        }
    assert [type(module) for module in eight.model.modules()] == kinds
    eight.release()
    assert eight.model.state_dict().keys() == plain.model.state_dict().keys()
    assert [type(m) for m in eight.model.modules()] == [type(m) for m in plain.model.modules()]


@pytest.mark.slow
def test_a_run_judges_and_keeps_plain_layers(tmp_path, on_the_cpu):
    stores, found = write_stores(tmp_path), {}
    short = {"steps": 2, "validate_every": 2}
    recipe = tiny_recipe(stores, output=str(tmp_path / "run"), fp8=True, align=short, contrast=short)
    assert train(recipe, before_step=lambda trainer: found.update({trainer.plan.name: len(trainer.fp8)}))
    seen = list(found.values())
    assert len(seen) == 2 and 0 < seen[0] < seen[1]  # of the text tower alone, then of both
    best = tmp_path / "run" / "contrast" / "best"
    plain = prepared(tiny_recipe(stores, output=str(tmp_path / "other"))).model
    assert load(best).state_dict().keys() == plain.state_dict().keys()
    assert [type(m) for m in load(best).modules()] == [type(m) for m in plain.modules()]
