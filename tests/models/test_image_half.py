"""English CLIP files as image towers: kinds recognised, tower, visual projection and temperature taken."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from cnclip_ft.models.checkpoints import save_checkpoint
from cnclip_ft.models.formats.cn_clip import to_official
from cnclip_ft.models.formats.image_half import read_image_half
from cnclip_ft.models.preprocessing import normalise
from cnclip_ft.models.start import build_start
from data_tools.errors import RequestError
from tests.models.helpers import RESNET, TEXT, VIT, official, pixels, small, tensors

ENGLISH = {
    "token_embedding.weight": torch.zeros(9, 8), "positional_embedding": torch.zeros(77, 8), "ln_final.weight": torch.ones(8),
    "ln_final.bias": torch.zeros(8), "text_projection": torch.zeros(8, 32), "transformer.resblocks.0.ln_1.weight": torch.ones(8),
}  # fmt: skip
NUMBERS = {"input_resolution": torch.tensor(32), "context_length": torch.tensor(77), "vocab_size": torch.tensor(9)}


def english(spec=VIT, **more):
    """The state dict of an English CLIP whose image tower is `small(spec)`'s."""
    state = to_official(tensors(small(spec)))
    kept = {name: tensor for name, tensor in state.items() if name.startswith("visual.") or name == "logit_scale"}
    return kept | ENGLISH | more


def start(image, **more):
    model, report = build_start({"image": image, "text": TEXT} | more)
    return model.eval(), report


def image_features(model):
    with torch.inference_mode():
        return model.image_features(pixels(model.image_size))


@pytest.mark.parametrize("spec", [VIT, RESNET])
def test_openai_state_dict(spec, tmp_path):
    torch.save(english(spec, **NUMBERS), tmp_path / "ViT.pt")
    model, report = start(str(tmp_path / "ViT.pt"))
    assert torch.equal(image_features(model), image_features(small(spec)))
    assert model.logit_scale == small(spec).logit_scale
    assert [part for part, _ in report.loaded] == ["image tower and visual projection", "temperature"]
    assert report.new == ["text_tower"] and report.changed == []
    assert report.left_over == sorted(ENGLISH | NUMBERS)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_openai_jit_archive(tmp_path):
    """The released files: TorchScript, fp16, numbers among the tensors."""

    class Holder(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    root = Holder()
    for name, tensor in english(**NUMBERS).items():
        *path, last = name.split(".")
        module = root
        for part in path:
            if part not in dict(module.named_children()):
                module.add_module(part, Holder())
            module = getattr(module, part)
        module.register_buffer(last, tensor.half() if tensor.is_floating_point() else tensor)
    torch.jit.script(root).save(str(tmp_path / "ViT-B-32.pt"))
    model, report = start(str(tmp_path / "ViT-B-32.pt"))
    assert report.changed == []  # OpenAI's: quick_gelu for certain
    for name, tensor in tensors(small()).items():
        if name.startswith("v"):
            assert torch.equal(tensors(model)[name], tensor.half().float())


def test_open_clip_folder(tmp_path):
    """What open_clip pushes to the hub: weights and a configuration that knows activation, heads, mean and deviation."""
    save_file(english(), tmp_path / "open_clip_model.safetensors")
    config = {
        "model_cfg": {"vision_cfg": {"head_width": 32}},
        "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.5, 0.5]},
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config), encoding="utf-8")
    for path in (tmp_path, tmp_path / "open_clip_model.safetensors"):
        model, report = start(str(path))
        vision = model.image_tower.vision_model.config
        assert (vision.hidden_act, vision.num_attention_heads) == ("gelu", 2) and report.changed == []
        assert (model.image_tower.preprocessing.mean, model.image_tower.preprocessing.std) == (
            (0.5, 0.5, 0.5),
            (0.25, 0.5, 0.5),
        )
    save_checkpoint(model, tmp_path / "mine", info={})
    from cnclip_ft.models.checkpoints import load

    back = load(tmp_path / "mine")
    assert back.image_tower.preprocessing.std == (0.25, 0.5, 0.5) and torch.equal(
        image_features(back), image_features(model)
    )
    processor = json.loads((tmp_path / "mine" / "preprocessor_config.json").read_text())
    assert processor["image_std"] == [0.25, 0.5, 0.5]


@pytest.mark.parametrize("name,act", [("open_clip_pytorch_model.bin", "gelu"), ("clip.pt", "quick_gelu")])
def test_an_activation_that_is_a_guess_is_said_and_can_be_set(name, act, tmp_path):
    torch.save(english(), tmp_path / name)
    model, report = start(str(tmp_path / name))
    assert model.image_tower.vision_model.config.hidden_act == act
    assert f"activation {act} taken from the kind of file" in report.changed[0]
    other = {"gelu": "quick_gelu", "quick_gelu": "gelu"}[act]
    model, report = start({"path": str(tmp_path / name), "activation": other})
    assert model.image_tower.vision_model.config.hidden_act == other and report.changed == []
    with pytest.raises(RequestError, match="activation is 'relu'"):
        start({"path": str(tmp_path / name), "activation": "relu"})


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_transformers_clip_folder(act, tmp_path):
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
        hidden_act=act,
    )
    text = CLIPTextConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=99
    )
    theirs = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=24)).eval()
    theirs.save_pretrained(tmp_path)
    model, report = start(str(tmp_path))
    with torch.inference_mode():
        expected = theirs.get_image_features(
            normalise(pixels(32), model.image_tower.preprocessing.mean, model.image_tower.preprocessing.std)
        ).pooler_output
    torch.testing.assert_close(image_features(model), torch.nn.functional.normalize(expected, dim=1), atol=1e-6, rtol=0)
    assert model.logit_scale == theirs.logit_scale and model.image_tower.output_dim == 24
    assert report.left_over and all(name.startswith(("text_model.", "text_projection")) for name in report.left_over)


@pytest.mark.parametrize("kind", ["ours", "transformers", "official"])
def test_chinese_clip_as_image_tower(kind, tmp_path):
    path = tmp_path / "a"
    if kind == "official":
        torch.save({"state_dict": official(small())}, path)
    else:
        save_checkpoint(small(), path, info={})
        if kind == "transformers":
            (path / "cnclip_ft.json").unlink()
    model, report = start(str(path), text={"hidden": 32, "layers": 1, "heads": 2})
    assert torch.equal(image_features(model), image_features(small())) and report.changed == []
    assert report.left_over and model.logit_scale == small().logit_scale


def test_another_projection_and_resolution(tmp_path):
    torch.save(english(**NUMBERS), tmp_path / "x.pt")
    model, report = build_start({"image": str(tmp_path / "x.pt"), "text": TEXT, "projection": 48}, image_size=64)
    assert (
        model.image_tower.output_dim == 48 and model.image_size == 64 and "image_tower.visual_projection" in report.new
    )
    assert [part for part, _ in report.loaded] == ["image tower", "temperature"]
    assert any("resized 4×4 → 8×8" in line for line in report.changed)
    torch.save(english(RESNET), tmp_path / "r.pt")
    with pytest.raises(RequestError, match="projection is 48, but the pooling"):
        start(str(tmp_path / "r.pt"), projection=48)


def test_what_is_no_image_tower(tmp_path):
    path = tmp_path / "x.pt"
    torch.save(ENGLISH, path)
    with pytest.raises(RequestError, match="no image tower in it"):
        read_image_half(path)
    torch.save({"visual.trunk.stem.weight": torch.zeros(2), "logit_scale": torch.tensor(1.0)}, path)
    with pytest.raises(RequestError, match="image tower of timm.*open_clip_config.json"):
        read_image_half(path)
    torch.save(english() | {"visual.attn_pool.query": torch.zeros(2)}, path)
    with pytest.raises(RequestError, match="not an image tower of CLIP's kind.*visual.attn_pool.query"):
        read_image_half(path)
    torch.save(english() | {"decoder.weight": torch.zeros(2)}, path)
    with pytest.raises(RequestError, match="1 tensors belong to no CLIP, e.g. decoder.weight"):
        read_image_half(path)
    state = english()
    del state["visual.proj"]
    torch.save(state, path)
    with pytest.raises(RequestError, match="incomplete, no 'visual_projection.weight'"):
        read_image_half(path)
    state = english()
    del state["visual.ln_post.bias"]
    torch.save(state, path)
    with pytest.raises(RequestError, match="1 missing \\(vision_model.post_layernorm.bias\\)"):
        start(str(path))
    (tmp_path / "config.json").write_text('{"model_type": "vit"}', encoding="utf-8")
    with pytest.raises(RequestError, match="model of type 'vit'; an image tower comes from"):
        read_image_half(tmp_path)
