"""The official names there and back, and the official package beside ours: same weights, same features."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from cnclip_ft.export.run import export_checkpoint
from cnclip_ft.models.checkpoints import load, save_checkpoint
from cnclip_ft.models.formats.cn_clip import to_official, to_ours
from cnclip_ft.models.preprocessing import OPENAI_MEAN, OPENAI_STD, normalise
from tests.models.helpers import RESNET, VIT, equal, features, official, pixels, small, tensors
from tests.official import requires_official, run_official

TEXTS = ["一只在雪地里奔跑的狗", "a red car", "“引号”"]


@pytest.mark.parametrize("spec", [VIT, RESNET])
def test_names_there_and_back_are_bit_equal(spec):
    ours = tensors(small(spec))
    assert equal(to_ours(to_official(ours)), ours)


@pytest.mark.parametrize("spec", [VIT, RESNET])
def test_round_trip_through_every_format_is_bit_equal(spec, tmp_path):
    """cn_clip → ours → Hugging Face → ours → cn_clip."""
    torch.save({"epoch": 1, "step": 2, "name": "x", "state_dict": official(small(spec))}, tmp_path / "a.pt")
    save_checkpoint(load(tmp_path / "a.pt"), tmp_path / "b", info={})
    last = tmp_path / "b"
    if spec is VIT:
        export_checkpoint(tmp_path / "b", "huggingface", tmp_path / "c")
        (tmp_path / "c" / "cnclip_ft.json").unlink()  # as a stranger's folder
        save_checkpoint(load(tmp_path / "c"), tmp_path / "d", info={})
        last = tmp_path / "d"
    export_checkpoint(last, "cn_clip", tmp_path / "e.pt")
    first, final = (torch.load(tmp_path / name, weights_only=True)["state_dict"] for name in ("a.pt", "e.pt"))
    assert equal(first, final)


def fused(state):
    """The names of a training with flash attention."""
    out = {}
    for name, tensor in state.items():
        name = name.replace("attn.in_proj_", "attn.Wqkv.") if ".visual." in name else name
        if ".self.query." in name:
            parts = [state[name.replace("query", which)] for which in ("query", "key", "value")]
            out[name.replace("query", "Wqkv")] = torch.cat(parts)
        elif ".self.key." not in name and ".self.value." not in name:
            out[name.replace("attention.output.dense", "attention.self.out_proj")] = tensor
    return out


def test_flash_attention_names(tmp_path):
    model = small()
    state = fused(official(model))
    assert "module.bert.encoder.layer.0.attention.self.Wqkv.weight" in state
    torch.save({"state_dict": state}, tmp_path / "x.pt")
    assert equal(tensors(load(tmp_path / "x.pt")), tensors(model))


def test_without_prefix_in_fp16_and_with_what_old_files_carry(tmp_path):
    model = small()
    state = {name.removeprefix("module."): tensor.half() for name, tensor in official(model).items()}
    state |= {"bert.pooler.dense.weight": torch.zeros(64, 64), "bert.embeddings.position_ids": torch.arange(512)}
    torch.save({"state_dict": state}, tmp_path / "x.pt")
    assert equal(tensors(load(tmp_path / "x.pt")), {name: t.half().float() for name, t in tensors(model).items()})
    torch.save({name: state[name] for name in state}, tmp_path / "bare.pt")  # the state dict alone
    assert equal(tensors(load(tmp_path / "bare.pt")), tensors(load(tmp_path / "x.pt")))


def test_half_of_a_half_checkpoint_is_written_as_it_was(tmp_path):
    state = {
        name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in official(small()).items()
    }
    torch.save({"state_dict": state}, tmp_path / "a.pt")
    done = export_checkpoint(tmp_path / "a.pt", "cn_clip", tmp_path / "b.pt", dtype="float16")
    assert done.difference < 1e-6  # products of few rows round by where the weights lie; these are the same (next line)
    assert equal(torch.load(tmp_path / "b.pt", weights_only=True)["state_dict"], state)


# ---- beside the official package ------------------------------------------------------------------------------------

SIZES = {  # name: (text tower, layers per tower or None for all)
    "RN50": ("RBT3-chinese", None),
    "ViT-B-16": ("RoBERTa-wwm-ext-base-chinese", None),
    "ViT-L-14": ("RoBERTa-wwm-ext-base-chinese", 2),
    "ViT-L-14-336": ("RoBERTa-wwm-ext-base-chinese", 2),
    "ViT-H-14": ("RoBERTa-wwm-ext-large-chinese", 2),
}

OFFICIAL = """
import json, math, shutil
from pathlib import Path
import numpy as np
import cn_clip.clip as clip
import cn_clip.clip.utils as utils
from cn_clip.clip.model import CLIP

folder, task = Path(sys.argv[1]), sys.argv[2]
texts = json.loads((folder / "texts.json").read_text(encoding="utf-8"))
# Its own configurations; only the number of layers is ours for the large sizes.
configs = folder / "model_configs"
if not configs.exists():
    shutil.copytree(Path(utils.__file__).parent / "model_configs", configs)

def configuration(vision, text, layers):
    numbers = {}
    for name in (vision, text):
        numbers |= json.loads((configs / f"{name}.json").read_text())
    if isinstance(numbers["vision_layers"], str):
        numbers["vision_layers"] = json.loads(numbers["vision_layers"])
    if layers:
        numbers["vision_layers"] = numbers["text_num_hidden_layers"] = layers
    return numbers

def random_weights(model):
    # Values with 11 bits, as in released files: the official loader rounds everything to fp16.
    noise = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
    for number, (name, tensor) in enumerate(model.state_dict().items()):
        if not tensor.is_floating_point():
            continue
        shift, scale = 0.0, 0.02
        if "running_var" in name or name.endswith("weight") and tensor.ndim == 1:
            shift, scale = 1.0, 0.1
        elif tensor.ndim > 1 and "embed" not in name:
            scale = math.prod(tensor.shape[1:]) ** -0.5
        values = noise.roll(number * 7919).repeat(-(-tensor.numel() // noise.numel()))[: tensor.numel()]
        tensor.copy_((values.clamp(-3, 3) * scale + shift).half().view(tensor.shape))
    model.logit_scale.data.fill_(4.5)

def write_features(model, name, suffix):
    size = model.visual.input_resolution
    pixels = torch.from_numpy(np.load(folder / f"pixels-{size}.npy"))
    with torch.no_grad():
        # the data set's own preparation comes before its tokenizer
        ready = [t.lower().replace("\\u201c", '"').replace("\\u201d", '"') for t in texts]
        image, text = model.encode_image(pixels), model.encode_text(clip.tokenize(ready))
    image, text = image / image.norm(dim=1, keepdim=True), text / text.norm(dim=1, keepdim=True)
    np.savez(folder / f"{name}{suffix}.npz", image=image, text=text, similarity=(image @ text.T) * model.logit_scale.exp().item())

# Every weight is read from a file or written above: drawing hundreds of millions of numbers first would be the longest part.
for name in ("normal_", "uniform_", "xavier_uniform_", "kaiming_uniform_", "zeros_"):
    setattr(torch.nn.init, name, lambda tensor, *a, **k: tensor)
torch.Tensor.normal_ = lambda self, *a, **k: self

with torch.inference_mode():
    for name, (text, layers) in json.loads(sys.argv[3]).items():
        if task == "make":
            with torch.device("meta"):
                model = CLIP(**configuration(name, text, layers))
            model = model.to_empty(device="cpu").eval()
            random_weights(model)
            state = {"module." + k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
            torch.save({"epoch": 1, "step": 1, "name": name, "state_dict": state}, folder / f"{name}.pt")
            write_features(model, name, "")
        else:
            if layers:
                numbers = configuration(name, text, layers)
                for part, prefix in ((name, "text_"), (text, "")):
                    kept = {k: v for k, v in numbers.items() if k in json.loads((configs / f"{part}.json").read_text())}
                    (configs / f"{part}.json").write_text(json.dumps(kept))
                utils.__file__ = str(folder / "utils.py")
            size = 336 if name.endswith("336") else 224
            path = str(folder / f"{name}-exported.pt")
            model, _ = utils.load_from_name(path, device="cpu", vision_model_name=name, text_model_name=text, input_resolution=size)
            write_features(model.eval(), name, "-again")
            if name == "RN50":  # the official training resumes into a wrapped model, with the optimizer left out
                content = torch.load(path, map_location="cpu", weights_only=True)
                wrapped = torch.nn.ModuleDict({"module": CLIP(**configuration(name, text, layers))})
                wrapped.load_state_dict({k: v for k, v in content["state_dict"].items() if "bert.pooler" not in k})
                print("resumed", content["epoch"], content["step"])
        del model
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Random models of all sizes, made and used by the official package."""
    folder = tmp_path_factory.mktemp("official")
    (folder / "texts.json").write_text(json.dumps(TEXTS), encoding="utf-8")
    for size in (224, 336):
        np.save(folder / f"pixels-{size}.npy", normalise(pixels(size, 2), OPENAI_MEAN, OPENAI_STD).numpy())
    run_official(OFFICIAL, folder, "make", json.dumps(SIZES))
    yield folder
    for file in folder.glob("*.pt"):  # gigabytes
        file.unlink()


def check(folder, name, model):
    theirs = np.load(folder / f"{name}.npz")
    with torch.inference_mode():
        image, text = model.image_features(pixels(model.image_size, 2)), model.encode_texts(TEXTS)
        similarity = model.logit_scale.exp() * image @ text.T
    for what, ours in (("image", image), ("text", text), ("similarity", similarity)):
        difference = np.abs(ours.numpy() - theirs[what]).max()
        assert difference < 1e-4, (name, what, difference)
    # The features say something: images and texts are told apart.
    assert (theirs["text"][0] - theirs["text"][1]).std() > 1e-3 and (
        theirs["image"][0] - theirs["image"][1]
    ).std() > 1e-4


@requires_official
@pytest.mark.parametrize("name", SIZES)
def test_features_equal_those_of_the_official_package(made, name):
    model = load(made / f"{name}.pt")
    assert SIZES[name][1] or model.architecture.name == name
    check(made, name, model)


@requires_official
@pytest.mark.slow
def test_the_official_loaders_read_what_is_exported(made):
    for name, (text, layers) in SIZES.items():
        # These weights have 11 bits, so that nothing is lost in float16; it halves the files.
        dtype = "float16" if layers else "float32"
        done = export_checkpoint(made / f"{name}.pt", "cn_clip", made / f"{name}-exported.pt", dtype=dtype)
        assert done.difference < 1e-6
        assert (f'text_model_name="{text}"' in done.advice) == (layers is None)
    printed = run_official(OFFICIAL, made, "load", json.dumps(SIZES))
    assert "resumed 0 0" in printed
    for name in SIZES:
        first, again = np.load(made / f"{name}.npz"), np.load(made / f"{name}-again.npz")
        for what in ("image", "text", "similarity"):
            assert np.abs(first[what] - again[what]).max() < 1e-4, (name, what)


@requires_official
def test_transformers_reads_what_is_exported(made, tmp_path):
    """ViT-H-14: its heads are 80 wide, which only the configuration says."""
    from transformers import ChineseCLIPModel

    name = "ViT-H-14"
    export_checkpoint(made / f"{name}.pt", "huggingface", tmp_path / "hf")
    theirs = ChineseCLIPModel.from_pretrained(tmp_path / "hf").eval()
    expected = np.load(made / f"{name}.npz")
    with torch.inference_mode():
        image = theirs.get_image_features(torch.from_numpy(np.load(made / "pixels-224.npy"))).pooler_output
    assert np.abs(torch.nn.functional.normalize(image, dim=1).numpy() - expected["image"]).max() < 1e-4
    torch.testing.assert_close(features(load(tmp_path / "hf")), features(load(made / f"{name}.pt")), atol=1e-6, rtol=0)
