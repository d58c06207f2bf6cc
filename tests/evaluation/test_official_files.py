"""The official files: the same predictions and scores as the official scripts."""

from __future__ import annotations

import json

import pytest
import torch

from cnclip_ft.features import official_files as files
from cnclip_ft.retrieval.recall import recall, topk
from data_tools.errors import DataFault, RequestError
from tests.evaluation.tiny import random_split
from tests.official import requires_official, run_official

# All runs in one process: starting torch costs more than the scripts do.
SCRIPT = """
import json, pathlib, runpy
for name, *arguments in json.loads(pathlib.Path(sys.argv[1]).read_text(encoding="utf-8")):
    sys.argv = [name, *arguments]
    runpy.run_module("cn_clip.eval." + name, run_name="__main__")
"""


def write(path, *lines):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return path


@requires_official
def test_predictions_and_scores_are_those_of_the_official_scripts(tmp_path):
    runs, cases = [], []
    for seed in range(3):
        folder = tmp_path / str(seed)
        features = random_split(40 + 13 * seed, 150, dim=32, seed=seed)
        images, texts, answers = folder / "img.jsonl", folder / "txt.jsonl", folder / "valid_texts.jsonl"
        files.write_features(images, files.IdFeatures("image", features.image_ids, features.image_features))
        files.write_features(texts, files.IdFeatures("text", features.text_ids, features.text_features))
        owner = features.positives[:, 0].tolist()
        write(answers, *({"text_id": t, "text": "句", "image_ids": [1000 + owner[t]]} for t in features.text_ids))
        runs.append(["transform_ir_annotation_to_tr", f"--input={answers}"])
        for kind, suffix, golden in (("text", "", answers), ("image", "_tr", folder / "valid_texts.tr.jsonl")):
            predictions, score = folder / f"official_{kind}.jsonl", folder / f"score_{kind}.json"
            runs.append(
                [
                    f"make_topk_predictions{suffix}",
                    f"--image-feats={images}",
                    f"--text-feats={texts}",
                    f"--output={predictions}",
                ]
            )
            runs.append([f"evaluation{suffix}", str(golden), str(predictions), str(score)])
            cases.append((features, kind, images, texts, answers, predictions, score))
    (tmp_path / "runs.json").write_text(json.dumps(runs), encoding="utf-8")
    run_official(SCRIPT, tmp_path / "runs.json")

    for features, kind, images, texts, answers, predictions, score in cases:
        q, g, right = files.read_features(texts), files.read_features(images), files.read_answers(answers)
        if kind == "image":
            q, g, right = g, q, files.turn_answers(right)
            files.write_answers(tmp_path / "own.tr.jsonl", right)
            official_answers = answers.with_name("valid_texts.tr.jsonl").read_text(encoding="utf-8")
            assert (tmp_path / "own.tr.jsonl").read_text(encoding="utf-8") == official_answers
        _, indices = topk(q.features, g.features, 10)
        files.write_text(tmp_path / "ours.jsonl", files.prediction_lines(q.kind, q.ids, g.kind, g.ids, indices))
        assert (tmp_path / "ours.jsonl").read_text(encoding="utf-8") == predictions.read_text(encoding="utf-8")
        official = json.loads(score.read_text(encoding="utf-8"))
        scores = files.score_predictions(files.read_predictions(predictions), right)
        assert files.score_file(scores) == official
        whole = recall(features)
        direction = whole.text_to_image if kind == "text" else whole.image_to_text
        assert {f"r{k}": value for k, value in direction.recall.items()} == {
            key: official["scoreJson"][key] for key in ("r1", "r5", "r10")
        }
        assert 0 < scores["r1"] < 100


def test_features_come_back(tmp_path):
    items = files.IdFeatures("image", ["甲.jpg", 7], torch.tensor([[0.1, -2e-7], [1.0, 3.0]]))
    files.write_features(tmp_path / "f.jsonl", items)
    again = files.read_features(tmp_path / "f.jsonl")
    assert again.kind == "image" and again.ids == items.ids and torch.equal(again.features, items.features)


@pytest.mark.parametrize(
    "lines, said",
    [
        (
            [{"text_id": 1, "feature": [1, 2]}, {"text_id": 2, "feature": [1]}],
            "f.jsonl:2: a text feature of 1 values among",
        ),
        ([{"text_id": 1, "feature": [1]}, {"image_id": 2, "feature": [1]}], "f.jsonl:2: a image feature of 1"),
        ([{"text_id": 1, "feature": [1]}, {"text_id": 1, "feature": [1]}], "f.jsonl:2: text id 1 stands here"),
        ([{"text_id": 1, "feature": ["x"]}], "f.jsonl:1: the feature is not a list of numbers"),
        ([{"text_id": 1}], "f.jsonl:1: no field 'feature'"),
        ([{"feature": [1]}], "f.jsonl:1: no field 'image_id'"),
        ([[1]], "f.jsonl:1: the line is not a JSON object"),
    ],
)
def test_a_broken_feature_line_is_named(tmp_path, lines, said):
    with pytest.raises(DataFault) as caught:
        files.read_features(write(tmp_path / "f.jsonl", *lines))
    assert said in str(caught.value)


def test_a_line_that_is_not_json_is_named(tmp_path):
    path = tmp_path / "f.jsonl"
    path.write_text('{"text_id": 1, "feature": [1]}\n\n{"text_id": 2,\n', encoding="utf-8")
    with pytest.raises(DataFault, match="f.jsonl:3: the line is not JSON"):
        files.read_features(path)
    with pytest.raises(RequestError, match="cannot be read"):
        files.read_features(tmp_path / "none.jsonl")


def test_queries_without_answers_are_left_out_not_missed(tmp_path):
    answers = files.Answers("text", {1: [10], 2: [], 3: [12, 11]})
    predictions = files.Answers("text", {1: [10, 11], 2: [11, 12], 3: [10, 11]})
    scores = files.score_predictions(predictions, answers, ks=(1, 2))
    assert scores == {"r1": 50.0, "r2": 100.0, "mean_recall": 75.0, "queries": 2, "without_answer": 1}
    with pytest.raises(RequestError, match="no ground truth"):
        files.score_predictions(predictions, files.Answers("text", {1: []}), ks=(1,))


def test_predictions_that_cannot_be_scored_are_refused(tmp_path):
    answers = files.Answers("text", {1: [10], 2: [11]})
    with pytest.raises(RequestError, match="1 queries have no prediction, the first is 2"):
        files.score_predictions(files.Answers("text", {1: [10]}), answers, ks=(1,))
    with pytest.raises(RequestError, match="10 are needed"):
        files.score_predictions(files.Answers("text", {1: [10], 2: [11]}), answers)
    with pytest.raises(RequestError, match="answer images"):
        files.score_predictions(files.Answers("image", {10: [1]}), answers, ks=(1,))
    path = write(tmp_path / "p.jsonl", {"text_id": 1, "image_ids": [4, 4]})
    with pytest.raises(DataFault, match="p.jsonl:1: text 1 names an id twice"):
        files.read_predictions(path)
    path = write(tmp_path / "p.jsonl", {"text_id": 1, "image_ids": [4]}, {"text_id": 1, "image_ids": [5]})
    with pytest.raises(DataFault, match="p.jsonl:2: text 1 stands here a second time"):
        files.read_predictions(path)


def test_turning_answers_twice_keeps_the_pairs():
    answers = files.Answers("text", {1: [10, 11], 2: [10], 3: []})
    turned = files.turn_answers(answers)
    assert turned == files.Answers("image", {10: [1, 2], 11: [1]})
    assert files.turn_answers(turned) == files.Answers("text", {1: [10, 11], 2: [10]})


def test_a_file_is_whole_or_it_is_not_there(tmp_path):
    target = tmp_path / "out.jsonl"
    target.write_text("before\n", encoding="utf-8")

    def lines():
        yield "one"
        raise OSError("disk full")

    with pytest.raises(RequestError, match="cannot be written"):
        files.write_text(target, lines())
    assert target.read_text(encoding="utf-8") == "before\n" and list(tmp_path.iterdir()) == [target]
