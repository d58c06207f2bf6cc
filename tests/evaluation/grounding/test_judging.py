"""`evaluate --grounding`: a store with boxes against what the model's own maps say; tables that name their protocol."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import cnclip_ft
from cnclip_ft.cli import app
from cnclip_ft.evaluation.grounding.judging import PROTOCOLS
from cnclip_ft.models.checkpoints import save_checkpoint
from data_tools.store import StoreWriter
from tests.evaluation import tiny
from tests.models.helpers import RESNET, small

BOXES = {
    ("dog", "en"): [[0.0, 0.0, 0.5, 0.5]],
    ("一只狗", "zh"): [[0.0, 0.0, 0.5, 0.5], [0.5, 0.5, 0.5, 0.5]],
    ("cat", None): [[0.4, 0.4, 0.1, 0.1]],
}


@pytest.fixture(scope="module")
def boxes(tmp_path_factory):
    path = tmp_path_factory.mktemp("boxes") / "valid"
    with StoreWriter(path) as writer:
        for number in range(3):
            writer.add_image(number, tiny.png(number))
            for place, ((text, language), own) in enumerate(BOXES.items()):
                writer.add_pair(number, 10 * number + place, f"{text} {number}", language, beside={"boxes": own})
            writer.add_pair(number, 10 * number + 9, f"no boxes {number}", "en")
        writer.finish()
    return path


def run(*arguments):
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments), "--grounding", "--device", "cpu"])


def test_every_phrase_is_held_against_its_boxes(boxes, checkpoint, tmp_path):
    done = run(checkpoint, boxes, "--json", tmp_path / "a.json", "--batch-size", "8")
    assert done.exit_code == 0, done.output
    for said in PROTOCOLS.values():
        assert " ".join(done.output.split()).count(said) == 1
    assert "3 pairs without boxes are left out" in done.output and "method sclip" in done.output
    record = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    (split,) = record["splits"].values()
    scores = split["scores"]
    assert {name: group["phrases"] for name, group in scores.items()} == {
        "all": 9, "zh": 3, "en": 6, "one box": 6, "several boxes": 3, "small": 3, "not small": 6
    }  # fmt: skip
    assert scores["all"]["singles"] == 6 and scores["several boxes"]["accuracy"] is None
    assert scores["all"]["chance"] == pytest.approx(100 * (0.25 + 0.5 + 0.01) / 3, abs=0.01)
    # pointing, by hand
    model, hits = cnclip_ft.load(checkpoint), []
    for number in range(3):
        image = Image.open(__import__("io").BytesIO(tiny.png(number)))
        for (text, _), own in BOXES.items():
            (found,) = model.ground(image, [f"{text} {number}"])
            x, y = found.heat.point
            hits.append(any(a <= x <= a + w and b <= y <= b + h for a, b, w, h in own))
    assert scores["all"]["pointing"] == pytest.approx(100 * np.mean(hits))
    again = run(checkpoint, boxes, "--json", tmp_path / "a.json", "--markdown", tmp_path / "a.md", "--method", "naclip")
    assert again.exit_code == 0 and json.loads((tmp_path / "a.json").read_text())["method"] == "naclip"
    assert run(checkpoint, boxes, "--markdown", tmp_path / "a.md").exit_code == 0  # its own table is written over
    assert (tmp_path / "a.md").read_text(encoding="utf-8").count("| --- |") == 4


@pytest.mark.parametrize(
    "arguments,says",
    [
        ([], "name at least one split"),
        (["STORE"], "none of its .* pairs has boxes.*docs/grounding.md#boxes-in-a-store"),
        (["BOXES", "--method", "gradcam"], "method 'gradcam': .* knows maskclip, sclip, naclip"),
        (["BOXES", "--threshold", "1.5"], "the threshold is 1.5; it is a share"),
        (["BOXES", "--by", "类目"], "--by is for recall"),
        (["BOXES", "--official", "x"], "--official is for recall"),
    ],
)
def test_what_cannot_be_judged_is_refused_in_words(arguments, says, boxes, checkpoint, store):
    given = [{"BOXES": str(boxes), "STORE": str(store)}.get(word, word) for word in arguments]
    done = run(checkpoint, *given)
    assert done.exit_code != 0 and isinstance(done.exception, Exception)
    assert __import__("re").search(says, str(done.exception), __import__("re").S), str(done.exception)


def test_a_tower_without_patches_is_refused(boxes, tmp_path):
    save_checkpoint(small(RESNET), tmp_path / "resnet", info={})
    done = run(tmp_path / "resnet", boxes)
    assert "gives no features of single patches" in str(done.exception)


def test_options_of_grounding_need_it(boxes, checkpoint):
    done = CliRunner().invoke(app, ["evaluate", str(checkpoint), str(boxes), "--method", "sclip"])
    assert "give --grounding too" in str(done.exception)


def test_a_model_that_knows_where_scores_100(boxes, checkpoint, monkeypatch):
    """Patches that are the phrase's own feature inside its box, and its opposite elsewhere."""
    model = cnclip_ft.load(checkpoint)

    def patches(self, pixels, method):
        from cnclip_ft.models.dense import Patches

        direction = self.given[len(pixels)]
        features = -direction.expand(len(pixels), 64, -1).clone()
        inside = torch.zeros(8, 8, dtype=torch.bool)
        inside[:4, :4] = True
        features[:, inside.flatten()] *= -1
        return Patches(features, torch.full((len(pixels), 2), 8))

    kind = type(model)
    texts = model.encode_texts([f"dog {number}" for number in range(3)])
    monkeypatch.setattr(kind, "given", {1: texts[:1]}, raising=False)
    monkeypatch.setattr(kind, "patch_features", patches)
    (found,) = model.ground(Image.new("RGB", (40, 40)), ["dog 0"])
    assert found.heat.values[:4, :4] == pytest.approx(np.ones((4, 4)), abs=1e-5)
    assert found.boxes[0].box == pytest.approx((0, 0, 0.5, 0.5), abs=0.01) and len(found.boxes) == 1
