"""An evaluator that is one class and one registration: read, listed, judged, decided by, continued, as those of the package."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import yaml

import cnclip_ft
from cnclip_ft import recipe_valid
from cnclip_ft.evaluation.kinds.contract import Evaluator
from cnclip_ft.models.checkpoints import read_info
from cnclip_ft.recipe_files import load_recipe
from cnclip_ft.recipe_reference import rows
from cnclip_ft.recipe_section import Place
from cnclip_ft.recipe_valid import ValidSet, register
from cnclip_ft.training.run import train
from data_tools.errors import RequestError
from tests.training.helpers import records, stopped_after, tiny_recipe


class Phrases(ValidSet):
    """Judged along: how alike are phrases of a list?"""

    phrases: Place
    """A file of phrases, one a line."""
    most: int = 100
    """Phrases that are read."""

    scores = ("alike", "nearest")

    def open(self, name, open_split):
        return Likeness(self)


@dataclass(frozen=True)
class Likenesses:
    alike: float
    nearest: float

    def value(self, name):
        return self.as_dict()[name]

    def as_dict(self):
        return asdict(self)


class Likeness(Evaluator):
    tabled = ("alike",)

    def __init__(self, setting):
        self.texts = Path(setting.phrases).read_text(encoding="utf-8").split("\n")[: setting.most]

    def judge(self, name, encoder):
        features = encoder.texts(self.texts)
        cosines = (features @ features.T).fill_diagonal_(0)
        count = len(self.texts)
        return Likenesses(100 * float(cosines.sum()) / (count * count - count), 100 * float(cosines.max())), None

    def say(self, scores):
        return [f"alike {scores.alike:.2f}"]

    def chance(self):
        return {"alike": 0.0}

    def checksum(self):
        return "".join(self.texts)

    def describe(self):
        return f"{len(self.texts)} phrases"


@pytest.fixture
def written(stores, tmp_path, monkeypatch):
    """A recipe that is judged by phrases, as a file, and the phrases."""
    monkeypatch.setattr(recipe_valid, "_registered", [])
    register(Phrases)
    phrases = ["一只红猫", "蓝鸟", "大星", "a dog", "黑白牛羊"]
    (tmp_path / "phrases.txt").write_text("\n".join(phrases), encoding="utf-8")
    content = tiny_recipe(stores, output=str(tmp_path / "run")).model_dump(mode="json")
    content["data"]["valid"] = {"mine": content["data"]["valid"], "said": {"phrases": str(tmp_path / "phrases.txt")}}
    del content["stages"]["align"]
    content["best_by"] = "said: alike"
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return tmp_path / "recipe.yaml", phrases


def test_it_decides_which_checkpoint_is_the_best(written, tmp_path, capsys):
    path, phrases = written
    assert train(load_recipe(path), **stopped_after(("contrast", 2))) is False
    whole = (tmp_path / "phrases.txt").read_bytes()
    (tmp_path / "phrases.txt").write_text("\n".join(phrases[1:]), encoding="utf-8")
    with pytest.raises(RequestError, match=r"data\.valid\.said\.phrases"):  # others than the run began with
        train(load_recipe(path), proceed=True)
    (tmp_path / "phrases.txt").write_bytes(whole)
    assert train(load_recipe(path), proceed=True)
    said, folder = capsys.readouterr().out, tmp_path / "run"
    assert "said: 5 phrases" in said and "said alike" in said
    judged = [r for r in records(folder, "validation") if r["stage"] == "contrast"]
    best = max(judged, key=lambda r: (r["scores"]["said"]["alike"], -r["step"]))
    info = read_info(folder / "contrast" / "best")
    assert info["score"] == best["scores"]["said"]["alike"]
    features = cnclip_ft.load(folder / "contrast" / "best").encode_texts(phrases).double().numpy()
    cosines = [features[i] @ features[j] for i in range(5) for j in range(i)]
    assert info["score"] == pytest.approx(10 * sum(cosines), abs=1e-3)
    assert json.loads((folder / "report" / "recall.json").read_text(encoding="utf-8"))["chance"]["said: alike"] == 0
    page = (folder / "report" / "index.html").read_text(encoding="utf-8")
    assert "said alike" in re.sub(r"</?span[^>]*>", "", page)


def test_its_settings_are_checked_and_listed_as_others_are(written):
    path, _ = written
    for override, says in (
        ("data.valid.said.most=few", r"data\.valid\.said\.most: Input should be a valid integer.*\(found 'few'\)"),
        ("data.valid.said.phrase=x", r"said\.phrase: unknown key; known here: store, .*boxes, phrases, most"),
        ("best_by='said: accuracy'", "scores there are alike, nearest: best_by='said: alike'"),
        ("best_by=other", r"of phrases best_by='SPLIT: alike\|nearest'"),
        ("data.valid={said: {phrases: x}}", "first validation split is a store"),
        ("data.valid={mine: x, said: {}}", "data.valid.said has one of store, zero_shot, boxes, phrases"),
    ):
        with pytest.raises(RequestError, match=says):
            load_recipe(path, [override])
    for language in ("en", "zh"):
        listed = {path: (kind, default) for path, kind, default, _ in rows(language)}
        assert listed["data.valid.NAME.most"][1] == "100" and "data.valid.NAME.phrases" in listed
    assert load_recipe(path).data.valid_places()[1:] == [str(path.with_name("phrases.txt"))]


def test_it_is_unknown_where_nobody_registered_it(written, monkeypatch):
    monkeypatch.setattr(recipe_valid, "_registered", [])
    with pytest.raises(RequestError, match=r"data\.valid\.said: nothing here says what is judged"):
        load_recipe(written[0])
