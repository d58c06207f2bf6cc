"""Folders that leave open, or say wrongly, what changes features: told in a line, refused where no family's rule stands for it."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import cnclip_ft
from cnclip_ft.evaluation.classes.zero_shot import read_templates
from cnclip_ft.export.run import export_checkpoint
from cnclip_ft.models.checkpoints import save_checkpoint
from cnclip_ft.models.families import fast_tokenizer
from cnclip_ft.models.registry import family_of
from cnclip_ft.models.start import build_start
from data_tools.errors import RequestError
from tests.families.encoders import IMAGE, SAID, start
from tests.families.test_encoders_refused import edited
from tests.training.helpers import planned, tiny_recipe

PROCESSOR = "preprocessor_config.json"


def lines(report) -> str:
    return "\n".join(report.lines())


# ---- how pictures are prepared -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dinov2 beside xlm-r", "vision-text-dual-encoder", "siglip2"])
def test_a_picture_rule_that_no_family_fixes_is_not_guessed(name, written, tmp_path):
    folder = tmp_path / "x"
    shutil.copytree(written(name), folder)
    (folder / PROCESSOR).unlink()
    said = "neither preprocessor_config.json nor processor_config.json in it, .* Fetch preprocessor_config.json"
    with pytest.raises(RequestError, match=said) as caught:
        cnclip_ft.load(folder)
    assert "\n" not in str(caught.value)
    rule = json.loads((written(name) / PROCESSOR).read_text(encoding="utf-8"))
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": rule}), encoding="utf-8")
    one, other = cnclip_ft.load(folder), cnclip_ft.load(written(name))
    assert one.image_tower.preprocessing == other.image_tower.preprocessing


@pytest.mark.parametrize("name", ["clip", "siglip", "altclip"])
def test_the_fixed_rule_of_a_family_is_taken_and_said(name, written, tmp_path, caplog):
    folder = tmp_path / "x"
    shutil.copytree(written(name), folder)
    assert "prepared in its family's usual way" not in lines(build_start(str(folder))[1])
    (folder / PROCESSOR).unlink()
    model, report = build_start(str(folder))
    assert "neither preprocessor_config.json nor processor_config.json" in lines(report)
    assert "prepared in its family's usual way" in lines(build_start({"image": str(folder), "text": str(folder)})[1])
    again = cnclip_ft.load(folder)
    assert "prepared in its family's usual way" in caplog.text
    known = cnclip_ft.load(written(name)).image_tower.preprocessing
    found = again.image_tower.preprocessing
    assert (found.fit, found.mean, found.std, found.size) == (known.fit, known.mean, known.std, known.size)


# ---- halves of whole models ----------------------------------------------------------------------------------------


def test_what_is_said_of_padding_is_said_of_the_texts_alone(written, folders):
    siglip = str(written("siglip of version 2"))
    said = lines(build_start({"image": siglip, "text": str(folders("roberta"))})[1])
    assert "always filled up" not in said and "lower case" not in said
    said = lines(build_start({"image": IMAGE, "text": siglip, "projection": 8})[1])
    assert "always filled up to 64 tokens" in said


@pytest.mark.parametrize("pooling", ["mean", "cls", "last", "eos"])
def test_another_pooling_of_half_a_dual_encoder(pooling, written):
    """As the tower that the folder alone makes with that pooling."""
    folder = written("vision-text-dual-encoder")
    model, report = start(folder, pooling=pooling)
    assert f"pooling {pooling} as asked for; the model was trained with pooler" in lines(report)
    assert any("pooler" in name for name in report.left_over)
    whole = cnclip_ft.load(folder)
    hidden = []
    whole.text_tower.text_model.register_forward_hook(lambda *a: hidden.append(a[-1].last_hidden_state))
    ids, mask = whole.tokenizer.pad(whole.tokenizer.encode(SAID))
    with torch.no_grad():
        whole.text_tower(ids, mask)
        tower = model.eval().text_tower
        found = tower(ids, mask)
        rows = {
            "cls": lambda h, n: h[0],
            "mean": lambda h, n: h[:n].mean(0),
            "last": lambda h, n: h[n - 1],
            "eos": lambda h, n: h[n - 1],
        }
        pooled = torch.stack([rows[pooling](h, n) for h, n in zip(hidden[0], mask.sum(1).tolist(), strict=True)])
        torch.testing.assert_close(found, tower.text_projection(pooled), atol=1e-5, rtol=1e-5)


def test_a_pooling_that_half_a_checkpoint_does_not_have_is_told(written, folders, tmp_path):
    save_checkpoint(start(folders("roberta"))[0], tmp_path / "cls", info={})
    save_checkpoint(start(folders("llama"))[0], tmp_path / "causal", info={})
    save_checkpoint(build_start({"architecture": "tiny"})[0], tmp_path / "ours", info={})
    for place, asked, works in (
        ("cls", "pooler", "its own is cls, and cls, mean, last, eos work"),
        ("causal", "cls", "its own is last, and mean, last work"),
        ("causal", "eos", "its own is last, and mean, last work"),
        ("ours", "eos", "its own is cls, and cls, mean work"),
        ("ours", "max", "its own is cls, and cls, mean work"),
    ):
        with pytest.raises(RequestError, match=f"pooling is '{asked}', which the text tower of .* {works}") as caught:
            start(tmp_path / place, pooling=asked)
        assert "\n" not in str(caught.value)
    for place, asked, was in (("cls", "eos", "cls"), ("cls", "mean", "cls"), ("ours", "mean", "cls")):
        model, report = start(tmp_path / place, pooling=asked)
        assert model.text_tower.pooling == asked
        assert f"pooling {asked} as asked for; the model was trained with {was}" in lines(report)
        assert torch.isfinite(model.encode_texts(SAID)).all()
    assert "as asked for" not in lines(start(tmp_path / "cls", pooling="cls")[1])
    with pytest.raises(RequestError, match="pooling is 'mean', but a text tower of kind clip_text has its own"):
        start(written("clip"), pooling="mean")


# ---- code of a folder, and types that are not read -----------------------------------------------------------------


@pytest.mark.parametrize("file", ["config.json", PROCESSOR, "tokenizer_config.json", "processor_config.json"])
@pytest.mark.parametrize("name", ["clip", "siglip2", "dinov2 beside xlm-r"])
def test_code_of_any_file_of_any_folder_is_refused(name, file, written, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if file == "processor_config.json":
        folder = tmp_path / "x"
        shutil.copytree(written(name), folder)
        (folder / file).write_text('{"image_processor": {"auto_map": {"AutoProcessor": "code.A"}}}', encoding="utf-8")
    else:
        folder = edited(written(name), tmp_path / "x", file, auto_map={"AutoModel": "code.A"})
    (folder / "code.py").write_text("open('ran', 'w')\nclass A: pass\n", encoding="utf-8")
    for spec in (str(folder), {"image": str(folder), "text": str(folder)}, {"image": IMAGE, "text": str(folder)}):
        said = f"{file}: names code of its own .* never run.* altclip, chinese_clip, clip, .* bert, .* import path"
        with pytest.raises(RequestError, match=said) as caught:
            build_start(spec)
        assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("ran"))


def test_code_of_one_half_of_a_folder_is_refused(written, tmp_path):
    folder = written("vision-text-dual-encoder")
    section = json.loads((folder / "config.json").read_text(encoding="utf-8"))["text_config"]
    folder = edited(folder, tmp_path / "x", text_config=section | {"auto_map": {"AutoModel": "code.A"}})
    with pytest.raises(RequestError, match="config.json: names code of its own"):
        cnclip_ft.load(folder)


def test_a_picture_half_of_another_type_is_told_what_works(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "blip"}', encoding="utf-8")
    with pytest.raises(
        RequestError, match="type 'blip'; .* altclip, .* siglip2, vision-text-dual-encoder.* import path"
    ):
        build_start({"image": str(tmp_path), "text": {"hidden": 32, "layers": 1, "heads": 2}})


def test_what_is_missing_is_told_with_a_line_to_type(written, tmp_path):
    with pytest.raises(RequestError, match=r"not a checkpoint .*RUN/STAGE/best.* hf download OWNER/NAME --local-dir"):
        cnclip_ft.load(tmp_path)
    folder = tmp_path / "x"
    shutil.copytree(written("clip"), folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    with pytest.raises(RequestError, match="no weights in it; .* hf download OWNER/NAME --local-dir"):
        cnclip_ft.load(folder)
    shard = "model-00001-of-00002.safetensors"
    index = {"weight_map": dict.fromkeys(weights, shard)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(RequestError, match=f"names {shard}, which is not there. .* hf download OWNER/NAME {shard} --"):
        cnclip_ft.load(folder)


@pytest.mark.parametrize("name", ["clip", "siglip2", "metaclip_2"])
def test_a_tokenizer_that_the_hubs_cache_has_lost_is_told(name, written, tmp_path):
    """Its folders are links; of special tokens alone transformers would make a tokenizer to which all words are one."""
    folder = tmp_path / "x"
    shutil.copytree(written(name), folder)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to("../../blobs/gone")
    with pytest.raises(RequestError, match="no tokenizer.json in it; fetch the folder whole"):
        cnclip_ft.load(folder)


# ---- what a start says, and numbers from Python --------------------------------------------------------------------


@pytest.mark.parametrize(
    "key,value",
    [("max_patches", 0), ("max_patches", 10**9), ("context_length", 10**7), ("context_length", 2), ("image_size", 0)],
)
def test_numbers_that_no_model_has_are_refused_from_python_too(key, value, written):
    with pytest.raises(RequestError, match=f"{key} is {value}, expected a whole number from"):
        build_start(str(written("siglip2")), **{key: value})


@pytest.mark.parametrize(
    "name,family",
    [
        ("clip", "CLIP"),
        ("siglip", "SigLIP"),
        ("siglip of version 2", "SigLIP 2"),
        ("siglip2", "SigLIP 2 (NaFlex)"),
        ("altclip", "AltCLIP"),
        ("metaclip_2", "MetaCLIP 2"),
        ("vision-text-dual-encoder", "VisionTextDualEncoder"),
    ],
)
def test_the_report_names_the_family(name, family, written):
    model, report = build_start(str(written(name)))
    assert f"family   {family}" in report.lines()
    templates = read_templates(family_of(model.text_tower).templates)
    if name in ("clip", "altclip", "metaclip_2"):
        assert templates[0] == "a photo of a {}." and len(templates) > 10


def test_a_mix_is_called_one(written, folders):
    said = build_start({"image": str(written("siglip2")), "text": str(written("clip"))})[1].lines()
    assert "family   texts of CLIP, pictures of another" in said


def test_a_temperature_above_what_a_softmax_keeps_is_said(written, tmp_path):
    folder = tmp_path / "x"
    shutil.copytree(written("siglip of version 2"), folder)
    weights = load_file(folder / "model.safetensors")
    weights["logit_scale"] = torch.tensor([4.77])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model, report = build_start({"image": str(folder), "text": {"hidden": 32, "layers": 1, "heads": 2}})
    assert "logit_scale 4.77 → 4.605 (ln 100)" in lines(report)
    before = model.logit_scale.item()
    model.clamp_logit_scale_()
    assert model.logit_scale.item() == before == pytest.approx(4.60517)
    assert "ln 100" not in lines(build_start(str(folder))[1])


def test_batch_norm_in_micro_batches_is_refused_before_anything_trains(stores):
    image = {"kind": "resnet", "layers": [1, 1, 1, 1], "width": 8, "heads": 4, "image_size": 64}
    mix = {"start": {"image": image, "text": {"hidden": 32, "layers": 1, "heads": 2}}}
    with pytest.raises(RequestError, match=r"\(image_tower\..*bn.*\).*stages.contrast.batch_norm=frozen"):
        planned(tiny_recipe(stores, model=mix, contrast={"micro_batch_size": 4}))
    for fine in ({"micro_batch_size": 4, "batch_norm": "frozen"}, {"micro_batch_size": 8}):
        assert planned(tiny_recipe(stores, model=mix, contrast=fine, align={"micro_batch_size": 4}))


# ---- tokenizers that do not fit ------------------------------------------------------------------------------------


@pytest.mark.parametrize("late", [False, True], ids=["small", "read when first used"])
def test_loading_says_that_a_tokenizer_may_be_another_models(late, written, tmp_path, caplog, monkeypatch):
    folder = written("metaclip_2")
    cnclip_ft.load(folder).encode_texts("a")
    assert "another model's tokenizer" not in caplog.text
    section = json.loads((folder / "config.json").read_text(encoding="utf-8"))["text_config"]
    folder = edited(folder, tmp_path / "x", text_config=section | {"vocab_size": 5000})
    weights = load_file(folder / "model.safetensors")
    name = "text_model.embeddings.token_embedding.weight"
    weights[name] = torch.zeros(5000, weights[name].shape[1])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    if late:
        monkeypatch.setattr(fast_tokenizer, "_SLOW", 0)
    model = cnclip_ft.load(folder)
    assert ("another model's tokenizer" in caplog.text) != late
    model.encode_texts("a")
    assert caplog.text.count("another model's tokenizer") == 1 and "rows for 5,000" in caplog.text


@pytest.mark.parametrize("name,key,value", [("altclip", "pad_token_id", 3), ("altclip", "eos_token_id", 5), ("siglip2", "pad_token_id", 4), ("siglip2", "eos_token_id", 7)])  # fmt: skip
def test_a_tokenizer_with_other_ends_than_the_configuration_is_told(name, key, value, written, tmp_path):
    folder = written(name)
    section = json.loads((folder / "config.json").read_text(encoding="utf-8"))["text_config"]
    folder = edited(folder, tmp_path / "x", text_config=section | {key: value})
    with pytest.raises(RequestError, match=f"text_config.{key} is {value}, .* another model's; fetch both again"):
        cnclip_ft.load(folder)


# ---- open_clip's configuration says what tensors do not ------------------------------------------------------------


def test_an_export_whose_heads_are_not_64_wide_is_read_back(written, tmp_path):
    ours = cnclip_ft.load(written("clip"))
    save_checkpoint(ours, tmp_path / "a", info={})
    export_checkpoint(tmp_path / "a", "open_clip", tmp_path / "b")
    again = cnclip_ft.load(tmp_path / "b")
    picture = torch.randint(0, 256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    assert again.image_tower.describe()["num_attention_heads"] == 2
    assert torch.equal(again.image_features(picture), ours.image_features(picture))
    assert torch.equal(again.encode_texts(SAID[:2]), ours.encode_texts(SAID[:2]))
