"""What is no text encoder, or not as its folder says, is told in a line; code that a folder names is never run."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import cnclip_ft
from cnclip_ft.models.checkpoints import save_checkpoint
from cnclip_ft.models.families.encoder.transformers_model import UNREAD
from cnclip_ft.models.start import build_start
from data_tools.errors import RequestError
from tests.families.cards import CARDS
from tests.families.encoders import IMAGE, SAID, start


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
        (
            "roberta",
            {"model_type": "t5"},
            {},
            "type t5 is no encoder of texts by itself; transformers has bert, roberta",
        ),
        (
            "roberta",
            {"model_type": "t5", "is_encoder_decoder": False},  # its encoder alone, as T5EncoderModel writes it
            {},
            "type t5 is no encoder of texts by itself",
        ),
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
        ("roberta", {}, {"pooling": "max"}, "text pooling is 'max': model.start.pooling=cls.mean.last.eos.pooler"),
        ("cased bert", {}, {"pooling": "eos"}, "ends no text in a token of its own: model.start.pooling=last"),
        ("modernbert", {}, {"pooling": "pooler"}, "pooling pooler: a modernbert of transformers has none"),
        (
            "qwen3",
            {},
            {"pooling": "cls"},
            "a qwen3 reads forwards, its first token has seen nothing: model.start.pooling=last or model.start.pooling=mean",
        ),
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
        and model.text_tower.text_model.config._attn_implementation == UNREAD
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


def test_pictures_of_another_kind_are_told(tmp_path):
    dual = CARDS["vision-text-dual-encoder"].write(tmp_path / "dual")
    config = json.loads((dual / "config.json").read_text(encoding="utf-8"))
    for kind, said in (
        ("resnet", r"the pooled output of a resnet is \[2048, 1, 1\], expected \[32\]; read here: vit"),
        ("layoutlm", "config.json: a model of type 'layoutlm'; read here: clip_vision_model, vit"),
        ("timm_wrapper", "config.json: a model of type 'timm_wrapper'; read here: clip_vision_model, vit"),
    ):
        vision = config["vision_config"] | {"model_type": kind}
        with pytest.raises(RequestError, match=said) as caught:
            build_start(str(edited(dual, tmp_path / kind, vision_config=vision)))
        assert "\n" not in str(caught.value)


def test_a_picture_size_the_image_encoder_does_not_take_is_told(tmp_path):
    dual = CARDS["vit beside xlm-r"].write(tmp_path / "dual")
    larger = {"size": {"height": 40, "width": 40}}
    with pytest.raises(RequestError, match="a vit of transformers does not take pictures of 40 × 40"):
        build_start(str(edited(dual, tmp_path / "x", "preprocessor_config.json", **larger)))


def test_a_tokenizer_of_another_model_with_fewer_tokens_is_told(folders, tmp_path):
    """All its ids have an embedding, so nothing breaks; texts would mean nothing to the tower."""
    folder, other = folders("xlm-roberta"), folders("cased bert")
    _, report = start(folder)
    assert not any("another model's" in line for line in report.lines())
    tower = edited(folder, tmp_path / "x", vocab_size=5000)
    weights = load_file(tower / "model.safetensors")
    name = next(name for name in weights if name.endswith("word_embeddings.weight"))
    weights[name] = torch.zeros(5000, weights[name].shape[1])
    save_file(weights, tower / "model.safetensors")
    for file in tower.glob("*token*"):
        file.unlink()
    for file in other.glob("*token*"):
        shutil.copy(file, tower)
    _, report = start(tower)
    said = [line for line in report.lines() if "another model's" in line]
    assert len(said) == 1 and "rows for 5,000" in said[0]


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
