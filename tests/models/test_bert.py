"""BERT and RoBERTa-wwm as text towers: [CLS] of the last layer through a new projection, never the pooler."""

from __future__ import annotations

import json

import pytest
import torch

from cnclip_ft.models.checkpoints import load, save_checkpoint
from cnclip_ft.models.start import build_start
from data_tools.errors import RequestError
from tests.models.helpers import VIT, equal, official, small, tensors

WORDS = [*"[PAD] [UNK] [CLS] [SEP] [MASK]".split(), *"一二三四五红蓝猫狗", "a", "b", "##b"]
IMAGE = VIT["image"]


def bert(path, **more):
    """A BERT folder as transformers writes it: another vocabulary, head and pooler included."""
    from transformers import BertConfig, BertForPreTraining

    torch.manual_seed(3)
    numbers = {
        "vocab_size": len(WORDS),
        "hidden_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
        "intermediate_size": 96,
        "max_position_embeddings": 40,
        "type_vocab_size": 2,
    }
    model = BertForPreTraining(BertConfig(**numbers | more)).eval()
    model.save_pretrained(path)
    (path / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    return model


def start(text, **more):
    model, report = build_start({"image": IMAGE, "text": str(text), "projection": 32} | more)
    return model.eval(), report


def test_a_roberta_folder_of_another_size_and_vocabulary(tmp_path):
    theirs = bert(tmp_path)
    model, report = start(tmp_path)
    config = model.text_tower.text_model.config
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.vocab_size) == (
        48,
        4,
        3,
        18 - 1,
    )
    assert model.context_length == 40  # not more than it has positions
    ids, mask = model.tokenizer.pad(model.tokenizer.encode(["红猫", "蓝狗ab一二三"]))
    assert ids[0].tolist()[:4] == [2, 10, 12, 3]
    with torch.inference_mode():
        hidden = theirs.bert(input_ids=ids, attention_mask=mask).last_hidden_state[:, 0]
        expected = torch.nn.functional.normalize(model.text_tower.text_projection(hidden), dim=1)
        torch.testing.assert_close(model.text_features(ids, mask), expected, atol=1e-6, rtol=0)
    assert report.new == ["image_tower", "text_tower.text_projection", "logit_scale"]
    assert {name.split(".")[1] for name in report.left_over if name.startswith("text_model")} == {"pooler"}
    assert any(name.startswith("cls.") for name in report.left_over)
    save_checkpoint(model, tmp_path / "mine", info={})
    again = load(tmp_path / "mine")
    assert equal(tensors(again), tensors(model))
    with torch.inference_mode():  # products of few rows round by where the weights lie in memory
        torch.testing.assert_close(again.text_features(ids, mask), model.text_features(ids, mask), atol=1e-6, rtol=0)


def test_mean_of_the_tokens_on_request(tmp_path):
    theirs = bert(tmp_path)
    model, _ = start(tmp_path, pooling="mean")
    ids, mask = model.tokenizer.pad(model.tokenizer.encode(["红猫", "蓝狗ab一二三"]))
    with torch.inference_mode():
        hidden = theirs.bert(input_ids=ids, attention_mask=mask).last_hidden_state
        mean = torch.stack([row[: int(m.sum())].mean(0) for row, m in zip(hidden, mask, strict=True)])
        expected = torch.nn.functional.normalize(model.text_tower.text_projection(mean), dim=1)
        torch.testing.assert_close(model.text_features(ids, mask), expected, atol=1e-6, rtol=0)


def test_the_official_bare_file(tmp_path):
    """`pytorch_model.bin` alone, names with ``bert.``, norms with TensorFlow's gamma and beta."""
    model = small()
    state = {}
    for name, tensor in tensors(model).items():
        if name.startswith("text_model."):
            name = (
                name.replace("text_model.", "bert.")
                .replace("LayerNorm.weight", "LayerNorm.gamma")
                .replace("LayerNorm.bias", "LayerNorm.beta")
            )
            state[name] = tensor
    state |= {
        "bert.pooler.dense.weight": torch.zeros(64, 64),
        "cls.predictions.bias": torch.zeros(9),
        "bert.embeddings.position_ids": torch.arange(9),
    }
    torch.save(state, tmp_path / "pytorch_model.bin")
    loaded, report = start(tmp_path / "pytorch_model.bin")
    for name, tensor in tensors(model).items():
        if name.startswith("text_model."):
            assert torch.equal(tensors(loaded)[name], tensor)
    assert len(report.left_over) == 3
    assert loaded.tokenizer.vocab_size == 21128  # the packaged list: sizes agree


@pytest.mark.parametrize("kind", ["ours", "official"])
def test_text_half_of_a_chinese_clip(kind, tmp_path):
    if kind == "ours":
        save_checkpoint(small(), tmp_path / "a", info={})
    else:
        torch.save({"state_dict": official(small())}, tmp_path / "a")
    model, report = start(tmp_path / "a")
    for name, tensor in tensors(small()).items():
        if name.startswith("text_model."):
            assert torch.equal(tensors(model)[name], tensor)
    assert "text_tower.text_projection" in report.new
    assert any(name.startswith("vision_model.") for name in report.left_over)


def test_upper_case_towers_keep_their_own_tokenizer(tmp_path):
    bert(tmp_path)
    said = '{"tokenizer_class": "BertTokenizer", "do_lower_case": false}'
    (tmp_path / "tokenizer_config.json").write_text(said, encoding="utf-8")
    model, _ = start(tmp_path)
    assert model.text_tower.kind == "encoder"
    lower, upper = model.tokenizer.encode(["ab", "AB"])
    assert lower != upper


def test_what_is_no_text_tower(tmp_path):
    bert(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))

    def refused(message, path=tmp_path, **changes):
        (tmp_path / "config.json").write_text(json.dumps(config | changes), encoding="utf-8")
        with pytest.raises(RequestError, match=message):
            start(path)

    refused("76 tensors belong to no XLMRobertaModel", model_type="xlm-roberta")
    refused("a text model of type 'vit'", model_type="vit")
    refused("position embeddings of type 'relative_key'", position_embedding_type="relative_key")
    refused(r"word_embeddings.weight is \[17, 48\], expected \[17, 24\]", hidden_size=24)
    refused(r"\d+ missing \(text_model.encoder.layer.4", num_hidden_layers=5)
    refused(r"\d+ unexpected \(text_model.encoder.layer.3", num_hidden_layers=3)
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    model, report = build_start({"image": IMAGE, "text": str(tmp_path)}, context_length=52)
    assert model.text_tower.max_length == 52 and any("texts of 40 → 52 tokens" in line for line in report.changed)
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS[:-1]), encoding="utf-8")
    refused("vocab.txt has 16 tokens, the text tower 17")
    (tmp_path / "vocab.txt").unlink()
    refused("no vocab.txt beside the weights")
    (tmp_path / "config.json").unlink()
    with pytest.raises(RequestError, match="no config.json in it; expected a BERT"):
        start(tmp_path)
    torch.save({"a": torch.zeros(1)}, tmp_path / "x.bin")
    with pytest.raises(RequestError, match="no BERT-style text tower in it"):
        start(tmp_path / "x.bin")
    torch.save(
        {"embeddings.word_embeddings.weight": torch.zeros(9, 64), "other.weight": torch.zeros(1)}, tmp_path / "x.bin"
    )
    with pytest.raises(RequestError, match="incomplete|belong to no BERT"):
        start(tmp_path / "x.bin")
    with pytest.raises(RequestError, match="no such file or folder"):
        start(tmp_path / "none")
