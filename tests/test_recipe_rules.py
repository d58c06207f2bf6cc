"""The rules of own-data are bounds that hold at every size, on every device and from every start."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cnclip_ft.recipe import Recipe
from cnclip_ft.recipe_facts import Facts
from cnclip_ft.recipe_files import checked_recipe
from cnclip_ft.recipe_rules import choose, filled
from cnclip_ft.recipe_sizes import batch_of_device
from data_tools.errors import RequestError
from data_tools.words import said_in

BOTH = {"align": {}, "contrast": {}}
DEVICES = {
    "cpu": {},
    "8 GB": {"device": "cuda", "memory": 8.0},
    "80 GB": {"device": "cuda", "memory": 80.0},
    "8 × 80 GB": {"device": "cuda", "memory": 80.0, "devices": 8},
    "8 cpu": {"devices": 8},
}


def stages(facts, given=None):
    """The stages of the recipe that comes out, and every reason."""
    chosen = choose(facts, BOTH if given is None else given)
    content = {"model": {"start": "ViT-B-16"}, "data": {"train": "a", "valid": "b"}, "output": "c"}
    recipe = Recipe.model_validate(content | {"stages": filled(BOTH if given is None else given, chosen)})
    return recipe.stages, [choice.line() for choice in chosen]


@pytest.mark.parametrize("start", ["whole", "towers", "new text", "new image", "new"])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("captions", [1, 5])
@pytest.mark.parametrize("pairs", [8, 100, 1_000, 10_000, 40_000, 1_000_000, 100_000_000])
def test_bounds_that_always_hold(pairs, captions, device, start):
    facts = Facts(pairs=pairs, images=max(pairs // captions, 1), start=start, **DEVICES[device])
    found, said = stages(facts)
    before, after = (stage.batch_size for stage in found.values())
    if start == "new":  # many small steps in the first stage
        assert before == (after // 4 if after >= 64 else min(after, 16))
    else:
        assert before == after
    for stage in found.values():
        assert stage.micro_batch_size == "auto"
        assert facts.devices <= stage.batch_size <= min(max(batch_of_device(facts), facts.devices), pairs)
        assert stage.batch_size % facts.devices == 0
        assert stage.batch_size <= max(pairs // 4, 16) and stage.batch_size <= max(facts.images, 2, facts.devices)
        epochs = stage.steps / (pairs // stage.batch_size)
        assert stage.steps >= 50 and (epochs <= 100 or stage.steps == 50)
        assert 0 < stage.warmup_steps <= stage.steps / 10 + 1 and 5 <= stage.steps / stage.validate_every <= 6
        assert 1e-6 <= stage.learning_rate <= 2.5e-3
        if start == "whole":
            assert stage.learning_rate <= 5e-5
    assert all(
        rule.rate == 0 for rule in found["align"].train if rule.tower == "image" and rule.part in ("all", "trunk")
    )
    assert len(said) > 10 and all(said_in(line, "zh") != line for line in said)


def at(pairs, start="towers", captions=5, **more):
    return stages(Facts(pairs=pairs, images=pairs // captions, start=start, **more))[0]


def test_what_was_measured_comes_out():
    """6,000 photos with five captions, two pretrained towers, a CPU: the settings that gained in stage two."""
    found = at(30_000)
    align, contrast = found.values()
    assert (align.batch_size, align.learning_rate, contrast.batch_size, contrast.learning_rate) == (
        256,
        2e-4,
        256,
        3e-5,
    )
    assert {(rule.tower, rule.part): rule.rate for rule in contrast.train} == {
        ("image", "trunk"): 1, ("image", "rest"): 2, ("text", "trunk"): 1, ("text", "rest"): 2, ("temperature", "all"): 2,
    }  # fmt: skip
    assert {rule.rate for rule in align.train if rule.part == "rest"} == {1, 5}
    assert contrast.interpolate == 4 and align.interpolate is None and align.ema is None
    # 0.93 over 70 steps: a fifth of the stage.
    seventy = stages(Facts(30_000, 6_000, start="towers"), {"contrast": {"steps": 70}})[0]["contrast"]
    assert seventy.ema == pytest.approx(0.93, abs=0.002) and seventy.warmup_steps == 7
    # The demonstration's: both towers new, 128 wide, batch 128, 1,100 steps, 0.98, two captions at once.
    drawn = stages(Facts(30_000, 6_000, start="new", width=128, captions=5.0), {"contrast": {"batch_size": 128}})[0][
        "contrast"
    ]
    assert drawn.learning_rate == 1.7e-3 and 1000 <= drawn.steps <= 1300 and drawn.ema == pytest.approx(0.98, abs=0.005)
    assert (drawn.weight_decay, drawn.augment.crop, drawn.captions_at_once) == (0.3, 0.8, 2)
    # 40,000 captions of drawn scenes: what a search of stage one found.
    made = at(40_000, start="new", width=128)
    assert (made["align"].batch_size, made["align"].steps, made["contrast"].batch_size) == (64, 938, 256)
    assert made["align"].learning_rate == 1.2e-3
    first = made["align"]
    assert (first.weight_decay, first.objective.label_smoothing) == (0.1, 0.05) and made[
        "contrast"
    ].objective.label_smoothing == 0
    assert first.ema == pytest.approx(0.947, abs=0.001) and at(40_000)["align"].objective.label_smoothing == 0
    # A sigmoid knows no smoothing; what else is given of a loss stays beside it.
    for given, smoothing in (
        ({"kind": "sigmoid"}, 0),
        ({"label_smoothing": 0.1}, 0.1),
        ({"tile": 16, "positives": "soft"}, 0.05),
    ):
        own = stages(Facts(40_000, 8_000, start="new"), {"align": {"objective": given}})[0]["align"].objective
        assert own.model_dump() | given == own.model_dump() and own.label_smoothing == smoothing


def test_more_of_something_never_makes_the_batch_smaller_and_fewer_pairs_are_passed_more_often():
    sizes = [100, 1_000, 10_000, 40_000, 1_000_000, 100_000_000]
    card = {"device": "cuda", "memory": 80.0}
    batches = [at(pairs, **card)["align"].batch_size for pairs in sizes]
    assert batches == sorted(batches) and batches[0] == 16 and batches[-1] == 2048
    assert at(10**8, device="cuda", memory=80.0, devices=8)["align"].batch_size == 8192
    assert at(10**8, device="cuda", memory=8.0)["align"].batch_size == 256
    assert at(10**8, device="cuda")["align"].batch_size == 256  # a card that does not say
    passes = [at(pairs, **card)["contrast"] for pairs in sizes]
    epochs = [round(stage.steps * stage.batch_size / pairs, 1) for stage, pairs in zip(passes, sizes, strict=True)]
    assert epochs == sorted(epochs, reverse=True) and epochs[-1] == 1
    one, five = at(1_000, captions=1), at(1_000, captions=5)
    assert (
        one["align"].batch_size == 128 and five["align"].batch_size == 64
    )  # 200 pictures: half of them, and a power of two


def test_what_is_given_wins_and_the_rest_follows():
    facts = Facts(40_000, 8_000, start="towers")
    free, _ = stages(facts)
    given = {
        "align": {"batch_size": 64},
        "contrast": {"epochs": 2, "ema": None, "train": "both", "augment": {"crop": 0.5}},
    }
    found, said = stages(facts, given)
    assert found["align"].batch_size == 64 and found["contrast"].batch_size == 64  # that of the stage before
    assert found["align"].learning_rate == free["align"].learning_rate / 2  # the square root of a quarter
    contrast = found["contrast"]
    assert (contrast.epochs, contrast.steps, contrast.ema, contrast.train, contrast.augment.crop) == (
        2,
        None,
        None,
        "both",
        0.5,
    )
    assert contrast.warmup_steps == 100 and contrast.validate_every == -(-2 * 40_000 // 64 // 6)
    assert not [line for line in said if line.startswith(("align: batch_size", "contrast: steps", "contrast: train"))]
    alone, _ = stages(facts, {"contrast": {"learning_rate": 1e-6}})
    assert (
        list(alone) == ["contrast"] and alone["contrast"].learning_rate == 1e-6 and alone["contrast"].batch_size == 256
    )


def test_no_setting_that_is_wrong_is_mistaken_for_one_that_is_open():
    content = {"rules": "own-data", "model": {"start": "ViT-B-16"}, "data": {"train": "a", "valid": "b"}}
    with pytest.raises(RequestError, match="batch_size"):
        checked_recipe(content | {"stages": {"align": {"batch_size": "many"}}}, lambda model, data: Facts(100, 100))
    with pytest.raises(RequestError, match="nothing looked at it"):
        checked_recipe(content | {"stages": BOTH})
    with pytest.raises(RequestError, match="stages.other.*batch_size"):
        checked_recipe(content | {"stages": {"other": {}}}, lambda model, data: Facts(100, 100))


def test_a_recipe_that_chose_says_so_and_chooses_no_more():
    content = {
        "rules": "own-data",
        "model": {"start": "ViT-B-16"},
        "data": {"train": "a", "valid": "b"},
        "stages": BOTH,
    }
    facts = Facts(10_000, 2_000)
    recipe = checked_recipe(content, lambda model, data: facts)
    assert recipe.rules is None and recipe.chosen[0].startswith("own-data: 10,000 pairs, 2,000 pictures")
    again = checked_recipe(recipe.model_dump(mode="json"), lambda model, data: replace(facts, pairs=20))
    assert again.stages == recipe.stages and again.chosen == ()


def test_a_convolutional_tower_that_met_no_texts_learns_at_a_rate_of_its_own():
    """As measured (docs/results.md): 4e-4 at batch 256, the text tower far below, several captions of each picture."""
    facts = Facts(20_000, 4_000, start="towers", convolutions=True, captions=5.0)
    found, said = stages(facts)
    rates = {(rule.tower, rule.part): rule.rate * found["contrast"].learning_rate for rule in found["contrast"].train}
    assert rates["image", "trunk"] == pytest.approx(4e-4) and rates["image", "rest"] == pytest.approx(2e-4)
    assert rates["text", "trunk"] == rates["text", "rest"] == pytest.approx(2e-5)
    assert found["contrast"].captions_at_once == 3 and found["contrast"].augment.crop == 0.4
    assert found["align"] == stages(replace(facts, convolutions=False))[0]["align"]
    small = stages(replace(facts, pairs=400, images=80))[0]["contrast"]
    assert small.learning_rate == pytest.approx(4e-4 * (small.batch_size / 256) ** 0.5, rel=0.02)
    gentle = stages(replace(facts, convolutions=False))[0]["contrast"]
    assert gentle.learning_rate == pytest.approx(3e-5) and gentle.captions_at_once == 3
    assert any("long way to go" in line for line in said)


def test_a_size_of_crops_that_is_given_gets_their_share():
    facts = Facts(20_000, 4_000, start="towers", convolutions=True, captions=5.0)
    found, _ = stages(facts, {"contrast": {"augment": {"size": 192, "mirror": True}}})
    augment = found["contrast"].augment
    assert (augment.crop, augment.size, augment.mirror) == (0.4, 192, True)
    plain = stages(facts, {"contrast": {"augment": {"mirror": True}}})[0]["contrast"].augment
    assert (plain.crop, plain.size) == (1.0, None)  # given without: as it is given


def test_so_it_does_beside_a_text_tower_that_is_made_new():
    """The text tower keeps the rate of a new one; a given rate or table turns both off."""
    facts = Facts(20_000, 4_000, start="new text", convolutions=True, captions=5.0)
    found, plain = (stages(each)[0]["contrast"] for each in (facts, replace(facts, convolutions=False)))
    image, gentle = (
        next(rule.rate for rule in each.train if (rule.tower, rule.part) == ("image", "trunk")) * each.learning_rate
        for each in (found, plain)
    )
    assert image == pytest.approx(4e-4, rel=0.02) and gentle == pytest.approx(3e-5, rel=0.02)
    assert found.learning_rate == plain.learning_rate and found.augment.crop == 0.4
    given = {"contrast": {"learning_rate": 1e-3}}
    assert stages(facts, given)[0]["contrast"] == stages(replace(facts, convolutions=False), given)[0]["contrast"]


def test_so_does_one_of_a_checkpoint_that_only_its_text_tower_learnt_in():
    """Its second stage is that of two towers; `align` and a tower that met texts go on as published."""
    facts = Facts(20_000, 4_000, start="whole", convolutions=True, captions=5.0)
    found, towers, whole = (
        stages(each)[0] for each in (facts, replace(facts, start="towers"), replace(facts, convolutions=False))
    )
    assert found["contrast"] == towers["contrast"] != whole["contrast"]
    assert found["align"] == whole["align"] != towers["align"]


@pytest.mark.parametrize(("captions", "wanted"), [(1, 1), (1.9, 1), (2.5, 2), (5, 3)])
def test_so_many_captions_at_once_as_a_picture_has(captions, wanted):
    facts = Facts(10_000, round(10_000 / captions), start="towers", captions=captions)
    assert stages(facts)[0]["contrast"].captions_at_once == wanted
    assert stages(facts)[0]["align"].captions_at_once == 1
    assert stages(replace(facts, start="whole"))[0]["contrast"].captions_at_once == 1
    taught = stages(facts, {"contrast": {"distill": {"teacher": "t"}}})[0]
    assert taught["contrast"].captions_at_once == 1


@pytest.mark.parametrize("given", [{"train": "text"}, {"train": "both"}, {"learning_rate": 3e-5}])
def test_a_rate_is_never_beside_a_table_it_was_not_meant_for(given):
    """4e-4 is the image tower's, and a twentieth of it the text tower's: chosen both, or neither."""
    facts = Facts(20_000, 4_000, start="towers", convolutions=True, captions=5.0)
    found, plain = (
        stages(each, {"contrast": given})[0]["contrast"] for each in (facts, replace(facts, convolutions=False))
    )
    assert found == plain
