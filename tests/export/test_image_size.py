"""`--image-size` of `export`: what is written takes pictures of that size, says so, and gives the features of `encode --image-size`."""

from __future__ import annotations

import json
import os
import re

import onnxruntime
import pytest
import torch
from typer.testing import CliRunner

from cnclip_ft.cli import app
from cnclip_ft.evaluation.encoding import encode_to_folder
from cnclip_ft.evaluation.options import Options
from cnclip_ft.export import run
from cnclip_ft.export.run import export_checkpoint
from cnclip_ft.features.encode import encode_source
from cnclip_ft.features.folder import read_split
from cnclip_ft.features.sources import store_source
from cnclip_ft.models.checkpoints import load, read_info, save_checkpoint
from cnclip_ft.models.formats.open_clip_writing import SIGLIP_SIDES, model_config
from cnclip_ft.models.schema import MOST_PIXELS
from cnclip_ft.models.start import BOUNDS
from cnclip_ft.new_towers import NewResNet, NewVit
from cnclip_ft.recipe import ModelSection
from data_tools.errors import RequestError
from tests.evaluation.tiny import make_store
from tests.models.helpers import small
from tests.models.test_towers import HERE, foreign
from tests.official import FOLDER, requires_open_clip

ROW = {"row": {"mean_recall": 50.0}}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A store, a ViT for pictures of 32 × 32, and a tower by import path for any square, made for 24 × 24."""
    folder = tmp_path_factory.mktemp("sizes")
    make_store(folder / "valid", images=4)
    save_checkpoint(small(), folder / "vit", info=ROW)
    save_checkpoint(foreign("convolutional")[0], folder / "any", info={})
    return folder


def encoded(place, name, size, folder):
    """Features of the store as `encode --image-size` writes them."""
    options = Options(image_size=size, device="cpu", trust_import=True)
    encode_to_folder(place / name, place / "valid", folder, options, say=lambda line: None)
    return read_split(folder)


def same(writer, target, place, expected):
    """The written model on the store, its pictures decoded by its own rule."""
    source = store_source(place / "valid")
    found = encode_source(writer.open_encoder(target), source.split, source.read, batch_size=3)
    assert torch.allclose(found.image_features, expected.image_features, atol=1e-4)
    assert torch.allclose(found.text_features, expected.text_features, atol=1e-4)


@pytest.mark.parametrize("to", ["huggingface", "cn_clip", "onnx"])
def test_an_export_at_another_size_has_the_features_of_encode_at_it(place, tmp_path, to):
    target, writer = tmp_path / "out", __import__(run.FORMATS[to], fromlist=["write"])
    done = export_checkpoint(place / "vit", to, target, image_size=48)
    assert done.at_size == {"image_size": {"used": 48, "own": 32}}
    expected, own = (encoded(place, "vit", size, tmp_path / f"features-{size}") for size in (48, None))
    assert not torch.allclose(expected.image_features, own.image_features, atol=1e-3)
    same(writer, target, place, expected)
    if to == "huggingface":
        assert json.loads((target / "preprocessor_config.json").read_text())["size"] == {"height": 48, "width": 48}
        assert json.loads((target / "config.json").read_text())["vision_config"]["image_size"] == 48
    if to == "onnx":
        assert json.loads((target / "description.json").read_text())["image"]["shape"] == ["batch", 3, 48, 48]
        (given,) = onnxruntime.InferenceSession(target / "image.onnx").get_inputs()
        assert given.shape[1:] == [3, 48, 48]


def test_a_tower_for_any_square_has_the_size_as_graph_and_no_place_elsewhere(place, tmp_path):
    export_checkpoint(place / "any", "onnx", tmp_path / "onnx", image_size=40, trust_import=True)
    writer = __import__(run.FORMATS["onnx"], fromlist=["write"])
    same(writer, tmp_path / "onnx", place, encoded(place, "any", 40, tmp_path / "features"))
    for to in ("huggingface", "cn_clip"):
        with pytest.raises(RequestError, match="by import path|its image tower is tests"):
            export_checkpoint(place / "any", to, tmp_path / to, image_size=40, trust_import=True)
    assert sorted(os.listdir(tmp_path)) == ["features", "onnx"]


def test_a_size_that_the_model_cannot_take_is_refused(place, tmp_path):
    with pytest.raises(RequestError, match="image_size 45 is no multiple of 8"):
        export_checkpoint(place / "vit", "onnx", tmp_path / "x", image_size=45)
    save_checkpoint(foreign()[0], tmp_path / "fixed", info={})
    with pytest.raises(RequestError, match="image_size 48: .* takes 24"):
        export_checkpoint(tmp_path / "fixed", "onnx", tmp_path / "x", image_size=48, trust_import=True)
    assert os.listdir(tmp_path) == ["fixed"]


def test_no_size_is_taken_that_a_checkpoint_could_not_say(place, tmp_path):
    """It would be trained, and its checkpoint refused."""
    largest = load(place / "any", image_size=MOST_PIXELS, trust_import=True)
    save_checkpoint(largest, tmp_path / "largest", info={})
    assert load(tmp_path / "largest", trust_import=True).image_size == MOST_PIXELS
    with pytest.raises(RequestError, match="image_size is 8193, expected 8 to 8,192"):
        load(place / "any", image_size=MOST_PIXELS + 1, trust_import=True)
    for given in (ModelSection, NewVit, NewResNet):
        limits = given.model_json_schema()["properties"]["image_size"]["anyOf"][0]
        assert (limits["minimum"], limits["maximum"]) == BOUNDS["image_size"]


def test_half_precision_has_the_size_too(place, tmp_path):
    export_checkpoint(place / "vit", "huggingface", tmp_path / "half", image_size=48, dtype="float16")
    assert load(tmp_path / "half").image_size == 48


def test_the_command_and_the_card_name_a_size_that_is_not_the_checkpoint_s(place, tmp_path):
    def told(*arguments) -> str:
        done = CliRunner().invoke(app, ["export", *map(str, arguments)])
        assert done.exit_code == 0, done.exception
        return done.output

    words = "pictures of 48 × 48, the checkpoint's own are 32 × 32"
    assert words in " ".join(told(place / "vit", "--image-size", 48, "--output", tmp_path / "a").split())
    card = (tmp_path / "a" / "README.md").read_text(encoding="utf-8")
    assert words in card and "Recall on its validation split (pictures of 32 × 32)" in card
    # Written once more as it is, or at a third size: it was judged at the first one all the same.
    for size, used in (((), 48), (("--image-size", 64), 64)):
        said = told(tmp_path / "a", *size, "--output", tmp_path / str(used))
        assert f"pictures of {used} × {used}, the checkpoint's own are 32 × 32" in " ".join(said.split())
        assert read_info(tmp_path / str(used))["image_size"] == {"used": used, "own": 32}
    assert "pictures of" not in told(tmp_path / "a", "--image-size", 32, "--output", tmp_path / "back")
    assert "image_size" not in read_info(tmp_path / "back")
    for size in ((), ("--image-size", 32)):
        said = told(place / "vit", *size, "--output", tmp_path / "own", "--overwrite")
        card = (tmp_path / "own" / "README.md").read_text(encoding="utf-8")
        assert "pictures of" not in said + card and "image_size" not in read_info(tmp_path / "own")


def test_open_clip_is_told_of_sizes_that_timm_names():
    """open_clip makes SigLIP's image towers by timm's name, whose size is a part of it."""
    image = {
        "kind": "siglip", "hidden_size": 768, "num_hidden_layers": 12, "patch_size": 16, "image_size": 384, "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
    }  # fmt: skip
    text = {
        "kind": "siglip_text", "hidden_act": "gelu", "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 16, "vocab_size": 99, "layer_norm_eps": 1e-6,
    }  # fmt: skip
    said = model_config({"image": image, "text": text, "projection": 768})["vision_cfg"]
    assert (said["timm_model_name"], said["image_size"]) == ("vit_base_patch16_siglip_384", 384)
    with pytest.raises(ValueError, match="timm has no SigLIP tower base_patch16 for pictures of 320 × 320"):
        model_config({"image": image | {"image_size": 320}, "text": text, "projection": 768})


@requires_open_clip
def test_these_are_all_that_timm_names():
    source = (FOLDER / "timm/models/vision_transformer.py").read_text(encoding="utf-8")
    named = {f"def vit_{kind}_siglip_{side}(" for kind, sides in SIGLIP_SIDES.items() for side in sides}
    assert named == set(re.findall(r"def vit_\w+_siglip_\d+\(", source))


def test_a_start_for_any_square_says_its_other_size(place):
    from cnclip_ft.models.start import build_start

    for start in (str(place / "any"), {"image": str(place / "any"), "text": str(place / "vit")}):
        changed = build_start(start, image_size=40, trust_import=True)[1].changed
        assert [said for said in changed if "image size" in said] == ["image size 24 → 40: no weight changes"]
        assert not [said for said in build_start(start, image_size=24, trust_import=True)[1].changed if "size" in said]
    new = build_start({"image": f"{HERE}:convolutional", "text": str(place / "vit")}, image_size=40)[1]
    assert "image size 24 → 40: no weight changes" in new.changed
