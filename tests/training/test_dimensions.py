"""Features that may be cut: the loss over every width against brute force, models of fewer numbers, refused in words."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from typer.testing import CliRunner

import cnclip_ft
from cnclip_ft.cli import app
from cnclip_ft.models.checkpoints import load, read_info, save_checkpoint
from cnclip_ft.training.loss import ContrastiveObjective, SigmoidObjective
from cnclip_ft.training.plan import describe
from cnclip_ft.training.run import train
from data_tools.errors import RequestError
from tests.families.cards import CARDS
from tests.training.helpers import planned, tiny_model, tiny_recipe


def command(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("kind", [ContrastiveObjective, SigmoidObjective])
def test_the_loss_is_the_mean_over_every_width(kind):
    generator = torch.Generator().manual_seed(0)
    x, y = (F.normalize(torch.randn(7, 8, generator=generator, dtype=torch.float64), dim=1) for _ in range(2))
    x.requires_grad_()
    keys = torch.tensor([0, 1, 2, 0, 4, 5, 6]), torch.arange(7)
    scale, bias = torch.tensor(1.3, dtype=torch.float64), torch.tensor(-2.0, dtype=torch.float64)
    found = kind(dimensions=(4, 2), tile=3)(x, y, scale, *keys, bias)
    cut = [kind()(x, y, scale, *keys, bias)]
    cut += [kind()(F.normalize(x[:, :w], dim=1), F.normalize(y[:, :w], dim=1), scale, *keys, bias) for w in (4, 2)]
    expected = sum(each.loss for each in cut) / 3
    torch.testing.assert_close(found.loss, expected, atol=1e-12, rtol=0)
    assert found.accuracy == cut[0].accuracy
    torch.testing.assert_close(
        *(torch.autograd.grad(loss, x)[0] for loss in (found.loss, expected)), atol=1e-12, rtol=0
    )


def test_a_cut_model_gives_the_first_numbers(tmp_path):
    model = tiny_model(dropout=0.0).eval()
    save_checkpoint(model, tmp_path / "whole", info={})
    cut = load(tmp_path / "whole", dimensions=6)
    texts, pictures = ["一只狗", "a cat"], torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    for name, items in (("encode_texts", texts), ("encode_images", pictures)):
        whole, found = getattr(model, name)(items), getattr(cut, name)(items)
        torch.testing.assert_close(found, F.normalize(whole[:, :6], dim=1), atol=1e-6, rtol=0)
    save_checkpoint(cut, tmp_path / "cut", info={})
    torch.testing.assert_close(load(tmp_path / "cut").encode_texts(texts), cut.encode_texts(texts))
    assert load(tmp_path / "whole", dimensions=16).narrowed is None  # all there are


@pytest.mark.parametrize("name", CARDS)
def test_every_family_is_cut_or_says_why_not(name, tmp_path):
    folder = CARDS[name].write(tmp_path / "model")
    model, texts = load(folder), ["a dog", "two cats on a red mat"]
    try:
        cut = load(folder, dimensions=4)
    except RequestError as error:
        assert "siglip" in name and "without a projection, so they cannot be cut" in str(error)
        return
    torch.testing.assert_close(
        cut.encode_texts(texts), F.normalize(model.encode_texts(texts)[:, :4], dim=1), atol=1e-5, rtol=0
    )


def test_a_run_learns_every_width_and_commands_keep_as_many_as_are_wanted(stores, tmp_path, capsys):
    objective = {"objective": {"dimensions": [8, 4]}}
    recipe = tiny_recipe(stores, output=str(tmp_path / "run"), align=objective, contrast=objective)
    assert "learnt for features cut to 8, 4 numbers as well" in describe(*planned(recipe))
    assert train(recipe)
    best, valid = tmp_path / "run" / "contrast" / "best", stores / "valid"
    assert read_info(best)["dimensions"] == [8, 4]
    whole, cut = (cnclip_ft.evaluate(best, valid, dimensions=wanted) for wanted in (None, 8))
    assert whole.as_dict()["settings"].get("dimensions") is None and cut.as_dict()["settings"]["dimensions"] == 8
    assert command("export", best, "--dimensions", 8, "--output", tmp_path / "small").exit_code == 0
    assert json.loads((tmp_path / "small" / "config.json").read_text())["projection_dim"] == 8
    pictures = tmp_path / "pictures"
    assert command("data", "export", valid, "--to", "imagefolder", "--output", pictures).exit_code == 0
    index = tmp_path / "index"
    made = command("search", "index", best, pictures, "--output", index, "--dimensions", 8)
    assert made.exit_code == 0, made.output
    asked = command("search", "query", index, "红色", "--top", 2)
    assert asked.exit_code == 0, asked.output
    other = command("search", "index", best, pictures, "--output", index)
    assert other.exit_code != 0 and "dimensions 8 → None" in f"{other.output} {other.exception}"


@pytest.mark.parametrize("widths", [[16], [8, 8], [32, 4]])
def test_widths_that_cannot_be_learnt_are_refused(stores, tmp_path, widths):
    recipe = tiny_recipe(stores, output=str(tmp_path / "run"), align={"objective": {"dimensions": widths}})
    recipe.model.start = {
        "image": {"kind": "vit", "hidden": 32, "layers": 1, "heads": 2, "patch": 8, "image_size": 32},
        "text": {"hidden": 32, "layers": 1, "heads": 2},
        "projection": 16,
    }
    with pytest.raises(
        RequestError, match=r"stages.align.objective.dimensions is .*stages.align.objective.dimensions=\["
    ):
        planned(recipe)


def test_an_empty_list_and_too_many_numbers_are_refused(stores, tmp_path):
    with pytest.raises(ValueError, match=r"no width to cut to: {here}=null, or widths below"):
        tiny_recipe(stores, align={"objective": {"dimensions": []}})
    save_checkpoint(tiny_model().eval(), tmp_path / "whole", info={})
    with pytest.raises(RequestError, match="dimensions is 17, and the features have 16 numbers"):
        load(tmp_path / "whole", dimensions=17)
