"""Models of other families go through what a run and its checkpoint go through: both stages, evaluation, search, processes."""

from __future__ import annotations

import io
import json
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

import cnclip_ft
from cnclip_ft.cli import app
from cnclip_ft.models.assembly import file_names
from cnclip_ft.models.checkpoints import file_tensors
from cnclip_ft.models.families import fast_tokenizer
from cnclip_ft.recipe import dump_recipe
from cnclip_ft.search.web.decoder import LENGTHS, SIDES, _answer
from cnclip_ft.training import plan
from cnclip_ft.training.large_batch import GradientStep
from cnclip_ft.training.loss import SigmoidObjective
from cnclip_ft.training.run import train
from data_tools.errors import RequestError
from data_tools.store import open_store
from tests.families.cards import CARDS
from tests.families.test_families import library_pictures, photos
from tests.training.helpers import losses, planned, prepared, stopped_after, tiny_recipe, write_stores
from tests.training.test_processes import FSDP2, TRAIN, launch, same_weights

LAYERED = [{"tower": "image", "layer_decay": 0.8}, {"tower": "text", "layer_decay": 0.8}, {"tower": "temperature"}]
LOW_RANK = [
    {"tower": "image", "lora": {"rank": 2}}, {"tower": "text", "part": "last 2", "lora": {"rank": 2}},
    {"tower": "text", "part": "rest", "rate": 0}, {"tower": "temperature"},
]  # fmt: skip
KINDS = [pytest.param(name, marks=[] if name == "siglip2" else pytest.mark.slow) for name in CARDS]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return write_stores(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module", params=KINDS)
def start(request, place) -> Path:
    folder = place / request.param.replace(" ", "-")
    return CARDS[request.param].write(folder)


def recipe(place: Path, start: Path, output: str, **changes):
    changes = {
        "align": {"feature_cache": True, "ema": 0.9},
        "contrast": {"train": LAYERED, "micro_batch_size": 4},
    } | changes
    content = {"model": {"start": str(start)}, "output": str(place / output)}
    return tiny_recipe(place, **content, feature_cache=str(place / f"cache-{start.name}"), **changes)


@pytest.fixture(scope="module")
def run(place, start) -> Path:
    wanted = recipe(place, start, f"run-{start.name}")
    assert train(wanted)
    return Path(wanted.output)


def _cli(*words: object) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    return result.output


def test_both_stages_learn_and_the_library_reads_what_they_leave(start, run):
    whole = losses(run)
    assert len(whole) == 12 and all(np.isfinite(loss) for loss in whole.values())
    before, after = file_tensors(cnclip_ft.load(start)), load_file(run / "contrast" / "last" / "model.safetensors")
    trained = [name for name, tensor in after.items() if not torch.equal(tensor, before[name])]
    assert "logit_scale" in trained and ("logit_bias" in trained) == ("logit_bias" in before)
    assert after["logit_scale"].shape == before["logit_scale"].shape
    last = run / "contrast" / "last"
    ours, theirs = cnclip_ft.load(last), transformers.AutoModel.from_pretrained(last)
    pixels = torch.stack([ours.image_tower.preprocessing.decode(file) for file in photos(3)])
    with torch.no_grad():
        expected = theirs.eval().get_image_features(**library_pictures(ours, pixels)).pooler_output
        torch.testing.assert_close(ours.image_tower.project(ours.image_trunk(pixels)), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_a_run_goes_on_where_it_stopped(place, start, run):
    again = recipe(place, start, f"again-{start.name}")
    assert train(again, **stopped_after(("align", 4))) is False
    assert train(again, proceed=True, **stopped_after(("contrast", 4))) is False
    assert train(again, proceed=True) and losses(Path(again.output)) == losses(run)


def steps(wanted, number: int, count: int = 2):
    """A stage that has taken so many steps."""
    trainer = prepared(wanted, number)
    for batch in islice(trainer.batches(), count):
        assert trainer.take(batch) is not None
    return trainer


def test_low_rank_updates_patch_dropping_and_checkpointing(place, start):
    cut = {"patch_dropout": 0.25} if cnclip_ft.load(start).image_tower.patch_dropout is not None else {}
    contrast = {"train": LOW_RANK, "gradient_checkpointing": "both"} | cut
    trainer, before = (
        steps(recipe(place, start, f"lora-{start.name}", contrast=contrast), 1),
        file_tensors(cnclip_ft.load(start)),
    )
    with trainer.judged() as model:
        after = file_tensors(model)
        assert before.keys() == after.keys()
        moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    for half in ("vision_model.", "text_model."):
        assert any(name.startswith(half) for name in moved)
    assert not any("position_embedding" in name for name in moved)


def test_evaluate_encode_and_search(place, start, run, tmp_path):
    best, store = run / "contrast" / "last", open_store(place / "valid")
    _cli("evaluate", best, place / "valid", "--device", "cpu", "--json", tmp_path / "scores.json")
    settings = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))["settings"]
    model = cnclip_ft.load(best)
    assert settings["image_transform"] == json.loads(json.dumps(model.image_tower.preprocessing.record()))
    _cli("encode", best, place / "valid", "--output", tmp_path / "features", "--device", "cpu")
    images = np.load(tmp_path / "features" / "image_features.npy")
    np.testing.assert_allclose(images[0], model.encode_images([store.image(0)])[0], atol=1e-5)
    index, picture = tmp_path / "valid.index", tmp_path / "3.png"
    _cli("search", "index", best, place / "valid", "--output", index, "--device", "cpu")
    assert _cli("search", "query", index, "一只狗", "--json", "--device", "cpu").count('"rank"') == 10
    picture.write_bytes(store.image(3))
    first = json.loads(_cli("search", "query", index, "--image", picture, "--json", "--device", "cpu").splitlines()[0])
    assert str(first["id"]) == "3" and first["score"] > 0.999


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clip", "siglip of version 2"])
def test_every_other_command(place, name, tmp_path):
    """topk, compare, calibrate and classify take a family's checkpoint with no option more."""
    model, split = CARDS[name].write(tmp_path / "model"), place / "valid"
    _cli("encode", model, split, "--output", tmp_path / "features", "--device", "cpu")
    found = tmp_path / "found.jsonl"
    _cli("topk", tmp_path / "features", tmp_path / "features", "--output", found, "--device", "cpu", "-k", 3)
    features = [np.load(tmp_path / "features" / f"{side}_features.npy") for side in ("text", "image")]
    best = np.argsort(-(features[0] @ features[1].T), axis=1, kind="stable")[:, :3]
    listed = [json.loads(line)["image_ids"] for line in found.read_text(encoding="utf-8").splitlines()]
    assert len(listed) == 20 and listed == best.tolist()
    other = CARDS[name].write(tmp_path / "other", seed=1)
    _cli(
        "compare",
        model,
        other,
        "--split",
        split,
        "--draws",
        100,
        "--json",
        tmp_path / "compare.json",
        "--device",
        "cpu",
    )
    assert json.loads((tmp_path / "compare.json").read_text(encoding="utf-8"))
    _cli("calibrate", model, split, "--recall", 0.5, "--json", tmp_path / "limit.json", "--device", "cpu")
    assert json.loads((tmp_path / "limit.json").read_text(encoding="utf-8"))
    classes = tmp_path / "classes.txt"
    classes.write_text("猫\n狗\n", encoding="utf-8")
    for number, file in enumerate(photos(4)):
        (tmp_path / "album" / "猫狗"[number % 2]).mkdir(parents=True, exist_ok=True)
        (tmp_path / "album" / "猫狗"[number % 2] / f"{number}.{'jpg' if number % 2 else 'png'}").write_bytes(file)
    _cli(
        "classify",
        model,
        tmp_path / "album",
        "--classes",
        classes,
        "--json",
        tmp_path / "classes.json",
        "--device",
        "cpu",
    )
    used = json.loads((tmp_path / "classes.json").read_text(encoding="utf-8"))["templates"]
    assert used[0] == ("a photo of a {}." if name == "clip" else "This is a photo of {}.")


def test_the_servers_decoder_makes_the_same_bytes(start):
    picture = cnclip_ft.load(start).image_tower.preprocessing
    for file in photos(9):
        answer = _answer({"do": "fit", "how": picture.fitting, "pixels": 10**8}, file)
        body = answer[LENGTHS.size + LENGTHS.unpack_from(answer)[0] :]
        pixels = np.frombuffer(bytearray(body), np.uint8, offset=SIDES.size).reshape(*SIDES.unpack_from(body), 3)
        assert (picture.pack(pixels).int() - picture.decode(file).int()).abs().max() <= 1


@pytest.mark.slow
@pytest.mark.parametrize("shares", [False, True], ids=["whole", "fsdp2"])
@pytest.mark.parametrize(
    "name",
    [
        "siglip",
        "siglip of version 2",
        "siglip2",
        "clip",
        "metaclip_2",
        "altclip",
        "vision-text-dual-encoder",
        "vit beside xlm-r",
        "dinov2 beside xlm-r",
        "siglip beside xlm-r",
    ],
)
def test_two_processes_equal_one(place, tmp_path, name, shares):
    start = CARDS[name].write(tmp_path / "start")
    folders = []
    for processes in (1, 2):
        wanted = recipe(place, start, f"{tmp_path}/{processes}", contrast={"train": LAYERED, "micro_batch_size": 2})
        (tmp_path / "recipe.yaml").write_text(dump_recipe(wanted), encoding="utf-8")
        environment = FSDP2 if shares and processes == 2 else None
        launch(
            TRAIN, tmp_path, processes, str(tmp_path / "recipe.yaml"), "new", "never", "term", environment=environment
        )
        folders.append(tmp_path / str(processes))
    one, two = folders
    assert max(abs(value - losses(one)[key]) for key, value in losses(two).items()) < 1e-5
    assert same_weights(two, one) < 1e-4


# ---- the loss of a model that brings a bias -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def siglip(place) -> Path:
    """With a temperature above 100, as published ones have it (ln 117)."""
    folder = CARDS["siglip of version 2"].write(place / "published")
    model = transformers.AutoModel.from_pretrained(folder)
    model.logit_scale.data.fill_(4.7654)
    model.logit_bias.data.fill_(-12.9)
    model.save_pretrained(folder)
    return folder


def kind(name: str | None) -> dict:
    return {"objective": {"kind": name}} if name else {}


def test_the_models_own_loss_is_taken_and_said(place, siglip):
    context, model, plans = planned(recipe(place, siglip, "own"))
    said = plan.describe(context, model, plans)
    assert [each.objective.kind for each in plans] == ["sigmoid", "sigmoid"]
    assert "sigmoid objective (the model's own, with its temperature and bias as they are)" in said
    assert "loss     sigmoid" in said and "attends to padding" in said
    with pytest.raises(RequestError, match="label_smoothing=0, or stages.*kind=contrastive"):
        planned(recipe(place, siglip, "own", align={"objective": {"label_smoothing": 0.1}}))


def test_temperature_and_bias_go_on_from_the_models_own(place, siglip):
    model = steps(recipe(place, siglip, "sigmoid", contrast={"learning_rate": 1e-5}), 1).model
    assert 0 < abs(model.logit_scale.item() - 4.7654) < 1e-3 and 0 < abs(model.logit_bias.item() + 12.9) < 1e-3


def test_a_softmax_leaves_the_bias_as_it_is_and_says_so(place, siglip):
    wanted = recipe(place, siglip, "softmax", contrast={"learning_rate": 1e-5} | kind("contrastive"))
    said = plan.describe(*planned(wanted))
    assert "does not see the model's logit_bias: it stays as it is, and does not train" in said
    model = steps(wanted, 1).model
    assert model.logit_bias == torch.tensor(-12.9) and model.logit_bias.grad is None
    assert 0 < abs(model.logit_scale.item() - 4.7654) < 1e-3  # not cut to ln 100


@pytest.mark.parametrize("name,near", [("siglip of version 2", 1e-9), ("siglip2", 2e-6)])
def test_gradients_are_those_of_the_librarys_own_loss_divided_or_not(name, near, tmp_path):
    """Float64, all parameters, temperature and bias too; positions of pictures in their own shape are resampled in float32 there."""
    start = CARDS[name].write(tmp_path / "start")
    library, model = transformers.AutoModel.from_pretrained(start).double(), cnclip_ft.load(start).double()
    texts = ["狗", "a red car", "", "two dogs and a cat", "dog " * 40]
    pixels = torch.stack([model.image_tower.preprocessing.decode(file) for file in photos(len(texts))])
    ids, mask = model.tokenizer.pad(model.tokenizer.encode(texts))
    inputs = library_pictures(model, pixels)
    inputs["pixel_values"] = inputs["pixel_values"].double()
    theirs = library(input_ids=ids, **inputs, return_loss=True).loss
    theirs.backward()
    expected = {name: parameter.grad for name, parameter in library.named_parameters()}
    names, keys = file_names(model), torch.arange(len(texts))
    batch = {"pixels": pixels, "input_ids": ids, "attention_mask": mask, "image_keys": keys, "text_keys": keys}
    for micro in (None, 1, 2):
        step = GradientStep(
            model,
            SigmoidObjective(tile=2),
            micro_batch_size=micro,
            autocast=nullcontext,
            backward=lambda loss: loss.backward(),
        )
        model.zero_grad()
        torch.testing.assert_close(step(batch).loss, theirs.detach(), atol=near, rtol=0)
        for own, parameter in model.named_parameters():
            torch.testing.assert_close(
                parameter.grad, expected[names[own]].reshape(parameter.shape), atol=near, rtol=1e-5, msg=own
            )


@pytest.mark.slow
def test_a_softmax_on_several_devices_misses_no_gradient(place, siglip, tmp_path):
    wanted = recipe(place, siglip, str(tmp_path / "two"), align=kind("contrastive"), contrast=kind("contrastive"))
    (tmp_path / "recipe.yaml").write_text(dump_recipe(wanted), encoding="utf-8")
    launch(TRAIN, tmp_path, 2, str(tmp_path / "recipe.yaml"), "new", "never", "term")
    last = load_file(tmp_path / "two" / "contrast" / "last" / "model.safetensors")
    assert torch.equal(last["logit_bias"], load_file(siglip / "model.safetensors")["logit_bias"])


# ---- SigLIP 2's tokenizer, and pictures in their own shape -----------------------------------------------------------


@pytest.mark.parametrize("large", [False, True], ids=["small", "read when first used"])
def test_a_folder_whose_tokenizer_does_not_lower_case_is_lower_cased_and_told(tmp_path, caplog, monkeypatch, large):
    if large:
        monkeypatch.setattr(fast_tokenizer, "_SLOW", 0)
    from tests.families import cards

    model, tokenizer, pictures = cards._siglip_2("GemmaTokenizer")
    for part in (model, tokenizer, pictures):
        part.save_pretrained(tmp_path / "start")
    ours = cnclip_ft.load(tmp_path / "start")
    assert "texts are made lower case" in caplog.text
    said = ["A Red CAR", "ÉTÉ 狗"]
    expected = cards.gemma()(said)["input_ids"]
    assert ours.tokenizer.encode(said) == expected
    ids, mask = ours.tokenizer.pad(ours.tokenizer.encode(said))
    assert ids.shape == (2, 64) and ids[0, : len(expected[0])].tolist() == expected[0] and bool(mask.all())
    from cnclip_ft.models.checkpoints import save_checkpoint

    save_checkpoint(ours, tmp_path / "saved", info={})
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert again(said, padding="max_length", max_length=64, return_tensors="pt")["input_ids"].tolist() == ids.tolist()


@pytest.fixture(scope="module")
def naflex(place) -> Path:
    return CARDS["siglip2"].write(place / "naflex")


def test_a_budget_is_the_starts_own_or_the_recipes(place, naflex, tmp_path):
    from cnclip_ft.models.start import build_start

    model, report = build_start(str(naflex))
    assert "at most 30 patches of 8 × 8 pixels" in "\n".join(report.lines())
    wide, report = build_start(str(naflex), max_patches=70, context_length=20)
    assert "filled up to 20 tokens, not 64" in "\n".join(report.lines())
    file = photos(1)[0]
    few, many = (
        each.image_tower.preprocessing.unpack(each.image_tower.preprocessing.decode(file)[None])[1]
        for each in (model, wide)
    )
    assert 20 < few.prod() <= 30 < 50 < many.prod() <= 70
    processor = transformers.AutoImageProcessor.from_pretrained(naflex)
    inputs = processor(Image.open(io.BytesIO(file)).convert("RGB"), max_num_patches=70, return_tensors="pt")
    theirs = transformers.AutoModel.from_pretrained(naflex).eval().get_image_features(**inputs).pooler_output
    torch.testing.assert_close(
        wide.encode_images(file), torch.nn.functional.normalize(theirs, dim=1), atol=2e-3, rtol=0
    )
    with pytest.raises(RequestError, match="image_size 384.*own shape.*model.max_patches"):
        build_start(str(naflex), image_size=384)
    with pytest.raises(RequestError, match="max_patches is 70.*one size"):
        build_start({"architecture": "tiny"}, max_patches=70)
    with pytest.raises(RequestError, match="augment is for pictures of one size"):
        planned(recipe(place, naflex, "augmented", contrast={"augment": {"colour": 0.5}}))


def test_a_line_of_pixels_and_a_damaged_picture_keep_to_the_budget(naflex):
    model = cnclip_ft.load(naflex)
    pictures = [Image.new("RGB", sides, "red") for sides in ((1, 3000), (3000, 1), (1, 1), (5000, 5))]
    features = model.encode_images(pictures)
    blank = torch.zeros(1, *model.image_tower.preprocessing.shape, dtype=torch.uint8)  # what stands for a damaged one
    assert torch.isfinite(features).all() and torch.isfinite(model.image_features(blank)).all()


# ---- towers of several families together ------------------------------------------------------------------------------


def test_a_half_with_a_half_of_another_family(place, naflex, siglip, tmp_path):
    from cnclip_ft.models.checkpoints import save_checkpoint
    from cnclip_ft.models.start import build_start

    small = {"hidden": 32, "layers": 1, "heads": 2}
    for number, spec in enumerate(
        [
            {"image": str(naflex), "text": small},  # a picture in its own shape beside BERT's words
            {"image": {"kind": "siglip", **small, "patch": 8, "image_size": 20}, "text": str(siglip)},
            {"image": {"kind": "vit", **small, "patch": 8, "image_size": 32}, "text": str(siglip), "projection": 20},
        ]
    ):
        model, report = build_start(spec)
        model.eval()
        assert "softmax" in "\n".join(report.lines())  # no bias is taken over
        save_checkpoint(model, tmp_path / str(number), info={})
        again = cnclip_ft.load(tmp_path / str(number))
        assert torch.equal(again.encode_texts(["狗"]), model.encode_texts(["狗"]))
        assert torch.equal(again.encode_images(photos(2)), model.encode_images(photos(2)))
    with pytest.raises(RequestError, match="gives features of 32 numbers, not 20"):
        build_start(
            {"image": {"kind": "siglip", **small, "patch": 8, "image_size": 20}, "text": small, "projection": 20}
        )


def test_another_resolution_is_the_librarys_at_run_time(siglip):
    ours, library = cnclip_ft.load(siglip, image_size=44), transformers.AutoModel.from_pretrained(siglip).eval()
    pixels = torch.stack([ours.image_tower.preprocessing.decode(file) for file in photos(3)])
    with torch.no_grad():
        theirs = library.get_image_features(
            **library_pictures(ours, pixels), interpolate_pos_encoding=True
        ).pooler_output
        torch.testing.assert_close(ours.image_tower.project(ours.image_trunk(pixels)), theirs, atol=1e-5, rtol=1e-5)
