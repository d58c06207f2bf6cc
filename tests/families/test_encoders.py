"""Text towers of any encoder of transformers: the library's features and ids; through everything; what is refused."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import cnclip_ft
from cnclip_ft.export.run import export_checkpoint
from cnclip_ft.models.checkpoints import file_tensors, save_checkpoint
from cnclip_ft.models.start import build_start
from cnclip_ft.training.run import train
from data_tools.errors import RequestError
from tests.families.cards import CARDS
from tests.families.encoders import ENCODERS
from tests.families.texts import many_texts
from tests.training.helpers import losses, stopped_after, tiny_recipe, write_store

IMAGE = {"kind": "vit", "hidden": 32, "layers": 2, "heads": 2, "patch": 8, "image_size": 32}
SAID = ["一只狗在雪地里奔跑", "a red car", "a", "两只猫 and a dog 🐶", "dog " * 200]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folder of an encoder by its name; written once."""
    place, made = tmp_path_factory.mktemp("encoders"), {}

    def folder(name: str):
        if name not in made:
            made[name] = ENCODERS[name].write(place / name.replace(" ", "-"))
        return made[name]

    return folder


def start(folder, **more):
    return build_start({"image": IMAGE, "text": str(folder), "projection": 24} | more)


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


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    write_store(folder / "train", images=12, captions=2, seed=0)
    write_store(folder / "valid", images=8, captions=1, seed=1)
    return folder


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
    with pytest.raises(RequestError, match="VisionTextDualEncoderModel is a ViT with an encoder's own pooled output"):
        export_checkpoint(best, "huggingface", tmp_path / "hf")


# ---- VisionTextDualEncoder ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dual(tmp_path_factory):
    """As the library writes one; what it gives is among the families' tests."""
    return CARDS["vision-text-dual-encoder"].write(tmp_path_factory.mktemp("dual") / "model")


def test_a_dual_encoder_is_a_start_and_a_mix_becomes_one(dual, folders, tmp_path):
    model, report = build_start({"image": str(dual), "text": str(folders("roberta")), "pooling": "pooler"})
    assert any("image tower and visual projection from" in line for line in report.lines())
    save_checkpoint(model, tmp_path / "mix", info={})
    done = export_checkpoint(tmp_path / "mix", "huggingface", tmp_path / "hf")
    assert done.difference < 1e-5 and "VisionTextDualEncoderModel" in done.advice


def test_pictures_of_another_kind_are_told(dual, tmp_path):
    config = json.loads((dual / "config.json").read_text(encoding="utf-8"))
    vision = config["vision_config"] | {"model_type": "resnet"}
    with pytest.raises(RequestError, match="vision_config is of type 'resnet'; read here: clip_vision_model"):
        build_start(str(edited(dual, tmp_path / "x", vision_config=vision)))


@pytest.mark.parametrize("name", ["clip", "siglip2"])
def test_weights_without_a_temperature_are_told(name, tmp_path):
    folder = CARDS[name].write(tmp_path / "x")
    whole = load_file(folder / "model.safetensors")
    whole["logit_scale"] = torch.ones(2)
    save_file(whole, folder / "model.safetensors")
    with pytest.raises(RequestError, match=r"logit_scale is \[2\], expected"):
        build_start({"image": str(folder), "text": {"hidden": 32, "layers": 1, "heads": 2}})


def test_a_tokenizer_whose_texts_end_elsewhere_than_they_are_read_is_told(tmp_path):
    """A smaller one of another model, whose tokens all have an embedding."""
    folder, other = CARDS["metaclip_2"].write(tmp_path / "x"), CARDS["clip"].write(tmp_path / "y")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(other / file, folder / file)
    with pytest.raises(
        RequestError, match=r"eos_token_id is 2, .* end in \d+: it is another model's; fetch both again"
    ):
        cnclip_ft.load(folder)


@pytest.mark.parametrize("image", ["clip", "siglip of version 2", "siglip2"])
@pytest.mark.parametrize("text", ["qwen3", "minilm"])
def test_pictures_of_any_family_beside_texts_of_any_encoder(image, text, folders, tmp_path):
    model, _ = build_start({"image": str(CARDS[image].write(tmp_path / "image")), "text": str(folders(text))})
    save_checkpoint(model.eval(), tmp_path / "a", info={})
    again = cnclip_ft.load(tmp_path / "a")
    picture = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    assert torch.equal(again.encode_images(picture), model.encode_images(picture))
    assert torch.equal(again.encode_texts(SAID), model.encode_texts(SAID))


# ---- refused --------------------------------------------------------------------------------------------------------


def edited(folder, place, file="config.json", **changes):
    shutil.copytree(folder, place)
    content = json.loads((place / file).read_text(encoding="utf-8")) | changes
    (place / file).write_text(
        json.dumps({key: value for key, value in content.items() if value is not None}), encoding="utf-8"
    )
    return place


@pytest.mark.parametrize(
    "name,changes,more,said",
    [
        (
            "roberta",
            {"model_type": "vit"},
            {},
            "a text model of type 'vit'; transformers has bert, roberta, xlm-roberta",
        ),
        ("roberta", {"model_type": "bart"}, {}, "is no encoder of texts by itself"),
        ("roberta", {"num_hidden_layers": 5000}, {}, "num_hidden_layers is 5000, expected a whole number up to 1,000"),
        ("roberta", {"num_hidden_layers": 4}, {}, "16 missing"),
        (
            "roberta",
            {"num_attention_heads": 5},
            {},
            "transformers makes no roberta of these numbers .* config.json that came with",
        ),
        ("roberta", {"num_attention_heads": -1}, {}, "num_attention_heads is -1, expected a whole number up to"),
        (
            "roberta",
            {"max_position_embeddings": 10**11},
            {},
            "max_position_embeddings is 100000000000, expected a whole number up to",
        ),
        ("roberta", {"hidden_act": "swish9"}, {}, "transformers makes no roberta of these numbers .*swish9"),
        ("roberta", {"model_type": ["roberta"]}, {}, "a text model of type \"\\['roberta'\\]\""),
        ("roberta", {"num_hidden_layers": 2}, {}, "16 tensors belong to no RobertaModel"),
        ("roberta", {"hidden_size": 64}, {}, r"is \[.*32\], expected \[.*64\]"),
        ("roberta", {}, {"pooling": "max"}, "text pooling is 'max'; use cls, mean, last, eos, pooler"),
        ("cased bert", {}, {"pooling": "eos"}, "ends no text in a token of its own; use last"),
        ("modernbert", {}, {"pooling": "pooler"}, "pooling pooler: a modernbert of transformers has none"),
        ("qwen3", {}, {"pooling": "cls"}, "a qwen3 reads forwards, its first token has seen nothing; use last or mean"),
        ("llama", {}, {"context_length": 200}, "context_length is 200, but the text tower has 100 positions"),
        ("roberta", {"vocab_size": 500}, {}, r"is \[.*, 32\], expected \[500, 32\]"),
    ],
)
def test_what_does_not_fit_is_told(name, changes, more, said, folders, tmp_path):
    length = more.pop("context_length", None)
    with pytest.raises(RequestError, match=said) as caught:
        spec = {"image": IMAGE, "text": str(edited(folders(name), tmp_path / "x", **changes)), "projection": 8} | more
        build_start(spec, context_length=length)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "gone,said",
    [
        ("model.safetensors", "no weights in it; expected model.safetensors or pytorch_model.bin"),
        ("tokenizer.json", "no tokenizer.json in it; fetch the folder whole"),
    ],
)
def test_a_folder_half_downloaded_is_told(gone, said, folders, tmp_path):
    shutil.copytree(folders("modernbert"), tmp_path / "x")
    (tmp_path / "x" / gone).unlink()
    with pytest.raises(RequestError, match=said) as caught:
        start(tmp_path / "x")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["roberta", "qwen3"])
def test_a_folder_without_its_vocabulary_is_told(name, folders, tmp_path):
    """transformers makes a tokenizer of special tokens alone of it, to which all words are one."""
    shutil.copytree(folders(name), tmp_path / "x")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "x" / file).unlink()
    with pytest.raises(RequestError, match="no tokenizer.json in it; fetch the folder whole"):
        start(tmp_path / "x")


def test_a_cased_bert_is_told_from_its_tokenizer_alone(folders, tmp_path):
    shutil.copytree(folders("cased bert"), tmp_path / "x")
    (tmp_path / "x" / "tokenizer_config.json").unlink()
    assert start(tmp_path / "x")[0].tokenizer.encode(SAID) == start(folders("cased bert"))[0].tokenizer.encode(SAID)


def test_a_pooling_that_is_not_done_asks_for_one(folders, tmp_path):
    folder = tmp_path / "x"
    shutil.copytree(folders("minilm"), folder)
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_max_tokens": true}', encoding="utf-8")
    with pytest.raises(
        RequestError, match="its pooling is max_tokens, which is not done here; choose one: model.start="
    ):
        start(folder)
    assert start(folder, pooling="mean")[0].text_tower.pooling == "mean"


def test_code_of_a_folder_is_never_run(folders, tmp_path, monkeypatch):
    bomb = "open('ran', 'w')\nclass A: pass\n"
    monkeypatch.chdir(tmp_path)
    code = {"AutoConfig": "code.A", "AutoModel": "code.A"}
    for place, kind in (("known", None), ("unknown", "new-type")):
        folder = edited(folders("roberta"), tmp_path / place, auto_map=code, **({"model_type": kind} if kind else {}))
        (folder / "code.py").write_text(bomb, encoding="utf-8")
        with pytest.raises(RequestError, match="names code of its own .* which is never run"):
            start(folder)
    folder = edited(
        folders("roberta"),
        tmp_path / "t",
        "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["code.A", None]},
        tokenizer_class="A",
    )
    (folder / "code.py").write_text(bomb, encoding="utf-8")
    with pytest.raises(RequestError, match="tokenizer_config.json: names code of its own"):
        start(folder)
    assert not list(tmp_path.rglob("ran"))


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "_experts_implementation"])
def test_kernels_that_a_folder_or_checkpoint_names_are_not_fetched(key, folders, tmp_path, monkeypatch):
    """transformers takes owner/name for code on the hub, and imports it."""
    asked = []
    monkeypatch.setattr(
        "transformers.integrations.hub_kernels.load_and_register_attn_kernel", lambda *a, **_: asked.append(a)
    )
    folder = edited(folders("roberta"), tmp_path / "folder", **{key: "someone/kernel"})
    save_checkpoint(start(folder)[0], tmp_path / "ours", info={})
    about = json.loads((tmp_path / "ours" / "cnclip_ft.json").read_text(encoding="utf-8"))
    about["model"]["text"]["config"][key] = "someone/kernel"
    (tmp_path / "ours" / "cnclip_ft.json").write_text(json.dumps(about), encoding="utf-8")
    model = cnclip_ft.load(tmp_path / "ours")
    assert (
        not asked
        and model.text_tower.config._attn_implementation == "sdpa"
        and key not in model.text_tower.describe()["config"]
    )


def test_a_checkpoint_edited_by_hand_is_refused(folders, tmp_path):
    save_checkpoint(start(folders("roberta"))[0], tmp_path / "a", info={})
    file = tmp_path / "a" / "cnclip_ft.json"
    whole = json.loads(file.read_text(encoding="utf-8"))
    for key, value, said in (
        ("model_type", "evil", "a text model of type 'evil'"),
        ("pooling", "max", "model.text.pooling is 'max', expected: "),
        ("config", {"vocab_size": "x"}, "model.text"),
        ("config", whole["model"]["text"]["config"] | {"hidden_size": 10**9}, "hidden_size is 1000000000"),
    ):
        changed = json.loads(json.dumps(whole))
        changed["model"]["text"][key] = value
        file.write_text(json.dumps(changed), encoding="utf-8")
        with pytest.raises(RequestError, match=said):
            cnclip_ft.load(tmp_path / "a")
    whole["model"]["tokenizer"]["pad_id"] = 10**12
    file.write_text(json.dumps(whole), encoding="utf-8")
    with pytest.raises(RequestError, match="filled up with token 1000000000000, and the text tower has"):
        cnclip_ft.load(tmp_path / "a")
