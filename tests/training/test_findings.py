"""What a run shows in words: each finding fires on a journal that has it, and is silent on one that has not."""

from __future__ import annotations

import math
import re

import pytest
import yaml

from cnclip_ft.recipe_files import load_recipe
from cnclip_ft.training.finding import WHERE
from cnclip_ft.training.findings import findings, in_short
from data_tools.words import said_in

ABOUT = {
    "kind": "stage", "stage": "learn", "last": True, "total": 200, "steps_per_epoch": 20, "objective": "contrastive",
    "rates": {"image_trunk": 1e-5, "text_trunk": 1e-5, "temperature": 1e-5}, "rules": {}, "new": [], "held": True, "workers": 2,
    "settings": {"epochs": 10, "steps": None, "batch_size": 256, "learning_rate": 1e-5, "gradient_clip": 1.0, "until": "end"},
}  # fmt: skip


def journal(about=None, lines=None, validations=None, after=(), start=30.0, stage="learn"):
    """A sound stage of 20 lines and 10 validations; `lines`, `validations`: values by key, or functions of the place from 0."""
    records = [{"kind": "validation", "stage": "start", "step": 0, "mean_recall": start, "score": start}]
    if about is not None:
        records.append(ABOUT | about | {"stage": stage})
    for number in range(20):
        line = {
            "kind": "train", "stage": stage, "step": 10 * (number + 1), "loss": 2.0 * 0.97**number, "accuracy": 0.5, "rate": 1e-5,
            "logit_scale": 100.0, "data_wait": 0.05, "seconds_per_step": 1.0, "gradient_norm": 0.6, "clipped": 0.1,
            "gradient_norms": {"image_trunk": 0.4, "text_trunk": 0.4},
            "relative_updates": {"image_trunk": 1e-4, "text_trunk": 3e-4},
        }  # fmt: skip
        records.append(line | values(lines, number))
        if number % 2:
            place = number // 2
            score = 40 - 4 * 0.6**place
            judged = {"kind": "validation", "stage": stage, "step": line["step"], "mean_recall": score, "score": score}
            records.append(judged | {"loss": 1.5 + 0.5 * 0.9**place} | values(validations, place))
    return [*records, *({"stage": stage} | record for record in after)]


def values(given, place):
    return {key: value(place) if callable(value) else value for key, value in (given or {}).items()}


def names(records):
    return [finding.name for finding in findings(records)]


def test_a_sound_stage_has_nothing_to_remark():
    for about in ({}, None):  # as a journal of before, that says nothing of its stages
        (found,) = findings(journal(about))
        assert found.name == "nothing" and "Nothing to remark (lines of steps 20, validations 10)" in found.saw
        assert found.do is None and found.where is None


FIRES = {
    "overfitting": [
        {"validations": {"loss": lambda place: 1.5 + 0.1 * abs(place - 4), "score": lambda place: 36 - abs(place - 4)}},
        {"validations": {"loss": None, "score": lambda place: 36 - abs(place - 4)}},  # by the score alone
        {"validations": {"loss": lambda place: 1.5 + 0.1 * abs(place - 4), "score": lambda place: 30 + place}},
    ],
    "still rising": [{"validations": {"score": lambda place: 30 + place}}],
    "learning nothing": [{"lines": {"loss": lambda number: math.log(256) + 0.01}}],
    "start stays": [
        {"after": [{"kind": "unchanged", "score": 45.0}], "start": 45.0},
        {"after": [{"kind": "unchanged", "score": 34.0}], "validations": {"score": 33.9}},
        {"after": [{"kind": "unchanged", "score": 34.0}], "validations": {"score": lambda place: 20 + place}},
    ],
    "temperature at its limit": [{"lines": {"logit_scale": lambda number: min(14.3 + 8 * number, 100.0)}}],
    "temperature moving": [{"lines": {"logit_scale": lambda number: 14.3 * 1.05**number}}],
    "gradients clipped": [{"lines": {"clipped": 0.8, "gradient_norm": 3.0}}],
    "image tower still": [{"lines": {"relative_updates": {"image_trunk": 3e-7, "text_trunk": 1e-4}}}],
    "text tower still": [{"lines": {"relative_updates": {"text_trunk": 3e-7}}}],
    "towers apart": [{"lines": {"relative_updates": {"image_trunk": 1e-3, "text_trunk": 1e-5}}}],
    "spikes": [
        {"lines": {"loss": lambda number: 6.0 if number == 15 else 2 * 0.97**number}},
        {"lines": {"highest_loss": lambda number: 9.0 if number == 15 else 2.2}},
    ],
    "waiting for data": [{"lines": {"data_wait": 0.35}}],
}


@pytest.mark.parametrize(
    ("name", "changes"), [pytest.param(name, each, id=name) for name, every in FIRES.items() for each in every]
)
def test_each_fires_where_it_must_and_says_what_can_be_typed(name, changes, tmp_path):
    found = {each.name: each for each in findings(journal({}, **changes))}
    assert list(found) == [name]
    finding = found[name]
    assert finding.means and finding.do and re.search(r"\d", finding.saw) and finding.where == WHERE[name]
    for language in ("en", "zh"):
        said = "".join(said_in(part, language) for part in finding.sentences())
        assert bool(re.search("[\u4e00-\u9fff]", said)) == (language == "zh")
        assert f"docs/training{'.zh-CN' * (language == 'zh')}.md#" in said
    typed = re.findall(r"(?:stages\.learn|data)\.[\w.]+=(?:'[^']+'|[\w.{}:+-]*\w)", finding.do)
    assert typed or name == "waiting for data"
    table = [{"tower": "image"}, {"tower": "text"}, {"tower": "temperature"}]
    stage = {"train": table, "batch_size": 256, "learning_rate": 1e-5, "epochs": 10}
    content = {"model": {"start": "ViT-B-16"}, "data": {"train": "a", "valid": "b"}, "stages": {"learn": stage}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    for each in typed:
        load_recipe(tmp_path / "recipe.yaml", [each.replace("'", "")])


def test_numbers_are_those_of_the_journal():
    rising = {"loss": lambda place: 1.5 + 0.1 * abs(place - 4), "score": lambda place: 36 - abs(place - 4)}
    (over,) = findings(journal({}, validations=rising))
    # The fifth validation, after step 100 of 20 an epoch; means of the two lines before a validation.
    before, after = (sum(2 * 0.97**n for n in pair) / 2 for pair in ((8, 9), (18, 19)))
    assert over.saw == (
        "Overfitting from epoch 5 (step 100): the validation loss rose from 1.500 to 2.000, while the training loss fell from "
        f"{before:.3f} to {after:.3f}."
    )
    assert "what is kept" in over.means and "stages.learn.learning_rate=5e-06" in over.do
    (rises,) = findings(journal({}, validations={"score": lambda place: 30 + place}))
    assert "38.00 → 39.00" in rises.saw and "stages.learn.epochs=20; with --continue" in rises.do
    one = {"rates": {"text_trunk": 1e-5}, "last": False, "settings": ABOUT["settings"] | {"epochs": None, "steps": 200}}
    (rises,) = findings(journal(one, validations={"score": lambda place: 30 + place}))
    assert rises.saw.startswith("The text tower was still rising") and "steps=400, in a new run" in rises.do
    (wait,) = findings(journal({}, lines={"data_wait": 0.35}))
    assert wait.saw == "35% of the time the steps waited for data (66 of 190 seconds)."  # without the first line


def test_the_rule_of_a_tower_is_named_where_the_recipe_has_a_table():
    about = {"rules": {"image": 0, "temperature": 2}, "rates": {"image_trunk": 1e-6, "temperature": 5e-5}}
    (still,) = findings(journal(about, lines={"relative_updates": {"image_trunk": 1e-8}}))
    assert "stages.learn.train.0.rate=10" in still.do  # a tenth of the stage's, a hundred times
    (moving,) = findings(journal(about, lines={"logit_scale": lambda number: 14.3 * 1.05**number}))
    assert "stages.learn.train.2.rate=10" in moving.do  # five times the stage's, twice


def test_without_a_table_one_is_given_in_which_the_tower_alone_is_slower():
    apart = {"relative_updates": {"image_trunk": 1e-3, "text_trunk": 1e-5}}
    (found,) = findings(journal({}, lines=apart))
    table = "[{tower: image, rate: 0.1}, {tower: text, rate: 1}, {tower: temperature, rate: 1}]"
    assert f"stages.learn.train='{table}'" in found.do and "learning_rate" not in found.do
    rates = {"image_projection": 1e-5, "text_trunk": 1e-5, "text_projection": 1e-5, "temperature": 1e-5}
    (found,) = findings(journal({"rates": rates}, lines={"logit_scale": lambda number: 14.3 * 1.05**number}))
    frozen = "{tower: image, part: projection}, {tower: image, part: rest, rate: 0}"
    assert f"train='[{frozen}, {{tower: text, rate: 1}}, {{tower: temperature, rate: 2}}]'" in found.do


def test_one_setting_is_not_advised_twice():
    guessing = {"loss": lambda number: 6.0 - 0.02 * number}
    rising = {"loss": lambda place: 5.5 + 0.1 * place, "score": lambda place: 29 - place}
    stays = [{"kind": "unchanged", "score": 30.0}]
    assert names(journal({}, lines=guessing, validations=rising, after=stays)) == ["learning nothing"]
    assert names(journal({}, validations=rising, after=stays)) == ["overfitting", "start stays"]


def test_who_rises_is_not_said_to_learn_nothing():
    guessing, rises = {"loss": math.log(256)}, {"score": lambda place: 30 + place}
    assert names(journal({}, lines=guessing, validations=rises)) == ["still rising"]


def test_what_a_guard_forbade_is_not_said_to_be_worse_than_the_start():
    broken = [{"kind": "ended", "step": 200, "reason": "guard"}, {"kind": "unchanged", "score": 20.0}]
    assert names(journal({}, after=broken, start=20.0)) == ["nothing"]


def test_a_plateau_is_told_to_wait():
    about = {"settings": ABOUT["settings"] | {"until": "plateau", "patience": 3}}
    ended = [{"kind": "ended", "step": 200, "reason": "plateau"}, {"kind": "unchanged", "score": 34.0}]
    (found,) = findings(journal(about, validations={"score": 33.9}, after=ended))
    assert found.do == "Give stages.learn.learning_rate=2e-05, or stages.learn.patience=6."


def test_losses_of_batches_of_two_sizes_are_not_subtracted():
    rising = {"loss": lambda place: 1.5 + 0.1 * abs(place - 4), "score": lambda place: 36 - abs(place - 4)}
    (over,) = findings(journal({}, validations=rising))
    assert "gap" not in over.saw and "相差" not in over.saw.zh
    (over,) = findings(journal({}, validations=rising | {"gap": 0.25}))
    assert over.saw.endswith("(gap now +0.250).") and over.saw.zh.endswith("（现在相差 +0.250）。")


def test_pictures_that_are_cropped_already_are_not_advised_to_be():
    worse = {"loss": None, "score": lambda place: 36 - abs(place - 4)}
    for about, said in (({}, True), ({"crops": False}, False)):
        (over,) = findings(journal(about, validations=worse))
        assert ("augment.crop=0.8" in over.do) is said


def test_a_batch_is_not_advised_that_the_store_cannot_fill():
    limit = {"logit_scale": lambda number: min(14.3 + 8 * number, 100.0)}
    (found,) = findings(journal({"steps_per_epoch": 1}, lines=limit))
    assert "batch_size" not in found.do and "Make batches harder: stages.learn.negatives" in found.do


SILENT = {
    "another space than the teacher's": {
        "about": {"keeps": "last"},
        "validations": {"loss": None, "score": lambda place: 36 - abs(place - 4)},
    },
    "the last but one was better": {"validations": {"score": lambda place: 30 + place - 2 * (place == 9)}},
    "it rose by little": {"validations": {"score": lambda place: 30 + place / 10}},
    "training does not go on": {
        "lines": {"loss": 2.0},
        "validations": {"loss": lambda place: 1.5 + 0.1 * abs(place - 4), "score": lambda place: 36 - 0.01 * abs(place - 4)},
    },
    "one is worse, and the next is better": {"validations": {"loss": lambda place: 1.5 - 0.05 * place + 0.2 * (place == 8)}},
    "at home at the limit": {"lines": {"logit_scale": 100.0}},
    "has a bias": {"lines": {"logit_scale": lambda number: min(14.3 + 8 * number, 117.0), "logit_bias": -10.0}},
    "clipped now and then": {"lines": {"clipped": 0.5, "gradient_norm": 3.0}},
    "loaders start": {"lines": {"data_wait": lambda number: 0.95 if number == 0 else 0.1}},
    "a small loss that scatters": {"lines": {"loss": lambda number: 0.02 + 0.03 * (number % 3)}},
}  # fmt: skip


@pytest.mark.parametrize("changes", SILENT.values(), ids=SILENT)
def test_none_fires_where_it_must_not(changes):
    assert names(journal(**{"about": {}, **changes})) == ["nothing"]


def test_a_new_tower_may_move_more_and_another_loss_is_not_that_of_a_softmax():
    assert names(journal({"new": ["text"]}, lines={"relative_updates": {"image_trunk": 1e-5, "text_trunk": 1e-2}})) == [
        "nothing"
    ]
    assert names(journal({"objective": "sigmoid"}, lines={"loss": math.log(256) + 0.01})) == ["nothing"]


def test_too_few_points_say_nothing():
    records = journal({"total": 20}, lines={"loss": lambda number: 9.0 + number, "data_wait": 0.9, "clipped": 1.0})
    cut = [record for record in records if record.get("step", 0) <= 20]
    (found,) = findings(cut)
    assert found.name == "nothing" and "Too short to say anything: lines of steps 2, validations 1" in found.saw
    stays = {"kind": "unchanged", "stage": "learn", "score": 90.0}
    assert findings([*cut, stays]) == [found]
    assert findings([records[0]]) == [] == findings([])


def test_what_a_continued_run_says_again_counts():
    records = journal({}, validations={"score": lambda place: 30 + place})
    ended = [{"kind": "ended", "stage": "learn", "step": 200, "reason": "plateau"}]
    assert names([*records, *ended]) == ["nothing"]  # it did not come to its last step
    again = [{**record, "loss": 1.0} for record in records if record["kind"] == "train"][-3:]
    assert names([*records, *ended, *again]) == ["still rising"]
    unchanged = [{"kind": "unchanged", "stage": "learn", "score": 50.0}]
    assert names([*records, *unchanged, *again]) == ["still rising"]


def test_stages_are_told_one_by_one():
    first, second = journal({}, stage="align"), journal({}, lines={"clipped": 0.9}, stage="contrast")[1:]
    assert [(each.stage, each.name) for each in findings([*first, *second])] == [
        ("align", "nothing"),
        ("contrast", "gradients clipped"),
    ]
    said = in_short("contrast", findings([*first, *second], "contrast"))
    assert said.startswith("What stage contrast shows:\n  * 90% of the gradients were clipped") and "align" not in said
    assert "(docs/training.md#gradients-and-movement)" in said and "阶段 contrast 看到了什么" in said.zh
