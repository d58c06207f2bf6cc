"""A stage that learns boxes: its gradient in parts and on many devices, continued exactly, judged, kept, refused in words."""

from __future__ import annotations

import json
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from cnclip_ft.data.boxed import build_box_table, read_boxed
from cnclip_ft.grounding.matching import Targets, inside, losses, match
from cnclip_ft.models.checkpoints import load, read_info, save_checkpoint
from cnclip_ft.models.heads import new_heads
from cnclip_ft.models.preprocessing import SquarePicture, at_size
from cnclip_ft.recipe import dump_recipe
from cnclip_ft.training.advice import warnings
from cnclip_ft.training.continuing import identity, refuse_other_data
from cnclip_ft.training.grounding import Boxes, GroundStep
from cnclip_ft.training.plan import describe
from cnclip_ft.training.run import train
from data_tools.errors import RequestError
from data_tools.store import StoreWriter, open_store
from tests.training.boxes import boxes_recipe, write_boxes
from tests.training.helpers import losses as run_losses
from tests.training.helpers import planned, prepared, records, stopped_after, tiny_model
from tests.training.test_processes import TRAIN, launch


@pytest.fixture(scope="module")
def place(stores):
    write_boxes(stores / "boxes", pictures=24, seed=0, plain=2)
    write_boxes(stores / "held", pictures=12, seed=1)
    return stores


def test_the_table_holds_what_the_store_says(place):
    store, model = open_store(place / "boxes"), tiny_model()
    table = build_box_table(store, model.tokenizer, model.image_tower.preprocessing, "here")
    assert len(table) == 24 and table.passed_over == 2 and len(table.phrases) == 8
    batch = table.batch(np.array([3, 0, 7]), model.tokenizer)
    found = read_boxed(store, "here")
    for row, image_id in enumerate((3, 0, 7)):
        said = {}
        for pair, beside in store.pairs_and_beside():
            if pair.image_id == image_id and "boxes" in beside:
                said[pair.text] = beside["boxes"]
        own = {}
        for place_of, number in enumerate(batch["asked"][row].tolist()):
            if number >= 0:
                text = found.texts[int(batch["numbers"][number])]
                boxes = batch["boxes"][row][batch["says"][row, :, place_of]]
                own[text] = [[cx - w / 2, cy - h / 2, w, h] for cx, cy, w, h in boxes.tolist()]
        assert own.keys() == said.keys()
        for text, boxes in said.items():
            np.testing.assert_allclose(own[text], boxes, atol=1e-5)
        # a thing that two phrases name is one box
        assert int(batch["counts"][row]) == len({tuple(box) for boxes in said.values() for box in boxes})


def tokens_and_pictures():
    model = tiny_model()
    return model.tokenizer, model.image_tower.preprocessing


def test_drawn_phrases_are_a_function_of_the_step(place):
    table = build_box_table(open_store(place / "boxes"), *tokens_and_pictures(), "here")
    drawn = [table.others(3, (7, step)).tolist() for step in range(40)]
    assert drawn == [table.others(3, (7, step)).tolist() for step in range(40)]
    assert all(len(set(each)) == 3 for each in drawn) and len({tuple(each) for each in drawn}) > 5
    assert table.others(100, (7, 0)).tolist() == list(range(8))  # no more than there are


def batch_of(table, model, size: int, drawn: int = 3) -> dict:
    batch = table.batch(np.arange(size), model.tokenizer)
    numbers = torch.from_numpy(table.others(drawn, (0, 0))) if drawn else torch.empty(0, dtype=torch.int64)
    ids, mask = table.texts(numbers.numpy(), model.tokenizer) if drawn else (torch.empty(0, 1),) * 2
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (size, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return batch | {"pixels": pixels, "drawn": numbers, "drawn_ids": ids, "drawn_mask": mask}


def step_of(model, micro=None) -> GroundStep:
    return GroundStep(model, Boxes(), micro_batch_size=micro, autocast=nullcontext, backward=torch.Tensor.backward)


def with_heads(seed: int = 0):
    model = tiny_model(dropout=0.0).double()
    torch.manual_seed(seed)
    model.heads = new_heads(model.image_tower)
    return model


@pytest.mark.parametrize("drawn", [3, 0])
def test_the_loss_is_the_mean_of_the_pictures_each_by_itself(place, drawn):
    model = with_heads()
    table = build_box_table(open_store(place / "boxes"), model.tokenizer, model.image_tower.preprocessing, "here")
    batch = batch_of(table, model, 5, drawn)
    out = step_of(model)(dict(batch))
    texts = read_boxed(open_store(place / "boxes"), "here").texts
    expected = 0.0
    for row in range(5):
        picture = table.pictures[row]
        others = [number for number in batch["drawn"].tolist() if number not in picture.phrases]
        asked = [*picture.phrases.tolist(), *others]
        ids, mask = model.tokenizer.pad(model.tokenizer.encode([texts[number] for number in asked]))
        regions = model.regions(batch["pixels"][row : row + 1])
        scores = regions.scores(model.text_features(ids, mask))
        boxes = torch.from_numpy(picture.boxes).double()
        centred = torch.cat([boxes[:, :2] + boxes[:, 2:] / 2, boxes[:, 2:]], 1)[None]
        says = torch.zeros(1, len(boxes), len(asked), dtype=torch.bool)
        says[0, :, : len(picture.phrases)] = torch.from_numpy(picture.says)
        targets = Targets(centred, torch.tensor([len(boxes)]), says, torch.ones(1, len(asked), dtype=torch.bool))
        matched = match(scores, regions.boxes, regions.real, targets)
        expected += float(losses(scores, regions.boxes, targets, matched).total.detach())
        expected += float(inside(regions.boxes, regions.places, regions.real, targets).sum().detach())
    assert float(out.loss) == pytest.approx(expected / 5, rel=1e-5)


@pytest.mark.parametrize("micro", [1, 3, 4])
def test_a_divided_batch_has_the_gradient_of_the_whole(place, micro):
    model = with_heads()
    table = build_box_table(open_store(place / "boxes"), model.tokenizer, model.image_tower.preprocessing, "here")
    batch = batch_of(table, model, 8)

    def gradients(size):
        model.zero_grad()
        step = step_of(model, size)
        out = step(dict(batch))
        return out, step.parts, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    (whole, parts, expected), (out, own, found) = gradients(None), gradients(micro)
    assert float(whole.loss) == pytest.approx(float(out.loss), abs=1e-6) and whole.accuracy == out.accuracy
    assert {name: float(part) for name, part in parts.items()} == pytest.approx({n: float(p) for n, p in own.items()})
    assert {name.partition(".")[0] for name in found} == {"image_tower", "text_tower", "heads"}
    assert found.keys() == expected.keys() and "logit_scale" not in found
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-9, rtol=1e-6, msg=name)


def test_a_run_learns_boxes_and_goes_on_exactly(place, tmp_path, capsys):
    stage = {"steps": 60, "validate_every": 30, "learning_rate": 3e-3, "ema": 0.9}
    assert train(boxes_recipe(place, tmp_path / "whole", stage=stage))
    found = run_losses(tmp_path / "whole")
    assert found["boxes", 60] < 0.6 * found["boxes", 1]
    line = records(tmp_path / "whole")[-1]
    assert sum(line[part] for part in ("focal", "distance", "overlap", "inside", "stay")) == pytest.approx(
        line["loss"], abs=1e-5
    )
    judged = [r for r in records(tmp_path / "whole", "validation") if r["stage"] == "boxes"]
    assert [r["step"] for r in judged] == [0, 30, 60]  # a stage begins judged
    assert judged[-1]["score"] == judged[-1]["scores"]["held"]["any_box_r1"] > judged[0]["score"]
    assert judged[-1]["scores"]["pairs"]["mean_recall"] is not None
    said = capsys.readouterr().out
    assert "any-box R@1" in said and "learns" in said and "heads for boxes and scores are new" in said
    best = load(tmp_path / "whole" / "boxes" / "best")
    assert best.heads is not None and best.heads.describe() == {"width": 32, "dim": 16}
    assert not train(boxes_recipe(place, tmp_path / "stopped", stage=stage), **stopped_after(("boxes", 40)))
    assert train(boxes_recipe(place, tmp_path / "stopped", stage=stage), proceed=True)
    assert run_losses(tmp_path / "stopped") == found
    info = [read_info(tmp_path / name / "boxes" / "best") for name in ("whole", "stopped")]
    assert info[0]["weights_sha256"] == info[1]["weights_sha256"]


@pytest.mark.slow
def test_two_devices_learn_boxes_as_one(place, tmp_path, one_thread):
    """Also in micro-batches. At a rate at which rounding does not grow from step to step: at 1e-3 the second loss is 31."""
    for name, processes, parts in (("one", 1, {}), ("both", 2, {}), ("parts", 2, {"micro_batch_size": 3})):
        recipe = boxes_recipe(place, tmp_path / name, stage={"learning_rate": 3e-5} | parts)
        (tmp_path / f"{name}.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
        launch(TRAIN, tmp_path, processes, str(tmp_path / f"{name}.yaml"), "new", "never", "")
    one, judged = run_losses(tmp_path / "one"), records(tmp_path / "one", "validation")[-1]["scores"]
    for name in ("both", "parts"):
        found = run_losses(tmp_path / name)
        assert one.keys() == found.keys() and all(one[key] == pytest.approx(found[key], abs=1e-5) for key in one)
        assert records(tmp_path / name, "validation")[-1]["scores"]["held"] == pytest.approx(judged["held"])


def test_a_stage_on_pairs_comes_first_and_one_goes_on_from_heads(place, tmp_path):
    recipe = boxes_recipe(place, tmp_path / "run")
    content = json.loads(recipe.model_dump_json())
    pairs = {"train": "both", "steps": 4, "batch_size": 8, "learning_rate": 1e-3, "warmup_steps": 1}
    content["stages"] = {"first": pairs, **content["stages"], "behind": pairs}
    recipe = type(recipe).model_validate(content)
    assert train(recipe)
    assert load(tmp_path / "run" / "first" / "best").heads is None
    kept = load(tmp_path / "run" / "boxes" / "best")
    last = load(tmp_path / "run" / "behind" / "best")
    for name, tensor in kept.heads.state_dict().items():  # they do not train on pairs
        assert torch.equal(tensor, last.heads.state_dict()[name])
    stopped = boxes_recipe(place, tmp_path / "again", model={"start": str(tmp_path / "run" / "boxes" / "best")})
    context, model, plans = planned(stopped)
    assert "are the start's" in describe(context, model, plans) and not plans[0].grounding.new


def test_larger_pictures_keep_to_what_the_start_says_of_its_own(place, tmp_path):
    """Read at twice its size a model knows less: not that is what shall stay."""
    start = tmp_path / "start"
    save_checkpoint(tiny_model(dropout=0.0), start, info={})
    changes = {"model": {"start": str(start), "image_size": 48}}
    trainer = prepared(boxes_recipe(place, tmp_path / "run", **changes), 0)
    assert trainer.model.image_size == 48 and trainer.before.image_size == 32
    own = load(start)
    pixels = torch.randint(0, 256, (3, 3, 48, 48), dtype=torch.uint8)
    smaller = torch.nn.functional.interpolate(pixels.float(), size=(32, 32), mode="bicubic", antialias=True)
    expected = own.image_features(smaller.round().clamp(0, 255).to(torch.uint8))
    torch.testing.assert_close(trainer.before.image_features(at_size(pixels, (32, 32))), expected)
    assert at_size(pixels, (48, 48)) is pixels

    assert train(boxes_recipe(place, tmp_path / "whole", **changes))
    assert not train(boxes_recipe(place, tmp_path / "stopped", **changes), **stopped_after(("boxes", 4)))
    assert train(boxes_recipe(place, tmp_path / "stopped", **changes), proceed=True)
    assert run_losses(tmp_path / "stopped") == run_losses(tmp_path / "whole")
    # The distance to what it was does not begin at nothing, as it does where the size is the start's.
    assert records(tmp_path / "whole")[0]["stay"] > 1e-3
    assert train(boxes_recipe(place, tmp_path / "same", model={"start": str(start)}))
    assert records(tmp_path / "same")[0]["stay"] < 1e-6


def test_a_state_with_heads_of_before_is_refused_in_words(place, tmp_path):
    context, model, plans = planned(boxes_recipe(place, tmp_path / "run"))
    now, held = identity(context, model, plans), {"heads.norm.weight": torch.ones(32)}
    with pytest.raises(RequestError, match=r"begin a run from one, model.start=.*/run/STAGE/last"):
        refuse_other_data(context, now, {"model": held, "identity": now})
    assert refuse_other_data(context, now, {"model": held | {"heads.own": torch.ones(32)}, "identity": now}) == []


def test_what_is_frozen_stays(place, tmp_path):
    trainer = prepared(boxes_recipe(place, tmp_path / "run", stage={"train": "heads"}), 0)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.take(next(trainer.batches()))
    changed = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all(name.startswith("heads.") for name in changed)


def test_the_plan_says_what_is_learnt(place, tmp_path):
    rules = [
        {"tower": "image"},
        {"tower": "text", "rate": 0.04},
        {"tower": "temperature"},
        {"tower": "heads", "rate": 2},
    ]
    said = describe(*planned(boxes_recipe(place, tmp_path / "run", stage={"train": rules})))
    assert "of 8 phrases in 24 pictures" in said and "2 texts without boxes are passed over" in said
    assert "each picture is asked 3 other phrases" in said and "best by held: any_box_r1" in said
    assert "rate 0.002" in said and "rate 4e-05" in said


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ground": {"boxes": "train"}}, r"stages.boxes.ground.boxes: no phrase of .*train has boxes"),
        ({"ground": {"boxes": "nowhere"}}, r"stages.boxes.ground.boxes: .*nowhere"),
        ({"ground": {}}, r"data.train: no phrase of .*train has boxes"),
        ({"batch_size": 25}, r"larger than the pictures with boxes of .*boxes \(24 pairs\)"),
        (
            {"train": [{"tower": "image"}, {"tower": "text"}, {"tower": "temperature"}]},
            r"no rule covers heads.own .* Add {tower: heads}: they are what learns boxes",
        ),
    ],
)
def test_what_cannot_learn_boxes_is_refused_in_words(place, tmp_path, changes, said):
    if changes.get("ground", {}).get("boxes"):
        changes = {"ground": {"boxes": str(place / changes["ground"]["boxes"])}}
    with pytest.raises(RequestError, match=said):
        planned(boxes_recipe(place, tmp_path / "run", stage=changes))


def test_small_batches_of_pictures_are_no_lack_of_negatives(place, tmp_path):
    said = warnings(*planned(boxes_recipe(place, tmp_path / "run", stage={"batch_size": 8, "train": "heads"})))
    assert not [each for each in said if "negatives" in each] and [each for each in said if "only 6 steps" in each]


def test_rates_of_learning_boxes_are_not_those_of_contrast(place, tmp_path):
    save_checkpoint(tiny_model(), tmp_path / "start", info={})
    recipe = boxes_recipe(place, tmp_path / "run", model={"start": str(tmp_path / "start")})
    assert not [said for said in warnings(*planned(recipe)) if "rate" in said]


def test_a_damaged_picture_is_no_reason_to_stop_where_a_tower_sees_the_middle(place, tmp_path):
    """What reads it says so and takes another: the plan only asks how large it is."""
    source, model = open_store(place / "boxes"), tiny_model()
    with StoreWriter(tmp_path / "damaged") as writer:
        for image_id in source.image_ids:
            writer.add_image(image_id, b"no picture" if image_id == 3 else source.image(image_id))
        for number, (pair, beside) in enumerate(source.pairs_and_beside()):
            writer.add_pair(pair.image_id, number, pair.text, pair.language, beside=beside or None)
        writer.finish()
    table = build_box_table(
        open_store(tmp_path / "damaged"), model.tokenizer, SquarePicture(32, fit="crop"), "stages.boxes.ground.boxes"
    )
    whole = build_box_table(source, model.tokenizer, SquarePicture(32, fit="crop"), "stages.boxes.ground.boxes")
    assert len(table) == len(whole) == 24


def test_a_tower_without_patches_and_a_split_without_boxes_are_refused(place, tmp_path):
    resnet = {"kind": "resnet", "width": 8, "layers": [1, 1, 1, 1], "image_size": 32}
    start = {"image": resnet, "text": {"hidden": 32, "layers": 1, "heads": 2}, "projection": 16}
    with pytest.raises(RequestError, match="stages.boxes: .*of kind resnet gives no features of single patches"):
        planned(boxes_recipe(place, tmp_path / "run", model={"start": start}))
    data = {
        "train": str(place / "train"),
        "valid": {"pairs": str(place / "valid"), "held": {"boxes": str(place / "valid")}},
    }
    with pytest.raises(RequestError, match="data.valid.held.boxes: no phrase of .*valid has boxes"):
        planned(boxes_recipe(place, tmp_path / "run", data=data))


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        ({"kind": "pairs"}, "ground is for kind: ground"),
        ({"kind": "pairs", "ground": None, "train": "heads"}, "heads train in a stage of kind ground alone"),
        ({"augment": {"crop": 0.5}}, "would move things out of their boxes"),
        ({"patch_dropout": 0.5}, "patch_dropout is for pairs"),
        ({"best_by": "held: accuracy"}, "scores there are any_box_r1"),
        ({"best_by": "nothing: any_box_r1"}, "names the split 'nothing'"),
    ],
)
def test_a_stage_that_contradicts_itself_is_refused(place, tmp_path, stage, said):
    with pytest.raises(ValueError, match=said):
        boxes_recipe(place, tmp_path / "run", stage=stage)


def test_without_a_split_to_judge_boxes_by_it_is_refused(place, tmp_path):
    data = {"train": str(place / "train"), "valid": str(place / "valid")}
    with pytest.raises(ValueError, match="data.valid has no split to judge them by"):
        boxes_recipe(place, tmp_path / "run", data=data)
