"""Distillation: the loss against brute force, the teacher's features kept and shown anew, divided, shared out, refused in words."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cnclip_ft.features import pair_teacher
from cnclip_ft.features.pair_teacher import PairTeacher, TaughtPairs
from cnclip_ft.models.checkpoints import load, save_checkpoint
from cnclip_ft.recipe import Recipe, dump_recipe
from cnclip_ft.recipe_files import load_recipe
from cnclip_ft.recipe_stage import Augmentation, Distill
from cnclip_ft.training.distilling import DistillStep, distillation
from cnclip_ft.training.loss import ContrastiveObjective
from cnclip_ft.training.plan import describe
from cnclip_ft.training.run import train
from data_tools.errors import RequestError, UserError
from data_tools.store import open_store
from tests.training.helpers import losses, one_stage, planned, prepared, random_batch, stopped_after, tiny_model
from tests.training.test_processes import MODEL, two_train_as_one
from tests.training.test_teaching import ALONE


@pytest.fixture(scope="module")
def place(stores):
    """Teachers of the model's width, of another, and of larger pictures."""
    larger = {"kind": "vit", "hidden": 32, "layers": 2, "heads": 2, "patch": 8, "image_size": 48}
    for name, parts in (
        ("teacher", {}),
        ("wide", {"projection": 24}),
        ("narrow", {"projection": 8}),
        ("large", {"image": larger}),
    ):
        save_checkpoint(tiny_model(dropout=0.0, seed=7, **parts).eval(), stores / name, info={})
    return stores


def recipe_of(place: Path, folder: Path, *, teacher="teacher", distill=None, stage=None, **changes) -> Recipe:
    return one_stage(
        place,
        folder,
        {"distill": {"teacher": str(place / teacher), **(distill or {})}} | (stage or {}),
        **({"model": MODEL} | changes),
    )


def taught_by(
    place: Path, folder: Path, name: str, dim: int = 16, augment: Augmentation | None = None, views: int = 1
) -> TaughtPairs:
    taught = TaughtPairs(
        folder, PairTeacher.look(str(place / name), "here", "huggingface", False), open_store(place / "train"), dim,
        views=views, augment=augment, precision="fp32", seed=0, reduced=False, autocast=nullcontext,
    )  # fmt: skip
    assert taught.build(ALONE, workers=0, max_damaged=0, asked_to_stop=lambda: False)
    return taught


def unit(count: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(count, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=1)


def test_the_loss_is_what_is_written_down():
    x, y, met, said = (unit(7, seed) for seed in range(4))
    x.requires_grad_(), y.requires_grad_()
    scale = torch.tensor(9.0, dtype=torch.float64, requires_grad=True)
    setting = Distill(teacher="t", features=0.7, similarities=0.3)
    found = distillation(x, y, scale, met, said, torch.tensor(20.0), setting, tile=3)
    apart = (((x - met) ** 2).sum(1) + ((y - said) ** 2).sum(1)) / 2
    student, teacher = scale * x @ y.T, 20 * met @ said.T

    def divergence(student, teacher):
        return F.kl_div(student.log_softmax(1), teacher.log_softmax(1), reduction="batchmean", log_target=True)

    both = (divergence(student, teacher) + divergence(student.T, teacher.T)) / 2
    expected = 0.7 * apart.mean() + 0.3 * both
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    for one, other in zip(
        torch.autograd.grad(found, (x, y, scale)), torch.autograd.grad(expected, (x, y, scale)), strict=True
    ):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)


def test_a_model_that_is_its_teacher_has_nothing_to_learn():
    x, y = unit(7, 0).requires_grad_(), unit(7, 1).requires_grad_()
    scale = torch.tensor(9.0, dtype=torch.float64, requires_grad=True)
    setting = Distill(teacher="t", similarities=1.0)
    loss = distillation(x, y, scale, x.detach().clone(), y.detach().clone(), scale.detach().clone(), setting)
    assert loss == 0
    for gradient in torch.autograd.grad(loss, (x, y, scale)):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-15, rtol=0)


@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.parametrize("live", [False, True])
def test_a_divided_batch_has_the_gradient_of_the_whole(micro, live):
    """A teacher that is shown the pictures sees each once, as the student does."""
    model = tiny_model(dropout=0.0).double()
    batch = random_batch(model, 8) | {"teacher_texts": torch.randn(8, 16, generator=torch.Generator().manual_seed(1))}
    if not live:
        batch["teacher_images"] = torch.randn(8, 16, generator=torch.Generator().manual_seed(2))
    shown: list[torch.Tensor] = []

    def encode_pixels(pixels):
        shown.append(pixels)
        return F.normalize(pixels.double().flatten(1)[:, :16] - 128, dim=1)

    taught = SimpleNamespace(images=None if live else object(), encode_pixels=encode_pixels, scale=torch.tensor(10.0))

    def gradients(size):
        shown.clear()
        model.zero_grad()
        step = DistillStep(
            model, ContrastiveObjective(), micro_batch_size=size, autocast=nullcontext, backward=torch.Tensor.backward,
            augment=lambda pixels: 255 - pixels, taught=taught, setting=Distill(teacher="t", similarities=1.0),
        )  # fmt: skip
        out = step(dict(batch))
        if live:
            assert torch.equal(torch.cat(shown), 255 - batch["pixels"])
        return out.loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    (whole, expected), (parts, found) = gradients(None), gradients(micro)
    torch.testing.assert_close(whole, parts, atol=1e-12, rtol=0)
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-6)


def test_what_is_kept_is_what_the_teacher_says(place, tmp_path):
    """Texts and pictures, the views that the student's cache holds, and pictures shown at another size."""
    store, model = open_store(place / "train"), load(place / "large")
    pairs = list(store.pairs())
    chosen = [5, 0, 17]
    keys = torch.tensor([store.image_ids.index(pairs[n].image_id) for n in chosen])
    kept = taught_by(place, tmp_path, "large", augment=Augmentation())
    found = kept.rows(torch.tensor(chosen), keys, 0)
    torch.testing.assert_close(
        found["teacher_texts"], model.encode_texts([pairs[n].text for n in chosen]), atol=1e-5, rtol=0
    )
    pictures = [bytes(store.image(pairs[n].image_id)) for n in chosen]
    torch.testing.assert_close(found["teacher_images"], model.encode_images(pictures), atol=1e-5, rtol=0)
    live = taught_by(place, tmp_path, "large")
    assert live.rows(torch.tensor(chosen), keys, 0).keys() == {"teacher_texts"}
    whole = torch.stack([model.image_tower.preprocessing.decode(each) for each in pictures])
    torch.testing.assert_close(live.encode_pixels(whole), found["teacher_images"], atol=1e-5, rtol=0)
    smaller = F.interpolate(whole.float(), (32, 32), mode="bicubic", antialias=True).round().clamp(0, 255).byte()
    assert F.cosine_similarity(live.encode_pixels(smaller), found["teacher_images"]).min() > 0.9
    several = taught_by(place, tmp_path, "teacher", augment=Augmentation(colour=0.5), views=2)
    first, second = (several.images_of(keys, epoch) for epoch in (0, 1))
    assert not torch.equal(first, second) and torch.equal(first, several.images_of(keys, 2))


@pytest.mark.parametrize(("name", "dim"), [("wide", 16), ("narrow", 16)])
@pytest.mark.parametrize("live", [False, True])
def test_a_teacher_of_another_width_is_mapped_on_both_sides_alike(place, tmp_path, name, dim, live):
    model, store = load(place / name), open_store(place / "train")
    taught = taught_by(place, tmp_path, name, dim=dim, augment=None if live else Augmentation())
    texts = model.encode_texts([pair.text for pair in store.pairs()])
    images = model.encode_images([bytes(store.image(image_id)) for image_id in store.image_ids])
    keys = torch.arange(len(images))
    pixels = torch.stack([model.image_tower.preprocessing.decode(bytes(store.image(i))) for i in store.image_ids])
    seen = taught.encode_pixels(pixels) if live else taught.images_of(keys, 0)
    said = taught.texts_of(torch.arange(len(texts)))
    assert seen.shape[1] == said.shape[1] == dim
    torch.testing.assert_close(seen @ said.T, images @ texts.T, atol=0.02 if name == "wide" else 1e-5, rtol=0)
    assert taught.kept > 0.99


@pytest.mark.parametrize("kept", ["teacher-*", "[!t]*"])
def test_damaged_features_have_no_directions_and_are_named(place, tmp_path, kept):
    taught_by(place, tmp_path, "wide", augment=Augmentation())
    (file,) = tmp_path.glob(f"{kept}/features.npy")
    array = np.load(file, mmap_mode="r+")
    array[..., 3, :] = np.nan
    array.flush()
    with pytest.raises(UserError, match=rf"{file} is damaged: 1 of \d+ rows.*\(3\). Remove {file.parent}:"):
        taught_by(place, tmp_path, "wide", augment=Augmentation())


def test_a_run_learns_what_the_teacher_says_and_goes_on_exactly(place, tmp_path, capsys, monkeypatch):
    stage = {"steps": 24, "validate_every": 12, "learning_rate": 3e-3, "augment": {"colour": 0.2}}
    changes = {"stage": stage, "distill": {"pairs": 0, "similarities": 0.5}}
    assert train(recipe_of(place, tmp_path / "whole", **changes))
    found = losses(tmp_path / "whole")
    assert found["learn", 24] < 0.7 * found["learn", 1]
    assert "Features of the teacher: computed once into" in capsys.readouterr().out
    assert not train(recipe_of(place, tmp_path / "stopped", **changes), **stopped_after(("learn", 16)))
    assert train(recipe_of(place, tmp_path / "stopped", **changes), proceed=True)
    assert losses(tmp_path / "stopped") == found
    longer = recipe_of(
        place, tmp_path / "stopped", teacher="large", distill=changes["distill"], stage=stage | {"steps": 30}
    )
    with pytest.raises(RequestError, match=r"stages.learn.distill.teacher: .*large holds other data"):
        train(longer, proceed=True)


@pytest.mark.parametrize(("weights", "bound"), [({"features": 1}, 1e-12), ({"features": 0, "similarities": 1}, 1e-6)])
@pytest.mark.parametrize("tower", ["text", "both"])
def test_a_model_distilled_into_itself_stays_as_it_is(place, tmp_path, weights, bound, tower):
    """But for rounding, which AdamW's usual `eps` would make steps of."""
    recipe = recipe_of(
        place, tmp_path / "run", distill={"pairs": 0, **weights}, stage={"weight_decay": 0, "train": tower, "eps": 1e-3},
        model={"start": str(place / "teacher")},
    )  # fmt: skip
    trainer = prepared(recipe, 0)
    before = {key: p.detach().clone() for key, p in trainer.model.named_parameters()}
    out = trainer.take(next(trainer.batches()))
    assert out.loss < bound
    for key, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(parameter, before[key], atol=2e-5, rtol=0, msg=key)  # a fiftieth of the rate


@pytest.mark.slow
def test_two_devices_distil_as_one(place, tmp_path, one_thread):
    """In micro-batches, from a teacher of another width, features that may be cut."""
    stage = {"train": "text", "objective": {"dimensions": [8, 4]}}
    more = {"teacher": "wide", "distill": {"similarities": 1.0}}
    two_train_as_one(
        tmp_path,
        recipe_of(place, tmp_path / "one", **more, stage=stage),
        recipe_of(place, tmp_path / "two", **more, stage=stage | {"micro_batch_size": 3}),
    )


def test_the_plan_says_what_is_met(place, tmp_path):
    said = describe(*planned(recipe_of(place, tmp_path / "run", teacher="wide", distill={"similarities": 2})))
    assert "distils from" in said and "(24 wide, mapped to the 16 of the model without weights of its own)" in said
    assert "its features are computed once" in said
    assert "1 · objective + 1 · squared distance to its features + 2 · divergence from its similarities" in said
    said = describe(*planned(recipe_of(place, tmp_path / "run", stage={"augment": {"crop": 0.5}})))
    assert "of pictures in every step, as they are augmented" in said


def test_damaged_pictures_are_passed_over(place, tmp_path, monkeypatch):
    trainer = prepared(recipe_of(place, tmp_path / "run"), 0)
    taught = trainer.prepared.taught
    monkeypatch.setattr(type(taught.images), "damaged", property(lambda cache: {3}))
    assert trainer.prepared.damaged == {3}


def test_a_teacher_that_cannot_be_read_is_named(place, tmp_path):
    with pytest.raises(RequestError, match=r"stages.learn.distill.teacher: .*nowhere"):
        planned(recipe_of(place, tmp_path / "run", teacher="nowhere"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["stages.learn.distill.features=0"], r"stages.learn.distill.features=1"),
        (["stages.learn.kind=teach", "stages.learn.teach={teacher: t, texts: p}"], r"stages.learn.distill=null"),
    ],
)
def test_what_contradicts_itself_is_refused_in_words(place, tmp_path, changes, said):
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe_of(place, tmp_path / "run")), encoding="utf-8")
    with pytest.raises(RequestError, match=said):
        load_recipe(str(tmp_path / "recipe.yaml"), changes)


def test_every_text_is_read_once(place):
    store = open_store(place / "train")
    texts, of_pairs = pair_teacher.distinct_texts(store)
    assert len(texts) == len(set(texts)) and [texts[n] for n in of_pairs] == [pair.text for pair in store.pairs()]
