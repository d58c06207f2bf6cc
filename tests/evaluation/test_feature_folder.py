"""`encode` into a folder: blocks shared and taken up, nothing mixed with another request."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from cnclip_ft.evaluation.encoding import encode_to_folder
from cnclip_ft.evaluation.options import Options
from cnclip_ft.evaluation.scores.scorecard import score_checkpoint, score_features
from cnclip_ft.features import folder
from cnclip_ft.features.folder import FeatureWriter, read_set, read_split
from cnclip_ft.features.rows import Rows
from cnclip_ft.retrieval.recall import recall
from data_tools.errors import RequestError, UserError
from tests.evaluation.tiny import make_checkpoint, random_split

SETTINGS = {"checkpoint": {"checksum": "a"}, "settings": {}, "source": {"name": "valid", "path": "valid"}}

DIM = random_split(1, 1).image_features.shape[1]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(folder, "PART", {"image": 5, "text": 8})


def test_features_come_back_in_order(tmp_path):
    split = random_split(12, 30)
    writer = FeatureWriter(tmp_path / "f", split, SETTINGS, dim=DIM, half=False)
    for kind, values in (("image", split.image_features), ("text", split.text_features)):
        rows = writer.rows[kind]
        for block in reversed(rows.missing()):
            rows.write(block, values[block.start : block.stop].numpy())
    writer.finish({})
    again = read_split(tmp_path / "f")
    assert torch.equal(again.image_features, split.image_features) and torch.equal(
        again.text_features, split.text_features
    )
    assert again.image_ids == split.image_ids and again.texts == split.texts
    assert sorted(again.positives.tolist()) == sorted(split.positives.tolist())
    assert recall(again).as_dict() == recall(split).as_dict()
    assert not (tmp_path / "f" / "parts").exists()


def test_processes_share_the_blocks(tmp_path):
    writer = FeatureWriter(tmp_path / "f", random_split(12, 30), SETTINGS, dim=DIM, half=False)
    shares = [[block.start for block in writer.rows["image"].missing(share, 2)] for share in (0, 1)]
    assert shares == [[0, 10], [5]]


def test_an_interrupted_run_is_taken_up_and_ends_the_same(tmp_path, store, checkpoint, monkeypatch):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    encode_to_folder(checkpoint, store, whole, Options(batch_size=4), say=lambda _: None)
    written = []
    write = Rows.write

    def stop_after_two(self, block, *rest):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append((self.name, block))
        write(self, block, *rest)

    monkeypatch.setattr(Rows, "write", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        encode_to_folder(checkpoint, store, broken, Options(batch_size=4), say=lambda _: None)
    with pytest.raises(RequestError, match="unfinished: give the `encode` command again"):
        read_split(broken)
    again = []
    monkeypatch.setattr(
        Rows, "write", lambda self, block, *rest: (again.append((self.name, block)), write(self, block, *rest))
    )
    encode_to_folder(checkpoint, store, broken, Options(batch_size=4), say=lambda _: None)
    assert len(again) == 3 + 4 - 2 and not set(again) & set(written)
    for name in ("image_features.npy", "text_features.npy"):
        assert np.allclose(np.load(whole / name), np.load(broken / name), atol=1e-6)
    assert (whole / "texts.jsonl").read_bytes() == (broken / "texts.jsonl").read_bytes()


def test_what_is_there_is_not_mixed_with_another_request(tmp_path, store, checkpoint):
    folder, quiet = tmp_path / "f", {"say": lambda _: None}
    encode_to_folder(checkpoint, store, folder, Options(), **quiet)
    with pytest.raises(RequestError, match="finished features"):
        encode_to_folder(checkpoint, store, folder, Options(), **quiet)
    before = np.load(folder / "text_features.npy")
    other = make_checkpoint(tmp_path / "other", seed=5)
    encode_to_folder(other, store, folder, Options(), overwrite=True, half=True, **quiet)
    after = np.load(folder / "text_features.npy")
    assert after.dtype == np.float16 and not np.allclose(before, after, atol=1e-2)
    split = random_split(12, 30)
    FeatureWriter(tmp_path / "g", split, SETTINGS, dim=DIM, half=False)
    with pytest.raises(RequestError, match="another request"):
        FeatureWriter(tmp_path / "g", split, SETTINGS | {"checkpoint": {"checksum": "b"}}, dim=DIM, half=False)


@pytest.mark.parametrize("what", ["image_ids", "texts"])
def test_parts_of_another_order_are_not_gone_on_with(tmp_path, what):
    FeatureWriter(tmp_path / "f", random_split(12, 30), SETTINGS, dim=DIM, half=False)
    FeatureWriter(tmp_path / "f", random_split(12, 30), SETTINGS, dim=DIM, half=False)  # the same request
    turned = random_split(12, 30)
    setattr(turned, what, getattr(turned, what)[::-1])
    with pytest.raises(RequestError, match="another request"):
        FeatureWriter(tmp_path / "f", turned, SETTINGS, dim=DIM, half=False)


def test_a_stop_between_the_arrays_taking_their_place_and_the_end(tmp_path, store, checkpoint, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as changed, pytest.raises(KeyboardInterrupt):
        changed.setattr(folder, "text_lines", stop)
        encode_to_folder(checkpoint, store, tmp_path / "f", Options(), say=lambda _: None)
    assert not folder.is_feature_folder(tmp_path / "f") and (tmp_path / "f" / "text_features.npy").exists()
    with monkeypatch.context() as changed:
        changed.setattr(Rows, "write", stop)  # nothing is computed again
        encode_to_folder(checkpoint, store, tmp_path / "f", Options(), say=lambda _: None)
    assert score_features(tmp_path / "f", Options()).scores["valid"].as_dict() == (
        score_checkpoint(checkpoint, [store], Options()).scores["valid"].as_dict()
    )


def test_a_part_of_version_0_1_0_is_taken_up_with_its_faults(tmp_path):
    split = random_split(12, 30)
    parts = FeatureWriter(tmp_path / "f", split, SETTINGS, dim=DIM, half=False).parts_folder
    for name in ("image", "text"):  # as that version left it: a plan, and a file for each part
        (parts / f"{name}_features.npy").unlink()
        (parts / f"{name}_done.npy").unlink()
    np.save(parts / "image-000001.npy", split.image_features[5:10].numpy())
    (parts / "image-000001.faults.jsonl").write_text('[6, {"problem": "broken"}]\n')
    (parts / "image-000002.npy").write_bytes(b"cut short")
    rows = FeatureWriter(tmp_path / "f", split, SETTINGS, dim=DIM, half=False).rows["image"]
    assert [block.number for block in rows.missing()] == [0, 2] and rows.faults() == {6: {"problem": "broken"}}
    assert np.array_equal(rows.read()[5:10], split.image_features[5:10].numpy())


def test_a_lost_block_is_noticed(tmp_path):
    split = random_split(12, 30)
    writer = FeatureWriter(tmp_path / "f", split, SETTINGS, dim=DIM, half=False)
    rows = writer.rows["image"]
    rows.write(rows.missing()[0], split.image_features[:5].numpy())
    with pytest.raises(UserError, match="holds 5 of 12 image features"):
        writer.finish({})
    assert not folder.is_feature_folder(tmp_path / "f")


def test_features_score_as_the_checkpoint_they_are_of(tmp_path, store, checkpoint):
    folder = tmp_path / "f"
    encode_to_folder(checkpoint, store, folder, Options(), file_format="jsonl", say=lambda _: None)
    direct = score_checkpoint(checkpoint, [store], Options())
    stored = score_features(folder, Options())
    assert direct.scores["valid"].as_dict() == stored.scores["valid"].as_dict()
    assert stored.record["checkpoint"]["checksum"] == direct.record["checkpoint"]["checksum"]
    official = read_set(folder / "valid_texts.txt_feat.jsonl", "text")
    assert torch.equal(official.features, read_set(folder, "text").features)
    assert official.ids == read_set(folder / "text_features.npy", "text").ids


def test_a_folder_of_images_and_a_file_of_texts(tmp_path, store, checkpoint):
    from tests.evaluation.tiny import png

    (tmp_path / "photos" / "a").mkdir(parents=True)
    for number in range(3):
        (tmp_path / "photos" / "a" / f"{number}.png").write_bytes(png(number))
    (tmp_path / "words.txt").write_text("猫\n\n狗\n", encoding="utf-8")
    encode_to_folder(checkpoint, tmp_path / "photos", tmp_path / "p", Options(), say=lambda _: None)
    encode_to_folder(checkpoint, tmp_path / "words.txt", tmp_path / "w", Options(), say=lambda _: None)
    assert read_set(tmp_path / "p", "image").ids == ["a/0.png", "a/1.png", "a/2.png"]
    assert read_set(tmp_path / "w", "text").ids == [0, 1]
    with pytest.raises(RequestError, match="recall needs images and texts"):
        score_features(tmp_path / "p", Options())


def test_foreign_arrays(tmp_path):
    np.save(tmp_path / "x.npy", np.ones((3, 4), dtype=np.float16))
    assert read_set(tmp_path / "x.npy", "image").ids == [0, 1, 2]
    (tmp_path / "x.ids.jsonl").write_text("\n".join(map(json.dumps, ["甲", "乙"])), encoding="utf-8")
    with pytest.raises(RequestError, match="names 2 ids for 3 rows"):
        read_set(tmp_path / "x.npy", "image")
    np.save(tmp_path / "y.npy", np.ones(3))
    with pytest.raises(RequestError, match=r"expected floats \[n, dim\]"):
        read_set(tmp_path / "y.npy", "image")
    (tmp_path / "z.npy").write_bytes(b"nonsense")
    with pytest.raises(RequestError, match="not a readable .npy"):
        read_set(tmp_path / "z.npy", "image")
    with pytest.raises(RequestError, match="no such file"):
        read_set(tmp_path / "none.npy", "image")
