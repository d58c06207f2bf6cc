"""A stage that teaches: the loss against brute force, the teacher computed once, stopped, divided and shared out, refused in words."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cnclip_ft.data.parallel import build_parallel_table
from cnclip_ft.features import teacher as teacher_module
from cnclip_ft.features import text_features
from cnclip_ft.features.encode import encode_texts, evaluating
from cnclip_ft.features.teacher import Teacher, TeacherFeatures, principal_map
from cnclip_ft.models.checkpoints import load, save_checkpoint
from cnclip_ft.recipe import Recipe, Stage, dump_recipe
from cnclip_ft.training.plan import describe
from cnclip_ft.training.run import train
from cnclip_ft.training.selection import Selection
from cnclip_ft.training.teaching import TeachObjective, TeachStep
from data_tools.build import build_store
from data_tools.errors import RequestError, UserError
from data_tools.parallel import ParallelTexts, read_parallel
from data_tools.sources.parallel import ParallelSource
from data_tools.store import open_store
from tests.training.helpers import WORDS, losses, one_stage, planned, prepared, records, stopped_after, tiny_model
from tests.training.test_processes import MODEL, TRAIN, launch

ALONE = SimpleNamespace(
    device=torch.device("cpu"), is_main_process=True, process_index=0, num_processes=1, wait_for_everyone=lambda: None
)


@pytest.fixture(scope="module")
def place(stores):
    """Teachers of two widths, and forty rows of parallel text, four of them with a third language."""
    save_checkpoint(tiny_model(dropout=0.0, seed=7).eval(), stores / "teacher", info={})
    save_checkpoint(tiny_model(dropout=0.0, seed=9).eval(), stores / "other", info={})
    save_checkpoint(tiny_model(dropout=0.0, seed=8, projection=24).eval(), stores / "wide", info={})
    random, lines = np.random.default_rng(3), []
    for number in range(40):
        row = {
            "en": f"a picture with {number} birds and {number % 7} dogs",
            "zh": "".join(random.choice(list(WORDS), 6)),
        }
        lines.append(row | ({"ja": f"{number}羽の鳥"} if number < 4 else {}))
    file = stores / "rows.jsonl"
    file.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines), encoding="utf-8")
    build_store(ParallelSource([file]), stores / "parallel", progress=False)
    return stores


def recipe_of(place: Path, folder: Path, *, teacher="teacher", teach=None, stage=None, **changes) -> Recipe:
    teach = {
        "teacher": str(place / teacher),
        "texts": str(place / "parallel"),
        "languages": ["zh", "en"],
        **(teach or {}),
    }
    if teacher == "wide":
        teach.setdefault("keep", "last")
    data = {"train": str(place / "train"), "valid": str(place / "valid"), "workers": 0}
    steps = {"steps": 6, "batch_size": 8, "learning_rate": 1e-3, "warmup_steps": 1, "validate_every": 3}
    return Recipe.model_validate(
        {
            "model": MODEL, "data": data, "output": str(folder), "feature_cache": str(folder / "cache"), "log_every": 1,
            "stages": {"learn": {"kind": "teach", "teach": teach, "train": "text", **steps, **(stage or {})}}, **changes,
        }
    )  # fmt: skip


def test_the_loss_is_what_is_written_down():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        F.normalize(torch.randn(*shape, 5, generator=generator, dtype=torch.float64), dim=-1)
        for shape in ((7, 3), (7,))
    )
    student.requires_grad_()
    scale = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    texts = torch.tensor([0, 1, 2, 0, 4, 5, 6])  # rows 0 and 3 share a text: no negatives of each other
    out = TeachObjective(meet=0.7, between=0.3, tile=3)(student, teacher, scale, torch.arange(7), texts)

    def info_nce(x, y):
        logits = scale.detach().exp() * x @ y.T
        logits = logits.masked_fill((texts[:, None] == texts) & ~torch.eye(7, dtype=torch.bool), -torch.inf)
        return (F.cross_entropy(logits, torch.arange(7)) + F.cross_entropy(logits.T, torch.arange(7))) / 2

    meet = sum(((student[:, n] - teacher) ** 2).sum(1).mean() for n in range(3)) / 3
    between = (info_nce(student[:, 0], student[:, 1]) + info_nce(student[:, 0], student[:, 2])) / 2
    expected = 0.7 * meet + 0.3 * between
    torch.testing.assert_close(out.loss, expected, atol=1e-12, rtol=0)
    (found,) = torch.autograd.grad(out.loss, student)
    torch.testing.assert_close(found, torch.autograd.grad(expected, student)[0], atol=1e-12, rtol=0)
    own = TeachObjective(between=0.0)(teacher[:, None], teacher, scale, torch.arange(7), texts)
    assert own.loss == 0 and own.accuracy == 1  # a student that is its teacher
    assert torch.autograd.grad(out.loss + 0 * scale, scale)[0] == 0  # the temperature does not learn


@pytest.mark.parametrize("micro", [1, 3, 8])
def test_a_divided_batch_has_the_gradient_of_the_whole(place, micro):
    model = tiny_model(dropout=0.0).double()
    texts = read_parallel(open_store(place / "parallel"))
    table = build_parallel_table(texts, ("zh", "en"), model.tokenizer)
    batch = table.batch(np.arange(8), model.tokenizer)
    assert batch["input_ids"].shape[:2] == (8, 2)
    batch["teacher"] = F.normalize(
        torch.randn(8, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), dim=1
    )

    def gradients(size):
        model.zero_grad()
        step = TeachStep(
            model,
            TeachObjective(between=0.5),
            micro_batch_size=size,
            autocast=nullcontext,
            backward=torch.Tensor.backward,
        )
        out = step(dict(batch))
        return out.loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    (whole, expected), (parts, found) = gradients(None), gradients(micro)
    torch.testing.assert_close(whole, parts, atol=1e-12, rtol=0)
    assert found.keys() == expected.keys() and all(name.startswith("text_tower") for name in found)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-9, rtol=1e-6, msg=name)


def test_the_teacher_is_computed_once_and_is_what_it_says(place, tmp_path, monkeypatch):
    monkeypatch.setattr(text_features, "BLOCK", 16)
    texts = [row["en"] for row in read_parallel(open_store(place / "parallel")).rows]
    teacher = Teacher.look(str(place / "teacher"), "here", "huggingface", False)
    first = TeacherFeatures(tmp_path, teacher, texts, 16, "fp32")
    assert not first.complete
    stops = iter([True])
    assert not first.build(ALONE, nullcontext, lambda: next(stops, True))  # asked to stop behind a block
    assert first.build(ALONE, nullcontext) and first.complete
    model = load(place / "teacher")
    with evaluating(model):
        expected = encode_texts(model, texts)
    keys = torch.tensor([39, 0, 17, 0])
    torch.testing.assert_close(first.rows(keys), expected[keys], atol=1e-6, rtol=0)
    monkeypatch.setattr(teacher_module, "load", lambda *_, **__: pytest.fail("it is computed again"))
    again = TeacherFeatures(tmp_path, teacher, texts, 16, "fp32")
    assert again.build(ALONE, nullcontext) and torch.equal(again.rows(keys), first.rows(keys))
    file = first.folder / "features.npy"
    array = np.load(file)
    array[7] = np.inf
    np.save(file, array)
    with pytest.raises(UserError, match=rf"{file} is damaged: 1 of \d+ rows.*\(7\)"):  # whose directions are looked for
        TeacherFeatures(tmp_path, teacher, texts, 8, "fp32").build(ALONE, nullcontext)
    others = [
        TeacherFeatures(tmp_path, teacher, texts[::-1], 16, "fp32"),
        TeacherFeatures(tmp_path, teacher, texts, 16, "bf16"),
        TeacherFeatures(tmp_path, Teacher("x", 24, "another", "huggingface", False), texts, 16, "fp32"),
    ]
    assert len({each.folder for each in (first, *others)}) == 4


def test_a_teacher_of_another_width_is_mapped_and_keeps_its_angles():
    generator = torch.Generator().manual_seed(0)
    flat = F.normalize(torch.randn(200, 6, generator=generator) @ torch.randn(6, 24, generator=generator), dim=1)
    narrower, wider = principal_map(flat, 8), principal_map(flat, 32)
    torch.testing.assert_close(narrower.T @ narrower, torch.eye(8), atol=1e-5, rtol=0)
    for mapped in (flat @ narrower, flat @ wider):  # six directions are all there is
        torch.testing.assert_close(mapped @ mapped.T, flat @ flat.T, atol=1e-4, rtol=0)


def test_a_run_learns_what_the_teacher_says_and_goes_on_exactly(place, tmp_path, capsys):
    stage = {"steps": 30, "validate_every": 15, "learning_rate": 3e-3}
    assert train(recipe_of(place, tmp_path / "whole", stage=stage))
    found = losses(tmp_path / "whole")
    assert found["learn", 30] < 0.5 * found["learn", 1]
    said = capsys.readouterr().out
    assert "Features of the teacher: computed once into" in said
    assert not train(recipe_of(place, tmp_path / "stopped", stage=stage), **stopped_after(("learn", 20)))
    assert train(recipe_of(place, tmp_path / "stopped", stage=stage), proceed=True)
    assert losses(tmp_path / "stopped") == found
    moved = recipe_of(place, tmp_path / "stopped", teacher="other", stage={**stage, "steps": 40})
    with pytest.raises(RequestError, match=r"stages.learn.teach.teacher: .*other holds other data"):
        train(moved, proceed=True)
    assert records(tmp_path / "whole", "validation")[0]["stage"] == "start"
    taught = [judged for judged in records(tmp_path / "whole", "validation") if judged["stage"] == "learn"]
    assert taught and all(
        "loss" not in judged and judged["training_loss"] > 0 for judged in taught
    )  # rows are not the pool's pairs


@pytest.mark.slow
def test_two_devices_teach_as_one(place, tmp_path, one_thread):
    """Also in micro-batches, from a teacher of another width."""
    for name, processes, stage in (("one", 1, None), ("both", 2, None), ("parts", 2, {"micro_batch_size": 3})):
        recipe = recipe_of(place, tmp_path / name, teacher="wide", stage=stage)
        (tmp_path / f"{name}.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
        launch(TRAIN, tmp_path, processes, str(tmp_path / f"{name}.yaml"), "new", "never", "")
    one = losses(tmp_path / "one")
    for name in ("both", "parts"):
        found = losses(tmp_path / name)
        assert one.keys() == found.keys() and all(one[key] == pytest.approx(found[key], abs=1e-5) for key in one)


def test_the_plan_says_what_is_taught(place, tmp_path):
    said = describe(
        *planned(recipe_of(place, tmp_path / "run", teacher="wide", teach={"languages": None}, stage={"batch_size": 4}))
    )
    assert (
        "teaches en, zh, ja from 4 rows of parallel text" in said
        and "36 rows lack one of them and are passed over" in said
    )
    assert "reads en: its 24 numbers a sentence are computed once, mapped to the student's 16" in said
    assert "1 · squared distance to the teacher + 0.1 · InfoNCE between the languages" in said


def test_keep_last_ends_with_the_end_and_best_with_the_best():
    for keep, step in (("last", 20), ("best", 10)):
        teach = {"teacher": "t", "texts": "p", "keep": keep}
        stage = {"kind": "teach", "teach": teach, "train": "text", "steps": 20, "batch_size": 8, "learning_rate": 1}
        selection = Selection(Stage.model_validate(stage))
        selection.begin(30.0, {})
        selection.take(10, 40.0, {})
        selection.take(20, 20.0, {})
        assert selection.so_far.best_step == step


def test_the_image_tower_and_the_temperature_stay(place, tmp_path):
    trainer = prepared(recipe_of(place, tmp_path / "run"), 0)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.take(next(trainer.batches()))
    changed = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all(name.startswith("text_tower.") for name in changed)


@pytest.mark.parametrize(
    ("teach", "said"),
    [
        ({"texts": "train"}, r"stages.learn.teach.texts: .*train holds no parallel text"),
        ({"texts": "nowhere"}, r"stages.learn.teach.texts: .*nowhere"),
        ({"teacher": "nowhere"}, r"stages.learn.teach.teacher: .*nowhere"),
        ({"language": "fr"}, r"no row of .*parallel is in fr \(there are en, zh, ja\)"),
        ({"languages": ["zh", "de"]}, r"no row of .*parallel is in de"),
        ({"languages": ["zh"]}, r"stages.learn.teach.between=0"),
        ({"teacher": "wide"}, r"is 24 wide and the model 16.*stages.learn.teach.keep=last"),
    ],
)
def test_what_cannot_teach_is_refused_in_words(place, tmp_path, teach, said):
    teach = {key: str(place / value) if key in ("texts", "teacher") else value for key, value in teach.items()}
    with pytest.raises(RequestError, match=said):
        planned(recipe_of(place, tmp_path / "run", teach=teach))


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        ({"teach": None}, "kind: teach needs its teacher and its texts"),
        ({"kind": "pairs"}, "teach is for kind: teach"),
        ({"train": "both"}, "the image tower cannot train"),
        ({"augment": {"crop": 0.5}}, "augment is for pictures"),
        ({"objective": {"kind": "sigmoid"}}, "objective is for pictures"),
        ({"interpolate": 4, "teach": {"teacher": "t", "texts": "p", "keep": "last"}}, "interpolate chooses by score"),
    ],
)
def test_a_stage_that_contradicts_itself_is_refused(place, tmp_path, stage, said):
    with pytest.raises(ValueError, match=said):
        recipe_of(place, tmp_path / "run", stage=stage)


def test_rows_with_a_common_text_are_no_negatives():
    rows = [{"en": "a dog", "zh": "一只狗"}, {"en": "one dog", "zh": "一只狗"}, {"en": "a cat", "zh": "猫"}]
    table = build_parallel_table(ParallelTexts(None, rows), ("en", "zh"), tiny_model().tokenizer)
    assert table.text_keys[0] == table.text_keys[1] != table.text_keys[2] and table.image_keys.tolist() == [0, 1, 2]


@pytest.mark.parametrize("changes", [{"train": "parallel"}, {"valid": "parallel"}])
def test_parallel_text_where_pictures_are_wanted_is_told_what_it_is_for(place, tmp_path, changes):
    data = {name: str(place / which) for name, which in ({"train": "train", "valid": "valid"} | changes).items()}
    with pytest.raises(
        RequestError, match=r"holds parallel text, .* kind teach .*teach\.texts=.*Name a store of pictures"
    ):
        planned(one_stage(place, tmp_path / "run", {}, model=MODEL, data=data))
