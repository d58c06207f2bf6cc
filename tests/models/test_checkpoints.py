"""Our folder: whole or not there, read by transformers too; `load` of every kind; wrong files in one sentence."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import cnclip_ft
from cnclip_ft.export.run import export_checkpoint
from cnclip_ft.models import checkpoints
from cnclip_ft.models.checkpoints import checkpoint_checksum, load, read_info, save_checkpoint
from cnclip_ft.models.families.chinese_clip.catalog import ARCHITECTURES
from cnclip_ft.models.start import build_start
from data_tools.errors import RequestError, UserError
from tests.models.helpers import RESNET, VIT, Bomb, equal, features, official, small, tensors


@pytest.mark.parametrize("spec", [VIT, RESNET, {"architecture": "tiny"}])
def test_there_and_back(spec, tmp_path):
    model = small(spec)
    save_checkpoint(model, tmp_path / "a", info={"step": 7, "scores": {"r1": 1.5}})
    back = load(tmp_path / "a")
    assert equal(tensors(back), tensors(model)) and not back.training
    assert torch.equal(features(back), features(model))
    assert back.architecture == model.architecture
    assert {name for name, p in back.named_parameters() if p.requires_grad} == {
        name for name, _ in model.named_parameters()
    }
    info = read_info(tmp_path / "a")
    assert info["step"] == 7 and info["scores"] == {"r1": 1.5} and info["format"] == 1


def test_weights_are_on_their_way_before_the_towers_are_imported(tmp_path):
    save_checkpoint(small(), tmp_path / "a", info={})
    code = (
        "import sys, cnclip_ft; load = cnclip_ft.load; print('transformers' in sys.modules)\n"
        "from cnclip_ft.models import checkpoints\n"
        "real = checkpoints.read_ahead\n"
        "def told(*args): print('transformers' in sys.modules); return real(*args)\n"
        "checkpoints.read_ahead = told\n"
        f"print(load({str(tmp_path / 'a')!r}).training)"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"] * 3


@pytest.mark.parametrize("swept", [True, False])
def test_the_search_for_circles_rests_while_a_model_is_loaded(swept, tmp_path, monkeypatch):
    save_checkpoint(small(), tmp_path / "a", info={})
    seen = []
    monkeypatch.setattr(
        checkpoints, "assemble", lambda c, real=checkpoints.assemble: (seen.append(gc.isenabled()), real(c))[1]
    )
    before = gc.isenabled()
    try:
        (gc.enable if swept else gc.disable)()
        load(tmp_path / "a")
        assert seen == [False] and gc.isenabled() is swept
        with pytest.raises(RequestError):
            load(tmp_path / "none")
        assert gc.isenabled() is swept
    finally:
        (gc.enable if before else gc.disable)()


def test_a_learnt_bias_goes_along(tmp_path):
    model = small()
    save_checkpoint(model, tmp_path / "without", info={})
    model.logit_bias = torch.nn.Parameter(torch.tensor(-7.5))
    save_checkpoint(model, tmp_path / "with", info={})
    assert load(tmp_path / "without").logit_bias is None
    assert "logit_bias" not in read_info(tmp_path / "without")["model"]
    assert load(tmp_path / "with").logit_bias.item() == -7.5
    start, report = build_start(str(tmp_path / "with"))
    assert start.logit_bias.item() == -7.5 and start.logit_bias.requires_grad
    assert "temperature and bias" in report.lines()[0]
    towers = {"image": str(tmp_path / "with"), "text": {"hidden": 64, "layers": 1, "heads": 1}}
    assert build_start(towers)[0].logit_bias is None
    export_checkpoint(tmp_path / "with", "cn_clip", tmp_path / "official.pt")
    assert load(tmp_path / "official.pt").logit_bias is None


def test_loaded_models_train(tmp_path):
    model = small()
    save_checkpoint(model, tmp_path / "a", info={})
    back = load(tmp_path / "a").train()
    images, texts = back(
        torch.zeros(2, 3, 32, 32, dtype=torch.uint8),
        torch.tensor([[101, 102]] * 2),
        torch.ones(2, 2, dtype=torch.int64),
    )
    (images @ texts.T * back.logit_scale.exp()).sum().backward()
    assert back.image_tower.vision_model.embeddings.position_embedding.weight.grad is not None


def test_transformers_reads_every_checkpoint(tmp_path):
    from transformers import ChineseCLIPModel

    model = small()
    save_checkpoint(model, tmp_path / "a", info={})
    theirs, said = ChineseCLIPModel.from_pretrained(tmp_path / "a", output_loading_info=True)
    assert not said["missing_keys"] and not said["mismatched_keys"]
    assert {name for name in said["unexpected_keys"]} == set()
    from cnclip_ft.models.preprocessing import normalise
    from tests.models.helpers import pixels

    ids, mask = model.tokenizer.pad(model.tokenizer.encode(["一只狗", "a red car", ""]))
    with torch.inference_mode():
        image = (
            theirs.eval()
            .get_image_features(
                normalise(pixels(32), model.image_tower.preprocessing.mean, model.image_tower.preprocessing.std)
            )
            .pooler_output
        )
        text = theirs.get_text_features(input_ids=ids, attention_mask=mask).pooler_output
    unit = torch.nn.functional.normalize(torch.cat([image, text]), dim=1)
    torch.testing.assert_close(unit, features(model), atol=1e-6, rtol=0)


def test_an_interrupted_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    save_checkpoint(small(), tmp_path / "a", info={"step": 1})
    full = "cnclip_ft.models.formats.files.save_file"
    monkeypatch.setattr(full, lambda *_, **__: (_ for _ in ()).throw(OSError("No space left on device")))
    with pytest.raises(UserError, match="No space left.*What was there before is intact"):
        save_checkpoint(small(seed=2), tmp_path / "a", info={"step": 2})
    assert read_info(tmp_path / "a")["step"] == 1 and equal(tensors(load(tmp_path / "a")), tensors(small()))
    assert sorted(os.listdir(tmp_path)) == ["a"]


def test_a_writer_killed_between_its_renames_leaves_the_old_one_readable(tmp_path):
    model = small()
    save_checkpoint(model, tmp_path / "best", info={"step": 1})
    os.replace(tmp_path / "best", tmp_path / "best.old")
    assert equal(tensors(load(tmp_path / "best")), tensors(model))


def test_an_old_checkpoint_is_replaced(tmp_path):
    for step in (1, 2):
        save_checkpoint(small(seed=step), tmp_path / "a", info={"step": step})
    assert read_info(tmp_path / "a")["step"] == 2 and equal(tensors(load(tmp_path / "a")), tensors(small(seed=2)))
    assert sorted(os.listdir(tmp_path)) == ["a"]


def test_number_formats(tmp_path):
    model = small()
    save_checkpoint(model.to(torch.bfloat16), tmp_path / "a", info={})
    assert json.loads((tmp_path / "a" / "config.json").read_text())["dtype"] == "bfloat16"
    assert load(tmp_path / "a").dtype == torch.float32
    half = load(tmp_path / "a", dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert equal(tensors(half), tensors(model))
    assert torch.isfinite(features(half)).all()


def test_a_resnet_keeps_its_statistics_in_integers_and_floats(tmp_path):
    model = small(RESNET)
    save_checkpoint(model, tmp_path / "a", info={})
    loaded = tensors(load(tmp_path / "a", dtype=torch.float16))
    assert loaded["visual.bn1.num_batches_tracked"].dtype == torch.int64
    assert loaded["visual.bn1.running_var"].dtype == torch.float16


def test_checksum(tmp_path):
    import hashlib

    save_checkpoint(small(), tmp_path / "a", info={})
    expected = hashlib.sha256((tmp_path / "a" / "model.safetensors").read_bytes()).hexdigest()
    assert checkpoint_checksum(tmp_path / "a") == checkpoint_checksum(tmp_path / "a" / "model.safetensors") == expected
    with pytest.raises(RequestError, match="no single file"):
        checkpoint_checksum(tmp_path)


# ---- load -----------------------------------------------------------------------------------------------------------


def test_a_file_of_a_folder_is_read_with_its_configuration(tmp_path):
    model = build_start({"architecture": "tiny"})[0].eval()  # two heads of 32: the tensors alone would say one of 64
    save_checkpoint(model, tmp_path / "a", info={})
    assert load(tmp_path / "a" / "model.safetensors").architecture.name == "tiny"


def test_a_bare_safetensors_file(tmp_path):
    model = small()
    save_file(tensors(model), tmp_path / "x.safetensors")
    assert torch.equal(features(load(tmp_path / "x.safetensors")), features(model))
    save_checkpoint(build_start(VIT | {"text": {"hidden": 96, "layers": 1, "heads": 3}})[0], tmp_path / "a", info={})
    (tmp_path / "a" / "model.safetensors").rename(tmp_path / "y.safetensors")
    with pytest.raises(RequestError, match="number of attention heads of a width of 96"):
        load(tmp_path / "y.safetensors")


def test_exported_files_describe_themselves(tmp_path):
    from cnclip_ft.export.run import export_checkpoint

    model = build_start({"architecture": "tiny"}, context_length=20)[0].eval()
    save_checkpoint(model, tmp_path / "a", info={})
    export_checkpoint(tmp_path / "a", "cn_clip", tmp_path / "x.pt")
    back = load(tmp_path / "x.pt")
    assert (
        back.context_length == 20 and back.architecture.name == "tiny" and torch.equal(features(back), features(model))
    )


def test_a_folder_with_the_official_file(tmp_path):
    torch.save({"state_dict": official(small())}, tmp_path / "clip_cn_vit-b-16.pt")
    assert torch.equal(features(load(tmp_path)), features(small()))


def test_the_folder_of_a_run_is_pointed_on(tmp_path):
    save_checkpoint(small(), tmp_path / "run" / "contrast" / "best", info={})
    with pytest.raises(RequestError, match="name one of its checkpoints: .*best"):
        load(tmp_path / "run")


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "tiny"])
def test_published_sizes_are_recognised_from_their_tensors(name):
    from cnclip_ft.models.families.chinese_clip.resnet import ResNetTower
    from cnclip_ft.models.families.chinese_clip.roberta import RobertaTower
    from cnclip_ft.models.families.chinese_clip.vit import ViTTower
    from cnclip_ft.models.formats.recognise import recognise

    architecture = ARCHITECTURES[name]
    with torch.device("meta"):
        make = ResNetTower if architecture.image.kind == "resnet" else ViTTower.make
        towers = (
            make(architecture.image, architecture.projection),
            RobertaTower.make(architecture.text, architecture.projection),
        )
    shapes = {key: value for tower in towers for key, value in tower.state_dict().items()}
    assert recognise(shapes, name)["architecture"] == architecture.as_dict()
    if architecture.parameters:
        count = 1 + sum(p.numel() for tower in towers for p in tower.parameters())
        assert count == pytest.approx(architecture.parameters, rel=1e-4)


# ---- another resolution ---------------------------------------------------------------------------------------------


def test_another_resolution_resizes_once_and_says_so(tmp_path, caplog):
    save_checkpoint(small(), tmp_path / "a", info={})
    model = load(tmp_path / "a", image_size=64)
    assert "image size 32 → 64: position embeddings resized 4×4 → 8×8" in caplog.text
    assert model.image_size == 64 and model.encode_images([Image.new("RGB", (9, 9))]).shape == (1, 32)
    caplog.clear()
    save_checkpoint(model, tmp_path / "b", info={})
    again = load(tmp_path / "b", image_size=64)
    assert not caplog.text and equal(tensors(again), tensors(model))
    assert json.loads((tmp_path / "b" / "preprocessor_config.json").read_text())["size"] == {"height": 64, "width": 64}


def test_positions_follow_the_official_rule(tmp_path):
    """Corners aligned: the corners of the new grid are those of the old one; the class token stays."""
    save_checkpoint(small(), tmp_path / "a", info={})
    old, new = (
        tensors(load(tmp_path / "a", image_size=size))["vision_model.embeddings.position_embedding.weight"]
        for size in (32, 56)
    )
    assert torch.equal(old[0], new[0])
    old, new = old[1:].view(4, 4, -1), new[1:].view(7, 7, -1)
    for a, b in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
        torch.testing.assert_close(old[a, b], new[a, b])
    torch.testing.assert_close(old[1, 2], new[2, 4], atol=1e-6, rtol=0)  # 7 = 2·4 − 1: every other place is an old one


def test_a_large_size_at_its_other_resolution_is_the_published_one():
    from cnclip_ft.models.families.chinese_clip.roberta import RobertaTower
    from cnclip_ft.models.families.chinese_clip.vit import ViTTower
    from cnclip_ft.models.formats.recognise import recognise, with_architecture

    architecture = ARCHITECTURES["ViT-L-14"]
    with torch.device("meta"):
        towers = ViTTower.make(architecture.image, 768), RobertaTower.make(architecture.text, 768)
    found = {key: value for tower in towers for key, value in tower.state_dict().items()}
    description = recognise(found, "x")
    name = "vision_model.embeddings.position_embedding.weight"
    found[name] = torch.zeros(found[name].shape)
    image, _ = ViTTower.resized(description["image"], found, 336)
    assert with_architecture(description | {"image": image})["architecture"]["name"] == "ViT-L-14-336"


def test_a_resnet_is_resized_too(tmp_path):
    save_checkpoint(small(RESNET), tmp_path / "a", info={})
    assert features(load(tmp_path / "a", image_size=96)).shape[1] == 32


@pytest.mark.parametrize(
    "spec,size,message",
    [(VIT, 65, "no multiple of 8.*model.image_size=64 or model.image_size=72"), (RESNET, 100, "no multiple of 32")],
)
def test_sizes_a_tower_cannot_have(spec, size, message, tmp_path):
    save_checkpoint(small(spec), tmp_path / "a", info={})
    with pytest.raises(RequestError, match=message):
        load(tmp_path / "a", image_size=size)


# ---- what is refused ------------------------------------------------------------------------------------------------


def write(kind, path):
    """A wrong file of this kind; the message it must give."""
    state = official(small())
    prefix = "module.visual.transformer.resblocks.0."
    if kind == "missing":
        del state["module.visual.ln_pre.weight"]
        message = "1 missing \\(vision_model.pre_layrnorm.weight\\)"
    elif kind == "missing size":
        del state["module.visual.conv1.weight"]
        message = "incomplete, no 'vision_model.embeddings.patch_embedding.weight'"
    elif kind == "extra":
        state["module.visual.more"] = torch.zeros(2)
        message = "not those of a Chinese CLIP, e.g. visual.more"
    elif kind == "extra text":
        state["module.bert.more.weight"] = torch.zeros(2)
        message = "1 unexpected \\(text_model.more.weight\\)"
    elif kind == "wrong size":
        state[prefix + "ln_1.weight"] = torch.zeros(65)
        message = r"layers.0.layer_norm1.weight is \[65\], expected \[64\]"
    elif kind == "other":
        state = {"a": torch.zeros(2)}
        message = "not a Chinese CLIP"
    elif kind == "english":
        state = {name: tensor for name, tensor in state.items() if ".bert." not in name} | {
            "token_embedding.weight": torch.zeros(9, 64)
        }
        message = "an English CLIP whose text tower is incomplete.* Its image tower may be a start"
    elif kind == "code":
        state = {"a": Bomb(path.parent / "executed")}
        message = "refused, reading it would run code"
    torch.save({"state_dict": state}, path)
    return message


@pytest.mark.parametrize(
    "kind", ["missing", "missing size", "extra", "extra text", "wrong size", "other", "english", "code"]
)
def test_wrong_files_are_refused_in_one_sentence_and_nothing_runs(kind, tmp_path):
    message = write(kind, tmp_path / "x.pt")
    with pytest.raises(RequestError, match=message) as caught:
        cnclip_ft.load(tmp_path / "x.pt")
    said = str(caught.value)
    assert str(tmp_path / "x.pt") in said and "\n" not in said and len(said) < 500
    assert not (tmp_path / "executed").exists()


def test_wrong_folders(tmp_path):
    with pytest.raises(RequestError, match="no such file or folder, and no published name"):
        load(tmp_path / "none")
    with pytest.raises(RequestError, match="not a checkpoint"):
        load(tmp_path)
    save_checkpoint(small(), tmp_path / "a", info={})
    info = json.loads((tmp_path / "a" / "cnclip_ft.json").read_text(encoding="utf-8"))
    for content, message in (
        ("{", "cannot be read"),
        (json.dumps(info | {"format": 9}), "format 9 is not known"),
        (json.dumps(info | {"model": None}), "does not describe a model"),
        ("[]", "expected a JSON object"),
    ):
        (tmp_path / "a" / "cnclip_ft.json").write_text(content, encoding="utf-8")
        with pytest.raises(RequestError, match=message):
            load(tmp_path / "a")
    (tmp_path / "a" / "cnclip_ft.json").write_text(json.dumps(info), encoding="utf-8")
    weights = tmp_path / "a" / "model.safetensors"
    content = load_file(weights)
    weights.unlink()
    with pytest.raises(RequestError, match="no weights in it"):
        load(tmp_path / "a")
    content.pop("logit_scale")
    save_file(content, weights)
    with pytest.raises(RequestError, match="1 missing \\(logit_scale\\)"):
        load(tmp_path / "a")
    (tmp_path / "a" / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n", encoding="utf-8")
    with pytest.raises(RequestError, match="vocab.txt has 5 tokens, the text tower 21,128"):
        load(tmp_path / "a")


def test_public_names():
    assert cnclip_ft.available_models() == ["ViT-B-16", "ViT-L-14", "ViT-L-14-336", "ViT-H-14", "RN50"]
    assert cnclip_ft.load is load
    with pytest.raises(AttributeError):
        cnclip_ft.nothing  # noqa: B018


def test_importing_the_package_imports_no_torch():
    import subprocess
    import sys

    code = "import sys, cnclip_ft; cnclip_ft.available_models(); print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, encoding="utf-8", cwd=os.getcwd()
    )
    assert done.stdout.strip() == "[]", done.stderr
