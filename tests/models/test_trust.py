"""Code that a file names is imported on the user's word alone; what a checkpoint describes is checked before it is built."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import cnclip_ft
from cnclip_ft.models.checkpoints import load, save_checkpoint
from cnclip_ft.models.formats.image_half import read_image_half
from cnclip_ft.models.start import build_start
from data_tools.errors import RequestError
from tests.models.helpers import TEXT, features, official, small

SAVED = Path(__file__).with_name("saved_by_0_1_0")


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ours") / "a"
    save_checkpoint(small(), folder, info={})
    return folder


def changed(ours, target, change, name="cnclip_ft.json"):
    shutil.copytree(ours, target)
    content = json.loads((target / name).read_text(encoding="utf-8"))
    change(content)
    (target / name).write_text(json.dumps(content), encoding="utf-8")
    return target


def names_code(factory):
    return lambda c: c["model"].update(image={"kind": "foreign", "factory": factory})


@pytest.fixture
def evil(tmp_path, monkeypatch):
    """A module that leaves a trace when it is imported."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "stranger.py").write_text(
        f"open({str(tmp_path / 'trace')!r}, 'w')\nimport sys\ndef leaves(): sys.exit()\ndef raises(): raise BaseExceptionGroup\n",
        encoding="utf-8",
    )
    (tmp_path / "lib" / "leaver.py").write_text("import sys\nsys.exit(0)\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path / "lib"))
    yield tmp_path / "trace"
    sys.modules.pop("stranger", None)


def test_a_checkpoint_that_names_code_is_refused_without_the_users_word(ours, tmp_path, evil):
    folder = changed(ours, tmp_path / "b", names_code("stranger:leaves"))
    for read in (
        load,
        build_start,
        lambda p: build_start({"image": str(p), "text": TEXT}),
        lambda p: build_start(str(p)),
    ):
        with pytest.raises(
            RequestError, match="code that the checkpoint names, stranger:leaves.*--trust-import.*trust_import=True"
        ):
            read(folder)
    assert not evil.exists()


@pytest.mark.parametrize(
    "factory,message",
    [
        ("stranger:leaves", "the factory failed \\(SystemExit"),
        ("leaver:x", "importing it failed \\(SystemExit"),
        ("sys:exit", "SystemExit"),
        ("stranger:nothing", "has no attribute"),
        ("builtins:dict", "it is a dict"),
    ],
)
def test_trusted_code_that_leaves_or_fails_is_a_message(ours, tmp_path, evil, factory, message):
    with pytest.raises(RequestError, match=message):
        load(changed(ours, tmp_path / "b", names_code(factory)), trust_import=True)


@pytest.mark.parametrize("factory", [":y", "x", "a/b:c", "..x:y z", "", 5, None])
def test_what_is_no_import_path(ours, tmp_path, factory):
    with pytest.raises(RequestError, match="image.factory is"):
        load(changed(ours, tmp_path / "b", names_code(factory)), trust_import=True)


def test_a_file_of_weights_never_names_code(tmp_path, evil):
    described = json.loads((SAVED / "folder" / "cnclip_ft.json").read_text(encoding="utf-8"))["model"]
    described |= {"image": {"kind": "foreign", "factory": "stranger:leaves"}}
    torch.save({"state_dict": official(small()), "cnclip_ft": described}, tmp_path / "x.pt")
    for read in (lambda p: load(p, trust_import=True), read_image_half):
        with pytest.raises(RequestError, match="refused, it names code to import"):
            read(tmp_path / "x.pt")
    assert not evil.exists()


def test_python_m_in_a_folder_imports_nothing_of_it(tmp_path):
    for name in ("typing", "__future__", "typer", "json", "data_tools", "torch", "re", "yaml"):
        (tmp_path / f"{name}.py").write_text("open('trace', 'w')\n", encoding="utf-8")
    root = Path(cnclip_ft.__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-m", "cnclip_ft", "data", "check", "none"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 2 and "none" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "trace").exists()


def test_a_recipe_that_came_with_a_checkpoint_is_a_file(ours, tmp_path, evil):
    from cnclip_ft.calls import read_recipe

    folder = tmp_path / "b"
    shutil.copytree(ours, folder)
    text = "model: {start: {image: 'stranger:leaves', text: {hidden: 64, layers: 1, heads: 1}}}\ndata: {train: a, valid: b}\n"
    text += "stages: {s: {train: both, steps: 2, warmup_steps: 1, batch_size: 2, learning_rate: 0.1}}\n"
    for place in (folder, tmp_path):
        (place / "mine.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(RequestError, match="stranger:leaves.*--trust-import"):
        read_recipe(str(folder / "mine.yaml"), (), False)
    own = read_recipe(str(tmp_path / "mine.yaml"), (), False)
    assert read_recipe(str(folder / "mine.yaml"), (), True) == own and own.model.code == "stranger:leaves"


def test_rules_do_not_look_at_a_tower_that_came_with_a_checkpoint(ours, tmp_path, evil):
    """What they look at is made by its code."""
    from cnclip_ft.calls import read_recipe
    from tests.training.helpers import write_stores

    write_stores(tmp_path)
    folder = tmp_path / "b"
    shutil.copytree(ours, folder)
    text = "rules: own-data\nmodel: {start: {image: 'stranger:leaves', text: a/bert}}\n"
    text += (
        f"data: {{train: {tmp_path / 'train'}, valid: {tmp_path / 'valid'}}}\nstages: {{align: {{}}, contrast: {{}}}}\n"
    )
    (folder / "mine.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(RequestError, match="stranger:leaves.*--trust-import") as told:
        read_recipe(str(folder / "mine.yaml"), (), False)
    assert not evil.exists() and str(told.value).count("mine.yaml") == 1


# ---- descriptions ---------------------------------------------------------------------------------------------------


def image(**values):
    return lambda c: c["model"]["image"].update(values)


def text(**values):
    return lambda c: c["model"]["text"].update(values)


def model(**values):
    return lambda c: c["model"].update(values)


@pytest.mark.parametrize(
    "change,said",
    [
        (lambda c: c["model"]["image"].pop("kind"), "model.image.kind is missing"),
        (image(kind="cnn"), "model.image.kind is 'cnn'"),
        (image(hidden_size="64"), "model.image.hidden_size is '64'"),
        (image(num_attention_heads=0), "num_attention_heads is 0"),
        (image(num_attention_heads=7), "hidden_size 64 cannot be divided by num_attention_heads 7"),
        (image(patch_size=0), "patch_size is 0"),
        (image(patch_size=64), "patch_size 64 is larger than image_size 32"),
        (image(hidden_act="x"), "'x' is no activation"),
        (image(num_hidden_layers=-1), "num_hidden_layers is -1"),
        (image(num_hidden_layers=10**7), "num_hidden_layers is 10000000"),
        (image(num_hidden_layers=900), "900 image layers, 2 in the weights"),
        (image(image_size=[32, 32]), "image_size is \\[32, 32\\]"),
        (image(layer_norm_eps=math.nan), "layer_norm_eps is nan"),
        (image(layer_norm_eps=0), "layer_norm_eps is 0"),
        (image(hidden_size=True), "hidden_size is True"),
        (image(hidden_size=64.0), "hidden_size is 64.0"),
        (image(attention_dropout=1), "is 1"),
        (image(mean=[1]), "mean"),
        (image(mean=[0.1] * 3, std=[0, 0, 0]), "std"),
        (image(use_rope=True), "use_rope is a key that is not known"),
        (image(hidden_size=10**9), "hidden_size is 1000000000"),
        (lambda c: c["model"]["image"].pop("patch_size"), "patch_size is missing"),
        (text(vocab_size=-3), "vocab_size is -3"),
        (text(vocab_size=10**12), "vocab_size"),
        (text(vocab_size=9000), "21,128 tokens, the text tower 9,000"),
        (text(pooling="max"), "pooling is 'max'"),
        (text(max_position_embeddings=20), "20 positions"),
        (text(type_vocab_size=3), "token_type"),
        (text(hidden_size=96, num_attention_heads=3), "expected \\["),
        (text(num_hidden_layers=[1]), "is \\[1\\]"),
        (model(projection=-1), "projection is -1"),
        (model(projection=31), "expected \\["),
        (model(context_length="52"), "context_length is '52'"),
        (model(context_length=2), "context_length is 2"),
        (model(architecture="x"), "architecture is 'x'"),
        (model(architecture={"name": 1}), "architecture"),
        (model(image=None), "model.image is None"),
        (model(image=[]), "model.image"),
        (model(text="x"), "model.text is 'x'"),
        (model(more=1), "model.more"),
        (
            model(image={"kind": "resnet", "layers": [10**6], "width": 8, "heads": 1, "image_size": 32}),
            "layers.0 is 1000000",
        ),
        (model(image={"kind": "resnet", "layers": "ab", "width": 8, "heads": 1, "image_size": 32}), "layers is 'ab'"),
        (lambda c: c.update(model=[1]), "model is \\[1\\]"),
        (lambda c: c.update(format="1"), "format '1' is not known"),
    ],
)
def test_descriptions_that_describe_nothing(ours, tmp_path, change, said):
    folder = changed(ours, tmp_path / "b", change)
    with pytest.raises(RequestError, match=said) as caught:
        load(folder)
    assert str(folder) in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize("name", ["vocab.txt", "cnclip_ft.json", "model.safetensors"])
@pytest.mark.parametrize("damage", ["gone", "cut", "pipe", "folder", "other"])
def test_files_of_a_checkpoint_that_are_damaged(ours, tmp_path, name, damage):
    folder = tmp_path / "b"
    shutil.copytree(ours, folder)
    content = (folder / name).read_bytes()
    (folder / name).unlink()
    if damage == "gone" and name == "cnclip_ft.json":
        return  # a folder of transformers, then
    if damage == "pipe":
        os.mkfifo(folder / name)
    elif damage == "folder":
        (folder / name).mkdir()
    elif damage != "gone":
        (folder / name).write_bytes(content[: len(content) // 2] if damage == "cut" else b"\xff\xfe\x00" * 90)
    with pytest.raises(RequestError, match="/b") as caught:
        load(folder)
    assert len(str(caught.value)) < 600


# ---- what stays -----------------------------------------------------------------------------------------------------


def test_a_checkpoint_of_version_0_1_0_is_read():
    known = json.loads((SAVED / "features.json").read_text(encoding="utf-8"))
    model = load(SAVED / "folder")
    picture = Image.new("RGB", (20, 10), tuple(known["colour"]))
    torch.testing.assert_close(
        model.encode_texts(known["texts"]), torch.tensor(known["text_features"]), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(model.encode_images([picture]), torch.tensor(known["image_features"]), atol=1e-5, rtol=0)
    assert model.context_length == 20


def test_features_take_part_in_gradients():
    model = small()
    images, texts = model.encode_images([Image.new("RGB", (9, 9))]), model.encode_texts(["一只狗", "a red car"])
    assert not images.is_inference() and not texts.is_inference() and not texts.requires_grad
    shares = (model.logit_scale.exp() * images @ texts.T).softmax(-1)  # the published demonstration
    shares[0, 0].backward()
    assert model.logit_scale.grad is not None and model.image_tower.visual_projection.weight.grad is None
    probe = torch.nn.Linear(images.shape[1], 3)
    probe(texts).sum().backward()
    assert torch.equal(probe.weight.grad[0], texts.sum(0))
    assert model.encode_images([]).shape == (0, 32)
    torch.testing.assert_close(texts, features(model)[3:5], atol=1e-6, rtol=0)
