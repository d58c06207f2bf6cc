"""Exports: refused early, checked against the source, put in place only when they agree."""

from __future__ import annotations

import json
import os

import pytest
import torch
from huggingface_hub import ModelCard

from cnclip_ft.export import cn_clip, run
from cnclip_ft.export.card import hub_metadata
from cnclip_ft.export.run import export_checkpoint
from cnclip_ft.models.checkpoints import load, read_info, save_checkpoint
from cnclip_ft.models.start import build_start
from data_tools.errors import RequestError, UserError
from tests.models.helpers import RESNET, TEXT, VIT, equal, features, official, small, tensors


@pytest.fixture
def checkpoint(tmp_path):
    save_checkpoint(small(), tmp_path / "a", info={"epoch": 3, "step": 70, "scores": {"mean_recall": 50.0}})
    return tmp_path / "a"


def test_huggingface_is_complete_and_keeps_the_history(checkpoint, tmp_path):
    done = export_checkpoint(checkpoint, "huggingface", tmp_path / "hf")
    assert done.difference < 1e-6 and "ChineseCLIPProcessor" in done.advice
    files = {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.txt",
        "cnclip_ft.json",
        "README.md",
    }
    assert set(os.listdir(tmp_path / "hf")) == files
    processor = json.loads((tmp_path / "hf" / "preprocessor_config.json").read_text())
    assert (
        processor["size"] == {"height": 32, "width": 32}
        and not processor["do_center_crop"]
        and processor["resample"] == 3
    )
    info = read_info(tmp_path / "hf")
    assert info["scores"] == {"mean_recall": 50.0} and info["exported_from"] == "a"
    assert sorted(os.listdir(tmp_path)) == ["a", "hf"]


def test_cn_clip_has_what_both_official_loaders_ask_for(checkpoint, tmp_path):
    done = export_checkpoint(checkpoint, "cn_clip", tmp_path / "x.pt")
    assert done.difference < 1e-6
    content = torch.load(tmp_path / "x.pt", weights_only=True)
    assert (content["epoch"], content["step"], content["name"]) == (3, 70, "a")
    assert equal(content["state_dict"], official(small()))
    assert all(name.startswith("module.") for name in content["state_dict"])


def test_a_published_size_comes_with_the_call_that_reads_it():
    architecture = build_start({"architecture": "tiny"})[0]
    from cnclip_ft.models.families.chinese_clip.catalog import ARCHITECTURES

    architecture.architecture = ARCHITECTURES["ViT-B-16"]
    (
        architecture.text_tower.text_model.config.hidden_size,
        architecture.text_tower.text_model.config.num_hidden_layers,
    ) = 768, 12
    said = cn_clip.advice(architecture, "x.pt")
    assert 'load_from_name("x.pt", vision_model_name="ViT-B-16", text_model_name="RoBERTa-wwm-ext-base-chinese"' in said


def test_files_as_sources(tmp_path):
    torch.save({"state_dict": official(small(RESNET))}, tmp_path / "x.pt")
    export_checkpoint(tmp_path / "x.pt", "cn_clip", tmp_path / "y.pt")
    assert equal(tensors(load(tmp_path / "y.pt")), tensors(small(RESNET)))


@pytest.mark.parametrize("to", ["huggingface", "cn_clip"])
def test_half_precision_is_bounded_otherwise(checkpoint, tmp_path, to):
    done = export_checkpoint(checkpoint, to, tmp_path / "half", dtype="float16")
    assert 0 < done.difference < 2e-2
    back = load(tmp_path / "half")
    assert equal(tensors(back), {name: t.half().float() for name, t in tensors(small()).items()})
    if to == "huggingface":
        assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "float16"
    else:
        state = torch.load(tmp_path / "half", weights_only=True)["state_dict"]
        assert {t.dtype for t in state.values()} == {torch.float16}


@pytest.mark.parametrize("to", ["huggingface", "cn_clip"])
def test_an_export_that_differs_is_not_kept(checkpoint, tmp_path, to, monkeypatch):
    writer = __import__(run.FORMATS[to], fromlist=["write"])
    write = writer.write

    def wrong(model, target, order):
        with torch.no_grad():
            model = load(checkpoint)
            model.text_tower.text_projection.weight[0] += 0.1
        write(model, target, order)

    monkeypatch.setattr(writer, "write", wrong)
    with pytest.raises(UserError, match=r"differ from the source by .* \(limit 0.0001\); it was not kept"):
        export_checkpoint(checkpoint, to, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["a"]


def test_numbers_that_are_none_fail_the_check(checkpoint, tmp_path, monkeypatch):
    read = cn_clip.read_features
    monkeypatch.setattr(cn_clip, "read_features", lambda *a: (read(*a)[0], read(*a)[1] * float("nan")))
    with pytest.raises(UserError, match="differ from the source by nan"):
        export_checkpoint(checkpoint, "cn_clip", tmp_path / "x.pt")


def test_what_is_there_is_kept(checkpoint, tmp_path, monkeypatch):
    export_checkpoint(checkpoint, "huggingface", tmp_path / "hf")
    with pytest.raises(RequestError, match="is there already"):
        export_checkpoint(checkpoint, "huggingface", tmp_path / "hf")
    save_checkpoint(small(seed=2), tmp_path / "b", info={})
    export_checkpoint(tmp_path / "b", "huggingface", tmp_path / "hf", overwrite=True)
    assert equal(tensors(load(tmp_path / "hf")), tensors(small(seed=2)))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x", encoding="utf-8")
    with pytest.raises(RequestError, match="something else than a model"):
        export_checkpoint(checkpoint, "huggingface", tmp_path / "mine", overwrite=True)
    assert os.listdir(tmp_path / "mine") == ["thesis.txt"]
    monkeypatch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(OSError("No space left on device")))
    with pytest.raises(UserError, match="could not be written.*No space left"):
        export_checkpoint(checkpoint, "cn_clip", tmp_path / "hf", overwrite=True)
    assert equal(tensors(load(tmp_path / "hf")), tensors(small(seed=2)))


FOREIGN = {"image": "tests.models.tower_fixture:plain", "text": TEXT}


@pytest.mark.parametrize(
    "spec,to,message",
    [
        (RESNET, "huggingface", "a ResNet and a cls-pooled RoBERTa.*--to cn_clip"),
        (FOREIGN, "huggingface", "a module by import path"),
        (VIT | {"pooling": "mean"}, "huggingface", "mean-pooled"),
        (FOREIGN, "cn_clip", "its image tower is tests.models.tower_fixture:plain"),
        (VIT | {"pooling": "mean"}, "cn_clip", "its texts are mean-pooled"),
        (RESNET | {"image": RESNET["image"] | {"layers": [1, 1]}}, "cn_clip", "not four stages"),
        (VIT | {"image": VIT["image"] | {"intermediate": 100}}, "cn_clip", "not four times as wide"),
    ],
)
def test_towers_a_format_has_no_place_for(spec, to, message, tmp_path):
    save_checkpoint(build_start(spec)[0], tmp_path / "a", info={})
    with pytest.raises(RequestError, match=message):
        export_checkpoint(tmp_path / "a", to, tmp_path / "out", trust_import=True)
    assert os.listdir(tmp_path) == ["a"]


def test_gelu_has_no_place_in_cn_clip_but_in_transformers(tmp_path):
    model = small()
    from cnclip_ft.models.formats.cn_clip import to_official

    state = {name: t for name, t in to_official(tensors(model)).items() if name.startswith("visual.")}
    torch.save(state | {"logit_scale": torch.tensor(4.0)}, tmp_path / "x.pt")
    gelu, _ = build_start({"image": {"path": str(tmp_path / "x.pt"), "activation": "gelu"}, "text": TEXT})
    save_checkpoint(gelu, tmp_path / "a", info={})
    with pytest.raises(RequestError, match="uses gelu, the official one quick_gelu"):
        export_checkpoint(tmp_path / "a", "cn_clip", tmp_path / "y.pt")
    export_checkpoint(tmp_path / "a", "huggingface", tmp_path / "hf")
    (tmp_path / "hf" / "cnclip_ft.json").unlink()
    torch.testing.assert_close(features(load(tmp_path / "hf")), features(load(tmp_path / "a")), atol=1e-6, rtol=0)


def test_wrong_requests(checkpoint, tmp_path):
    with pytest.raises(RequestError, match="--to is 'onnx2'; use huggingface, cn_clip, open_clip, onnx"):
        export_checkpoint(checkpoint, "onnx2", tmp_path / "x")
    with pytest.raises(RequestError, match="--dtype is 'int3'"):
        export_checkpoint(checkpoint, "cn_clip", tmp_path / "x", dtype="int3")


@pytest.mark.parametrize(
    "info,checkpoint,dtype,to,wanted",
    [
        ({}, "ViT-B-16", "int8", "onnx", ("OFA-Sys/chinese-clip-vit-base-patch16", "quantized", ["zh"])),
        ({}, "a/run/of/mine", "float32", "cn_clip", (None, None, ["zh"])),
        ({"recipe": {"model": {"start": "elsewhere/mine"}}, "base_models": []}, "x", "float32", "cn_clip", (None, None, ["zh"])),
        ({"languages": ["en"], "base_models": ["a/b", "c/d"], "recipe": {"seed": 1}}, "x", "float32", "onnx", (["a/b", "c/d"], "finetune", ["en"])),
    ],
)  # fmt: skip
def test_the_hub_is_told_what_is_known(tmp_path, info, checkpoint, dtype, to, wanted):
    found = hub_metadata(small(), to, tmp_path, info, checkpoint, dtype, None)
    base, relation, languages = wanted
    assert (found["base_model"] or None, found["base_model_relation"], found["language"]) == (base, relation, languages)
    assert found["library_name"] is None and found["license"] is None
    assert found["tags"] == ["chinese_clip", "image-text-retrieval", *(["onnx"] if to == "onnx" else [])]


def test_a_card_says_what_the_export_is_and_is_replaced_only_as_it_was_written(tmp_path):
    info = {
        "stage": "contrast", "step": 7, "row": {"t2i_r1": 12.34, "mean_recall": 50.0}, "data": {"train": "abc", "valid": "def"},
        "recipe": {"model": {"start": "ViT-B-16"}, "seed": 3}, "start": ["loaded   both towers from x"], "languages": ["zh", "en"],
    }  # fmt: skip
    save_checkpoint(small(), tmp_path / "a", info=info)
    export_checkpoint(tmp_path / "a", "huggingface", tmp_path / "mine", license_name="apache-2.0")
    text = (tmp_path / "mine/README.md").read_text(encoding="utf-8")
    head = ModelCard.load(tmp_path / "mine/README.md").data.to_dict()  # as the hub's own library reads it
    assert head == {
        "language": ["zh", "en"], "license": "apache-2.0", "library_name": "transformers",
        "pipeline_tag": "zero-shot-image-classification", "tags": ["chinese_clip", "image-text-retrieval"],
        "base_model": "OFA-Sys/chinese-clip-vit-base-patch16", "base_model_relation": "finetune",
    }  # fmt: skip
    for words in ("# mine\n", "| 12.3 |", "| train | `abc` |", "seed: 3", "from_pretrained(", "loaded   both towers"):
        assert words in text, words
    assert load(tmp_path / "mine")
    export_checkpoint(tmp_path / "a", "huggingface", tmp_path / "mine", overwrite=True)
    assert "No licence was named" in (tmp_path / "mine/README.md").read_text(encoding="utf-8")
    for name, card in (("mine.pt", "mine.md"), ("plain", "plain.md")):
        export_checkpoint(tmp_path / "a", "cn_clip", tmp_path / name, license_name="mit")
        beside = (tmp_path / card).read_text(encoding="utf-8")
        assert f"# {name}\n" in beside and "license: mit" in beside and "seed: 3" in beside
    export_checkpoint(tmp_path / "a", "cn_clip", tmp_path / "mine.pt", overwrite=True)
    before = (tmp_path / "mine.md").read_bytes()
    with pytest.raises(RequestError, match=r"mine.md is the card of another export"):
        export_checkpoint(tmp_path / "a", "cn_clip", tmp_path / "mine.pth", overwrite=True)
    assert (tmp_path / "mine.md").read_bytes() == before and not (tmp_path / "mine.pth").exists()
    (tmp_path / "mine.md").write_text("My own words.", encoding="utf-8")
    with pytest.raises(RequestError, match=r"mine.md was changed or is your own"):
        export_checkpoint(tmp_path / "a", "cn_clip", tmp_path / "mine.pt", overwrite=True)
    (tmp_path / "mine/README.md").write_text(text + "My own words.\n", encoding="utf-8")
    with pytest.raises(RequestError, match=r"README.md was changed or is your own"):
        export_checkpoint(tmp_path / "a", "huggingface", tmp_path / "mine", overwrite=True)
    assert "My own words" in (tmp_path / "mine/README.md").read_text(encoding="utf-8")
