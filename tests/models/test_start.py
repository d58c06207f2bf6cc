"""Where weights come from: CLIP and BERT folders, import paths, what is said and what is refused."""

from __future__ import annotations

import pytest
import torch

from cnclip_ft.models.checkpoints import load, save_checkpoint
from cnclip_ft.models.start import build_start
from data_tools.errors import RequestError

TEXT = {"hidden": 32, "layers": 1, "heads": 2}
FACTORY = """
import torch
from torch import nn

class Tower(nn.Module):
    output_dim, image_size, mean, std = 6, 16, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 4, stride=4), nn.BatchNorm2d(6)
    def forward(self, pixels):
        assert pixels.dtype == torch.float32 and pixels.min() >= -2.01 and pixels.max() <= 2.01
        return self.norm(self.conv(pixels)).mean((2, 3))

class Raw(Tower):
    input = "uint8"
    def forward(self, pixels):
        assert pixels.dtype == torch.uint8
        return self.norm(self.conv(pixels.float() / 255)).mean((2, 3))

class Lying(Tower):
    def forward(self, pixels):
        return pixels.flatten(1)

def incomplete():
    return nn.Linear(1, 1)
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "some_towers.py").write_text(FACTORY, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    return "some_towers"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A CLIP and a BERT as transformers writes them."""
    from transformers import BertConfig, BertForMaskedLM, CLIPConfig, CLIPModel

    folder = tmp_path_factory.mktemp("hub")
    torch.manual_seed(3)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = small | {"image_size": 32, "patch_size": 8}
    config = CLIPConfig(text_config=small | {"vocab_size": 100}, vision_config=vision, projection_dim=24)
    clip = CLIPModel(config)
    clip.logit_scale.data.fill_(4.0)
    clip.save_pretrained(folder / "clip")
    BertForMaskedLM(BertConfig(**small, vocab_size=21128)).save_pretrained(folder / "bert")
    return folder, clip


def test_clip_image_tower_and_bert_text_tower(folders):
    folder, clip = folders
    model, report = build_start({"image": str(folder / "clip"), "text": str(folder / "bert")})
    model.eval()
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    from cnclip_ft.data.images import OPENAI_MEAN, OPENAI_STD, normalise

    out = clip.eval().get_image_features(pixel_values=normalise(pixels, OPENAI_MEAN, OPENAI_STD))
    theirs = getattr(out, "pooler_output", out)
    assert torch.allclose(model.image_features(pixels), torch.nn.functional.normalize(theirs, dim=1), atol=1e-5)
    assert model.logit_scale.item() == 4.0
    said = "\n".join(report.lines())
    assert "visual projection" in said and "text_projection (random)" in said and "not used" in said and str(folder / "bert") in said
    from transformers import BertModel

    bert = BertModel.from_pretrained(folder / "bert").eval()
    ids, mask = model.tokenizer.pad(model.tokenizer.encode(["一只狗", "两只很大的猫"]))
    with torch.no_grad():
        ours = model.text_tower.text_model(input_ids=ids, attention_mask=mask).last_hidden_state
        hers = bert(input_ids=ids, attention_mask=mask).last_hidden_state
    assert torch.allclose(ours[:, 0], hers[:, 0], atol=1e-5)


@pytest.mark.parametrize("name", ["Tower", "Raw"])
def test_import_path_tower_trains_saves_and_loads(module, name, tmp_path):
    model, report = build_start({"image": f"{module}:{name}", "text": TEXT, "projection": 8})
    assert model.image_size == 16 and any("visual_projection" in part for part in report.new)
    pixels = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    model.train()
    before = model.image_tower.module.norm.running_mean.clone()
    model.image_features(pixels).sum().backward()
    assert not torch.equal(before, model.image_tower.module.norm.running_mean)
    model.eval()
    save_checkpoint(model, tmp_path / "c", info={})
    again = load(tmp_path / "c")
    assert torch.equal(again.image_features(pixels), model.image_features(pixels))
    assert torch.equal(again.image_tower.module.norm.running_mean, model.image_tower.module.norm.running_mean)
    assert again.encode_images([torch.zeros(1).numpy().tobytes()] * 0).shape == (0, 8)


def test_a_checkpoint_whose_tower_is_gone_says_so(module, tmp_path, monkeypatch):
    model, _ = build_start({"image": f"{module}:Tower", "text": TEXT, "projection": 8})
    save_checkpoint(model, tmp_path / "c", info={})
    monkeypatch.delitem(__import__("sys").modules, module)
    (tmp_path / "some_towers.py").unlink()
    __import__("importlib").invalidate_caches()
    with pytest.raises(RequestError, match="some_towers:Tower cannot be imported"):
        load(tmp_path / "c")


@pytest.mark.parametrize(
    "spec,expected",
    [
        ({"image": "some_towers:incomplete", "text": TEXT}, "lacks output_dim, image_size, mean, std"),
        ({"image": "some_towers:nothing", "text": TEXT}, "cannot be imported"),
        ({"image": "no/folder", "text": TEXT}, "no/folder"),
        ({"image": {"kind": "cube"}, "text": TEXT}, "'cube'"),
        ({"image": {"kind": "vit", "sides": 3}, "text": TEXT}, "sides"),
        ({"image": {"kind": "vit", "hidden": 32, "layers": 1, "heads": 2, "patch": 8}}, "text is missing"),
        ({"image": "some_towers:Tower", "text": TEXT, "colour": 1}, "unknown key colour"),
        ({"image": "some_towers:Tower", "text": "no/bert"}, "no/bert"),
    ],
)
def test_refusals(module, spec, expected):
    with pytest.raises(RequestError, match=expected):
        build_start(spec)


def test_a_tower_that_lies_about_its_output_is_named(module):
    model, _ = build_start({"image": f"{module}:Lying", "text": TEXT, "projection": 8})
    with pytest.raises(RequestError, match=r"gave \[1, 768\] for 1 images; expected \[1, 6\]"):
        model.image_features(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))


def test_a_context_longer_than_the_positions_is_refused():
    with pytest.raises(RequestError, match="600.*512 positions"):
        build_start({"image": {"kind": "vit", "hidden": 32, "layers": 1, "heads": 2, "patch": 8}, "text": TEXT}, context_length=600)
