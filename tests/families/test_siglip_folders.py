"""What SigLIP's folders say is obeyed, or refused with the line to mend; their vocabulary is read without its own package."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.convert_slow_tokenizer import import_protobuf

import cnclip_ft
from data_tools.errors import RequestError
from tests.families.cards import CARDS


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("siglip")
    return {name: CARDS[name].write(place / name) for name in ("siglip of version 2", "siglip2")}


def edited(file: str, **changes: Any) -> Callable[[Path], None]:
    """Changes of a JSON file, ``section__key`` inside a section."""

    def edit(folder: Path) -> None:
        content = json.loads((folder / file).read_text(encoding="utf-8"))
        for name, value in changes.items():
            *sections, key = name.split("__")
            place = content
            for section in sections:
                place = place[section]
            place[key] = value
        (folder / file).write_text(json.dumps(content), encoding="utf-8")

    return edit


def without(*names: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        save_file({name: t for name, t in tensors.items() if not name.startswith(names)}, folder / "model.safetensors")

    return edit


CONFIG, PICTURE = "config.json", "preprocessor_config.json"
SQUARE, FLEX = "siglip of version 2", "siglip2"


@pytest.mark.parametrize(
    "name,edit,says",
    [
        (
            SQUARE,
            edited(CONFIG, vision_config__vision_use_head=False),
            "vision_use_head is false.*no features of pictures",
        ),
        (SQUARE, edited(CONFIG, vision_config__hidden_act="magic"), "vision_config.*'magic' is no activation"),
        (
            SQUARE,
            edited(CONFIG, text_config__num_attention_heads=5),
            "hidden_size 32 cannot be divided by num_attention_heads 5",
        ),
        (
            SQUARE,
            edited(CONFIG, text_config__relative_positions=8),
            "text_config.relative_positions is 8, which the towers here",
        ),
        (SQUARE, edited(CONFIG, text_config__vocab_size=500), "the vocabulary .* tokens, the text tower 500"),
        (SQUARE, edited(PICTURE, resample=1), "resample is 1; pictures here are resized"),
        (SQUARE, edited(PICTURE, size={"height": 64, "width": 32}), "size is .*the image tower takes 32 × 32"),
        (SQUARE, without("text_model.head."), "incomplete, no 'text_model.head.weight'"),
        (SQUARE, without("vision_model.head."), "missing .*vision_model.head"),
        (SQUARE, without("logit_bias"), "missing .*logit_bias"),
        (
            SQUARE,
            lambda folder: (folder / "tokenizer.json").unlink(),
            "no tokenizer.json in it; fetch the folder whole",
        ),
        (SQUARE, lambda folder: (folder / "tokenizer.json").write_text("{"), "its tokenizer cannot be read"),
        (FLEX, edited(CONFIG, vision_config__num_patches=17), "num_patches 17 is no square"),
        (FLEX, edited(PICTURE, patch_size=16), "patch_size is 16; the image tower takes patches of 8"),
        (FLEX, edited(PICTURE, max_num_patches=0), "max_num_patches is 0, expected a whole number"),
        (FLEX, edited(PICTURE, do_rescale=False), "do_rescale is False; pictures here are divided by 255"),
    ],
)
def test_a_folder_that_cannot_be_what_it_says_is_refused(folders, tmp_path, name, edit, says):
    shutil.copytree(folders[name], tmp_path / "folder")
    if not (tmp_path / "folder" / PICTURE).exists():  # transformers 5 writes it with the processor
        shutil.copy(folders[name] / "processor_config.json", tmp_path / "folder" / PICTURE)
    edit(tmp_path / "folder")
    with pytest.raises(RequestError, match=says):
        cnclip_ft.load(tmp_path / "folder")


def test_the_processor_s_picture_rule_and_budget_are_taken(folders, tmp_path):
    for name in (SQUARE, FLEX):
        shutil.copytree(folders[name], tmp_path / name)
    edited(PICTURE, resample=2, image_mean=[0.4, 0.5, 0.6])(tmp_path / SQUARE)
    edited(PICTURE, resample=3, max_num_patches=12)(tmp_path / FLEX)
    square, flex = (cnclip_ft.load(tmp_path / name).image_tower.preprocessing for name in (SQUARE, FLEX))
    assert (square.resample, square.mean, square.std) == ("bilinear", (0.4, 0.5, 0.6), (0.5, 0.5, 0.5))
    assert (flex.resample, flex.budget, flex.shape) == ("bicubic", 12, (13, 192))


def spiece(file: Path) -> None:
    """A model of the package sentencepiece, made without it."""
    pieces = ["<pad>", "</s>", "<unk>", "▁", "a", "b", "▁ab", "狗", "▁狗", "ab"]
    content = import_protobuf().ModelProto()
    for number, piece in enumerate(pieces):
        content.pieces.add(piece=piece, score=-1.0 - number / 10, type=3 if number < 2 else 2 if number == 2 else 1)
    content.trainer_spec.model_type, content.trainer_spec.unk_id = 1, 2
    file.write_bytes(content.SerializeToString())


def test_siglip_s_vocabulary_is_read_without_its_package(folders, tmp_path):
    folder = tmp_path / "folder"
    shutil.copytree(folders[SQUARE], folder)
    (folder / "tokenizer.json").unlink()
    spiece(folder / "spiece.model")
    settings = {"tokenizer_class": "SiglipTokenizer", "pad_token": "</s>", "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    with pytest.raises(RequestError, match="pad_token_id is 0, .* 1: it is another model's; fetch both again"):
        cnclip_ft.load(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["text_config"]["pad_token_id"] = 1
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    ours = cnclip_ft.load(folder)
    ids, mask = ours.tokenizer.pad(ours.tokenizer.encode(["A-B!  狗", "", "x"]))
    assert ids[:, :4].tolist() == [[6, 8, 1, 1], [1, 1, 1, 1], [3, 2, 1, 1]]
    assert ids.shape == (3, 64) and bool((ids[:, 4:] == 1).all()) and bool(mask.all())
    (folder / "spiece.model").write_bytes(b"no model")
    with pytest.raises(RequestError, match="spiece.model: SigLIP's vocabulary cannot be read.*fetch it again"):
        cnclip_ft.load(folder)


def test_numbers_of_one_and_of_no_dimension_are_the_same(folders, tmp_path):
    shutil.copytree(folders[SQUARE], tmp_path / "folder")
    tensors = load_file(tmp_path / "folder" / "model.safetensors")
    assert tensors["logit_scale"].shape == tensors["logit_bias"].shape == (1,)
    flat = {name: t.reshape(()) if name.startswith("logit_") else t for name, t in tensors.items()}
    save_file(flat, tmp_path / "folder" / "model.safetensors")
    one, other = cnclip_ft.load(folders[SQUARE]), cnclip_ft.load(tmp_path / "folder")
    assert torch.equal(one.logit_bias, other.logit_bias) and one.logit_bias.shape == ()
