"""Self-training: boxes for the phrases of plain pairs, kept by their probability, continued, whole or not there."""

from __future__ import annotations

import pytest
import torch
from typer.testing import CliRunner

from cnclip_ft.cli import app
from cnclip_ft.data.boxed import read_boxed
from cnclip_ft.evaluation.grounding import box_writing
from cnclip_ft.evaluation.grounding.box_writing import write_boxes
from cnclip_ft.evaluation.options import Options, open_model
from cnclip_ft.grounding import finder
from cnclip_ft.grounding.phrases import phrases_of
from cnclip_ft.models.checkpoints import save_checkpoint
from cnclip_ft.models.heads import new_heads
from data_tools.errors import DataFault, RequestError
from data_tools.store import is_store, open_store
from tests.training.boxes import write_boxes as write_store
from tests.training.helpers import tiny_model


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A checkpoint whose boxes are of all probabilities, one that has none, and a store."""
    folder = tmp_path_factory.mktemp("writing")
    model = tiny_model(dropout=0.0).eval()
    save_checkpoint(model, folder / "plain", info={})
    torch.manual_seed(1)
    model.heads = new_heads(model.image_tower).eval()
    for parameter in model.heads.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    save_checkpoint(model, folder / "learnt", info={})
    write_store(folder / "store", pictures=20, seed=4, plain=6)
    return folder


def opened(place, name="learnt"):
    return open_model(place / name, Options(device="cpu", batch_size=32))


def test_phrases_keep_the_boxes_that_are_probable(place, tmp_path, monkeypatch):
    chances = {"the red thing": 0.9, "红色的东西": 0.4}
    asked = []

    def find(model, pictures, phrases, texts, how):
        asked.extend(phrases)
        return [
            [
                finder.Grounded(
                    one,
                    None,
                    [
                        finder.Region((0.1, 0.2, 0.3, 0.4), chances.get(one, 0.1)),
                        finder.Region((0.5, 0.5, 0.2, 0.2), 0.35),
                    ],
                    learnt=True,
                )
                for one in own
            ]
            for own in phrases
        ]

    monkeypatch.setattr(box_writing, "find", find)
    source = open_store(place / "store")
    done = write_boxes(opened(place), source.path, tmp_path / "found", threshold=0.38)
    said = {image_id: [] for image_id in source.image_ids}
    for pair in source.pairs():
        said[pair.image_id] += [one for one in phrases_of(pair.text) if one not in said[pair.image_id]]
    assert asked == list(said.values()) and done.asked == sum(map(len, said.values()))
    written = open_store(tmp_path / "found")
    found = read_boxed(written, "here")
    assert set(found.texts) == set(chances)
    assert done.kept == sum(one in chances for own in said.values() for one in own) == len(written)
    for pair, beside in written.pairs_and_beside():
        assert beside["boxes"] == [[0.1, 0.2, 0.3, 0.4]] and pair.language == ("zh" if "红" in pair.text else "en")
        assert written.image(pair.image_id) == source.image(pair.image_id)
    assert done.boxes == done.kept and done.pictures == len(written.image_ids) < 20


def test_it_goes_on_where_it_was_interrupted(place, tmp_path, monkeypatch):
    write_boxes(opened(place), place / "store", tmp_path / "whole", threshold=0.2)
    right = box_writing.find
    calls = []

    def stops(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return right(*arguments)

    monkeypatch.setattr(box_writing, "find", stops)
    monkeypatch.setattr("data_tools.store.databases.Databases.large", property(lambda databases: True))
    with pytest.raises(KeyboardInterrupt):
        write_boxes(opened(place), place / "store", tmp_path / "parts", threshold=0.2)
    assert not is_store(tmp_path / "parts")
    calls.clear()
    monkeypatch.setattr(box_writing, "find", lambda *arguments: calls.append(1) or right(*arguments))
    done = write_boxes(opened(place), place / "store", tmp_path / "parts", threshold=0.2, proceed=True)
    assert 0 < len(calls) < 5  # 20 pictures, 4 at once
    whole, parts = open_store(tmp_path / "whole"), open_store(tmp_path / "parts")
    assert whole.checksum() == parts.checksum() and done.kept == len(whole)


def test_what_cannot_be_is_refused_in_words(place, tmp_path):
    with pytest.raises(RequestError, match="has not learnt boxes"):
        write_boxes(opened(place, "plain"), place / "store", tmp_path / "found")
    with pytest.raises(RequestError, match="it is a probability"):
        write_boxes(opened(place), place / "store", tmp_path / "found", threshold=1.5)
    with pytest.raises(DataFault, match="no box of any phrase has a probability of 0.999999"):
        write_boxes(opened(place), place / "store", tmp_path / "found", threshold=0.999999)
    assert not (tmp_path / "found").exists()


def test_the_command_says_what_is_kept(place, tmp_path):
    def ground(*words):
        return CliRunner().invoke(app, ["ground", str(place / "learnt"), *map(str, words), "--device", "cpu"])

    wanted = ("--write-boxes", tmp_path / "found", "--threshold", "0.2")
    first = ground(place / "store", *wanted)
    assert first.exit_code == 0 and "are kept" in first.output and "thrown away" in first.output
    assert is_store(tmp_path / "found")
    again = ground(place / "store", *wanted)
    assert isinstance(again.exception, RequestError) and "found" in str(again.exception)
    assert ground(place / "store", *wanted, "--overwrite").exit_code == 0
    two = ground(place / "store", place / "store", *wanted)
    assert "takes one store" in str(two.exception)
    more = ("--json", tmp_path / "out.json", "--most", "3", "--method", "sclip")
    told = ground(place / "store", *wanted, "--overwrite", *more)
    assert str(told.exception).startswith("--method, --most, --json: not with --write-boxes")
    assert ground(place / "store", *wanted, "--overwrite", "--method", "learnt").exit_code == 0
    for option in ("--continue", "--overwrite"):
        assert f"{option} is for --write-boxes" in str(ground(__file__, "a dog", option).exception)
