"""Text towers of any encoder of transformers: the library's features and ids; through everything."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import transformers
from torch import nn

import cnclip_ft
from cnclip_ft.export.run import export_checkpoint
from cnclip_ft.models.checkpoints import file_tensors, save_checkpoint
from cnclip_ft.models.formats import files
from cnclip_ft.models.start import build_start
from cnclip_ft.training.run import train
from data_tools.errors import RequestError
from tests.families.cards import CARDS
from tests.families.encoders import ENCODERS, IMAGE, SAID, start
from tests.families.texts import many_texts
from tests.training.helpers import losses, stopped_after, tiny_recipe


def pooled(folder, pooling: str, texts=SAID) -> torch.Tensor:
    """By the library alone, one text at a time: no padding, which could hide a mistake with it."""
    model = transformers.AutoModel.from_pretrained(folder).eval()
    tokenizer, rows = transformers.AutoTokenizer.from_pretrained(folder), []
    for text in texts:
        inputs = tokenizer(text, truncation=True, max_length=77, return_tensors="pt")
        with torch.no_grad():
            out = model(input_ids=inputs["input_ids"])
        hidden = out.last_hidden_state[0]
        rows.append(
            {
                "cls": lambda h=hidden: h[0],
                "mean": lambda h=hidden: h.mean(0),
                "last": lambda h=hidden: h[-1],
                "eos": lambda h=hidden: h[-1],
                "pooler": lambda o=out: o.pooler_output[0],
            }[pooling]()
        )
    return torch.stack(rows)


def trunk_features(model, texts=SAID) -> torch.Tensor:
    """In one batch, before the projection."""
    tower = model.eval().text_tower
    projection, tower.text_projection = tower.text_projection, nn.Identity()
    try:
        with torch.no_grad():
            return tower(*model.tokenizer.pad(model.tokenizer.encode(texts)))
    finally:
        tower.text_projection = projection


@pytest.mark.parametrize("name", ENCODERS)
def test_features_are_the_librarys_and_are_kept(name, folders, tmp_path):
    folder, expected = folders(name), ENCODERS[name].pooling
    model, report = start(folder)
    tower = model.text_tower
    assert tower.kind == "encoder" and tower.pooling == expected
    assert any(line.startswith(f"changed  pooling {expected}") for line in report.lines())
    torch.testing.assert_close(trunk_features(model), pooled(folder, expected), atol=1e-5, rtol=1e-5)

    ours = [id(parameter) for block in tower.blocks() for parameter in block.parameters()]
    assert sorted(ours) == sorted(id(parameter) for parameter in tower.parameters()) and len(tower.blocks()) == 5
    embeddings = {id(m.weight) for m in tower.modules() if isinstance(m, nn.Embedding)}
    for parameter_name, parameter in tower.named_parameters():
        assert tower.decays(parameter_name, parameter) == (parameter.ndim > 1 and id(parameter) not in embeddings)

    for place, kept in (("a", model), ("b", None)):
        save_checkpoint(kept or cnclip_ft.load(tmp_path / "a"), tmp_path / place, info={})
    files = [{file.name: file.read_bytes() for file in (tmp_path / place).iterdir()} for place in ("a", "b")]
    assert files[0] == files[1]
    again = cnclip_ft.load(tmp_path / "b")
    before, after = file_tensors(model), file_tensors(again)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(again.encode_texts(SAID), model.encode_texts(SAID))
    assert again.tokenizer.fingerprint() == model.tokenizer.fingerprint()


def test_a_copy_reads_its_own_weights(folders):
    """MPNet's distances, too, whose function is bound to the model."""
    model, _ = start(folders("mpnet"))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    torch.testing.assert_close(trunk_features(twin), pooled(folders("mpnet"), "mean"), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("name", "token"), [("cased bert", "[PAD]"), ("gemma3_text", "<pad>")])
def test_a_text_may_hold_the_name_of_padding(name, token, folders):
    model, texts = start(folders(name))[0], [f"a {token} b", token, f"{token} a red car"]
    expected = pooled(folders(name), ENCODERS[name].pooling, texts)
    torch.testing.assert_close(trunk_features(model, texts), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_an_empty_text_has_a_feature_where_the_tokenizer_adds_nothing(pooling, folders):
    model = start(folders("llama"), pooling=pooling)[0]
    assert model.tokenizer.encode([""]) == [[]]
    torch.testing.assert_close(model.encode_texts(["", "a red car"])[:1], model.encode_texts(""))


QUICK = ("qwen3",)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in ENCODERS]
)
def test_ids_are_the_tokenizers(name, folders):
    tokenizer, texts = start(folders(name))[0].tokenizer, many_texts()
    library = transformers.AutoTokenizer.from_pretrained(folders(name))
    theirs, found = library(texts, truncation=True, max_length=77)["input_ids"], tokenizer.encode(texts)
    assert len(found) == 5000
    assert [text for text, a, b in zip(texts, found, theirs, strict=True) if a != b] == []
    assert tokenizer.lengths(texts[:50]) == [len(ids) for ids in library(texts[:50])["input_ids"]]


@pytest.mark.parametrize("name", ["qwen3", "llama", "xlm-roberta", "roberta"])
def test_a_large_vocabulary_that_is_read_late_has_the_same_rules(name, folders, monkeypatch):
    """Of Qwen's the mask cannot be told without a look at how a text ends."""
    now = start(folders(name))[0].tokenizer
    monkeypatch.setattr("cnclip_ft.models.families.fast_tokenizer._SLOW", 0)
    late = start(folders(name))[0].tokenizer
    assert late.rules == now.rules and late.encode(SAID) == now.encode(SAID)


@pytest.mark.parametrize(
    "name,pooling",
    [
        ("roberta", "mean"),
        ("roberta", "last"),
        ("roberta", "eos"),
        ("roberta", "pooler"),
        ("minilm", "cls"),
        ("qwen3", "mean"),
        ("qwen3", "eos"),
    ],
)
def test_another_pooling_is_what_it_says(name, pooling, folders):
    model, report = start(folders(name), pooling=pooling)
    torch.testing.assert_close(trunk_features(model), pooled(folders(name), pooling), atol=1e-5, rtol=1e-5)
    if name == "minilm":
        assert "changed  pooling cls as asked for; its author's is mean (1_Pooling/config.json)" in report.lines()


def test_heads_and_poolers_are_left_over(folders):
    report = start(folders("roberta with a head"))[1]
    assert report.left_over and all(name.startswith("lm_head.") for name in report.left_over)
    assert all("pooler." in name for name in start(folders("roberta"))[1].left_over)
    assert start(folders("roberta"), pooling="pooler")[1].left_over == []


def test_a_plain_bert_keeps_its_road(tmp_path):
    """Lower-cased WordPiece: kind roberta; its folder's pooling is heard too."""
    config = transformers.BertConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=1, intermediate_size=64, vocab_size=21128
    )
    transformers.BertModel(config).save_pretrained(tmp_path)
    model, report = start(tmp_path)
    assert model.text_tower.kind == "roberta" and model.text_tower.pooling == "cls"
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}', encoding="utf-8")
    model, report = start(tmp_path)
    assert model.text_tower.kind == "roberta" and model.text_tower.pooling == "mean"
    assert "changed  pooling mean, as 1_Pooling/config.json says" in report.lines()


def test_learnt_positions_are_stretched(folders):
    model, report = build_start({"image": IMAGE, "text": str(folders("roberta")), "projection": 8}, context_length=150)
    assert any("texts of 98 → 150 tokens: position embeddings stretched" in line for line in report.lines())
    assert model.context_length == model.text_tower.max_length == 150
    old = transformers.AutoModel.from_pretrained(folders("roberta")).embeddings.position_embeddings.weight
    new = model.text_tower.text_model.embeddings.position_embeddings.weight
    assert new.shape == (152, 32) and torch.equal(new[:22], old[:22])  # two before the first, and 20


# ---- through everything ---------------------------------------------------------------------------------------------


def run(stores, text, output, **more):
    rules = [{"tower": "image", "layer_decay": 0.8}, {"tower": "text", "layer_decay": 0.8}, {"tower": "temperature"}]
    model = {"start": {"image": IMAGE, "text": str(text), "projection": 12}}
    return tiny_recipe(
        stores,
        model=model,
        align={"steps": 3, "validate_every": 3, "feature_cache": True},
        contrast={"steps": 3, "validate_every": 3, "train": rules, "micro_batch_size": 4, **more},
        output=str(output),
    )


def test_both_stages_learn(stores, folders, tmp_path):
    assert train(run(stores, folders("xlm-roberta"), tmp_path / "run"))
    found = losses(tmp_path / "run")
    assert len(found) == 6 and np.isfinite(list(found.values())).all()
    best = cnclip_ft.load(tmp_path / "run" / "contrast" / "best")
    assert type(best.text_tower).kind == "encoder" and best.encode_texts("狗").shape == (1, 12)


@pytest.mark.slow
def test_a_run_goes_on_where_it_stopped(stores, folders, tmp_path):
    text = folders("xlm-roberta")
    assert train(run(stores, text, tmp_path / "whole"))
    recipe = run(stores, text, tmp_path / "parts")
    assert train(recipe, **stopped_after(("contrast", 2))) is False
    assert train(recipe, proceed=True)
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3", "gemma3_text", "modernbert", "minilm"])
def test_all_train_with_low_rank_updates_and_export(name, stores, folders, tmp_path):
    pytest.importorskip("onnxruntime")
    rules = [{"tower": "image"}, {"tower": "text", "lora": {"rank": 2}}, {"tower": "temperature"}]
    assert train(run(stores, folders(name), tmp_path / "run", train=rules, gradient_checkpointing="text"))
    best = tmp_path / "run" / "contrast" / "best"
    assert export_checkpoint(best, "onnx", tmp_path / "onnx", verify=stores / "valid").difference < 1e-5
    with pytest.raises(
        RequestError, match="VisionTextDualEncoderModel is an image encoder of transformers, or a ViT, with"
    ):
        export_checkpoint(best, "huggingface", tmp_path / "hf")


# ---- VisionTextDualEncoder ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dual(tmp_path_factory):
    """As the library writes one; what it gives is among the families' tests."""
    return CARDS["vision-text-dual-encoder"].write(tmp_path_factory.mktemp("dual") / "model")


def test_a_dual_encoder_is_read_once_and_stays_as_it_is_when_its_file_changes(tmp_path, monkeypatch):
    """Its ViT's layers have other names in the file, which transformers knows."""
    folder = CARDS["vit beside xlm-r"].write(tmp_path / "model")
    whole = transformers.AutoModel.from_pretrained(folder).state_dict()
    expected = {name: tensor.clone() for name, tensor in whole.items()}
    del whole
    opened = []
    monkeypatch.setattr(
        files, "_read_file", lambda *args, real=files._read_file: (opened.append(args[0]), real(*args))[1]
    )
    model = cnclip_ft.load(folder)
    assert opened == [folder / "model.safetensors"]
    with open(folder / "model.safetensors", "r+b") as file:  # what a mapping would show
        file.seek(-file.seek(0, 2) // 2, 2)
        file.write(bytes(1 << 16))
    own = file_tensors(model)
    assert own.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(own[name], tensor.reshape(own[name].shape)), name


def test_a_dual_encoder_is_a_start_and_a_mix_becomes_one(dual, folders, tmp_path):
    model, report = build_start({"image": str(dual), "text": str(folders("roberta")), "pooling": "pooler"})
    assert any("image tower and visual projection from" in line for line in report.lines())
    save_checkpoint(model, tmp_path / "mix", info={})
    done = export_checkpoint(tmp_path / "mix", "huggingface", tmp_path / "hf")
    assert done.difference < 1e-5 and "VisionTextDualEncoderModel" in done.advice


@pytest.mark.parametrize("image", ["clip", "siglip of version 2", "siglip2"])
@pytest.mark.parametrize("text", ["qwen3", "minilm"])
def test_pictures_of_any_family_beside_texts_of_any_encoder(image, text, folders, tmp_path):
    model, _ = build_start({"image": str(CARDS[image].write(tmp_path / "image")), "text": str(folders(text))})
    save_checkpoint(model.eval(), tmp_path / "a", info={})
    again = cnclip_ft.load(tmp_path / "a")
    picture = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    assert torch.equal(again.encode_images(picture), model.encode_images(picture))
    assert torch.equal(again.encode_texts(SAID), model.encode_texts(SAID))
