"""What a folder says is obeyed or refused: features equal those of transformers' own model and processor."""

from __future__ import annotations

import collections
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    BertTokenizer,
    ChineseCLIPConfig,
    ChineseCLIPModel,
    ChineseCLIPProcessor,
    ChineseCLIPTextConfig,
    ChineseCLIPVisionConfig,
)

try:
    from transformers import ChineseCLIPImageProcessorPil as ImageProcessor
except ImportError:  # before transformers 5 the one that needs no torchvision had the plain name
    from transformers import ChineseCLIPImageProcessor as ImageProcessor

from cnclip_ft.models.checkpoints import load, save_checkpoint
from cnclip_ft.models.families.chinese_clip.wordpiece import PACKAGED_VOCABULARY
from cnclip_ft.models.formats.cn_clip import to_official
from cnclip_ft.models.formats.image_half import read_image_half
from data_tools.errors import RequestError
from tests.models.helpers import VIT, equal, features, official, small, tensors

TEXTS = ["一只狗在雪地里奔跑", "A red CAR", "很长的句子" * 20, "猫"]
WORDS = [*"[PAD] [UNK] [CLS] [SEP] [MASK]".split(), *"一只狗在雪地里奔跑猫很长的句子", "a", "red", "car", "##s"]


def picture(width=40, height=28):
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x * 5 % 256, y * 7 % 256, (x + y) * 3 % 256], 2).astype(np.uint8))


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A folder saved by the installed transformers alone: another mean, vocabulary and length than ours."""
    folder = tmp_path_factory.mktemp("theirs")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96}
    text = ChineseCLIPTextConfig(**sizes, vocab_size=len(WORDS), layer_norm_eps=1e-6, hidden_act="gelu_new")
    vision = ChineseCLIPVisionConfig(**sizes, image_size=32, patch_size=8, hidden_act="gelu", layer_norm_eps=1e-4)
    config = ChineseCLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=24)
    ChineseCLIPModel(config).eval().save_pretrained(folder)
    images = ImageProcessor(
        size={"height": 32, "width": 32}, do_center_crop=False, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4]
    )
    (folder / "words").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    tokens = BertTokenizer(str(folder / "words"), model_max_length=30)
    (folder / "words").unlink()
    ChineseCLIPProcessor(image_processor=images, tokenizer=tokens).save_pretrained(folder)
    return folder


def edited(folder, target, name, change):
    """A copy in which `change` was applied to one JSON file."""
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    content = json.loads((target / name).read_text(encoding="utf-8"))
    change(content)
    (target / name).write_text(json.dumps(content), encoding="utf-8")
    return target


def test_features_are_those_of_transformers(theirs):
    model, processor = ChineseCLIPModel.from_pretrained(theirs).eval(), ChineseCLIPProcessor.from_pretrained(theirs)
    ours = load(theirs)
    assert ours.context_length == 30 and ours.tokenizer.vocab_size == len(WORDS)
    batch = processor(text=TEXTS, images=[picture()], return_tensors="pt", padding=True, truncation=True)
    with torch.inference_mode():
        image = model.get_image_features(pixel_values=batch.pixel_values).pooler_output
        text = model.get_text_features(input_ids=batch.input_ids, attention_mask=batch.attention_mask).pooler_output
    unit = torch.nn.functional.normalize
    torch.testing.assert_close(ours.encode_texts(TEXTS), unit(text, dim=1), atol=1e-6, rtol=0)
    torch.testing.assert_close(ours.encode_images([picture()]), unit(image, dim=1), atol=2e-3, rtol=0)  # resize: 1/255


def test_and_what_is_saved_of_it_is_the_same(theirs, tmp_path):
    ours = load(theirs)
    save_checkpoint(ours, tmp_path / "a", info={})
    back = load(tmp_path / "a")
    assert back.context_length == 30 and torch.equal(features(back), features(ours))


CROPPED = {"do_center_crop": True, "size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}


@pytest.mark.parametrize("rule", [CROPPED, {"resample": 2}, CROPPED | {"resample": 2}])
def test_pictures_are_cropped_and_resized_as_the_folder_says(theirs, tmp_path, rule):
    folder = edited(theirs, tmp_path / "a", "processor_config.json", lambda c: c["image_processor"].update(rule))
    wanted = ImageProcessor(
        **json.loads((folder / "processor_config.json").read_text(encoding="utf-8"))["image_processor"]
    )
    save_checkpoint(load(folder), tmp_path / "b", info={})
    for place in (folder, tmp_path / "b"):  # and what is saved of it says the same
        way = load(place).image_tower.preprocessing
        pixels = way.normalise(way.decode(picture())[None])
        theirs_pixels = torch.as_tensor(np.array(wanted(picture())["pixel_values"][0]))
        assert (pixels[0] - theirs_pixels).abs().max() <= 1.01 / 255 / 0.2
    again = ImageProcessor.from_pretrained(tmp_path / "b")
    assert np.allclose(again(picture())["pixel_values"][0], wanted(picture())["pixel_values"][0])


@pytest.mark.parametrize(
    "name,change,key",
    [
        ("processor_config.json", lambda c: c["image_processor"].update(do_center_crop=True), "do_center_crop"),
        ("processor_config.json", lambda c: c["image_processor"].update(size={"shortest_edge": 32}), "size"),
        ("processor_config.json", lambda c: c["image_processor"].update(size={"height": 48, "width": 48}), "size"),
        ("processor_config.json", lambda c: c["image_processor"].update(resample=1), "resample"),
        ("processor_config.json", lambda c: c["image_processor"].update(rescale_factor=1 / 127.5), "rescale_factor"),
        ("processor_config.json", lambda c: c["image_processor"].update(do_resize=False), "do_resize"),
        ("processor_config.json", lambda c: c["image_processor"].update(do_pad=True), "do_pad"),
        ("processor_config.json", lambda c: c["image_processor"].update(image_mean=[1, 2]), "image_mean"),
        ("processor_config.json", lambda c: c["image_processor"].update(image_std="x"), "image_std"),
        ("tokenizer_config.json", lambda c: c.update(do_lower_case=False), "do_lower_case"),
        ("tokenizer_config.json", lambda c: c.update(strip_accents=False), "strip_accents"),
        ("tokenizer_config.json", lambda c: c.update(tokenizer_class="XLMRobertaTokenizer"), "tokenizer_class"),
        ("tokenizer_config.json", lambda c: c.update(truncation_side="left"), "truncation_side"),
        ("tokenizer_config.json", lambda c: c.update(cls_token="<s>"), "cls_token"),
        ("tokenizer_config.json", lambda c: c.update(model_max_length="x"), "model_max_length"),
        ("tokenizer.json", lambda c: c["model"].update(type="BPE"), "model"),
        ("tokenizer.json", lambda c: c["normalizer"].update(lowercase=False), "lowercase"),
        ("tokenizer.json", lambda c: c["added_tokens"].append({"id": 99, "content": "<new>"}), "<new>"),
        ("tokenizer.json", lambda c: c["model"]["vocab"].update({"x": 7}), "numbered from 0"),
        (
            "config.json",
            lambda c: c["text_config"].update(position_embedding_type="relative_key"),
            "position_embedding_type",
        ),
        ("config.json", lambda c: c["vision_config"].update(num_channels=4), "num_channels"),
        ("config.json", lambda c: c["vision_config"].update(use_rope=True), "vision_config.use_rope"),
        ("config.json", lambda c: c.update(quantization_config={"bits": 4}), "quantization_config"),
        ("config.json", lambda c: c["text_config"].update(hidden_size="x"), "text_config.hidden_size is 'x'"),
        ("config.json", lambda c: c.update(vision_config=[1]), "vision_config is a list"),
        ("config.json", lambda c: c["text_config"].update(vocab_size=-3), "vocab_size is -3"),
        ("config.json", lambda c: c["vision_config"].update(num_hidden_layers=5), "5 image layers, 2 in the weights"),
    ],
)
def test_what_cannot_be_obeyed_is_refused_by_its_key(theirs, tmp_path, name, change, key):
    folder = edited(theirs, tmp_path / "a", name, change)
    with pytest.raises(RequestError, match=key.replace("[", "\\[")) as caught:
        load(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    "name,change,seen",
    [
        (
            "tokenizer.json",
            lambda c: c.update(
                truncation={"max_length": 12, "direction": "Right", "strategy": "LongestFirst", "stride": 0}
            ),
            lambda m: m.context_length == 12,
        ),
        ("tokenizer_config.json", lambda c: c.update(model_max_length=10**30), lambda m: m.context_length == 52),
        (
            "processor_config.json",
            lambda c: c["image_processor"].update(do_normalize=False),
            lambda m: m.image_tower.preprocessing.mean == (0, 0, 0),
        ),
        ("config.json", lambda c: c["vision_config"].update(image_size=[32, 32]), lambda m: m.image_size == 32),
        (
            "config.json",
            lambda c: c.update(text_config_dict={"layer_norm_eps": 1e-3}),
            lambda m: m.text_tower.text_model.config.layer_norm_eps == 1e-3,
        ),
        (
            "config.json",
            lambda c: c["text_config"].update(length_penalty=1.0, top_k=50, id2label={"0": "x"}),
            lambda m: True,
        ),
    ],
)
def test_what_is_obeyed(theirs, tmp_path, name, change, seen):
    assert seen(load(edited(theirs, tmp_path / "a", name, change)))


def test_two_vocabularies_that_differ(theirs, tmp_path):
    folder = edited(theirs, tmp_path / "a", "tokenizer.json", lambda c: None)
    (folder / "vocab.txt").write_bytes(PACKAGED_VOCABULARY.read_bytes())
    with pytest.raises(RequestError, match="tokenizer.json and vocab.txt hold different vocabularies"):
        load(folder)


# ---- open_clip ------------------------------------------------------------------------------------------------------

VISION = {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8}


def open_clip(folder, vision=None, model=None, pictures=None):
    folder.mkdir(exist_ok=True)
    state = to_official(tensors(small()))
    kept = {name: t.contiguous() for name, t in state.items() if name.startswith("visual.") or name == "logit_scale"}
    save_file(kept | {"token_embedding.weight": torch.zeros(9, 8)}, folder / "open_clip_model.safetensors")
    model = {"embed_dim": 32, "vision_cfg": VISION | (vision or {}), "text_cfg": {"width": 8}} | (model or {})
    content = {"model_cfg": model, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3} | (pictures or {})}
    (folder / "open_clip_config.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def test_open_clip_keys_are_obeyed(tmp_path):
    vision = {"norm_kwargs": {"eps": 1e-6}, "pool_type": "tok", "final_ln_after_pool": True, "patch_dropout": 0.5}
    half = read_image_half(open_clip(tmp_path / "a", vision, {"quick_gelu": True}, {"interpolation": "bilinear"}))
    wanted = {"layer_norm_eps": 1e-6, "num_attention_heads": 2, "hidden_act": "quick_gelu", "mean": [0.5] * 3}
    wanted |= {"fit": "crop_even", "resample": "bilinear"}
    assert half.numbers | wanted == half.numbers and half.notes == []


@pytest.mark.parametrize(
    "vision,more,key",
    [
        ({"pool_type": "avg"}, {}, "vision_cfg.pool_type"),
        ({"attentional_pool": True}, {}, "attentional_pool"),
        ({"no_ln_pre": True}, {}, "no_ln_pre"),
        ({"ls_init_value": 0.1}, {}, "ls_init_value"),
        ({"qk_norm": True}, {}, "qk_norm"),
        ({"pos_embed_type": "sin_cos_2d"}, {}, "pos_embed_type"),
        ({"act_kwargs": {"approximate": "tanh"}}, {}, "act_kwargs"),
        ({"layers": 3}, {}, "vision_cfg.layers is 3"),
        ({"head_width": 48}, {}, "head_width"),
        ({"norm_kwargs": {"eps": "x"}}, {}, "norm_kwargs"),
        ({}, {"pictures": {"interpolation": "nearest"}}, "interpolation"),
        ({}, {"pictures": {"resize_mode": "longest"}}, "resize_mode"),
        ({}, {"pictures": {"mean": [1]}}, "preprocess_cfg.mean"),
        ({}, {"model": {"vision_cfg": [1]}}, "vision_cfg"),
        ({}, {"model": {"new_thing": 1}}, "model_cfg.new_thing"),
    ],
)
def test_open_clip_keys_that_cannot_be_obeyed(tmp_path, vision, more, key):
    with pytest.raises(RequestError, match=key):
        read_image_half(open_clip(tmp_path / "a", vision, **more))


# ---- names of other trainers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "model.", "model._orig_mod.", "net.module."]
)
@pytest.mark.parametrize("kind", ["official", "transformers"])
def test_prefixes_of_wrappers_are_taken_off(tmp_path, prefix, kind):
    model = small()
    plain = tensors(model) if kind == "transformers" else to_official(tensors(model))
    torch.save({"state_dict": {prefix + name: t for name, t in plain.items()}}, tmp_path / "x.pt")
    assert equal(tensors(load(tmp_path / "x.pt")), tensors(model))
    save_file({prefix + name: t.contiguous() for name, t in plain.items()}, tmp_path / "x.safetensors")
    assert equal(tensors(load(tmp_path / "x.safetensors")), tensors(model))


def test_what_was_taken_off_and_left_is_said(tmp_path, caplog):
    from cnclip_ft.models.start import build_start

    state = {f"model.{name.removeprefix('module.')}": t for name, t in official(small()).items()}
    torch.save({"state_dict": state | {"loss.margin": torch.ones(1)}, "epoch": 3}, tmp_path / "x.ckpt")
    _, report = build_start(str(tmp_path / "x.ckpt"))
    assert "the prefix model. of a wrapper was taken off" in report.changed[0] and "loss.margin" in report.changed[1]
    assert report.left_over == ["loss.margin"]
    load(tmp_path / "x.ckpt")
    assert "the prefix model." in caplog.text


@pytest.mark.parametrize("within", ["visual._orig_mod.", "visual._fsdp_wrapped_module."])
def test_one_wrapped_tower(tmp_path, within):
    state = {name.replace("module.visual.", within): t for name, t in official(small()).items()}
    torch.save({"model": state}, tmp_path / "x.pt")
    assert equal(tensors(load(tmp_path / "x.pt")), tensors(small()))


def test_where_two_models_could_be_meant(tmp_path):
    state = {name.removeprefix("module."): t for name, t in official(small()).items()}
    both = {f"{word}.{name}": t for word in ("student", "teacher") for name, t in state.items()}
    for content, message in (
        (both, "two models are in it.*'student.' and 'teacher.'"),
        ({"model": state, "state_dict": state}, "two state dicts"),
        (
            {f"backbone.{name}": t for name, t in state.items()},
            "begin with 'backbone.', a prefix no wrapper known here",
        ),
    ):
        torch.save(content, tmp_path / "x.pt")
        with pytest.raises(RequestError, match=message):
            load(tmp_path / "x.pt")


@pytest.mark.parametrize(
    "beside",
    [
        {"rng": torch.zeros(8, dtype=torch.uint8), "loss": torch.tensor(1.5)},
        {"seen": collections.defaultdict(int, a=1)},
        {"seen": collections.defaultdict(float, a=1.0)},
    ],
)
@pytest.mark.parametrize("place", ["state_dict", "model_ema"])
def test_what_stands_beside_the_weights_is_left(tmp_path, place, beside):
    torch.save({**beside, place: official(small()), "epoch": 3}, tmp_path / "x.pt")
    assert equal(tensors(load(tmp_path / "x.pt")), tensors(small()))


@pytest.mark.parametrize("kind", [torch.int32, torch.complex64, torch.bool])
def test_weights_that_are_no_fractions(tmp_path, kind):
    name = "module.text_projection"
    torch.save({"state_dict": official(small()) | {name: official(small())[name].to(kind)}}, tmp_path / "x.pt")
    with pytest.raises(RequestError, match=f"type {str(kind)[6:]}, expected float32"):
        load(tmp_path / "x.pt")


@pytest.mark.parametrize("name", ["x" * 5000, "~nobody-of-this-name/x", "a\0b"])
def test_names_no_file_can_have(name):
    with pytest.raises(RequestError, match="no such file") as said:
        load(name)
    assert len(str(said.value)) < 400


def test_averaged_weights(tmp_path, caplog):
    model, other = official(small()), official(small(seed=2))
    torch.save({"state_dict": model, "state_dict_ema": other}, tmp_path / "x.pt")
    assert equal(tensors(load(tmp_path / "x.pt")), tensors(small())) and "'state_dict_ema' left" in caplog.text
    torch.save({"model_ema": other}, tmp_path / "y.pt")
    assert equal(tensors(load(tmp_path / "y.pt")), tensors(small(seed=2)))


def test_a_transformers_folder_of_a_compiled_model(tmp_path):
    save_checkpoint(small(VIT), tmp_path / "a", info={})
    (tmp_path / "a" / "cnclip_ft.json").unlink()
    weights = load_file(tmp_path / "a" / "model.safetensors")
    save_file({f"_orig_mod.{name}": t for name, t in weights.items()}, tmp_path / "a" / "model.safetensors")
    assert equal(tensors(load(tmp_path / "a")), tensors(small()))
