"""Learnt boxes leave with the towers: as a graph of their own in ONNX exports, and in no format that has no place for them."""

from __future__ import annotations

import json
import logging

import numpy as np
import onnxruntime
import pytest
import torch

from cnclip_ft.export import ground_graph
from cnclip_ft.export.run import export_checkpoint
from cnclip_ft.grounding.learnt import detect
from cnclip_ft.models.checkpoints import load, save_checkpoint
from cnclip_ft.models.heads import GroundingHeads, new_heads
from data_tools.errors import RequestError, UserError
from tests.models.helpers import small

SPEC = {
    "image": {"kind": "vit", "hidden": 32, "layers": 2, "heads": 2, "patch": 8, "image_size": 32},
    "text": {"hidden": 32, "layers": 1, "heads": 2},
    "projection": 24,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    model = small(SPEC)
    torch.manual_seed(3)
    model.heads = new_heads(model.image_tower)
    for parameter in model.heads.parameters():  # far from where heads begin
        torch.nn.init.normal_(parameter, std=0.3)
    folder = tmp_path_factory.mktemp("learnt") / "a"
    save_checkpoint(model, folder, info={})
    return folder


def test_a_checkpoint_keeps_its_heads_and_the_towers_are_as_without(checkpoint, tmp_path):
    model = load(checkpoint)
    assert isinstance(model.heads, GroundingHeads)
    again = tmp_path / "again"
    save_checkpoint(model, again, info={})
    other = load(again)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    assert load(checkpoint, dimensions=8).heads is None
    assert load(checkpoint, dtype=torch.float16).heads.feature.weight.dtype == torch.float16
    description = json.loads((checkpoint / "cnclip_ft.json").read_text())
    description["model"]["heads"]["dim"] = 16
    (again / "cnclip_ft.json").write_text(json.dumps(description))
    with pytest.raises(RequestError, match=r"heads.dim is 16, expected: 24"):
        load(again)
    description["model"]["heads"] = {"width": 16, "dim": 24}
    (again / "cnclip_ft.json").write_text(json.dumps(description))
    with pytest.raises(RequestError, match=r"heads\.\S+ is \[32\], expected \[16\]"):
        load(again)


def test_the_graph_gives_the_models_boxes(checkpoint, tmp_path):
    export_checkpoint(checkpoint, "onnx", tmp_path / "onnx")
    said = json.loads((tmp_path / "onnx" / "description.json").read_text())["ground"]
    session = onnxruntime.InferenceSession(str(tmp_path / "onnx" / said["file"]))
    model = load(checkpoint)
    pixels = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    phrases = model.encode_texts(["红色的伞", "a red umbrella", "dog", "猫"])
    boxes, scores = session.run(said["outputs"], {"pixels": pixels.numpy(), "phrases": phrases.numpy()})
    assert boxes.shape == (5, 16, 4) and scores.shape == (5, 16, 4)
    with torch.no_grad():
        found = detect(model.regions(pixels), phrases, same=1.0)
    for picture in range(5):
        for phrase in range(4):
            order = np.argsort(-scores[picture, :, phrase])
            np.testing.assert_allclose(scores[picture, order, phrase], found[picture][phrase].scores, atol=1e-4)
            np.testing.assert_allclose(boxes[picture, order[0]], found[picture][phrase].boxes[0], atol=1e-4)


def test_a_tower_by_import_path_leaves_for_any_number_of_pictures(tmp_path):
    """The graph is tried with one picture and with two."""
    model = small(SPEC | {"image": "tests.models.tower_fixture:mapped"})
    model.heads = new_heads(model.image_tower)
    ground_graph.write(model.eval(), tmp_path, "float32")
    assert (tmp_path / ground_graph.FILE).is_file()


def test_a_graph_that_differs_is_not_kept(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(ground_graph, "_run", lambda place, pixels, phrases: [np.zeros((1, 1, 4)), np.zeros((1, 1, 1))])
    with pytest.raises(UserError, match="differ from the source"):
        export_checkpoint(checkpoint, "onnx", tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


def test_a_format_without_a_place_for_heads_leaves_them_out(checkpoint, tmp_path, monkeypatch):
    told, handler = [], logging.Handler()
    handler.emit = told.append
    monkeypatch.setattr(logging.getLogger("transformers"), "handlers", [handler])
    export_checkpoint(checkpoint, "huggingface", tmp_path / "hf")
    assert told == []  # transformers reports tensors that it does not know
    assert load(tmp_path / "hf").heads is not None
