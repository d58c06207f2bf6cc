"""A folder of low-rank updates that PEFT wrote is a checkpoint and a start."""

from __future__ import annotations

import json

import pytest
import torch

from cnclip_ft.models.checkpoints import load, save_checkpoint
from cnclip_ft.models.start import build_start
from data_tools.errors import RequestError
from tests.models.helpers import small


@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_is_merged_as_peft_merges_it(tmp_path, rslora):
    from peft import LoraConfig, get_peft_model
    from transformers import ChineseCLIPModel

    save_checkpoint(small(), tmp_path / "base", info={})
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value", "q_proj"], use_rslora=rslora)
    tuned = get_peft_model(ChineseCLIPModel.from_pretrained(tmp_path / "base"), config)
    with torch.no_grad():
        for name, tensor in tuned.named_parameters():
            if "lora_B" in name:
                tensor.normal_(generator=torch.Generator().manual_seed(len(name)))
    tuned.save_pretrained(tmp_path / "adapter")
    tuned.merge_and_unload().save_pretrained(tmp_path / "merged")
    for name in ("vocab.txt", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        (tmp_path / "merged" / name).write_bytes((tmp_path / "base" / name).read_bytes())
    found, expected, base = (load(tmp_path / name) for name in ("adapter", "merged", "base"))
    texts = ["一个红色的圆", "a red circle"]
    torch.testing.assert_close(found.encode_texts(texts), expected.encode_texts(texts), atol=1e-5, rtol=0)
    assert not torch.allclose(found.encode_texts(texts), base.encode_texts(texts), atol=1e-2)
    _, report = build_start(str(tmp_path / "adapter"))
    assert any("low-rank updates of" in line and "rank 4, alpha 8" in line for line in report.lines())

    file = tmp_path / "adapter/adapter_config.json"
    content = json.loads(file.read_text())
    for change, says in (
        ({"use_dora": True}, "use_dora is not read here.*merge_and_unload"),
        ({"base_model_name_or_path": "gone/away"}, "'gone/away', which is not here"),
        ({"base_model_name_or_path": "../adapter"}, "lead back to themselves"),
        ({"r": 0}, "r is 0"),
        ({"lora_alpha": None}, "lora_alpha None"),
    ):
        file.write_text(json.dumps(content | change))
        with pytest.raises(RequestError, match=says):
            load(tmp_path / "adapter")
    file.write_text(json.dumps(content | {"base_model_name_or_path": "../base"}))  # seen from the adapter
    assert load(tmp_path / "adapter")
