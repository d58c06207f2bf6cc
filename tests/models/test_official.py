"""Official checkpoints in and out, against the real package where it is at hand."""

from __future__ import annotations

import json
import pickle

import pytest
import torch

import cnclip_ft
from cnclip_ft.export.cn_clip import export_cn_clip
from cnclip_ft.export.huggingface import export_huggingface
from cnclip_ft.models.checkpoints import file_name, load, save_checkpoint
from cnclip_ft.models.official import to_official, to_ours
from cnclip_ft.models.start import build_start
from data_tools.errors import RequestError
from tests.official import requires_official, run_official

SMALL = {"image": {"kind": "vit", "hidden": 64, "layers": 2, "heads": 1, "patch": 8, "image_size": 32},
         "text": {"hidden": 64, "layers": 2, "heads": 1}, "projection": 32}  # fmt: skip
RESNET = SMALL | {"image": {"kind": "resnet", "layers": [1, 1, 1, 1], "width": 8, "heads": 4, "image_size": 64}}


def tensors(model):
    return {file_name(name): tensor for name, tensor in model.state_dict().items()}


def small(spec=SMALL):
    model = build_start(spec, seed=1)[0]
    return model.eval()


@pytest.mark.parametrize("spec", [SMALL, RESNET])
def test_names_there_and_back_are_bit_equal(spec):
    ours = tensors(small(spec))
    back = to_ours(to_official(ours))
    assert back.keys() == ours.keys() and all(torch.equal(back[name], ours[name].float()) for name in ours)


@pytest.mark.parametrize("spec", [SMALL, RESNET])
def test_round_trip_through_every_format(spec, tmp_path):
    model = small(spec)
    save_checkpoint(model, tmp_path / "a", info={})
    assert export_cn_clip(model, tmp_path / "b.pt", tmp_path / "a") == 0
    last = load(tmp_path / "b.pt")
    if spec is SMALL:
        assert export_huggingface(last, tmp_path / "c", tmp_path / "b.pt") < 1e-6
        (tmp_path / "c" / "cnclip_ft.json").unlink()  # as a stranger's folder
        last = load(tmp_path / "c")
    assert export_cn_clip(last, tmp_path / "d.pt", tmp_path / "c") == 0
    first, final = (torch.load(tmp_path / name, weights_only=True)["state_dict"] for name in ("b.pt", "d.pt"))
    assert first.keys() == final.keys() and all(torch.equal(first[key], final[key]) for key in first)


def test_fp16_without_prefix_and_with_flash_attention_names(tmp_path):
    model = small()
    state = to_official(tensors(model))
    flash = {}
    for name, tensor in state.items():
        name = name.replace("attn.in_proj_", "attn.Wqkv.") if name.startswith("visual.") else name
        if ".self.query." in name:
            parts = [state[name.replace("query", which)] for which in ("query", "key", "value")]
            flash[name.replace("query", "Wqkv")] = torch.cat(parts).half()
        elif ".self.key." not in name and ".self.value." not in name:
            flash[name.replace("attention.output.dense", "attention.self.out_proj")] = tensor.half()
    flash["bert.pooler.dense.weight"] = torch.zeros(64, 64)
    torch.save({"state_dict": flash}, tmp_path / "flash.pt")
    loaded = load(tmp_path / "flash.pt")
    for name, tensor in tensors(loaded).items():
        torch.testing.assert_close(tensor, tensors(model)[name].half().float(), atol=0, rtol=0)


def test_published_sizes_are_recognised_from_their_tensors():
    from cnclip_ft.models.catalog import ARCHITECTURES
    from cnclip_ft.models.checkpoints import _description, recognise
    from cnclip_ft.models.towers import ResNetTower, RobertaTower, ViTTower

    for name, architecture in ARCHITECTURES.items():
        if architecture.hub is None:
            continue
        with torch.device("meta"):
            make = ResNetTower if architecture.image.kind == "resnet" else ViTTower.make
            towers = (make(architecture.image, architecture.projection), RobertaTower.make(architecture.text, architecture.projection))
        shapes = {key: value for tower in towers for key, value in tower.state_dict().items()}
        assert recognise(shapes).name == name
        count = 1 + sum(p.numel() for tower in towers for p in tower.parameters())
        if architecture.parameters:
            assert count == pytest.approx(architecture.parameters, rel=1e-3)
        assert _description(architecture)["projection"] == architecture.projection


def test_another_resolution_resizes_once_and_says_so(tmp_path, capsys):
    save_checkpoint(small(), tmp_path / "a", info={})
    model = load(tmp_path / "a", image_size=64)
    assert model.image_size == 64 and "position embeddings resized" in capsys.readouterr().out
    assert model.encode_images([__import__("PIL.Image", fromlist=["Image"]).new("RGB", (9, 9))]).shape == (1, 32)
    with pytest.raises(RequestError, match="multiple of its patch"):
        load(tmp_path / "a", image_size=65)


class _Bomb:
    def __reduce__(self):
        return print, ("executed",)


@pytest.mark.parametrize("kind", ["text", "truncated", "code", "wrong", "missing", "extra", "none", "name"])
def test_wrong_files_are_refused_in_one_sentence_and_nothing_runs(kind, tmp_path, capsys, monkeypatch):
    path = tmp_path / "x.pt"
    state = {f"module.{name}": tensor for name, tensor in to_official(tensors(small())).items()}
    expected = {"text": "neither a safetensors nor a torch", "truncated": "torn", "code": "not executed", "wrong": "not a Chinese CLIP",
                "missing": "incomplete|missing", "extra": "no Chinese CLIP", "none": "neither a checkpoint", "name": "CNCLIP_FT_MODELS"}[kind]
    if kind == "text":
        path.write_text("hello, this is no checkpoint", encoding="utf-8")
    elif kind == "truncated":
        torch.save({"state_dict": state}, path)
        path.write_bytes(path.read_bytes()[:5000])
    elif kind == "code":
        path.write_bytes(pickle.dumps({"state_dict": _Bomb()}))
    elif kind == "wrong":
        torch.save({"state_dict": {"a": torch.zeros(2)}}, path)
    elif kind == "missing":
        state.pop("module.visual.ln_pre.weight")
        torch.save({"state_dict": state}, path)
    elif kind == "extra":
        torch.save({"state_dict": state | {"module.visual.more": torch.zeros(2)}}, path)
    elif kind == "name":
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        path = "ViT-L-14"
    with pytest.raises(RequestError, match=expected) as caught:
        cnclip_ft.load(path)
    assert "executed\n" not in capsys.readouterr().out and str(path) in str(caught.value)


OFFICIAL = """
import json, numpy as np
import cn_clip.clip as clip
from cn_clip.clip.utils import load_from_name
from cn_clip.clip.model import CLIP
torch.manual_seed(0)
if sys.argv[1] == "make":
    vision, text = json.loads(sys.argv[3]), json.loads(sys.argv[4])
    model = CLIP(**vision, **text).eval()
    # what a trained model has: statistics that are not the initial ones, projections that are not zero
    for name, tensor in model.state_dict().items():
        if tensor.dtype.is_floating_point:
            tensor.copy_(torch.rand_like(tensor) + 0.5 if "running_var" in name or "bn" in name and name.endswith("weight") else torch.randn_like(tensor) * 0.02)
            if "ln_" in name and name.endswith("weight") or "LayerNorm.weight" in name: tensor.fill_(1.0)
    torch.save({"epoch": 1, "step": 1, "name": "x", "state_dict": {"module." + k: v for k, v in model.state_dict().items()}}, sys.argv[2])
else:
    names = dict(vision_model_name=sys.argv[4], text_model_name=sys.argv[5], input_resolution=int(sys.argv[6]))
    model, _ = load_from_name(sys.argv[2], device="cpu", **names)
model = model.float().eval()
pixels = torch.from_numpy(np.load(sys.argv[-2]))
with torch.no_grad():
    image = model.encode_image(pixels)
    text = model.encode_text(clip.tokenize(["一只在雪地里奔跑的狗", "a red car"]))
np.savez(sys.argv[-1], image=(image / image.norm(dim=1, keepdim=True)).numpy(), text=(text / text.norm(dim=1, keepdim=True)).numpy())
"""


def vision_of(architecture, layers):
    image = architecture.image
    if image.kind == "resnet":
        return {"embed_dim": architecture.projection, "image_resolution": 224, "vision_layers": list(image.layers), "vision_width": 64, "vision_patch_size": None}
    head = {"vision_head_width": image.hidden // image.heads}
    return {"embed_dim": architecture.projection, "image_resolution": image.image_size, "vision_layers": layers or image.layers,
            "vision_width": image.hidden, "vision_patch_size": image.patch, **head}


def text_of(architecture, layers):
    text = architecture.text
    return {"vocab_size": text.vocabulary, "text_attention_probs_dropout_prob": 0.1, "text_hidden_act": "gelu", "text_hidden_dropout_prob": 0.1,
            "text_hidden_size": text.hidden, "text_initializer_range": 0.02, "text_intermediate_size": 4 * text.hidden,
            "text_max_position_embeddings": 512, "text_num_attention_heads": text.heads, "text_num_hidden_layers": layers or text.layers,
            "text_type_vocab_size": 2}


@requires_official
@pytest.mark.parametrize("name,layers", [
    pytest.param("RN50", None, marks=pytest.mark.slow), pytest.param("ViT-B-16", None, marks=pytest.mark.slow),
    ("ViT-B-16", 1), ("ViT-L-14", 2), ("ViT-L-14-336", 2), ("ViT-H-14", 2),
])
def test_features_equal_those_of_the_official_package(name, layers, tmp_path):
    import numpy as np

    from cnclip_ft.data.images import OPENAI_MEAN, OPENAI_STD, normalise
    from cnclip_ft.models.catalog import ARCHITECTURES

    architecture = ARCHITECTURES[name]
    size = architecture.image.image_size
    pixels = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "pixels.npy", normalise(pixels, OPENAI_MEAN, OPENAI_STD).numpy())
    run_official(OFFICIAL, "make", tmp_path / "x.pt", json.dumps(vision_of(architecture, layers)), json.dumps(text_of(architecture, layers)),
                 tmp_path / "pixels.npy", tmp_path / "theirs.npz")
    model = load(tmp_path / "x.pt")
    assert layers or model.architecture.name == name
    ours = {"image": model.image_features(pixels), "text": model.encode_texts(["一只在雪地里奔跑的狗", "a red car"])}
    theirs = np.load(tmp_path / "theirs.npz")
    for side, features in ours.items():
        assert np.abs(features.detach().numpy() - theirs[side]).max() < 1e-4, side
    if layers is None:  # and back: the official loader takes what we write
        export_cn_clip(model, tmp_path / "y.pt", tmp_path / "x.pt")
        text = "RBT3-chinese" if name == "RN50" else "RoBERTa-wwm-ext-base-chinese"
        run_official(OFFICIAL, "load", tmp_path / "y.pt", "-", name, text, str(size), tmp_path / "pixels.npy", tmp_path / "again.npz")
        again = np.load(tmp_path / "again.npz")
        for side in ours:
            assert np.abs(again[side] - theirs[side]).max() < 1e-4, side
