"""Two languages in one run: each judged by itself, what one loses said and bounded, one of them or both decide."""

from __future__ import annotations

import pytest

from cnclip_ft.recipe import Recipe
from cnclip_ft.training.languages import by_language, language_notes, since_start
from cnclip_ft.training.plan import describe
from cnclip_ft.training.run import train
from data_tools.errors import RequestError
from data_tools.store import StoreWriter, open_store
from tests.training.helpers import planned, records, stopped_after, tiny_recipe

STAGE = {"train": "both", "steps": 4, "batch_size": 8, "learning_rate": 1e-3, "warmup_steps": 1, "validate_every": 2}


@pytest.fixture(scope="module")
def places(stores):
    """The validation pictures with Chinese captions that say so and English ones that do not."""
    source = open_store(stores / "valid")
    for name, unsaid in (("two", True), ("zh", False)):
        with StoreWriter(stores / name) as writer:
            for image_id in source.image_ids:
                writer.add_image(image_id, source.image(image_id))
                writer.add_pair(image_id, f"{image_id}-zh", f"第{image_id}张照片", "zh")
                if unsaid:
                    writer.add_pair(image_id, f"{image_id}-en", f"a dog number {image_id}", None)
            writer.finish()
    return stores


def recipe_of(places, folder, *, valid=None, guard=None, **changes) -> Recipe:
    data = {
        "train": str(places / "train"), "workers": 0, "guard": guard,
        "valid": valid or {"mine": {"store": str(places / "two"), "language": "en"}},
    }  # fmt: skip
    return tiny_recipe(places, output=str(folder), data=data, stages={"only": STAGE}, **changes)


def test_both_languages_are_judged_and_what_they_lost_is_said(places, tmp_path, capsys):
    recipe = recipe_of(places, tmp_path / "run", best_by="languages.mean_recall")
    assert not train(recipe, **stopped_after(("only", 3)))
    assert train(recipe, proceed=True)  # the start is known to the run that goes on
    start, *later = records(tmp_path / "run", "validation")
    parts = start["scores"]["mine"]["by_language"]
    assert set(parts) == {"zh", "en"} and parts["en"]["text_to_image"]["queries"] == 10
    said = capsys.readouterr().out
    for line in later:
        both = {name: part["mean_recall"] for name, part in line["scores"]["mine"]["by_language"].items()}
        assert line["languages"] == both
        changes = ", ".join(f"{name} {both[name] - parts[name]['mean_recall']:+.2f}" for name in ("en", "zh"))
        assert f"since the start: {changes}" in said
    for file in ("recall.txt", "index.html"):
        assert "English: mean recall" in (tmp_path / "run" / "report" / file).read_text(encoding="utf-8")
    end = records(tmp_path / "run", "languages")[0]
    assert end["start"] == start["languages"]
    best = max((line["languages"] for line in (start, *later)), key=lambda each: sum(each.values()))
    assert end["end"] == pytest.approx(best)  # of the weights that are kept


def test_a_language_that_falls_ends_the_run(places, tmp_path, monkeypatch, capsys):
    from cnclip_ft.training import run as runs

    falling, judge = iter((50.0, 40.0, 50.0)), runs.Judge.__call__

    def judged(self, model):
        found = judge(self, model)
        found.guard = next(falling)
        return found

    recipe = recipe_of(places, tmp_path / "run", guard={"language": "en", "max_drop": 1, "action": "stop"})
    said = describe(*planned(recipe))
    assert "guard        mine, en by itself; a drop of more than 1 points ends the run" in said
    assert "texts: zh 10, en 10" in said
    monkeypatch.setattr(runs.Judge, "__call__", judged)
    train(recipe)
    assert "guard 40.00 (-10.00) DROPPED BY MORE THAN 1" in capsys.readouterr().out
    (ended,) = records(tmp_path / "run", "ended")
    assert ended["step"] == 2 and "data.guard.max_drop" in ended["reason"]
    page = (tmp_path / "run" / "report" / "index.html").read_text(encoding="utf-8")
    assert "ends at step 2 of " in page and "the guard split lost more than data.guard.max_drop allows</p>" in page


def test_the_guard_is_the_language_of_its_split(places, tmp_path):
    from cnclip_ft.training.run import Run
    from cnclip_ft.training.stop import StopRequest

    for guard in ({"language": "en"}, {"language": "en", "split": str(places / "two")}):
        context, model, plans = planned(recipe_of(places, tmp_path / "run", guard=guard))
        found = Run(context, model, plans, StopRequest()).judge(model)
        assert found.guard == found.languages["en"] == found.first.value("en.mean_recall")
    assert found.first.value("languages.mean_recall") == pytest.approx(sum(found.languages.values()) / 2)
    assert found.first.value("zh.text_to_image.r5") == found.first.by_language["zh"].text_to_image.recall[5]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"best_by": "en.mean_recall", "valid": "two"}, r"best_by asks for en, and no text of .*two.*found: zh.*language: en"),
        ({"best_by": "languages.mean_recall", "valid": "zh"}, r"best_by asks for en"),
        ({"guard": {"language": "en"}, "valid": "zh"}, r"data.guard.language asks for en"),
    ],
)  # fmt: skip
def test_a_language_no_text_says_is_refused(places, tmp_path, changes, said):
    changes["valid"] = str(places / changes["valid"])
    with pytest.raises(RequestError, match=said):
        planned(recipe_of(places, tmp_path / "run", **changes))


def test_sentences():
    start, end = {"zh": 40.0, "en": 52.25}, {"zh": 45.5, "en": 51.0}
    assert since_start(start, end) == "  since the start: zh +5.50, en -1.25"
    assert language_notes(start, end) == [
        "Chinese: mean recall 40.00 before the first step, 45.50 now, 5.50 points won",
        "English: mean recall 52.25 before the first step, 51.00 now, 1.25 points lost",
    ]
    assert since_start({}, end) == "" and language_notes({}, end) == [] and by_language([]) == {}
