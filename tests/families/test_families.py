"""Every family against its own library: features, ids, pixels, loss; there and back through our checkpoint."""

from __future__ import annotations

import io
import json
import os
import pickle
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import cnclip_ft
from cnclip_ft.export.run import export_checkpoint
from cnclip_ft.models.assembly import stretched
from cnclip_ft.models.checkpoints import file_tensors, save_checkpoint
from cnclip_ft.models.families import fast_tokenizer
from cnclip_ft.models.start import build_start
from cnclip_ft.training.large_batch import GradientStep
from cnclip_ft.training.loss import ContrastiveObjective, SigmoidObjective
from data_tools.errors import RequestError
from tests.families.cards import CARDS, VARIANTS, Card
from tests.families.texts import many_texts

REAL = Path(os.environ.get("CNCLIP_FT_REAL_DATA", "/nowhere")) / "photos"
SAID = ["一只狗在雪地里奔跑", "a red car", "", "两只猫 and a dog 🐶", "dog " * 200]


@pytest.fixture(scope="module", params=CARDS)
def card(request) -> Card:
    return CARDS[request.param]


@pytest.fixture(scope="module")
def folder(card, tmp_path_factory) -> Path:
    return card.write(tmp_path_factory.mktemp("family") / card.name)


@pytest.fixture(scope="module")
def library(folder):
    return transformers.AutoModel.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def ours(folder):
    return aligned(cnclip_ft.load(folder))


def aligned(model):
    """Weights where memory of their own begins, not where a stranger's file has them: the last bit of a product depends on it."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    return model


@pytest.fixture(params=["cpu", "elsewhere"])
def road(request, monkeypatch):
    """Elsewhere is the road of every other device, and of a compiled tower."""
    if request.param == "elsewhere":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)


def tokens(card: Card, folder: Path, texts: list[str]):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return tokenizer(texts, truncation=True, max_length=card.length, return_tensors="pt", **card.tokens)


def photos(count: int = 60) -> list[bytes]:
    """Encoded pictures of many shapes, smooth and with hard edges."""
    draw, files = np.random.default_rng(0), []
    for number in range(count):
        width, height = (int(side) for side in draw.integers(40, 500, 2))
        step = (2, 4, 16)[number % 3]
        noise = draw.integers(0, 256, (height // step + 1, width // step + 1, 3), dtype=np.uint8)
        picture = Image.fromarray(noise).resize((width, height), Image.Resampling(number % 2 * 3))
        file = io.BytesIO()
        picture.save(file, "JPEG" if number % 2 else "PNG")
        files.append(file.getvalue())
    return files


def pictures(model, count: int = 5) -> torch.Tensor:
    """As `Preprocessing.decode` gives them."""
    preprocessing = model.image_tower.preprocessing
    if len(preprocessing.shape) == 3:
        return torch.randint(0, 256, (count, *preprocessing.shape), generator=torch.Generator().manual_seed(1)).to(
            torch.uint8
        )
    return torch.stack([preprocessing.decode(file) for file in photos(count)])


def library_pictures(model, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same for the library's model."""
    return model.image_tower.preprocessing.for_transformers(pixels)


def library_features(library, inputs, model) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        return (
            library.get_image_features(**library_pictures(model, pictures(model))).pooler_output,
            library.get_text_features(**inputs).pooler_output,
        )


def test_features_are_the_librarys(card, folder, library, ours, road):
    images, texts = library_features(library, tokens(card, folder, SAID), ours)
    ids, mask = ours.tokenizer.pad(ours.tokenizer.encode(SAID))
    with torch.no_grad():
        found = ours.image_tower.project(ours.image_trunk(pictures(ours)))
        torch.testing.assert_close(found, images, atol=card.exact, rtol=card.exact)
        torch.testing.assert_close(ours.text_tower(ids, mask), texts, atol=card.exact, rtol=card.exact)
    assert ours.logit_scale == library.logit_scale
    assert getattr(library, "logit_bias", None) == ours.logit_bias


def test_graph_for_other_runtimes_has_the_same_features(ours):
    ids, mask = ours.tokenizer.pad(ours.tokenizer.encode(SAID))
    with torch.no_grad():
        torch.testing.assert_close(
            ours.text_tower.graph()(ids, ours.tokenizer.mask(ids)), ours.text_tower(ids, mask), atol=1e-5, rtol=1e-5
        )


def test_ids_are_the_tokenizers(card, folder, ours):
    texts = many_texts()
    theirs = transformers.AutoTokenizer.from_pretrained(folder)(texts, truncation=True, max_length=card.length)
    found = ours.tokenizer.encode(texts)
    assert len(found) == 5000
    assert [text for text, a, b in zip(texts, found, theirs["input_ids"], strict=True) if a != b] == []
    assert ours.tokenizer.context_length == card.length
    assert ours.tokenizer.encode(["half \ud83d"]) == ours.tokenizer.encode(["half \ufffd"])
    few = [*texts[::50], "half \ud83d"]
    assert ours.tokenizer.prepared(few) == (list(map(ours.tokenizer.prepare, few)), ours.tokenizer.encode(few))


@pytest.fixture(params=["drawn", "real"])
def files(request) -> list[bytes]:
    """Sixty pictures: drawn, or photos that `CNCLIP_FT_REAL_DATA` names a folder of."""
    if request.param == "drawn":
        return photos()
    if not REAL.is_dir():
        pytest.skip("CNCLIP_FT_REAL_DATA names no folder with photos/")
    return [file.read_bytes() for file in sorted(REAL.glob("*.jpg"))[:60]]


def test_pixels_are_within_one_of_the_processors(folder, ours, files):
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    picture, worst = ours.image_tower.preprocessing, 0.0
    for file in files:
        theirs = processor(Image.open(io.BytesIO(file)).convert("RGB"), return_tensors="pt")
        found = library_pictures(ours, picture.decode(file)[None])
        assert found.keys() <= theirs.keys() and all(
            torch.equal(found[k], theirs[k]) for k in found if k != "pixel_values"
        )
        apart = (found["pixel_values"] - theirs["pixel_values"]).abs()
        if "pixel_attention_mask" in found:
            apart = apart[found["pixel_attention_mask"].bool()]
        worst = max(worst, float(apart.max()) * 255 * max(picture.std))
    assert len(files) == 60 and worst <= 1.01


def test_loss_is_the_librarys(card, folder, library, ours):
    if not card.loss:
        pytest.skip("the library has none for it")
    inputs = tokens(card, folder, SAID)
    pixels = pictures(ours)
    with torch.no_grad():
        theirs = library(**inputs, **library_pictures(ours, pixels), return_loss=True).loss
        images, texts = ours(pixels, *ours.tokenizer.pad(ours.tokenizer.encode(SAID)))
        keys = torch.arange(len(SAID))
        objective = ContrastiveObjective() if ours.logit_bias is None else SigmoidObjective()
        found = objective(images, texts, ours.logit_scale, keys, keys, ours.logit_bias).loss
    torch.testing.assert_close(found, theirs, atol=1e-5, rtol=1e-5)


def test_gradients_of_a_divided_batch_are_those_of_the_whole(card, folder):
    """Float64, all parameters, by the family's own loss."""
    model = cnclip_ft.load(folder).double()
    objective = ContrastiveObjective(tile=2) if model.logit_bias is None else SigmoidObjective(tile=2)
    ids, mask = model.tokenizer.pad(model.tokenizer.encode(SAID))
    keys = torch.arange(len(SAID))
    batch = {"pixels": pictures(model), "input_ids": ids, "attention_mask": mask, "image_keys": keys, "text_keys": keys}
    expected: dict[str, torch.Tensor] = {}
    for micro in (None, 1, 2):
        step = GradientStep(
            model, objective, micro_batch_size=micro, autocast=nullcontext, backward=lambda loss: loss.backward()
        )
        model.zero_grad()
        step(batch)
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        expected = expected or found
        assert found.keys() == expected.keys() and max(float(g.abs().max()) for g in found.values()) > 1e-3
        for name, gradient in found.items():
            # DINOv2 of the library resamples its positions in float32, whatever the model's type.
            near = 2e-6 if card.name == "vision-text-dual-encoder" and name.endswith("position_embeddings") else 1e-9
            torch.testing.assert_close(gradient, expected[name], atol=near, rtol=1e-7, msg=name)


def test_save_load_save_is_bit_equal_and_the_library_reads_it(card, folder, library, ours, tmp_path):
    for name, model in (("a", ours), ("b", None)):
        save_checkpoint(model or cnclip_ft.load(tmp_path / "a"), tmp_path / name, info={})
    files = {file.name: file.read_bytes() for file in (tmp_path / "a").iterdir()}
    assert files == {file.name: file.read_bytes() for file in (tmp_path / "b").iterdir()}
    before, after = file_tensors(ours), file_tensors(cnclip_ft.load(tmp_path / "b"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    again = transformers.AutoModel.from_pretrained(tmp_path / "b").eval()
    assert type(again) is type(library)
    theirs, state = library.state_dict(), again.state_dict()
    assert theirs.keys() == state.keys() and all(torch.equal(theirs[name], state[name]) for name in theirs)
    inputs = tokens(card, tmp_path / "b", SAID)
    assert torch.equal(inputs["input_ids"], tokens(card, folder, SAID)["input_ids"])
    for one, two in zip(library_features(library, inputs, ours), library_features(again, inputs, ours), strict=True):
        assert torch.equal(one, two)
    (tmp_path / "b" / "cnclip_ft.json").unlink()  # as a stranger's folder
    stranger = cnclip_ft.load(tmp_path / "b")
    assert torch.equal(stranger.encode_texts(SAID), ours.encode_texts(SAID))
    assert stranger.image_tower.preprocessing == ours.image_tower.preprocessing


def test_processor_and_pipeline_of_the_library_read_ours(card, ours, tmp_path):
    save_checkpoint(ours, tmp_path / "a", info={})
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "a")
    file = photos(2)[1]
    images = Image.open(io.BytesIO(file)).convert("RGB")
    inputs = processor(text=["a dog"], images=images, return_tensors="pt", **card.pictures)
    found = library_pictures(ours, ours.image_tower.preprocessing.decode(file)[None])
    torch.testing.assert_close(inputs["pixel_values"], found["pixel_values"], atol=0.04, rtol=0)
    assert "input_ids" in inputs
    pipe = transformers.pipeline("zero-shot-image-classification", model=str(tmp_path / "a"), device="cpu")
    found = pipe(Image.open(io.BytesIO(file)), candidate_labels=["dog", "猫"], hypothesis_template="{}")
    scale = ours.logit_scale.exp().item()
    cosines = ours.encode_images([file]) @ ours.encode_texts(["dog", "猫"]).T
    bias = ours.logit_bias
    expected = ((scale * cosines).softmax(1) if bias is None else (scale * cosines + bias).sigmoid())[0].tolist()
    for entry in found:
        assert abs(entry["score"] - expected[["dog", "猫"].index(entry["label"])]) < 2e-3


def test_the_description_says_what_it_is(card, ours, tmp_path):
    save_checkpoint(ours, tmp_path / "a", info={})
    config = json.loads((tmp_path / "a" / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == card.name


def test_export_gives_back_the_class_and_the_features(ours, library, tmp_path):
    save_checkpoint(ours, tmp_path / "a", info={})
    done = export_checkpoint(tmp_path / "a", "huggingface", tmp_path / "b")
    assert done.difference < 1e-5 and type(library).__name__ in done.advice


@pytest.mark.slow
def test_onnx_has_the_features(ours, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    save_checkpoint(ours, tmp_path / "a", info={})
    assert export_checkpoint(tmp_path / "a", "onnx", tmp_path / "c").difference < 1e-5


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_of_a_family_have_their_features(name, tmp_path):
    card = VARIANTS[name]
    folder = card.write(tmp_path / card.name)
    ours, theirs = cnclip_ft.load(folder), transformers.AutoModel.from_pretrained(folder).eval()
    images, texts = library_features(theirs, tokens(card, folder, SAID), ours)
    with torch.no_grad():
        found = ours.text_tower(*ours.tokenizer.pad(ours.tokenizer.encode(SAID)))
        torch.testing.assert_close(found, texts, atol=card.exact, rtol=card.exact)
        found = ours.image_tower.project(ours.image_trunk(pictures(ours)))
        torch.testing.assert_close(found, images, atol=card.exact, rtol=card.exact)
    save_checkpoint(ours, tmp_path / "a", info={})
    assert torch.equal(cnclip_ft.load(tmp_path / "a").encode_texts(SAID), ours.encode_texts(SAID))


def test_texts_longer_than_it_was_trained_on(card, folder, ours, tmp_path):
    """The first 20 positions stay, the rest is spread (arXiv 2403.15378), and the start says so."""
    kind = type(ours.text_tower)
    assert kind.position_names is not None
    longest = ours.text_tower.max_length
    model, report = build_start(str(folder), context_length=2 * longest)
    aligned(model)
    said = [line for line in report.changed if "stretched" in line]
    assert len(said) == 1 and f"texts of {longest} → {2 * longest} tokens" in said[0]
    assert model.text_tower.max_length == model.tokenizer.context_length == 2 * longest
    name = kind.position_names[1]
    old, new = file_tensors(ours)[name], file_tensors(model)[name]
    first = len(old) - longest + 20
    assert len(new) == len(old) + longest and torch.equal(new[:first], old[:first])
    text = "dog 狗 " * 3 * longest
    ids, mask = model.tokenizer.pad(model.tokenizer.encode([text]))
    assert ids.shape == (1, 2 * longest)
    with torch.no_grad():
        assert torch.isfinite(model.eval().text_tower(ids, mask)).all()
    save_checkpoint(model, tmp_path / "a", info={})
    assert torch.equal(cnclip_ft.load(tmp_path / "a").encode_texts([text]), model.encode_texts([text]))


def test_77_positions_become_248_as_long_clip_has_them():
    """Of its own rule: of four new positions one is old, the others lie between; the last three go on along the last step."""
    old = torch.randn(77, 4, generator=torch.Generator().manual_seed(0))
    numbers = {
        "kind": "clip_text",
        "vocab_size": 9,
        "hidden_size": 4,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "intermediate_size": 4,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "attention_dropout": 0.0,
        "max_position_embeddings": 77,
        "eos_token_id": 2,
    }
    tensors = {"text_model.embeddings.position_embedding.weight": old}
    changed, _ = stretched(numbers, tensors, 248)
    new = tensors["text_model.embeddings.position_embedding.weight"]
    assert changed["max_position_embeddings"] == 248 and torch.equal(new[:20], old[:20])
    for number in range(56):
        for part in range(4):
            between = old[20 + number] + (old[21 + number] - old[20 + number]) * part / 4
            torch.testing.assert_close(new[20 + 4 * number + part], between)
    for part in range(4):
        torch.testing.assert_close(new[244 + part], old[76] + (old[76] - old[75]) * part / 4)


def test_a_large_tokenizer_is_read_when_it_is_first_used(card, folder, ours, tmp_path, monkeypatch):
    """Of a folder and of our checkpoint: the same ids, rules and files, sent to other processes before it was read too."""
    eager = ours.tokenizer.encode(SAID)
    save_checkpoint(ours, tmp_path / "a", info={})
    monkeypatch.setattr(fast_tokenizer, "_SLOW", 0)
    for place in (folder, tmp_path / "a"):
        model = cnclip_ft.load(place)
        later = isinstance(model.tokenizer._held, fast_tokenizer.Deferred)
        assert later or not (place / "tokenizer.json").is_file() or card.name == "siglip"
        assert model.tokenizer.describe() == ours.tokenizer.describe()
        sent = pickle.loads(pickle.dumps(model.tokenizer.with_context_length(9)))
        assert sent.encode(SAID[:1]) == ours.tokenizer.with_context_length(9).encode(SAID[:1])
        save_checkpoint(model, tmp_path / f"{place.name} again", info={})
        assert (
            cnclip_ft.load(tmp_path / f"{place.name} again").tokenizer.encode(SAID)
            == eager
            == model.tokenizer.encode(SAID)
        )
    whole = (tmp_path / "a" / "tokenizer.json").read_text(encoding="utf-8")
    (tmp_path / "a" / "tokenizer.json").write_text(whole[:-50], encoding="utf-8")
    torn = cnclip_ft.load(tmp_path / "a")
    with pytest.raises(RequestError, match="its tokenizer cannot be read.*fetch tokenizer.json"):
        torn.encode_texts(SAID)


def test_a_large_tokenizer_of_another_model_is_told_when_it_is_first_used(ours, tmp_path, monkeypatch):
    save_checkpoint(ours, tmp_path / "a", info={})
    monkeypatch.setattr(fast_tokenizer, "_SLOW", 0)
    tokenizer = cnclip_ft.load(tmp_path / "a").tokenizer
    tokenizer.check_rows(10, "x")
    if isinstance(tokenizer._held, fast_tokenizer.Deferred):
        with pytest.raises(
            RequestError, match="x: the vocabulary .* tokens, the text tower 10; put the tower's own vocabulary"
        ):
            tokenizer.encode(SAID)
