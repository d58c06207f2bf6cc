"""OpenAI's and open_clip's files as whole models: both towers, the vocabulary looked for, refusals in one sentence."""

from __future__ import annotations

import gzip
import json
from importlib import util

import pytest
import torch
import transformers

import cnclip_ft
from cnclip_ft.export.run import export_checkpoint
from cnclip_ft.models.checkpoints import file_tensors, save_checkpoint
from cnclip_ft.models.families import cleaning
from cnclip_ft.models.families.clip import bpe
from cnclip_ft.models.formats.clip_names import text_from_ours, text_to_ours
from cnclip_ft.models.formats.cn_clip import to_official
from data_tools.errors import RequestError
from tests.models.helpers import RESNET, small, tensors

pytest.importorskip("ftfy")
SAID = ["一只狗", "A  red &amp; car", "", "dog " * 99]
NUMBERS = {"input_resolution": torch.tensor(32), "context_length": torch.tensor(77), "vocab_size": torch.tensor(49408)}


@pytest.fixture(scope="module")
def merges(tmp_path_factory):
    """A file like OpenAI's, of as many merges."""
    letters = list(bpe._byte_letters().values())
    pairs = [f"{first} {second}" for first in letters for second in (f"{letter}</w>" for letter in letters)]
    file = tmp_path_factory.mktemp("merges") / bpe.MERGES
    file.write_bytes(gzip.compress("\n".join(["#version", *pairs[:48894], "left over", ""]).encode()))
    return file


@pytest.fixture(autouse=True)
def no_packages(monkeypatch):
    monkeypatch.setattr(bpe, "find_spec", lambda name: None)


@pytest.fixture(scope="module")
def library():
    """A CLIP of transformers; heads 64 wide, as a bare file implies."""
    torch.manual_seed(0)
    vision = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 1,
        "intermediate_size": 256,
        "image_size": 32,
        "patch_size": 8,
    }
    text = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 1,
        "intermediate_size": 256,
        "eos_token_id": 49407,
    }
    model = transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=32)
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def state(library) -> dict[str, torch.Tensor]:
    """What OpenAI's code would save of it."""
    ours = {name: tensor for name, tensor in library.state_dict().items() if not name.endswith("position_ids")}
    text = {name: tensor for name, tensor in ours.items() if name.startswith("text_")}
    return to_official({name: ours[name] for name in ours.keys() - text.keys()}) | text_from_ours(text)


def test_names_there_and_back_are_bit_equal(library):
    text = {name: tensor for name, tensor in library.state_dict().items() if name.startswith("text_")}
    back = text_to_ours(text_from_ours(text))
    assert back.keys() == text.keys() and all(torch.equal(back[name], text[name]) for name in text)


@pytest.mark.parametrize("kind", ["openai", "wrapped", "script"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_both_towers_of_openais_file(kind, library, merges, tmp_path):
    content = state(library) | (NUMBERS if kind != "wrapped" else {})
    file = tmp_path / "ViT-B-32.pt"
    if kind == "script":
        _script(content).save(str(file))
    else:
        torch.save(
            {"state_dict": {f"module.{n}": t for n, t in content.items()}} if kind == "wrapped" else content, file
        )
    (tmp_path / bpe.MERGES).write_bytes(merges.read_bytes())
    model = cnclip_ft.load(file)
    ids, mask = model.tokenizer.pad(model.tokenizer.encode(SAID))
    assert ids.shape[1] == 77 and ids[2, :2].tolist() == [49406, 49407] and mask[2].sum() == 2
    with torch.no_grad():
        expected = library.get_text_features(input_ids=ids).pooler_output
        torch.testing.assert_close(model.text_tower(ids, mask), expected, atol=1e-5, rtol=1e-5)
        pixels = torch.randn(2, 3, 32, 32)
        expected = library.get_image_features(pixel_values=pixels).pooler_output
        torch.testing.assert_close(model.image_tower(pixels), expected, atol=1e-5, rtol=1e-5)
    assert model.logit_scale == library.logit_scale and model.image_tower.preprocessing.fit == "crop_even"
    save_checkpoint(model, tmp_path / "ours", info={})
    again = transformers.AutoModel.from_pretrained(tmp_path / "ours")
    assert type(again) is transformers.CLIPModel
    assert all(torch.equal(tensor, library.state_dict()[name]) for name, tensor in again.state_dict().items())
    assert torch.equal(cnclip_ft.load(tmp_path / "ours").encode_texts(SAID), model.encode_texts(SAID))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    plain = ["a dog", "狗", ""]
    assert tokenizer(plain)["input_ids"] == model.tokenizer.encode(plain)


def _script(content: dict[str, torch.Tensor]) -> torch.jit.ScriptModule:
    class Holder(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    root = Holder()
    for name, tensor in content.items():
        *path, last = name.split(".")
        module = root
        for part in path:
            if part not in dict(module.named_children()):
                module.add_module(part, Holder())
            module = getattr(module, part)
        module.register_buffer(last, tensor)
    return torch.jit.script(root)


def test_a_resnet_with_its_text_tower_through_open_clips_folder(library, merges, tmp_path):
    picture = {
        name: tensor for name, tensor in to_official(tensors(small(RESNET))).items() if name.startswith("visual.")
    }
    content = {name: tensor for name, tensor in state(library).items() if not name.startswith("visual.")} | picture
    torch.save(content | NUMBERS, tmp_path / "RN.pt")
    (tmp_path / bpe.MERGES).write_bytes(merges.read_bytes())
    model = cnclip_ft.load(tmp_path / "RN.pt")
    save_checkpoint(model, tmp_path / "ours", info={})
    done = export_checkpoint(tmp_path / "ours", "open_clip", tmp_path / "theirs")
    assert done.difference < 1e-6 and "local-dir" in done.advice
    before, after = file_tensors(model), file_tensors(cnclip_ft.load(tmp_path / "theirs"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(RequestError, match="CLIPModel is a ViT.*a ResNet and a clip_text.*--to open_clip"):
        export_checkpoint(tmp_path / "ours", "huggingface", tmp_path / "x")
    export_checkpoint(tmp_path / "ours", "open_clip", tmp_path / "theirs", overwrite=True)
    config = json.loads((tmp_path / "theirs" / "open_clip_config.json").read_text(encoding="utf-8"))
    assert config["model_cfg"]["quick_gelu"] and config["preprocess_cfg"]["resize_mode"] == "shortest"


def test_merges_are_looked_for_and_their_absence_said(library, merges, tmp_path, monkeypatch):
    torch.save(state(library), tmp_path / "x.pt")
    with pytest.raises(RequestError, match=f"{tmp_path}.*vocab.json and merges.txt.*pip install open_clip_torch"):
        cnclip_ft.load(tmp_path / "x.pt")
    (tmp_path / bpe.MERGES).write_bytes(b"no gzip")
    with pytest.raises(RequestError, match="not the vocabulary of CLIP.*fetch it again"):
        cnclip_ft.load(tmp_path / "x.pt")
    (tmp_path / bpe.MERGES).unlink()
    spec = util.spec_from_file_location(
        "open_clip", merges.parent / "__init__.py", submodule_search_locations=[str(merges.parent)]
    )
    monkeypatch.setattr(bpe, "find_spec", lambda name: spec if name == "open_clip" else None)
    first = cnclip_ft.load(tmp_path / "x.pt").tokenizer
    found = bpe._of_gzip(merges)
    names = {"<|startoftext|>": 49406, "<|endoftext|>": 49407}
    (tmp_path / "vocab.json").write_text(json.dumps(found.vocabulary | names), encoding="utf-8")
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, found.merges)]), encoding="utf-8")
    monkeypatch.setattr(bpe, "find_spec", lambda name: None)
    assert cnclip_ft.load(tmp_path / "x.pt").tokenizer.encode(SAID) == first.encode(SAID)


def test_a_library_that_is_missing_is_said(library, merges, tmp_path, monkeypatch):
    torch.save(state(library), tmp_path / "x.pt")
    (tmp_path / bpe.MERGES).write_bytes(merges.read_bytes())
    monkeypatch.setattr(cleaning, "find_spec", lambda name: None)
    with pytest.raises(RequestError, match=r"pip install 'cnclip-ft\[open_clip\]'"):
        cnclip_ft.load(tmp_path / "x.pt")
