"""cn_clip's names: its published code runs with the import changed, and gives what the official package gives."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from cnclip_ft import clip
from cnclip_ft.models import hub
from cnclip_ft.models.checkpoints import save_checkpoint
from cnclip_ft.models.families.chinese_clip.catalog import ARCHITECTURES
from data_tools.errors import RequestError
from tests.families.cards import CARDS
from tests.models.helpers import VIT, official, small, tensors
from tests.official import requires_official, run_official

# The published introduction to Chinese-CLIP (its README, "API快速上手"), as it stands but for its comments.
INTRODUCTION = """
import torch
from PIL import Image

import cn_clip.clip as clip
from cn_clip.clip import load_from_name, available_models
print("Available models:", available_models())

device = "cuda" if torch.cuda.is_available() else "cpu"
model, preprocess = load_from_name("ViT-B-16", device=device, download_root='./')
model.eval()
image = preprocess(Image.open("examples/pokemon.jpeg")).unsqueeze(0).to(device)
text = clip.tokenize(["杰尼龟", "妙蛙种子", "小火龙", "皮卡丘"]).to(device)

with torch.no_grad():
    image_features = model.encode_image(image)
    text_features = model.encode_text(text)
    image_features /= image_features.norm(dim=-1, keepdim=True)
    text_features /= text_features.norm(dim=-1, keepdim=True)

    logits_per_image, logits_per_text = model.get_similarity(image, text)
    probs = logits_per_image.softmax(dim=-1).cpu().numpy()

print("Label probs:", probs)
"""
TEXTS = [
    "一只在雪地里奔跑的狗", "a Red CAR", "“引号”里的", "", "emoji 🐶🏳️‍🌈", "x" * 300, "很长" * 100, "Étude naïve", "全角ＡＢＣ１２３",
    "\t\n 空白 ", "。，！？「」", "mixed 中文 text-123 [CLS] [SEP]", "\u200b零宽", "龘靐齉", "3.14%", "ﬁne ﬂow",
]  # fmt: skip
TINY_TEXT = {"hidden": 64, "layers": 2, "heads": 1}  # heads are 64 wide, as the official code has them

OFFICIAL = """
import json, os
from pathlib import Path
import numpy as np
from PIL import Image
import cn_clip.clip as clip
import cn_clip.clip.utils as utils
from cn_clip.clip.model import CLIP

os.chdir(sys.argv[1])
utils.__file__ = os.path.abspath("utils.py")  # where it looks for configurations
utils._MODEL_INFO["ViT-B-16"]["input_resolution"] = 32
introduction = {}
exec(Path("introduction.py").read_text(encoding="utf-8"), introduction)
texts = json.loads(Path("texts.json").read_text(encoding="utf-8"))
model, preprocess = clip.load_from_name(
    "clip_cn_vit-b-16.pt", "cpu", vision_model_name="tiny", text_model_name="tiny-text", input_resolution=32)
model.eval()
pixels = torch.stack([preprocess(Image.open(f"{n}.png")) for n in range(6)])
out = {"pixels": pixels, "ids": clip.tokenize(texts), "short": clip.tokenize("一只在雪地里奔跑的狗", 8)}
with torch.no_grad():
    out |= {"image": model.encode_image(pixels), "text": model.encode_text(out["ids"]), "short_text": model.encode_text(out["short"])}
    out["images"], out["texts"], out["scale"] = model(pixels, out["ids"])
    out["logits"], out["transposed"] = model.get_similarity(pixels, out["ids"])
    other = clip.load(model, "cpu", clip_path="openai.pt", bert_path="bert.bin")
    out |= {"image2": other.encode_image(pixels), "text2": other.encode_text(out["ids"]), "scale2": other.logit_scale.exp()}
out |= {"probs": introduction["probs"], "example": introduction["image"]}
np.savez("official.npz", **{name: np.asarray(value) for name, value in out.items()})
print(json.dumps(clip.available_models()))
"""


def halves(model) -> dict[str, torch.Tensor]:
    """Its official tensors with 11 bits, as in released files: the official loader rounds to fp16."""
    return {
        name.removeprefix("module."): tensor.half().float() if tensor.is_floating_point() else tensor
        for name, tensor in official(model).items()
    }


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with a small model under the published name, pictures, and other weights to load."""
    tiny = dataclasses.replace(ARCHITECTURES["tiny"], name="ViT-B-16", hub="hub", file="clip_cn_vit-b-16.pt")
    monkeypatch.setattr(hub, "_download", lambda *_: pytest.fail("asked the hub"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").mkdir()
    for number, name in enumerate(["examples/pokemon.jpeg", *(f"{n}.png" for n in range(6))]):
        size = [(32, 32), (50, 40), (40, 90), (300, 200), (31, 33), (64, 64), (500, 97)][number]
        noise = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(noise).save(name)
    spec = VIT | {
        "image": {"kind": "vit", "hidden": 64, "layers": 2, "heads": 1, "patch": 8, "image_size": 32},
        "text": TINY_TEXT,
    }
    torch.save({"state_dict": {f"module.{name}": t for name, t in halves(small(spec)).items()}}, "clip_cn_vit-b-16.pt")
    other = halves(small(spec, seed=2))
    torch.save({n: t for n, t in other.items() if n.startswith("visual") or n == "logit_scale"}, "openai.pt")
    torch.save({n: t for n, t in other.items() if n.startswith("bert.")}, "bert.bin")
    configs = tmp_path / "model_configs"
    configs.mkdir()
    vision = {"embed_dim": 32, "image_resolution": 32, "vision_layers": 2, "vision_width": 64, "vision_patch_size": 8}
    text = {
        "vocab_size": 21128, "text_attention_probs_dropout_prob": 0.1, "text_hidden_act": "gelu", "text_hidden_dropout_prob": 0.1,
        "text_hidden_size": 64, "text_initializer_range": 0.02, "text_intermediate_size": 256, "text_max_position_embeddings": 512,
        "text_num_attention_heads": 1, "text_num_hidden_layers": 2, "text_type_vocab_size": 2,
    }  # fmt: skip
    for name, numbers in (
        ("tiny", vision),
        ("tiny-text", text),
        ("ViT-B-16", vision),
        ("RoBERTa-wwm-ext-base-chinese", text),
    ):
        (configs / f"{name}.json").write_text(json.dumps(numbers), encoding="utf-8")
    (tmp_path / "texts.json").write_text(json.dumps(TEXTS), encoding="utf-8")
    (tmp_path / "introduction.py").write_text(INTRODUCTION, encoding="utf-8")
    # One head of 64 for text: the catalogue's "tiny" has two.
    image, words = dataclasses.replace(tiny.image, heads=1), dataclasses.replace(tiny.text, heads=1)
    monkeypatch.setitem(ARCHITECTURES, "ViT-B-16", dataclasses.replace(tiny, image=image, text=words))
    return tmp_path


def introduce() -> dict:
    names: dict = {}
    exec(INTRODUCTION.replace("cn_clip.clip", "cnclip_ft.clip"), names)  # noqa: S102 - the text above
    return names


def test_the_introduction_runs_with_the_import_changed(folder, capsys):
    names = introduce()
    assert names["probs"].shape == (1, 4) and abs(names["probs"].sum() - 1) < 1e-6
    said = capsys.readouterr().out
    assert (
        "Available models: ['ViT-B-16', 'ViT-L-14', 'ViT-L-14-336', 'ViT-H-14', 'RN50']" in said
        and "Label probs: [[" in said
    )


@requires_official
def test_all_calls_give_what_the_official_package_gives(folder):
    said = run_official(OFFICIAL, folder).splitlines()[-1]
    theirs = dict(np.load(folder / "official.npz"))
    names = introduce()
    assert json.loads(said) == clip.available_models()
    model, preprocess = clip.load_from_name(
        "clip_cn_vit-b-16.pt", "cpu", vision_model_name="tiny", text_model_name="tiny-text", input_resolution=32
    )
    pixels = torch.stack([preprocess(Image.open(f"{n}.png")) for n in range(6)])
    difference = np.abs(pixels.numpy() - theirs["pixels"]) * np.array(preprocess.preprocessing.std).reshape(3, 1, 1)
    assert (
        difference.max() < 1.01 / 255 and np.abs(names["image"].numpy() - theirs["example"]).max() < 1e-6
    )  # 32 × 32 as it is
    ids = clip.tokenize(TEXTS)
    assert ids.dtype == torch.int64 and ids.shape == (len(TEXTS), 52) and (ids.numpy() == theirs["ids"]).all()
    assert (clip.tokenize(TEXTS[0], context_length=8).numpy() == theirs["short"]).all()
    pixels = torch.from_numpy(theirs["pixels"])
    with torch.no_grad():
        images, texts, scale = model(pixels, ids)
        logits, transposed = model.get_similarity(pixels, ids)
        ours = {
            "image": model.encode_image(pixels), "text": model.encode_text(ids), "images": images, "texts": texts,
            "short_text": model.encode_text(torch.from_numpy(theirs["short"])), "probs": names["probs"],
        }  # fmt: skip
        close(ours | {"scale": scale / 14}, theirs | {"scale": theirs["scale"] / 14})
        close(
            {"logits": logits / scale, "transposed": transposed / scale},
            {n: theirs[n] / theirs["scale"] for n in ("logits", "transposed")},
        )
        assert torch.equal(model(pixels, None), ours["image"]) and torch.equal(model(None, ids), ours["text"])
        other = clip.load(model, "cpu", clip_path="openai.pt", bert_path="bert.bin")
        close(
            {"image2": other.encode_image(pixels), "text2": other.encode_text(ids), "scale2": other.logit_scale.exp()},
            theirs,
        )
    assert (
        np.abs(theirs["image"] - theirs["image2"]).max() > 1e-2
        and np.abs(theirs["text"] - theirs["text2"]).max() > 1e-2
    )


def close(ours, theirs) -> None:
    for name, value in ours.items():
        difference = np.abs(np.asarray(value) - theirs[name]).max()
        assert difference < 1e-5, (name, difference)


def test_features_train_and_change_their_format(folder):
    model, preprocess = clip.load_from_name("ViT-B-16", device="cpu", download_root=folder)
    assert not model.training and "squash" in repr(preprocess)
    pixels = preprocess("0.png")[None]
    model.train()
    logits, _ = model.get_similarity(pixels, clip.tokenize("一只狗"))
    logits.sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "projection" in name or "scale" in name)
    model.eval().to(torch.float64)
    assert model.dtype == torch.float64 and model.encode_image(pixels).dtype == torch.float64


def test_any_checkpoint_and_its_own_tokenizer(folder):
    save_checkpoint(small(), folder / "ours", info={})
    model, _ = clip.load_from_name(folder / "ours", input_resolution=64)
    assert model.encoder.image_size == 64
    assert model.tokenize("“狗”").shape == (1, 52) and model.tokenize(["a", "b"], context_length=9).shape == (2, 9)
    assert model.tokenize("“狗”").tolist() == clip.tokenize('"狗"').tolist() != clip.tokenize("“狗”").tolist()


@pytest.mark.parametrize("name", ["clip", "siglip of version 2", "siglip2"])
def test_models_of_other_families(name, folder):
    """The same calls: scores are the library's, with the bias of a sigmoid model."""
    place = CARDS[name].write(folder / "other")
    model, preprocess = clip.load_from_name(place, "cpu")
    pictures = [preprocess(f"{n}.png") for n in range(3)]
    assert repr(preprocess).startswith("Preprocess(")
    texts = ["a dog", "两只猫"]
    with torch.no_grad():
        ids = model.tokenize(texts)
        assert ids.shape == (2, model.encoder.context_length)
        logits, transposed = model.get_similarity(torch.stack(pictures), ids)
        encoder = model.encoder
        cosines = encoder.encode_images([f"{n}.png" for n in range(3)]) @ encoder.encode_texts(texts).T
        expected = encoder.logit_scale.exp() * cosines + (0 if encoder.logit_bias is None else encoder.logit_bias)
    assert torch.equal(logits.T, transposed)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-5)
    if name != "siglip2":  # its pictures are not of one shape in the library
        theirs = transformers.AutoModel.from_pretrained(place).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(place)
        inputs = tokenizer(texts, padding="max_length", max_length=ids.shape[1], return_tensors="pt")
        with torch.no_grad():
            found = theirs(**inputs, pixel_values=torch.stack(pictures)).logits_per_image
        torch.testing.assert_close(logits, found, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", ["clip", "metaclip_2", "siglip of version 2"])
def test_chinese_clips_ids_are_refused_by_models_of_other_families(name, tmp_path):
    """Most of them are tokens of the other vocabulary too: the features would be those of other words."""
    model, _ = clip.load_from_name(CARDS[name].write(tmp_path / "other"), "cpu")
    for texts in ("狗", ["狗", "a dog", "", "狗" * 99]):
        with pytest.raises(RequestError, match=r"the ids are clip.tokenize's, .* model.tokenize\(texts\)"):
            model.encode_text(clip.tokenize(texts))
        assert torch.isfinite(model.encode_text(model.tokenize(texts))).all()
    with pytest.raises(RequestError, match="token 70000, but the text tower has"):
        model.encode_text(torch.tensor([[5, 70000]]))


@pytest.mark.parametrize(
    "given,what",
    [
        (torch.tensor([[5.0, 6.0]]), r"float32 \[1, 2\]"),
        (torch.tensor([[5, 6]], dtype=torch.uint8), r"uint8 \[1, 2\]"),
        (torch.tensor([5, 6]), r"int64 \[2\]"),
        (torch.tensor([]), r"float32 \[0\]"),
        (torch.zeros(1, 2, 3, dtype=torch.int64), r"int64 \[1, 2, 3\]"),
        (torch.zeros(2, 0, dtype=torch.int64), r"int64 \[2, 0\]"),
    ],
)
def test_what_is_no_table_of_ids_is_told(given, what):
    with pytest.raises(RequestError, match=rf"encode_text takes ids, .* found {what}; made by model.tokenize"):
        clip.CLIP(small()).encode_text(given)


def test_a_negative_id_is_told():
    with pytest.raises(RequestError, match="token -1, but the text tower has"):
        clip.CLIP(small()).encode_text(torch.tensor([[5, -1]]))


def test_no_texts_give_no_features():
    model = clip.CLIP(small())
    for ids in (torch.zeros(0, 52, dtype=torch.int64), torch.zeros(0, 0, dtype=torch.int64)):
        assert model.encode_text(ids).shape == (0, model.encoder.text_tower.output_dim)


def test_what_does_not_fit_is_told(folder):
    with pytest.raises(RequestError, match="ViT-XXL: no such file or folder, and no published name"):
        clip.load_from_name("ViT-XXL")
    with pytest.raises(
        RequestError, match="load puts weights into a model, found 'ViT-B-16'. To open a checkpoint: load_from_name"
    ):
        clip.load("ViT-B-16")
    model, _ = clip.load_from_name("ViT-B-16", "cpu", ".")
    with pytest.raises(RequestError, match="texts of 600 tokens, but the text tower has 512"):
        model.encode_text(clip.tokenize("狗", 600))
    with pytest.raises(
        RequestError, match="encode_text takes ids, an int64 or int32 tensor .* found str; .* model.tokenize"
    ):
        model.encode_text("狗")
    with pytest.raises(RequestError, match="encode_image takes a tensor .* found Image; .*preprocess"):
        model.encode_image(Image.new("RGB", (9, 9)))
    other = VIT | {"image": VIT["image"] | {"hidden": 128, "heads": 2}}
    torch.save({n: t for n, t in halves(small(other)).items() if n.startswith("visual")}, "wide.pt")
    before = tensors(model.encoder)
    with pytest.raises(RequestError, match=r"wide.pt: .* expected \["):
        clip.load(model, "cpu", clip_path="wide.pt")
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors(model.encoder).items())
