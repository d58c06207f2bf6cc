"""Captions and their twins: which are asked about, what counts as right, and the table."""

from __future__ import annotations

import json

import pytest
import torch

from cnclip_ft.calls import evaluate
from cnclip_ft.evaluation.options import Opened
from cnclip_ft.evaluation.scores.twins import Twin, TwinScores, find_twins, score_twins, twin_table
from cnclip_ft.features.encode import SplitFeatures, SplitTexts
from cnclip_ft.models.checkpoints import load
from data_tools.errors import RequestError
from data_tools.store import StoreWriter, open_store
from tests.evaluation import tiny


def split_of(*texts: str) -> SplitTexts:
    """Picture i has text i, and the last text too."""
    count = len(texts)
    pairs = torch.tensor([(n, n) for n in range(count)] + [(n, count - 1) for n in range(count - 1)])
    return SplitTexts(list(range(count)), list(range(count)), list(texts), [None] * count, pairs)


def test_a_twin_of_every_attribute_in_words_of_the_split():
    split = split_of("左边有一只黑色的狗", "two white cats", "a white dog", "黑色的小猫", "好天气")
    twins = find_twins(split)
    found = {(twin.image, twin.text, twin.kind): twin.swapped for twin in twins if twin.image < 2}
    assert found == {
        (0, 0, "colour"): "左边有一只白色的狗", (0, 0, "number"): "左边有两只黑色的狗", (0, 0, "position"): "右边有一只黑色的狗",
        (0, 0, "object"): "左边有一只黑色的猫", (1, 1, "colour"): "two black cats", (1, 1, "number"): "a white cat",
        (1, 1, "object"): "two white dogs",
    }  # fmt: skip
    assert {twin.language for twin in twins if twin.image == 0} == {"zh"} and find_twins(split) == twins


def test_no_twin_has_a_thing_in_a_colour_that_no_caption_gives_it():
    """Of black and white, dogs and cats, only the black dog and the white cat are met: both sentences stay as they are."""
    twins = find_twins(split_of("左边有一只黑色的狗", "two white cats", "好天气"))
    assert {(twin.image, twin.kind) for twin in twins} == {(0, "number"), (0, "position"), (1, "number")}


def test_what_another_caption_of_the_picture_says_is_not_asked():
    split = split_of("一只黑色的狗", "一只白色的狗")  # the second stands on the first picture too
    assert [(twin.image, twin.kind) for twin in find_twins(split)] == [(1, "colour")]
    split.positives = split.positives[:2]
    assert [(twin.image, twin.kind) for twin in find_twins(split)] == [(0, "colour"), (1, "colour")]


def test_nearer_to_the_caption_is_right_and_a_tie_is_not():
    images = torch.eye(3)
    texts = torch.tensor([[1.0, 0, 0], [0, 0.6, 0.8], [0, 0, 1.0]])
    features = SplitFeatures([0, 1, 2], [0, 1, 2], ["", "", ""], [None] * 3, torch.empty(0, 2), images, texts)
    kinds = (("colour", "zh"), ("colour", "zh"), ("number", "en"))
    twins = [Twin(n, n, kind, language, "") for n, (kind, language) in enumerate(kinds)]
    swapped = torch.tensor([[0.9, 0.1, 0], [0, 0.8, 0.6], [0, 0, 1.0]])  # right, wrong, a tie
    scores = score_twins(features, swapped, twins)
    assert scores.counts == {("colour", "zh"): (1, 2), ("number", "en"): (0, 1)}
    assert (
        scores.of("colour") == (50.0, 2) and scores.of(language="en") == (0.0, 1) and scores.of("object") == (None, 0)
    )
    assert (
        scores.accuracy == pytest.approx(100 / 3) and scores.value("number") == 0.0 and scores.languages == ["en", "zh"]
    )
    lines = [line.split() for line in twin_table({"valid": scores}).splitlines()]
    assert lines[0][-6:] == ["colour", "number", "position", "object", "all", "twins"]
    assert lines[2] == ["valid", "50.0", "0.0", "–", "–", "33.3", "3"]
    assert lines[3] == ["valid", "·", "en", "–", "0.0", "–", "–", "0.0", "1"]
    assert lines[-1] == ["chance", *["50.0"] * 5]
    assert "| valid | 50.0 | 0.0 | – | – | 33.3 | 3 |" in twin_table({"valid": scores}, markdown=True)
    assert TwinScores({}).accuracy is None


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    folder = tmp_path_factory.mktemp("told")
    captions = ("一只黑色的狗", "两只白色的猫", "three red cars on the left", "a blue bus on the right")
    with StoreWriter(folder / "valid") as writer:
        for number, caption in enumerate(captions):
            writer.add_image(number, tiny.png(number))
            writer.add_pair(number, number, caption, "zh" if number < 2 else "en")
        writer.finish()
    with StoreWriter(folder / "nothing") as writer:
        writer.add_image(1, tiny.png(1))
        writer.add_pair(1, 1, "好天气", "zh")
        writer.finish()
    tiny.make_checkpoint(folder / "model")
    return folder


def test_a_checkpoint_is_asked_about_each(told):
    card = evaluate(told / "model", told / "valid", told / "nothing", swapped=True, device="cpu")
    model, store = load(told / "model"), open_store(told / "valid")
    texts = [pair.text for pair in store.pairs()]
    pictures = model.encode_images([store.image(number) for number in range(4)])
    right = asked = 0
    for twin in find_twins(split_of(*texts)):
        if twin.image == twin.text:
            own, other = model.encode_texts([texts[twin.text], twin.swapped]) @ pictures[twin.image]
            right, asked = right + bool(own > other), asked + 1
    assert card.twins["valid"].of() == (pytest.approx(100 * right / asked), asked)
    record = card.as_dict()["splits"]
    assert record["valid"]["swapped"]["twins"] == asked and record["valid"]["swapped"]["chance"] == 50
    assert json.loads(json.dumps(record))["valid"]["swapped"]["position"]["twins"] == 2
    assert "told from swapped" in card.table() and "| chance | 50.0" in card.table(markdown=True)
    assert "swapped" not in record["nothing"]
    assert any(note.startswith("nothing: no caption has an attribute to swap (colour, number") for note in card.notes)
    assert "told from swapped" not in evaluate(told / "model", told / "valid", device="cpu").table()


def test_a_twin_that_the_model_cuts_before_it_differs_is_a_tie(tmp_path, monkeypatch):
    with StoreWriter(tmp_path / "valid") as writer:
        for number, caption in enumerate(("黑色的门，一只狗", "白色的门，两只猫")):
            writer.add_image(number, tiny.png(number))
            writer.add_pair(number, number, 60 * "很" + caption, "zh")
        writer.finish()
    tiny.make_checkpoint(tmp_path / "model")
    exact = Opened.text_features
    monkeypatch.setattr(Opened, "text_features", lambda *given: 0.999 * exact(*given))  # another batch rounds otherwise
    twins = evaluate(tmp_path / "model", tmp_path / "valid", swapped=True, device="cpu").twins["valid"]
    assert twins.of() == (0.0, 6)
    monkeypatch.setattr(Opened, "text_features", lambda *given: 1.001 * exact(*given))
    assert evaluate(tmp_path / "model", tmp_path / "valid", swapped=True, device="cpu").twins["valid"] == twins


def test_features_without_a_model_cannot_be_asked(told, tmp_path):
    from cnclip_ft.evaluation.encoding import encode_to_folder
    from cnclip_ft.evaluation.options import Options

    encode_to_folder(
        told / "model", told / "valid", tmp_path / "features", Options(device="cpu"), say=lambda line: None
    )
    with pytest.raises(RequestError, match="have to be read by a model"):
        evaluate(tmp_path / "features", swapped=True)
