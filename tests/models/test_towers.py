"""Towers: patch dropping, gradient checkpointing, blocks, and any module by import path."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from cnclip_ft.data.augment import augment
from cnclip_ft.models.checkpoints import load, save_checkpoint
from cnclip_ft.models.preprocessing import OPENAI_MEAN, OPENAI_STD, normalise
from cnclip_ft.models.start import build_start
from cnclip_ft.recipe_stage import Augmentation
from data_tools.errors import RequestError
from tests.models.helpers import RESNET, TEXT, VIT, features, pixels, small, tensors

HERE = "tests.models.tower_fixture"


def foreign(name="plain", **more):
    return build_start({"image": f"{HERE}:{name}", "text": TEXT, "projection": 32} | more)


# ---- every tower ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [VIT, RESNET, {"image": f"{HERE}:plain", "text": TEXT}])
def test_blocks_hold_every_parameter_once(spec):
    model = build_start(spec)[0]
    for tower in (model.image_tower, model.text_tower):
        found = [id(parameter) for block in tower.blocks() for parameter in block.parameters()]
        assert len(found) == len(set(found)) and set(found) == {id(parameter) for parameter in tower.parameters()}


@pytest.mark.parametrize("spec", [VIT, RESNET])
def test_gradient_checkpointing_changes_no_gradient(spec):
    gradients = []
    for wanted in (False, True, False):
        model = small(spec).train()
        for module in model.modules():  # statistics and dropout would differ between runs
            if isinstance(module, (torch.nn.BatchNorm2d, torch.nn.Dropout)):
                module.eval()
        model.set_gradient_checkpointing(wanted, wanted)
        ids = torch.tensor([[101, 2207, 102]])
        torch.manual_seed(0)
        image, text = model(pixels(model.image_size), ids, torch.ones_like(ids))
        (image @ text.T).sum().backward()
        gradients.append(
            {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
        )
    for other in gradients[1:]:
        assert other.keys() == gradients[0].keys()
        for name in other:
            torch.testing.assert_close(other[name], gradients[0][name], atol=1e-6, rtol=1e-4)


def orders(model, pixels) -> list[bool]:
    """Of every convolution of the image tower, the first one first: whether what it is given and its weight have their channels
    together in memory."""
    found = []

    def look(module, inputs):
        tensors = (inputs[0], module.weight)
        found.extend(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in tensors)

    hooks = [m.register_forward_pre_hook(look) for m in model.image_tower.modules() if isinstance(m, torch.nn.Conv2d)]
    with torch.no_grad():
        model.image_features(pixels)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("augmented", [False, True])
def test_channels_lie_together_all_the_way_through_a_resnet(monkeypatch, augmented):
    """As a loader decodes pictures, and as the device augments them; on a device that wants it so, and back again."""
    model = small(RESNET)
    some = pixels(model.image_size).contiguous(memory_format=torch.channels_last)  # as `decode` gives them
    if augmented:
        some = augment(some, Augmentation(crop=0.5, colour=0.3, operations=2))
    before, expected = features(model), model.image_features(some)
    assert not any(orders(model, some)[:2])
    monkeypatch.setattr(type(model.image_tower), "channels_last_on", ("cpu",))
    model.to("cpu")
    found = orders(model, some)
    assert len(found) > 20 and all(found)
    torch.testing.assert_close(features(model), before, atol=1e-5, rtol=0)
    torch.testing.assert_close(model.image_features(some), expected, atol=1e-5, rtol=0)
    monkeypatch.setattr(type(model.image_tower), "channels_last_on", ("cuda",))
    model.to("cpu")
    assert not any(orders(model, some)[:2]) and torch.equal(features(model), before)


def test_patches_are_cut_from_pictures_plane_by_plane():
    some = pixels(32).contiguous(memory_format=torch.channels_last)
    assert orders(small(), some) == [False, False]


def test_patch_dropping_only_in_training_and_only_a_share():
    model = small()
    tower, x = model.image_tower, normalise(pixels(32), OPENAI_MEAN, OPENAI_STD)
    with torch.no_grad():
        full = tower(x)
        tower.patch_dropout = 0.5
        assert torch.equal(tower(x), full)  # evaluation
        tower.train()
        lengths = []
        handle = tower.vision_model.encoder.layers[0].register_forward_pre_hook(
            lambda _, args, kwargs: lengths.append((args or (kwargs.get("hidden_states"),))[0].shape[1]),
            with_kwargs=True,
        )
        torch.manual_seed(0)
        first, second = tower(x), tower(x)
        handle.remove()
        assert lengths == [1 + 8, 1 + 8] and not torch.allclose(first, second)  # 16 patches, drawn anew
        torch.manual_seed(0)
        assert torch.equal(tower(x), first)
        tower.patch_dropout = 1e-9  # keeps all of them: order does not matter to a transformer
        torch.testing.assert_close(tower(x), full, atol=1e-5, rtol=0)


def test_padding_does_not_change_a_text():
    model = small()
    ids, mask = model.tokenizer.pad(model.tokenizer.encode(["一只狗"]))
    longer, longer_mask = model.tokenizer.pad(model.tokenizer.encode(["一只狗"]), length=20)
    with torch.inference_mode():
        torch.testing.assert_close(
            model.text_features(ids, mask), model.text_features(longer, longer_mask), atol=1e-6, rtol=0
        )


def test_attention_is_torch_s_own_kernel():
    model = small()
    assert model.image_tower.vision_model.config._attn_implementation == "sdpa"
    assert model.text_tower.text_model.config._attn_implementation == "sdpa"


# ---- by import path -------------------------------------------------------------------------------------------------


def test_a_module_by_import_path():
    model, report = foreign()
    assert report.loaded == [("image tower", f"{HERE}:plain (import path)")]
    assert report.new == ["image_tower.visual_projection", "text_tower", "logit_scale"]
    assert (model.image_size, model.image_tower.output_dim) == (24, 32)
    out = model.image_features(pixels(24))
    assert out.shape == (3, 32)
    torch.testing.assert_close(out.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(model.image_tower.module.seen, (pixels(24) / 255 - 0.5) / 0.25)


def test_uint8_input_is_handed_on_as_it_is():
    model, _ = foreign("uint8")
    model.image_features(pixels(24))
    assert torch.equal(model.image_tower.module.seen, pixels(24))


def test_its_statistics_and_shared_weights_survive_a_checkpoint(tmp_path):
    model, _ = foreign()
    model.train().image_features(pixels(24))  # moves the statistics
    model.eval()
    save_checkpoint(model, tmp_path / "a", info={})
    back = load(tmp_path / "a", trust_import=True)
    inner = back.image_tower.module
    assert inner.norm.num_batches_tracked == 1 and inner.two.weight is inner.one.weight
    torch.testing.assert_close(features(back), features(model))
    assert json.loads((tmp_path / "a" / "config.json").read_text())["model_type"] == "cnclip_ft"
    again, report = build_start({"image": str(tmp_path / "a"), "text": TEXT}, trust_import=True)
    assert torch.equal(tensors(again)["module.norm.running_mean"], inner.norm.running_mean)
    assert report.loaded[0] == ("image tower and visual projection", str(tmp_path / "a"))


def test_a_checkpoint_whose_factory_is_gone(tmp_path):
    save_checkpoint(foreign()[0], tmp_path / "a", info={})
    path = tmp_path / "a" / "cnclip_ft.json"
    path.write_text(path.read_text(encoding="utf-8").replace(HERE, "no_such_package.towers"), encoding="utf-8")
    with pytest.raises(
        RequestError, match="no_such_package.towers:plain cannot be imported.*Install the package.*PYTHONPATH"
    ):
        load(tmp_path / "a", trust_import=True)


@pytest.mark.parametrize(
    "spec,message",
    [
        ("no_such_package:x", "cannot be imported"),
        (f"{HERE}:nothing", "has no attribute 'nothing'; .* look at the name behind the colon"),
        (f"{HERE}:not_a_module", "it is a str"),
        (f"{HERE}:lacking", "it lacks output_dim, image_size, mean, std"),
        (f"{HERE}:wrong_input", "input is 'float64'"),
        (f"{HERE}:failing", "failing: the factory failed \\(FileNotFoundError: weights.bin\\)"),
    ],
)
def test_what_the_protocol_refuses(spec, message):
    with pytest.raises(RequestError, match=message):
        build_start({"image": spec, "text": TEXT})


def test_a_module_that_breaks_its_word():
    model, _ = foreign("wrong_shape")
    with pytest.raises(RequestError, match=r"gave \[3, 12\] for 3 images; expected \[3, 13\]"):
        model.image_features(pixels(24))


def test_a_module_that_takes_pictures_of_any_size(tmp_path):
    """Another size changes no weight; a checkpoint of it remembers the size, and goes back."""
    model, _ = foreign("convolutional")
    picture = Image.effect_noise((90, 70), 60).convert("RGB")
    seen = model.image_tower.preprocessing.decode(picture).shape[-1]
    save_checkpoint(model, tmp_path / "a", info={})
    larger = load(tmp_path / "a", image_size=40, trust_import=True)
    assert (seen, larger.image_size, larger.image_tower.preprocessing.decode(picture).shape[-1]) == (24, 40, 40)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in larger.state_dict().items())
    save_checkpoint(larger, tmp_path / "b", info={})
    again = load(tmp_path / "b", trust_import=True)
    assert again.image_size == 40
    assert torch.equal(again.encode_images([picture]), larger.encode_images([picture]))
    back = load(tmp_path / "b", image_size=24, trust_import=True)
    assert back.image_size == 24 and torch.equal(back.encode_images([picture]), model.eval().encode_images([picture]))
    assert foreign("convolutional")[0].image_tower.describe() == back.image_tower.describe()
    with pytest.raises(RequestError, match="image_size is 4, expected 8 to"):
        load(tmp_path / "a", image_size=4, trust_import=True)
    assert (
        build_start({"image": str(tmp_path / "a"), "text": TEXT}, image_size=32, trust_import=True)[0].image_size == 32
    )


def test_settings_a_module_does_not_offer(tmp_path):
    with pytest.raises(RequestError, match="image_size 48: .* takes 24"):
        build_start({"image": f"{HERE}:plain", "text": TEXT}, image_size=48)
    model, _ = foreign()
    save_checkpoint(model, tmp_path / "a", info={})
    with pytest.raises(
        RequestError, match="image_size 48: .* takes 24: leave it out .model.image_size=null., or any_size = True"
    ):
        load(tmp_path / "a", image_size=48, trust_import=True)
    assert load(tmp_path / "a", image_size=24, trust_import=True).image_size == 24
    with pytest.raises(RequestError, match="no set_gradient_checkpointing"):
        model.set_gradient_checkpointing(True, True)
    model.set_gradient_checkpointing(False, True)
    asked = []
    model.image_tower.module.set_gradient_checkpointing = asked.append
    model.set_gradient_checkpointing(True, True)
    model.set_gradient_checkpointing(False, False)
    assert asked == [True, False]
